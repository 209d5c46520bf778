"""TensorBoard and Weights & Biases by config: the curves are on disk, without a network."""

import pytest

from tests.support.fakes import CoordinatorProcess, FakeRanks, wait_for

ONE = {"context_ids": [1, 2], "continuation_ids": [3, 4]}


def train(folder, **writers):
    """Three steps with these writers; the coordinator is stopped after them."""
    with (
        CoordinatorProcess(folder, writers=writers, env={"WANDB_SILENT": "true"}) as coordinator,
        FakeRanks(coordinator.ranks_socket, folder / "journal"),
        coordinator.client() as client,
    ):
        wait_for(lambda: client.get("/health").json()["trainer"])
        assert client.post("/train", json=ONE | {"epochs": 3, "wait": True}).json()["state"] == "succeeded"


def test_tensorboard_gets_every_step(tmp_path):
    """The event file holds the loss of each weight version."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tmp_path, tensorboard_dir=str(tmp_path / "tb"))
    events = accumulator.EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("apollo/loss")] == [
        (1, 2.5),
        (2, 5 / 3),
        (3, 1.25),
    ]
    assert [e.value for e in events.Scalars("apollo/tokens")] == [4, 8, 12]


def test_wandb_works_offline(tmp_path):
    """An offline run is written below the state folder; no network is needed."""
    pytest.importorskip("wandb")
    train(tmp_path, wandb_project="apollo")
    runs = list((tmp_path / "state" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 1
    content = runs[0].read_bytes()
    for name in (b"loss", b"grad_norm", b"tokens"):
        assert name in content


def test_a_missing_tool_is_a_sentence(tmp_path, monkeypatch):
    """Asked for a tool that is not installed, the coordinator refuses to start, with a message what to install."""
    (tmp_path / "block").mkdir()
    (tmp_path / "block" / "tensorboard.py").write_text("raise ImportError('No module named tensorboard')")
    env = {"PYTHONPATH": str(tmp_path / "block")}
    coordinator = CoordinatorProcess(tmp_path, writers={"tensorboard_dir": str(tmp_path / "tb")}, env=env)
    with pytest.raises(AssertionError, match="pip install tensorboard"):
        coordinator.start()

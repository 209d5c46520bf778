"""TensorBoard and Weights & Biases by config: the curves are on disk, without a network."""

from types import SimpleNamespace

import pytest

from apollo_tp.coordinator.jobs.writers import Writer
from tests.support.fakes import CoordinatorProcess, FakeRanks, wait_for
from tests.support.figures import step_figures

ONE = {"context_ids": [1, 2], "continuation_ids": [3, 4]}
SAMPLED = {
    "prompt_ids": [1, 2], "completion_ids": [3, 4], "sampling_logprobs": [-0.5, -0.5], "advantage": 1.0, "reward": 0.25,
    "loss": "ppo",
}  # fmt: skip


def train(folder, sample=ONE, **writers):
    """Three steps with these writers; the coordinator is stopped after them."""
    with (
        CoordinatorProcess(folder, writers=writers, env={"WANDB_SILENT": "true"}) as coordinator,
        FakeRanks(coordinator.ranks_socket, folder / "journal"),
        coordinator.client() as client,
    ):
        wait_for(lambda: client.get("/health").json()["trainer"])
        assert client.post("/train", json=sample | {"epochs": 3, "wait": True}).json()["state"] == "succeeded"


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


def test_tensorboard_gets_the_figures_of_a_loss_over_sampled_tokens(tmp_path):
    """As they are in the events: rewards, mismatch and the like."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tmp_path, SAMPLED, tensorboard_dir=str(tmp_path / "tb"))
    events = accumulator.EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [e.value for e in events.Scalars("apollo/reward_mean")] == [0.25] * 3
    assert [e.value for e in events.Scalars("apollo/mismatch_kl")] == pytest.approx([0.01, 0.02, 0.03])


def test_tokens_go_on_over_a_restart(tmp_path):
    """Of the coordinator: its first job's tokens are counted by the second one's curve."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for _ in range(2):
        train(tmp_path, tensorboard_dir=str(tmp_path / "tb"))
    events = accumulator.EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [e.value for e in events.Scalars("apollo/tokens")][-3:] == [16, 20, 24]


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
    coordinator = CoordinatorProcess(tmp_path, forked=False, writers={"tensorboard_dir": str(tmp_path / "tb")}, env=env)
    with pytest.raises(AssertionError, match="pip install tensorboard"):
        coordinator.start()


def test_a_file_in_place_of_the_folder_is_refused_with_its_option(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "tb").write_text("mine")
    coordinator = CoordinatorProcess(tmp_path, writers={"tensorboard_dir": str(tmp_path / "tb")})
    with pytest.raises(
        AssertionError, match=r"service\.writers\.tensorboard_dir: got .*/tb .*expected a writable folder"
    ):
        coordinator.start()
    assert "Traceback" not in coordinator.log_path.read_text()


def test_tokens_go_on_over_jobs():
    """As the axis does, the weight version."""
    written = []
    with Writer("test", written.append, lambda: None) as writer:
        for job_id, version in (("a", 1), ("a", 2), ("b", 3)):
            writer(SimpleNamespace(id=job_id, tokens=4), step_figures(weight_version=version))
    assert [(job, version, values["tokens"]) for job, version, _, values in written] == [
        ("a", 1, 4.0), ("a", 2, 8.0), ("b", 3, 12.0),
    ]  # fmt: skip

"""What a trainer that starts again knows of the served weights, and which optimizer state it takes."""

from __future__ import annotations

import contextlib
import errno
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from apollo_tp.checkpoint import optimizer_state
from apollo_tp.checkpoint.lineage import Lineage, LineageFile
from apollo_tp.config import CheckpointConfig, Config, OptimConfig, ServerConfig
from apollo_tp.distributed.control import Control
from apollo_tp.errors import MappingError
from apollo_tp.launch import stages
from apollo_tp.launch.distributed import World
from apollo_tp.launch.hosts import meet
from apollo_tp.launch.stages import Joined, resume
from apollo_tp.runtime import instance_folder
from apollo_tp.shards.manifest import publish
from tests.support.manifests import manifest


def test_the_record_counts_what_a_failed_step_wrote_and_nothing_else(tmp_path: Path) -> None:
    """A record of weights that nobody wrote would stop their comparison with the checkpoint."""
    lineage = LineageFile(tmp_path, str(tmp_path / "no model"), keep=True)
    lineage.count_to(0)
    assert not LineageFile(tmp_path, str(tmp_path / "no model"), keep=True).trained_here
    lineage.before_write()
    lineage.count_to(1)
    again = LineageFile(tmp_path, str(tmp_path / "no model"), keep=True)
    assert (again.trained_here, again.record.weight_version) == (True, 1)


def test_a_full_folder_stops_a_step_before_it_writes_and_none_after_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record's room is taken first: a step that was written and not recorded would be run again."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no room")

    lineage = LineageFile(tmp_path, str(tmp_path / "no model"), keep=True)
    with monkeypatch.context() as patch:
        patch.setattr("apollo_tp.runtime.private_files.tempfile.mkstemp", full)
        with pytest.raises(OSError, match="no room"):
            lineage.before_write()
    lineage.before_write()
    monkeypatch.setattr("apollo_tp.runtime.private_files.tempfile.mkstemp", full)
    for version in (1, 2):
        lineage.before_write()
        lineage.update(weight_version=version, last_job_step=version, last_job_id="x" * (100 // version))
    record = LineageFile(tmp_path, str(tmp_path / "no model"), keep=True).record
    assert (record.weight_version, record.last_job_step, len(record.last_job_id)) == (2, 2, 50)
    (tmp_path / "weights.json").unlink()  # a cleaner of temporary files: this trainer goes on
    lineage.update(weight_version=3)


@pytest.mark.parametrize(
    ("saved", "reset", "expected"), [(0, False, 95), (40, False, 95), (95, False, 95), (40, True, 0)]
)
def test_the_schedule_goes_on_where_the_last_trainer_ended(
    saved: int,
    reset: bool,
    expected: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its steps since the last checkpoint are in the weights, as the moments are not, which is said."""
    if saved:
        (tmp_path / "optimizer").mkdir()
    lineage = LineageFile(tmp_path, str(tmp_path / "no model"), keep=True)
    lineage.before_write()
    lineage.update(step_count=95, weight_version=97, checkpoint=str(tmp_path) if saved else "")
    streams: list[int] = []
    optimizer = SimpleNamespace(step_count=0, resync_replicas=list, use_rounding_stream=streams.append)
    monkeypatch.setattr(optimizer_state, "load", lambda optimizer, folder: setattr(optimizer, "step_count", saved))
    resume(Config(optim=OptimConfig(reset_state=reset)), optimizer, LineageFile(tmp_path, "", keep=True))  # type: ignore[arg-type]
    assert optimizer.step_count == expected
    assert ("moments are those of the last checkpoint" in caplog.text) == (saved < 95 and not reset)
    assert streams == ([97] if saved < 95 or reset else []), (
        "other random bits than the steps that are counted again had"
    )


@pytest.mark.parametrize(
    ("reset", "exists", "message"),
    [
        (False, True, ""),
        (
            True,
            True,
            "optim.reset_state=true: fresh optimizer state, as at every start while it is set, not that of {}",
        ),
        (False, False, "{}/optimizer: got no such folder, expected the optimizer state of the served weights"),
    ],
)
def test_state_that_is_not_loaded_is_told(
    reset: bool,
    exists: bool,
    message: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unless it is: because it is not wanted, or because its folder is gone."""
    if exists:
        (tmp_path / "optimizer").mkdir()
    loaded: list[Path] = []
    monkeypatch.setattr(optimizer_state, "load", lambda optimizer, folder: loaded.append(folder))
    lineage = SimpleNamespace(record=Lineage(checkpoint=str(tmp_path)), trained_here=False)
    with caplog.at_level(logging.WARNING, "apollo_tp"):
        config = Config(optim=OptimConfig(reset_state=reset))
        optimizer = SimpleNamespace(step_count=0)
        resume(config, optimizer, lineage)  # type: ignore[arg-type]
    assert loaded == ([] if message else [tmp_path / "optimizer"])
    assert bool(caplog.messages) == bool(message)
    assert message.format(tmp_path) in caplog.text


@pytest.mark.parametrize("trained", [False, True])
def test_weights_that_nobody_has_trained_must_be_those_of_the_folder(
    trained: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer over other ones would take its optimizer state, and its checkpoints, for those of this model."""

    def differ(*_: object) -> int:
        raise MappingError("other bits")

    tmp_path.chmod(0o700)
    folder = instance_folder.instance_dir("test", tmp_path)
    publish(manifest(0, 1, model_path=str(tmp_path / "no model")), folder)
    if trained:
        LineageFile(folder, str(tmp_path / "no model"), keep=True).before_write()
    monkeypatch.setattr(stages, "map_rank", lambda *_: SimpleNamespace(device=torch.device("cpu")))
    monkeypatch.setattr(stages, "verify_against_checkpoint", differ)
    with contextlib.ExitStack() as stack:
        config = Config(
            server=ServerConfig(runtime_dir=str(tmp_path)), checkpoint=CheckpointConfig(dir=str(tmp_path / "c"))
        )
        control = Control(0, 1)
        hosts = meet(control, config)
        joined = Joined(config=config, stack=stack, world=World(0, 1), hosts=hosts, control=control)
        with contextlib.nullcontext() if trained else pytest.raises(MappingError, match="other bits"):
            stages.map_server(stages.take_place(joined), lambda error: None)


def test_before_weights_are_written_it_is_recorded_and_the_server_paused() -> None:
    """In this order: a pause is short, and a record without room stops the step."""
    order: list[str] = []
    lineage = SimpleNamespace(before_write=lambda: order.append("recorded"))
    gate = SimpleNamespace(before_write=lambda: order.append("paused"), pauses=True)
    pace = SimpleNamespace(suspend=lambda: order.append("pace held"))
    stages.before_write(lineage, gate, pace)  # type: ignore[arg-type]
    assert order == ["recorded", "paused", "pace held"]

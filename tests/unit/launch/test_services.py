"""What the rank loop calls besides the trainer: who the ranks say they are, and what they remember of steps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from apollo_tp.checkpoint.lineage import LineageFile
from apollo_tp.config import CacheMode, Config, QosConfig, SyncConfig, SyncMode, TrainConfig
from apollo_tp.launch import services
from apollo_tp.launch.coordinates import Arrangement
from apollo_tp.launch.distributed import World
from apollo_tp.launch.services import Services
from apollo_tp.shards.manifest import SegmentRecord
from apollo_tp.wire import commands
from tests.support.figures import step_figures
from tests.support.manifests import manifest


class Saved:
    """In place of the checkpoints' writer."""

    def __init__(self, root: Path, *_: Any, **__: Any) -> None:
        self.root = root

    def save(self, name: str, optimizer: object, weight_version: int, kept: object) -> tuple[Path, int]:
        return self.root / name, 7


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.setattr(services, "CheckpointWriter", Saved)
    text_config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=100))
    shard = SimpleNamespace(global_shape=(3, 5))
    config = Config(train=TrainConfig(max_sequence_tokens=512))
    config.checkpoint.dir, config.checkpoint.behind = str(tmp_path / "checkpoints"), False
    return SimpleNamespace(
        config=config,
        world=World(0, 1),
        manifests=[manifest(0, 1)],
        mapped=SimpleNamespace(manifest=manifest(0, 1), stored={}, device=torch.device("cpu")),
        lineage=LineageFile(tmp_path, str(tmp_path / "no model"), keep=True),
        mesh=None,
        arrangement=Arrangement(["test"], ["h"], [[0]], [False]),
        hf_config=SimpleNamespace(save_pretrained=None),
        model=SimpleNamespace(
            module=SimpleNamespace(config=text_config), attention_window=8,
            parameters=[SimpleNamespace(name="w", shard=shard)] * 2
        ),
        gate=SimpleNamespace(after_step=lambda weight_version: 0.5),
        trainer=SimpleNamespace(
            weight_version=9, gradients=SimpleNamespace(value="stored"), device=torch.device("cpu"),
            optimizer=SimpleNamespace(describe=lambda: "apollo", step_count=4),
        ),
        memory="planned",
    )  # fmt: skip


@pytest.mark.parametrize(("server_limit", "expected"), [(None, 512), (0, 512), (256, 256), (512, 512), (2048, 512)])
def test_no_longer_sample_is_accepted_than_the_server_can_serve(
    ready: SimpleNamespace, server_limit: int | None, expected: int
) -> None:
    """Nor a longer one than the option says: positions beyond a server's limit have no entry in its tables."""
    ready.manifests = [manifest(0, 1, max_model_len=server_limit or 0)]
    hello = Services(ready).hello()  # type: ignore[arg-type]
    assert hello.max_sequence_tokens == expected
    assert (hello.vocab_size, hello.num_parameters, hello.num_ranks) == (100, 15, 1)


def test_the_ranks_say_all_that_the_coordinator_shows(ready: SimpleNamespace) -> None:
    """None of it by a default of the message, which would hide that it was lost."""
    config = ready.config
    config.sync, config.qos = SyncConfig(mode=SyncMode.drain, cache=CacheMode.salt), QosConfig(pace=0.5)
    segment = SegmentRecord(
        checkpoint="w", box_offset=[0, 1], box_shape=[3, 4], served="fused", view_offset=7, view_stride=[5, 1]
    )
    ready.manifests, ready.world = [manifest(0, 2), manifest(1, 2, segments=[segment])], World(0, 4)
    ready.arrangement = Arrangement(["test", "other"], ["h", "h"], [[0, 1], [2, 3]], [False] * 2)
    first = ready.manifests[0]
    assert Services(ready).hello("identify/1") == commands.Hello(  # type: ignore[arg-type]
        id="identify/1", protocol_version=commands.PROTOCOL_VERSION, instance_id=first.instance_id,
        server_life=f"{first.instance_id}@{first.pid}.{first.pid_start_ticks}", model_path=first.model_path,
        served_model_names=first.served_model_names, num_ranks=4, vocab_size=100, max_sequence_tokens=512, weight_version=9,
        num_parameters=15, optimizer="apollo", gradients="stored", sync="drain", cache="salt", memory="planned",
        qos="sm_percent=null low_priority=false pace=0.5", attention_window=8,
        layout=[{"checkpoint": "w", "rank": 1, "served": "fused", "offset": [0, 1], "shape": [3, 4]}],
        replicas=[commands.Replica("test", "h"), commands.Replica("other", "h")],
    )  # fmt: skip


def test_steps_and_checkpoints_are_remembered(ready: SimpleNamespace, tmp_path: Path) -> None:
    """By the answer to Identify, by which a restarted coordinator counts steps, and by the next trainer of this server."""
    loop_services = Services(ready)  # type: ignore[arg-type]
    command = commands.Step(id="j/3", job_id="j", job_step=3, samples=[])
    loop_services.record_step(command, step_figures(weight_version=8))
    ready.lineage.share("a@1.2", {})  # these weights began with another server
    hello = loop_services.hello("identify/1")
    assert hello.server_life == "a@1.2"
    assert (hello.id, hello.last_job_id, hello.last_job_step) == ("identify/1", "j", 3)
    assert loop_services.save_checkpoint("first") == (str(tmp_path / "checkpoints" / "first"), 7)
    loop_services.record_failure(10)
    record = LineageFile(tmp_path, str(tmp_path / "no model"), keep=False).record
    assert record.checkpoint == str(tmp_path / "checkpoints" / "first")
    assert (record.weight_version, record.step_count, record.last_job_id, record.last_job_step) == (10, 4, "j", 3)
    assert loop_services.finish_command(10) == 0.5

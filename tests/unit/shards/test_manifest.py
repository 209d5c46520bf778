"""Manifests: round trip, agreement over ranks, staleness, hostile files; and the private folder they lie in."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from apollo_tp.errors import ConfigError, ManifestError, NoServerError, TrainerBusyError, UnsupportedModelError
from apollo_tp.runtime import instance_folder, private_files, processes
from apollo_tp.shards.instance import (
    CLAIMED_VARIABLE,
    REFUSED_VARIABLE,
    SERVER_LOCK,
    check_agreement,
    claim_instance,
    live_instances,
    read_instance,
    wait_for_server,
)
from apollo_tp.shards.manifest import (
    SCHEMA_VERSION,
    CheckpointTensor,
    Manifest,
    Refusal,
    SegmentRecord,
    ServedTensor,
    publish,
    read,
)
from apollo_tp.shards.placement import place
from apollo_tp.shards.serving import SERVING_FILE, ChatTemplate, Serving, publish_serving, read_serving
from tests.support.manifests import ended_process, manifest


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


def test_round_trip_is_private_and_exact(base: Path) -> None:
    """What is read equals what was published, in a file that only its owner can read."""
    path = publish(manifest(), instance_folder.instance_dir("test", base))
    assert read(path) == manifest(created_at=read(path).created_at)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tp_size": 4}, "tp_size differs"),
        ({"instance_id": "other"}, "instance_id differs"),
        ({"model_path": "/other"}, "model_path differs"),
        ({"tp_rank": 0}, r"ranks \[0, 0\], expected 0 to 1"),
        ({"error": "RuntimeError: no handle"}, "rank 1: export failed in the server: RuntimeError: no handle"),
    ],
)
def test_manifests_must_agree(changes: dict[str, Any], message: str) -> None:
    """Every disagreement is named."""
    with pytest.raises(ManifestError, match=message):
        check_agreement([manifest(0), manifest(**({"rank": 1} | {}), **changes)] if "tp_rank" not in changes
                        else [manifest(0), manifest(0)])  # fmt: skip


def test_other_pid_namespace_is_refused_with_the_cure() -> None:
    """CUDA IPC and /proc need one PID namespace; the message says which flag gives it."""
    with pytest.raises(ManifestError, match="--pid=container"):
        check_agreement([manifest(0, 1, pid_namespace="pid:[1]")])


def test_ended_server_is_stale(base: Path) -> None:
    """A dead process, or a later process with the same pid, is not the server."""
    dead = ended_process()
    publish(manifest(0, 1, pid=dead.pid, pid_start_ticks=dead.start_ticks), instance_folder.instance_dir("dead", base))
    alive = processes.ProcessId.of(os.getpid())
    assert alive is not None
    reused = manifest(0, 1, pid_start_ticks=alive.start_ticks - 1)
    publish(reused, instance_folder.instance_dir("reused", base))
    publish(manifest(0, 1), instance_folder.instance_dir("live", base))
    assert live_instances(base) == (["live"], ["dead", "reused"])
    with pytest.raises(ManifestError, match="stale"):
        check_agreement(read_instance(base / "dead"))


def test_waiting_says_what_is_there(base: Path) -> None:
    """No server; half a server; two servers: three messages."""
    with pytest.raises(NoServerError, match="VLLM_PLUGINS=apollo"):
        wait_for_server(base, None, 0)
    publish(manifest(0), instance_folder.instance_dir("half", base))
    with pytest.raises(NoServerError, match=r"ranks \[0\]"):
        wait_for_server(base, None, 0)
    publish(manifest(0, 1), instance_folder.instance_dir("other", base))
    with pytest.raises(ManifestError, match=r"server\.instance"):
        wait_for_server(base, None, 0)
    assert wait_for_server(base, "other", 0)[0].tp_size == 1


def test_a_named_server_that_restarts_is_waited_for(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it left is not it: its folder goes, its manifests come. Only at the deadline is it stale."""
    dead, folder = ended_process(), instance_folder.instance_dir("prod", base)
    stale = manifest(0, 1, instance_id="prod", pid=dead.pid, pid_start_ticks=dead.start_ticks)
    publish(stale, folder)
    restart = [
        lambda: instance_folder.remove_instance(folder),
        lambda: publish(manifest(0, 1), instance_folder.instance_dir("prod", base)),
    ]
    monkeypatch.setattr("apollo_tp.shards.instance.time.sleep", lambda _: restart.pop(0)())
    assert wait_for_server(base, "prod", 60)[0].process.alive()
    publish(stale, folder)
    with pytest.raises(ManifestError, match=f"server prod: rank 0: stale, its process {dead.pid} has ended"):
        wait_for_server(base, "prod", -1)


def test_a_server_that_measures_memory_is_waited_for(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its manifests are there, its engine is not: what a trainer takes now is missing in its KV cache. Where no API server
    will tell, and for a server whose export failed, nobody waits."""
    folder = instance_folder.instance_dir("test", base)
    publish(manifest(0, 1, endpoints=True), folder)
    assert wait_for_server(base, None, -1, ready=False)[0].endpoints
    with pytest.raises(NoServerError, match=r"server test: got a loaded model but no engine that is up.*wait_seconds"):
        wait_for_server(base, None, -1)
    ready = [lambda: None, lambda: publish_serving(Serving(chat=ChatTemplate(text="{{ 'x' }}")), folder)]
    monkeypatch.setattr("apollo_tp.shards.instance.time.sleep", lambda _: ready.pop(0)())
    assert wait_for_server(base, None, 60)[0].endpoints
    assert not ready
    assert read_serving(folder) == Serving(chat=ChatTemplate(text="{{ 'x' }}"))
    assert (folder / SERVING_FILE).stat().st_mode & 0o777 == 0o600
    (folder / SERVING_FILE).write_text("{")
    with pytest.raises(ManifestError, match=r"serving\.json"):
        wait_for_server(base, None, 60)
    (folder / SERVING_FILE).unlink()
    publish(manifest(0, 1), folder)
    assert wait_for_server(base, None, 60)
    publish(manifest(0, 1, endpoints=True, error="no handle"), folder)
    with pytest.raises(ManifestError, match="no handle"):
        wait_for_server(base, None, 60)


def test_a_folder_that_is_being_removed_holds_no_manifests(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gone between the listing and the reading."""
    monkeypatch.setattr(Path, "glob", lambda folder, _: iter([folder / "rank0.json"]))
    assert read_instance(base) == []


@pytest.fixture
def claims(base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """This process is the first of a server called prod; what it claims is free again afterwards."""
    monkeypatch.setenv(private_files.RUNTIME_DIR_VARIABLE, str(base))
    monkeypatch.setenv(instance_folder.INSTANCE_VARIABLE, "prod")
    monkeypatch.setenv(CLAIMED_VARIABLE, "")
    monkeypatch.setenv(REFUSED_VARIABLE, "")
    with contextlib.ExitStack() as claim:
        monkeypatch.setattr("apollo_tp.shards.instance._claim", claim)
        yield monkeypatch


def test_a_new_server_does_not_inherit_from_a_dead_one(base: Path, claims: pytest.MonkeyPatch) -> None:
    """Same name, restarted: the dead server's manifests and its record of weights are gone. A live name is refused."""
    dead = ended_process()
    folder = instance_folder.instance_dir("prod", base)
    publish(manifest(0, 1, pid=dead.pid, pid_start_ticks=dead.start_ticks), folder)
    (folder / "weights.json").write_text("{}")
    assert claim_instance() == "prod"
    assert [path.name for path in folder.iterdir()] == [SERVER_LOCK]
    publish(manifest(0, 1), folder)
    assert claim_instance() == "prod", "a later process of the same server"
    claims.setenv(CLAIMED_VARIABLE, "")
    with pytest.raises(ManifestError, match="live server has"):
        claim_instance()


CLAIM = "from apollo_tp.shards.instance import claim_instance; print(claim_instance(), flush=True); input()"


def test_a_server_that_loads_has_its_name_already(base: Path, claims: pytest.MonkeyPatch) -> None:
    """Before any manifest: the second is refused, and so are its later processes even when the first one is gone. The
    name is free then, and the folder of one that ended while it loaded goes."""
    with subprocess.Popen([sys.executable, "-c", CLAIM], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout
        assert first.stdout.readline() == b"prod\n"
        with pytest.raises(ManifestError, match=rf"live server has \(process {first.pid}\).*APOLLO_TP_INSTANCE"):
            claim_instance()
        claims.setenv(instance_folder.INSTANCE_VARIABLE, "other")
        claims.setenv(REFUSED_VARIABLE, "")
        assert claim_instance() == "other"
        assert (base / "prod").exists()
        claims.setenv(CLAIMED_VARIABLE, "")
        claims.setenv(REFUSED_VARIABLE, "prod is taken")
        first.kill()
    with pytest.raises(ManifestError, match="prod is taken"):
        claim_instance()
    claims.setenv(instance_folder.INSTANCE_VARIABLE, "third")
    claims.setenv(REFUSED_VARIABLE, "")
    assert claim_instance() == "third"
    assert sorted(path.name for path in base.iterdir() if path.is_dir()) == ["other", "third"]


def test_a_server_of_another_pid_namespace_is_judged_by_its_lock(base: Path, claims: pytest.MonkeyPatch) -> None:
    """A container that was restarted: its process 1 cannot be looked up from here, but the lock that it held is free."""
    elsewhere = {"pid": 1, "pid_namespace": "pid:[1]"}
    for name in ("other", "prod"):
        publish(manifest(0, 1, instance_id=name, **elsewhere), instance_folder.instance_dir(name, base))
    assert live_instances(base) == (["other", "prod"], []), "without a lock, nothing to judge by"
    (base / "prod" / SERVER_LOCK).touch()
    claims.setenv(instance_folder.INSTANCE_VARIABLE, "other")
    with subprocess.Popen([sys.executable, "-c", CLAIM], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout
        (base / "other" / "rank0.json").unlink()
        assert server.stdout.readline() == b"other\n"
        publish(manifest(0, 1, instance_id="other", **elsewhere), base / "other")
        assert live_instances(base)[0] == ["other"]
        claims.setenv(instance_folder.INSTANCE_VARIABLE, "prod")
        assert claim_instance() == "prod"
        assert [path.name for path in (base / "prod").iterdir()] == [SERVER_LOCK]
        server.communicate(b"\n")
    assert live_instances(base) == ([], ["other"])
    publish(manifest(0, 1, instance_id="prod"), base / "prod")
    assert wait_for_server(base, None, 0)[0].instance_id == "prod"
    with pytest.raises(NoServerError, match=r"stale ones \['other'\]"):
        wait_for_server(base, "other", -1)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b'{"schema_version": "1"}', b"\x80\x04N.", b'{"schema_version": 2, "pid": "x"}']
)
def test_hostile_manifest_files_are_refused(base: Path, content: bytes) -> None:
    """Anything but a manifest, a pickle among it, is an error that names the file."""
    path = base / "rank0.json"
    path.write_bytes(content)
    with pytest.raises(ManifestError, match=r"rank0\.json"):
        read(path)


def test_other_schema_version_is_refused(base: Path) -> None:
    """A newer server and an older trainer: the message says so, whatever else the file holds."""
    path = base / "rank0.json"
    path.write_bytes(msgspec.json.encode({"schema_version": SCHEMA_VERSION + 1, "unheard": "of"}))
    with pytest.raises(ManifestError, match="same apollo_tp release"):
        read(path)


def test_shared_or_foreign_runtime_folder_is_refused(tmp_path: Path) -> None:
    """A folder that others can read, or that is a link to one, is not used."""
    tmp_path.chmod(0o755)
    with pytest.raises(ConfigError, match="nobody else can read"):
        private_files.private_dir(tmp_path)
    tmp_path.chmod(0o700)
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with pytest.raises(ConfigError):
        private_files.private_dir(link)


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "x" * 65])
def test_instance_ids_are_plain_names(base: Path, name: str) -> None:
    """An id never becomes a path."""
    with pytest.raises(ConfigError):
        instance_folder.instance_dir(name, base)


def test_socket_paths_have_a_limit(base: Path) -> None:
    """The system could not bind a longer one."""
    with pytest.raises(ConfigError, match="shorter folder"):
        instance_folder.socket_path(base, "x" * 120)


def test_one_trainer_per_server(base: Path) -> None:
    """The second is told who holds the place; it is free again afterwards."""
    with (
        instance_folder.trainer_lock(base),
        pytest.raises(TrainerBusyError, match=str(os.getpid())),
        instance_folder.trainer_lock(base),
    ):
        pass
    with instance_folder.trainer_lock(base):
        pass


def test_a_lock_is_not_handed_on_to_started_programs(base: Path) -> None:
    """One that outlives the holder (wandb's, a compiler's worker) does not keep the place."""
    with instance_folder.trainer_lock(base):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    # a moment: the kernel may still be closing the child's copy when Popen returns
    with private_files.locked(base / "trainer.lock", ManifestError, wait_seconds=5.0):
        child.communicate(b"\n")


def _server(segments: list[list[SegmentRecord]], shape: list[int], **changes: Any) -> list[Manifest]:
    served = [ServedTensor(name="w", allocation=0, offset_bytes=0, shape=[8, 4], stride=[4, 1], dtype="bfloat16")]
    checkpoint = [CheckpointTensor(name="w", shape=shape, dtype="BF16")]
    return [
        manifest(r, len(segments), served=served, checkpoint=checkpoint, segments=part, **changes)
        for r, part in enumerate(segments)
    ]


def _rows(start: int, count: int, view_offset: int) -> SegmentRecord:
    return SegmentRecord(
        checkpoint="w",
        box_offset=[start, 0],
        box_shape=[count, 4],
        served="w",
        view_offset=view_offset,
        view_stride=[4, 1],
    )


def test_segments_become_shards() -> None:
    """Two ranks with two ranges each, one behind the other in memory: the ranges keep the local order."""
    ranks = place(_server([[_rows(0, 2, 0), _rows(8, 2, 8)], [_rows(2, 6, 0), _rows(10, 2, 24)]], [12, 4]))
    assert [r["w"].shard.ranges for r in ranks] == [((0, 2), (8, 10)), ((2, 8), (10, 12))]
    assert ranks[0]["w"].shard.local_shape == (4, 4)
    assert ranks[0]["w"].shard.replica_ranks == (0,)


def test_replicas_are_recognised() -> None:
    """Ranks 0 and 1 hold the same rows: a KV replica group."""
    ranks = place(_server([[_rows(0, 4, 0)], [_rows(0, 4, 0)], [_rows(4, 4, 0)], [_rows(4, 4, 0)]], [8, 4]))
    assert [r["w"].shard.replica_ranks for r in ranks] == [(0, 1), (0, 1), (2, 3), (2, 3)]


def _rows_of_expert(expert: int, start: int, view_offset: int) -> SegmentRecord:
    """Two of four rows of three experts, [3, 4, 2]."""
    place, shape = [expert, start, 0], [1, 2, 2]
    return msgspec.structs.replace(_rows(0, 0, view_offset), box_offset=place, box_shape=shape, view_stride=[0, 2, 1])


def test_experts_that_are_copied_one_after_the_other_are_cut_in_their_rows_only() -> None:
    """A rank has rows of all experts, which lie at equal distances; at others, or in part, they are no one view."""
    ranks = [[_rows_of_expert(e, start, 8 * e) for e in (2, 0, 1)] for start in (0, 2)]
    placed = place(_server(ranks, [3, 4, 2]))
    assert [(r["w"].shard.dim, r["w"].shard.ranges, r["w"].stride) for r in placed] == [
        (1, ((start, start + 2),), (8, 2, 1)) for start in (0, 2)
    ]
    for wrong in (_rows_of_expert(2, 0, 20), _rows_of_expert(1, 0, 16)):
        with pytest.raises(UnsupportedModelError):
            place(_server([[wrong, *ranks[0][1:]], ranks[1]], [3, 4, 2]))


def test_a_small_vocabulary_may_leave_a_rank_empty() -> None:
    """All rows on rank 0: rank 1 holds an empty shard of the same cut."""
    ranks = place(_server([[_rows(0, 6, 0)], []], [6, 4]))
    assert ranks[1]["w"].shard.local_shape == (0, 4)


@pytest.mark.parametrize(
    ("segments", "reason"),
    [
        ([[_rows(0, 4, 0)], [_rows(0, 4, 0)]], "got 16 of its"),
        ([[_rows(0, 5, 0)], [_rows(4, 4, 0)]], "overlap in part"),
        ([[_rows(0, 2, 0), _rows(2, 2, 12)], [_rows(4, 4, 0)]], "side by side"),
    ],
)
def test_layouts_that_cannot_be_trained_are_refused(segments: list[list[SegmentRecord]], reason: str) -> None:
    """Missing rows, rows held differently by two ranks, rows scattered in memory."""
    with pytest.raises(UnsupportedModelError, match=reason):
        place(_server(segments, [8, 4]))


def test_a_tensor_that_a_rank_does_not_load_is_refused() -> None:
    """Rank 1 may have anything in its place, where a rank that has set it to zero has loaded it."""
    first, second = _server([[_rows(0, 8, 0)], []], [8, 4])
    assert place([first, second])[1]["w"].shard.local_shape == (0, 4)
    with pytest.raises(UnsupportedModelError, match=r"w: got it loaded on ranks \[0\] alone"):
        place([first, msgspec.structs.replace(second, not_served=["w"])])


def test_refusals_of_the_loader_are_listed() -> None:
    """All at once, each with its rank and reason."""
    refusals = [Refusal(name="w", reason="vLLM's loader applies aten.mul to it")]
    with pytest.raises(UnsupportedModelError, match=r"w: rank 1: vLLM's loader applies aten\.mul"):
        place(_server([[_rows(0, 4, 0)], [_rows(4, 4, 0)]], [8, 4], refusals=refusals))


def test_two_checkpoint_tensors_in_one_place_are_refused() -> None:
    """Of a folder with two sets of files, say: the trainer would update the same numbers twice."""
    segments = [[_rows(0, 4, 0)], [_rows(4, 4, 0)]]
    again = [msgspec.structs.replace(mine, checkpoint="v") for part in segments for mine in part]
    manifests = _server([[first, second] for (first,), second in zip(segments, again, strict=True)], [8, 4])
    both = [*manifests[0].checkpoint, CheckpointTensor(name="v", shape=[8, 4], dtype="BF16")]
    with pytest.raises(UnsupportedModelError, match="v: rank 1: it is copied to where w is"):
        place([msgspec.structs.replace(m, checkpoint=both) for m in manifests])

"""Processes that a killed server leaves: named by whoever meets them, and ended by a command that asks."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from apollo_tp.errors import ManifestError, ServerGoneError
from apollo_tp.launch.server_watch import ServerWatch
from apollo_tp.runtime import instance_folder
from apollo_tp.runtime.processes import ProcessId, ancestors
from apollo_tp.shards import instance
from apollo_tp.shards.instance import check_agreement, live_instances, read_instance, survivors, wait_for_server
from apollo_tp.shards.manifest import Manifest, ServerProcess, publish
from tests.support.manifests import manifest

STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); input()"


def _start(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


class Server:
    """Processes in the roles of a server at TP = 2, whose manifests are in ``base``."""

    def __init__(self, base: Path, name: str = "test") -> None:
        roles = ("API server", "EngineCore", "rank 0", "rank 1")
        self.processes = {role: _start(STUBBORN if role == "rank 1" else "input()") for role in roles}
        assert self.processes["rank 1"].stdout is not None
        self.processes["rank 1"].stdout.readline()  # SIGTERM is ignored from here on
        parents = [self._named(role) for role in ("EngineCore", "API server")]
        self.folder = instance_folder.instance_dir(name, base)
        for rank in (0, 1):
            worker = self._named(f"rank {rank}")
            changes = {
                "pid": worker.pid,
                "pid_start_ticks": worker.start_ticks,
                "parents": parents,
                "instance_id": name,
            }
            publish(manifest(rank, 2, **changes), self.folder)

    def _named(self, role: str) -> ServerProcess:
        identity = ProcessId.of(self.processes[role].pid)
        assert identity is not None
        return ServerProcess(role=role, pid=identity.pid, start_ticks=identity.start_ticks)

    @property
    def manifests(self) -> list[Manifest]:
        return read_instance(self.folder)

    def kill(self, *roles: str) -> None:
        for role in roles:
            self.processes[role].kill()
            self.processes[role].wait()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return instance_folder.base_dir(str(tmp_path / "rt"))


@pytest.fixture
def server(base: Path) -> Iterator[Server]:
    started = Server(base)
    yield started
    started.kill(*started.processes)


@pytest.mark.parametrize("role", ["API server", "EngineCore", "rank 0", "rank 1"])
def test_the_end_of_any_process_of_the_server_is_noticed_at_once(server: Server, role: str) -> None:
    """Not only of those that have the weights: behind a dead API server a job would be trained for nobody."""
    found: queue.Queue[ServerGoneError] = queue.Queue()
    watch = ServerWatch(server.manifests, found.put)
    try:
        with pytest.raises(queue.Empty):
            found.get(timeout=1.0)
        pid = server.processes[role].pid
        killed = time.monotonic()
        server.kill(role)
        message = str(found.get(timeout=10))
        assert time.monotonic() - killed < 1
    finally:
        watch.stop()
    assert f"got the end of {role} (process {pid})" in message
    others = [f"{other} (process {p.pid})" for other, p in server.processes.items() if other != role]
    assert all(other in message for other in others)
    assert "apollo-tp end-orphans" in message


def test_a_server_without_its_engine_is_not_live(server: Server, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer does not take it, and says why; a new server of this name is refused with the command, one of another name
    leaves its folder, by which the command finds the processes."""
    assert live_instances(base) == (["test"], [])
    assert survivors(server.manifests) == []
    server.kill("EngineCore")
    assert live_instances(base) == ([], ["test"])
    with pytest.raises(ManifestError, match=r"EngineCore: stale, its process \d+ has ended.*apollo-tp end-orphans"):
        check_agreement(server.manifests)
    reasons: list[str] = []
    monkeypatch.setattr(instance.time, "sleep", lambda _: server.kill("rank 0"))
    with pytest.raises(ManifestError):
        wait_for_server(base, "test", 0.2, report=reasons.append)
    assert reasons[0].startswith("server test has ended; ")
    assert "rank 1" in reasons[0]
    with pytest.raises(
        ManifestError, match=r"rank 1 \(process \d+\).* live on without their server.*apollo-tp end-orphans"
    ):
        instance._claim_first("test", base)
    instance._claim_first("another", base)
    assert server.manifests


def _end_orphans(base: Path, *options: str, answer: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "apollo_tp.cli.main", "end-orphans", "--runtime-dir", str(base), *options],
        input=answer, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_the_command_asks_and_ends_what_is_orphaned_alone(server: Server, base: Path) -> None:
    """By SIGKILL what SIGTERM does not end; the folder goes too; a live server's processes stay."""
    other = Server(base, "other")
    try:
        none = _end_orphans(base)
        assert (none.returncode, none.stdout) == (0, f"no orphaned processes of servers in {base}\n")
        server.kill("API server")
        for answer in ("n\n", ""):
            refused = _end_orphans(base, answer=answer)
            assert refused.returncode == 1
            assert "server test has ended, but rank 0 (process " in refused.stdout
        assert all(server.processes[role].poll() is None for role in ("EngineCore", "rank 0", "rank 1"))
        done = _end_orphans(base, "--yes", "--json")
        assert done.returncode == 0, done.stderr
        orphans = [server.processes[role] for role in ("rank 0", "rank 1", "EngineCore")]
        assert json.loads(done.stdout) == {"ended": {"test": [process.pid for process in orphans]}, "alive": {}}
        assert [process.wait(5) for process in orphans] == [-signal.SIGTERM, -signal.SIGKILL, -signal.SIGTERM]
        assert not server.folder.exists()
        assert all(process.poll() is None for process in other.processes.values())
    finally:
        other.kill(*other.processes)


def test_what_is_waited_for_is_named(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing there; a server that loads; one that ended meanwhile; half of its ranks; its engine."""
    assert "no vLLM server with VLLM_PLUGINS=apollo" in instance._awaited(base, None, [], [])
    assert instance._awaited(base, "prod", [], []).endswith("waiting for server prod to start")
    folder = instance_folder.instance_dir("prod", base)
    (folder / "apollo_tp_server.lock").write_text(str(os.getpid()))
    assert f"server prod (process {os.getpid()}) loads its model" in instance._awaited(base, None, [], [])
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (folder / "apollo_tp_server.lock").write_text(str(ended.pid))
    assert "server prod has ended while it loaded its model" in instance._awaited(base, "prod", [], [])
    assert "1 of 2 ranks have loaded the model" in instance._awaited(base, "prod", [manifest(0)], [])
    assert "waiting for its engine" in instance._awaited(base, "prod", [manifest(0), manifest(1)], [])


def test_ancestors_go_up_to_the_one_that_is_asked_for() -> None:
    code = f"import sys; sys.path.insert(0, {os.getcwd()!r}); from apollo_tp.runtime.processes import ancestors; import os; "
    code += "print([p.pid for p in ancestors(os.getpid(), int(sys.argv[1]))])"
    command = [
        sys.executable,
        "-c",
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}, sys.argv[1]])",
    ]
    middle = subprocess.Popen([*command, str(os.getpid())], stdout=subprocess.PIPE, text=True)
    assert json.loads(middle.communicate(timeout=60)[0]) == [middle.pid, os.getpid()]
    assert ancestors(os.getpid(), 2**22 + 1) == []

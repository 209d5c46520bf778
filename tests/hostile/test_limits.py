"""Disks of a few megabytes, few file descriptors, and another user of the machine."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.fakes import CoordinatorProcess, FakeRanks, wait_for
from tests.support.jobs import CHAT, ONE, ends

pytestmark = pytest.mark.timeout(1200)
OVER = ("succeeded", "failed", "cancelled")
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="mounts a file system or becomes another user: run as root")


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A tmpfs of this size over ``folder``."""
    folder.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0700", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@needs_root
def test_a_disk_of_a_few_megabytes(tmp_path: Path, count: Any, report: Any) -> None:
    """Steps and uploads fill the state folder; once it has room again, every job ends, each step once and in order."""
    draw = random.Random("disks")
    for i in range(count("disks")):
        folder, megabytes = tmp_path / str(i), draw.choice([3, 4, 5, 6, 8])
        folder.mkdir(mode=0o700)
        report(f"{megabytes} MB: {_fill_and_recover(folder, megabytes, draw.random())}")


def _fill_and_recover(folder: Path, megabytes: int, seed: float) -> str:
    state, draw, refused, starts = folder / "state", random.Random(seed), 0, 0
    coordinator = CoordinatorProcess(folder)
    with (
        small_disk(state, megabytes),
        FakeRanks(coordinator.ranks_socket, folder / "journal", step_seconds=0.001) as ranks,
        coordinator,
    ):
        jobs = []
        for _ in range(40):
            try:
                with coordinator.client() as client:
                    answer = client.post("/train", json=ONE | {"epochs": draw.choice([1, 50, 400])})
                    assert answer.status_code in (202, 413, 429, 507), answer.text
                    jobs += [answer.json()["id"]] if answer.status_code == 202 else []
                    upload = {"file": ("a.jsonl", CHAT * draw.choice([1, 2_000]))}
                    answer = client.post("/v1/files", files=upload, data={"purpose": "fine-tune"})
                    assert answer.status_code in (200, 413, 507), answer.text
                    refused += answer.status_code != 200
            except httpx.TransportError:
                assert coordinator.process is not None
                coordinator.process.wait(10)
            if coordinator.process is not None and coordinator.process.poll() is not None:
                try:  # the launcher would start it again
                    coordinator.start()
                    starts += 1
                except AssertionError:
                    break
        subprocess.run(["mount", "-o", "remount,size=256m", state], check=True)
        if coordinator.process is not None and coordinator.process.poll() is not None:
            coordinator.start()
        with coordinator.client() as client:
            for job in jobs:
                state = wait_for(lambda: (j := client.get(f"/train/jobs/{job}").json())["state"] in OVER and j, 60, job)  # noqa: B023
                assert state["state"] == "succeeded", state
        for job in jobs:
            steps = [step for name, step in ranks.applied() if name == job]
            assert steps == list(range(1, len(steps) + 1)), f"{job}: a step is missing or was trained twice"
    return f"{len(jobs)} jobs, {len(ranks.applied())} steps, {refused} uploads refused, started {starts} times again"


def test_few_file_descriptors(tmp_path: Path, report: Any) -> None:
    """300 idle connections at a hard limit of 256 descriptors: training goes on, and the log does not grow."""
    coordinator = CoordinatorProcess(tmp_path, prefix=("prlimit", "--nofile=256:256"))
    with coordinator, FakeRanks(coordinator.ranks_socket, tmp_path / "journal", step_seconds=0.01) as ranks:
        assert coordinator.process is not None
        with coordinator.client() as client:
            wait_for(lambda: client.get("/health").json()["trainer"])
            job = client.post("/train", json=ONE | {"epochs": 100}).json()["id"]
            host, port = coordinator.url.removeprefix("http://").split(":")
            idle = []
            with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
                for _ in range(300):
                    idle.append(stack.enter_context(socket.create_connection((host, int(port)), timeout=2)))
                wait_for(lambda: len(ranks.applied()) == 100, 30)
            assert ends(client, job)["state"] == "succeeded"
        size = coordinator.log_path.stat().st_size
        report(f"{len(idle)} idle connections, log of {size:,} bytes")
        assert size < 200_000
        assert coordinator.process.poll() is None


PROBE = """
import os, socket, sys
os.setgid(65534), os.setuid(65534)
got = []
for folder, _, files in os.walk(sys.argv[1]):
    got += files
for path in sys.argv[2:]:
    try:
        if path.endswith(".sock"):
            socket.socket(socket.AF_UNIX).connect(path)
        else:
            open(path, "rb").read()
        got.append(path)
    except PermissionError:
        pass
sys.exit(f"reached: {got}" if got else 0)
"""


@needs_root
def test_another_user_of_the_machine(tmp_path: Path) -> None:
    """The state folder, the log's neighbour files and the sockets are closed to another user, whatever the umask was."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    old = os.umask(0)
    try:
        coordinator = CoordinatorProcess(tmp_path)
        with coordinator, FakeRanks(coordinator.ranks_socket, tmp_path / "journal"), coordinator.client() as client:
            wait_for(lambda: client.get("/health").json()["trainer"])
            client.post("/v1/files", files={"file": ("a.jsonl", CHAT)}, data={"purpose": "fine-tune"})
            inside = [p for p in (*tmp_path.glob("state/**/*"), *tmp_path.glob("i/*")) if not p.is_dir()]
            assert len(inside) > 4
            arguments = [sys.executable, "-c", PROBE, str(tmp_path / "state"), *map(str, inside)]
            result = subprocess.run(arguments, capture_output=True, text=True, timeout=30)
            assert result.returncode == 0, result.stderr
    finally:
        os.umask(old)

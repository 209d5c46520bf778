"""Damaged ZMQ frames at the coordinator's sockets: it lives, and the trainer that is connected goes on."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import zmq

from apollo_tp.runtime import instance_folder
from tests.support.fakes import CoordinatorProcess, FakeRanks, wait_for
from tests.support.frames import KINDS, NOT_UTF8, damaged, frame_of
from tests.support.jobs import ONE, ends

pytestmark = pytest.mark.timeout(3600)
PER_CONNECTION = 200


@pytest.mark.parametrize("name", [instance_folder.RANKS_SOCKET, instance_folder.COORDINATOR_SOCKET])
def test_damaged_frames(tmp_path: Path, name: str, count: Any, report: Any) -> None:
    """Frames of every message of every protocol, damaged, from ever new peers, while a trainer is connected."""
    valid = [frame_of(kind) for _, kind in KINDS] + [NOT_UTF8]
    total, sent, draw = count("frames") // 2, 0, random.Random(name)
    with (
        CoordinatorProcess(tmp_path) as coordinator,
        coordinator.client() as client,
        FakeRanks(coordinator.ranks_socket, tmp_path / "journal") as ranks,
    ):
        wait_for(lambda: client.get("/health").json()["trainer"])
        path = instance_folder.socket_path(coordinator.instance_dir, name)
        while sent < total:
            socket = zmq.Context.instance().socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 2000)
            socket.connect(f"ipc://{path}")
            for frame in itertools.islice(itertools.cycle(valid), PER_CONNECTION):
                parts = damaged(frame, draw.choice([1, 1, 1, 2, 5]), draw.getrandbits(32))
                socket.send_multipart(parts if draw.random() < 0.9 else [*parts, b""])
                sent += 1
            socket.close()
            assert client.get("/train/status").status_code == 200
        report(f"{sent:,} frames at {name}")
        assert coordinator.process is not None
        assert coordinator.process.poll() is None
        job = client.post("/train", json=ONE | {"epochs": 3}).json()["id"]
        assert ends(client, job)["state"] == "succeeded"
        assert ranks.applied() == [(job, step) for step in (1, 2, 3)]
        assert '"exception"' not in coordinator.log_path.read_text()

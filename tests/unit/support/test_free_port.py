"""The port of a server that is about to start."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from apollo_tp.errors import ConfigError
from tests.support import processes


def test_it_is_free_and_none_that_a_connection_may_get_meanwhile() -> None:
    port = processes.free_port()
    assert processes.LOWEST_PORT <= port < int(processes.EPHEMERAL_PORTS.read_text().split()[0])
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))


def test_a_port_in_use_is_not_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two ports the free one, and none once both are taken."""
    first = processes.free_port()
    ranges = tmp_path / "range"
    ranges.write_text(f"{first + 2}\t60999\n")
    monkeypatch.setattr(processes, "LOWEST_PORT", first)
    monkeypatch.setattr(processes, "EPHEMERAL_PORTS", ranges)
    with socket.socket() as taken, socket.socket() as other:
        taken.bind(("127.0.0.1", first))
        other.bind(("127.0.0.1", processes.free_port()))
        with pytest.raises(ConfigError, match=rf"no free port in range\({first}, {first + 2}\)"):
            processes.free_port()

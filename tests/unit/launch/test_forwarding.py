"""How each server's plugin reaches the coordinator: by a link on its host, by an address and keys on others."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from apollo_tp.config import ServiceConfig, ZmqConfig
from apollo_tp.coordinator.http.curve import create_keys
from apollo_tp.errors import ConfigError
from apollo_tp.launch.forwarding import CLIENT, reach_coordinator
from apollo_tp.launch.hosts import Hosts
from apollo_tp.runtime import instance_folder, processes
from apollo_tp.wire.tunnel import CoordinatorAddress

HERE, ELSEWHERE = Hosts(["h"], [processes.machine()]), Hosts(["rank-0-host"], ["boot pid:[1]"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rt").mkdir(mode=0o700)
    return instance_folder.instance_dir("second", tmp_path / "rt")


def test_the_other_replicas_servers_reach_the_coordinator(tmp_path: Path) -> None:
    """By a link in their folder, as long as the trainer runs; one that a killed trainer left does not stay where the
    coordinator listens itself."""
    tmp_path.chmod(0o700)
    first, second = (instance_folder.instance_dir(name, tmp_path) for name in ("first", "second"))
    listens = first / instance_folder.COORDINATOR_SOCKET
    link = second / instance_folder.COORDINATOR_SOCKET
    link.symlink_to("left over")
    listens.symlink_to("left over")
    for folder in (first, second):
        with contextlib.ExitStack() as stack:
            reach_coordinator(folder, "first", HERE, ServiceConfig(), stack)
            listens.touch()
            assert (listens.is_symlink(), link.resolve() == listens) == (False, folder == second)
    assert listens.exists()
    assert not link.is_symlink()


def _service(folder: Path, host: str = "10.77.0.1", port: int | None = 8301) -> ServiceConfig:
    return ServiceConfig(zmq=ZmqConfig(host=host, port=port, keys_dir=str(folder)))


@pytest.mark.parametrize(
    ("host", "address"), [("10.77.0.1", "10.77.0.1"), ("0.0.0.0", "node-0"), ("::", "node-0"), ("*", "node-0")]
)
def test_on_another_host_an_address_and_keys_are_left(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, address: str
) -> None:
    """In a private file, as long as the trainer runs. An address that means all of a host's is replaced by the launcher's
    name for it."""
    monkeypatch.setenv("MASTER_ADDR", "node-0")
    create_keys(tmp_path / "keys", CLIENT)
    remote = folder / instance_folder.TCP_FILE
    with contextlib.ExitStack() as stack:
        reach_coordinator(folder, "first", ELSEWHERE, _service(tmp_path / "keys", host), stack)
        found = msgspec.json.decode(remote.read_bytes(), type=CoordinatorAddress)
        assert (found.address, remote.stat().st_mode & 0o777) == (f"tcp://{address}:8301", 0o600)
        secret = (tmp_path / "keys" / "clients" / f"{CLIENT}.key_secret").read_text()
        assert found.secret_key in secret
        assert found.public_key in secret
        assert found.server_key in (tmp_path / "keys" / "server.key").read_text()
    assert not remote.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"host": "127.0.0.1"}, "got 127.0.0.1 and 8301, expected an address of host rank-0-host"),
        ({"port": 0}, "got 10.77.0.1 and 0, expected an address"),
        ({"keys_dir": "/nowhere"}, r"got '/nowhere' .*make them with `apollo-tp keys DIR --client replicas`"),
    ],
)
def test_what_other_hosts_cannot_use_is_refused(folder: Path, tmp_path: Path, changes: dict, message: str) -> None:
    create_keys(tmp_path / "keys", CLIENT)
    service = _service(tmp_path / "keys")
    service = replace(service, zmq=replace(service.zmq, **changes))
    with contextlib.ExitStack() as stack, pytest.raises(ConfigError, match=message):
        reach_coordinator(folder, "first", ELSEWHERE, service, stack)
    assert not (folder / instance_folder.TCP_FILE).exists()
    with contextlib.ExitStack() as stack:
        reach_coordinator(folder, "first", ELSEWHERE, service, stack, has_port=False)  # nobody would forward
    assert not (folder / instance_folder.TCP_FILE).exists()


def test_without_a_port_the_log_says_what_does_not_answer(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Training needs none. What another trainer left does not mislead the plugin."""
    (folder / instance_folder.TCP_FILE).touch()
    with contextlib.ExitStack() as stack, caplog.at_level(logging.WARNING, "apollo_tp"):
        reach_coordinator(folder, "first", ELSEWHERE, ServiceConfig(), stack)
    assert "server second: the training routes on its port answer 503" in caplog.text
    assert not (folder / instance_folder.TCP_FILE).exists()

"""ZMQ over TCP: with CURVE keys only, for known clients only, and with the same tokens as HTTP."""

import json
import os
import socket
import stat

import httpx
import msgspec
import pytest
import zmq
import zmq.auth

from apollo_tp.cli import main as cli
from apollo_tp.cli.zmq_transport import ZmqTransport
from apollo_tp.config import HttpConfig, ServiceConfig, ZmqConfig
from apollo_tp.coordinator.http.auth import load_access
from apollo_tp.coordinator.http.curve import create_keys
from apollo_tp.errors import ConfigError
from apollo_tp.runtime import instance_folder
from apollo_tp.wire import codec
from apollo_tp.wire import tunnel as tunnel_messages
from tests.support.fakes import CoordinatorProcess, FakeRanks, wait_for
from tests.support.plugin_server import PluginServer

ONE = {"context_ids": [1, 2], "continuation_ids": [3, 4]}
TOKEN = "t" * 20


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """A guarded coordinator that also listens on TCP, and its keys."""
    folder = tmp_path_factory.mktemp("c")
    keys = folder / "keys"
    create_keys(keys, "laptop")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (
        CoordinatorProcess(
            folder, env={"APOLLO_TP_TOKEN": TOKEN}, zmq=ZmqConfig(port=port, keys_dir=str(keys))
        ) as coordinator,
        FakeRanks(coordinator.ranks_socket, folder / "journal"),
    ):
        wait_for(lambda: httpx.get(f"{coordinator.url}/health").json()["trainer"])
        yield f"tcp://127.0.0.1:{port}", keys


def test_every_secret_is_private(stack):
    """Secret keys are 0600 and folders 0700; making them again replaces nothing."""
    _, keys = stack
    secrets = [*keys.rglob("*.key_secret")]
    assert {path.name for path in secrets} == {"server.key_secret", "laptop.key_secret"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in secrets} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (keys, keys / "clients")} == {0o700}
    before = [path.read_bytes() for path in secrets]
    assert create_keys(keys, "laptop") == []
    assert [path.read_bytes() for path in secrets] == before


def test_a_known_client_trains(stack):
    """Requests, bodies larger than a frame, event streams and the token work as over HTTP."""
    address, keys = stack
    headers = {"Authorization": f"Bearer {TOKEN}"}
    transport = ZmqTransport(address, keys / "clients" / "laptop.key_secret")
    with httpx.Client(base_url="http://coordinator", transport=transport) as client:
        assert client.get("/train/status").status_code == 401
        client.headers.update(headers)
        job = client.post("/train", json=ONE | {"epochs": 3, "wait": True}).json()
        assert (job["state"], job["step"]) == ("succeeded", 3)
        long = {"context_ids": [1], "continuation_ids": [2] * 900_000}  # 2.7 MB: several frames
        answer = client.post("/train", json=long)
        assert (answer.status_code, answer.json()["error"]["got"]) == (400, "900001 tokens"), answer.text
        with client.stream("GET", f"/train/jobs/{job['id']}/events", headers={"Accept": "text/event-stream"}) as stream:
            assert "event: end" in "\n".join(stream.iter_lines())
        with client.stream("GET", f"/train/jobs/{job['id']}/events") as stream:
            pass  # given up: what still comes of it belongs to no later request
        assert client.get("/health").json()["trainer"]


def test_the_command_line_takes_a_key(stack, capsys, monkeypatch):
    """apollo-tp --url tcp://... --key NAME.key_secret; without a key the message says what is missing."""
    address, keys = stack
    monkeypatch.setenv("APOLLO_TP_TOKEN", TOKEN)
    key = str(keys / "clients" / "laptop.key_secret")
    assert cli.main(["status", "--json", "--url", address, "--key", key]) == 0
    assert '"connected": true' in capsys.readouterr().out
    assert cli.main(["status", "--url", address]) == 2
    assert "--key" in capsys.readouterr().err
    assert cli.main(["status", "--url", address, "--key", str(keys / "clients" / "laptop.key")]) == 2
    assert "expected the secret one" in capsys.readouterr().err


@pytest.mark.parametrize("who", ["plain", "unknown key", "wrong server key"])
def test_strangers_get_nothing(stack, tmp_path, who, monkeypatch):
    """No CURVE, a key that the coordinator does not know, another server's key: no answer at all."""
    address, keys = stack
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    if who != "plain":
        create_keys(tmp_path, "laptop")
        own = (tmp_path if who == "unknown key" else keys) / "clients" / "laptop.key_secret"
        dealer.curve_publickey, dealer.curve_secretkey = zmq.auth.load_certificate(own)
        known = (keys if who == "unknown key" else tmp_path) / "server.key"
        dealer.curve_serverkey = zmq.auth.load_certificate(known)[0]
    dealer.connect(address)
    token = (b"authorization", f"Bearer {TOKEN}".encode())
    dealer.send(codec.encode(tunnel_messages.TunnelRequest(1, "GET", "/health", b"", [token])))
    dealer.send(codec.encode(tunnel_messages.TunnelBody(1, b"", False)))
    assert dealer.poll(1500) == 0
    context.destroy(linger=0)


def test_a_server_on_another_host_forwards(stack, tmp_path, monkeypatch):
    """By the address and the keys that the trainer beside it left. The plugin goes on with those of the next trainer, and
    says that there is none when they are gone."""
    address, keys = stack
    tmp_path.chmod(0o700)
    for name, value in {"INSTANCE": "i", "CLAIMED": "1", "RUNTIME_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(f"APOLLO_TP_{name}", value)
    folder = instance_folder.instance_dir("i")
    (folder / instance_folder.TRAINER_LOCK).write_text(str(os.getpid()))
    public, secret = zmq.auth.load_certificate(keys / "clients" / "laptop.key_secret")
    known, _ = zmq.auth.load_certificate(keys / "server.key")
    left = tunnel_messages.CoordinatorAddress(address, known.decode(), public.decode(), secret.decode())
    wrong = msgspec.structs.replace(left, server_key=public.decode())
    server = PluginServer()
    try:
        with httpx.Client(base_url=server.url, timeout=30, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
            for content, status in ((wrong, 503), (left, 200)):
                (folder / instance_folder.TCP_FILE).write_bytes(msgspec.json.encode(content))
                assert client.get("/train/status").status_code == status
            assert client.get("/train/status", headers={"Authorization": ""}).status_code == 401
            long = {"context_ids": [1], "continuation_ids": [2] * 900_000}
            assert client.post("/train", json=long).json()["error"]["got"] == "900001 tokens"
            assert client.post("/train", json=ONE | {"wait": True}).json()["state"] == "succeeded"
            (folder / instance_folder.TCP_FILE).unlink()
            answer = client.get("/train/status")
            assert (answer.status_code, json.loads(answer.text)["error"]["code"]) == (503, "no_trainer")
    finally:
        server.close()


def test_no_tcp_without_keys(tmp_path):
    """A port without keys, with keys that others can read, or reachable from outside without a token: it does not start."""
    with pytest.raises(AssertionError, match="apollo-tp keys"):
        CoordinatorProcess(tmp_path, zmq=ZmqConfig(port=1)).start()
    create_keys(tmp_path / "keys", "laptop")
    for mode in (0o640, 0o604):
        (tmp_path / "keys" / "server.key_secret").chmod(mode)
        with pytest.raises(AssertionError, match=f"got mode {mode:o}, expected 600: others can read it"):
            CoordinatorProcess(tmp_path, zmq=ZmqConfig(port=1, keys_dir=str(tmp_path / "keys"))).start()
    with pytest.raises(ConfigError, match=r"service\.zmq\.host"):
        load_access(ServiceConfig(http=HttpConfig(), zmq=ZmqConfig(host="0.0.0.0", port=1)))
    with pytest.raises(ConfigError, match="letters"):
        create_keys(tmp_path, "../other")

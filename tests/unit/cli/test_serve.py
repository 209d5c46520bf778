"""``apollo-tp serve`` without vLLM: what it starts, what it refuses, and what it does when one of its children ends."""

import os
import signal
import sys
import threading
import time

import psutil
import pytest

from apollo_tp.cli import serve
from apollo_tp.errors import ConfigError
from apollo_tp.runtime import instance_folder
from tests.support.processes import free_port


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in ("VLLM_PLUGINS", serve.CORES_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(instance_folder.INSTANCE_VARIABLE, "mine")
    monkeypatch.setenv("APOLLO_TP_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        ((), 1), (("--tensor-parallel-size", "2"), 2), (("--tensor-parallel-size=4",), 4), (("-tp", "3"), 3),
        (("--tensor_parallel_size", "2"), 2), (("-tp", "3", "--tensor-parallel-size=2"), 2),
        (("--data-parallel-size", "1"), 1),
    ],
)  # fmt: skip
def test_there_is_a_rank_for_each_shard(options, ranks):
    plan = serve.plan("model", options, ["optim.lr=1e-5"])
    address = "service.server_url='http://127.0.0.1:8000'"
    assert plan.trainer[-5:] == ["--nproc-per-node", str(ranks), "server.instance=mine", address, "optim.lr=1e-5"]
    assert plan.server[-len(options) - 2 :] == ["--model", "model", *options]
    assert plan.environment["VLLM_PLUGINS"] == "apollo"


def test_what_is_set_already_stays(monkeypatch):
    """Other plugins, and the cores of a user's choice; addresses are those that a client can use."""
    monkeypatch.setenv("VLLM_PLUGINS", "other,apollo")
    monkeypatch.setenv(serve.CORES_VARIABLE, "0-3|4-7")
    plan = serve.plan("model", ["--host", "0.0.0.0", "--port=9000", "-tp", "2"], [])
    assert plan.environment["VLLM_PLUGINS"] == "other,apollo"
    assert serve.CORES_VARIABLE not in plan.environment
    assert plan.url == "http://127.0.0.1:9000"


@pytest.mark.parametrize(
    ("options", "overrides", "words"),
    [
        (["-tp", "two"], [], "'two'"), (["--tensor-parallel-size"], [], "whole number"), (["--port=0"], [], "'0'"),
        (["--data-parallel-size", "2"], [], "expected one server"), (["--nnodes=2"], [], "expected one server"),
        ([], ["server.instance=other"], "none of server"),
    ],
)  # fmt: skip
def test_what_it_cannot_serve_is_refused(options, overrides, words):
    with pytest.raises(ConfigError, match=words):
        serve.plan("model", options, overrides)


SERVER = """
import http.server, sys
class Ok(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b'{"trainer": true}')
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Ok).serve_forever()
"""
TRAINER = """
import json, os, sys, time, pathlib
folder = pathlib.Path(os.environ["APOLLO_TP_RUNTIME_DIR"], "mine"); folder.mkdir(exist_ok=True)
(folder / "coordinator.json").write_text(json.dumps({"url": sys.argv[1], "pid": os.getpid()}))
time.sleep(float(sys.argv[2])); sys.exit(7)
"""


def _plan(trainer_seconds):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = [sys.executable, "-c", SERVER, str(port)]
    return serve.Plan(server, [sys.executable, "-c", TRAINER, url, str(trainer_seconds)], {}, "mine", url)


def _children():
    return [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]


def test_a_trainer_that_ends_is_started_again():
    """A few times, while the server serves on; then its command is said. A server that ends is the end."""
    said, before = [], _children()
    threading.Thread(target=lambda: (_until(lambda: len(said) == 7), _kill_the_server(before))).start()
    assert serve.run(_plan(1), said.append) == 1
    assert [line.split()[0] for line in said[:3]] == ["OpenAI", "training", "checkpoints"]
    assert all("exit status 7" in line and "started again" in line for line in said[3:7])
    assert said[6].count("not started again: ") == 1
    assert said[7].startswith("server: got its end with exit status -9")
    assert _children() == before


def _kill_the_server(before):
    [server] = [child for child in _children() if child not in before and "HTTPServer" in " ".join(child.cmdline())]
    server.kill()


def test_a_server_that_does_not_start_is_named():
    said, plan = [], _plan(1)
    broken = serve.Plan([sys.executable, "-c", "raise SystemExit(3)"], plan.trainer, {}, "mine", plan.url)
    assert serve.run(broken, said.append) == 1
    assert said == ["server: got its end with exit status 3, expected it to run; see its lines above"]


def test_a_signal_ends_both_in_order():
    """The exit status is 0; what could not be asked of the coordinator is said."""
    said, before = [], _children()
    threading.Thread(target=lambda: (_until(lambda: len(said) == 3), os.kill(os.getpid(), signal.SIGTERM))).start()
    assert serve.run(_plan(600), said.append) == 0
    assert said[3].startswith("the trained weights are not saved:")
    assert _children() == before


def _until(holds):
    deadline = time.monotonic() + 30
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)

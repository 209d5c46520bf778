"""Two hosts, played by namespaces: a server on each, trained together; and one server over both."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from apollo_tp.coordinator.http.curve import create_keys
from tests.support import played_hosts
from tests.support.demo_model import make_model, standard_library_text
from tests.support.played_hosts import ADDRESSES, SHARED, PlayedHost, connect, play_two
from tests.support.processes import FORKING_CLI, FORKING_SERVER, ManagedProcess

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(played_hosts.missing()), reason=f"hosts cannot be played: {played_hosts.missing()}"),
]

PORT, COORDINATOR_PORT, ZMQ_PORT, STORE_PORT, VLLM_PORT = 8000, 8300, 8301, 29500, 29501
TOKEN = "t" * 20
RUNTIME_DIR = "/tmp/apollo_tp-0"
START_SECONDS = 300.0
LOST_SECONDS = 60.0
NUM_STEPS = 100
PROMPT = [5, 6, 7, 8, 9]
JOB = {
    "samples": [{"context_ids": [5, 6], "continuation_ids": [6 + i, 7, 8, 9]} for i in range(4)],
    "epochs": 4,
    "wait": True,
}


class Hosts:
    """Two hosts with a model in the folder that they share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_model(folder / "model", standard_library_text(200, 30), num_layers=1)
        create_keys(folder / "keys", "replicas")
        self.both = play_two(folder)
        self.processes: list[ManagedProcess] = []

    def serve(self, host: PlayedHost, instance: str, module: str, *options: str) -> ManagedProcess:
        number = self.both.index(host)
        environment = {
            "VLLM_PLUGINS": "apollo", "APOLLO_TP_INSTANCE": instance, "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": str(number % (os.cpu_count() or 1)),
        }  # fmt: skip
        arguments = [
            *options, "--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(PORT),
            "--max-model-len", "512", "--max-num-seqs", "8", "--enforce-eager",
        ]  # fmt: skip
        process = host.start(module, arguments, environment, f"server-{host.name}.log")
        self.processes.append(process)
        return process

    def train(self, *overrides: str) -> list[ManagedProcess]:
        """One rank on each host; rank 0 is on the first one."""
        trainers = []
        for number, host in enumerate(self.both):
            arguments = [
                "--nnodes", "2", "--node-rank", str(number), "--master-addr", ADDRESSES[0],
                "--master-port", str(STORE_PORT), "--nproc-per-node", "1", "train.threads=1", "optim.lr=1e-3",
                "train.max_sequence_tokens=256", "optim.check_replicas_every=1", "checkpoint.after_idle_seconds=null",
                f"checkpoint.dir={SHARED}/checkpoints", f"service.state_dir={SHARED}/state",
                f"service.http.port={COORDINATOR_PORT}", f"service.zmq.host={ADDRESSES[0]}",
                f"service.zmq.port={ZMQ_PORT}", f"service.zmq.keys_dir={SHARED}/keys", *overrides,
            ]  # fmt: skip
            environment = {"APOLLO_TP_TOKEN": TOKEN}
            trainers.append(host.start("apollo_tp.launch.torchrun", arguments, environment, f"trainer-{number}.log"))
        self.processes = [process for process in self.processes if process.process.poll() is None] + trainers
        return trainers

    def check(self) -> None:
        for process in self.processes:
            process.check()

    def digests(self, host: PlayedHost, instance: str) -> dict[str, str]:
        return json.loads(host.output("tests.support.served_digests", RUNTIME_DIR, instance))


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    started = Hosts(tmp_path)
    yield started
    for host in started.both:
        host.end()
    for process in started.processes:
        process.stop()


def _ask(host: PlayedHost, method: str, port: int, path: str, body: dict | None = None) -> httpx.Response:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    url = f"http://127.0.0.1:{port}{path}"
    return host.call(lambda: httpx.request(method, url, json=body, headers=headers, timeout=240))


def _logprobs(host: PlayedHost) -> list[float]:
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    answer = _ask(host, "POST", PORT, "/v1/completions", body | {"cache_salt": str(time.monotonic())}).json()
    return [next(iter(entry.values()))["logprob"] for entry in answer["choices"][0]["prompt_logprobs"][1:]]


def _until_answered(hosts: Hosts, host: PlayedHost, port: int, path: str, connected: bool = False) -> dict:
    deadline = time.monotonic() + START_SECONDS
    while True:
        hosts.check()
        try:
            answer = _ask(host, "GET", port, path)
            if answer.status_code == 200 and (not connected or answer.json()["trainer"]["connected"]):
                return answer.json() if connected else {}
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, "\n".join(process.tail() for process in hosts.processes)
        time.sleep(0.25)


def test_replicas_on_two_hosts(hosts: Hosts) -> None:
    """They learn the same bits, and the training routes answer on the port of each. One host is cut off from the other's
    files and processes, so all of it goes over the network. Without that both servers answer, all ranks end, and the job
    goes on when it is back: nobody has trained alone, since jobs are on one side."""
    near, far = hosts.both
    model = ["--model", f"{SHARED}/model"]
    for host, name in ((near, "first"), (far, "second")):
        hosts.serve(host, name, FORKING_SERVER, *model)
    trainers = hosts.train("server.replicas=2")
    for host in hosts.both:
        _until_answered(hosts, host, PORT, "/health")
    before = _logprobs(near)
    status = _until_answered(hosts, near, COORDINATOR_PORT, "/train/status", connected=True)["trainer"]
    shown = [(replica["instance_id"], replica["host"]) for replica in status["replicas"]]
    assert shown == [("first", "i"), ("second", "j")]
    job = _ask(far, "POST", PORT, "/train", JOB).json()
    assert job["state"] == "succeeded", job
    for host in hosts.both:
        answer = _ask(host, "GET", PORT, "/train/status")
        assert answer.headers["x-apollo-weight-version"] == str(job["weight_version"])
    assert hosts.digests(near, "first") == hosts.digests(far, "second")
    assert _logprobs(near) == _logprobs(far) != before
    assert _ask(near, "POST", PORT, "/checkpoint", {"wait": True}).json()["state"] == "succeeded"
    job = _ask(near, "POST", PORT, "/train", JOB | {"epochs": NUM_STEPS, "batch_size": 4, "wait": False}).json()
    _until_step(near, job["id"], 2)
    connect(near, up=False)
    _all_end(trainers)
    assert _logprobs(near)
    assert _logprobs(far)
    connect(near, up=True)
    trainers = hosts.train("server.replicas=2", "server.min_replicas=1")
    _until_answered(hosts, near, COORDINATOR_PORT, "/train/status", connected=True)
    _until_step(near, job["id"], NUM_STEPS)
    events = _ask(near, "GET", PORT, f"/train/jobs/{job['id']}/events").json()["data"]
    assert [e["data"]["step"] for e in events if e["type"] == "metrics"] == list(range(1, NUM_STEPS + 1))
    assert hosts.digests(near, "first") == hosts.digests(far, "second")
    hosts.processes[1].stop()  # the far server
    _all_end(trainers)
    assert "server second: got the end of" in trainers[1].log.read_text()
    assert _logprobs(near)


def _until_step(host: PlayedHost, job: str, step: int) -> None:
    deadline = time.monotonic() + 60
    while _ask(host, "GET", COORDINATOR_PORT, f"/train/jobs/{job}").json()["step"] < step:
        assert time.monotonic() < deadline, f"step {step} does not come"
        time.sleep(0.05)


def _all_end(trainers: list[ManagedProcess]) -> None:
    deadline = time.monotonic() + LOST_SECONDS
    while any(trainer.process.poll() is None for trainer in trainers):
        assert time.monotonic() < deadline, "a trainer goes on"
        time.sleep(0.1)


def test_a_server_over_two_hosts(hosts: Hosts) -> None:
    """A rank beside each shard: its answers change with training, and are those of the trainer."""
    near, far = hosts.both
    options = [
        "serve", f"{SHARED}/model", "--tensor-parallel-size", "2", "--nnodes", "2", "--master-addr", ADDRESSES[0],
        "--master-port", str(VLLM_PORT), "--distributed-executor-backend", "mp",
    ]  # fmt: skip
    hosts.serve(near, "wide", FORKING_CLI, *options, "--node-rank", "0")
    hosts.serve(far, "wide", FORKING_CLI, *options, "--node-rank", "1", "--headless")
    hosts.train("sync=step_lock")
    _until_answered(hosts, near, PORT, "/health")
    before, weights = _logprobs(near), [hosts.digests(host, "wide") for host in hosts.both]
    assert [{name[0] for name in found} for found in weights] == [{"0"}, {"1"}]
    status = _until_answered(hosts, near, PORT, "/train/status", connected=True)["trainer"]
    assert [(replica["instance_id"], replica["host"]) for replica in status["replicas"]] == [("wide", "i, j")]
    job = _ask(near, "POST", PORT, "/train", JOB).json()
    assert job["state"] == "succeeded", job
    assert _logprobs(near) != before
    for host, old in zip(hosts.both, weights, strict=True):
        assert hosts.digests(host, "wide") != old
    urls = ["--url", f"http://127.0.0.1:{COORDINATOR_PORT}", "--server", f"http://127.0.0.1:{PORT}"]
    assert "log-probabilities" in near.output(
        "apollo_tp.cli.main", "compare", *urls, "--at-most", "0.02", APOLLO_TP_TOKEN=TOKEN
    )

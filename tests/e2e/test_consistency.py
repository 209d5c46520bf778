"""Updates and running requests, with real vLLM: what a stream sees of an update, what the prefix cache answers after it,
and that a trainer that dies while the server is paused leaves a server that runs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.processes import FORKING_TORCHRUN, ManagedProcess, coordinator_url, start_trainer
from tests.support.servers import Server, Trainer
from tests.support.slow_launch import VARIABLE

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

OVERRIDES = [
    "server.instance=main",
    "optim.lr=1e-3",
    "train.max_sequence_tokens=256",
    "checkpoint.after_idle_seconds=null",
]
TOKENS = [(11 * i) % 997 + 4 for i in range(64)]
JOB = {"samples": [{"context_ids": TOKENS[:1], "continuation_ids": TOKENS[1:]}] * 2, "wait": True}
# Two full blocks of vLLM's CPU cache (128 tokens each) and some more.
LONG_PROMPT = [(13 * i) % 997 + 4 for i in range(300)]
START = Callable[..., Trainer]


@pytest.fixture
def start(server: Server, tmp_path: Path) -> Iterator[START]:
    """Starts a trainer whose updates can be made slow: ``order(trainer)`` is the file that says so."""
    started: list[ManagedProcess] = []

    def begin(*overrides: str) -> Trainer:
        command = [
            sys.executable, "-m", FORKING_TORCHRUN, "--standalone", "--nproc-per-node", "2",
            "-m", "tests.support.slow_launch", "service.http.port=0", f"service.state_dir={tmp_path}/service",
            f"checkpoint.dir={tmp_path}/checkpoints", "train.threads=1", *OVERRIDES, *overrides,
        ]  # fmt: skip
        environment = {
            "APOLLO_TP_RUNTIME_DIR": str(server.runtime_dir), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
            VARIABLE: str(tmp_path / "order"),
        }  # fmt: skip
        started.append(ManagedProcess(command, environment, tmp_path / "trainer.log"))
        return Trainer(coordinator_url(server.runtime_dir, started[0], instance="main"), tmp_path, started[0])

    try:
        yield begin
    finally:
        for process in started:
            process.stop()


class Stream(threading.Thread):
    """A client's stream of ``num_tokens`` tokens, with the time (monotonic) at which each arrived."""

    def __init__(self, server: Server, num_tokens: int) -> None:
        super().__init__(daemon=True)
        self.url, self.num_tokens = f"{server.url}/v1/completions", num_tokens
        self.times: list[float] = []
        self.finished_at = 0.0

    def run(self) -> None:
        body = {
            "model": "demo",
            "prompt": TOKENS[:8],
            "max_tokens": self.num_tokens,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,  # a chunk may carry several tokens
        }
        with httpx.stream("POST", self.url, json=body, timeout=120) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    (choice,) = json.loads(line[6:])["choices"]
                    self.times += [time.monotonic()] * len(choice["token_ids"] or [])
                elif line == "data: [DONE]":
                    self.finished_at = time.monotonic()

    def started(self) -> Stream:
        """Start, and wait for the first tokens."""
        self.start()
        wait_for(lambda: len(self.times) > 2, 60)
        return self

    def longest_gap(self) -> float:
        return max(b - a for a, b in zip(self.times, self.times[1:], strict=False))


def stream_during(server: Server, num_tokens: int, work: Callable[[], dict]) -> tuple[dict, list[Stream]]:
    """What ``work`` returns, and the streams that ran from before its begin to after its end, one after the other: how
    long it takes next to them depends on the machine."""
    results: list[dict] = []
    worker = threading.Thread(target=lambda: results.append(work()))
    streams = [Stream(server, num_tokens).started()]
    worker.start()
    while worker.is_alive():
        streams[-1].join(0.02)
        if not streams[-1].is_alive():
            streams.append(Stream(server, num_tokens).started())
    streams[-1].join(120)
    return results[0], streams


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited for {seconds:.0f} s"
        time.sleep(0.02)


def answer(server: Server, salt: str | None = None) -> list[float]:
    """Log-probabilities (nats) of the five likeliest first tokens behind the long prompt: two thirds of them may come from
    the prefix cache. ``salt`` keeps the request away from every entry."""
    body = {
        "model": "demo", "prompt": LONG_PROMPT, "max_tokens": 1, "temperature": 0, "logprobs": 5,
        "return_tokens_as_token_ids": True,  # else tokens with the same text, such as parts of characters, count once
    }  # fmt: skip
    if salt:
        body["cache_salt"] = salt
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).raise_for_status().json()
    return sorted(response["choices"][0]["logprobs"]["top_logprobs"][0].values())


def step_data(trainer: Trainer, job: dict) -> list[dict]:
    events = trainer.get(f"/train/jobs/{job['id']}/events?limit=100")["data"]
    return [event["data"] for event in events if event["type"] == "metrics"]


def check_cache_after_update(server: Server, trainer: Trainer, *, stale: bool) -> None:
    """Fill the cache, train, and ask again: with ``stale`` the answer is not that of a request without the cache."""
    before = answer(server)
    assert answer(server) == pytest.approx(before, abs=0.02), "nothing was trained: a hit must not change the answer"
    changed, fresh, jobs = 0.0, before, 0
    while changed <= 0.05:  # nats, which tells new weights from old; what a job moves depends on those before
        jobs += 1
        assert jobs <= 5, f"five jobs changed the answer by {changed:.4f} nats"
        job = trainer.post("/train", JOB | {"epochs": 3})
        assert job["state"] == "succeeded", job
        fresh = answer(server, salt=job["id"])
        changed = max(abs(a - b) for a, b in zip(before, fresh, strict=True))
    cached = answer(server)
    wrong = max(abs(a - b) for a, b in zip(cached, fresh, strict=True))
    print(f"changed by {changed:.4f} in {jobs} jobs, answer from the cache off by {wrong:.4f}")
    assert (wrong > 0.02) if stale else (wrong == 0)


def check_restore(server: Server, trainer: Trainer) -> None:
    """A stream goes on over a restore; answers, also from the prefix cache, are those of before the job."""
    saved = trainer.post("/checkpoint", {"wait": True})
    before = server.logprobs(TOKENS), answer(server)
    job = trainer.post("/train", JOB | {"epochs": 3})
    assert server.logprobs(TOKENS) != before[0]
    answer(server)  # fills the cache
    url = f"{server.url}/checkpoint/{saved['name']}/restore"  # vLLM's own port
    done, streams = stream_during(server, 100, lambda: httpx.post(url, json={"wait": True}, timeout=120).json())
    restore = done["restore"]
    assert restore["state"] == "succeeded", restore
    assert 0 < restore["paused_seconds"] < restore["seconds"]
    assert 0 < saved["stopped_seconds"] < saved["seconds"]
    assert restore["weight_version"] == job["weight_version"] + 1
    assert {len(stream.times) for stream in streams} == {100}
    assert (server.logprobs(TOKENS), answer(server)) == before
    assert trainer.post("/train", JOB)["weight_version"] == restore["weight_version"] + 1


def check_rollback(server: Server, trainer: Trainer) -> None:
    """A job whose guard is not content after its second step: what is served is what was before the first one."""
    before = server.logprobs(TOKENS)
    guard = {"measure": "command", "every": 2, "action": "rollback"}
    job = trainer.post("/train", JOB | {"epochs": 6, "guard": guard})
    assert (job["state"], job["step"], job["error"]["code"]) == ("failed", 2, "RolledBackError"), job
    assert server.logprobs(TOKENS) == before
    assert trainer.get("/train/status")["trainer"]["weight_version"] == job["weight_version"]


def kill_while_paused(server: Server, trainer: Trainer, rank: int) -> None:
    """kill -9 of one rank while the server is paused for its update: the server answers again within 10 s."""
    order = trainer.state_dir / "order"
    order.with_suffix(".paused").unlink(missing_ok=True)
    order.write_text("60")
    trainer.post("/train", JOB | {"wait": False})
    wait_for(order.with_suffix(".paused").exists, 60)
    with pytest.raises(httpx.ReadTimeout):  # paused indeed
        httpx.post(f"{server.url}/v1/completions", json={"model": "demo", "prompt": [5], "max_tokens": 1}, timeout=1.5)
    torchrun = trainer.process.process.pid
    ranks = [int(child) for child in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()]
    os.kill(torchrun, signal.SIGSTOP)  # it would end the other rank: the plugin must do without
    try:
        os.kill(ranks[rank], signal.SIGKILL)
        killed = time.monotonic()
        body = {"model": "demo", "prompt": [5], "max_tokens": 1}
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=30).raise_for_status()
        seconds = time.monotonic() - killed
    finally:
        for process in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        os.kill(torchrun, signal.SIGCONT)
    print(f"rank {rank} killed: the server answered after {seconds:.1f} s")
    assert seconds < 10


def test_hogwild_and_a_cache_left_alone_serve_a_stale_answer(server: Server, start: START) -> None:
    """The default: nothing waits, and the prefix cache answers with what older weights computed."""
    trainer = start()
    check_cache_after_update(server, trainer, stale=True)


def test_a_cache_reset_between_running_requests_breaks_no_stream(server: Server, start: START) -> None:
    """Without any pause, vLLM takes the cache blocks of running requests away and computes them again."""
    trainer = start("cache=reset")
    check_cache_after_update(server, trainer, stale=False)
    job, streams = stream_during(server, 400, lambda: trainer.post("/train", JOB | {"epochs": 3}))
    assert job["state"] == "succeeded", job
    assert {len(stream.times) for stream in streams} == {400}
    assert all(step["paused_seconds"] == 0 for step in step_data(trainer, job))


def test_step_lock_keeps_a_running_stream_and_reset_makes_answers_fresh(
    server: Server, start: START, tmp_path: Path
) -> None:
    """A stream stands still during the writes and goes on; the cache is emptied; a dead trainer leaves no pause behind."""
    (tmp_path / "judge").write_text("echo 1; test $APOLLO_TP_STEP -lt 2")
    command = f"service.guard_command=[/bin/sh,{tmp_path}/judge]"
    trainer = start("sync=step_lock", "cache=reset", "qos=paced", command)
    status = httpx.get(f"{server.url}/train/status", timeout=30).json()["trainer"]
    assert (status["sync"], status["qos"]) == ("step_lock", "sm_percent=null low_priority=false pace=0.5")
    check_cache_after_update(server, trainer, stale=False)

    (trainer.state_dir / "order").write_text("1.5")
    job, streams = stream_during(server, 300, lambda: trainer.post("/train", JOB | {"epochs": 2}))
    assert job["state"] == "succeeded", job
    assert {len(stream.times) for stream in streams} == {300}
    assert max(stream.longest_gap() for stream in streams) > 1.4, "tokens arrived while an update was written"
    steps = step_data(trainer, job)
    assert all(1.4 < step["paused_seconds"] < 30 for step in steps)
    versions = [step["weight_version"] for step in steps]
    status = httpx.get(f"{server.url}/train/status", timeout=30)
    assert versions[-1] == versions[0] + 1 == job["weight_version"] == status.json()["trainer"]["weight_version"]
    assert status.headers["x-apollo-weight-version"] == str(versions[-1])
    (trainer.state_dir / "order").unlink()
    check_restore(server, trainer)
    check_rollback(server, trainer)
    kill_while_paused(server, trainer, rank=1)


def test_drain_writes_between_requests_and_salt_makes_answers_fresh(server: Server, start: START) -> None:
    """A running stream ends before the update, one that comes meanwhile waits, none fails; versions share no entries."""
    trainer = start("sync=drain", "cache=salt")
    check_cache_after_update(server, trainer, stale=False)

    (trainer.state_dir / "order").write_text("1.5")
    first = Stream(server, 400).started()
    results: list[dict] = []
    job = threading.Thread(target=lambda: results.append(trainer.post("/train", JOB)))
    job.start()
    wait_for((trainer.state_dir / "order.paused").exists, 120)
    assert first.finished_at, "the update began while a request ran"
    answers: list[tuple[list[float], float]] = []
    late = threading.Thread(target=lambda: answers.append((answer(server), time.monotonic())))
    late.start()
    job.join(120)
    late.join(120)
    assert results[0]["state"] == "succeeded", results
    assert len(first.times) == 400
    (late_answer, answered_at), fresh = answers[0], answer(server, salt="late")
    assert late_answer == fresh, "a request that waited for the update was answered from entries of before"
    (step,) = step_data(trainer, results[0])
    assert answered_at - first.finished_at > 1.4, "the late request did not wait for the update"
    assert step["paused_seconds"] > 1.4
    kill_while_paused(server, trainer, rank=0)


def test_a_server_without_the_plugin_is_refused(server: Server, tmp_path: Path) -> None:
    """No update lock, no pausing mode: the trainer ends at its start, with cause and cure."""
    path = server.runtime_dir / "main" / "sync.sock"
    hidden = path.with_name("hidden.sock")
    path.rename(hidden)
    try:
        process = start_trainer(
            server.runtime_dir,
            tmp_path,
            tmp_path / "t.log",
            overrides=["server.instance=main", "sync=drain"],
            forking=True,
        )
        try:
            assert process.process.wait(180) != 0
        finally:
            process.stop()
    finally:
        hidden.rename(path)
    text = process.log.read_text()
    assert "VLLM_PLUGINS=apollo" in text
    assert "sync=hogwild cache=none" in text

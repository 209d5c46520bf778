"""Two servers of one model, trained together while clients generate on both. One is killed in the middle of a job, returns,
is filled from the other's memory, and the job goes on at its next step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

from apollo_tp.shards.instance import read_instance
from apollo_tp.shards.mapping import map_rank
from examples.demo.common import ENDED, Demo, console, logprobs, mean_logprob, post, texts
from examples.demo.load import GenerationLoad
from tests.support.demo_model import make_model
from tests.support.processes import ManagedProcess, coordinator_url, free_port, start_server, start_trainer

NAMES = ("first", "second")
KILLED = "first"
BATCH_SIZE, NUM_SAMPLES = 8, 80
START_SECONDS = 300.0
OUTPUTS = ("model", "service", "checkpoints", "first.log", "second.log", "trainer.log", "result.json")


@dataclass
class Stack:
    """Two servers at TP = 1, a core or GPU for each, and the trainer of both."""

    out: Path
    runtime_dir: Path
    server_args: list[str]
    urls: dict[str, str] = field(default_factory=dict)
    servers: dict[str, ManagedProcess] = field(default_factory=dict)
    trainer: ManagedProcess | None = None

    def serve(self, name: str) -> None:
        """Start a server, which need not be up when this returns."""
        index, port = NAMES.index(name), free_port()
        device = {"VLLM_CPU_OMP_THREADS_BIND": str(index % (os.cpu_count() or 1)), "CUDA_VISIBLE_DEVICES": str(index)}
        self.urls[name] = f"http://127.0.0.1:{port}"
        self.servers[name] = start_server(
            self.out / "model", port, self.runtime_dir, self.out / f"{name}.log", tensor_parallel=1, instance=name,
            extra=["--dtype", "float32", *self.server_args], environment=device,
        )  # fmt: skip

    def wait(self, name: str) -> None:
        self.servers[name].wait_for(f"{self.urls[name]}/health", START_SECONDS)

    def train(self) -> str:
        """Start the trainer; returns its coordinator's address."""
        overrides = ["server.replicas=2", "optim.lr=1e-3", "train.max_sequence_tokens=512"]
        self.trainer = start_trainer(self.runtime_dir, self.out, self.out / "trainer.log", overrides=overrides)
        return coordinator_url(self.runtime_dir, self.trainer, instance=NAMES[0], seconds=START_SECONDS)

    def kill(self, name: str) -> None:
        """kill -9 of the whole server, as if its host had lost power."""
        os.killpg(self.servers[name].process.pid, signal.SIGKILL)
        self.servers[name].stop()

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """Copies of what the server has in its memory."""
        mapped = map_rank(read_instance(self.runtime_dir / name), 0)
        copies = {tensor: local.cpu().clone() for tensor, (_, local) in mapped.tensors.items()}
        mapped.close()
        return copies

    def stop(self) -> None:
        for process in (self.trainer, *self.servers.values()):
            if process:
                process.stop()


def run(out: Path, runtime_dir: Path, num_steps: int, server_args: list[str]) -> dict[str, Any]:
    """Run the demo in an empty folder; returns the figures."""
    stack = Stack(out, runtime_dir, server_args)
    try:
        return _run(stack, num_steps)
    finally:
        stack.stop()


def _run(stack: Stack, num_steps: int) -> dict[str, Any]:
    train_texts, heldout = texts()
    num_parameters = make_model(stack.out / "model", train_texts, dtype=torch.float32)  # see the other demo
    console.print(f"model: {num_parameters / 1e6:.1f}M parameters, served twice")
    for name in NAMES:
        stack.serve(name)
    for name in NAMES:
        stack.wait(name)
    service, loads = stack.train(), {}
    before = mean_logprob(stack.urls[KILLED], heldout)
    try:
        loads = {name: GenerationLoad(stack.urls[name], heldout[0][:100]) for name in NAMES}
        body = {"samples": [{"text": text} for text in train_texts[:NUM_SAMPLES]], "batch_size": BATCH_SIZE}
        job = post(f"{service}/train", body | {"epochs": num_steps, "max_steps": num_steps})["id"]
        _until(lambda: _job(service, job)["step"] >= num_steps // 2, 120, "half of the steps")
        loads[KILLED].stop()
        figures = _lose_a_server(stack)
        service = stack.train()
        figures["filled_bit_identical"] = _equal(stack)
        loads["returned"] = GenerationLoad(stack.urls[KILLED], heldout[0][:100])
        _until(lambda: _job(service, job)["state"] in ENDED, 240, "the end of the job")
    finally:
        for load in loads.values():
            load.stop()
    return _figures(stack, _job(service, job), _losses(service, job), heldout, before, loads) | figures


def _lose_a_server(stack: Stack) -> dict[str, Any]:
    """Kill a server in the middle of a job and start it again. How long the trainer took to end."""
    assert stack.trainer is not None
    killed = time.monotonic()
    stack.kill(KILLED)
    _until(lambda: stack.trainer is not None and stack.trainer.process.poll() is not None, 30, "the end of the trainer")
    seconds = time.monotonic() - killed
    console.print(f"server {KILLED} killed; the trainer ended {seconds:.1f} s later; starting both again")
    stack.serve(KILLED)
    stack.wait(KILLED)
    return {"trainer_noticed_s": round(seconds, 2)}


def _until(holds: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise SystemExit(f"got no sign of {what} for {seconds:.0f} s; see the logs")
        time.sleep(0.2)


def _job(service: str, job: str) -> dict[str, Any]:
    return httpx.get(f"{service}/train/jobs/{job}", timeout=30).raise_for_status().json()  # type: ignore[no-any-return]


def _losses(service: str, job: str) -> list[float]:
    events = httpx.get(f"{service}/train/jobs/{job}/events", timeout=30).raise_for_status().json()["data"]
    return [event["data"]["train_loss"] for event in events if event.get("type") == "metrics"]


def _equal(stack: Stack) -> bool:
    """Whether both servers have the same bits in their memory."""
    first, second = (stack.weights(name) for name in NAMES)
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def _figures(
    stack: Stack,
    job: dict[str, Any],
    losses: list[float],
    heldout: list[str],
    before: float,
    loads: dict[str, GenerationLoad],
) -> dict[str, Any]:
    first, second = ([logprobs(stack.urls[name], text) for text in heldout] for name in NAMES)
    return {
        "job": job["state"],
        "train_steps": job["step"],
        "train_loss_first": losses[0],
        "train_loss_last": losses[-1],
        "heldout_logprob_before": before,
        "heldout_logprob_after": mean_logprob(stack.urls[KILLED], heldout),
        "replicas_bit_identical": _equal(stack),
        "replicas_answer_alike": first == second,
        "requests_ok": {name: load.ok for name, load in loads.items()},
        "requests_failed": {name: load.failed for name, load in loads.items()},
    }


def _promises_held(result: dict[str, Any]) -> bool:
    return bool(
        result["job"] == "succeeded"
        and result["train_loss_first"] - result["train_loss_last"] > 1
        and result["heldout_logprob_after"] > result["heldout_logprob_before"]
        and result["replicas_bit_identical"]
        and result["filled_bit_identical"]
        and result["replicas_answer_alike"]
        and result["trainer_noticed_s"] < 10
        and min(result["requests_ok"].values()) > 0
        and not any(result["requests_failed"].values())
    )


DEMO = Demo(
    "examples.demo.replicas", __doc__, "apollo_tp demo: two vLLM servers, trained in place as one", OUTPUTS, run,
    _promises_held,
)  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(DEMO.main())

"""Faults of a trainer of a real server, for the CPU suite and the GPU suite, and what must hold afterwards."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import torch

from apollo_tp.launch.compose import quoted
from apollo_tp.shards.mapping import map_rank
from tests.support.faulty_launch import ALL_OUT_OF_MEMORY, RAISES_IN_OPTIMIZER
from tests.support.processes import FORKING_TORCHRUN, ManagedProcess, coordinator_url, start_trainer
from tests.support.servers import Server, Trainer

OVERRIDES = ["optim.lr=1e-3", "train.max_sequence_tokens=256", "optim.check_replicas_every=1"]
PROMPT = [5, 6, 7, 8, 9]


def step(first_token: int = 5, **fields: object) -> dict:
    """The body of a job of one step; some values of ``first_token`` are faults."""
    return {"samples": [{"context_ids": [first_token], "continuation_ids": [6, 7, 8]}], **fields}


def settings(server: Server, folder: Path) -> list[str]:
    return [
        f"server.instance={server.instance}", "service.http.port=0", quoted("service.state_dir", f"{folder}/service"),
        quoted("checkpoint.dir", f"{folder}/checkpoints"), "train.threads=1", *OVERRIDES,
    ]  # fmt: skip


def environment(server: Server) -> dict[str, str]:
    return {"APOLLO_TP_RUNTIME_DIR": str(server.runtime_dir), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def start_faulty(server: Server, folder: Path, overrides: Sequence[str] = ()) -> Trainer:
    """A trainer with the faults of ``faulty_launch``."""
    torchrun = "torch.distributed.run" if torch.cuda.is_available() else FORKING_TORCHRUN
    command = [
        sys.executable, "-m", torchrun, "--standalone", "--nproc-per-node", str(len(server.manifests)),
        "-m", "tests.support.faulty_launch", *settings(server, folder), *overrides,
    ]  # fmt: skip
    process = ManagedProcess(command, environment(server), folder / "faulty.log")
    try:
        return Trainer(coordinator_url(server.runtime_dir, process, instance=server.instance), folder, process)
    except BaseException:
        process.stop()
        raise


def start_sound(server: Server, folder: Path, overrides: Sequence[str] = ()) -> ManagedProcess:
    """A trainer of ``server`` that takes over the jobs in ``folder``."""
    return start_trainer(
        server.runtime_dir, folder, folder / "sound.log", num_ranks=len(server.manifests),
        overrides=[f"server.instance={server.instance}", *OVERRIDES, *overrides], forking=not torch.cuda.is_available(),
    )  # fmt: skip


def assert_usable(server: Server) -> None:
    """The server answers with finite log-probabilities, and every weight it serves is finite on every rank."""
    assert all(math.isfinite(value) for value in server.logprobs(PROMPT))
    for rank in range(len(server.manifests)):
        mapped = map_rank(server.manifests, rank)
        bad = [name for name, (_, local) in mapped.tensors.items() if not torch.isfinite(local).all()]
        mapped.close()
        assert not bad, f"rank {rank}: {bad} are not finite"


def assert_the_next_trainer_trains(server: Server, folder: Path, interrupted: str) -> None:
    """It maps the weights again, runs the job that the dead one was in, and a new one; log-probabilities move."""
    before = server.logprobs(PROMPT)
    process = start_sound(server, folder)
    try:
        trainer = Trainer(coordinator_url(server.runtime_dir, process, instance=server.instance), folder, process)
        assert trainer.post("/train", step(wait=True))["state"] == "succeeded"
        assert trainer.get(f"/train/jobs/{interrupted}")["state"] in ("succeeded", "failed")
    finally:
        process.stop()
    assert server.logprobs(PROMPT) != before
    assert_usable(server)


def leave_replicas_different(server: Server) -> None:
    """Change one bit of a replica on the last rank only, as a kill in the middle of a write may."""
    mapped = map_rank(server.manifests, len(server.manifests) - 1)
    shared = next(local for shard, local in mapped.tensors.values() if len(shard.replica_ranks) > 1)
    shared.view({2: torch.int16, 4: torch.int32}[shared.element_size()])[0] ^= 1
    if shared.is_cuda:
        torch.cuda.synchronize(shared.device)
    mapped.close()


def check_kill_in_mid_step(server: Server, folder: Path, fault: int) -> None:
    """The last rank is killed in its second step: its trainer ends, and nothing else does. The next one repairs what
    the kill may have left."""
    trainer = start_faulty(server, folder)
    try:
        assert trainer.post("/train", step(wait=True))["state"] == "succeeded"
        job = trainer.post("/train", step(fault))
        assert trainer.process.process.wait(120) != 0
    finally:
        trainer.process.stop()
    assert_usable(server)
    if len(server.manifests) > 1:
        leave_replicas_different(server)
    assert_the_next_trainer_trains(server, folder, job["id"])


def large_step(first_token: int = 5, **fields: object) -> dict:
    """As ``step``, with 2,250 tokens: sums over ranks are 1.1 MiB, as large as those that go through peer memory."""
    samples = [{"context_ids": [first_token] * 50, "continuation_ids": [6, 7, 8, 9] * 50} for _ in range(9)]
    return {"samples": samples, **fields}


def served_weights(server: Server) -> list[dict[str, torch.Tensor]]:
    """By rank, copies of all served tensors."""
    copies = []
    for rank in range(len(server.manifests)):
        mapped = map_rank(server.manifests, rank)
        copies.append({name: local.cpu().clone() for name, (_, local) in mapped.tensors.items()})
        mapped.close()
    return copies


def check_raise_in_the_optimizer(server: Server, folder: Path, overrides: Sequence[str] = ()) -> None:
    """The last rank raises between two sums of its optimizer, while the server is paused: no rank writes, the server answers
    again within seconds, and the trainer goes on, twice."""
    trainer = start_faulty(server, folder, ["sync=step_lock", "train.max_micro_batch_tokens=2304", *overrides])
    try:
        assert trainer.post("/train", large_step(wait=True))["state"] == "succeeded"
        for _ in range(2):
            before, started = served_weights(server), time.monotonic()
            job = trainer.post("/train", large_step(RAISES_IN_OPTIMIZER, wait=True))
            assert (job["state"], "injected on rank" in str(job)) == ("failed", True), job
            assert all(math.isfinite(value) for value in server.logprobs(PROMPT))
            assert time.monotonic() - started < 30
            for rank, (old, new) in enumerate(zip(before, served_weights(server), strict=True)):
                changed = [name for name, value in old.items() if not torch.equal(value, new[name])]
                assert not changed, f"rank {rank} has written {changed}"
        assert trainer.post("/train", large_step(wait=True))["state"] == "succeeded"
    finally:
        trainer.process.stop()


def check_out_of_memory_on_all_ranks(server: Server, trainer: Trainer) -> None:
    """The job fails with the allocator's message; the trainer continues with the next job."""
    assert trainer.post("/train", step(wait=True))["state"] == "succeeded"
    job = trainer.post("/train", step(ALL_OUT_OF_MEMORY, wait=True))
    assert job["state"] == "failed"
    assert "memory" in str(trainer.get(f"/train/jobs/{job['id']}/events"))
    assert_usable(server)
    assert trainer.post("/train", step(wait=True))["state"] == "succeeded"


def wait_for_the_end(trainer: Trainer, job_id: str, seconds: float) -> None:
    """Wait until the job has failed or the trainer's processes have ended."""
    deadline = time.monotonic() + seconds
    while trainer.process.process.poll() is None:
        with contextlib.suppress(httpx.TransportError):  # the coordinator goes with rank 0
            if trainer.get(f"/train/jobs/{job_id}")["state"] == "failed":
                return
        assert time.monotonic() < deadline, trainer.process.tail()
        time.sleep(0.5)

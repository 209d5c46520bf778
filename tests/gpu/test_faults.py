"""Too little memory, and deaths in mid-step, beside a real server on GPUs: it serves on, and can be trained again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.faults import (
    PROMPT,
    assert_the_next_trainer_trains,
    assert_usable,
    check_kill_in_mid_step,
    check_out_of_memory_on_all_ranks,
    check_raise_in_the_optimizer,
    large_step,
    served_weights,
    start_faulty,
    start_sound,
    step,
    wait_for_the_end,
)
from tests.support.faulty_launch import KILLED_IN_BACKWARD, KILLED_IN_WRITE, ONE_OUT_OF_MEMORY
from tests.support.processes import coordinator_url
from tests.support.servers import Server, Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

LARGE = "train.max_micro_batch_tokens=262144"
"""Some 10 GB of activations with the model of these tests; the planning itself needs a tenth of that."""
LEFT_BYTES = 4 * 10**9
"""Enough for the contexts and communicators of a trainer rank, and for its rehearsals."""


@pytest.fixture
def faulty(server: Server, tmp_path: Path) -> Iterator[Trainer]:
    """A trainer that fails when told to; stopped at the end."""
    trainer = start_faulty(server, tmp_path)
    try:
        yield trainer
    finally:
        trainer.process.stop()


@contextlib.contextmanager
def little_memory_left(server: Server) -> Iterator[None]:
    """All but LEFT_BYTES of the free memory of the server's GPUs is taken."""
    ballast = []
    for device in range(len(server.manifests)):
        taken = torch.cuda.mem_get_info(device)[0] - LEFT_BYTES
        ballast.append(torch.empty(taken, dtype=torch.uint8, device=f"cuda:{device}"))
    try:
        yield
    finally:
        ballast.clear()
        torch.cuda.empty_cache()


def assert_refused(server: Server, folder: Path, *overrides: str) -> str:
    """The trainer ends by itself with the plan's refusal, and what is served keeps its bits. Returns its log."""
    before = server.logprobs(PROMPT)
    process = start_sound(server, folder, overrides)
    try:
        assert process.process.wait(180) != 0
    finally:
        process.stop()
    log = process.log.read_text()
    assert "DeviceMemoryError: rank " in log, log
    assert "--kv-cache-memory-bytes" in log
    assert "out-of-memory error" not in log, "it ran out of memory before it could tell"
    assert server.logprobs(PROMPT) == before
    return log


def test_a_micro_batch_that_can_never_fit_is_refused_before_the_first_step(server: Server, tmp_path: Path) -> None:
    assert "train.max_micro_batch_tokens=100000000" in assert_refused(
        server, tmp_path, "train.max_micro_batch_tokens=100000000"
    )


def test_a_micro_batch_that_fits_is_refused_once_others_have_taken_the_memory(server: Server, tmp_path: Path) -> None:
    with little_memory_left(server):
        assert_refused(server, tmp_path, LARGE)
    process = start_sound(server, tmp_path, [LARGE])
    try:
        trainer = Trainer(coordinator_url(server.runtime_dir, process), tmp_path, process)
        memory = trainer.get("/train/status")["trainer"]["memory"]
        assert "planned for a micro-batch of 262144 tokens" in memory
        assert trainer.post("/train", step(wait=True))["state"] == "succeeded"
    finally:
        process.stop()
    assert_usable(server)


@pytest.mark.parametrize("fault", [KILLED_IN_BACKWARD, KILLED_IN_WRITE], ids=["backward", "write"])
def test_a_rank_killed_in_mid_step_leaves_server_and_weights_usable(server: Server, tmp_path: Path, fault: int) -> None:
    check_kill_in_mid_step(server, tmp_path, fault)


def test_running_out_of_memory_fails_the_job_alone(server: Server, faulty: Trainer) -> None:
    check_out_of_memory_on_all_ranks(server, faulty)


@pytest.mark.parametrize("overrides", [(), ("qos.pace=0.5",)], ids=["", "pace"])
def test_a_rank_that_raises_in_its_optimizer_freezes_nothing(
    server: Server, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    check_raise_in_the_optimizer(server, tmp_path, overrides)


def test_one_rank_that_runs_out_of_memory_is_not_waited_for(server: Server, tmp_path: Path) -> None:
    """The others wait for it on their GPUs, in NCCL or in sums through peer memory: they are woken within seconds, long
    before ``command_timeout_seconds``, and have written nothing."""
    if len(server.manifests) == 1:
        pytest.skip("one rank is all ranks")
    trainer = start_faulty(server, tmp_path, ["train.max_micro_batch_tokens=2304"])
    try:
        assert trainer.post("/train", large_step(wait=True))["state"] == "succeeded"
        before = served_weights(server)
        job = trainer.post("/train", large_step(ONE_OUT_OF_MEMORY))
        wait_for_the_end(trainer, job["id"], 30)
        for old, new in zip(before, served_weights(server), strict=True):
            assert all(torch.equal(value, new[name]) for name, value in old.items())
        assert_usable(server)
    finally:
        trainer.process.stop()
    assert_the_next_trainer_trains(server, tmp_path, job["id"])

"""The Python client against a real coordinator process; rank 0 is a fake over a real socket."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from apollo_tp.client import AsyncClient, Client, Guard, Job, JobError, LossConfig, NotDoneError, RefusedError, Sample
from apollo_tp.errors import DeadlineError
from tests.support.fakes import CoordinatorProcess, FakeRanks, wait_for

TOKEN = "a-token-of-sixteen"
Stack = tuple[CoordinatorProcess, FakeRanks]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("c")
    with (
        CoordinatorProcess(folder, env={"APOLLO_TP_TOKEN": TOKEN}) as coordinator,
        FakeRanks(coordinator.ranks_socket, folder / "journal", step_seconds=0.05) as ranks,
        coordinator.client() as http,
    ):
        wait_for(lambda: http.get("/health").json()["trainer"])
        yield coordinator, ranks


def samples(count: int = 4) -> list[Sample]:
    return [
        Sample(prompt_ids=[1, 2], completion_ids=[3, 4], sampling_logprobs=[-0.5, -1.0], reward=float(i), group="a")
        for i in range(count)
    ]


def test_submit_wait_status_and_scores(stack: Stack) -> None:
    coordinator, ranks = stack
    with Client(coordinator.url, TOKEN) as client:
        before = client.status().trainer.weight_version
        job = client.submit(samples(), loss="ppo", loss_config=LossConfig(clip_high=0.3), batch_size=2)
        assert (job.step, job.total_steps) == (0, 2)
        done = client.wait(job.id, 30)
        assert (done.state, done.step) == ("succeeded", 2)
        (sent, _) = [command for command in ranks.commands if getattr(command, "job_id", "") == job.id]
        assert (sent.loss.name, sent.loss.config.clip_high) == ("ppo", 0.3)
        assert client.status().trainer.weight_version == before + 2
        scored = [samples(1)[0], {"context_ids": [1], "continuation_ids": [7, 8]}]
        assert client.logprobs(scored) == [[-0.03, -0.04], [-0.07, -0.08]]


def test_the_same_awaited(stack: Stack) -> None:
    async def run() -> tuple[Job, list[list[float]]]:
        async with AsyncClient(stack[0].url, TOKEN) as client:
            assert (await client.status()).trainer.connected
            jobs = [await client.submit(samples(), loss="gspo") for _ in range(2)]
            ended = await asyncio.gather(*(client.wait(job.id, 30) for job in jobs))
            return ended[1], await client.logprobs(samples(1))

    job, logprobs = asyncio.run(run())
    assert (job.state, logprobs) == ("succeeded", [[-0.03, -0.04]])


def test_a_checkpoint_is_restored_and_a_job_guarded(stack: Stack) -> None:
    """By the name of the checkpoint; what fails is raised."""
    coordinator, ranks = stack
    with Client(coordinator.url, TOKEN) as client:
        made = client.checkpoint()
        assert made.state == "succeeded"
        version = client.status().trainer.weight_version
        back = client.restore(made.name)
        assert back.restore is not None
        assert (back.id, back.restore.weight_version) == (made.id, version + 1)
        ranks.fail_restores = True
        with pytest.raises(NotDoneError, match="another checksum"):
            client.restore(made.id)
        ranks.fail_restores = False
        with pytest.raises(RefusedError):
            client.restore("no/such")
        held_out = [{"context_ids": [1], "continuation_ids": [7, 8]}]
        job = client.submit(samples(), loss="ppo", batch_size=2, validation=held_out, guard=Guard(every=1))
        assert client.wait(job.id, 30).guard == {
            "baseline": pytest.approx(0.54), "value": pytest.approx(0.54), "step": 2, "verdict": "", "snapshot": "",
            "restore_id": "",
        }  # fmt: skip

    async def again() -> str:
        async with AsyncClient(coordinator.url, TOKEN) as client:
            made = await client.checkpoint()
            return (await client.restore(made.id)).state

    assert asyncio.run(again()) == "succeeded"


def test_what_goes_wrong_is_raised(stack: Stack) -> None:
    """A refusal names its field; a job that fails says why; a wait has a deadline."""
    coordinator, ranks = stack
    with Client(coordinator.url) as stranger, pytest.raises(RefusedError) as unknown:
        stranger.status()
    assert unknown.value.status == 401
    with Client(coordinator.url, TOKEN) as client:
        with pytest.raises(RefusedError) as refused:
            client.submit([Sample(prompt_ids=[1], completion_ids=[2])], loss="ppo")
        assert (refused.value.status, refused.value.field) == (400, "samples[0].sampling_logprobs")
        with pytest.raises(RefusedError) as missing:
            client.job("no/such")
        assert missing.value.status == 404
        long = client.submit(samples(), loss="ppo", epochs=100)
        with pytest.raises(DeadlineError, match=r"of 100 after 0\.1 s"):
            client.wait(long.id, 0.1)
        ranks.fail_at = {long.step + 60}
        with pytest.raises(JobError, match=r"got state failed .*boom") as failed:
            client.wait(long.id, 60)
        assert failed.value.job.state == "failed"
        ranks.fail_at = set()


def test_it_imports_neither_torch_nor_the_service() -> None:
    heavy = ("torch", "transformers", "fastapi", "zmq")
    code = f"import apollo_tp.client, sys; print([name for name in {heavy} if name in sys.modules])"
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=60)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr

"""What clients ask beside the running job: it neither stops training nor the coordinator's end, and ends with its client."""

import asyncio
import contextlib
import itertools
import select
import socket
import time
from pathlib import Path

import httpx
import msgspec
import pytest

from apollo_tp.coordinator.jobs.client_requests import MAX_REQUESTS, ClientRequests
from apollo_tp.coordinator.jobs.store import Store
from apollo_tp.errors import RequestError
from apollo_tp.wire import commands
from tests.support.fakes import CoordinatorProcess, FakeRanks, chat_stack, wait_for
from tests.support.jobs import CHAT, ONE, ends

SCORE = {"samples": [ONE]}


def abandoned(client, path, body):
    """A connection on which a request was sent; close it to abandon it."""
    content = msgspec.json.encode(body)
    url = client.base_url
    connection = socket.create_connection((url.host, url.port))
    head = f"POST {path} HTTP/1.1\r\nHost: {url.host}\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


def steps_in(ranks, seconds):
    before = len(ranks.applied())
    time.sleep(seconds)
    return len(ranks.applied()) - before


def test_scores_share_the_ranks_with_the_job(stack):
    """Each score takes four times as long as a step: half of the commands, and never two in a row."""
    client, ranks, _ = stack
    ranks.score_seconds = 0.2
    client.post("/train", json=ONE | {"epochs": 10_000})
    wait_for(lambda: len(ranks.applied()) > 2)
    first = len(ranks.commands)
    with contextlib.ExitStack() as connections:
        for _ in range(20):
            connections.enter_context(abandoned(client, "/train/score", SCORE))
        wait_for(lambda: len(ranks.scored) >= 5)
    kinds = [isinstance(command, commands.Score) for command in ranks.commands[first:]]
    assert not any(a and b for a, b in itertools.pairwise(kinds))
    scored = len(ranks.scored)
    time.sleep(1.0)
    assert len(ranks.scored) <= scored + 2  # the others were abandoned
    assert client.get("/health").json()["trainer"]


def test_scores_beyond_the_limit_are_answered_429(tmp_path):
    """On a busy machine, too, the ranks must not count as gone: that would answer all requests."""
    with (
        chat_stack(tmp_path, rank_timeout_seconds=60.0) as (client, ranks, _),
        contextlib.ExitStack() as stack,
    ):
        ranks.score_seconds = 5.0
        connections = [stack.enter_context(abandoned(client, "/train/score", SCORE)) for _ in range(MAX_REQUESTS + 8)]
        answered = wait_for(lambda: len(ready := select.select(connections, [], [], 0.1)[0]) >= 8 and ready)
        heads = [connection.recv(1000).split(b"\r\n")[0] for connection in answered]
        assert len([head for head in heads if head == b"HTTP/1.1 429 Too Many Requests"]) == 8
        assert len(ranks.scored) < MAX_REQUESTS
        stack.close()
        ranks.score_seconds = 0.0
        assert wait_for(lambda: client.post("/train/score", json=SCORE).status_code == 200)


def test_a_turn_of_a_request_that_is_cancelled_goes_to_the_next():
    """Before it is sent, while it is at the ranks, and at the moment of its turn."""

    async def main():
        sent = []

        async def ask(command):
            sent.append(command.id)
            await asyncio.sleep(0.02)
            return command

        requests = ClientRequests(ask, lambda: False, 5.0)
        tasks = [asyncio.create_task(requests.ask(commands.Identify(id=str(number)))) for number in range(6)]
        await asyncio.sleep(0.01)
        tasks[0].cancel()  # at the ranks
        tasks[1].cancel()  # waits
        ended = requests._ended
        requests._ended = lambda task: (ended(task), tasks[2].cancel())  # gets its turn
        done = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        assert [isinstance(each, asyncio.CancelledError) for each in done] == [True] * 3 + [False] * 3
        assert sent == ["0", "3", "4", "5"]
        with contextlib.ExitStack() as admitted:
            for _ in range(MAX_REQUESTS):
                admitted.enter_context(requests.admitted())
            with pytest.raises(RequestError) as error, requests.admitted():
                pass
            assert error.value.status == 429
        with requests.admitted():
            pass

    asyncio.run(main())


LONG = {"samples": [{"text": "Hello there, how are you? " * 30}] * 1200}


def test_abandoned_dry_runs_stop_neither_training_nor_the_end(stack):
    """They end with their clients; those beyond the limit are answered 429."""
    client, ranks, coordinator = stack
    ranks.step_seconds = 0.01
    client.post("/train", json=ONE | {"epochs": 10_000})
    wait_for(lambda: len(ranks.applied()) > 2)
    alone = steps_in(ranks, 1.5)
    connections = [abandoned(client, "/train?dry_run=true", LONG) for _ in range(8)]
    answered, _, _ = select.select(connections, [], [], 10)
    assert answered[0].recv(12) == b"HTTP/1.1 429"  # the others are still worked on, or wait
    for connection in connections:
        connection.close()
    assert steps_in(ranks, 1.5) > alone / 4
    wait_for(
        lambda: client.post("/train?dry_run=true", json=ONE).status_code == 200, 5, "the end of abandoned dry runs"
    )
    connections = [abandoned(client, "/train?dry_run=true", LONG) for _ in range(4)]
    time.sleep(0.2)
    begun = time.monotonic()
    coordinator.process.terminate()
    coordinator.process.wait(10)
    assert time.monotonic() - begun < 5.0
    for connection in connections:
        connection.close()


# --- validation ------------------------------------------------------------------------------------------------------

LARGE = CHAT * 60_000


def tuned(client, content):
    """The id of a new job over this file."""
    upload = {"file": ("a.jsonl", content)}
    file = client.post("/v1/files", files=upload, data={"purpose": "fine-tune"}).json()["id"]
    return client.post("/v1/fine_tuning/jobs", json={"model": "fake", "training_file": file}).json()["id"]


def test_small_files_are_not_validated_behind_large_ones(stack):
    client, *_ = stack
    large = tuned(client, LARGE)
    small = tuned(client, CHAT)
    assert ends(client, small)["state"] == "succeeded"
    assert client.get(f"/train/jobs/{large}").json()["state"] == "validating_files"
    assert client.post(f"/train/jobs/{large}/cancel").json()["state"] == "cancelled"
    next_one = tuned(client, CHAT * 12_000)  # of the same size class: the cancelled one does not hold it up
    path = f"/train/jobs/{next_one}"
    wait_for(lambda: client.get(path).json()["state"] in ("queued", "running"), 40, "the end of its validation")


def test_a_validation_does_not_delay_the_end(tmp_path):
    """The coordinator of a killed trainer keeps its folder locked until it has ended. The next one validates again."""
    with chat_stack(tmp_path) as (client, _, coordinator):
        job = tuned(client, LARGE)
        samples = tmp_path / "state" / "samples"
        wait_for(lambda: list(samples.iterdir()))
        begun = time.monotonic()
        coordinator.process.terminate()
        coordinator.process.wait(20)
        assert time.monotonic() - begun < 3.0
        coordinator.start()
        with coordinator.client() as again:
            assert again.get(f"/train/jobs/{job}").json()["state"] == "validating_files"
            again.post(f"/train/jobs/{job}/cancel")
            wait_for(lambda: not list(samples.iterdir()), what="removal of what was converted")


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dies", ["ranks", "coordinator"])
def test_an_accepted_checkpoint_is_written_whoever_dies(tmp_path: Path, dies: str):
    """By the next rank 0 or coordinator, under a new name: the old one may be half written."""
    coordinator = CoordinatorProcess(tmp_path).start()
    try:
        with contextlib.ExitStack() as first:
            ranks = first.enter_context(FakeRanks(coordinator.ranks_socket, tmp_path / "journal"))
            with coordinator.client() as client:
                wait_for(lambda: client.get("/health").json()["trainer"])
                ranks.save_seconds = 1.0 if dies == "coordinator" else 60.0
                checkpoint = client.post("/checkpoint").json()
                wait_for(lambda: ranks.commands)
            if dies == "coordinator":
                coordinator.kill()
                coordinator.start()
                written = _written(coordinator, checkpoint["id"])
        if dies == "ranks":
            with coordinator.client() as client:
                wait_for(lambda: not client.get("/health").json()["trainer"])
            with FakeRanks(coordinator.ranks_socket, tmp_path / "journal"):
                written = _written(coordinator, checkpoint["id"])
        assert written["state"] == "succeeded"
        assert written["name"] != checkpoint["name"]
        assert written["path"].endswith(written["name"])
    finally:
        coordinator.stop()
    with contextlib.closing(Store(tmp_path / "state")) as store:
        assert store.queued_checkpoints() == []


def _written(coordinator: CoordinatorProcess, checkpoint: str):
    with coordinator.client() as client:
        path = f"/checkpoint/{checkpoint}"
        wait_for(lambda: client.get(path).json()["state"] != "queued", 20, "the checkpoint")
        return client.get(path).json()


def test_a_request_whose_connection_breaks_is_still_begun(stack):
    """It was stored: a job that nobody runs, or validates, would wait for the next start."""
    client, *_ = stack
    with abandoned(client, "/train", ONE | {"samples": None}):
        pass
    with contextlib.suppress(httpx.HTTPError):
        wait_for(lambda: all(j["state"] == "succeeded" for j in client.get("/train/jobs").json()["data"]))

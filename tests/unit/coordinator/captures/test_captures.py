"""Stored completions and feedback on them, over a real coordinator process: what is kept, learned and refused."""

from __future__ import annotations

import asyncio
import collections
import sqlite3
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest

from apollo_tp.config import CaptureConfig, LearnConfig
from apollo_tp.coordinator.captures import arrival
from apollo_tp.coordinator.captures.arrival import Versions, Votes
from apollo_tp.coordinator.captures.learning import Learner
from apollo_tp.coordinator.captures.store import Captures
from apollo_tp.errors import RequestError
from apollo_tp.wire import commands
from apollo_tp.wire.capture import CAPTURES_PATH, Captured
from tests.support.chat_model import write_model
from tests.support.fakes import CoordinatorProcess, FakeRanks, wait_for

QUESTION = [{"role": "user", "content": "what"}]


def record(identity: str, **changes: Any) -> dict[str, Any]:
    """A completion as the plugin would send it."""
    choice = {
        "index": 0,
        "text": "an answer",
        "token_ids": [11, 12],
        "logprobs": [-0.5, -0.25],
        "finish_reason": "stop",
    }
    whole = {
        "id": identity, "session": "s", "model": "demo", "created": time.time(), "prompt_ids": [5, 6, 7],
        "choices": [choice], "messages": QUESTION, "temperature": 1.0,
    }  # fmt: skip
    return whole | changes


@contextmanager
def stack(
    folder: Path, service: dict[str, Any] | None = None, **learn: Any
) -> Iterator[tuple[httpx.Client, FakeRanks, CoordinatorProcess]]:
    """A coordinator that stores completions, its fake rank 0, and a client."""
    settings = {"capture": CaptureConfig(enabled=True), "learn": LearnConfig(**learn)}
    model = write_model(folder / "model")
    with (
        CoordinatorProcess(folder, model_path=model, settings=settings, **(service or {})) as coordinator,
        FakeRanks(coordinator.ranks_socket, folder / "journal") as ranks,
        coordinator.client() as client,
    ):
        wait_for(lambda: client.get("/health").json()["trainer"])
        yield client, ranks, coordinator


def add(client: httpx.Client, *identities: str, **changes: Any) -> None:
    for identity in identities:
        assert client.post(CAPTURES_PATH, json=record(identity, **changes)).status_code == 204


def give(client: httpx.Client, identity: str, **feedback: Any) -> httpx.Response:
    return client.post("/feedback", json={"completion_id": identity} | feedback)


def steps(ranks: FakeRanks) -> list[commands.Step]:
    return [command for command in ranks.commands if isinstance(command, commands.Step)]


def _updates(ranks: FakeRanks) -> list[commands.Step | commands.PreferenceStep]:
    return [each for each in ranks.commands if isinstance(each, commands.Step | commands.PreferenceStep)]


def test_nothing_is_stored_unless_it_is_switched_on(tmp_path: Path) -> None:
    with CoordinatorProcess(tmp_path) as coordinator, coordinator.client() as client:
        for answer in (client.post(CAPTURES_PATH, json=record("chatcmpl-1")), give(client, "chatcmpl-1", thumb="up")):
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "capture_off")
        assert client.get("/v1/chat/completions").json()["data"] == []
        assert not (coordinator.folder / "state" / "captures.sqlite3").exists()


def test_openais_client_lists_and_deletes_them(tmp_path: Path) -> None:
    with stack(tmp_path) as (client, _, coordinator):
        add(client, *(f"chatcmpl-{number}" for number in range(5)))
        add(client, "chatcmpl-0", model="another")  # sent twice: the first one stays
        mode = (coordinator.folder / "state" / "captures.sqlite3").stat().st_mode
        assert stat.S_IMODE(mode) == 0o600
        sdk = openai.OpenAI(base_url=f"{coordinator.url}/v1", api_key="none").chat.completions
        listed = list(sdk.list(limit=2))
        assert [each.id for each in listed] == [f"chatcmpl-{number}" for number in range(5)]
        assert listed[0].model == "demo"
        assert listed[0].choices[0].message.content == "an answer"
        assert (listed[0].usage.prompt_tokens, listed[0].usage.completion_tokens) == (3, 2)  # type: ignore[union-attr]
        assert next(iter(sdk.list(order="desc", limit=5))).id == "chatcmpl-4"
        assert list(sdk.list(model="another")) == []
        assert sdk.messages.list("chatcmpl-3").data[0].content == "what"
        assert sdk.delete("chatcmpl-3").deleted
        with pytest.raises(openai.NotFoundError):
            sdk.retrieve("chatcmpl-3")
        assert client.delete("/train/sessions/s").json()["num_completions"] == 4
        assert client.get("/v1/chat/completions").json()["data"] == []


@pytest.mark.parametrize(
    ("feedback", "status", "field"),
    [
        ({}, 400, "feedback"),
        ({"reward": 1.0, "thumb": "up"}, 400, "feedback"),
        ({"thumb": "sideways"}, 400, "thumb"),
        ({"reward": 1.0, "session": "s"}, 400, "completion_id"),
        ({"reward": 1.0, "choice": 1}, 400, "choice"),
        ({"reward": 1.0, "completion_id": "chatcmpl-9"}, 404, "completion_id"),
        ({"reward": 1.0, "completion_id": "cold"}, 400, "reward"),
        ({"corrected": "x", "completion_id": "cmpl-1"}, 400, "corrected"),
    ],
)
def test_feedback_that_cannot_be_used_is_refused(
    shared: httpx.Client, feedback: dict[str, Any], status: int, field: str
) -> None:
    answer = give(shared, **({"identity": "chatcmpl-1"} | feedback))
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, field), answer.text


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with stack(tmp_path_factory.mktemp("shared")) as (client, *_):
        add(client, "chatcmpl-1")
        add(client, "cold", temperature=0.0, not_comparable="temperature=0 samples nothing")
        add(client, "cmpl-1", messages=None)
        yield client


def test_each_answer_has_one_vote(tmp_path: Path) -> None:
    """The first one, also after the coordinator was killed at the moment at which it answered; and a client so many."""
    with stack(tmp_path, votes_per_minute=3) as (client, _, coordinator):
        add(client, "chatcmpl-1", "chatcmpl-2")
        assert give(client, "chatcmpl-1", thumb="down").status_code == 202
        coordinator.kill()
        coordinator.start()
        with coordinator.client() as again:
            assert give(again, "chatcmpl-1", thumb="up").status_code == 409
            assert again.post("/feedback", json={"session": "s", "reward": 0.5}).status_code == 202
            assert give(again, "chatcmpl-2", thumb="up").status_code == 409
            assert give(again, "chatcmpl-2", thumb="up").json()["error"]["code"] == "too_much_feedback"
    with sqlite3.connect(tmp_path / "state" / "captures.sqlite3") as db:
        assert db.execute("SELECT reward FROM feedback ORDER BY seq").fetchall() == [(0.0,), (0.5,)]


def test_a_batch_that_makes_it_worse_is_undone(tmp_path: Path) -> None:
    """By the operator's command. It is not learned again; what comes after it is."""
    judge = tmp_path / "judge"
    judge.write_text("echo 1; test $APOLLO_TP_STEP -lt 1")
    service = {"guard_command": ["/bin/sh", str(judge)]}
    with stack(tmp_path, service, every_samples=1, guard="rollback", replay_share=0.0) as (client, ranks, _):
        add(client, "chatcmpl-1", "chatcmpl-2")
        assert give(client, "chatcmpl-1", corrected="no").status_code == 202
        first = wait_for(lambda: [j for j in client.get("/train/jobs").json()["data"] if j["state"] == "failed"])
        assert [job["error"]["code"] for job in first] == ["RolledBackError"]
        assert len(ranks.restores()) == 1
        judge.write_text("echo 1")
        assert give(client, "chatcmpl-2", corrected="yes").status_code == 202
        jobs = wait_for(lambda: len(found := client.get("/train/jobs").json()["data"]) == 2 and found)
        wait_for(lambda: client.get(f"/train/jobs/{jobs[0]['id']}").json()["state"] == "succeeded")
        assert len({job["metadata"]["learned_from"] for job in (job["spec"] for job in jobs)}) == 2


def test_feedback_becomes_steps_in_the_order_of_its_arrival(tmp_path: Path) -> None:
    """Rewards with an advantage over the mean, and the log-probabilities and weights of sampling; corrections by imitation,
    with earlier ones."""
    with stack(tmp_path, every_samples=2, replay_share=1.0) as (client, ranks, _):
        add(client, *(f"chatcmpl-{number}" for number in range(8)))
        for number, thumb in ((3, "up"), (1, "down")):
            assert give(client, f"chatcmpl-{number}", thumb=thumb).status_code == 202
        wait_for(lambda: len(steps(ranks)) == 1)
        (step,) = steps(ranks)
        assert step.loss.name == "ppo"
        assert [sample.token_ids for sample in step.samples] == [[5, 6, 7, 11, 12]] * 2
        sampled = sorted((sample.sampled for sample in step.samples), key=lambda each: each.advantages)
        assert [each.advantages for each in sampled] == [[-0.5, -0.5], [0.5, 0.5]], "the mean of 0.5, 1 and 0"
        assert sampled[0].sampling_logprobs == [-0.5, -0.25]
        assert sampled[0].weight_version == 0
        assert give(client, "chatcmpl-5", corrected="no").status_code == 202
        assert give(client, "chatcmpl-6", reward=0.0).status_code == 202
        wait_for(lambda: len(steps(ranks)) == 3)
        first, second = sorted(steps(ranks)[1:], key=lambda each: each.loss.name)
        assert (first.loss.name, second.loss.name) == ("cross_entropy", "ppo")
        (imitated,) = first.samples
        assert imitated.sampled == commands.Sampled()
        assert second.samples[0].sampled.advantages == pytest.approx([-1.5 / 4] * 2), "of 0.5, 1, 0 and 0"
        for number in (0, 2):
            give(client, f"chatcmpl-{number}", corrected="no")
        wait_for(lambda: len(steps(ranks)) == 4)
        assert len(steps(ranks)[3].samples) == 3, "two new ones, and the earlier one again"
        jobs = client.get("/train/jobs").json()["data"]
        assert all(job["spec"]["metadata"]["learned_from"].startswith("learn-") for job in jobs)


@pytest.mark.parametrize(
    ("corrections", "kinds"), [("dpo", ["pairs"]), ("both", ["samples", "pairs"])], ids=["pair", "both"]
)
def test_a_correction_is_preferred_to_what_was_served(tmp_path: Path, corrections: str, kinds: list[str]) -> None:
    """As pairs of a DPO job of one step; not where it is what was served. Earlier ones are learned again."""
    with stack(tmp_path, every_samples=2, replay_share=0.5, corrections=corrections, dpo_beta=0.3) as (
        client,
        ranks,
        _,
    ):
        add(client, *(f"chatcmpl-{number}" for number in range(4)))
        for number, words in enumerate(("no", "an answer", "yes", "perhaps")):
            assert give(client, f"chatcmpl-{number}", corrected=words).status_code == 202
            wait_for(lambda number=number: len(_updates(ranks)) == (number + 1) // 2 * len(kinds))
        made = [{commands.Step: "samples", commands.PreferenceStep: "pairs"}[type(step)] for step in _updates(ranks)]
        assert made == kinds * 2
        first, second = (step for step in _updates(ranks) if isinstance(step, commands.PreferenceStep))
        assert (first.beta, len(first.pairs), len(second.pairs)) in {(0.3, 1, 2), (0.3, 1, 3)}, (
            "the earlier one may be equal"
        )
        chosen, rejected = first.pairs[0].preferred, first.pairs[0].rejected
        sdk = {
            "samples": [
                {"messages": [*QUESTION, {"role": "assistant", "content": words}]} for words in ("no", "an answer")
            ]
        }
        shown = client.post("/train?dry_run=true", json=sdk).json()["samples"]
        assert [each["token_ids"] for each in shown] == [chosen.token_ids, rejected.token_ids]
        assert [each["weights"] for each in shown] == [chosen.weights, rejected.weights]
        metadata = [job["spec"]["metadata"]["learned_from"] for job in client.get("/train/jobs").json()["data"]]
        assert sum(name.endswith("/preferences") for name in metadata) == 2


def test_feedback_that_waits_for_long_is_learned_too(tmp_path: Path) -> None:
    with stack(tmp_path, every_seconds=0.5) as (client, ranks, _):
        add(client, "chatcmpl-1")
        give(client, "chatcmpl-1", reward=3.0)
        wait_for(lambda: len(steps(ranks)) == 1)


def test_a_kill_loses_and_repeats_nothing(tmp_path: Path) -> None:
    """Whenever it comes: what was answered 202 is learned once."""
    with stack(tmp_path, every_samples=2, votes_per_minute=1000) as (client, ranks, coordinator):
        names = [f"chatcmpl-{number}" for number in range(12)]
        add(client, *names)
        for number, name in enumerate(names):
            with coordinator.client() as now:
                assert give(now, name, reward=float(number)).status_code == 202
            if number % 4 == 1:
                time.sleep(0.35 * number / 4)  # before, while and after its job is stored
                coordinator.kill()
                coordinator.start()
        with coordinator.client() as now:
            wait_for(lambda: sum(job["state"] == "succeeded" for job in _jobs(now)) == 6, 60)
            time.sleep(1.5)
            assert len(_jobs(now)) == 6
    rewards = collections.Counter(sample.sampled.reward for step in _applied(ranks) for sample in step.samples)
    assert rewards == {float(number): 1 for number in range(12)}


def test_a_batch_that_was_begun_is_learned_by_the_next_process(tmp_path: Path) -> None:
    """A kill may come after it is marked, and before its jobs are stored."""

    async def run() -> list[str]:
        captures = Captures(tmp_path, CaptureConfig(enabled=True))
        await captures.add(msgspec.json.decode(msgspec.json.encode(record("chatcmpl-1")), type=Captured), 3)
        stored = await captures.find("chatcmpl-1")
        assert stored is not None
        await captures.vote(stored.seq, 0, 1.0, None)
        submitted: list[str] = []

        async def never(key: str, body: bytes, method: str) -> str:
            submitted.append(f"lost {key}")
            return await asyncio.Event().wait() or ""

        async def store(key: str, body: bytes, method: str) -> str:
            submitted.append(key)
            return "job-1"

        for submit in (never, store):
            learner = asyncio.create_task(Learner(captures, LearnConfig(every_samples=1), submit).run())
            await asyncio.sleep(0.5)
            learner.cancel()
            await asyncio.wait([learner])
        captures.close()
        return submitted

    lost, kept = asyncio.run(run())
    assert lost == f"lost {kept}"


def _jobs(client: httpx.Client) -> list[dict[str, Any]]:
    return client.get("/train/jobs?limit=100").json()["data"]


def _applied(ranks: FakeRanks) -> list[commands.Step]:
    """The steps that changed weights, each once."""
    return list({(step.job_id, step.job_step): step for step in steps(ranks)}.values())


def test_the_oldest_are_removed_first(tmp_path: Path) -> None:
    """By age, by number and by size."""
    settings = {"capture": CaptureConfig(enabled=True, max_age_days=1.0, max_count=3, max_bytes=1000)}
    with CoordinatorProcess(tmp_path, settings=settings) as coordinator, coordinator.client() as client:
        add(client, "old", created=time.time() - 90_000)
        add(client, *"abcd")
        assert [each["id"] for each in client.get("/v1/chat/completions").json()["data"]] == list("bcd")
        add(client, "long", messages=[{"role": "user", "content": "x" * 700}])
        assert [each["id"] for each in client.get("/v1/chat/completions").json()["data"]] == ["long"]


def test_only_the_plugin_needs_no_token(tmp_path: Path) -> None:
    settings = {"capture": CaptureConfig(enabled=True)}
    with CoordinatorProcess(tmp_path, settings=settings, env={"APOLLO_TP_TOKEN": "t" * 20}) as coordinator:
        assert httpx.post(f"{coordinator.url}{CAPTURES_PATH}", json=record("chatcmpl-1")).status_code == 401
        assert httpx.get(f"{coordinator.url}/v1/chat/completions").status_code == 401


def test_the_version_is_that_of_the_time_of_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(arrival.time, "time", lambda: now[0])
    versions = Versions()
    assert versions.at(50.0, 7) == 7
    for version in (8, 9):
        versions.add(version)
        now[0] += 10
    assert [versions.at(when, 9) for when in (99.0, 100.0, 109.0, 110.0, 500.0)] == [7, 8, 8, 9, 9]


def test_votes_are_counted_by_client_and_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(arrival.time, "monotonic", lambda: now[0])
    votes = Votes(2)
    for client in ("a", "a", "b"):
        votes.count(client)
    with pytest.raises(RequestError, match="at most 2"):
        votes.count("a")
    now[0] = 61.0
    votes.count("a")
    assert list(votes._times) == ["a"]

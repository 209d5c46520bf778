"""Reinforcement jobs through the real `openai` client and a real coordinator, with a fake server and fake ranks: what is
asked, what is trained, and what a kill leaves."""

from __future__ import annotations

import csv
import io
import json

import openai
import pytest

from tests.support.completions import alternating, fake_server
from tests.support.fakes import FakeRanks, wait_for
from tests.support.reinforcement import GRADER, LINES, Stack

JUDGE = {"type": "score_model", "name": "s", "model": "m", "input": [{"role": "user", "content": "?"}]}


@pytest.fixture(scope="module")
def _shared(tmp_path_factory):
    with fake_server() as server:
        stack = Stack(tmp_path_factory.mktemp("s"), server)
        with stack.running() as ranks:
            yield stack, ranks


@pytest.fixture
def shared(_shared):
    """A stack that nobody kills, with its ranks."""
    server = _shared[0].server
    server.asked.clear()
    server.text, server.status = alternating, 200
    server.free.set()
    return _shared


@pytest.fixture
def server():
    with fake_server() as server:
        yield server


def _steps(ranks, job):
    return [command for command in ranks.commands if getattr(command, "job_id", "") == job.id]


def test_completions_are_sampled_graded_and_trained(shared):
    stack, ranks = shared
    job = stack.create(compute_multiplier=1.5)
    assert stack.ended(job).status == "succeeded"
    steps = _steps(ranks, job)
    assert [command.job_step for command in steps] == [1, 2, 3, 4]
    assert {command.loss.name for command in steps} == {"ppo"}
    versions = [{sample.sampled.weight_version for sample in command.samples} for command in steps]
    assert versions == [{version} for version in range(min(versions[0]), min(versions[0]) + 4)]
    for command in steps:
        assert len(command.samples) == 2 * 6
        advantages = [sample.sampled.advantages[0] for sample in command.samples]
        assert sum(advantages) == pytest.approx(0, abs=1e-6)
        assert advantages[1] == pytest.approx(0.9128, abs=1e-3)  # half of six are right: 0.5 / 0.5477
        assert command.samples[0].sampled.sampling_logprobs == [-0.5, -1.0]
    assert [asked["n"] for asked in stack.server.asked] == [6] * 8
    assert {(asked["temperature"], asked["top_p"], asked["model"]) for asked in stack.server.asked} == {
        (1.0, 1.0, "fake")
    }
    salts = {asked["cache_salt"] for asked in stack.server.asked}
    assert len(salts) == 4, "completions of one step may use cached prompts of another's weights"
    assert not list((stack.coordinator.folder / "state" / "samples").iterdir())


def test_result_files_have_the_figures_of_the_loss(shared):
    """Behind OpenAI's columns; those that the trainer did not report are empty."""
    stack, _ = shared
    job = stack.create()
    assert stack.ended(job).status == "succeeded"
    content = stack.client.files.content(stack.client.fine_tuning.jobs.retrieve(job.id).result_files[0]).read().decode()
    assert content.splitlines()[0] == (
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy,"
        "reward_mean,advantage_mean,mismatch_kl,clip_fraction,entropy,valid_reward_mean"
    )
    rows = list(csv.DictReader(io.StringIO(content)))
    events = {e.data["step"]: e.data for e in stack.events(job) if e.data and "mismatch_kl" in e.data}
    assert [int(row["step"]) for row in rows] == sorted(events) == [1, 2, 3, 4]
    for row in rows:
        data = events[int(row["step"])]
        assert (float(row["reward_mean"]), float(row["mismatch_kl"])) == (0.5, data["mismatch_kl"])
        assert row["clip_fraction"] == ""


def test_rewards_and_completions_are_events(shared):
    stack, _ = shared
    job = stack.create()
    assert stack.ended(job).status == "succeeded"
    sampled = [event.data for event in stack.events(job) if event.data and "samples" in event.data]
    assert [(data["step"], data["reward_mean"]) for data in sampled] == [(step, 0.5) for step in (1, 2, 3, 4)]
    shown = [(each["completion"], each["reward"]) for each in sampled[0]["samples"]]
    assert set(shown) <= {("yes", 1.0), ("no", 0.0)}
    assert {each["prompt"] for data in sampled for each in data["samples"]} <= {f"question {i}" for i in range(4)}
    assert all(each["prompt"] for data in sampled for each in data["samples"])


def test_validation_rewards_come_at_their_steps(shared):
    stack, _ = shared
    job = stack.create(validation=LINES[:3], eval_interval=2, eval_samples=2)
    assert stack.ended(job).status == "succeeded"
    data = [event.data for event in stack.events(job) if event.data and "valid_reward_mean" in event.data]
    assert [(each["step"], each["valid_reward_mean"], each["completions"]) for each in data] == [
        (2, 0.5, 6),
        (4, 0.5, 6),
    ]


def test_a_completion_that_cannot_be_graded_is_counted_and_left_out(shared):
    """Silence would be a reward of 0: the model would learn to avoid what the grader does not understand."""
    stack, ranks = shared
    stack.server.text = lambda prompt, index: '{"answer": "yes"}' if index else "no JSON"
    job = stack.create(grader=GRADER | {"input": "{{sample.output_json.answer}}"})
    assert stack.ended(job).status == "succeeded"
    assert {len(command.samples) for command in _steps(ranks, job)} == {2 * 3}
    data = next(event.data for event in stack.events(job) if event.data and "samples" in event.data)
    assert data["ungraded"] == 2
    ((reason, count),) = data["grader_errors"].items()
    assert count == 2
    assert "sample.output_json.answer" in reason


def test_a_grader_that_never_works_fails_the_job(shared):
    stack, ranks = shared
    stack.server.text = lambda prompt, index: "no JSON"
    job = stack.ended(stack.create(grader=GRADER | {"input": "{{sample.output_json.answer}}"}))
    assert job.status == "failed"
    assert "no graded completion of 8" in job.error.message
    assert not _steps(ranks, job)


def test_a_server_that_refuses_fails_the_job_with_its_words(shared):
    stack, _ = shared
    stack.server.status = 404
    job = stack.ended(stack.create())
    assert job.status == "failed"
    assert "got status 404" in job.error.message


def test_a_job_is_cancelled_while_it_samples(shared):
    """And scores of clients have their turn meanwhile: the ranks have nothing else to do."""
    stack, ranks = shared
    stack.server.free.clear()
    job = stack.create()
    wait_for(lambda: stack.server.asked)
    with stack.coordinator.client() as http:
        for _ in range(3):
            http.post("/train/score", json={"samples": [{"text": "a text"}]}, timeout=10).raise_for_status()
    stack.client.fine_tuning.jobs.cancel(job.id)
    assert stack.ended(job).status == "cancelled"
    assert not _steps(ranks, job)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"grader": {"type": "python", "name": "p", "source": "x"}}, r"rl\.python_graders"),
        ({"grader": JUDGE}, r"rl\.score_model_url"),
        ({"grader": GRADER | {"operation": "regex"}}, "operation"),
        ({"hyperparameters": {"reasoning_effort": "high"}}, "reasoning_effort"),
    ],
)
def test_what_would_be_ignored_is_refused(shared, change, message):
    stack, _ = shared
    file = stack.client.files.create(file=("a.jsonl", json.dumps(LINES[0]).encode()), purpose="fine-tune")
    method = {"type": "reinforcement", "reinforcement": {"grader": GRADER} | change}
    with pytest.raises(openai.BadRequestError, match=message):
        stack.client.fine_tuning.jobs.create(model="fake", training_file=file.id, method=method)


def test_lines_without_what_the_grader_names_are_refused(shared):
    stack, _ = shared
    answered = {"messages": [*LINES[0]["messages"], {"role": "assistant", "content": "yes"}], "answer": "yes"}
    job = stack.ended(stack.create(lines=[LINES[0], {"messages": LINES[1]["messages"]}, answered]))
    assert job.status == "failed"
    assert "line 2: item.answer" in job.error.message
    assert "line 3: messages[1].role" in job.error.message


def test_graders_are_tried_through_their_routes(shared):
    stack, _ = shared
    graders = stack.client.fine_tuning.alpha.graders
    assert graders.validate(grader=GRADER).grader.operation == "eq"
    result = graders.run(grader=GRADER, item={"answer": "42"}, model_sample="42")
    assert (result.reward, result.metadata.scores, result.metadata.errors.other_error) == (1.0, {"right": 1.0}, False)
    result = graders.run(grader=GRADER, item={}, model_sample="42")
    assert (result.reward, result.metadata.errors.invalid_variable_error) == (0.0, True)
    with pytest.raises(openai.BadRequestError, match="operation"):
        graders.validate(grader=GRADER | {"operation": "regex"})


def test_sampling_has_a_deadline(tmp_path, server):
    server.free.clear()
    stack = Stack(tmp_path, server, sampling_seconds=0.5)
    with stack.running():
        job = stack.ended(stack.create())
        assert job.status == "failed"
        assert "rl.sampling_seconds" in job.error.message


def test_a_killed_coordinator_sends_the_stored_completions_again(tmp_path, server):
    """The step had been sent, and was not completed: the same samples are trained, and nobody is asked for others."""
    stack = Stack(tmp_path, server)
    with stack.running(step_seconds=3600.0) as first:
        job = stack.create()
        wait_for(lambda: _steps(first, job))
        stack.coordinator.kill()
    asked = len(server.asked)
    server.text = lambda prompt, index: "maybe"
    with stack.running() as second:
        wait_for(lambda: _steps(second, job))
        assert _steps(second, job)[0].samples == _steps(first, job)[0].samples
        assert len(server.asked) - asked <= 2, "the first step was sampled again"
        assert stack.ended(job).status == "succeeded"
        assert [step for _, step in second.applied()] == [1, 2, 3, 4]


def test_a_completed_step_whose_reply_was_lost_is_not_run_again(tmp_path, server):
    """Rank 0 wrote step 1 while the coordinator was dead: its stored completions are not of the next step."""
    stack = Stack(tmp_path, server)
    with FakeRanks(stack.coordinator.ranks_socket, stack.journal, step_seconds=0.5) as ranks:
        with stack.coordinator:
            stack.connected()
            job = stack.create()
            wait_for(lambda: _steps(ranks, job))
            stack.coordinator.kill()
            wait_for(lambda: ranks.applied())
        ranks.step_seconds = 0.0
        with stack.coordinator:
            assert stack.ended(job).status == "succeeded"
        assert [step for _, step in ranks.applied()] == [1, 2, 3, 4]
        assert [c.samples[0].sampled.weight_version for c in _steps(ranks, job)] == [0, 1, 2, 3]


def test_a_killed_trainer_gets_the_step_once(tmp_path, server):
    stack = Stack(tmp_path, server)
    with stack.coordinator:
        with stack.ranks(step_seconds=0.2) as first:
            job = stack.create()
            wait_for(lambda: first.applied())
        with stack.ranks() as second:
            assert stack.ended(job).status == "succeeded"
            assert [step for _, step in second.applied()] == [1, 2, 3, 4]


def test_a_guard_compares_the_mean_reward(tmp_path):
    """Of the prompts of the validation file, of which more is better: it falls in the middle of the job, which pauses."""
    with fake_server() as server:
        server.text = lambda prompt, index: "yes"
        stack = Stack(tmp_path, server)
        with stack.running(step_seconds=0.1) as ranks, stack.coordinator.client() as http:
            guard = {"every": 2, "max_worse": 0.25, "action": "pause"}
            job = stack.create(validation=LINES[:2], n_epochs=10, guard=guard)
            wait_for(lambda: len(ranks.applied()) >= 3)
            server.text = lambda prompt, index: "no"
            wait_for(lambda: http.get(f"/train/jobs/{job.id}").json()["state"] == "paused")
            shown = http.get(f"/train/jobs/{job.id}").json()
            assert (shown["guard"]["baseline"], shown["guard"]["value"]) == (1.0, 0.0)
            assert 4 <= shown["step"] < 20
            assert http.post(f"/train/jobs/{job.id}/cancel").status_code == 200

"""Forward-only work around a job: the reference of preference pairs, and the validation loss."""

import json
import math

import pytest

from apollo_tp.wire import commands
from tests.support.fakes import wait_for
from tests.support.jobs import CHAT, ends, tune

PAIR = (
    b'{"input": {"messages": [{"role": "user", "content": "Hello"}]}, "preferred_output": [{"role": "assistant", "content":'
    b' "fine"}], "non_preferred_output": [{"role": "assistant", "content": "no"}]}\n'
)


@pytest.mark.parametrize("logprob", [math.nan, -math.inf])
def test_a_validation_loss_that_is_not_finite_is_none(stack, logprob):
    """JSON has no NaN: one that was stored could not be read again, by status, by the jobs' routes, or at a restart."""
    client, ranks, coordinator = stack
    ranks.logprob = logprob
    job = tune(client, training_file=CHAT, validation_file=CHAT)
    assert ends(client, job)["state"] == "succeeded"
    coordinator.kill()
    coordinator.start()
    with coordinator.client() as again:
        assert again.get(f"/train/jobs/{job}").json()["valid_loss"] is None
        for path in ("/train/jobs", "/train/status", "/checkpoints", f"/v1/fine_tuning/jobs/{job}/checkpoints"):
            assert again.get(path).status_code == 200, path


@pytest.mark.parametrize(("action", "state"), [("cancel", "cancelled"), ("pause", "paused")])
@pytest.mark.parametrize("method", ["dpo", "supervised"])
def test_what_is_asked_while_samples_are_scored_holds(stack, action, state, method):
    """A large file is scored for long: for DPO before the first step, and for the validation loss. What was asked takes
    effect after the batch that is being scored; a resumed job scores all of them."""
    client, ranks, _ = stack
    num_batches, files = 4, {"training_file": CHAT, "validation_file": CHAT * 32 * 4}
    if method == "dpo":
        files = {"training_file": PAIR * 16 * 4}
    ranks.score_seconds, before = 0.2, len(ranks.applied())
    ranks.scored.clear()
    job = tune(client, method={"type": method, method: {"hyperparameters": {"n_epochs": 1}}}, **files)
    wait_for(lambda: ranks.scored)
    assert client.post(f"/train/jobs/{job}/{action}").status_code == 200
    shown = ends(client, job)
    assert (shown["state"], shown["valid_loss"]) == (state, None)
    assert len(ranks.scored) < num_batches
    assert (len(ranks.applied()) == before) == (method == "dpo")
    if action == "pause":
        ranks.scored.clear()
        ranks.score_seconds = 0.0
        assert client.post(f"/train/jobs/{job}/resume").status_code == 200
        assert ends(client, job)["state"] == "succeeded"
        assert len(ranks.scored) == num_batches


def test_the_validation_loss_of_pairs_is_that_of_their_margin(stack):
    """-log sigmoid(beta * margin) over the weights from before the first step, for pairs of the validation file."""
    client, ranks, _ = stack
    ranks.learned = 0.1

    def pair(number, good, bad):
        def answer(text):
            return [{"role": "assistant", "content": text}]

        prompt = {"messages": [{"role": "user", "content": f"Hello {number}"}]}
        return {"input": prompt, "preferred_output": answer(good), "non_preferred_output": answer(bad)}

    def lines(*pairs):
        return "\n".join(json.dumps(pair(*each)) for each in pairs).encode()

    files = {
        "training_file": lines((0, "I am fine", "x"), (1, "yes", "a b c d")),
        "validation_file": lines((2, "one two three four", "I am")),
    }
    ids = {
        name: client.post("/v1/files", files={"file": ("a.jsonl", content)}, data={"purpose": "fine-tune"}).json()["id"]
        for name, content in files.items()
    }
    method = {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 1, "batch_size": 2, "beta": 0.5,
                                                         "learning_rate_multiplier": 0.25}}}  # fmt: skip
    job = client.post("/v1/fine_tuning/jobs", json={"model": "fake", "method": method} | ids).json()["id"]
    found = ends(client, job)
    assert found["state"] == "succeeded", found["error"]
    (step,) = [command for command in ranks.commands if isinstance(command, commands.PreferenceStep)]
    assert step.learning_rate_scale == 0.25
    scored = [command for command in ranks.commands if isinstance(command, commands.Score)]
    preferred, rejected = scored[-1].samples  # of the validation pair, after the step

    def reference(sample):
        return -0.5 * sum(sample.weights) * (1 + 0.01 * sample.token_ids[-1])

    # a step makes each log-probability 1.1 times what it was
    margin = 0.1 * (reference(preferred) - reference(rejected))
    assert abs(margin) > 0.05
    assert found["valid_loss"] == pytest.approx(math.log1p(math.exp(-0.5 * margin)))
    assert found["valid_token_accuracy"] == float(margin > 0)

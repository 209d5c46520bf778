"""The real ``openai`` package against real vLLM at TP = 2: upload, job, events, and the served model answers differently."""

import json
import time

import openai
import pytest

pytestmark = pytest.mark.vllm

QUESTION = [{"role": "user", "content": "def answer("}]
ANSWER = "x = 42"
LINES = [{"messages": [*QUESTION, {"role": "assistant", "content": ANSWER}]} for _ in range(16)]


@pytest.fixture(scope="module")
def client(server, trainer):
    """Files and jobs on vLLM's own port: one base_url for training and for inference."""
    deadline = time.monotonic() + 60
    while not trainer.get("/health")["trainer"]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused")


def answer_logprob(client):
    """Mean log-probability (nats per token) that the server gives its own greedy answer, and that answer."""
    answer = client.chat.completions.create(
        model="demo",
        messages=QUESTION,
        max_tokens=8,
        temperature=0,
        logprobs=True,
        extra_body={"cache_salt": str(time.time())},
    ).choices[0]
    return answer.message.content, [token.logprob for token in answer.logprobs.content]


def wait_for_end(client, job, seconds=240):
    deadline = time.monotonic() + seconds
    while (job := client.fine_tuning.jobs.retrieve(job.id)).finished_at is None:
        assert time.monotonic() < deadline, job
        time.sleep(0.3)
    return job


def test_the_ten_line_program(client, trainer):
    """Upload a chat file, fine-tune, follow the events, and ask the same server at once: it gives the trained answer."""
    before, _ = answer_logprob(client)
    assert before != ANSWER
    file = client.files.create(file=("train.jsonl", "\n".join(map(json.dumps, LINES)).encode()), purpose="fine-tune")
    hyperparameters = {"n_epochs": 40, "batch_size": 16, "learning_rate_multiplier": 1.5}
    job = client.fine_tuning.jobs.create(
        model="demo",
        training_file=file.id,
        validation_file=file.id,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
    )
    job = wait_for_end(client, job)
    assert job.status == "succeeded", job.error
    events = list(client.fine_tuning.jobs.list_events(job.id))
    losses = [
        event.data["train_loss"] for event in reversed(events) if event.type == "metrics" and "train_loss" in event.data
    ]
    assert len(losses) == 40
    assert losses[-1] < losses[0] - 2
    valid = [
        event.data["valid_loss"] for event in reversed(events) if event.type == "metrics" and "valid_loss" in event.data
    ]
    # the same samples: the validation loss behind the last step is below the loss before it
    assert valid[-1] < losses[-1] + 0.05
    after, logprobs = answer_logprob(client)
    assert after == ANSWER
    # what vLLM serves is what the trainer's forward says: both score the trained answer under the same weights
    assert sum(logprobs) / len(logprobs) == pytest.approx(-valid[-1], abs=0.1)
    assert job.fine_tuned_model == "demo"
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert checkpoint.step_number == 40
    assert (trainer.state_dir / "checkpoints" / checkpoint.fine_tuned_model_checkpoint).exists()


def test_dpo_moves_preferences_apart(client):
    """A DPO job on the server's port: its loss starts at log 2 and falls, and the preferred answer gains."""
    pair = {
        "input": {"messages": QUESTION},
        "preferred_output": [{"role": "assistant", "content": "yes"}],
        "non_preferred_output": [{"role": "assistant", "content": ANSWER}],
    }
    file = client.files.create(file=("dpo.jsonl", "\n".join([json.dumps(pair)] * 8).encode()), purpose="fine-tune")
    hyperparameters = {"n_epochs": 8, "batch_size": 8, "beta": 0.1, "learning_rate_multiplier": 2}
    job = client.fine_tuning.jobs.create(
        model="demo", training_file=file.id, method={"type": "dpo", "dpo": {"hyperparameters": hyperparameters}}
    )
    job = wait_for_end(client, job)
    assert job.status == "succeeded", job.error
    events = [event for event in client.fine_tuning.jobs.list_events(job.id) if event.type == "metrics"]
    losses = [event.data["train_loss"] for event in reversed(events)]
    assert losses[0] == pytest.approx(0.6931, abs=0.02)  # policy and reference are the same weights, scored in bf16
    assert losses[-1] < losses[0] - 0.1


def test_a_bad_file_trains_nothing(client, server):
    """A data error is found before training, through vLLM's port; the served weights do not move."""
    tokens = list(range(10, 40))
    before = server.logprobs(tokens)
    file = client.files.create(file=("bad.jsonl", b'{"messages": []}\n'), purpose="fine-tune")
    job = wait_for_end(client, client.fine_tuning.jobs.create(model="demo", training_file=file.id))
    assert job.status == "failed"
    assert "line 1" in job.error.message
    assert server.logprobs(tokens) == before

"""A real server whose clients let completions be stored: what is recorded, and what is learned from feedback on it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.support.demo_model import make_model, standard_library_text
from tests.support.processes import ManagedProcess, coordinator_url, free_port, start_server, start_trainer
from tests.support.servers import START_SECONDS

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

SESSION = {"x-apollo-session": "someone"}
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "import os"}], "max_tokens": 8, "seed": 1}


class Stack:
    """A server at TP = 1 and its trainer, which stores completions."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runtime_dir = folder, folder / "rt"
        self.runtime_dir.mkdir(mode=0o700)
        make_model(folder / "model", standard_library_text(400, 30), num_layers=1)
        self.url = f"http://127.0.0.1:{free_port()}"
        self.server = start_server(
            folder / "model", int(self.url.rpartition(":")[2]), self.runtime_dir, folder / "server.log", tensor_parallel=1,
            extra=["--logprobs-mode", "processed_logprobs"], forking=True,
        )  # fmt: skip
        self.server.wait_for(f"{self.url}/health", START_SECONDS)
        self.trainer: ManagedProcess | None = None

    def train(self, *overrides: str) -> None:
        overrides += ("optim.lr=1e-3", "train.max_sequence_tokens=256", "checkpoint.after_idle_seconds=null")
        log = self.folder / f"trainer-{time.time_ns()}.log"
        self.trainer = start_trainer(
            self.runtime_dir, self.folder, log, num_ranks=1, overrides=overrides, forking=True
        )  # fmt: skip
        coordinator_url(self.runtime_dir, self.trainer, seconds=START_SECONDS)

    def ask(self, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> dict[str, Any]:
        answer = httpx.post(f"{self.url}{path}", json=body, headers=headers, timeout=120)
        return dict(answer.raise_for_status().json())

    def stored(self) -> list[dict[str, Any]]:
        return list(
            httpx.get(f"{self.url}/v1/chat/completions?limit=100", timeout=60).raise_for_status().json()["data"]
        )

    def status(self) -> dict[str, Any]:
        return dict(httpx.get(f"{self.url}/train/status", timeout=60).json())


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    started = Stack(tmp_path)
    yield started
    for process in (started.trainer, started.server):
        if process is not None:
            process.stop()


def _until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(0.1)


def _without_names(answer: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in answer.items() if key not in ("id", "created")}


def _streamed(stack: Stack, headers: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """The id of a streamed chat completion, and what its parts add up to, with the fields that they have: vLLM sends tokens
    together when its client or the machine is slow."""
    body = CHAT | {"stream": True}
    with httpx.stream("POST", f"{stack.url}/v1/chat/completions", json=body, headers=headers, timeout=120) as answer:
        parts = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    choices = [choice for part in parts for choice in part["choices"]]
    return parts[0]["id"], {
        "content": "".join(choice["delta"].get("content") or "" for choice in choices),
        "reasons": [choice["finish_reason"] for choice in choices if choice["finish_reason"]],
        "fields": {field for part in parts for field in part} | {field for choice in choices for field in choice},
    }


def test_what_is_served_is_learned_from(stack: Stack) -> None:
    """Only what its client lets be stored, and as it is: the client sees no difference. Feedback on it changes the weights;
    when the trainer ends, nothing is recorded any more."""
    stack.train(
        "capture.enabled=true", "learn.every_samples=3", "learn.corrections=both", "optim.max_relative_update=1"
    )
    plain = stack.ask("/v1/chat/completions", CHAT)
    assert "logprobs" not in plain["choices"][0] or plain["choices"][0]["logprobs"] is None
    kept = stack.ask("/v1/chat/completions", CHAT | {"store": True, "metadata": {"topic": "code"}})
    assert _without_names(kept) == _without_names(plain)
    quiet, parts = _streamed(stack, {})
    streamed, same_parts = _streamed(stack, SESSION)
    assert parts == same_parts
    shown = stack.ask("/v1/chat/completions", CHAT | {"store": True, "logprobs": True, "n": 2})
    text = stack.ask("/v1/completions", {"model": "demo", "prompt": "import", "max_tokens": 4, "store": True})
    _until(lambda: len(stack.stored()) == 4)
    stored = {each["id"]: each for each in stack.stored()}
    assert set(stored) == {kept["id"], streamed, shown["id"], text["id"]}
    assert not {plain["id"], quiet} & set(stored)
    content = kept["choices"][0]["message"]["content"]
    assert stored[kept["id"]]["choices"][0]["message"]["content"] == content
    assert stored[kept["id"]]["metadata"] == {"topic": "code"}
    assert stored[kept["id"]]["usage"]["prompt_tokens"] == kept["usage"]["prompt_tokens"]
    assert stored[streamed]["session"] == "someone"
    assert stored[streamed]["choices"][0]["message"]["content"] == content, "the same seed"
    sdk = openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none")
    assert [each.id for each in sdk.chat.completions.list(model="demo")] == list(stored)

    before = stack.status()["trainer"]["weight_version"]
    for identity, feedback in (
        (kept["id"], {"thumb": "up"}),
        (shown["id"], {"reward": -1.0, "choice": 1}),
        (streamed, {"corrected": "import sys"}),
    ):
        body = {"completion_id": identity} | feedback
        assert httpx.post(f"{stack.url}/feedback", json=body, timeout=60).status_code == 202
    _until(lambda: stack.status()["trainer"]["weight_version"] == before + 3)
    jobs = httpx.get(f"{stack.url}/train/jobs", timeout=60).json()["data"]
    kinds = {job["spec"]["metadata"]["learned_from"].rpartition("/")[2]: job for job in jobs}
    assert set(kinds) == {"rewards", "corrections", "preferences"}
    assert kinds["preferences"]["spec"]["method"] == "dpo"
    rewarded = kinds["rewards"]
    assert rewarded["spec"]["loss"]["name"] == "ppo"
    _until(lambda: httpx.get(f"{stack.url}/train/jobs/{rewarded['id']}", timeout=60).json()["state"] == "succeeded")
    figures = httpx.get(f"{stack.url}/train/jobs/{rewarded['id']}", timeout=60).json()["metrics"]
    assert figures["mismatch_kl"] < 0.01, "the trainer has the log-probabilities with which the tokens were sampled"
    later = stack.ask("/v1/chat/completions", CHAT | {"store": True})
    _until(lambda: len(stack.stored()) == 5)
    assert stack.stored()[-1]["id"] == later["id"]
    assert stack.stored()[-1]["weight_version"] == before + 3
    assert stack.stored()[0]["weight_version"] == before

    assert stack.trainer is not None
    stack.trainer.stop()
    assert not (stack.runtime_dir / "demo" / "capture.json").exists()
    stack.ask("/v1/chat/completions", CHAT | {"store": True})
    stack.train()
    stack.ask("/v1/chat/completions", CHAT | {"store": True})
    assert stack.stored() == [], "capture.enabled=false"

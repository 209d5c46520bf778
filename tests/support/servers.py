"""Real vLLM servers and real trainers, as the suites for CPU and for GPUs start them."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import httpx

from apollo_tp.shards.instance import read_instance
from apollo_tp.shards.manifest import Manifest
from tests.support.processes import ManagedProcess

START_SECONDS = 400.0
SERVER_ARGS = shlex.split(os.environ.get("APOLLO_TP_TEST_SERVER_ARGS", ""))
"""Options that this machine's vLLM needs, for example a --compilation-config."""


@dataclass
class Server:
    """A running vLLM: its address, the model it was started from, and where its manifests are."""

    url: str
    model: Path
    runtime_dir: Path
    instance: str
    process: ManagedProcess
    num_verified: tuple[int, ...] = ()
    """Per rank, checkpoint tensors that equalled the served memory bit for bit before anybody trained."""

    @property
    def manifests(self) -> list[Manifest]:
        return read_instance(self.runtime_dir / self.instance)

    def logprobs(self, token_ids: list[int]) -> list[float]:
        """vLLM's log-probability (nats) of each token but the first."""
        body = {"model": "demo", "prompt": token_ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        # A salt of its own keeps the request away from prefix-cache entries of other weights.
        body["cache_salt"] = json.dumps(id(body))
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=120).raise_for_status().json()
        entries = answer["choices"][0]["prompt_logprobs"][1:]
        return [entry[str(token)]["logprob"] for entry, token in zip(entries, token_ids[1:], strict=True)]

    def sample(self, token_ids: list[int], count: int) -> tuple[list[int], list[float]]:
        """The ``count`` most likely next tokens, one after the other, and their log-probabilities."""
        body = {"model": "demo", "prompt": token_ids, "max_tokens": count, "temperature": 0, "logprobs": 0}
        body |= {"return_token_ids": True, "ignore_eos": True, "cache_salt": json.dumps(id(body))}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=120).raise_for_status().json()
        (choice,) = answer["choices"]
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]

    def mean_logprob(self, token_ids: list[int]) -> float:
        values = self.logprobs(token_ids)
        return sum(values) / len(values)


@dataclass
class Trainer:
    """A running trainer: its coordinator's address and its folders."""

    url: str
    state_dir: Path
    process: ManagedProcess

    def post(self, path: str, body: dict, timeout: float = 240) -> dict:
        response = httpx.post(f"{self.url}{path}", json=body, timeout=timeout)
        assert response.status_code < 300, f"{path}: {response.status_code} {response.text}"
        return response.json()

    def get(self, path: str) -> dict:
        return httpx.get(f"{self.url}{path}", timeout=60).raise_for_status().json()

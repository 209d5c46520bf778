"""Does the trainer compute the function that is served? Log-probabilities of the same tokens by both, over the same weights.

They differ by rounding (bf16, other kernels). More means that the gradients are of another function than is served.
"""

from __future__ import annotations

import math
import os
import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

SERVER_KEY_VARIABLE = "VLLM_API_KEY"
MOST_TOKENS = 1024
"""``POST /train/score`` takes as many samples, and each token but the first is one."""


@dataclass(frozen=True)
class Gap:
    """Absolute differences of log-probabilities, in nats; infinite if the trainer has a number that is not finite."""

    tokens: int
    mean_gap_nats: float
    largest_gap_nats: float


def random_tokens(count: int, vocab_size: int) -> list[int]:
    """Always the same ``count`` token ids, of the half of the vocabulary that mostly has no special tokens."""
    return random.Random(0).choices(range(vocab_size // 2), k=count)


def score_request(tokens: Sequence[int]) -> dict[str, Any]:
    """Body of ``POST /train/score``: each token but the first, given those before it."""
    return {"samples": [{"context_ids": tokens[:i], "continuation_ids": [tokens[i]]} for i in range(1, len(tokens))]}


def served_logprobs(answer: httpx.Response, tokens: Sequence[int]) -> list[float]:
    """The server's log-probability (nats) of each token but the first, from its answer to ``ask_server``."""
    entries = answer.json()["choices"][0]["prompt_logprobs"][1:]
    return [entry[str(token)]["logprob"] for entry, token in zip(entries, tokens[1:], strict=True)]


def ask_server(url: str, model: str, tokens: Sequence[int]) -> httpx.Response:
    """vLLM's answer, which may be an error; its key is taken from $VLLM_API_KEY."""
    key = os.environ.get(SERVER_KEY_VARIABLE)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body = {
        "model": model, "prompt": tokens, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0,
        "cache_salt": uuid.uuid4().hex,  # away from entries of older weights
    }  # fmt: skip
    return httpx.post(f"{url.rstrip('/')}/v1/completions", json=body, headers=headers, timeout=120, trust_env=False)


def gap(scored: dict[str, Any], served: Sequence[float]) -> Gap:
    """Between the answer of ``POST /train/score`` and what ``served_logprobs`` gave."""
    gaps = [
        math.inf if row["logprob"] is None else abs(row["logprob"] - value)
        for row, value in zip(scored["data"], served, strict=True)
    ]
    return Gap(len(gaps), sum(gaps) / len(gaps), max(gaps))

"""Does the trainer compute the function that is served? Log-probabilities of the same tokens by both, over the same weights.

They differ by rounding (bf16, other kernels). A larger gap means that the gradients are those of another function.
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
import msgspec

from apollo_tp.cli.access import bearer
from apollo_tp.cli.answers import RefusedError, Scores, read
from apollo_tp.cli.client import check

SERVER_KEY_VARIABLE = "VLLM_API_KEY"
MAX_TOKENS = 1024
"""``POST /train/score`` takes as many samples, and each token but the first is one."""


@dataclass(frozen=True)
class Gap:
    """Absolute differences of log-probabilities, in nats; infinite if the trainer has a number that is not finite."""

    tokens: int
    mean_gap_nats: float
    largest_gap_nats: float


def random_tokens(count: int, vocab_size: int) -> list[int]:
    """``count`` token ids, always the same, from the half of the vocabulary that rarely has special tokens."""
    return random.Random(0).choices(range(vocab_size // 2), k=count)


def stretch(tokens: int, max_sequence_tokens: int, window: int) -> tuple[int, int]:
    """(length of the sequence, first token that is compared) so that about ``tokens`` are compared.

    If sequences may be longer than the ``window`` (0: there is none), it lies before all that is compared: within it, a
    window that one side does not have would change nothing.
    """
    before = window if 0 < window < max_sequence_tokens - 1 else 0
    return min(before + max(2, min(tokens, MAX_TOKENS)), max_sequence_tokens), before + 1


def score_request(tokens: Sequence[int], first: int) -> dict[str, Any]:
    """Body of ``POST /train/score``: each token from number ``first`` on, given those before it."""
    samples = [{"context_ids": tokens[:i], "continuation_ids": [tokens[i]]} for i in range(first, len(tokens))]
    return {"samples": samples}


class Logprob(msgspec.Struct):
    """vLLM's record of one token."""

    logprob: float


class Choice(msgspec.Struct):
    """For each token of the prompt but the first, records by token id."""

    prompt_logprobs: list[dict[str, Logprob] | None]


class Completion(msgspec.Struct):
    """The part of vLLM's answer that is read."""

    choices: list[Choice]


def ask_server(url: str, model: str, tokens: Sequence[int]) -> httpx.Response:
    """vLLM's answer; its key is taken from $VLLM_API_KEY. Raises RefusedError if there is none, or an error."""
    headers = bearer(f"${SERVER_KEY_VARIABLE}", os.environ.get(SERVER_KEY_VARIABLE, ""))
    body = {
        "model": model, "prompt": tokens, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0,
        "cache_salt": uuid.uuid4().hex,  # no cache entries of older weights are used
    }  # fmt: skip
    try:
        answer = httpx.post(
            f"{url.rstrip('/')}/v1/completions", json=body, headers=headers, timeout=120, trust_env=False
        )
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError, OverflowError) as error:
        raise RefusedError(f"no server answers at {url} ({error}); is vLLM running? See --server") from error
    check(answer)
    return answer


def served_logprobs(answer: httpx.Response, tokens: Sequence[int]) -> list[float]:
    """The server's log-probability (nats) of each token but the first, from its answer to ``ask_server``.

    Raises RefusedError for another answer.
    """
    try:
        entries = msgspec.json.decode(answer.content, type=Completion).choices[0].prompt_logprobs[1:]
        return [(entry or {})[str(token)].logprob for entry, token in zip(entries, tokens[1:], strict=True)]
    except (ValueError, LookupError, RecursionError) as error:
        message = (
            f"{answer.url}: got {error!r}, expected the log-probabilities of {len(tokens)} tokens, as vLLM answers"
        )
        raise RefusedError(f"{message}; see --server") from error


def gap(scored: dict[str, Any], served: Sequence[float]) -> Gap:
    """The gap between the answer of ``POST /train/score`` and the result of ``served_logprobs``. Raises RefusedError."""
    rows = read(scored, Scores, "POST /train/score").data
    if len(rows) != len(served):
        raise RefusedError(f"POST /train/score: got {len(rows)} scores, expected {len(served)}")
    gaps = [
        math.inf if row.logprob is None else abs(row.logprob - value) for row, value in zip(rows, served, strict=True)
    ]
    return Gap(len(gaps), sum(gaps) / len(gaps), max(gaps))

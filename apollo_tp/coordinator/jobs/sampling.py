"""Completions from the server that is trained, with their token ids and the log-probabilities of the sampled tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from apollo_tp.coordinator.graders.clients import NoAnswerError, ask
from apollo_tp.errors import ApolloTpError

if TYPE_CHECKING:
    import httpx

WHOLE_DISTRIBUTION = {
    "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}  # fmt: skip
"""Said in full, since a model's generation config may have other defaults: the trainer's probabilities are of the whole
vocabulary. At temperature 1 vLLM's raw log-probabilities are also those that it samples from."""


class SamplingError(ApolloTpError):
    """The server gave no completions that can be trained on."""


@dataclass(frozen=True)
class Completion:
    """A sampled completion: its text, and its tokens with their log-probabilities (nats)."""

    text: str
    token_ids: list[int]
    logprobs: list[float]


class _Answer(msgspec.Struct):
    class Choice(msgspec.Struct):
        class Logprobs(msgspec.Struct):
            token_logprobs: list[float | None]

        text: str
        token_ids: list[int] | None = None
        logprobs: Logprobs | None = None

    choices: list[Choice]


async def sample(client: httpx.AsyncClient, prompt: list[int], count: int, options: dict[str, Any]) -> list[Completion]:
    """``count`` completions after the tokens of ``prompt``. Raises SamplingError."""
    body = {"prompt": prompt, "n": count, "logprobs": 0, "return_token_ids": True} | WHOLE_DISTRIBUTION | options
    try:
        answer = await ask(client, "v1/completions", body, _Answer)
    except NoAnswerError as error:
        raise SamplingError(
            f"{client.base_url}v1/completions: {error}; is service.server_url the address of the server that is trained?"
        ) from error
    found = [_completion(choice) for choice in answer.choices]
    if len(found) != count:
        raise SamplingError(f"{client.base_url}: got {len(found)} completions, expected {count}")
    return found


def _completion(choice: _Answer.Choice) -> Completion:
    ids, logprobs = choice.token_ids or [], choice.logprobs.token_logprobs if choice.logprobs else []
    values = [value for value in logprobs if value is not None and math.isfinite(value)]
    if not ids or len(values) != len(ids):
        got = f"{len(ids)} token ids and {len(values)} log-probabilities"
        raise SamplingError(
            f"the server: got {got} of a completion, expected one for each token; is it vLLM 0.26 or newer?"
        )
    return Completion(choice.text, ids, values)

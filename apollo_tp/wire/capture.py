"""A completion of the server that its client lets be stored: what the plugin in vLLM tells the coordinator of it."""

from __future__ import annotations

import msgspec

CAPTURES_PATH = "/train/captures"
"""The coordinator's route for these records. The plugin needs no token for it."""


class CapturedChoice(msgspec.Struct, frozen=True):
    """One answer. ``logprobs`` are those of the sampled tokens in nats, at the temperature of sampling; one per token."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


class Captured(msgspec.Struct, frozen=True, kw_only=True):
    """A completion. ``id`` is that of the server's answer, ``created`` the time at which sampling began, in seconds since
    the epoch. ``messages`` are those of a chat, as the client sent them; null for a text completion.

    ``not_comparable`` says why ``logprobs`` are not those of the model's own distribution, so that only the text can be
    learned from; empty if they are.
    """

    id: str
    session: str
    model: str
    created: float
    prompt_ids: list[int]
    choices: list[CapturedChoice]
    messages: msgspec.Raw = msgspec.Raw(b"null")
    metadata: dict[str, str] = {}
    temperature: float
    not_comparable: str = ""

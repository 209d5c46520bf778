"""Feedback becomes training: batches of it, in the order of arrival, each as one or two jobs.

A batch is begun in the database before its jobs are stored, and each job has an idempotency key that names the batch:
after a kill the same jobs are stored, or found. A reward is learned from the sampled tokens, by policy gradient; a corrected
answer by imitation, by preference over the one that was served (DPO), or by both.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from apollo_tp.config import LearnConfig
from apollo_tp.coordinator.captures.store import Captures, Stored, Vote
from apollo_tp.errors import ApolloTpError, RequestError

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
RETRY_SECONDS = 10.0
MAX_BATCH = 4096
BASELINE_REWARDS = 256
FIRST_BASELINE = 0.5
"""Between the rewards of a thumb up (1) and down (0), before there is any other."""
Submit = Callable[[str, bytes, str], Awaitable[str]]
"""Stores the job of a POST /train body, or of a PairsBody with the method "dpo", once for a key; returns its id. Raises
RequestError if the body is refused."""


class Learner:
    """Makes jobs of the feedback in ``captures`` as ``config`` says, through ``submit``."""

    def __init__(self, captures: Captures, config: LearnConfig, submit: Submit) -> None:
        self._captures, self._config, self._submit = captures, config, submit

    async def run(self) -> None:
        """Learn until cancelled. Never ends by itself."""
        if self._config.every_samples is None and self._config.every_seconds is None:
            await asyncio.Event().wait()
        unfinished = await self._captures.last_batch()  # a kill may have come before its jobs were stored
        while True:
            try:
                if unfinished:
                    await self._learn(unfinished)
                    unfinished = ""
                elif await self._is_due():
                    unfinished = f"learn-{time.time_ns():x}"
                    await self._captures.begin_batch(unfinished, self._config.every_samples or MAX_BATCH)
                    continue
                await asyncio.sleep(LOOK_SECONDS)
            except ApolloTpError as error:  # too many jobs wait, or the disk is full
                log.warning("feedback is not learned yet: %s", error)
                await asyncio.sleep(RETRY_SECONDS)

    async def _is_due(self) -> bool:
        count, since = await self._captures.waiting()
        by_number = self._config.every_samples is not None and count >= self._config.every_samples
        seconds = self._config.every_seconds
        return by_number or (seconds is not None and since is not None and time.time() - since >= seconds)

    async def _learn(self, batch: str) -> None:
        """Store the jobs of a batch."""
        votes = await self._captures.batch(batch)
        corrected = [(vote, stored) for vote, stored in votes if vote.corrected is not None]
        again = math.ceil(self._config.replay_share * len(corrected))
        replayed = await self._captures.learned_before(batch, again) if again else []
        corrected += replayed
        rewarded = await self._rewarded(batch, votes)
        # rewards first: each step before theirs would move the weights away from those that sampled
        if rewarded:
            await self._store(f"{batch}/rewards", _samples(rewarded, self._config.loss))
        if corrected and self._config.corrections != "dpo":
            imitated = [{"messages": [*_asked(stored), _answer(vote.corrected)]} for vote, stored in corrected]
            await self._store(f"{batch}/corrections", _samples(imitated, "cross_entropy"))
        pairs = [_pair(vote, stored) for vote, stored in corrected if vote.corrected != _served(vote, stored)]
        if pairs and self._config.corrections != "supervised":
            await self._store(f"{batch}/preferences", {"pairs": pairs, "beta": self._config.dpo_beta}, "dpo")

    async def _store(self, key: str, body: dict[str, Any], method: str = "supervised") -> None:
        body |= {"metadata": {"learned_from": key}, "learning_rate_scale": self._config.learning_rate_scale}
        if self._config.guard is not None:
            body["guard"] = {
                "measure": "command", "action": self._config.guard, "max_worse": self._config.max_worse,
                "higher_is_better": self._config.higher_is_better,
            }  # fmt: skip
        try:
            job = await self._submit(key, msgspec.json.encode(body), method)
        except RequestError as error:
            if error.status != 400:
                raise
            log.error("%s is left out, since its samples are refused: %s", key, error)  # it would be refused for ever
            return
        log.info("%s becomes %s", key, job)

    async def _rewarded(self, batch: str, votes: Sequence[tuple[Vote, Stored]]) -> list[dict[str, Any]]:
        """Answers with a reward, whose advantage is what it exceeds the mean of the last rewards by, these included."""
        rewards = [vote.reward for vote, _ in votes if vote.reward is not None]
        if not rewards:
            return []
        known = [*(await self._captures.rewards_before(batch, BASELINE_REWARDS)), *rewards]
        baseline = math.fsum([FIRST_BASELINE, *known]) / (1 + len(known))
        return [
            sample
            for vote, stored in votes
            if vote.reward is not None and (sample := _sampled(vote, stored, vote.reward - baseline)) is not None
        ]


def _sampled(vote: Vote, stored: Stored, advantage: float) -> dict[str, Any] | None:
    """The sampled tokens with their advantage; None if their log-probabilities cannot be compared with the model's."""
    captured = stored.captured
    choice = captured.choices[vote.choice]
    if captured.not_comparable or not choice.token_ids or len(choice.logprobs) != len(choice.token_ids):
        return None
    sample = {
        "prompt_ids": captured.prompt_ids, "completion_ids": choice.token_ids, "sampling_logprobs": choice.logprobs,
        "temperature": captured.temperature, "advantage": advantage, "reward": vote.reward,
    }  # fmt: skip
    return sample if stored.weight_version is None else sample | {"weight_version": stored.weight_version}


def _samples(samples: Sequence[dict[str, Any]], loss: str) -> dict[str, Any]:
    """Fields of a POST /train body that makes one step of them."""
    truncate = "left" if loss == "cross_entropy" else "refuse"
    return {"samples": samples, "loss": loss, "batch_size": len(samples), "truncate": truncate}


def _pair(vote: Vote, stored: Stored) -> dict[str, Any]:
    """The corrected answer over the served one. Both are rendered by the chat template, so that only words differ."""
    return {
        "input": {"messages": _asked(stored)},
        "preferred_output": [_answer(vote.corrected)],
        "non_preferred_output": [_answer(_served(vote, stored))],
    }


def _asked(stored: Stored) -> list[dict[str, Any]]:
    """The conversation before the answer, as context alone."""
    messages = msgspec.json.decode(stored.captured.messages) or []
    kept = [{"role": message["role"], "content": message.get("content")} for message in messages]
    return [message | {"weight": 0} if message["role"] == "assistant" else message for message in kept]


def _served(vote: Vote, stored: Stored) -> str:
    return stored.captured.choices[vote.choice].text


def _answer(content: str | None) -> dict[str, Any]:
    return {"role": "assistant", "content": content}

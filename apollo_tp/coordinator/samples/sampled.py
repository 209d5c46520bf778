"""Sampled completions: which fields a loss needs of them, and advantages from the rewards of a group."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

from apollo_tp.coordinator.samples.schema import SampleBody, SampledBody
from apollo_tp.errors import refuse
from apollo_tp.wire.commands import Sampled
from apollo_tp.wire.losses import Loss

PER_TOKEN = ("sampling_logprobs", "reference_logprobs", "teacher_logprobs", "weights")
LISTS = PER_TOKEN[:-1]
NEEDS: dict[str, tuple[str, ...]] = {
    "cross_entropy": (),
    "importance_sampling": ("sampling_logprobs", "advantage"),
    "ppo": ("sampling_logprobs", "advantage"),
    "cispo": ("sampling_logprobs", "advantage"),
    "gspo": ("sampling_logprobs", "advantage"),
    "kto": ("reference_logprobs", "advantage"),
    "distill": ("sampling_logprobs", "teacher_logprobs"),
}
"""Fields that a loss needs of every sample. An advantage may come from ``reward`` and ``group``."""
USED_BY_ALL = frozenset({"prompt_ids", "completion_ids", "weights", "weight_version", "top_p", "top_k", "min_p"})
_NOTHING = SampledBody()
STD_FLOOR = 1e-4
"""Added to a group's standard deviation, as TRL does."""


class Groups:
    """The rewards of a request's samples by group."""

    def __init__(self, bodies: Iterable[SampledBody] = (), *, by_std: bool = True) -> None:
        rewards: defaultdict[str | int, list[float]] = defaultdict(list)
        for body in bodies:
            if body.group is not None and body.reward is not None:
                rewards[body.group].append(body.reward)
        self._rewards, self._by_std = rewards, by_std

    def advantage(self, reward: float, group: str | int) -> float:
        """(reward - mean of the group) / (its standard deviation + 1e-4), or without the division. The standard deviation is
        that of a sample (n - 1). Raises RequestError for a group of one."""
        rewards = self._rewards[group]
        if len(rewards) < 2:
            raise refuse("group", f"one sample of group {group!r}", "at least two of a group in one request")
        mean = math.fsum(rewards) / len(rewards)
        if not self._by_std:
            return reward - mean
        square = math.fsum((each - mean) ** 2 for each in rewards)
        return (reward - mean) / (math.sqrt(square / (len(rewards) - 1)) + STD_FLOOR)


def check_fields(body: SampledBody, loss: Loss, where: str) -> None:
    """Raise RequestError unless a sample has what ``loss`` needs, and nothing that it would not look at."""
    if loss.name == "cross_entropy":
        for name in SampledBody.__struct_fields__:
            if name not in USED_BY_ALL and getattr(body, name) != getattr(_NOTHING, name):
                expected = f"loss {' | '.join(other for other in NEEDS if other != loss.name)}, which look at it"
                raise refuse(f"{where}{name}", f"it with loss {loss.name!r}", expected)
        return
    if body.completion_ids is None:
        raise refuse(f"{where}completion_ids", f"nothing with loss {loss.name!r}", "the sampled token ids")
    needed = NEEDS[loss.name] + (("reference_logprobs",) if loss.config.kl_coef else ())
    for name in needed:
        if getattr(body, name) is None and not (name == "advantage" and body.reward is not None):
            expected = "a number, one per token, or 'reward' with 'group'" if name == "advantage" else "one per token"
            raise refuse(f"{where}{name}", f"nothing with loss {loss.name!r}", expected)
    if body.advantage is None and "advantage" in needed and body.group is None and loss.name != "kto":
        raise refuse(
            f"{where}group", "a reward without a group", "the group whose mean is its baseline, or 'advantage'"
        )
    if body.advantage is not None and body.group is not None:
        raise refuse(f"{where}group", "it together with 'advantage'", "either an advantage, or a reward and its group")


def sampled_of(body: SampledBody, groups: Groups | None) -> Sampled:
    """What the ranks are told of the completion; without ``groups`` (to be scored), nothing follows from its reward. Raises
    RequestError for lists of another length, and if it was not drawn from the whole distribution."""
    count = len(body.completion_ids or ())
    advantage = body.advantage
    given = {name: getattr(body, name) for name in PER_TOKEN}
    for name, values in (given | {"advantage": advantage}).items():
        if isinstance(values, list) and len(values) != count:
            raise refuse(name, f"{len(values)} values", f"{count}, one per token of completion_ids")
    for name, off in (("top_p", (1,)), ("top_k", (0, -1)), ("min_p", (0,))):
        if (value := getattr(body, name)) is not None and value not in off:
            raise refuse(
                name, f"{value:g}", f"{off[-1]}, which is off: the trainer's probabilities are of the whole "
                "vocabulary, and cannot be compared with those of a part of it",
            )  # fmt: skip
    if advantage is None and body.reward is not None and groups is not None:
        advantage = body.reward if body.group is None else groups.advantage(body.reward, body.group)
    return Sampled(
        **{name: given[name] or [] for name in LISTS},
        advantages=advantage if isinstance(advantage, list) else [] if advantage is None else [advantage] * count,
        temperature=body.temperature,
        reward=body.reward,
        weight_version=body.weight_version,
    )


def is_sampled(body: SampleBody) -> bool:
    """Whether the sample is a sampled completion."""
    return body.completion_ids is not None or body.prompt_ids is not None

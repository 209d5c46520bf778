"""The loss of a job: its name and configuration, as clients send them and ranks use them; the same record everywhere."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from apollo_tp.errors import refuse

LossName = Literal["cross_entropy", "importance_sampling", "ppo", "cispo", "gspo", "kto", "distill"]
Positive = Annotated[float, Meta(gt=0, le=1e6)]
NotNegative = Annotated[float, Meta(ge=0, le=1e6)]


class LossConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Options of a loss. None is the loss's default (``DEFAULTS``), which may be "not used".

    ``clip_low`` and ``clip_high``: the ratio is clipped to [1 - clip_low, 1 + clip_high]. ``is_cap``: upper bound of the
    importance ratio; ``mask_low`` and ``mask_high``: tokens whose ratio is outside are left out of the loss and of its
    denominators; ``is_mode``: whether cap and mask look at the ratio of a token, or of its whole sequence (the product).
    ``kl_coef`` times the estimate ``kl_estimator`` (Schulman's k1, k2, k3) of the KL divergence from the reference is added.
    ``normalisation``: mean over tokens, mean over sequences of the mean over their tokens, or sum divided by ``divisor``.
    ``group_std``: advantages of a group are divided by its standard deviation. ``beta``, ``desirable_weight`` and
    ``undesirable_weight`` are KTO's.
    """

    clip_low: NotNegative | None = None
    clip_high: NotNegative | None = None
    is_cap: Positive | None = None
    mask_low: Positive | None = None
    mask_high: Positive | None = None
    is_mode: Literal["token", "sequence"] | None = None
    kl_coef: NotNegative | None = None
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    normalisation: Literal["token_mean", "sequence_mean", "constant"] | None = None
    divisor: Positive | None = None
    group_std: bool | None = None
    beta: Positive | None = None
    desirable_weight: NotNegative | None = None
    undesirable_weight: NotNegative | None = None


class Loss(msgspec.Struct, frozen=True, omit_defaults=True):
    """A loss with the options that it has. ``complete`` makes one of what a client sent."""

    name: LossName = "cross_entropy"
    config: LossConfig = LossConfig(normalisation="token_mean")


_MEAN = LossConfig(normalisation="token_mean")
_RATIO = LossConfig(kl_coef=0.0, kl_estimator="k3", normalisation="token_mean", is_mode="token", group_std=True)
DEFAULTS: dict[str, LossConfig] = {
    "cross_entropy": _MEAN,
    "importance_sampling": _RATIO,
    "ppo": msgspec.structs.replace(_RATIO, clip_low=0.2, clip_high=0.2),
    "cispo": msgspec.structs.replace(_RATIO, clip_low=1.0, clip_high=4.0),
    "gspo": msgspec.structs.replace(_RATIO, clip_low=3e-4, clip_high=4e-4, normalisation="sequence_mean"),
    "kto": LossConfig(normalisation="sequence_mean", beta=0.1, desirable_weight=1.0, undesirable_weight=1.0),
    "distill": msgspec.structs.replace(_RATIO, group_std=None),
}
"""What each loss uses if the client does not say it. The clip ranges of ppo and gspo are those of their papers (Schulman et
al. 2017; Zheng et al. 2025, section 5.1), that of cispo has TRL's upper bound of 5 and no lower one."""
_OPTIONAL: dict[str, frozenset[str]] = {
    "cross_entropy": frozenset({"divisor"}),
    "importance_sampling": frozenset({"divisor", "is_cap", "mask_low", "mask_high"}),
    "ppo": frozenset({"divisor", "mask_low", "mask_high"}),
    "cispo": frozenset({"divisor", "mask_low", "mask_high"}),
    "gspo": frozenset({"divisor", "mask_low", "mask_high"}),
    "kto": frozenset(),
    "distill": frozenset({"divisor", "is_cap", "mask_low", "mask_high"}),
}
"""Options without a default that a loss has all the same."""


def complete(name: LossName, config: LossConfig) -> Loss:
    """The loss with its defaults filled in. Raises RequestError for an option that it does not have, or that others
    exclude."""
    defaults = DEFAULTS[name]
    known = {field for field in config.__struct_fields__ if getattr(defaults, field) is not None} | _OPTIONAL[name]
    given = {field: value for field in config.__struct_fields__ if (value := getattr(config, field)) is not None}
    for field in given:
        if field not in known:
            raise refuse(f"loss_config.{field}", f"it with loss {name!r}", f"one of {', '.join(sorted(known))}")
    loss = Loss(name, msgspec.structs.replace(defaults, **given))
    if name == "kto" and loss.config.normalisation != "sequence_mean":
        raise refuse("loss_config.normalisation", repr(loss.config.normalisation), "'sequence_mean' with loss 'kto'")
    if (loss.config.normalisation == "constant") != (loss.config.divisor is not None):
        raise refuse(
            "loss_config.divisor", repr(loss.config.divisor), "a number with normalisation 'constant', and only then"
        )
    low, high = loss.config.mask_low, loss.config.mask_high
    if low is not None and high is not None and low >= high:
        raise refuse("loss_config.mask_low", f"{low:g}", f"less than mask_high ({high:g})")
    return loss

"""What other tools call the fields of a request."""

from __future__ import annotations

from collections.abc import Collection

NAMES = {
    "lr": ("learning_rate_scale", "learning_rate_multiplier"),
    "learning_rate": ("learning_rate_scale", "learning_rate_multiplier"),
    "learning_rate_multiplier": ("learning_rate_scale",),
    "learning_rate_scale": ("learning_rate_multiplier",),
    "n_epochs": ("epochs",),
    "num_epochs": ("epochs", "n_epochs"),
    "num_train_epochs": ("epochs", "n_epochs"),
    "epochs": ("n_epochs",),
    "per_device_train_batch_size": ("batch_size",),
    "steps": ("max_steps",),
    "input_ids": ("context_ids and continuation_ids",),
    "logprobs": ("sampling_logprobs",),
    "old_logprobs": ("sampling_logprobs",),
    "advantages": ("advantage",),
    "ref_logprobs": ("reference_logprobs",),
    "text_completion": ("prompt and completion",),
}
"""What other tools and our other routes call a field -> our names."""


def meant_by(name: str, known: Collection[str]) -> str:
    """Our name of an unknown field, if it is among the ``known`` ones, with what it means; else ""."""
    ours = next((each for each in NAMES.get(name, ()) if set(each.split(" and ")) <= set(known)), "")
    return f"{ours}, a factor of the configured learning rate" if ours.startswith("learning_rate") else ours

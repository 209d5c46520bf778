"""The model card (README.md) of a checkpoint: where it comes from, what it was trained on, and its figures. No torch."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import msgspec

CARD_FILE = "README.md"
KEPT_FIELDS = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Fields of the base model's card that hold for what is trained from it."""
_ID = re.compile(r"@[0-9a-f]{12}")


class Trained(msgspec.Struct, frozen=True, kw_only=True):
    """What weights were trained on, since the model that training began from. Samples are counted once per epoch."""

    jobs: int = 0
    steps: int = 0
    samples: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    """Tokens with a loss weight."""
    loss: float | None = None
    """The training loss of the last step, in nats per token (or DPO's mean)."""


def public_name(path: str) -> str:
    """A name for a model that says nothing about this machine, and differs for models in different places: the id of a
    Hugging Face model is its own, also in the cache; of another folder its last part and a digest of its path. Applied to
    such a name it changes nothing."""
    if not path.startswith("/"):
        return path
    cached = re.search(r"/models--([^/]+)/snapshots/", path)
    if cached:
        return cached[1].replace("--", "/")
    return f"{Path(path).name}@{hashlib.sha256(path.encode(errors='surrogateescape')).hexdigest()[:12]}"


def model_card(
    name: str, base: str, weight_version: int, optimizer: str, trained: Trained, source_card: Path | None = None
) -> str:
    """The card of checkpoint ``name``. ``base`` is the public name of the model that training began from; ``source_card`` is
    the card in the folder that the server was started from, whose license and language stay."""
    from huggingface_hub import ModelCardData  # half a second that a run without checkpoints need not wait

    title = _ID.sub("", base)
    data = ModelCardData(
        library_name="transformers",
        base_model=base if "/" in base else None,  # others are no ids of the hub
        tags=["apollo_tp", "text-generation"],
        **_fields(source_card),
    )
    loss = "" if trained.loss is None else f"\n| training loss of the last step | {trained.loss:.4f} |"
    return f"""---
{data.to_yaml()}
---

# {title}, trained: {name}

The weights of `{title}` after full-parameter training by [APOLLO](https://arxiv.org/abs/2412.05270) in the memory of a
running vLLM server, written by apollo_tp. All files load in transformers and vLLM as those of the base model do.

| | |
|---|---|
| base model | `{title}` |
| jobs | {trained.jobs:,} |
| optimizer steps | {trained.steps:,} |
| samples, counted once per epoch | {trained.samples:,} |
| tokens | {trained.tokens:,} |
| of which learned from | {trained.loss_tokens:,} |{loss}
| weight version | {weight_version:,} |
| optimizer | {optimizer.partition(":")[0]} |

The samples themselves are not recorded here. Evaluate the model for your purpose before you use or publish it.
"""


def _fields(source_card: Path | None) -> dict[str, Any]:
    """KEPT_FIELDS of a card, as far as it can be read."""
    from huggingface_hub import ModelCard

    if source_card is None or not source_card.is_file():
        return {}
    try:
        found = ModelCard.load(source_card, ignore_metadata_errors=True).data.to_dict()
    # Cards are written by hand: whatever the library finds wrong with one, the checkpoint is written.
    except Exception:  # noqa: BLE001
        return {}
    return {name: found[name] for name in KEPT_FIELDS if name in found}

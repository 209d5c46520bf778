"""Errors of code that is not ours, raised by a model that it has no place for, as a refusal of that model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

from apollo_tp.errors import ApolloTpError, UnsupportedModelError

_NOT_THE_MODELS = (ApolloTpError, torch.OutOfMemoryError, torch.AcceleratorError, dist.DistError)
"""What says nothing about the model: a full or broken device, a rank that went away, our own errors."""


@contextlib.contextmanager
def refusing(subject: str) -> Iterator[None]:
    """Whatever the model's own code raises within becomes an UnsupportedModelError about ``subject``."""
    try:
        yield
    except _NOT_THE_MODELS:
        raise
    except Exception as error:  # a missing field, another signature, a plain ValueError: each family's own way
        raise UnsupportedModelError(
            f"{subject}: got {type(error).__name__}: {error}; expected a decoder-only model that transformers builds and "
            "runs with exchangeable attention; use one of the families in docs/models.md"
        ) from error

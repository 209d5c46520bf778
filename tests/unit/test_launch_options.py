"""Options: overrides, errors that name the nearest key, and the frozen list of names."""

from __future__ import annotations

import subprocess
import sys

import pytest

from apollo_tp.config import CacheMode, OptimizerKind, Precision, SyncMode
from apollo_tp.errors import ConfigError
from apollo_tp.launch.compose import groups, help_text, read_config


def test_overrides_reach_the_dataclasses() -> None:
    """The README's own example, a group, and null."""
    config = read_config(
        [
            "optim.rank=128",
            "optim.lr=1e-5",
            "service.http.port=8301",
            "optim=adamw",
            "checkpoint.after_idle_seconds=null",
            "sync=step_lock",
            "cache=reset",
        ]
    )
    assert (config.optim.rank, config.optim.lr, config.service.http.port) == (128, 1e-5, 8301)
    assert config.optim.kind is OptimizerKind.adamw
    assert config.checkpoint.after_idle_seconds is None
    assert (config.sync.mode, config.sync.cache) == (SyncMode.step_lock, CacheMode.reset)
    assert config.train.precision is Precision.remainder


def test_defaults_are_those_promised() -> None:
    """Rank 64 as one constant, bf16 with a remainder, loopback, automatic checkpoints; inference is never paused."""
    config = read_config([])
    assert (config.sync.mode, config.sync.cache) == (SyncMode.hogwild, CacheMode.none)
    assert (config.optim.rank, config.optim.scale, config.service.http.host) == (64, "auto", "127.0.0.1")
    assert config.checkpoint.after_idle_seconds == 300


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.rnk=3", "nearest valid key is optim.rank"),
        ("lr=3", "nearest valid key is optim.lr"),
        ("service.http.prt=1", "nearest valid key is service.http.port"),
        ("optim.rank=abc", r"optim\.rank: .*expected int"),
        ("optim.rank=1.5", r"optim\.rank: .*expected int"),
        ("optim=foo", r"optim: got 'foo', expected one of \['adamw', 'apollo', 'apollo_mini'\]"),
        ("optim.lr=-1", r"optim\.lr: got -1.0, expected a number > 0"),
        ("optim.kind=sgd", r"optim\.kind: .*apollo \| apollo_mini \| adamw"),
        ("train.max_sequence_tokens=9999", r"train\.max_sequence_tokens: got 9999"),
        ("train.gradients=fused", r"optim\.max_grad_norm: got 1\.0, expected null with train\.gradients=fused"),
        ("sync=lock", r"sync: got 'lock', expected one of \['drain', 'hogwild', 'step_lock'\]"),
        ("optim.lr", "expected key=value"),
    ],
)
def test_wrong_overrides_say_what_is_meant(override: str, message: str) -> None:
    """Unknown, ill-typed and contradictory options, each in one line."""
    with pytest.raises(ConfigError, match=message):
        read_config([override])


def test_help_explains_every_group() -> None:
    """Each group and each section of options is there."""
    text = help_text()
    for word in [*groups(), "server:", "optim:", "train:", "service:", "checkpoint:", "optim.rank=64"]:
        assert word in text


def test_options_are_read_before_torch() -> None:
    """A typing error costs a moment, not the import of torch; and the share of SMs is set before CUDA can initialise."""
    code = (
        "import sys; from apollo_tp.launch.compose import read_config; from apollo_tp.launch.qos import share_gpu; "
        "share_gpu(read_config([]).qos); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

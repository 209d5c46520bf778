"""Options: overrides, errors that name the nearest key, and the frozen list of names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from apollo_tp.config import CacheMode, GradientMode, OptimizerKind, PrecisionChoice, SyncMode
from apollo_tp.errors import ConfigError
from apollo_tp.launch.compose import groups, help_text, read_config

WRONG = "apollo_tp.launch: optim.lr: got -1.0, expected a number > 0 and finite"


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
    assert config.train.precision is PrecisionChoice.auto


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
        (
            "train.gradients=in_backward",
            r"optim\.max_grad_norm: got 1\.0, expected null with train\.gradients=in_backward",
        ),
        ("sync=lock", r"sync: got 'lock', expected one of \['drain', 'hogwild', 'step_lock'\]"),
        ("optim.lr", "optim.lr: got no value, expected key=value"),
        ("--multirun", "--multirun: got no value, expected key=value"),
        ("optim=null", r"optim: got null, expected one of \['adamw', 'apollo', 'apollo_mini'\]"),
        ("checkpoint.dir=~/ck", r"checkpoint\.dir=~/ck: .*checkpoint\.dir=\$HOME/ck"),
        ("checkpoint.dir=/tmp/a=b", "checkpoint.dir=/tmp/a=b: .*quote a text: 'checkpoint.dir=\"/tmp/a=b\"'"),
        ("optim.lr=1e-5,1e-4", "optim.lr=1e-5,1e-4: got several values, expected one; "),
        ("optim.lr=glob(*)", "got several values, expected one; "),
        ("optim.lr=inf", r"optim\.lr: got inf, expected a number > 0 and finite"),
        ("optim.scale=inf", r"optim\.scale: got 'inf'"),
        ("optim.betas=[0.9]", r"optim\.betas: got \[0\.9\], expected two numbers"),
        ("optim.betas=[0.9,0.99,0.999]", r"optim\.betas: .*, expected two numbers"),
        ("optim.max_skipped_steps=-1", r"optim\.max_skipped_steps: got -1, expected an integer >= 1"),
        ("optim.total_steps=0", r"optim\.total_steps: got 0, expected an integer >= 1, or null"),
        ("service.http.port=65536", r"service\.http\.port: got 65536, expected an integer from 0 to 65535"),
        ("service.http.port=-1", r"service\.http\.port: got -1"),
        ("service.zmq.port=65536", r"service\.zmq\.port: got 65536, expected an integer from 0 to 65535, or null"),
        ("service.writers.otlp_endpoint=host:4318", r"otlp_endpoint: got 'host:4318', expected an address that begins"),
        ("service.writers.wandb_mode=foo", r"wandb_mode: got 'foo', expected offline or online"),
        ("checkpoint.dir=", r"checkpoint\.dir: got '', expected the path of a folder"),
        ("command_timeout_seconds=0", "command_timeout_seconds: got 0.0, expected a number > 0 and finite"),
        ("command_timeout_seconds=-1", "command_timeout_seconds: got -1.0"),
        ("command_timeout_seconds=nan", "command_timeout_seconds: got nan"),
        ("command_timeout_seconds=inf", "command_timeout_seconds: got inf"),
    ],
)
def test_wrong_overrides_say_what_is_meant(override: str, message: str) -> None:
    """Unknown, ill-typed and contradictory options, each in one line."""
    with pytest.raises(ConfigError, match=message):
        read_config([override])


def test_the_earlier_name_of_in_backward_is_accepted() -> None:
    config = read_config(["train.gradients=fused", "optim.max_grad_norm=null"])
    assert config.train.gradients is GradientMode.in_backward


def test_what_the_messages_advise_is_read() -> None:
    """A text quoted for Hydra, as the messages show it, without the shell's own quotes."""
    assert read_config(['checkpoint.dir="/tmp/a=b,c"']).checkpoint.dir == "/tmp/a=b,c"
    assert read_config(["optim.betas=[0.8,0.9]"]).optim.betas == [0.8, 0.9]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_every_rank_can_say_what_is_wrong(rank: str) -> None:
    """A launcher may end rank 0 before it has: the others say it as well, a moment later."""
    command = [sys.executable, "-m", "apollo_tp.launch", "optim.lr=-1"]
    done = subprocess.run(command, env=os.environ | {"RANK": rank}, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.strip()) == (2, WRONG)


@pytest.mark.parametrize("slow", ["0", "1"])
def test_torchrun_shows_what_is_wrong(tmp_path: Path, slow: str) -> None:
    """Whichever of two ranks is late: torchrun ends the other as soon as one has left, and rank 0 is mostly enough."""
    script = tmp_path / "late_rank.py"
    script.write_text(
        "import os, sys, time\n"
        "from apollo_tp.launch.__main__ import main\n"
        f"os.environ['RANK'] == '{slow}' and time.sleep(60)\n"
        "sys.exit(main(['optim.lr=-1']))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert done.stderr.count(WRONG) == 1


def test_help_explains_every_group() -> None:
    """Each group and each section of options is there."""
    text = help_text()
    for word in [*groups(), "server:", "optim:", "train:", "service:", "checkpoint:", "optim.rank=64"]:
        assert word in text


def test_options_are_read_before_torch() -> None:
    """A typing error costs a moment, not the import of torch; and the share of SMs is set before CUDA can initialise."""
    code = (
        "import sys; from apollo_tp.launch.compose import read_config; from apollo_tp.gpu_sharing.mps import share_gpu; "
        "share_gpu(read_config([]).qos); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_another_platform_is_refused_with_a_sentence() -> None:
    code = (
        "import sys; from apollo_tp.launch.__main__ import main; sys.platform = 'darwin'; status = main([]); "
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "apollo_tp.launch: platform: got darwin, expected linux" in done.stderr


@pytest.mark.parametrize(("seconds", "accepted"), [("599", True), ("600", False), ("601", False)])
def test_the_server_must_pause_before_a_collectives_deadline(seconds: str, accepted: bool) -> None:
    """The other ranks wait in a collective meanwhile; if both deadlines were the same, they would blame rank 0."""
    overrides = ["sync=drain", f"sync.timeout_seconds={seconds}", "command_timeout_seconds=600"]
    if accepted:
        assert read_config(overrides).sync.timeout_seconds == 599
    else:
        with pytest.raises(
            ConfigError, match=r"sync\.timeout_seconds: got .* less than command_timeout_seconds \(600\)"
        ):
            read_config(overrides)

"""``apollo-tp plan``: does a model fit on these GPUs, to be served and trained, with which options, and how fast?"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from apollo_tp.config import Precision
from apollo_tp.errors import ConfigError
from apollo_tp.training.step_model import Layout, Machine, Model, predict

if TYPE_CHECKING:  # it imports torch
    from apollo_tp.training.estimate import Estimate, Options

USABLE = 0.995 * 2**30
"""Bytes of a device for each GB of its name: 150.75e9 of an H200's 141, 85.52e9 of an H100's 80."""
SERVER_OWN = 3e9
"""What a vLLM worker takes beside weights and KV cache (CUDA context and graphs, activations). An assumption."""
MEASURED_GPUS = ("H100", "H200")
"""GPUs whose training speed was measured; both compute alike."""
RECOMPUTE_SPEED = 15_075 / 19_888
"""Tokens per second with recomputation over those without: 4x-recompute and 4x of
benchmarks/results/2026-11-25_step_4x_recompute.json."""
SOURCES = (
    "Weights and optimizer state are exact, activations within 3 % of what four measured trainers took; vLLM's own "
    f"{SERVER_OWN / 1e9:.0f} GB are an assumption. tokens/s, alongside a server without clients, are scaled from 8.19B at "
    "TP 1 and 2 on H200 (benchmarks/results/2026-11-26_scale_qwen3-8b.json) by the formulas of docs/explanation/scale.md, "
    "with recomputation also by 2026-11-25_step_4x_recompute.json; TP 4 and 8 were not measured, nor updates in the "
    "backward pass and precisions apart. The trainer plans its memory again, from profiling steps, when it starts."
)


@dataclass(frozen=True)
class Gpus:
    """``count`` GPUs of ``gigabytes`` each, such as 2xH200-141."""

    count: int
    name: str
    gigabytes: int

    @property
    def bytes(self) -> int:
        return int(self.gigabytes * USABLE)


def parse_gpus(text: str) -> Gpus:
    """``COUNTxNAME-GB``. Raises ConfigError."""
    found = re.fullmatch(r"([1-9]\d{0,3})x([A-Za-z]\w*)-([1-9]\d{0,3})", text)
    if found is None:
        raise ConfigError(f"--gpus: got {text!r}, expected COUNTxNAME-GB, such as 2xH200-141 or 1xH100-80")
    return Gpus(int(found[1]), found[2], int(found[3]))


@dataclass(frozen=True)
class Row:
    """One choice of options: its bytes on each GPU by part, and tokens per second, None for a GPU that was not measured."""

    options: list[str]
    parts: dict[str, int]
    device: int
    largest_tokens: int
    tokens_per_second: float | None

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.device


def rows(estimate: Estimate, gpus: Gpus, *, tokens: int, kv_tokens: int) -> list[Row]:
    """What each choice of options takes, those that cost least first. ``kv_tokens``: what the KV cache holds at once."""
    from apollo_tp.training.estimate import Options

    choices = itertools.product((Precision.remainder, Precision.stochastic), (False, True), (False, True))
    return [
        _row(estimate, gpus, Options(tokens, recompute, in_backward, precision), kv_tokens)
        for precision, in_backward, recompute in choices
    ]


def _row(estimate: Estimate, gpus: Gpus, options: Options, kv_tokens: int) -> Row:
    from apollo_tp.training.estimate import TRAINER_CONTEXT

    parts = {
        "weights": estimate.weights,
        "KV cache": estimate.kv_cache(kv_tokens),
        "vLLM's own": int(SERVER_OWN),
        "optimizer state": estimate.state(options.precision),
        "trainer's context": int(TRAINER_CONTEXT),
    }
    plan = estimate.plan(options, gpus.bytes - sum(parts.values()))
    parts |= {"gradients": plan.gradients, "activations": plan.activations}
    parts["margin"] = plan.needed - plan.gradients - plan.activations
    return Row(_overrides(options), parts, gpus.bytes, plan.largest, _speed(estimate, gpus, options))


def _overrides(options: Options) -> list[str]:
    """The trainer's options that are not defaults."""
    chosen = [f"train.max_micro_batch_tokens={options.tokens}", f"train.max_sequence_tokens={options.tokens}"]
    if options.recompute:
        chosen.append("train.gradient_checkpointing=true")
    if options.in_backward:
        chosen += ["train.gradients=in_backward", "optim.max_grad_norm=null"]
    if options.precision is not Precision.remainder:
        chosen.append(f"train.precision={options.precision.value}")
    return chosen


def _speed(estimate: Estimate, gpus: Gpus, options: Options) -> float | None:
    if gpus.name.upper() not in MEASURED_GPUS:
        return None
    config = estimate.config
    model = Model(estimate.num_parameters, config.num_hidden_layers, config.hidden_size)
    machine = Machine()
    layout = Layout(1, estimate.size, options.tokens, machine.nvlink)
    return predict(model, layout, machine).tokens_per_second(layout) * (RECOMPUTE_SPEED if options.recompute else 1.0)


def utilization(row: Row) -> float:
    """The --gpu-memory-utilization that gives vLLM what the row has for it."""
    served = sum(row.parts[name] for name in ("weights", "KV cache", "vLLM's own"))
    return min(0.99, -(-100 * served // row.device) / 100)


def answer(
    model: str, gpus: Gpus, estimate: Estimate, found: list[Row], *, tokens: int, length: int, concurrency: int
) -> dict[str, Any]:
    """Everything, as the fields of ``answers.Plan``."""
    best = next((row for row in found if row.fits), None)
    return {
        "model": model, "gpus": gpus.count, "gpu": gpus.name, "bytes_per_gpu": gpus.bytes,
        "tensor_parallel_size": estimate.size, "tokens": tokens, "length": length, "concurrency": concurrency,
        "num_parameters": estimate.num_parameters, "fits": best is not None, "sources": SOURCES,
        "overrides": best.options if best else None, "gpu_memory_utilization": utilization(best) if best else None,
        "choices": [
            {"overrides": row.options, "bytes": row.parts, "total": row.total, "fits": row.fits,
             "largest_micro_batch_tokens": row.largest_tokens, "tokens_per_second": row.tokens_per_second}
            for row in found
        ],
    }  # fmt: skip


def check(gpus: Gpus, size: int, tokens: int, length: int, concurrency: int) -> None:
    """Raise ConfigError for numbers that no plan can be made of."""
    if size < 1 or gpus.count != size:
        raise ConfigError(
            f"--tensor-parallel-size: got {size} for {gpus.count} GPUs, expected as many: a server takes as many GPUs as "
            "its tensor-parallel size; of several servers (replicas) plan one"
        )
    for name, value in (("--tokens", tokens), ("--length", length), ("--concurrency", concurrency)):
        if value < 2 - (name == "--concurrency"):
            raise ConfigError(f"{name}: got {value}, expected a larger number")

"""Does a model fit before anything is started? The memory of one rank, from a config.json.

Weights come from transformers' own class on the meta device and optimizer state from ``Optimizer`` over its shards, so that
both are exact. The activations of a step are a formula with two fitted numbers, put into the planner's own ``MemoryPlan``;
``tests/unit/training/test_estimate.py`` compares them with what the profiling steps of real trainers measured.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from apollo_tp.config import OptimConfig, Precision
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import ConfigError, UnsupportedModelError
from apollo_tp.model.loss import CHUNK_BYTES
from apollo_tp.optim import Optimizer, OptimParameter
from apollo_tp.shards.boxes import Shard
from apollo_tp.training.memory_plan import MemoryPlan

ROW_PARALLEL = ("o_proj.weight", "out_proj.weight", "down_proj.weight")
KEYS_AND_VALUES = ("k_proj.weight", "v_proj.weight")
HIDDEN_KEPT, SHARDED_KEPT = 2.0, 0.88
"""What the backward pass of a compiled layer needs, in elements for each token: so many hidden states, and this share of
what its matrices that are cut by rows put out and those that are cut by columns take in. Fitted to the plans at TP = 1, 2 in
benchmarks/results/2026-11-26_scale_qwen3-8b.json."""
CHUNKS_OF_LOGITS = 2
"""Chunks of fp32 logits that the loss has in memory at once: values and gradients."""
TRAINER_CONTEXT = 1.8e9
"""A trainer's CUDA context, communicators and workspaces: its memory on the device beyond torch's peak, 1.0 to 1.8 GB in
benchmarks/results/*_scale_*.json."""


@dataclass(frozen=True)
class Options:
    """Those of a trainer that decide about memory. ``tokens``: train.max_micro_batch_tokens."""

    tokens: int = 4096
    recompute: bool = False
    in_backward: bool = False
    precision: Precision = Precision.remainder


class LocalGroup(TPGroup):
    """Rank 0 of ``size`` whose partners hold the same numbers: every collective is a local operation of the same size."""

    def all_reduce_(self, tensor: Tensor, op: object = None) -> Tensor:
        return tensor.mul_(self.size)

    def sum_checked(self, tensor: Tensor, what: str) -> Tensor:  # tensors without memory have no canary to read
        return tensor * self.size

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        return tensor[:1] * self.size

    def all_gather(self, tensor: Tensor) -> Tensor:
        return tensor.repeat(self.size, *[1] * (tensor.ndim - 1))


def rank_parameters(named: Mapping[str, Tensor], size: int, kv_heads: int | None = None) -> list[OptimParameter]:
    """Parameters of rank 0 of ``size`` on meta: output projections cut by columns, all other matrices by rows, vectors
    whole. Of fewer than ``size`` ``kv_heads`` each rank holds one.

    ``named``: global tensors by name, [R, C] or [n].
    """
    result = []
    for name, whole in named.items():
        shape = tuple(whole.shape)
        dim = None if len(shape) == 1 or size == 1 else int(name.endswith(ROW_PARALLEL))
        parts = min(size, kv_heads) if kv_heads and name.endswith(KEYS_AND_VALUES) else size
        ranges = () if dim is None else ((0, -(-shape[dim] // parts)),)
        shard = Shard(name, shape, dim, ranges, tuple(range(size)) if dim is None else (0,))
        tensor = nn.Parameter(torch.empty(shard.local_shape, dtype=whole.dtype, device="meta"))
        embedding = "embed_tokens" in name or "lm_head" in name
        role = "embedding" if embedding else "matrix" if len(shape) == 2 else "other"
        result.append(OptimParameter(shard, tensor, role))
    return result


class Estimate:
    """Bytes on one of ``size`` GPUs that serve and train the model of ``config``.

    Raises ConfigError for a size that its heads cannot be divided by, UnsupportedModelError for routed experts, whose
    activations were not measured.
    """

    def __init__(self, config: PretrainedConfig, size: int) -> None:
        self.config, self.size = config.get_text_config(), size
        heads = self.config.num_attention_heads
        if heads % size:
            raise ConfigError(f"--tensor-parallel-size: got {size}, expected a divisor of the model's {heads} heads")
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(self.config, dtype=torch.bfloat16)
        named = dict(module.named_parameters())
        if any(parameter.ndim == 3 and "expert" in name for name, parameter in named.items()):
            raise UnsupportedModelError(
                f"{self.config.model_type}: got routed experts, expected a dense model; start a trainer, which plans its "
                "memory from profiling steps"
            )
        self.num_parameters = sum(parameter.numel() for parameter in named.values())
        self.kv_heads = getattr(self.config, "num_key_value_heads", None) or heads
        self.parameters = rank_parameters(named, size, self.kv_heads)
        self.weights = sum(parameter.tensor.nbytes for parameter in self.parameters)
        self._states: dict[Precision, int] = {}

    def kv_cache(self, tokens: int) -> int:
        """Keys and values of ``tokens`` tokens in bf16, with full attention in every layer."""
        head_dim = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        heads = max(1, -(-self.kv_heads // self.size))
        return int(2 * self.config.num_hidden_layers * heads * head_dim * 2 * tokens)

    def state(self, precision: Precision) -> int:
        """Moments and remainders of APOLLO with its default options."""
        if precision not in self._states:
            optimizer = Optimizer(OptimConfig(), precision, self.parameters, LocalGroup(0, self.size))
            self._states[precision] = optimizer.state_bytes()
        return self._states[precision]

    def plan(self, options: Options, available: int) -> MemoryPlan:
        """What the trainer's own planner will say with ``available`` bytes free: gradients and activations."""
        gradients = 0 if options.in_backward else self.weights

        def plan(tokens: int, largest: int = 0) -> MemoryPlan:
            return MemoryPlan(0, tokens, gradients, self._activations(options, tokens), 0, available, largest)

        largest = bisect.bisect_right(range(1, options.tokens + 1), available, key=lambda tokens: plan(tokens).needed)
        return plan(options.tokens, largest)

    def _activations(self, options: Options, tokens: int) -> int:
        """The most beyond the gradients that are kept: what the layers keep for the backward pass, and the larger of what
        the loss and one layer's backward pass need at that time."""
        hidden, layers = self.config.hidden_size, self.config.num_hidden_layers
        layer = 2 * tokens * (HIDDEN_KEPT * hidden + SHARDED_KEPT * self._sharded_elements() / layers)
        kept = layers * (2 * tokens * hidden if options.recompute else layer)
        head = max(p.tensor.nbytes for p in self.parameters if p.role == "embedding")
        rows = -(-self.config.vocab_size // self.size)
        loss = CHUNKS_OF_LOGITS * min(CHUNK_BYTES, 4 * rows * tokens) + head
        return round(kept + max(loss, 2 * layer if options.recompute else 0))

    def _sharded_elements(self) -> int:
        """Elements for each token, on this rank, that go into or out of the layers' matrices where they are cut."""
        return sum(
            parameter.tensor.shape[1 if parameter.shard.name.endswith(ROW_PARALLEL) else 0]
            for parameter in self.parameters
            if parameter.role == "matrix"
        )


def read_config(model: str) -> PretrainedConfig:
    """The config of a folder or of a name on the hub. Raises ConfigError if there is none."""
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"MODEL: got {model} ({reason}), expected a folder with a config.json, or a name on the Hugging Face hub, where "
            "that can be reached"
        ) from error

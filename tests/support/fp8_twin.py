"""FP8 products as they are defined: quantise, dequantise, multiply in fp32. And a model whose layers fit FP8."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.model import BoundModel, bind_model, fp8
from apollo_tp.model.compiled import CompileOptions
from apollo_tp.shards.boxes import Shard

CONFIG = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 16, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
CUT_ROWS = (*FUSED[0], *FUSED[1], "embed_tokens", "lm_head")
CUT_COLUMNS = ("o_proj", "down_proj")


def dequantised(x: Tensor, dtype: torch.dtype, dim: int | None) -> Tensor:
    """fp32 ``x`` as FP8 has it, with a scale for each index of the other dimension than ``dim``, or one for all."""
    largest = (x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)).clamp(min=1e-30)  # of a row of zeros
    scale = 2 ** torch.floor(torch.log2(torch.finfo(dtype).max / largest.double()))
    return ((x * scale).to(dtype).float() / scale).float()


def twin(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 product of ``x`` [T, C] and ``weight`` [R, C], the gradient of ``x`` and that of ``weight``, for the product's
    gradient ``grad`` [T, R]."""
    x, weight, grad = (tensor.detach().float() for tensor in (x, weight, grad))
    of_rows = 1 if fp8.PER_ROW else None
    out = dequantised(x, fp8.VALUES, of_rows) @ dequantised(weight, fp8.VALUES, of_rows).T
    grad_x = dequantised(grad, fp8.GRADIENTS, of_rows) @ dequantised(weight, fp8.VALUES, None)
    return out, grad_x, dequantised(grad, fp8.GRADIENTS, None).T @ dequantised(x, fp8.VALUES, None)


def bound(tp: TPGroup, *, in_fp8: bool = True, compiled: CompileOptions | None = None, **config: object) -> BoundModel:
    """This rank's part of a model with the same random weights at every size, side by side in memory as vLLM has them."""
    hf_config = Qwen3Config(**(CONFIG | config))
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(hf_config).named_parameters()}
    generator = torch.Generator().manual_seed(1)
    shards: dict[str, tuple[Shard, Tensor]] = {}
    whole = {
        name: torch.randn(shape, generator=generator) * 0.1 if len(shape) > 1 else torch.ones(shape)
        for name, shape in shapes.items()
    }
    for name, values in whole.items():
        owner, dim = name.split(".")[-2], None
        if tp.size > 1:
            dim = 0 if owner in CUT_ROWS else 1 if owner in CUT_COLUMNS else None
        if dim is None:
            shard = Shard(name, tuple(values.shape), None, (), tuple(range(tp.size)))
        else:
            share = values.shape[dim] // tp.size
            shard = Shard(name, tuple(values.shape), dim, ((tp.rank * share, (tp.rank + 1) * share),), (tp.rank,))
            values = values.narrow(dim, tp.rank * share, share)
        shards[name] = (shard, values.bfloat16().contiguous())
    fused = [[name.replace(f".{group[0]}.", f".{part}.") for part in group]
             for group in FUSED for name in whole if f".{group[0]}.weight" in name]  # fmt: skip
    for names in fused:
        side_by_side = torch.cat([shards[name][1] for name in names])
        rows = [shards[name][1].shape[0] for name in names]
        shards |= {name: (shards[name][0], part) for name, part in zip(names, side_by_side.split(rows), strict=True)}
    return bind_model(hf_config, shards, tp, fused_tensors=fused, fp8=in_fp8, compiled=compiled)


def relative(got: Tensor, expected: Tensor) -> float:
    """The norm of the difference by the norm of what is expected."""
    return float((got.float() - expected.float()).norm() / expected.float().norm())

"""The usual way to train the same model: its own copy of the weights, sharded by FSDP2, torch's fused AdamW, all in bf16.

    torchrun --standalone --nproc-per-node 2 benchmarks/baseline_fsdp2.py --sequences 1 --compile    # run by bench_step.py

FSDP is data parallel: each of the p ranks takes ``--sequences`` whole sequences of its own, so that a step has
p x sequences x tokens tokens, and tokens/s counts them all. Attention is torch's scaled_dot_product_attention without
padding; every block is a unit of sharding and, with ``--compile``, of torch.compile. Gradients are not clipped, which
spares this baseline one reduction that our own step has. Prints one JSON object, on its last line.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from server_stack import QWEN3_8B, TINY, tflops_per_gpu
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

WARM_UP_STEPS = 3
"""Compilation, the allocator's growth and the optimizer's first allocation."""


def build(config: Qwen3Config, device: torch.device, options: argparse.Namespace) -> PreTrainedModel:
    """Random weights, the same on all ranks, then sharded block by block; the root unit is embedding, norm and head."""
    torch.manual_seed(0)
    config.use_cache = False
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    if options.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if options.matmul != "served":
        multiply_in_fp8(model, device, gather=options.matmul == "fp8-gather")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.model.layers:
        if options.compile:
            block.forward = torch.compile(block.forward)  # sharding's hooks stay outside
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model.train()


def multiply_in_fp8(model: PreTrainedModel, device: torch.device, *, gather: bool) -> None:
    """torchao's tensorwise recipe for the linear layers of the blocks; ``gather``: FSDP gathers their weights in FP8."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # here: the other rows do without

    config = Float8LinearConfig(enable_fsdp_float8_all_gather=gather, emulate=device.type != "cuda")
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: ".layers." in name)


def precompute_scales(model: PreTrainedModel) -> None:
    """One reduction for the scales of all weights, as torchao recommends after a step where weights are gathered in FP8."""
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    precompute_float8_dynamic_scale_for_fsdp(model)


def measure(model: PreTrainedModel, device: torch.device, options: argparse.Namespace) -> dict[str, float]:
    """Figures of this rank: median seconds of a step, bytes of its share of the weights, peak bytes, last loss (nats)."""
    cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    generator = torch.Generator().manual_seed(dist.get_rank())
    shape = (options.sequences, options.tokens)
    ids = torch.randint(0, model.config.vocab_size, shape, generator=generator).to(device)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(WARM_UP_STEPS + options.steps):
        dist.barrier()
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if options.matmul == "fp8-gather":
            precompute_scales(model)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return {
        "step_seconds": statistics.median(seconds[WARM_UP_STEPS:]),
        "weight_bytes": sum(t.nbytes for t in local),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
        "loss": loss.item(),
    }


def report(ranks: list[dict[str, float]], num_parameters: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row from the figures of all ranks; a step takes as long as its slowest rank."""
    per_rank = options.sequences * options.tokens
    tokens, seconds = per_rank * len(ranks), max(r["step_seconds"] for r in ranks)
    return {
        "tokens_per_step": tokens,
        "tokens_per_rank": per_rank,
        "tokens_per_second": tokens / seconds,
        "tflops_per_gpu": tflops_per_gpu(num_parameters, tokens, seconds, len(ranks)),
        "step_seconds": seconds,
        "num_parameters": num_parameters,
        "weights_gb": [r["weight_bytes"] / 1e9 for r in ranks],
        "peak_memory_gb": [r["peak_memory_bytes"] / 1e9 for r in ranks if r["peak_memory_bytes"]],
        "loss": statistics.mean(r["loss"] for r in ranks),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--sequences", type=int, default=1, help="sequences of a rank per step")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--matmul", choices=["served", "fp8", "fp8-gather"], default="served", help="fp8: by torchao")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # no NVLink multicast, which shared hosts may not allow
    dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(seconds=120))
    model = build(Qwen3Config(**(TINY if options.tiny else QWEN3_8B)), device, options)
    mine = measure(model, device, options)
    figures = torch.tensor(list(mine.values()), dtype=torch.float64, device=device)
    gathered = [torch.empty_like(figures) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, figures)
    if dist.get_rank() == 0:
        ranks = [dict(zip(mine, row.tolist(), strict=True)) for row in gathered]
        print(json.dumps(report(ranks, sum(p.numel() for p in model.parameters()), options)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

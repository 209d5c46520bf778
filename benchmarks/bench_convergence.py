"""Does APOLLO train as AdamW does, does the number of ranks matter, and what does rounding to bf16 lose?

    torchrun --standalone --nproc-per-node 2 benchmarks/bench_convergence.py        # two CPU cores, some minutes

Trains a byte-level Llama of 0.9M parameters (transformers' class) on English text that ships with CPython (the language
reference in ``pydoc_data.topics``, 0.7 MB). Part 1, from scratch in fp32: AdamW, APOLLO and APOLLO-Mini, the last two with
the optimizer on one rank and on two. Part 2, from the weights of part 1 at fine-tuning rates in bf16: what is left of the
fp32 run's displacement under nearest, stochastic and remainder writes.

At two ranks the optimizer is sharded exactly as beside a tensor-parallel server (column and row cuts, collectives over
gloo); the model itself is whole on every rank, so that nothing but the optimizer differs. Writes a table and a plot into
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import pydoc_data.topics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from apollo_tp.config import EmbeddingMode, OptimConfig, OptimizerKind, Precision, Schedule
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.optim import Optimizer, OptimParameter
from apollo_tp.shards.boxes import Shard

RESULTS = Path(__file__).parent / "results"
ROW_PARALLEL = ("o_proj.weight", "down_proj.weight")


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=False,
        )
    )


class Text:
    """Bytes of the language reference; batches by step number; a held-out end that is never trained on."""

    def __init__(self, batch: int, length: int) -> None:
        text = "\n".join(pydoc_data.topics.topics.values()).encode()
        self.data = torch.tensor(list(text), dtype=torch.long)
        self.split, self.batch, self.length = int(len(text) * 0.9), batch, length

    def train(self, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(self.split - self.length, (self.batch,), generator=generator)
        return torch.stack([self.data[s : s + self.length] for s in starts])

    def held_out(self) -> torch.Tensor:
        starts = torch.linspace(self.split, len(self.data) - self.length, 32).long()
        return torch.stack([self.data[s : s + self.length] for s in starts])


def shard_of(name: str, shape: tuple[int, ...], tp: TPGroup) -> Shard:
    """Column-parallel but for the row-parallel linears; one-dimensional parameters on every rank."""
    if len(shape) == 1 or tp.size == 1:
        return Shard(name, shape, None, (), tuple(range(tp.size)))
    dim = 1 if name.endswith(ROW_PARALLEL) else 0
    width = shape[dim] // tp.size
    return Shard(name, shape, dim, ((tp.rank * width, (tp.rank + 1) * width),), (tp.rank,))


class Run:
    """One training run: a whole model, and an optimizer over this rank's views of it."""

    def __init__(self, start: dict | None, config: OptimConfig, precision: Precision | None, tp: TPGroup) -> None:
        self.model, self.tp, self.parts = make_model(), tp, []
        if start is not None:
            self.model.load_state_dict(start)
        if precision is not None:
            self.model.to(torch.bfloat16)
        parameters = []
        for name, whole in self.model.named_parameters():
            shard = shard_of(name, tuple(whole.shape), tp)
            view = whole.data
            if shard.dim is not None:
                begin, end = shard.ranges[0]
                view = whole.data.narrow(shard.dim, begin, end - begin)
            role = "embedding" if "embed" in name or "lm_head" in name else "matrix" if whole.ndim == 2 else "other"
            parameters.append(OptimParameter(shard, torch.nn.Parameter(view), role))
            self.parts.append((shard, whole, parameters[-1].tensor))
        self.optimizer = Optimizer(config, precision or Precision.remainder, parameters, tp)

    def step(self, tokens: torch.Tensor) -> float:
        self.model.zero_grad()
        loss = self.model(tokens, labels=tokens).loss
        loss.backward()
        for shard, whole, local in self.parts:
            gradient = whole.grad
            if shard.dim is not None:
                gradient = gradient.narrow(shard.dim, shard.ranges[0][0], shard.local_shape[shard.dim])
            local.grad = gradient
        outcome = self.optimizer.step(loss=loss.detach())
        assert not outcome.skipped, outcome.skipped
        self.share_weights()
        return loss.item()

    @torch.no_grad()
    def share_weights(self) -> None:
        """Give every rank's model the parts that the others wrote."""
        for shard, whole, local in self.parts:
            if shard.dim is not None:
                pieces = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(self.tp.size)]
                dist.all_gather(pieces, local.detach().contiguous(), group=self.tp.group)
                whole.copy_(torch.cat(pieces, shard.dim))

    @torch.no_grad()
    def held_out_loss(self, text: Text) -> float:
        tokens = text.held_out()
        return float(self.model(tokens, labels=tokens).loss)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().float().clone() for name, value in self.model.state_dict().items()}


def from_scratch(kind: OptimizerKind, tp: TPGroup, text: Text, args: argparse.Namespace) -> dict:
    """Loss curve, end loss and weights of one fp32 run."""
    config = OptimConfig(
        kind=kind,
        rank=32,
        lr=args.lr,
        schedule=Schedule.cosine,
        warmup_steps=args.steps // 10,
        total_steps=args.steps,
        embeddings=EmbeddingMode.adamw,
        check_replicas_every=0,
        max_relative_update=1.0,
    )
    run, begin = Run(None, config, None, tp), time.perf_counter()
    curve = [run.step(text.train(step)) for step in range(args.steps)]
    end = run.held_out_loss(text)
    state = run.optimizer.state_bytes()
    took = time.perf_counter() - begin
    return {"curve": curve, "end": end, "state": state, "weights": run.weights(), "seconds": took}


def fine_tune(start: dict, lr: float, precision: Precision | None, text: Text, args: argparse.Namespace) -> dict:
    """Weights and held-out loss after some steps from ``start`` (already exact in bf16); None is fp32."""
    config = OptimConfig(rank=32, lr=lr, check_replicas_every=0, embeddings=EmbeddingMode.project)
    run = Run(start, config, precision, TPGroup.single())
    for step in range(args.tune_steps):
        run.step(text.train(10_000 + step))
    return {"end": run.held_out_loss(text), "weights": run.weights()}


def displacement(end: dict, start: dict) -> torch.Tensor:
    return torch.cat([(end[name] - start[name]).flatten() for name in start])


def in_parallel(jobs: list, rank: int) -> list:
    """Results of independent single-process jobs, dealt over the ranks, on every rank."""
    own = {i: job() for i, job in enumerate(jobs) if i % dist.get_world_size() == rank}
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return [next(part[i] for part in gathered if i in part) for i in range(len(jobs))]


def write_report(scratch: dict[str, dict], tuned: dict, elements: int, args: argparse.Namespace) -> str:
    lines = [
        f"# Convergence: a byte-level Llama of {elements / 1e6:.2g}M parameters",
        "",
        f"{datetime.date.today()}, {platform.machine()}, torch {torch.__version__}, "
        f"{dist.get_world_size()} processes of {torch.get_num_threads()} thread(s)",
        f"Command: `torchrun --standalone --nproc-per-node 2 {' '.join(sys.argv)}`",
        "",
        f"From scratch, fp32, {args.steps} steps of {args.batch} x {args.length} bytes, lr {args.lr:g}, rank 32:",
        "",
        "| optimizer | loss of the last ten steps | held-out loss | largest difference to one rank | state on a rank, MB |",
        "|---|---|---|---|---|",
    ]
    for label, row in scratch.items():
        apart = "" if "apart" not in row else f"{row['apart']:.1e} of a loss of {row['curve'][0]:.2f}"
        last = sum(row["curve"][-10:]) / 10
        lines.append(f"| {label} | {last:.3f} | {row['end']:.3f} | {apart} | {row['state'] / 1e6:.2f} |")
    lines += [
        "",
        'All at one learning rate and one seed, AdamW not tuned: read it as "APOLLO trains, the number of ranks does not '
        'matter", not as a ranking.',
        "",
        f"Fine-tuning in bf16, {args.tune_steps} steps of APOLLO from the AdamW run. *Kept* is the part of the fp32 run's "
        "displacement that the served bf16 weights made, <d, d32> / <d32, d32>; *error* is ‖d - d32‖ / ‖d32‖.",
        "",
        "| lr | precision | kept | error | held-out loss (fp32 run; before) |",
        "|---|---|---|---|---|",
    ]
    for (lr, label), row in tuned.items():
        lines.append(
            f"| {lr:g} | {label} | {row['kept']:.0%} | {row['error']:.2f} | "
            f"{row['end']:.4f} ({row['reference']:.4f}; {row['before']:.4f}) |"
        )
    return "\n".join(lines) + "\n"


def plot(scratch: dict[str, dict], tuned: dict, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for label, row in scratch.items():
        two = "2 ranks" in label
        color = {"adamw": "black", "apollo": "tab:blue", "apollo_mini": "tab:orange"}[label.split(",")[0]]
        left.plot(row["curve"], color=color, linewidth=1 if two else 3, alpha=1 if two else 0.4, label=label)
        left.lines[-1].set_linestyle("--" if two else "-")
    left.set(xlabel="step", ylabel="training loss, nats per byte", title="from scratch, fp32")
    left.legend(fontsize=8)
    rates = sorted({lr for lr, _ in tuned})
    for i, precision in enumerate(("nearest", "stochastic", "remainder")):
        heights = [100 * tuned[lr, precision]["kept"] for lr in rates]
        right.bar([x + 0.27 * (i - 1) for x in range(len(rates))], heights, 0.25, label=precision)
    right.set_xticks(range(len(rates)), [f"{lr:g}" for lr in rates])
    right.axhline(100, color="black", linewidth=0.8)
    right.set(xlabel="learning rate", ylabel="kept of the fp32 displacement, %", title="bf16 weights, no fp32 master")
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tune-steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=30))
    torch.set_num_threads(1)
    tp, one = TPGroup(dist.get_rank(), dist.get_world_size(), dist.group.WORLD), TPGroup.single()
    text, kinds = Text(args.batch, args.length), (OptimizerKind.adamw, OptimizerKind.apollo, OptimizerKind.apollo_mini)
    alone = in_parallel([lambda k=kind: from_scratch(k, one, text, args) for kind in kinds], tp.rank)
    scratch = {f"{kind.value}, 1 rank": row for kind, row in zip(kinds, alone, strict=True)}
    for kind in kinds[1:]:
        row, first = from_scratch(kind, tp, text, args), scratch[f"{kind.value}, 1 rank"]
        row["apart"] = max(abs(a - b) for a, b in zip(row["curve"], first["curve"], strict=True))
        scratch[f"{kind.value}, {tp.size} ranks"] = row
    start = {name: value.bfloat16().float() for name, value in alone[0]["weights"].items()}
    cases = [(lr, precision) for lr in (1e-5, 3e-5, 1e-4) for precision in (None, *Precision)]
    ends = in_parallel([lambda c=case: fine_tune(start, *c, text, args) for case in cases], tp.rank)
    results, before, tuned = dict(zip(cases, ends, strict=True)), Run(start, OptimConfig(), None, one), {}
    for (lr, precision), row in results.items():
        if precision is not None:
            exact = displacement(results[lr, None]["weights"], start)
            moved = displacement(row["weights"], start)
            tuned[lr, precision.value] = {
                "kept": float(moved @ exact / (exact @ exact)),
                "error": float((moved - exact).norm() / exact.norm()),
                "end": row["end"],
                "reference": results[lr, None]["end"],
                "before": before.held_out_loss(text),
            }
    if tp.rank == 0:
        report = write_report(scratch, tuned, sum(v.numel() for v in start.values()), args)
        print(report)
        args.out.mkdir(exist_ok=True, parents=True)
        (args.out / "convergence.md").write_text(report)
        plot(scratch, tuned, args.out / "convergence.png")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

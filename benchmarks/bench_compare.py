"""How far apart are trainer and server over one set of weights, and what would a mistake look like? In nats.

    python benchmarks/bench_compare.py --out benchmarks/results      # 2 GPUs, 8.19B Qwen3 shape, random weights
    python benchmarks/bench_compare.py --tp 1 --tiny                 # rehearsal on any machine

The measure is that of ``apollo-tp compare``: log-probabilities of the same random tokens from both. Then the trainer's
numbers are kept and one layer's part is taken out of what is served: the least that a wrong trainer shows. Last, some
steps on a few samples, these tokens among them: training makes logits large, and what they are rounded to as well.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
from bench_hogwild import ServedWeights
from rich.console import Console
from rich.table import Table
from server_stack import QWEN3_8B, TINY, Served, Training, device_name, random_samples, serving, training, write_results

from apollo_tp.cli.compare import ask_server, gap, random_tokens, score_request, served_logprobs

BLOCKS, STEPS = 8, 2
"""As many rows, after as many steps each."""
LEARNING_RATE = 1e-5
"""Ten times as much learns the samples by heart in three steps: certain tokens have no gap left to see."""
WRONG = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
"""Made zero in the middle layer, one after the other."""


def scored(trainer: Training, tokens: list[int]) -> dict[str, Any]:
    answer = httpx.post(f"{trainer.url}/train/score", json=score_request(tokens, 1), timeout=300)
    return answer.raise_for_status().json()  # type: ignore[no-any-return]


def served_now(served: Served, tokens: list[int]) -> list[float]:
    return served_logprobs(ask_server(served.url, "demo", tokens).raise_for_status(), tokens)


def measure(
    served: Served, trainer: Training, weights: ServedWeights, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row per state of the weights."""
    tokens, rows = random_tokens(options.tokens, options.vocab_size), []

    def row(what: str, by_trainer: dict[str, Any], by_server: list[float]) -> None:
        rows.append(
            {"what": what, "mean_logprob": sum(by_server) / len(by_server)} | asdict(gap(by_trainer, by_server))
        )

    first = scored(trainer, tokens)
    row("as served", first, served_now(served, tokens))
    layer = options.layers // 2
    for name in WRONG:
        with weights.without(f"model.layers.{layer}.{name}"):
            row(f"layer {layer} of {options.layers} served without {name}", first, served_now(served, tokens))
    row("put back", first, served_now(served, tokens))
    # random ones alone would stay as improbable as they were
    samples = [
        {"context_ids": tokens[:1], "continuation_ids": tokens[1:]},
        *random_samples(3, len(tokens), options.vocab_size),
    ]
    for block in range(1, BLOCKS + 1):
        job = trainer.submit({"samples": samples, "max_steps": STEPS, "epochs": STEPS, "batch_size": 4, "wait": True})
        assert job["state"] == "succeeded", job["error"]
        loss = trainer.steps(job["id"])[-1]["train_loss"]
        row(f"after {block * STEPS} steps, loss {loss:.2f}", scored(trainer, tokens), served_now(served, tokens))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a model for any machine")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="as many log-probabilities, less one")
    parser.add_argument("--server-args", default="", help="further options of the vLLM server, in one string")
    parser.add_argument("--overrides", default="", help="further options of the trainer, in one string")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    config = TINY if options.tiny else QWEN3_8B
    options.vocab_size, options.layers = config["vocab_size"], config["num_hidden_layers"]
    overrides = ["train.max_sequence_tokens=256", "train.max_micro_batch_tokens=256", "checkpoint.resume=false",
                 f"optim.lr={LEARNING_RATE}", *shlex.split(options.overrides)]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="apollo_tp-") as name:
        folder = Path(name)
        with serving(folder, config, tp=options.tp, extra=shlex.split(options.server_args)) as served:
            weights = ServedWeights(served.runtime_dir / "demo")
            weights.randomise()  # dummy weights give every token the same probability
            with training(served, folder / "state", tp=options.tp, overrides=overrides) as trainer:
                rows = measure(served, trainer, weights, options)
    report(rows, options)
    return 0


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    title = f"bench_compare: TP = {options.tp}, {device_name()}, {datetime.date.today().isoformat()}"
    table = Table(title=title)
    for column in ("served weights", "mean log-probability", "mean gap, nats", "largest gap, nats"):
        table.add_column(column, justify="left" if column == "served weights" else "right")
    for row in rows:
        values = (row["mean_logprob"], row["mean_gap_nats"], row["largest_gap_nats"])
        table.add_row(row["what"], *(f"{value:.4f}" for value in values))
    Console(width=130).print(table)
    write_results(options.out, "compare", options.tp, rows)


if __name__ == "__main__":
    sys.exit(main())

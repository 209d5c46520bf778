"""What the demos share: their command, what they ask of servers and coordinator, and the texts that they train on."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from apollo_tp.errors import ConfigError
from apollo_tp.runtime import owned_folder
from apollo_tp.shards.instance import read_instance
from apollo_tp.shards.mapping import map_rank
from tests.support.demo_model import standard_library_text

SAMPLE_CHARS = 450
NUM_HELDOUT = 6
ENDED = ("succeeded", "failed", "cancelled")
console = Console(stderr=True)


@dataclass(frozen=True)
class Demo:
    """What a demo's command does: ``run(out, runtime_dir, steps, server_args)`` makes the figures, ``outputs`` are the names
    of what it leaves in its folder, and ``kept`` says whether the figures are what was promised."""

    name: str
    purpose: str | None
    title: str
    outputs: tuple[str, ...]
    run: Callable[[Path, Path, int, list[str]], dict[str, Any]]
    kept: Callable[[dict[str, Any]], bool]
    num_steps: int = 40

    def main(self) -> int:
        """Run it with the arguments of the command line; returns 0 if every promise held."""
        out = Path("out") / self.name.removeprefix("examples.").replace(".", "-")
        parser = argparse.ArgumentParser(prog=f"python -m {self.name}", description=self.purpose)
        parser.add_argument("--out", type=Path, default=out, help="folder of logs, model and result.json")
        parser.add_argument("--steps", type=int, default=self.num_steps, help="optimizer steps")
        parser.add_argument("--server-args", default="", help="further options of the vLLM servers, in one string")
        arguments = parser.parse_args()
        logging.getLogger("httpx").setLevel(logging.WARNING)
        disable_progress_bar()
        try:
            prepare(arguments.out, self.outputs)
        except ConfigError as error:
            parser.error(str(error))
        started, server_args = time.monotonic(), shlex.split(arguments.server_args)
        # A signal that stops the demo stops what it started: the exception runs the finally clauses.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(f"got {signal.Signals(number).name}"))
        # Unix socket paths are short: the runtime folder cannot lie deep in a checkout.
        with tempfile.TemporaryDirectory(prefix="apollo_tp-") as runtime_dir:
            try:
                result = self.run(arguments.out.resolve(), Path(runtime_dir), arguments.steps, server_args)
            except ConfigError as error:
                raise SystemExit(f"{self.name}: {error}") from error
        result["wall_s"] = round(time.monotonic() - started, 1)
        (arguments.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        table = Table(title=self.title, show_header=False)
        for key, value in result.items():
            if not isinstance(value, list):  # lists are for the file
                table.add_row(key, _shown(value))
        Console().print(table)
        return 0 if self.kept(result) else 1


def _shown(value: Any) -> str:
    """A figure, or one by name."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(each)}" for name, each in value.items())
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def prepare(out: Path, outputs: tuple[str, ...]) -> None:
    """Make ``out`` the demo's folder, without the ``outputs`` that an earlier demo left there. Raises ConfigError for a
    folder that no demo made: nothing in it is touched."""
    owned_folder.claim(out, "demo", "--out")
    for name in outputs:
        if (out / name).is_dir() and not (out / name).is_symlink():
            shutil.rmtree(out / name)
        else:
            (out / name).unlink(missing_ok=True)


def texts() -> tuple[list[str], list[str]]:
    """Samples to train on, and held-out ones from other files."""
    files = standard_library_text(min_chars=SAMPLE_CHARS * 2, max_files=100)
    heldout = [text[SAMPLE_CHARS : 2 * SAMPLE_CHARS] for text in files[:NUM_HELDOUT]]
    cut = [f[i : i + SAMPLE_CHARS] for f in files[NUM_HELDOUT:] for i in range(0, len(f) - SAMPLE_CHARS, SAMPLE_CHARS)]
    return cut, heldout


def logprobs(url: str, text: str) -> list[float]:
    """vLLM's log-probability (nats) of each prompt token but the first."""
    body = {"model": "demo", "prompt": text, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    answer = post(f"{url}/v1/completions", body)
    return [next(iter(entry.values()))["logprob"] for entry in answer["choices"][0]["prompt_logprobs"][1:]]


def mean_logprob(url: str, texts: list[str]) -> float:
    values = [value for text in texts for value in logprobs(url, text)]
    return sum(values) / len(values)


def bit_identical(folder: Path, instance: Path, dtype: torch.dtype | str = "auto") -> bool:
    """Compare every tensor of the folder, as transformers loads it in ``dtype``, with the memory that each rank
    serves from."""
    state = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()
    manifests = read_instance(instance)
    for rank in range(len(manifests)):
        mapped = map_rank(manifests, rank)
        for name, (shard, local) in mapped.tensors.items():
            for box, start in shard.boxes:
                part = state[name][tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))]
                mine = local if shard.dim is None else local.narrow(shard.dim, start, box.shape[shard.dim])
                if not torch.equal(part, mine.cpu()):
                    return False
    return True


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    response = httpx.post(url, json=body, timeout=120)
    if response.is_error:
        raise SystemExit(f"{url}: got {response.status_code}: {response.text}")
    return response.json()  # type: ignore[no-any-return]

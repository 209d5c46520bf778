"""What the demos ask of servers and of the coordinator, and the texts that they train on."""

from __future__ import annotations

import argparse
import contextlib
import logging
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from apollo_tp.errors import ConfigError
from apollo_tp.runtime import owned_folder
from tests.support.demo_model import standard_library_text

SAMPLE_CHARS = 450
NUM_HELDOUT = 6
ENDED = ("succeeded", "failed", "cancelled")
console = Console(stderr=True)


@contextlib.contextmanager
def prepared(parser: argparse.ArgumentParser, out: Path, outputs: tuple[str, ...]) -> Iterator[Path]:
    """Makes ``out`` the demo's folder, and yields a runtime folder for its processes."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    disable_progress_bar()
    try:
        prepare(out, outputs)
    except ConfigError as error:
        parser.error(str(error))
    # A signal that stops the demo stops what it started: the exception runs the finally clauses.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(f"got {signal.Signals(number).name}"))
    # Unix socket paths are short: the runtime folder cannot lie deep in a checkout.
    with tempfile.TemporaryDirectory(prefix="apollo_tp-") as runtime_dir:
        yield Path(runtime_dir)


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


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    response = httpx.post(url, json=body, timeout=120)
    if response.is_error:
        raise SystemExit(f"{url}: got {response.status_code}: {response.text}")
    return response.json()  # type: ignore[no-any-return]

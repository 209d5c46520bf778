"""What the benchmarks of a live system share: model shapes, a vLLM server with dummy weights, a trainer beside it, a report.

A server serves any shape from its configuration alone (``--load-format dummy``), so no checkpoint is needed.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import math
import os
import platform
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import Qwen3Config

from apollo_tp.shards.instance import read_instance
from apollo_tp.shards.manifest import Manifest
from tests.support.processes import ManagedProcess, coordinator_url, free_port, start_server, start_trainer

QWEN3_8B = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 8192,
    "tie_word_embeddings": False, "architectures": ["Qwen3ForCausalLM"], "dtype": "bfloat16",
}  # fmt: skip
"""An 8.19B Qwen3 shape."""
TINY = QWEN3_8B | {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 32,
}  # fmt: skip
"""The same architecture for a rehearsal on any machine; vLLM has CPU attention for heads of 32 and more."""
QWEN3_32B = QWEN3_8B | {
    "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64,
    "max_position_embeddings": 40960, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip
QWEN35_27B_TEXT = {
    "vocab_size": 248320, "hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 64,
    "num_attention_heads": 24, "num_key_value_heads": 4, "head_dim": 256, "linear_num_key_heads": 16,
    "linear_num_value_heads": 48, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "tie_word_embeddings": False,
}  # fmt: skip
TINY_QWEN35_TEXT = QWEN35_27B_TEXT | {
    "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
"""Gated-delta-net heads stay at 128: vLLM's CPU kernels take no other width."""


MPS_SCRIPT = Path(__file__).parents[1] / "launch" / "mps.sh"


def qwen35(text: dict[str, Any]) -> dict[str, Any]:
    """The config around ``text`` as published: vLLM 0.26 knows Qwen3.5 only with a vision tower, here a small one, which
    ``--language-model-only`` leaves out."""
    vision = {
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 4,
        "out_hidden_size": text["hidden_size"],
    }
    return {
        "text_config": text, "vision_config": vision, "tie_word_embeddings": False, "dtype": "bfloat16",
        "architectures": ["Qwen3_5ForConditionalGeneration"],
    }  # fmt: skip


COMMON = (
    "--load-format", "dummy", "--skip-tokenizer-init", "--max-model-len", "8192", "--max-num-seqs", "64",
    "--no-enable-prefix-caching",
)  # fmt: skip
"""Options of every server. A prefix cache would hold entries of older weights."""


@dataclass(frozen=True)
class Served:
    """A live vLLM server: ``url`` of its HTTP port, and the runtime folder of its manifests."""

    url: str
    model: Path
    runtime_dir: Path
    process: ManagedProcess
    instance: str = "demo"

    def manifests(self) -> list[Manifest]:
        """What each rank published."""
        return read_instance(self.runtime_dir / self.instance)

    def weight_bytes(self) -> list[int]:
        """Bytes of the served weights on each rank."""
        return [
            sum(math.prod(t.shape) * getattr(torch, t.dtype).itemsize for t in manifest.served)
            for manifest in self.manifests()
        ]


@dataclass(frozen=True)
class Training:
    """A trainer beside a server; ``url`` is its coordinator's."""

    url: str
    process: ManagedProcess

    def status(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/train/status", timeout=30).json()  # type: ignore[no-any-return]

    def submit(self, body: dict[str, Any]) -> dict[str, Any]:
        """POST /train; returns the job, which has ended if ``body`` says ``wait``."""
        return httpx.post(f"{self.url}/train", json=body, timeout=580).raise_for_status().json()  # type: ignore[no-any-return]

    def steps(self, job_id: str) -> list[dict[str, Any]]:
        """The metrics of each completed step of a job, with the ``time`` (Unix, seconds) when the coordinator had them."""
        events = httpx.get(f"{self.url}/train/jobs/{job_id}/events", timeout=30).json()["data"]
        return [event["data"] | {"time": event["time"]} for event in events if event.get("type") == "metrics"]


@contextlib.contextmanager
def serving(
    folder: Path,
    config: dict[str, Any],
    *,
    tp: int,
    extra: Sequence[str] = (),
    environment: dict[str, str] | None = None,
    config_class: type = Qwen3Config,
    seconds: float = 400,
) -> Iterator[Served]:
    """A vLLM server of a model with this configuration and dummy weights; it is stopped at the end, its log shown if that
    is an error, or SIGTERM as ``timeout`` sends it. Within ``sharing_a_server`` it stays for who wants the same next."""
    signal.signal(signal.SIGTERM, _leave)
    options = (config, tp, extra, environment, config_class, seconds)
    if _shared is None:
        with _server(folder, *options) as served:
            yield served
        return
    key = json.dumps([config, tp, list(extra), environment or {}])
    if _shared.key != key or _shared.served is None or _shared.served.process.process.poll() is not None:
        _shared.server.close()
        _shared.key, place = key, _shared.folder / str(next(_shared.numbers))
        place.mkdir()
        try:
            _shared.served = _shared.server.enter_context(_server(place, *options))
        except BaseException:
            _shared.served = None
            raise
    yield _shared.served


@dataclass
class _Shared:
    """The server that stays, and what it was started with."""

    folder: Path
    key: str = ""
    served: Served | None = None
    server: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    numbers: Iterator[int] = field(default_factory=itertools.count)


_shared: _Shared | None = None


@contextlib.contextmanager
def sharing_a_server() -> Iterator[None]:
    """Benchmarks that run in this process, one after the other, share a server where they want the same one."""
    global _shared
    with tempfile.TemporaryDirectory(prefix="apollo_tp-") as name:
        _shared = _Shared(Path(name))
        try:
            with _shared.server:
                yield
        finally:
            _shared = None


@contextlib.contextmanager
def _server(
    folder: Path,
    config: dict[str, Any],
    tp: int,
    extra: Sequence[str],
    environment: dict[str, str] | None,
    config_class: type,
    seconds: float,
) -> Iterator[Served]:
    config_class(**config).save_pretrained(folder / "model")
    with _started(folder, "demo", tp, extra, environment) as served:
        _await(served, seconds)
        yield served


@contextlib.contextmanager
def serving_replicas(
    folder: Path, config: dict[str, Any], count: int, *, extra: Sequence[str] = (), seconds: float = 400
) -> Iterator[list[Served]]:
    """Servers of this configuration at TP = 1, each with a GPU or core of its own and the same dummy weights: the
    instances replica-0, replica-1 and so on."""
    signal.signal(signal.SIGTERM, _leave)
    Qwen3Config(**config).save_pretrained(folder / "model")
    with contextlib.ExitStack() as stack:
        servers = []
        for index in range(count):
            core = str(index % (os.cpu_count() or 1))
            environment = {"CUDA_VISIBLE_DEVICES": str(index), "VLLM_CPU_OMP_THREADS_BIND": core}
            servers.append(stack.enter_context(_started(folder, f"replica-{index}", 1, extra, environment)))
        for served in servers:
            _await(served, seconds)
        yield servers


@contextlib.contextmanager
def _started(
    folder: Path, instance: str, tp: int, extra: Sequence[str], environment: dict[str, str] | None
) -> Iterator[Served]:
    """A server that need not be up yet."""
    runtime_dir, port = folder / "rt", free_port()
    runtime_dir.mkdir(mode=0o700, exist_ok=True)
    server = start_server(
        folder / "model", port, runtime_dir, folder / f"{instance}.log", tensor_parallel=tp, instance=instance,
        extra=[*COMMON, *extra], environment=environment,
    )  # fmt: skip
    try:
        yield Served(f"http://127.0.0.1:{port}", folder / "model", runtime_dir, server, instance)
    except BaseException:
        note(server.tail(40))
        raise
    finally:
        server.stop()


def _await(served: Served, seconds: float) -> None:
    begun = time.monotonic()
    served.process.wait_for(f"{served.url}/health", seconds)
    note(f"{served.instance}: up after {time.monotonic() - begun:.0f} s")


@contextlib.contextmanager
def training(
    served: Served,
    state: Path,
    *,
    tp: int,
    overrides: Sequence[str] = (),
    environment: dict[str, str] | None = None,
    seconds: float = 240,
) -> Iterator[Training]:
    """A trainer of ``served``, and with ``server.replicas`` among the ``overrides`` of all servers in its runtime folder, of
    which it must then be the first; stopped at the end, and its log shown if it fails."""
    state.mkdir(parents=True, exist_ok=True)
    fixed = ["checkpoint.after_idle_seconds=null", "optim.max_relative_update=1000"]
    if not any(each.startswith("server.replicas=") for each in overrides):
        fixed.append(f"server.instance={served.instance}")
    trainer = start_trainer(
        served.runtime_dir,
        state,
        state / "trainer.log",
        num_ranks=tp,
        overrides=[*fixed, *overrides],
        environment=environment,
    )
    begun = time.monotonic()
    try:
        url = coordinator_url(served.runtime_dir, trainer, instance=served.instance, seconds=seconds)
        note(f"trainer up after {time.monotonic() - begun:.0f} s")
        yield Training(url, trainer)
    except BaseException:
        note(trainer.tail(200))
        raise
    finally:
        trainer.stop()


def _leave(*_: object) -> None:
    """Else what was started would live on, and keep its memory. Once: ``timeout`` sends two signals, of which the second
    would interrupt the clearing up."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


def note(text: str) -> None:
    """A line for whoever waits, beside the table."""
    print(text, file=sys.stderr, flush=True)


def random_samples(count: int, tokens: int, vocab_size: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """``count`` samples of ``tokens`` random token ids, all but the first of which are trained on."""
    draw = random.Random(seed)
    rows = [[draw.randrange(vocab_size) for _ in range(tokens)] for _ in range(count)]
    return [{"context_ids": row[:1], "continuation_ids": row[1:]} for row in rows]


def device_name() -> str:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor() or "CPU"


def tflops_per_gpu(parameters: int, tokens: int, seconds: float, gpus: int) -> float:
    """Work of a step over its time: 6 x parameters x tokens floating-point operations; recomputation is not work."""
    return 6 * parameters * tokens / seconds / gpus / 1e12


def write_results(out: Path | None, name: str, tp: int, results: Any) -> None:
    """``out``/<date>_<name>.json with date, device and command beside the results; nothing without ``out``."""
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    today = datetime.date.today().isoformat()
    content = {"date": today, "device": device_name(), "tp": tp, "command": shlex.join(sys.argv), "results": results}
    (out / f"{today}_{name}.json").write_text(json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def mps_daemon(folder: Path) -> Iterator[dict[str, str]]:
    """A private MPS daemon through launch/mps.sh; gives what its clients need in their environment."""
    variables = {f"CUDA_MPS_{name.upper()}_DIRECTORY": str(folder / "mps" / name) for name in ("pipe", "log")}
    command = [MPS_SCRIPT, "start"]
    subprocess.run(command, env=os.environ | variables, check=True, stdout=subprocess.DEVNULL, timeout=60)
    try:
        yield variables
    finally:
        subprocess.run([MPS_SCRIPT, "stop"], env=os.environ | variables, check=True, timeout=90)

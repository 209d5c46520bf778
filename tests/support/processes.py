"""Start a real vLLM server and a trainer on this machine, notice when one dies, and stop what was started."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import torch

from apollo_tp.errors import ConfigError, DeadlineError, ServerGoneError
from apollo_tp.launch.compose import quoted
from tests.support import forks

STOP_SECONDS = 20.0
EPHEMERAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
LOWEST_PORT = 20_000
FORKING_TORCHRUN, FORKING_SERVER = "tests.support.forking_torchrun", "tests.support.forking_server"
FORKING_CLI = "tests.support.forking_cli"
ORIGINS = {name: name for name in (FORKING_TORCHRUN, FORKING_SERVER)}
ORIGINS |= dict.fromkeys(("tests.support.plain_engine", FORKING_CLI), FORKING_SERVER)
"""Modules whose processes are forked, in a fifth of the time, and from the origin of which module. On a CPU only."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on; if possible below the ephemeral ports, of which the kernel may
    give one to a connection before a server binds it. Raises ConfigError if there is none."""
    ports = range(LOWEST_PORT, int(EPHEMERAL_PORTS.read_text().split()[0])) or range(LOWEST_PORT, 65_536)
    for port in random.SystemRandom().sample(ports, min(100, len(ports))):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ConfigError(
        f"no free port in {ports}: got all that were tried taken, expected one that nobody uses; stop some servers"
    )


class ManagedProcess:
    """A child in a process group of its own, with its output in ``log``."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb") as output:
            self.process: subprocess.Popen[bytes] | forks.Fork
            if imported := ORIGINS.get(command[2] if command[1:2] == ["-m"] else ""):
                self.process = forks.origin(imported).start(
                    command[2:], os.environ | environment, output.fileno(), output.fileno()
                )
            else:
                self.process = subprocess.Popen(
                    command,
                    env=os.environ | environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )

    def check(self) -> None:
        """Raise ServerGoneError with the end of its log if it has ended."""
        if (status := self.process.poll()) is not None:
            raise ServerGoneError(
                f"{self.log.stem}: got exit status {status}, expected it to run. Last lines of {self.log}:\n{self.tail()}"
            )

    def tail(self, lines: int = 30) -> str:
        """The last lines of its output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def wait_for(self, url: str, seconds: float) -> None:
        """Wait until ``url`` answers 200. Raises ServerGoneError if the process ends first, DeadlineError after
        ``seconds``."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.check()
            try:
                if httpx.get(url, timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.25)
        raise DeadlineError(f"{url}: no answer for {seconds:.0f} s. Last lines of {self.log}:\n{self.tail()}")

    def stop(self, signum: int = signal.SIGTERM) -> int:
        """End the process and its children; returns its exit status."""
        try:
            if self.process.poll() is None:
                self.process.send_signal(signum)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(STOP_SECONDS)
        finally:  # also if the wait is interrupted
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # whatever it left running
        return self.process.wait(STOP_SECONDS)


def start_server(
    model: Path,
    port: int,
    runtime_dir: Path,
    log: Path,
    *,
    tensor_parallel: int = 2,
    instance: str = "demo",
    extra: Sequence[str] = (),
    environment: dict[str, str] | None = None,
    forking: bool = False,
) -> ManagedProcess:
    """vLLM with the plugin: an ordinary server command but for VLLM_PLUGINS. Eager on CPU, its default mode on GPUs.
    With ``forking`` it is ``FORKING_SERVER``.

    Raises ConfigError if vLLM would not find the plugin: it would serve without exporting anything, and say nothing.
    """
    if not any(entry.name == "apollo" for entry in importlib.metadata.entry_points(group="vllm.general_plugins")):
        raise ConfigError(
            f"vLLM plugin: got no entry point 'apollo' in {sys.executable}'s environment, expected this package installed; "
            "run `pip install -e .` (a folder on PYTHONPATH is not enough: vLLM reads the installed metadata)"
        )
    cpu = not torch.cuda.is_available()
    command = [
        sys.executable, "-m", FORKING_SERVER if forking else "vllm.entrypoints.openai.api_server",
        "--model", str(model), "--served-model-name", "demo",
        "--tensor-parallel-size", str(tensor_parallel),
        "--host", "127.0.0.1", "--port", str(port),
        "--max-model-len", "512", "--max-num-seqs", "8", "--gpu-memory-utilization", "0.3",
        *(["--enforce-eager"] if cpu else []), *extra,
    ]  # fmt: skip
    settings = {
        "VLLM_PLUGINS": "apollo",
        "APOLLO_TP_RUNTIME_DIR": str(runtime_dir),
        "APOLLO_TP_INSTANCE": instance,
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if forking:
        settings["OMP_NUM_THREADS"] = "1"
    if cpu:  # one NUMA node: ranks get a core each, or share what there is
        cores = "|".join(str(rank % (os.cpu_count() or 1)) for rank in range(tensor_parallel))
        settings |= {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_KVCACHE_SPACE": "1"}
    return ManagedProcess(command, settings | (environment or {}), log)


def start_trainer(
    runtime_dir: Path,
    state_dir: Path,
    log: Path,
    *,
    num_ranks: int = 2,
    max_restarts: int = 0,
    overrides: Sequence[str] = (),
    environment: dict[str, str] | None = None,
    forking: bool = False,
) -> ManagedProcess:
    """``torchrun -m apollo_tp.launch`` with a free HTTP port; ``coordinator_url`` returns its address. With ``forking``
    it is ``FORKING_TORCHRUN``."""
    command = [
        sys.executable, "-m", FORKING_TORCHRUN if forking else "torch.distributed.run",
        "--standalone", "--nproc-per-node", str(num_ranks), "--max-restarts", str(max_restarts),
        "-m", "apollo_tp.launch",
        "service.http.port=0", quoted("service.state_dir", f"{state_dir}/service"),
        quoted("checkpoint.dir", f"{state_dir}/checkpoints"),
        "train.threads=1", *overrides,
    ]  # fmt: skip
    settings = {"APOLLO_TP_RUNTIME_DIR": str(runtime_dir), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return ManagedProcess(command, settings | (environment or {}), log)


def coordinator_url(runtime_dir: Path, trainer: ManagedProcess, *, instance: str = "demo", seconds: float = 180) -> str:
    """Address of the trainer's coordinator, once the ranks have connected to it."""
    path = runtime_dir / instance / "coordinator.json"
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        trainer.check()
        if path.exists() and path.stat().st_mtime > _started(trainer):
            url = str(json.loads(path.read_text())["url"])
            try:
                if httpx.get(f"{url}/train/status", timeout=5).json()["trainer"]["connected"]:
                    return url
            except httpx.TransportError:
                pass
        time.sleep(0.25)
    raise DeadlineError(f"no coordinator for {seconds:.0f} s. Last lines of {trainer.log}:\n{trainer.tail()}")


def _started(process: ManagedProcess) -> float:
    """Unix time at which a process was started."""
    return Path(f"/proc/{process.process.pid}").stat().st_mtime

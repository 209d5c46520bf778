"""``apollo-tp serve``: a vLLM server with the plugin and its trainer, started and ended as one."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec

from apollo_tp.cli.access import CoordinatorFile, coordinator_headers
from apollo_tp.cli.answers import Checkpoint, RefusedError, Status, UnreachableError, read
from apollo_tp.cli.client import Client
from apollo_tp.errors import DECODE_ERRORS, ConfigError
from apollo_tp.runtime import instance_folder

POLL_SECONDS = 0.5
SERVER_SECONDS, TRAINER_SECONDS = 3600.0, 1200.0
"""How long a server may take to load its model, and then the trainer to map it."""
STOP_SECONDS = 60.0
MAX_STARTS = 3
"""How often a trainer is started again. Jobs go on where they were."""
CORES_VARIABLE = "VLLM_CPU_OMP_THREADS_BIND"
TP_OPTIONS = ("--tensor-parallel-size", "-tp")


@dataclass(frozen=True)
class Plan:
    """The two commands. ``url`` is that of the server's port."""

    server: list[str]
    trainer: list[str]
    environment: dict[str, str]
    instance: str
    url: str


def plan(model: str, options: Sequence[str], overrides: Sequence[str]) -> Plan:
    """What to start for ``vllm serve MODEL OPTIONS``, and a trainer with ``overrides``. Raises ConfigError for options that
    this command cannot serve."""
    ranks = _number(options, TP_OPTIONS, 1)
    host, port = _value(options, ("--host",), "127.0.0.1"), _number(options, ("--port",), 8000)
    for name in ("--data-parallel-size", "-dp", "--nnodes"):
        if _number(options, (name,), 1) != 1:
            raise ConfigError(
                f"{name}: got {_number(options, (name,), 1)}, expected one server on one host; start servers and trainer "
                "apart, as docs/how-to/replicas.md and docs/how-to/hosts.md say"
            )
    if any(override.startswith("server.") for override in overrides):
        raise ConfigError(f"overrides: got {list(overrides)}, expected none of server.*, which this command sets")
    instance = instance_folder.ensure_instance_id()
    plugins = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
    environment = {
        "VLLM_PLUGINS": ",".join(dict.fromkeys([*plugins, "apollo"])),
        instance_folder.INSTANCE_VARIABLE: instance,
    }
    if _is_cpu_build() and CORES_VARIABLE not in os.environ:
        # vLLM gives each rank a NUMA node, and a machine with one has no second
        cores = os.cpu_count() or 1
        environment[CORES_VARIABLE] = "|".join(str(rank % cores) for rank in range(ranks)) if ranks > 1 else "all"
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *options]
    shown = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
    url = f"http://{shown}:{port}"
    trainer = [
        sys.executable, "-m", "apollo_tp.launch.torchrun", "--nproc-per-node", str(ranks), f"server.instance={instance}",
        f"service.server_url='{url}'", *overrides,
    ]  # fmt: skip
    return Plan(server, trainer, environment, instance, url)


def run(plan: Plan, say: Callable[[str], None]) -> int:
    """Start both, say where they answer, and wait for a signal; then end the trainer, once unsaved weights are saved, and
    the server. A trainer that ends is started again, since the server has the trained weights. Returns the exit status: 0
    after a signal, 1 if the server ends, or the trainer before it was ever ready."""
    processes: dict[str, subprocess.Popen[bytes]] = {}
    with _signals() as stop:
        try:
            processes["server"] = _start("server", plan.server, plan.environment)
            _wait(lambda: _answers(f"{plan.url}/health"), "the server", SERVER_SECONDS, processes, stop)
            processes["trainer"] = _start("trainer", plan.trainer, plan.environment)
            coordinator = _wait(lambda: _coordinator(plan.instance), "the trainer", TRAINER_SECONDS, processes, stop)
            say(f"OpenAI API   {plan.url}/v1")
            say(f"training     {plan.url}/train, and {coordinator}, where / is a page to watch")
            say("checkpoints  `apollo-tp checkpoint` writes one; unsaved weights are saved when this command is ended")
            _keep_training(plan, processes, stop, say)
            _save(coordinator, say)
        except _InterruptedError:
            pass
        except RefusedError as error:
            say(str(error))
            return 1
        finally:
            stop.clear()
            for name in ("trainer", "server"):
                if name in processes:
                    _end(processes[name])
    return 0


def _keep_training(
    plan: Plan, processes: dict[str, subprocess.Popen[bytes]], stop: threading.Event, say: Callable[[str], None]
) -> None:
    """Until a signal comes: start a trainer that has ended again, MAX_STARTS times at most. Raises RefusedError if the
    server ends."""
    num_starts = 0
    while not stop.wait(POLL_SECONDS):
        _check({"server": processes["server"]})
        status = processes["trainer"].poll()
        if status is None or num_starts > MAX_STARTS:
            continue
        num_starts += 1
        text = (
            f"trainer: got its end with exit status {status}, expected it to run; the server goes on with its weights"
        )
        if num_starts > MAX_STARTS:
            say(f"{text}. It is not started again: {shlex.join(plan.trainer)}")
            continue
        say(f"{text}, and the trainer is started again")
        _end(processes["trainer"])  # what it may have left
        processes["trainer"] = _start("trainer", plan.trainer, plan.environment)


class _InterruptedError(Exception):
    """A signal came while something was waited for."""


def _value(options: Sequence[str], names: Sequence[str], default: str) -> str:
    """The last value of an option that is written as ``--name value`` or ``--name=value``."""
    found = default
    for index, option in enumerate(options):
        name, equals, value = option.partition("=")
        if name.replace("_", "-") in names:
            found = value if equals else (options[index + 1] if index + 1 < len(options) else "")
    return found


def _number(options: Sequence[str], names: Sequence[str], default: int) -> int:
    text = _value(options, names, str(default))
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{names[0]}: got {text!r}, expected a whole number from 1")
    return int(text)


def _is_cpu_build() -> bool:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.version("vllm-cpu"))
    return False


def _start(name: str, command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A child in a process group of its own, so that Ctrl-C reaches this process alone. Its lines are ours, with its name
    before each."""
    process = subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    assert process.stdout is not None
    lines = process.stdout

    def copy() -> None:
        for line in lines:
            sys.stderr.buffer.write(f"[{name}] ".encode() + line)
            sys.stderr.flush()

    threading.Thread(target=copy, name=f"output of {name}", daemon=True).start()
    return process


@contextlib.contextmanager
def _signals() -> Iterator[threading.Event]:
    """Set by the first SIGINT, SIGTERM or SIGHUP; a second one does what it usually does."""
    stop = threading.Event()
    before: dict[signal.Signals, Any] = {}

    def handle(number: int, frame: object) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        before[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(
    found: Callable[[], str],
    what: str,
    seconds: float,
    processes: dict[str, subprocess.Popen[bytes]],
    stop: threading.Event,
) -> str:
    deadline = time.monotonic() + seconds
    while not (answer := found()):
        _check(processes)
        if time.monotonic() > deadline:
            raise RefusedError(f"{what}: got no answer for {seconds:.0f} s, expected it to be up; see its lines above")
        if stop.wait(POLL_SECONDS):
            raise _InterruptedError
    return answer


def _check(processes: dict[str, subprocess.Popen[bytes]]) -> None:
    """Raise RefusedError if one has ended."""
    for name, process in processes.items():
        if (status := process.poll()) is not None:
            raise RefusedError(
                f"{name}: got its end with exit status {status}, expected it to run; see its lines above"
            )


def _answers(url: str) -> str:
    with contextlib.suppress(httpx.HTTPError):
        return "yes" if httpx.get(url, timeout=5).status_code == 200 else ""
    return ""


def _coordinator(instance: str) -> str:
    """The coordinator's address once its ranks are connected; "" before that."""
    path = instance_folder.base_dir() / instance / instance_folder.ADDRESS_FILE
    with contextlib.suppress(OSError, httpx.HTTPError, KeyError, *DECODE_ERRORS):
        url = msgspec.json.decode(path.read_bytes(), type=CoordinatorFile).url
        answer = httpx.get(f"{url}/health", timeout=5)
        return url if answer.json()["trainer"] else ""
    return ""


def _save(coordinator: str, say: Callable[[str], None]) -> None:
    """Write a checkpoint if served weights would be lost with the server; a second signal ends the wait."""
    try:
        client = Client(coordinator, coordinator_headers(None), None)
        with contextlib.closing(client):
            if not read(client.call("GET", "/train/status"), Status).unsaved:
                return
            say("saving the trained weights, which would be lost with the server; Ctrl-C again to lose them")
            done = read(client.call("POST", "/checkpoint", json={"wait": True}, timeout=None), Checkpoint)
            say(
                f"saved: {done.path}" if done.path else f"the trained weights are not saved: {done.error or done.state}"
            )
    except KeyboardInterrupt:
        say("the trained weights are not saved")
    except (RefusedError, UnreachableError) as error:
        say(f"the trained weights are not saved: {error}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to a child, and SIGKILL to its group for what is left of it."""
    try:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(STOP_SECONDS)

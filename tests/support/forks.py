"""Processes that are forked from one that has imported what they need, in place of ``python -m MODULE``.

vLLM takes ten seconds of a core to import, a trainer six. An origin, a process that does nothing else, imports a module
once for all tests and forks itself for each command.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

READY_SECONDS = 300.0
POLL_SECONDS = 0.01
IMPORTED_WITH = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
"""Variables that are read at imports."""


ENTER_VARIABLE = "APOLLO_TP_TEST_ENTER"
"""A process in whose namespaces a command is to run (``played_hosts``)."""


class Fork:
    """What tests and torchrun use of ``subprocess.Popen``, for a process that somebody else may have forked."""

    def __init__(self, pid: int, status: Callable[[int], int | None]) -> None:
        """``status``: the exit status of a process, or None while it runs."""
        self.pid, self.returncode, self._status = pid, None, status

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._status(self.pid)
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(POLL_SECONDS)
        return status

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def status_of_child(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def become(command: Sequence[str], environment: dict[str, str], streams: Sequence[int]) -> NoReturn:
    """In a forked process: run ``MODULE ARGUMENTS`` as ``python -m`` would, with ``streams`` for stdout, stderr and,
    if there is a third one, stdin, in a session of its own."""
    status = 1
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        for descriptor, stream in zip((1, 2, 0), streams, strict=False):
            os.dup2(stream, descriptor)
        for descriptor in [int(name) for name in os.listdir("/proc/self/fd")]:
            with contextlib.suppress(OSError):  # the folder's own
                if descriptor > 2 and not os.get_inheritable(descriptor):  # as exec does
                    os.close(descriptor)
        os.environ.clear()
        os.environ.update(environment)
        if target := os.environ.pop(ENTER_VARIABLE, ""):
            _enter_namespaces(int(target))
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        sys.argv = list(command)
        for name in (command[0], f"{command[0]}.__main__"):  # it runs again, as __main__
            if not hasattr(sys.modules.get(name), "__path__"):
                sys.modules.pop(name, None)
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if status and end.code != status:
            print(end.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
    finally:
        threading._shutdown()  # waits for threads that are not daemons
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _enter_namespaces(pid: int) -> None:
    """Go on in the namespaces of process ``pid``, in a child: a process stays in the PID namespace that it began in. This
    one ends with the child's exit status."""
    libc, folder = ctypes.CDLL(None, use_errno=True), os.getcwd()
    for descriptor in [os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY) for kind in ("net", "uts", "ipc", "pid", "mnt")]:
        if libc.setns(descriptor, 0):
            raise OSError(ctypes.get_errno(), f"namespaces of process {pid}")
        os.close(descriptor)
    os.chdir(folder)  # it is the root now
    if child := os.fork():
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)


class _Origin:
    """The tests' end of the process that has imported ``module`` and is forked for each command."""

    def __init__(self, module: str) -> None:
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.forks", module, str(theirs.fileno())],
                env=os.environ | IMPORTED_WITH, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
            )  # fmt: skip
        self._ended: dict[int, int] = {}
        self._connection.settimeout(READY_SECONDS)

    def start(self, command: Sequence[str], environment: Mapping[str, str], *streams: int) -> Fork:
        """``python -m COMMAND`` with these descriptors for stdout, stderr and, if it is to read anything, stdin."""
        socket.send_fds(self._connection, [json.dumps([list(command), dict(environment)]).encode()], streams)
        while "started" not in (message := self._receive()):
            pass
        return Fork(message["started"], self._status)

    def _receive(self) -> dict[str, int]:
        message = json.loads(self._connection.recv(1 << 16) or '{"started": -1}')
        if message.get("started") == -1:
            raise RuntimeError(f"origin {self._process.pid}: got its end, expected a process; look at the output above")
        if "ended" in message:
            self._ended[message["ended"]] = message["status"]
        return message

    def _status(self, pid: int) -> int | None:
        self._connection.setblocking(False)
        try:
            while True:
                self._receive()
        except BlockingIOError:
            return self._ended.get(pid)
        finally:
            self._connection.settimeout(READY_SECONDS)


@functools.cache
def origin(module: str) -> _Origin:
    """The origin of ``module``; it lives as long as this process."""
    return _Origin(module)


def run(
    module: str, command: Sequence[str], seconds: float, environment: Mapping[str, str] = os.environ, text: str = ""
) -> subprocess.CompletedProcess[str]:
    """``subprocess.run`` of ``python -m COMMAND`` with captured output, forked from the origin of ``module``; it reads
    ``text``."""
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        stdin.write(text.encode())
        stdin.seek(0)
        process = origin(module).start(command, environment, stdout.fileno(), stderr.fileno(), stdin.fileno())
        try:
            status = process.wait(seconds)
        finally:
            process.kill()
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read().decode())
        return subprocess.CompletedProcess(command, status, *texts)


def _serve(module: str, connection: socket.socket) -> None:
    """The life of an origin: fork for each command, report each end; until nobody can ask any more."""
    importlib.import_module(module)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"got {len(threads)} threads, expected one: a fork leaves the locks of others taken"
    gc.freeze()
    connection.settimeout(POLL_SECONDS)
    connection.set_inheritable(False)
    children: set[int] = set()
    while True:
        for pid in list(children):
            if (status := status_of_child(pid)) is not None:
                children.discard(pid)
                connection.send(json.dumps({"ended": pid, "status": status}).encode())
        try:
            call, descriptors, *_ = socket.recv_fds(connection, 1 << 20, 3)
        except TimeoutError:
            continue
        if not call:
            return
        command, environment = json.loads(call)
        if (pid := os.fork()) == 0:
            become(command, environment, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        children.add(pid)
        connection.send(json.dumps({"started": pid}).encode())


if __name__ == "__main__":
    _serve(sys.argv[1], socket.socket(fileno=int(sys.argv[2])))
    os._exit(0)

"""``python -m apollo_tp.coordinator [--config FILE.json]``: composition root of the coordinator process."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import gc
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import zmq.asyncio

from apollo_tp.coordinator.captures.learning import Learner
from apollo_tp.coordinator.captures.store import Captures
from apollo_tp.coordinator.http.app import build_app
from apollo_tp.coordinator.http.auth import load_access
from apollo_tp.coordinator.http.captures import prune
from apollo_tp.coordinator.http.connections import BoundedServer
from apollo_tp.coordinator.http.curve import CurveListener
from apollo_tp.coordinator.http.expiry import expire
from apollo_tp.coordinator.http.metrics import Metrics
from apollo_tp.coordinator.http.service import Service, model_digest, model_vocab_size
from apollo_tp.coordinator.http.train import submit
from apollo_tp.coordinator.http.tunnel import Tunnel
from apollo_tp.coordinator.http.validation import FileValidation
from apollo_tp.coordinator.jobs.changes import Changes
from apollo_tp.coordinator.jobs.rank_link import RankLink, bind_private
from apollo_tp.coordinator.jobs.scheduler import Scheduler
from apollo_tp.coordinator.jobs.storage_error import StorageError, Trouble
from apollo_tp.coordinator.jobs.store import Store
from apollo_tp.coordinator.jobs.writers import open_writers
from apollo_tp.coordinator.json_logging import set_up_logging
from apollo_tp.coordinator.samples.render import Renderer
from apollo_tp.coordinator.settings import EXIT_STORAGE, Settings, load
from apollo_tp.coordinator.waiting import first_order, serve_until_ready
from apollo_tp.errors import ApolloTpError, ConfigError
from apollo_tp.runtime import instance_folder, private_files

log = logging.getLogger("apollo_tp.coordinator")
STOP_SECONDS = 5.0
LOCK_SECONDS = STOP_SECONDS + 1
"""The coordinator of a killed trainer notices that, and releases its folder, within this time."""


def main() -> int:
    """Run until a signal, or until the parent process has ended. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m apollo_tp.coordinator", description=__doc__)
    parser.add_argument(
        "--config",
        type=Path,
        help="settings file written by apollo_tp.launch; without it, orders come by standard input",
    )
    parser.add_argument("--reason-fd", type=int, help="file descriptor to which the reason of a failure is written")
    arguments = parser.parse_args()
    set_up_logging()
    # 50 clients are answered between two slices of a thread that renders samples
    sys.setswitchinterval(0.0002)
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(wait_and_serve(arguments.config))
    except StorageError as error:
        log.error("%s", error, exc_info=error)
        _tell_reason(arguments.reason_fd, error)
        return 1 if error.trouble is Trouble.corrupt else EXIT_STORAGE  # a new start mends no damage
    except ApolloTpError as error:
        log.error("%s", error)
        _tell_reason(arguments.reason_fd, error)
        return 1
    return 0


def _tell_reason(reason_fd: int | None, error: Exception) -> None:
    if reason_fd is not None:
        os.write(reason_fd, str(error).encode(errors="backslashreplace"))


async def wait_and_serve(config: Path | None) -> None:
    """Serve with the settings in ``config``. Without one, say on the same address what is waited for, until rank 0 names
    it."""
    listener = None
    if config is None:
        first, orders = await first_order()
        listener = bind_http(first.service.http.host, first.service.http.port)
        config = await serve_until_ready(first.service, Path(first.base), listener, orders)
    if config is not None:
        await serve(load(config), listener)


async def serve(settings: Settings, listener: socket.socket | None = None) -> None:
    """Bind all sockets (HTTP's is ``listener``, if there is one), then run the parts until one ends or a signal arrives."""
    access = load_access(settings.service)
    changes = Changes()
    store = Store(Path(settings.service.state_dir), changes.notify, lock_seconds=LOCK_SECONDS)
    context = zmq.asyncio.Context()
    listener = listener or bind_http(settings.service.http.host, settings.service.http.port)
    scheduler = _build_scheduler(settings, store, context, changes)
    stack = contextlib.ExitStack()
    captures = None
    if settings.capture.enabled:
        captures = Captures(Path(settings.service.state_dir), settings.capture)
        stack.callback(captures.close)
    service = Service(
        settings, store, scheduler, changes, _renderer(settings), model_vocab_size(Path(settings.model_path)), captures
    )
    metrics = Metrics(scheduler, store, service.latency)
    validation = FileValidation(service)
    app = build_app(service, access, metrics, validation)
    for writer in open_writers(settings.service, store):
        stack.enter_context(writer)
        scheduler.on_step.append(writer)
        scheduler.on_evaluation.append(writer.evaluated)
    path = instance_folder.socket_path(Path(settings.instance_dir), instance_folder.COORDINATOR_SOCKET)
    tunnels = [Tunnel(context, lambda socket: bind_private(socket, path), app)]
    if settings.service.zmq.port is not None:
        curve = CurveListener(context, settings.service.zmq)
        stack.callback(curve.close)
        tunnels.append(Tunnel(context, curve.bind, app))
    server = BoundedServer(app, graceful_seconds=2)
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    gc.freeze()  # modules and routes stay: a full collection that visits them would delay answers by some 20 ms
    _publish_address(settings, listener)
    validation.resume()
    parts = [
        asyncio.create_task(coroutine, name=name)
        for name, coroutine in {
            "http": server.serve(sockets=[listener]),
            **{f"tunnel {number}": tunnel.run() for number, tunnel in enumerate(tunnels)},
            "ranks": scheduler.link.run(),
            "scheduler": scheduler.run(),
            "storage": store.failed(),
            "upkeep": _keep_up(store),
            "expiry": expire(store, app.state.uploads),
            **_learning(service),
            **({"latency": service.latency.run()} if service.latency.url else {}),
            "parent": _watch_parent(settings.parent_pid),
            "stop": stop.wait(),
        }.items()
    ]
    try:
        done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            # the end of the trainer has a reason that was logged last, and should stay so
            level = logging.DEBUG if task.get_name() == "parent" else logging.INFO
            log.log(level, "stopping: %s ended", task.get_name())
            task.result()
    finally:
        server.should_exit = True
        for task in parts[1:]:
            task.cancel()
        await asyncio.wait(parts, timeout=STOP_SECONDS)
        validation.stop()
        stack.close()
        await asyncio.to_thread(store.close)
        context.destroy(linger=0)


def _learning(service: Service) -> dict[str, Coroutine[Any, Any, None]]:
    """What runs while completions are stored."""
    if service.captures is None:
        return {}
    learner = Learner(service.captures, service.settings.learn, functools.partial(submit, service))
    return {"captures": prune(service.captures), "learning": learner.run()}


def _build_scheduler(settings: Settings, store: Store, context: zmq.asyncio.Context, changes: Changes) -> Scheduler:
    link = RankLink(
        context,
        instance_folder.socket_path(Path(settings.instance_dir), instance_folder.RANKS_SOCKET),
        timeout_seconds=settings.service.rank_timeout_seconds,
        on_change=changes.notify,
    )
    digest = model_digest(Path(settings.model_path), settings.serving)
    scheduler = Scheduler(settings, store, link, digest if settings.model_path else "")
    link.attach(
        on_hello=scheduler.reconcile,
        on_orphan_reply=scheduler.orphan_reply,
        require_identify=scheduler.has_unrecorded_steps,
    )
    store.remove_orphans()
    store.disk.reserve.keep()
    scheduler.recover()
    return scheduler


def bind_http(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises ConfigError naming the option if the address cannot be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only on sockets whose protocol is given; without it each answer waits 40 ms for an ACK
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"service.http.host and port: got {host}:{port}, which cannot be bound ({error.strerror}); "
            "expected a free port: set service.http.port, or 0 for any"
        ) from error
    listener.listen(128)
    listener.setblocking(False)
    return listener


def _renderer(settings: Settings) -> Renderer | str:
    """The renderer, or why only token ids can be trained on."""
    try:
        return Renderer(settings.serving, Path(settings.instance_dir))
    except ConfigError as error:
        log.warning("only token ids can be trained on: %s", error)
        return str(error)


def _publish_address(settings: Settings, listener: socket.socket) -> None:
    """Write the address that was bound to a file, for the command line and tests: the configured port may be 0."""
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    content = json.dumps({"url": url, "pid": os.getpid(), "started_at": time.time()}).encode()
    private_files.write_private(Path(settings.instance_dir) / instance_folder.ADDRESS_FILE, content)
    log.info("coordinator at %s, state in %s", url, settings.service.state_dir)


async def _keep_up(store: Store) -> None:
    while True:
        await asyncio.sleep(10)
        await store.forget_old_steps()
        await store.in_thread(lambda _: store.disk.reserve.keep())


async def _watch_parent(parent_pid: int | None) -> None:
    while parent_pid is None or os.getppid() == parent_pid:  # noqa: ASYNC110 - no event reports a parent's end
        await asyncio.sleep(0.5)


if __name__ == "__main__":
    # everything is stored and closed; a thread that renders a long conversation would delay the end for as long as it takes
    exit_status = main()
    logging.shutdown()
    sys.stderr.flush()
    os._exit(exit_status)

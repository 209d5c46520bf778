"""Servers and their manifests in the runtime folder: claim an instance id, find live servers, wait for one. No torch."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from apollo_tp.errors import ApolloTpError, ManifestError, NoServerError
from apollo_tp.runtime import instance_folder, private_files, processes
from apollo_tp.shards.manifest import Manifest, ServerProcess, read
from apollo_tp.shards.serving import read_serving

CLAIMED_VARIABLE = "APOLLO_TP_CLAIMED"
"""Set once the first process of a server has claimed the instance id; its children inherit it."""
REFUSED_VARIABLE = "APOLLO_TP_REFUSED"
"""Set to the reason if the claim failed. Child processes read it and do not open sockets under another server's instance
id."""
ENDPOINTS_VARIABLE = "APOLLO_TP_ENDPOINTS"
"""Set if an API server with apollo_tp's endpoints starts in front of this engine; it will publish ``serving.json``."""
ENGINES_VARIABLE = "APOLLO_TP_ENGINES"
"""The number of data-parallel engines of this server (``--data-parallel-size``), for the processes that vLLM starts."""
SERVER_LOCK = private_files.SERVER_LOCK
CLAIM_SECONDS = 10.0
PROBE_SECONDS = 0.2
"""How long a claim waits for a server's lock. A process that only tests the lock has it for less; a live server keeps it."""

_claim = contextlib.ExitStack()
"""Keeps the server's lock until its first process ends."""


def num_engines() -> int:
    """Data-parallel engines of this server."""
    return int(os.environ.get(ENGINES_VARIABLE) or 1)


def engine_id(index: int) -> str:
    """The instance id of an engine of this server: each of several has one of its own, and is a replica to the trainer."""
    instance_id = instance_folder.ensure_instance_id()
    return instance_id if num_engines() == 1 else f"{instance_id}.{index}"


def engine_folders() -> list[Path]:
    """The folders of this server's engines on this host. Raises ConfigError as ``instance_dir``."""
    base, names = instance_folder.base_dir(), [engine_id(index) for index in range(num_engines())]
    found = [name for name in names if (base / name).is_dir()]
    return [instance_folder.instance_dir(name, base) for name in found or names[:1]]


def read_instance(folder: Path) -> list[Manifest]:
    """The manifests in one server's folder, by rank. Some may be missing yet; there are none while the folder is removed."""
    try:
        return sorted((read(path) for path in folder.glob("rank*.json")), key=lambda m: m.tp_rank)
    except FileNotFoundError:
        return []


def live_instances(base: Path) -> tuple[list[str], list[str]]:
    """(live, stale) instance ids below ``base``. An instance is stale if a process has ended that published a manifest, or
    that is named in one."""
    live: list[str] = []
    stale: list[str] = []
    for folder in sorted(p for p in base.iterdir() if p.is_dir()):
        manifests = read_instance(folder)
        if manifests:
            (stale if _ended(folder, manifests) else live).append(folder.name)
    return live, stale


def served_models(base: Path) -> set[Path]:
    """The model folders of live servers below ``base``. Raises ManifestError if one cannot be read."""
    return {Path(manifest.model_path) for name in live_instances(base)[0] for manifest in read_instance(base / name)}


def _ended(folder: Path, manifests: list[Manifest]) -> bool:
    """Whether a process of this server has ended.

    Processes of another PID namespace (a container that was restarted) are invisible, but their lock is not: it is free
    once they have ended. For a live one, ``check_agreement`` says what to do.
    """
    if _is_ours(manifests):
        return not all(process.identity.alive() for process in processes_of(manifests))
    lock = folder / SERVER_LOCK
    if not lock.exists():  # then it is taken for live, unless the folder is just being removed
        return not read_instance(folder)
    try:
        with private_files.locked(lock, ManifestError, PROBE_SECONDS):
            return True
    except ManifestError:
        return False
    except FileNotFoundError:
        return True  # removed meanwhile, which happens only after its end


def processes_of(manifests: Iterable[Manifest]) -> list[ServerProcess]:
    """All processes of a server that its manifests name, each once: workers, then those above them."""
    named = [process for manifest in manifests for process in manifest.server_processes]
    return sorted(dict.fromkeys(named), key=lambda process: not process.role.startswith("rank "))


def survivors(manifests: list[Manifest]) -> list[ServerProcess]:
    """The processes that live on although another one of their server has ended: they serve nobody, and keep their memory.
    Empty for a live server, for one that has ended wholly, and for one in another PID namespace."""
    named = processes_of(manifests) if manifests and _is_ours(manifests) else []
    alive = [process for process in named if process.identity.alive()]
    return alive if len(alive) < len(named) else []


def end_survivors_advice(alive: list[ServerProcess]) -> str:
    """A clause about ``alive``, for a message; empty if there are none."""
    if not alive:
        return ""
    return f"; {', '.join(map(str, alive))} live on without it: if they do not end, run `apollo-tp end-orphans`"


def _is_ours(manifests: list[Manifest]) -> bool:
    return manifests[0].is_ours


def claim_instance() -> str:
    """Claim this server's instance id in the first process of a vLLM process tree, and return it. The other processes
    inherit the claim, or the reason why it failed.

    Folders of servers that ended are removed first, above all one with the same id: its manifests and its record of trained
    weights belong to the ended server. Raises ManifestError if a live server has the id, even if it is still loading.
    """
    instance_id = instance_folder.ensure_instance_id()
    if os.environ.get(REFUSED_VARIABLE):
        raise ManifestError(os.environ[REFUSED_VARIABLE])
    if not os.environ.get(CLAIMED_VARIABLE):
        try:
            _claim_first(instance_id, instance_folder.base_dir())
        except (ApolloTpError, OSError) as error:
            os.environ[REFUSED_VARIABLE] = str(error)
            raise
        os.environ[CLAIMED_VARIABLE] = str(os.getpid())
    return instance_id


def _claim_first(instance_id: str, base: Path) -> None:
    def taken(holder: str) -> ManifestError:
        return ManifestError(
            f"instance {instance_id}: got a name that a live server has (process {holder}), expected a new one; "
            f"set ${instance_folder.INSTANCE_VARIABLE} to another"
        )

    def busy(holder: str) -> ManifestError:
        return ManifestError(
            f"{base}: got a claim of process {holder} that lasts {CLAIM_SECONDS:.0f} s, expected milliseconds; stop it"
        )

    with private_files.locked(base / "claims.lock", busy, CLAIM_SECONDS):
        live, stale = live_instances(base)
        if instance_id in live:
            raise taken(str(read_instance(base / instance_id)[0].pid))
        orphaned = {name for name in stale if survivors(read_instance(base / name))}
        if instance_id in orphaned:
            left = ", ".join(map(str, survivors(read_instance(base / instance_id))))
            raise ManifestError(
                f"instance {instance_id}: got a name of which {left} live on without their server, expected a free one; end "
                f"them with `apollo-tp end-orphans`, or set ${instance_folder.INSTANCE_VARIABLE} to another"
            )
        # A server that ended while it loaded has left only its lock.
        for name in {*stale, *(lock.parent.name for lock in base.glob(f"*/{SERVER_LOCK}"))}.difference(live, orphaned):
            with (
                contextlib.suppress(ManifestError),
                private_files.locked(base / name / SERVER_LOCK, taken, PROBE_SECONDS),
            ):
                instance_folder.remove_instance(base / name)
        lock = instance_folder.instance_dir(instance_id, base) / SERVER_LOCK
        _claim.enter_context(private_files.locked(lock, taken, PROBE_SECONDS))


def unclaimed() -> str:
    """Why the processes of this server must not act under its instance id; "" if they may."""
    if os.environ.get(CLAIMED_VARIABLE):
        return ""
    return os.environ.get(REFUSED_VARIABLE) or "the apollo plugin did not load; start vLLM with VLLM_PLUGINS=apollo"


def check_agreement(manifests: list[Manifest]) -> None:
    """Raise ManifestError unless these are the manifests of all ranks of one live server, or of all of its ranks on this
    host, and no export failed."""
    first = manifests[0]
    problems = [f"rank {m.tp_rank}: export failed in the server: {m.error.strip()}" for m in manifests if m.error]
    ranks = [m.tp_rank for m in manifests]
    if ranks != list(first.ranks_here):
        problems.append(f"got manifests of ranks {ranks}, expected {first.ranks_here[0]} to {first.ranks_here[-1]}")
    for field in ("instance_id", "tp_size", "model_path", "dtype", "vllm_version", "host", "boot_id", "pid_namespace"):
        values = {getattr(m, field) for m in manifests}
        if len(values) > 1:
            problems.append(f"{field} differs over ranks: {sorted(map(str, values))}")
    if first.boot_id not in ("", processes.boot_id()):
        problems.append(f"got a server on host {first.host}, expected one on this host; start a trainer rank there")
    elif not _is_ours(manifests):
        problems.append(
            f"got a server in PID namespace {first.pid_namespace}, expected this process's {processes.pid_namespace()}; "
            "run both in one container, or start the trainer's with --pid=container:NAME of the server's"
        )
    else:
        problems += [
            f"{process.role}: stale, its process {process.pid} has ended; start the server again"
            for process in processes_of(manifests)
            if not process.identity.alive()
        ]
        if left := survivors(manifests):
            problems.append(end_survivors_advice(left).removeprefix("; "))
    if problems:
        raise ManifestError(f"server {first.instance_id}: " + "; ".join(problems))


def is_loaded(manifests: Sequence[Manifest]) -> bool:
    """Whether all ranks of a server on this host have published, or one says why it cannot be trained."""
    return bool(manifests) and (len(manifests) == len(manifests[0].ranks_here) or any(m.error for m in manifests))


def wait_for_server(
    base: Path,
    instance: str | None,
    wait_seconds: float,
    *,
    ready: bool = True,
    report: Callable[[str], None] = lambda state: None,
) -> list[Manifest]:
    """Wait until all ranks of the server ``instance`` (None: of the only live one) have published, and return their
    manifests.

    If ``ready``, wait for its engine as well: until that is up, vLLM measures how much memory is free, and memory that
    another process allocates would be missing in its KV cache. A server that ended may be restarting under the same id, so
    it is waited for too. ``report`` is called with each look's state, in words, and may raise. Raises NoServerError when
    the time is over, and ManifestError if several servers are live and ``instance`` is None, or if the manifests do not
    agree.
    """
    deadline = time.monotonic() + wait_seconds
    while True:
        over = time.monotonic() > deadline
        live, stale = live_instances(base)
        if instance is None and len(live) > 1:
            raise ManifestError(f"got {len(live)} live servers {live}, expected one; choose with server.instance=...")
        name = instance or (live[0] if live else None)
        manifests = read_instance(base / name) if name and (base / name).is_dir() else []
        loaded = is_loaded(manifests)
        if loaded and (name not in stale or (over and _is_ours(manifests))):
            check_agreement(manifests)
            if (nodes := manifests[0].num_nodes) > 1:
                raise ManifestError(
                    f"server {name}: got ranks {[m.tp_rank for m in manifests]} of {manifests[0].tp_size} on this host, "
                    f"expected all, but it runs on {nodes} (--nnodes {nodes}); start a trainer rank beside each of them, "
                    f"with --nnodes {nodes} for the launcher too"
                )
            if not (ready and manifests[0].endpoints) or read_serving(base / str(name)):
                return manifests
            if over:
                raise NoServerError(
                    f"server {name}: got a loaded model but no engine that is up after {wait_seconds:.0f} s (vLLM measures "
                    "memory, allocates its KV cache, captures graphs), expected both; look at its log, or wait for longer "
                    "with server.wait_seconds=..."
                )
        if over:
            have = [m.tp_rank for m in manifests]
            raise NoServerError(
                f"waited {wait_seconds:.0f} s for server {instance or '(any)'} in {base}: got manifests of ranks {have}, "
                f"live servers {live}, stale ones {stale}, expected one complete live server. Start vLLM with "
                "VLLM_PLUGINS=apollo and look for 'apollo_tp' in its log"
            )
        report(_awaited(base, name, manifests, stale))
        time.sleep(1.0 if loaded else 0.1)  # each look reads all manifests, while vLLM needs the cores


def wait_for_servers(
    base: Path,
    instances: Sequence[str],
    count: int,
    wait_seconds: float,
    *,
    report: Callable[[str], None] = lambda state: None,
) -> dict[str, list[Manifest]]:
    """Like ``wait_for_server`` for ``count`` servers, ``instances`` or all live ones: their manifests by instance id.

    Raises NoServerError when the time is over, and ManifestError if more servers are live than ``count`` and none is named.
    """
    deadline = time.monotonic() + wait_seconds
    names = list(instances)
    while not names:
        live, _ = live_instances(base)
        if len(live) > count:
            raise ManifestError(
                f"got {len(live)} live servers {live}, expected {count} as server.replicas says; choose with "
                "server.instances=[...]"
            )
        if len(live) == count:
            names = live
        elif time.monotonic() > deadline:
            raise NoServerError(
                f"waited {wait_seconds:.0f} s for servers in {base}: got {len(live)} live ones {live}, expected {count} as "
                "server.replicas says. Start vLLM with VLLM_PLUGINS=apollo, each on a port of its own"
            )
        else:
            report(f"{len(live)} of {count} servers have loaded their model; waiting for the others")
            time.sleep(0.5)
    return {name: wait_for_server(base, name, max(0.0, deadline - time.monotonic()), report=report) for name in names}


def _awaited(base: Path, name: str | None, manifests: list[Manifest], stale: list[str]) -> str:
    """What a trainer that waits for server ``name`` (None: any) waits for."""
    if name in stale:
        left = end_survivors_advice(survivors(manifests))
        return f"server {name} has ended{left}; waiting for it to start again"
    if manifests:
        ranks = f"{len(manifests)} of {len(manifests[0].ranks_here)} ranks"
        if not is_loaded(manifests):
            return f"server {name}: {ranks} have loaded the model; waiting for the others"
        return f"server {name}: {ranks} have loaded the model; waiting for its engine, which allocates memory"
    folders = [base / name] if name else sorted(path for path in base.iterdir() if path.is_dir())
    loading = [(folder.name, _holder(folder)) for folder in folders if (folder / SERVER_LOCK).exists()]
    running = [f"server {found} (process {holder}) loads its model" for found, holder in loading if holder]
    if running:
        return f"{', '.join(running)}; waiting for it"
    ended = [found for found, _ in loading if found not in stale]
    if ended:
        return f"server {', '.join(ended)} has ended while it loaded its model; waiting for it to start again"
    return (
        f"no vLLM server with VLLM_PLUGINS=apollo in {base}; waiting for {f'server {name}' if name else 'one'} to start"
    )


def _holder(folder: Path) -> str:
    """The process that claimed a server's folder, as its lock names it; empty if it has ended. The lock itself is not
    tried, for that could keep a server that starts now from taking it."""
    try:
        pid = (folder / SERVER_LOCK).read_text()
    except FileNotFoundError:
        return ""
    return pid if pid.isdecimal() and processes.ProcessId.of(int(pid)) else ""

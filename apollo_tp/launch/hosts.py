"""Trainer ranks on several hosts: who is where, what all must have in common, and the servers that each host's ranks find.

Memory is mapped on one host alone, so ranks look for servers in the runtime folder of their own host. A host has as many
served shards as trainer ranks. What else is needed of other hosts goes over the control group.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from apollo_tp.config import Config, ServerConfig
from apollo_tp.distributed.control import Control
from apollo_tp.errors import ConfigError, NoServerError
from apollo_tp.runtime import instance_folder, processes
from apollo_tp.shards.instance import (
    check_agreement,
    is_loaded,
    live_instances,
    read_instance,
    wait_for_server,
    wait_for_servers,
)
from apollo_tp.shards.manifest import Manifest
from apollo_tp.shards.serving import read_serving

LOOK_SECONDS = 0.5
SHARED_SECONDS = 15.0
"""How long a file may take to appear on other hosts: network file systems cache the names in a folder."""
OWN_OPTIONS = ("service.", "qos.", "server.runtime_dir", "server.wait_seconds", "train.threads")
"""Prefixes of options that hosts may set differently."""

log = logging.getLogger("apollo_tp")
Report = Callable[[str], None]


class _Rank(msgspec.Struct, frozen=True):
    host: str
    machine: str
    options: dict[str, str]


@dataclass(frozen=True)
class Hosts:
    """Of each rank, as the launcher numbers them: its host's name, and its ``processes.machine``."""

    names: list[str]
    machines: list[str]

    @property
    def several(self) -> bool:
        return len(set(self.machines)) > 1

    def num_ranks_beside(self, rank: int) -> int:
        """Trainer ranks on the machine of ``rank``, itself included."""
        return Counter(self.machines)[self.machines[rank]]


def meet(control: Control, config: Config) -> Hosts:
    """Where all ranks are. Collective: one gather. Raises ConfigError, on all ranks, if they have different options."""
    own = _Rank(socket.gethostname(), processes.machine(), dict(_options(dataclasses.asdict(config))))
    ranks = [msgspec.json.decode(row, type=_Rank) for row in control.gather(msgspec.json.encode(own))]
    first = ranks[0]
    for number, rank in enumerate(ranks):
        for name, expected in first.options.items():
            if (got := rank.options.get(name)) != expected:
                raise ConfigError(
                    f"{name}: got {got} on rank {number} on {rank.host}, expected {expected} as on rank 0 on {first.host}; "
                    "start the trainer with the same options, of the same release, on all hosts"
                )
    return Hosts([rank.host for rank in ranks], [rank.machine for rank in ranks])


def _options(section: dict[str, Any], prefix: str = "") -> Sequence[tuple[str, str]]:
    """The options in which all ranks must agree, by dotted name."""
    found: list[tuple[str, str]] = []
    for key, value in section.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found += _options(value, f"{name}.")
        elif not name.startswith(OWN_OPTIONS):
            found.append((name, str(value)))
    return found


def find_servers(control: Control, hosts: Hosts, config: ServerConfig, report: Report) -> dict[str, list[Manifest]]:
    """The manifests on this host of the servers to train, by instance id. Every rank waits for those of its own host.

    Collective: some gathers. ``report`` is called on each rank with what is waited for, and may raise. Raises as
    ``wait_for_server``, and ConfigError where there are not as many shards as ranks.
    """
    base = instance_folder.base_dir(config.runtime_dir)
    if control.rank == 0:
        seconds = config.wait_seconds
        log.info("looking for a vLLM server with VLLM_PLUGINS=apollo in %s, for up to %.0f s", base, seconds)
    if hosts.several or config.min_replicas is not None:
        return _find_together(control, hosts, config, base, report)
    with control.agree():
        # on every rank: one that waited for rank 0 in a collective would give up at that collective's deadline
        if config.replicas == 1 and not config.instances:
            manifests = wait_for_server(base, config.instance, config.wait_seconds, report=report)
            servers = {manifests[0].instance_id: manifests}
        else:
            servers = wait_for_servers(base, config.instances, config.replicas, config.wait_seconds, report=report)
        _check_size(control.size, servers)
    return servers


def _check_size(size: int, servers: dict[str, list[Manifest]]) -> None:
    """Raise ConfigError unless there are as many trainer ranks as shards are served."""
    sizes = {name: len(manifests) for name, manifests in servers.items()}
    total = sum(sizes.values())
    if total != size:
        what = "the server's tensor-parallel size"
        if len(sizes) > 1:
            what = "one for each shard of " + ", ".join(f"{name} (TP {count})" for name, count in sizes.items())
        raise ConfigError(
            f"trainer ranks: got {size}, expected {total}, {what}; start torchrun with --nproc-per-node {total}"
        )


class _Seen(msgspec.Struct, frozen=True):
    """What a rank sees on its host: what is missing there, of each server that is up its tensor-parallel size and the ranks
    of it there, and whether there was time for the others."""

    awaited: str
    up: dict[str, tuple[int, list[int]]]
    waited: bool


def _find_together(
    control: Control, hosts: Hosts, config: ServerConfig, base: Path, report: Report
) -> dict[str, list[Manifest]]:
    """``find_servers`` for several hosts, and where not all servers are needed. Ranks look together, so that none waits in a
    collective for long: two gathers per look."""
    name, count = hosts.names[control.rank], hosts.num_ranks_beside(control.rank)
    names = config.instances or ([config.instance] if config.instance else [])
    started, waiting = time.monotonic(), ""
    while True:
        with control.agree():
            if waiting:
                report(waiting)
            servers, awaited = _look(base, names, count, name)
            waited = time.monotonic() - started
            if awaited and waited > config.wait_seconds:
                raise NoServerError(
                    f"waited {config.wait_seconds:.0f} s for servers on host {name} in {base}: {awaited}. Start vLLM with "
                    "VLLM_PLUGINS=apollo there, and look for 'apollo_tp' in its log"
                )
        up = {each: (m[0].tp_size, [x.tp_rank for x in m]) for each, m in servers.items() if is_up(base / each, m)}
        own = _Seen(awaited, up, waited > config.replica_wait_seconds)
        rows = [msgspec.json.decode(row, type=_Seen) for row in control.gather(msgspec.json.encode(own))]
        waiting = "; ".join(dict.fromkeys(row.awaited for row in rows if row.awaited))
        if not waiting:
            return servers
        if rows[0].waited and len(enough := _complete(rows)) >= (config.min_replicas or config.replicas):
            if control.rank == 0:
                log.warning("training goes on with %s alone: %s", ", ".join(enough), waiting)
            return {each: manifests for each, manifests in servers.items() if each in enough}
        time.sleep(LOOK_SECONDS)


def _complete(rows: Sequence[_Seen]) -> list[str]:
    """The servers of which all tensor-parallel ranks are up, on whatever hosts."""
    ranks: dict[str, set[int]] = {}
    sizes: dict[str, int] = {}
    for row in rows:
        for name, (size, here) in row.up.items():
            sizes[name] = size
            ranks.setdefault(name, set()).update(here)
    return sorted(name for name, size in sizes.items() if ranks[name] == set(range(size)))


def is_up(folder: Path, manifests: list[Manifest]) -> bool:
    """Whether the server of ``folder`` has loaded its model on this host, and its engine is up."""
    return is_loaded(manifests) and not (manifests[0].endpoints and not read_serving(folder))


def _look(base: Path, names: Sequence[str], count: int, host: str) -> tuple[dict[str, list[Manifest]], str]:
    """The live servers of this host (of those named, if any are), and what is missing until they have ``count`` shards."""
    found = {name: read_instance(base / name) for name in live_instances(base)[0] if not names or name in names}
    # a runtime folder that hosts share has those of the others too
    servers = {name: manifests for name, manifests in found.items() if manifests and manifests[0].is_ours}
    sizes = {name: len(manifests[0].ranks_here) for name, manifests in servers.items()}
    for manifests in servers.values():
        if is_loaded(manifests):
            check_agreement(manifests)
    if sum(sizes.values()) > count:
        shown = ", ".join(f"{name} ({size} of its shards)" for name, size in sizes.items())
        raise ConfigError(
            f"trainer ranks on host {host}: got {count}, expected one for each served shard there, of {shown}; start as "
            "many there, or choose with server.instances=[...]"
        )
    loaded = sum(len(manifests) for manifests in servers.values())
    if loaded < count:
        return servers, f"{loaded} of {count} shards on host {host} have loaded their model; waiting for the others"
    for name, manifests in servers.items():
        if not is_up(base / name, manifests):
            return servers, f"server {name} on host {host} has loaded its model; waiting for its engine"
    return servers, ""


def check_shared(control: Control, folder: Path) -> None:
    """Raise ConfigError, on all ranks, unless all see the same ``folder`` (checkpoint.dir). Collective."""
    probe = folder / control.broadcast(f".hosts-{uuid.uuid4().hex}".encode()).decode()
    with contextlib.ExitStack() as stack:
        with control.agree():
            if control.rank == 0:
                stack.callback(probe.unlink, missing_ok=True)
                probe.touch(0o600)
        with control.agree():
            deadline = time.monotonic() + SHARED_SECONDS
            while not (folder.is_dir() and probe.name in {path.name for path in folder.iterdir()}):
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"checkpoint.dir: got {folder}, of which host {socket.gethostname()} does not see what rank 0 "
                        "writes, expected a folder on a file system that all hosts share; set checkpoint.dir=..."
                    )
                time.sleep(0.1)


def gather_manifests(control: Control, own: Manifest) -> list[Manifest]:
    """The manifests of all ranks of this rank's server, where it is spread over hosts; ranks are numbered as the mesh
    numbers them. Collective: one gather, of the manifests of all servers."""
    rows = control.gather(msgspec.json.encode(own))
    first = control.rank - own.tp_rank
    return [msgspec.json.decode(row, type=Manifest) for row in rows[first : first + own.tp_size]]

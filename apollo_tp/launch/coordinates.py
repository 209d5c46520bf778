"""Where each trainer rank stands: beside which shard of which served replica. No rank assumes it from its number.

Every rank says which shards of its host's servers it could map (``offers``), all of them come to the same assignment
(``assign``), and each publishes its ``Coordinate``, from which all build the same mesh or raise the same error
(``arrange``). Messages go over the control group, whose ranks found each other through the launcher's c10d store.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import msgspec

from apollo_tp.distributed.control import Control
from apollo_tp.errors import ConfigError, ManifestError
from apollo_tp.launch.hosts import Hosts
from apollo_tp.shards.manifest import Manifest
from apollo_tp.shards.mapping import visible_uuids


class ServedRank(msgspec.Struct, frozen=True, order=True):
    """A rank of a server, and where it lives."""

    instance: str
    tp_rank: int


class Offer(msgspec.Struct, frozen=True):
    """What a trainer rank could take. ``machine``: see ``processes.machine``."""

    host: str
    machine: str
    shards: list[ServedRank]


class Coordinate(msgspec.Struct, frozen=True):
    """What a trainer rank has taken; ``facts`` are those in which all replicas must agree, as text."""

    host: str
    machine: str
    shard: ServedRank
    tp_size: int
    facts: dict[str, str]


class Arrangement(msgspec.Struct, frozen=True):
    """``ranks[replica][tp rank]`` of the launcher, replicas in the order of ``instances``; the launcher's rank 0 is
    the first rank of the first one. ``spread``: whether a replica's ranks are on several machines."""

    instances: list[str]
    hosts: list[str]
    ranks: list[list[int]]
    spread: list[bool]

    @property
    def flat(self) -> list[int]:
        """The launcher's ranks in the order of the mesh."""
        return [each for row in self.ranks for each in row]

    @property
    def is_permuted(self) -> bool:
        """Whether a rank's number is not its place in the mesh."""
        return self.flat != list(range(len(self.flat)))

    def labels(self) -> list[str]:
        """The replicas, for messages."""
        return [f"{name} on {host}" for name, host in zip(self.instances, self.hosts, strict=True)]

    def position(self, rank: int, size: int) -> int:
        """The number of the launcher's ``rank``, of ``size``: replica * P + tp rank in the mesh, and above those of the mesh
        for a rank without a shard."""
        spare = [each for each in range(size) if each not in self.flat]
        return [*self.flat, *spare].index(rank)


def take(
    control: Control, hosts: Hosts, servers: dict[str, list[Manifest]], *, spare: bool = False
) -> tuple[ServedRank | None, Arrangement]:
    """This rank's shard of the ``servers`` of this host, and the mesh of all ranks. ``spare``: ranks may be left without a
    shard. Collective: two gathers over the control group. Raises ConfigError or ManifestError, on all ranks alike."""
    host, machine = hosts.names[control.rank], hosts.machines[control.rank]
    offer = Offer(host, machine, _offered(servers))
    offers = [msgspec.json.decode(row, type=Offer) for row in control.gather(msgspec.json.encode(offer))]
    mine, own = assign(offers, spare=spare)[control.rank], None
    with control.agree():
        if mine is not None:
            manifest = next(m for m in servers[mine.instance] if m.tp_rank == mine.tp_rank)
            own = Coordinate(host, machine, mine, manifest.tp_size, facts_of(manifest))
    rows = control.gather(msgspec.json.encode(own))
    return mine, arrange([msgspec.json.decode(row, type=Coordinate | None) for row in rows])


def _offered(servers: dict[str, list[Manifest]]) -> list[ServedRank]:
    """The shards whose memory this process can map: on a CPU all, on GPUs those of the devices that it sees."""
    seen = {uuid.removeprefix("gpu-") for uuid in visible_uuids()}
    return sorted(
        ServedRank(instance, m.tp_rank)
        for instance, manifests in servers.items()
        for m in manifests
        if m.device == "cpu" or m.device_uuid.lower().removeprefix("gpu-") in seen
    )


def assign(offers: Sequence[Offer], *, spare: bool = False) -> list[ServedRank | None]:
    """A shard of its own for each rank, in the order of ranks where they have a choice; the same on all ranks. A rank offers
    shards of its own machine only. ``spare``: with fewer shards than ranks, some have none (None).

    Raises ConfigError if two machines have a shard of one name, or if there is none left for a rank, naming it and its host.
    """
    holder: dict[ServedRank, Offer] = {}
    for offer in offers:
        for shard in offer.shards:
            if (other := holder.setdefault(shard, offer)).machine != offer.machine:
                raise ConfigError(
                    f"server {shard.instance}: got its tensor-parallel rank {shard.tp_rank} on host {other.host} and on "
                    f"host {offer.host}, expected it once; set $APOLLO_TP_INSTANCE to another name for each server"
                )
    wanted = min(len(offers), len(holder)) if spare else len(offers)
    leads = [shard for shard in offers[0].shards if shard.tp_rank == 0]
    for first in leads:  # rank 0 leads its replica: its process has the coordinator
        taken = _matched([[first], *([s for s in offer.shards if s != first] for offer in offers[1:])])
        if len(taken) == wanted:
            return [taken.get(rank) for rank in range(len(offers))]
    taken = _matched([offer.shards for offer in offers])
    if len(taken) == wanted:
        raise ConfigError(
            f"trainer rank 0 on {offers[0].host}: got {_names(offers[0].shards)}, expected tensor-parallel rank 0 of a "
            "server among the shards whose device it sees; number the ranks otherwise, or let it see all GPUs"
        )
    rank = next(rank for rank in range(len(offers)) if rank not in taken)
    raise ConfigError(
        f"trainer rank {rank} on {offers[rank].host}: got {_names(offers[rank].shards)}, which other ranks need, expected a "
        "shard of its own; start one trainer rank beside each served shard, with its GPU in CUDA_VISIBLE_DEVICES"
    )


def _names(shards: Sequence[ServedRank]) -> str:
    return ", ".join(f"{s.instance} tp rank {s.tp_rank}" for s in shards) or "no shard"


def _matched(wanted: Sequence[Sequence[ServedRank]]) -> dict[int, ServedRank]:
    """As many ranks as possible with a shard that they want, none with that of another: augmenting paths, ranks in order."""
    holder: dict[ServedRank, int] = {}

    def place(rank: int, tried: set[ServedRank]) -> bool:
        for shard in sorted(wanted[rank], key=holder.__contains__):  # first what nobody has
            if shard not in tried:
                tried.add(shard)
                if shard not in holder or place(holder[shard], tried):
                    holder[shard] = rank
                    return True
        return False

    for rank in range(len(wanted)):
        place(rank, set())
    return {rank: shard for shard, rank in holder.items()}


def facts_of(manifest: Manifest) -> dict[str, str]:
    """In what the same rank of all replicas must agree. Layouts and configs are digests."""
    folder = Path(manifest.model_path)
    config = folder / "config.json"
    layout = (
        [(t.name, t.shape, t.stride, t.dtype) for t in manifest.served],
        [(t.name, t.shape, t.dtype) for t in manifest.checkpoint],
        manifest.segments,
        manifest.copies,
    )
    return {
        "model": str(folder.resolve()) if folder.is_dir() else manifest.model_path,
        "config": _digest(config.read_bytes() if config.is_file() else b""),
        "config overrides": msgspec.json.encode(manifest.config_overrides, order="deterministic").decode(),
        "longest request": str(manifest.max_model_len),
        "dtype": manifest.dtype,
        "vLLM release": manifest.vllm_version,
        "device": manifest.device,
        "layout": _digest(msgspec.json.encode(layout)),
    }


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def arrange(offered: Sequence[Coordinate | None]) -> Arrangement:
    """The mesh of all ranks, but those without a shard (None).

    Raises ManifestError, naming replica and host, for holes, for two ranks beside one shard, and for replicas that differ
    from the first.
    """
    found: dict[str, dict[int, int]] = defaultdict(dict)
    problems = []
    coordinates = {rank: c for rank, c in enumerate(offered) if c is not None}
    for rank, c in coordinates.items():
        if (other := found[c.shard.instance].setdefault(c.shard.tp_rank, rank)) != rank:
            problems.append(f"{_named(c)}: got trainer ranks {other} and {rank} beside it, expected one")
    first = coordinates[0]
    instances = sorted(found, key=lambda name: (name != first.shard.instance, name))
    for name in instances:
        c = coordinates[next(iter(found[name].values()))]
        holes = [tp_rank for tp_rank in range(c.tp_size) if tp_rank not in found[name]]
        if holes:
            several = len({each.machine for each in coordinates.values()}) > 1
            hint = " (a server over several hosts needs one $APOLLO_TP_INSTANCE on all of them)" if several else ""
            problems.append(
                f"{name} on {c.host}: got no trainer rank beside tp ranks {holes} of {c.tp_size}, expected one beside each"
                f"{hint}"
            )
        if c.tp_size != first.tp_size:
            problems.append(
                f"{name} on {c.host}: got tensor-parallel size {c.tp_size}, expected {first.tp_size} as of "
                f"{first.shard.instance} on {first.host}"
            )
    if not problems:
        problems = _differences(coordinates, found, instances)
    if problems:
        raise ManifestError(
            f"replicas: {'; '.join(problems)}. Start all of them with the same model, options and vLLM, and one trainer "
            "rank beside each of their shards"
        )
    ranks = [[found[name][tp_rank] for tp_rank in range(first.tp_size)] for name in instances]
    hosts = [", ".join(dict.fromkeys(coordinates[rank].host for rank in row)) for row in ranks]
    spread = [len({coordinates[rank].machine for rank in row}) > 1 for row in ranks]
    return Arrangement(instances, hosts, ranks, spread)


def _differences(
    coordinates: dict[int, Coordinate], found: dict[str, dict[int, int]], instances: Sequence[str]
) -> list[str]:
    """Facts in which a replica is not like the first one, or a rank of that one not like its first, each once."""
    problems: dict[tuple[str, str], str] = {}
    for name in instances:
        for tp_rank, rank in sorted(found[name].items()):
            is_first = name == instances[0]
            own, model = coordinates[rank], coordinates[found[instances[0]][0 if is_first else tp_rank]]
            for fact, got in own.facts.items():
                if got != model.facts[fact] and not (is_first and fact == "layout"):
                    text = f"{_named(own)}: {fact}: got {got}, expected {model.facts[fact]} as of {_named(model)}"
                    problems.setdefault((name, fact), text)
    return list(problems.values())


def _named(coordinate: Coordinate) -> str:
    return f"{coordinate.shard.instance} tp rank {coordinate.shard.tp_rank} on {coordinate.host}"

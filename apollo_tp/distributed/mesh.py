"""The trainer's ranks as a mesh: replicas of one model, each served by a tensor-parallel group of its own.

Rank ``replica * P + shard`` of the world stands beside the shard ``shard`` of the replica ``replica``, for P shards of each.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from apollo_tp.distributed.peer_memory import PeerSums
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import ConfigError


@dataclass(frozen=True)
class Mesh:
    """``world``: all ranks. ``tp``: the ranks of this replica (P). ``replicas``: those that hold the same shard, one in each
    replica (R), in the order of replicas; its ``traffic`` is counted apart. Who leaves one of them leaves all: ``world`` is
    formed and dissolved, the others follow."""

    world: TPGroup
    tp: TPGroup
    replicas: TPGroup

    @classmethod
    def single(cls, tp: TPGroup) -> Mesh:
        """The mesh of one replica."""
        return cls(tp, tp, TPGroup.single())

    @classmethod
    def build(cls, world: TPGroup, tp_size: int) -> Mesh:
        """Divide ``world`` into replicas of ``tp_size`` ranks. Collective: a process group for each replica and each shard.

        Raises ConfigError if the ranks do not divide.
        """
        num_replicas, rest = divmod(world.size, tp_size)
        if rest:
            raise ConfigError(
                f"ranks: got {world.size} trainer ranks, expected a multiple of {tp_size}, one for each "
                "shard of each replica"
            )
        if num_replicas == 1:
            return cls.single(world)
        rows = tuple(tuple(range(r * tp_size, (r + 1) * tp_size)) for r in range(num_replicas))
        columns = tuple(tuple(range(shard, world.size, tp_size)) for shard in range(tp_size))
        replicas = world.split(columns)
        replicas.traffic = Counter()
        tp = world.split(rows)
        tp.peers, world.peers = world.peers, PeerSums(enabled=False)
        return cls(world, tp, replicas)

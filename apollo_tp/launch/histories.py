"""What the replicas' records say of their weights: whether they are the same, and from which one others are to be filled."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from apollo_tp.checkpoint.lineage import Departure, Lineage, LineageFile
from apollo_tp.distributed.control import Control
from apollo_tp.errors import ReplicaError

MAX_AWAY = 32
"""How many servers that are away a record keeps: it has a size that it must not outgrow."""


class History(msgspec.Struct, frozen=True):
    """Of one replica: whether a trainer has changed its weights since its server loaded them, the record, and the life of
    its server (``Manifest.life``)."""

    trained_here: bool
    record: Lineage
    server_life: str = ""

    @property
    def state(self) -> tuple[bool, Lineage]:
        """What replicas have in common."""
        return self.trained_here, self.record

    @property
    def life(self) -> str:
        """The life with which the history of the weights began."""
        return self.record.life or self.server_life


def source_of(histories: Sequence[History], labels: Sequence[str]) -> int | None:
    """The replica whose weights the others get; None if all have the same. ``labels`` name the replicas.

    A replica is filled if no trainer has changed its weights (its server was started again), if its record is the last
    step behind (the trainer was killed between two records), or if it is where it was when the others went on without it.
    Raises ReplicaError if one was trained apart.
    """
    if all(history.state == histories[0].state for history in histories):
        return None
    source = max(
        range(len(histories)), key=lambda r: (histories[r].trained_here, histories[r].record.weight_version, -r)
    )
    newest = histories[source].record
    for history, label in zip(histories, labels, strict=True):
        if history.trained_here and not _leads_to(history, newest):
            raise ReplicaError(
                f"replicas: got weight version {history.record.weight_version} on {label}, last trained by job "
                f"{history.record.last_job_id or '(none)'} step {history.record.last_job_step}, expected that of "
                f"{labels[source]}: version {newest.weight_version}, job {newest.last_job_id or '(none)'} step "
                f"{newest.last_job_step}; they were trained apart. Start one of the servers again: it is then filled"
            )
    return source


def partners(record: Lineage, present: Sequence[str]) -> dict[str, Departure | None]:
    """The ``partners`` of a history that goes on with the servers of the lives ``present``: others leave it here."""
    away = {life: left or record.here for life, left in record.partners.items() if life not in present}
    return dict(list(away.items())[-MAX_AWAY:]) | dict.fromkeys(present)


def agree_on_record(control: Control, lineage: LineageFile, tp_rank: int, tp_size: int) -> None:
    """Of a server on several hosts each host has a record: all its ranks go on from that of its first one, since a kill may
    come between two writes. Collective: one gather; ranks are numbered as the mesh numbers them."""
    own = History(lineage.trained_here, lineage.record)
    rows = control.gather(msgspec.json.encode(own))
    start = control.rank - tp_rank
    histories = [msgspec.json.decode(row, type=History) for row in rows[start : start + tp_size]]
    trained_here = any(history.trained_here for history in histories)
    if own != History(trained_here, histories[0].record):
        lineage.trained_here = True
        lineage.update(**msgspec.structs.asdict(histories[0].record))


def _leads_to(history: History, newest: Lineage) -> bool:
    """Whether ``newest`` is this replica's record, or can be the one that was written after it; of a replica that the others
    went on without, whether it is where they left it, or has missed the step before that."""
    record, left = history.record, newest.partners.get(history.server_life)
    if left is not None and history.life == newest.life:
        return record.here == left or record.weight_version + 1 == left.weight_version
    if record.weight_version == newest.weight_version:
        return msgspec.structs.replace(record, checkpoint=newest.checkpoint, partners=newest.partners) == newest
    return record.weight_version + 1 == newest.weight_version and record.checkpoint == newest.checkpoint

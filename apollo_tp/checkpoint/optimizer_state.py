"""Optimizer state on disk in GLOBAL coordinates: written at any number of ranks, read at any other. No pickle.

    <folder>/optimizer.json              what the state belongs to, and the per-parameter counters
    <folder>/rank-00002.part-0/*.safetensors   the boxes of rank 2, written by torch.distributed.checkpoint

A key is ``<checkpoint tensor>.<kind>``; its global shape is the weight's, or (channels, rank) for a projected matrix.
Each key of a file carries the global offset of its box. A safetensors file holds one box per key, so that further ranges of
a tensor that a rank holds in several (a fused projection) go into part 1, 2, ... The folder appears complete or not at all
through its owner (apollo_tp.checkpoint), which renames it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor

from apollo_tp.checkpoint import checksum
from apollo_tp.checkpoint.state_files import StateFiles
from apollo_tp.checkpoint.state_planners import Piece, SaveBoxes
from apollo_tp.checkpoint.transfers import Transfers
from apollo_tp.distributed.control import ComputeControl
from apollo_tp.errors import CheckpointError
from apollo_tp.optim import Optimizer
from apollo_tp.optim.rounding import convert_remainder
from apollo_tp.optim.sharding import moment_rank
from apollo_tp.shards.boxes import Box

SCHEMA_VERSION = 1
COUNTERS = "optimizer.json"
PART_BYTES = 2**30
"""Of a rank's state between two collectives when it is checked: none waits long for another."""


def _pieces(optimizer: Optimizer) -> Iterator[Piece]:
    """All state tensors of this rank, cut into global boxes."""
    for group in optimizer.update_group.groups:
        for member in group.members:
            matrix, start = member.matrix, member.rows.start
            shape = matrix.num_channels, group.rank
            for part, (first, last, range_owned) in enumerate(matrix.state_ranges):
                rows, box = slice(start, start + last - first), Box((first, 0), (last - first, group.rank))
                for kind, state in (("exp_avg", group.exp_avg), ("exp_avg_sq", group.exp_avg_sq)):
                    owned = matrix.exchanged or (range_owned and matrix.weight.is_owner)
                    yield Piece(f"{matrix.weight.name}.{kind}", shape, box, state[rows], part, owned)
                start = rows.stop
    adamw = optimizer.update_group.adamw.values()
    elementwise = [(a.weight, kind, getattr(a, kind)) for a in adamw for kind in ("exp_avg", "exp_avg_sq")]
    elementwise += [(w, "remainder", w.remainder) for w in optimizer.weights if w.remainder is not None]
    for weight, kind, folded in elementwise:
        shard, local = weight.shard, folded.view(weight.shard.local_shape)
        for part, (box, start, owned) in enumerate(weight.boxes()):
            view = local if shard.dim is None else local.narrow(shard.dim, start, box.shape[shard.dim])
            yield Piece(f"{weight.name}.{kind}", shard.global_shape, box, view, part, owned)


def _fits(optimizer: Optimizer) -> dict[str, Any]:
    """What a saved state must agree with."""
    config, projected = optimizer.config, optimizer.projected_names
    return {
        "optim.kind": config.kind.value,
        "optim.rank": moment_rank(config) if projected else None,
        "optim.projection": config.projection.value,
        "optim.refresh_every": config.refresh_every,
        "optim.seed": config.seed,
        "projected": projected,
        "adamw": sorted(set(optimizer.names) - set(projected)),
    }


@dataclass(frozen=True)
class Snapshot:
    """What one rank writes of a state. ``counters`` are of all ranks and replicas; ``rank`` counts over both."""

    pieces: list[Piece]
    counters: dict[str, Any]
    rank: int


def snapshot(optimizer: Optimizer) -> Snapshot:
    """The state as it is now, as views. Collective over replicas, if there are several: one all-gather."""
    steps, limiter_norms = optimizer.gather_counters()
    pieces = [p for p in _pieces(optimizer) if p.owned and p.tensor.numel()]
    counters = {
        "schema": SCHEMA_VERSION,
        "ranks": optimizer.tp.size * optimizer.replicas.size,
        "precision": optimizer.precision.value,
        "fits": _fits(optimizer),
        "step_count": optimizer.step_count,
        "rounding_stream": optimizer.rounding_stream,
        "steps": dict(zip(optimizer.names, steps, strict=True)),
        "limiter_norms": dict(zip(optimizer.names, limiter_norms, strict=True)),
    }
    return Snapshot(pieces, counters, optimizer.replicas.rank * optimizer.tp.size + optimizer.tp.rank)


def local_tensors(optimizer: Optimizer) -> list[Tensor]:
    """All state tensors of this rank that a checkpoint would have, as views. Local."""
    return [piece.tensor for piece in _pieces(optimizer) if piece.tensor.numel()]


def checksums(pieces: Iterable[Piece]) -> dict[str, int]:
    """The part of these pieces in the checksums of the state's tensors, by key."""
    return checksum.add({p.key: checksum.of_box(p.tensor, p.box, p.global_shape)} for p in pieces)


def save(optimizer: Optimizer, folder: Path) -> None:
    """Write the state of all ranks below ``folder``, which all ranks see. Replicated boxes are written once.

    Collectives: one all-gather of checksums, one at the end, so that the folder is complete when any rank returns; with
    several replicas, three more over them. Raises CheckpointError on the ranks that could not write, RankFailedError on the
    others.
    """
    controls = [ComputeControl(group, optimizer.device) for group in (optimizer.replicas, optimizer.tp)]
    state = snapshot(optimizer)
    sums = checksum.over_ranks(checksums(state.pieces), *controls)
    with controls[0].agree(), controls[1].agree():
        write_part(state, folder)
        if state.rank == 0:
            write_counters(state, folder, sums)


def write_part(state: Snapshot, folder: Path) -> None:
    """This rank's part. Local. Raises CheckpointError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for part in sorted({p.part for p in state.pieces}):
            writer = dcp.HuggingFaceStorageWriter(str(_part_folder(folder, state.rank, part)), save_distributed=True)
            planner = SaveBoxes([p for p in state.pieces if p.part == part])
            with _no_coordination():
                dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
    except dcp.api.CheckpointException as error:  # its own text does not begin with the cause
        raise _not_written(folder, _causes(error)) from error
    except (OSError, RuntimeError) as error:
        raise _not_written(folder, f"{type(error).__name__}: {error}") from error


def write_counters(state: Snapshot, folder: Path, sums: Mapping[str, int]) -> None:
    """The counters, with the checksums of all ranks. Local, on one rank. Raises CheckpointError."""
    content = state.counters | {"checksums": {key: checksum.text(value) for key, value in sums.items()}}
    try:
        (folder / COUNTERS).write_text(json.dumps(content, indent=1))
    except OSError as error:
        raise _not_written(folder, f"{type(error).__name__}: {error}") from error


def _not_written(folder: Path, causes: str) -> CheckpointError:
    return CheckpointError(
        f"optimizer state in {folder}: got {causes}, expected this rank's part to be written; free space or choose another "
        "checkpoint.dir"
    )


def load(optimizer: Optimizer, folder: Path) -> None:
    """Read the state that any number of ranks wrote below ``folder``. No collective; every rank reads what it holds.

    A remainder is read where both sides have one, of 8 or 16 bits, else (saved from fp32 weights, say) it stays zero. With
    ``optim.reset_state`` a state that does not fit is left alone and the optimizer starts afresh. Raises CheckpointError
    otherwise, or if boxes are missing.
    """
    saved = _read_counters(folder)
    differing = _differences(saved, _fits(optimizer))
    if differing:
        if optimizer.config.reset_state:
            return
        raise _does_not_fit(folder, differing)
    files, pieces = StateFiles(folder), [piece for piece in _pieces(optimizer) if piece.tensor.numel()]
    with Transfers(optimizer.device) as transfers:
        files.read(pieces, transfers, _fill)
    for piece in pieces:
        if piece.key not in files:  # a remainder that was not saved
            piece.tensor.zero_()
    optimizer.step_count = saved["step_count"]
    optimizer.use_rounding_stream(saved.get("rounding_stream", 0))
    group = optimizer.update_group
    owned = [weight.name for weight in optimizer.weights]
    group.counters.steps = [saved["steps"][name] for name in owned]
    group.counters.limiter_norms.copy_(group.vector([saved["limiter_norms"][name] for name in owned]))


def _fill(piece: Piece, box: Box, values: Tensor) -> None:
    """Copy ``values`` of ``box`` into the piece, or into a remainder of the other size."""
    piece.tensor[box.slices(piece.box.offset)].copy_(convert_remainder(values, piece.tensor.dtype))


def check(optimizer: Optimizer, folder: Path, world: ComputeControl, controls: Sequence[ComputeControl]) -> None:
    """Read the state below ``folder`` beside that of the optimizer, which does not change, some megabytes at a time. Raises
    CheckpointError, on all ranks, if ``load`` would, or if the state is not what was saved.

    Collectives: for each part a gather over each of ``controls``, which lead over ranks and replicas, and two over all.
    """
    with world.agree():
        saved = _read_counters(folder)
        if differing := _differences(saved, _fits(optimizer)):
            raise _does_not_fit(folder, differing)
        parts, files = _parts(optimizer), StateFiles(folder)
    count = max(int(n) for n in world.gather(str(len(parts)).encode()))
    problem, found = "", dict[str, int]()
    with Transfers(optimizer.device) as transfers:
        for number in range(count):
            own: list[dict[str, int]] = []

            def add(piece: Piece, box: Box, values: Tensor, own: list[dict[str, int]] = own) -> None:
                own.append({piece.key: checksum.of_box(values, box, piece.global_shape)})

            try:
                files.read(parts[number] if number < len(parts) else (), transfers, add)
            except (CheckpointError, RuntimeError) as error:  # the other ranks go on to the next collective
                problem = problem or str(error)
            found = checksum.add([found, checksum.over_ranks(checksum.add(own), *controls)])
    with world.agree():
        if problem:
            raise CheckpointError(problem)
    if damaged := checksum.differing(saved.get("checksums", {}), found):  # the same on all ranks
        raise CheckpointError(
            f"optimizer state in {folder}: got {damaged[0]} with another checksum than it was written with, expected the "
            "values that were written; restore another checkpoint; nothing was written"
        )


def _parts(optimizer: Optimizer) -> list[list[Piece]]:
    """The pieces that this rank owns and that a checkpoint has, in lists of about PART_BYTES."""
    parts: list[list[Piece]] = [[]]
    room = PART_BYTES
    for piece in _pieces(optimizer):
        if piece.owned and piece.tensor.numel():
            if parts[-1] and piece.tensor.nbytes > room:
                parts.append([])
                room = PART_BYTES
            parts[-1].append(piece)
            room -= piece.tensor.nbytes
    return parts


def step_count(folder: Path) -> int:
    """The optimizer's completed steps when the state below ``folder`` was saved. Raises CheckpointError."""
    return int(_read_counters(folder)["step_count"])


def _causes(error: dcp.api.CheckpointException) -> str:
    return "; ".join(f"{type(cause).__name__}: {cause}" for cause, _ in error.failures.values()) or repr(error)


def _read_counters(folder: Path) -> dict[str, Any]:
    try:
        saved: dict[str, Any] = json.loads((folder / COUNTERS).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder / COUNTERS}: got {error}, expected the counters of a saved optimizer"
        ) from error
    return saved


def _does_not_fit(folder: Path, differing: list[str]) -> CheckpointError:
    return CheckpointError(
        f"optimizer state in {folder} does not fit: {'; '.join(differing)}; set these options back, or start with "
        "fresh state by optim.reset_state=true"
    )


def _differences(saved: dict[str, Any], fits: dict[str, Any]) -> list[str]:
    """Reasons not to resume, each as "option: got saved value, expected configured value"."""
    if saved.get("schema") != SCHEMA_VERSION:
        return [f"schema: got {saved.get('schema')}, expected {SCHEMA_VERSION}"]
    result = []
    for key, want in fits.items():
        got = saved["fits"].get(key)
        if got == want:
            continue
        if isinstance(want, list) and isinstance(got, list):
            extra, missing = sorted(set(got) - set(want))[:3], sorted(set(want) - set(got))[:3]
            result.append(f"{key} parameters: saved only {extra}, configured only {missing}")
        else:
            result.append(f"{key}: got {got!r} saved, expected {want!r}")
    return result


@contextmanager
def _no_coordination() -> Iterator[None]:
    """No warning that every rank writes and reads by itself: the library's own coordination would send pickles."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _part_folder(folder: Path, rank: int, part: int) -> Path:
    return folder / f"rank-{rank:05d}.part-{part}"

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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from apollo_tp.distributed.control import ComputeControl
from apollo_tp.errors import CheckpointError
from apollo_tp.optim import Optimizer
from apollo_tp.optim.rounding import convert_remainder
from apollo_tp.optim.sharding import moment_rank
from apollo_tp.shards.boxes import Box

SCHEMA_VERSION = 1
COUNTERS = "optimizer.json"


@dataclass(frozen=True)
class _Piece:
    """A LOCAL view that holds one global box of one key. ``owned`` on one of the ranks with the same content."""

    key: str
    global_shape: tuple[int, ...]
    box: Box
    tensor: Tensor
    part: int
    owned: bool


def _pieces(optimizer: Optimizer) -> Iterator[_Piece]:
    """All state tensors of this rank, cut into global boxes."""
    for group in optimizer.update_group.groups:
        for member in group.members:
            matrix, start = member.matrix, member.rows.start
            shape = matrix.num_channels, group.rank
            for part, (first, last, range_owned) in enumerate(matrix.state_ranges):
                rows, box = slice(start, start + last - first), Box((first, 0), (last - first, group.rank))
                for kind, state in (("exp_avg", group.exp_avg), ("exp_avg_sq", group.exp_avg_sq)):
                    owned = matrix.exchanged or (range_owned and matrix.weight.is_owner)
                    yield _Piece(f"{matrix.weight.name}.{kind}", shape, box, state[rows], part, owned)
                start = rows.stop
    adamw = optimizer.update_group.adamw.values()
    elementwise = [(a.weight, kind, getattr(a, kind)) for a in adamw for kind in ("exp_avg", "exp_avg_sq")]
    elementwise += [(w, "remainder", w.remainder) for w in optimizer.weights if w.remainder is not None]
    for weight, kind, folded in elementwise:
        shard, local = weight.shard, folded.view(weight.shard.local_shape)
        for part, (box, start, owned) in enumerate(weight.boxes()):
            view = local if shard.dim is None else local.narrow(shard.dim, start, box.shape[shard.dim])
            yield _Piece(f"{weight.name}.{kind}", shard.global_shape, box, view, part, owned)


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


def _counters(optimizer: Optimizer) -> dict[str, Any]:
    """Of all replicas. Collective over replicas, if there are several: one all-gather."""
    steps, limiter_norms = optimizer.gather_counters()
    return {
        "schema": SCHEMA_VERSION,
        "ranks": optimizer.tp.size * optimizer.replicas.size,
        "precision": optimizer.precision.value,
        "fits": _fits(optimizer),
        "step_count": optimizer.step_count,
        "rounding_stream": optimizer.rounding_stream,
        "steps": dict(zip(optimizer.names, steps, strict=True)),
        "limiter_norms": dict(zip(optimizer.names, limiter_norms, strict=True)),
    }


def save(optimizer: Optimizer, folder: Path) -> None:
    """Write the state of all ranks below ``folder``, which all ranks see. Replicated boxes are written once.

    Collectives: one all-gather at the end, so that the folder is complete when any rank returns; with several replicas, two
    more over them. Raises CheckpointError on the ranks that could not write, RankFailedError on the others.
    """
    counters = _counters(optimizer)
    controls = [ComputeControl(group, optimizer.device) for group in (optimizer.replicas, optimizer.tp)]
    with controls[0].agree(), controls[1].agree():
        _save_own_part(optimizer, folder, counters)


def _save_own_part(optimizer: Optimizer, folder: Path, counters: dict[str, Any]) -> None:
    """This rank's part, and on the first rank the counters. Raises CheckpointError."""
    rank = optimizer.replicas.rank * optimizer.tp.size + optimizer.tp.rank
    pieces = [p for p in _pieces(optimizer) if p.owned and p.tensor.numel()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for part in sorted({p.part for p in pieces}):
            writer = dcp.HuggingFaceStorageWriter(str(_part_folder(folder, rank, part)), save_distributed=True)
            planner = _SavePlanner([p for p in pieces if p.part == part])
            with _no_coordination():
                dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
        if rank == 0:
            (folder / COUNTERS).write_text(json.dumps(counters, indent=1))
    except dcp.api.CheckpointException as error:  # its own text does not begin with the cause
        causes = "; ".join(f"{type(cause).__name__}: {cause}" for cause, _ in error.failures.values()) or repr(error)
        raise _not_written(folder, causes) from error
    except (OSError, RuntimeError) as error:
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
    try:
        saved = json.loads((folder / COUNTERS).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder / COUNTERS}: got {error}, expected the counters of a saved optimizer"
        ) from error
    differing = _differences(saved, _fits(optimizer))
    if differing:
        if optimizer.config.reset_state:
            return
        raise CheckpointError(
            f"optimizer state in {folder} does not fit: {'; '.join(differing)}; set these options back, or start with "
            "fresh state by optim.reset_state=true"
        )
    planner = _LoadPlanner(p for p in _pieces(optimizer) if p.tensor.numel())
    for part in sorted(folder.glob("rank-*.part-*")):
        with _no_coordination():
            dcp.load({}, storage_reader=dcp.HuggingFaceStorageReader(str(part)), planner=planner, no_dist=True)
    planner.check_complete(folder)
    optimizer.step_count = saved["step_count"]
    optimizer.use_rounding_stream(saved.get("rounding_stream", 0))
    group = optimizer.update_group
    owned = [weight.name for weight in optimizer.weights]
    group.counters.steps = [saved["steps"][name] for name in owned]
    group.counters.limiter_norms.copy_(group.vector([saved["limiter_norms"][name] for name in owned]))


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


def _chunk(piece: _Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(piece.box.offset), sizes=torch.Size(piece.box.shape))


class _SavePlanner(SavePlanner):
    """Writes boxes of plain tensors at global offsets; the default planner knows global offsets of DTensors only."""

    def __init__(self, pieces: Iterable[_Piece]) -> None:
        self.pieces = {piece.key: piece for piece in pieces}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Nothing to prepare."""

    def create_local_plan(self) -> SavePlan:
        return SavePlan([self._item(piece) for piece in self.pieces.values()])

    def _item(self, piece: _Piece) -> WriteItem:
        properties = TensorProperties.create_from_tensor(piece.tensor)
        data = TensorWriteData(chunk=_chunk(piece), properties=properties, size=torch.Size(piece.global_shape))
        return WriteItem(MetadataIndex(piece.key, piece.box.offset), WriteItemType.SHARD, tensor_data=data)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, items = create_default_global_save_plan(all_plans)
        return plans, Metadata(items)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.pieces[write_item.index.fqn].tensor.detach().contiguous()


class _LoadPlanner(LoadPlanner):
    """Reads from each folder what intersects the wanted boxes, and counts the elements read."""

    def __init__(self, pieces: Iterable[_Piece]) -> None:
        self.wanted: dict[str, list[_Piece]] = {}
        for piece in pieces:
            self.wanted.setdefault(piece.key, []).append(piece)
        self.missing = {key: sum(p.box.numel for p in pieces) for key, pieces in self.wanted.items()}
        self.stored: set[str] = set()
        self.metadata: Metadata | None = None
        self.converted: set[str] = set()

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        self.stored.update(self.metadata.state_dict_metadata)
        items: list[ReadItem] = []
        for key, pieces in self.wanted.items():
            stored = self.metadata.state_dict_metadata.get(key)
            if isinstance(stored, TensorStorageMetadata):
                dtype, want = stored.properties.dtype, pieces[0].tensor.dtype
                if dtype != want and {dtype, want} == {torch.int8, torch.int16}:
                    self.converted.add(key)
                elif dtype != want:
                    raise CheckpointError(f"{key}: got {dtype} saved, expected {want}; the file is of another version")
                items += create_read_items_for_chunk_list(key, stored, [_chunk(piece) for piece in pieces])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise CheckpointError(f"{read_item.dest_index.fqn}: got bytes, expected a tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        tensor = self._view(read_item)
        self.missing[read_item.dest_index.fqn] -= tensor.numel()
        if read_item.dest_index.fqn not in self.converted:
            return tensor
        return torch.empty_like(tensor, dtype=torch.int8 if tensor.dtype is torch.int16 else torch.int16)

    def _view(self, read_item: ReadItem) -> Tensor:
        """The part of a wanted tensor that this item fills."""
        position = read_item.dest_index.index
        assert position is not None
        tensor = self.wanted[read_item.dest_index.fqn][position].tensor
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            tensor = tensor.narrow(dim, start, length)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """The reader has copied into the view, or into a remainder of the other size."""
        if read_item.dest_index.fqn in self.converted:
            view = self._view(read_item)
            view.copy_(convert_remainder(tensor, view.dtype))

    def check_complete(self, folder: Path) -> None:
        """Raise CheckpointError unless every wanted element was read exactly once, but for remainders that nobody saved."""
        expected = {k: n for k, n in self.missing.items() if k in self.stored or not k.endswith(".remainder")}
        short = [f"{key} ({count} elements)" for key, count in expected.items() if count]
        if short:
            raise CheckpointError(
                f"optimizer state in {folder}: got an incomplete set of files, expected {len(expected)} tensors; "
                f"missing of {len(short)}: {', '.join(short[:3])}; copy all rank-* folders or use optim.reset_state=true"
            )

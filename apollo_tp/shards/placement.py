"""From the manifests of all ranks to what each rank holds of each checkpoint tensor. Pure records, no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from apollo_tp.errors import UnsupportedModelError
from apollo_tp.shards.boxes import Box, Shard, cut_dim, merge_ranges, replicated_parts, uncovered
from apollo_tp.shards.manifest import CheckpointTensor, Manifest, SegmentRecord, ServedTensor


@dataclass(frozen=True, slots=True)
class Placement:
    """One checkpoint tensor on one rank: its shard record, and the one strided view of a served tensor that holds it.

    ``offset`` counts elements from the start of the served tensor; ``served`` is "" where the rank holds nothing of it.
    """

    shard: Shard
    dtype: str
    served: str
    offset: int
    stride: tuple[int, ...]


def place(manifests: Sequence[Manifest]) -> list[dict[str, Placement]]:
    """Placements per rank, by checkpoint tensor name, in checkpoint order.

    Raises UnsupportedModelError, listing every tensor with its reason, unless all that the server holds can be trained.
    """
    result, problems = place_what_fits(manifests)
    if problems:
        lines = "\n".join(f"  {name}: {reason}" for name, reason in problems.items())
        raise UnsupportedModelError(
            f"server {manifests[0].instance_id}, model {manifests[0].model_path}: got {len(problems)} tensors that cannot "
            f"be trained in place, expected none; serve a model and options without them:\n{lines}"
        )
    return result


def place_what_fits(manifests: Sequence[Manifest]) -> tuple[list[dict[str, Placement]], dict[str, str]]:
    """Placements per rank, by checkpoint tensor name, in checkpoint order; and by name why the rest has none."""
    problems = {r.name: f"rank {m.tp_rank}: {r.reason}" for m in manifests for r in m.refusals}
    by_rank = [_by_checkpoint_name(m) for m in manifests]
    served = [{s.name: s for s in m.served} for m in manifests]
    result: list[dict[str, Placement]] = [{} for _ in manifests]
    for tensor in manifests[0].checkpoint:
        if tensor.name in problems or all(tensor.name in m.not_served for m in manifests):
            continue
        if in_part := _loaded_in_part(tensor.name, manifests):
            problems[tensor.name] = in_part
            continue
        try:
            parts = _place_one(tensor, [segments[tensor.name] for segments in by_rank], served)
        except (UnsupportedModelError, ValueError) as error:
            problems[tensor.name] = str(error)
            continue
        for rank, placement in enumerate(parts):
            result[rank][tensor.name] = placement
    problems.update(_untraced(manifests))
    problems.update(_on_top_of_another(manifests))
    return result, problems


def second_copies(manifests: Sequence[Manifest]) -> dict[str, str]:
    """By checkpoint tensor that no rank loads: the tensor with the same values, which is served and trained."""
    nowhere = set.intersection(*(set(m.not_served) for m in manifests))
    return {copy: original for copy, original in manifests[0].copies.items() if copy in nowhere}


def _by_checkpoint_name(manifest: Manifest) -> dict[str, list[SegmentRecord]]:
    found: dict[str, list[SegmentRecord]] = defaultdict(list)
    for segment in manifest.segments:
        found[segment.checkpoint].append(segment)
    return found


def _on_top_of_another(manifests: Sequence[Manifest]) -> dict[str, str]:
    """Checkpoint tensors that begin where another one does, with the reason: both would be trained, neither is served."""
    result = {}
    for manifest in manifests:
        first: dict[tuple[str, int], str] = {}
        for s in manifest.segments:
            if first.setdefault((s.served, s.view_offset), s.checkpoint) != s.checkpoint:
                other = first[s.served, s.view_offset]
                result[s.checkpoint] = f"rank {manifest.tp_rank}: it is copied to where {other} is, in {s.served}"
    return result


def _loaded_in_part(name: str, manifests: Sequence[Manifest]) -> str:
    """vLLM compares a stored head with the embedding on each rank by itself, and may tie them only on some ranks."""
    loaded = [m.tp_rank for m in manifests if name not in m.not_served]
    if len(loaded) == len(manifests):
        return ""
    return (
        f"got it loaded on ranks {loaded} alone, expected it on all or none; a head that equals the embedding in the rows "
        "of some ranks is tied to it there: set tie_word_embeddings to false in config.json"
    )


def _untraced(manifests: Sequence[Manifest]) -> dict[str, str]:
    """Served tensors that no checkpoint tensor is copied to, with the reason: the loader computed or invented them."""
    result = {}
    for manifest in manifests:
        reached = {segment.served for segment in manifest.segments}
        has_rows = {s.name for s in manifest.served if s.shape and 0 not in s.shape}
        for name in sorted(has_rows - reached):
            if not _holds_only_padding(name, manifests):
                result[f"served {name}"] = f"rank {manifest.tp_rank}: no checkpoint tensor is copied into it"
    return result


def _holds_only_padding(served: str, manifests: Sequence[Manifest]) -> bool:
    """True if other ranks hold all rows of the vocabulary, and this rank's part of it is padding."""
    return any(segment.served == served for manifest in manifests for segment in manifest.segments)


def _place_one(
    tensor: CheckpointTensor, segments: list[list[SegmentRecord]], served: list[dict[str, ServedTensor]]
) -> list[Placement]:
    """Placements of one checkpoint tensor, by rank, from each rank's ``segments`` of it and ``served`` tensors.

    Raises UnsupportedModelError or ValueError if it cannot be trained.
    """
    segments = [stack_experts(mine) for mine in segments]
    boxes = [[Box(tuple(s.box_offset), tuple(s.box_shape)) for s in mine] for mine in segments]
    shape = tuple(tensor.shape)
    missing = uncovered(shape, [box for mine in boxes for box in mine])
    if missing:
        raise UnsupportedModelError(f"got {missing} of its {list(shape)} elements on no rank, expected all of them")
    dim = cut_dim(tensor.name, shape, [box for mine in boxes for box in mine])
    if dim is None and any(not mine for mine in boxes):
        dim = 0  # a small vocabulary: one rank holds every row, others none
    ordered = [sorted(mine, key=lambda s: s.view_offset) for mine in segments]
    ranges = [
        merge_ranges((s.box_offset[dim], s.box_offset[dim] + s.box_shape[dim]) for s in mine) if dim is not None else ()
        for mine in ordered
    ]
    # Parts of fused tensors and replicas may be copied in pieces and yet be complete on every rank.
    complete = dim is None or all(mine == ((0, shape[dim]),) for mine in ranges)
    return [
        _placement(
            Shard(
                tensor.name,
                shape,
                None if complete else dim,
                () if complete else ranges[rank],
                tuple(r for r, other in enumerate(ranges) if other == ranges[rank]),
                () if complete else tuple(replicated_parts(ranges, rank)),
            ),
            dim,
            ordered[rank],
            served[rank],
        )
        for rank in range(len(segments))
    ]


def stack_experts(segments: list[SegmentRecord]) -> list[SegmentRecord]:
    """Segments of a tensor of three dimensions, the first being the expert, of which the loader has copied one expert after
    the other (Granite): those that hold the same box of consecutive experts, at equal distances, as one."""
    groups: dict[tuple[Any, ...], list[SegmentRecord]] = defaultdict(list)
    for s in segments:
        if len(s.box_shape) != 3 or s.box_shape[0] != 1:
            return segments
        groups[s.served, *s.box_offset[1:], *s.box_shape[1:], *s.view_stride[1:]].append(s)
    stacked = []
    for group in groups.values():
        group.sort(key=lambda s: s.box_offset[0])
        first, count = group[0], len(group)
        step = group[1].view_offset - first.view_offset if count > 1 else 0
        places = [(first.box_offset[0] + i, first.view_offset + i * step) for i in range(count)]
        if [(s.box_offset[0], s.view_offset) for s in group] != places:
            return segments
        shape, stride = [count, *first.box_shape[1:]], [step, *first.view_stride[1:]]
        stacked.append(msgspec.structs.replace(first, box_shape=shape, view_stride=stride))
    return stacked


def _placement(
    shard: Shard, dim: int | None, segments: list[SegmentRecord], served: dict[str, ServedTensor]
) -> Placement:
    """The placement of ``shard`` in the view that its ``segments`` make up along ``dim``, even where it is the full tensor.

    Raises UnsupportedModelError if the segments are not one strided view of one served tensor.
    """
    if not segments:
        return Placement(shard, next(iter(served.values())).dtype, "", 0, (0,) * len(shard.global_shape))
    first = segments[0]
    if len({segment.served for segment in segments}) > 1:
        raise UnsupportedModelError(f"got parts in {sorted({s.served for s in segments})}, expected one served tensor")
    expected = first.view_offset
    for segment in segments:
        if segment.view_offset != expected or (len(segments) > 1 and segment.view_stride != first.view_stride):
            raise UnsupportedModelError(
                f"got parts of {segment.served} that do not lie side by side, expected one view"
            )
        if dim is not None:
            expected += segment.box_shape[dim] * segment.view_stride[dim]
    return Placement(shard, served[first.served].dtype, first.served, first.view_offset, tuple(first.view_stride))

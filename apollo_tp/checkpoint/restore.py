"""Put a checkpoint back: into the memory that is served, and into the optimizer. Checked in full first, then written.

Both passes read the same open files, some megabytes at a time: the new weights need not fit beside the old ones, and the
second pass finds them in the page cache. A checkpoint loads at any number of ranks and replicas, since its files are in
global coordinates. What makes a write that was interrupted complete is the record of the served weights (``lineage``), which
the callers in apollo_tp.launch keep.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from apollo_tp.checkpoint import checksum
from apollo_tp.checkpoint import folder as folders
from apollo_tp.checkpoint.card import public_name
from apollo_tp.checkpoint.folder import CheckpointInfo
from apollo_tp.checkpoint.open_file import READ_ERRORS, OpenFile
from apollo_tp.checkpoint.transfers import Transfers, rows_of
from apollo_tp.distributed.control import ComputeControl
from apollo_tp.distributed.mesh import Mesh
from apollo_tp.errors import CheckpointError
from apollo_tp.optim import Optimizer
from apollo_tp.optim.parameters import boxes_with_owner
from apollo_tp.shards.boxes import Box, Shard
from apollo_tp.shards.manifest import CheckpointTensor
from apollo_tp.shards.mapping import DTYPES, NAMES

TOGETHER_BYTES = 2**30
"""Of global tensors between two collectives: all ranks are about as far, and none waits long for another."""


class Restore:
    """The checkpoint in ``folder``, which is to replace what this rank serves: ``tensors``, by checkpoint name the shard and
    the local view of served memory. ``origin`` names the model that these weights were trained from, and ``stored`` are the
    tensors of its folder. Methods are collective over all ranks of the ``mesh``."""

    def __init__(
        self,
        folder: Path,
        origin: str,
        stored: Sequence[CheckpointTensor],
        tensors: Mapping[str, tuple[Shard, Tensor]],
        mesh: Mesh,
    ) -> None:
        self.folder, self._origin, self._tensors, self._mesh = folder, public_name(origin), tensors, mesh
        self._device = next(iter(tensors.values()))[1].device
        self._dtypes = {
            t.name: torch.promote_types(DTYPES[t.dtype], tensors[t.name][1].dtype) for t in stored if t.name in tensors
        }
        self._controls = [ComputeControl(group, self._device) for group in (mesh.world, mesh.tp, mesh.replicas)]
        self._files: dict[str, OpenFile] = {}
        self._sums: dict[str, str] = {}

    def check(self, optimizer: Optimizer | None) -> CheckpointInfo:
        """Read the checkpoint; with ``optimizer`` its state too, which must fit. Nothing is changed. Raises CheckpointError,
        on all ranks, if it is not there, of another model, incomplete or damaged."""
        world, tp, replicas = self._controls
        with world.agree():
            info = self._info()
            self._find_tensors()
            self._sums = folders.read_checksums(self.folder)
        problem, damaged = "", []
        with Transfers(self._device) as transfers:
            for names in self._together():
                try:
                    parts = transfers.run(functools.partial(self._sum_of, transfers), self._parts(names, owned=True))
                    found = checksum.add({name: value} for name, value in parts)
                except CheckpointError as error:  # the other ranks go on to the next collective
                    problem, found = problem or str(error), {}
                damaged += checksum.differing(self._sums, checksum.over_ranks(found, tp))
        with world.agree():
            if problem:
                raise CheckpointError(problem)
        with world.agree():
            if damaged:
                got = f"{damaged[0]} ({len(damaged)} in all) with another checksum than it was written with"
                raise self._refusal(got, "the values that were written; restore another checkpoint")
        if optimizer is not None:
            from apollo_tp.checkpoint import optimizer_state  # takes a second to import

            state = folders.optimizer_folder(self.folder)
            optimizer_state.check(optimizer, state, world, [tp, replicas])
        return info

    def write(self) -> None:
        """Write the weights that were checked into served memory. What raises here, on any rank, leaves them in part."""
        with Transfers(self._device) as transfers:
            for names in self._together():
                with self._controls[0].agree():
                    for _ in transfers.run(functools.partial(self._put, transfers), self._parts(names, owned=False)):
                        pass

    def _info(self) -> CheckpointInfo:
        info = folders.read_info(self.folder)
        if info is None:
            raise self._refusal(
                "no checkpoint there", "one that apollo_tp wrote and has not removed; see GET /checkpoints"
            )
        if (origin := public_name(info.origin or info.model_path)) != self._origin:
            raise self._refusal(f"one of {origin}", f"one of {self._origin}, whose weights are served")
        return info

    def _find_tensors(self) -> None:
        """Which file has which tensor. Raises CheckpointError unless all are there with the shape and dtype that a
        checkpoint of these weights has."""
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                file = OpenFile(path)
                self._files |= {name: file for name in file if name in self._dtypes}
                for name in self._dtypes.keys() & set(file):
                    self._check_form(name, *file.form(name))
            except READ_ERRORS as error:
                raise self._refusal(f"{path.name}: {error}", "a complete safetensors file") from error
        if missing := sorted(set(self._dtypes) - set(self._files)):
            raise self._refusal(f"no {missing[0]} ({len(missing)} missing)", f"all {len(self._dtypes)} served tensors")

    def _check_form(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        wanted = self._dtypes[name], tuple(self._tensors[name][0].global_shape)
        if (dtype, shape) != wanted:
            raise self._refusal(f"{name} as {NAMES[dtype]} {list(shape)}", f"{NAMES[wanted[0]]} {list(wanted[1])}")

    def _refusal(self, got: str, expected: str) -> CheckpointError:
        return CheckpointError(f"checkpoint {self.folder}: got {got}, expected {expected}; nothing was written")

    def _together(self) -> Iterator[list[str]]:
        """The tensors in the same parts on every rank."""
        names: list[str] = []
        room = TOGETHER_BYTES
        for name, dtype in self._dtypes.items():
            num_bytes = torch.Size(self._tensors[name][0].global_shape).numel() * dtype.itemsize
            if names and num_bytes > room:
                yield names
                names, room = [], TOGETHER_BYTES
            names.append(name)
            room -= num_bytes
        yield names

    def _parts(self, names: Iterable[str], *, owned: bool) -> Iterator[_Part]:
        """What this rank holds of tensors (or owns of them), some megabytes or a row at a time."""
        for name in names:
            shard = self._tensors[name][0]
            for whole, start, is_owner in boxes_with_owner(shard, self._mesh.tp.rank):
                if not whole.numel or (owned and not is_owner):
                    continue
                origin = list(whole.offset)
                if shard.dim is not None:
                    origin[shard.dim] -= start
                for box in rows_of(whole, self._dtypes[name].itemsize):
                    yield _Part(name, box, tuple(origin))

    def _values(self, transfers: Transfers, part: _Part) -> Tensor:
        """The values of a part, on the device. Raises CheckpointError."""
        try:
            return transfers.read(self._files[part.name], part.name, part.box)
        except READ_ERRORS as error:
            raise self._refusal(f"{part.name}: {error}", "a tensor that can be read") from error

    def _sum_of(self, transfers: Transfers, part: _Part) -> tuple[str, int]:
        values = self._values(transfers, part)
        return part.name, checksum.of_box(values, part.box, self._tensors[part.name][0].global_shape)

    def _put(self, transfers: Transfers, part: _Part) -> None:
        local = self._tensors[part.name][1].detach()
        local[part.box.slices(part.origin)].copy_(self._values(transfers, part))


class _Part(NamedTuple):
    """A box of a tensor in global coordinates; ``origin`` are those of the first element of the local tensor."""

    name: str
    box: Box
    origin: tuple[int, ...]

"""Write a Hugging Face folder from served weights: every rank writes its own boxes, straight into the final file layout."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor

from apollo_tp.checkpoint import checksum
from apollo_tp.checkpoint import folder as folders
from apollo_tp.checkpoint.card import CARD_FILE, Trained, model_card, public_name
from apollo_tp.checkpoint.folder import CheckpointInfo
from apollo_tp.checkpoint.safetensors_file import Entry, create, plan, write_box
from apollo_tp.distributed.control import ComputeControl
from apollo_tp.distributed.mesh import Mesh
from apollo_tp.errors import CheckpointError
from apollo_tp.optim.parameters import boxes_with_owner
from apollo_tp.runtime.owned_folder import FULL_DISK
from apollo_tp.shards.boxes import Box, Shard
from apollo_tp.shards.manifest import CheckpointTensor
from apollo_tp.shards.mapping import DTYPES

if TYPE_CHECKING:
    from apollo_tp.optim import Optimizer

MAX_FILE_BYTES = 5 * 10**9
"""File split of a checkpoint that never was on disk (a server started with dummy weights)."""

OLD_WEIGHTS = {".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data"}
"""Weight files of the source, in all formats; they are not copied, since a checkpoint has its own."""
CHAT_TEMPLATES = "additional_chat_templates/*.jinja"
STILL_WORKING_SECONDS = 1.0
"""Seconds between two all-reduces while the other ranks wait for rank 0."""


@dataclass(frozen=True)
class _File:
    name: str
    header: bytes
    entries: dict[str, Entry]
    trained: bool
    """False if the server holds none of its tensors: the file is linked, not written."""


@dataclass(frozen=True)
class OwnBox:
    """A box of a tensor that this rank writes into ``file``, with its ``values``, of the box's shape."""

    file: str
    entry: Entry
    box: Box
    values: Tensor


class CheckpointWriter:
    """Writes checkpoints of one served model. ``tensors``: checkpoint name -> (shard, local served view), second
    copies of a tensor with its view (``MappedRank.stored``). ``trained`` returns what they were trained on, for the card.

    ``save_config`` writes the model's configuration where the model has no folder on disk. ``served`` returns the folders
    that live servers were started from, and is called each time: they are not removed, nor is this model's own. All methods
    are collective over all ranks of the ``mesh``.
    """

    def __init__(
        self,
        root: Path,
        model_path: str,
        checkpoint: Sequence[CheckpointTensor],
        tensors: dict[str, tuple[Shard, Tensor]],
        mesh: Mesh,
        *,
        keep: int,
        save_config: Callable[[Path], None],
        served: Callable[[], Collection[Path]] = tuple,
        trained: Callable[[], Trained] = Trained,
    ) -> None:
        self.root, self._source, self._tensors, self._mesh, self._keep = root, Path(model_path), tensors, mesh, keep
        self._world = mesh.world
        self._save_config, self._trained = save_config, trained
        self._optimizer: Optimizer | None = None
        self._device = next(iter(tensors.values()))[1].device
        own = self._source.resolve()  # `latest` moves on
        self._served, self._origin = lambda: [own, *served()], folders.origin_of(model_path)
        dtypes = {name: local.dtype for name, (_, local) in tensors.items()}
        self._files = _plan_files(checkpoint, dtypes)
        self._wider = _wider_dtypes(checkpoint, dtypes)

    def save(self, name: str, optimizer: Optimizer, weight_version: int, kept: Sequence[str] = ()) -> tuple[Path, int]:
        """Write checkpoint ``name``; returns its folder and size in bytes. Those that are ``kept`` are not removed for it.

        Collectives: all-reduces of one flag and all-gathers (see ``_on_rank_0`` and ``_agree``) besides the optimizer's own.
        Raises CheckpointError on the ranks that could not write, RankFailedError on the others; nothing appears then, and
        what was written is removed.
        """
        with contextlib.ExitStack() as stack:
            if self._world.rank == 0:  # renamed by now, unless it failed
                stack.callback(folders.discard, self.root, name)
            self._write(name, optimizer, weight_version, kept)
        final = self.root / name
        return final, self.size_of(final)

    @property
    def rank(self) -> int:
        """Of all ranks, as are ``num_ranks``."""
        return self._world.rank

    @property
    def num_ranks(self) -> int:
        return self._world.size

    def partial_path(self, name: str) -> Path:
        """Where checkpoint ``name`` is written before it is complete."""
        return folders.partial_path(self.root, name)

    @staticmethod
    def size_of(checkpoint: Path) -> int:
        """Bytes on disk, with the optimizer's state."""
        both = (checkpoint, folders.beside_of(checkpoint))
        return sum(path.stat().st_size for each in both for path in each.rglob("*") if path.is_file())

    def info(self, optimizer: Optimizer, weight_version: int) -> CheckpointInfo:
        """The record of a checkpoint of the weights as they are now."""
        self._optimizer = optimizer
        return CheckpointInfo(
            weight_version=weight_version,
            model_path=str(self._source),
            optimizer=optimizer.describe(),
            num_ranks=self._world.size,
            created_at=time.time(),
            origin=self._origin,
            trained=self._trained(),
        )

    def _write(self, name: str, optimizer: Optimizer, weight_version: int, kept: Sequence[str]) -> None:
        partial = folders.partial_path(self.root, name)
        self._optimizer = optimizer
        self._on_rank_0(lambda: self.prepare(name))
        with self._agree():
            own = self.write_boxes(self.own_boxes(), partial)
        sums = checksum.over_ranks(own, ComputeControl(self._mesh.tp, self._device))
        from apollo_tp.checkpoint import (
            optimizer_state,  # takes a second to import, which a run that never saves avoids
        )

        try:
            optimizer_state.save(optimizer, partial / folders.OPTIMIZER_DIR)
        except CheckpointError as error:  # the library's error has the system's in its text only
            full = next((number for number in FULL_DISK if os.strerror(number) in str(error)), None)
            if full is None:
                raise
            raise CheckpointError(
                f"rank {self._world.rank}: {self.explain(OSError(full, os.strerror(full)))}"
            ) from error
        info = self.info(optimizer, weight_version)
        self._on_rank_0(lambda: self.complete(name, info, sums, kept))

    def complete(self, name: str, info: CheckpointInfo, sums: dict[str, int], kept: Sequence[str]) -> None:
        """Give what all ranks have written its name. Local, on rank 0."""
        partial = folders.partial_path(self.root, name)
        content = {tensor: checksum.text(value) for tensor, value in sorted(sums.items())}
        _write_private(partial / folders.CHECKSUMS_FILE, json.dumps(content, indent=1))
        text = model_card(
            name, public_name(info.origin), info.weight_version, info.optimizer, info.trained, self._source / CARD_FILE
        )
        _write_private(partial / CARD_FILE, text)
        served = lambda: [*self._served(), *(self.root / each for each in kept)]  # noqa: E731 - what is needed
        folders.complete(self.root, name, info, self._keep, served)

    def _on_rank_0(self, action: Callable[[], object]) -> None:
        """Run ``action`` on rank 0, in a thread, and agree on success. Collective.

        An all-reduce every STILL_WORKING_SECONDS while it lasts: copies and flushes of a large model take longer than one
        collective may. So ``action`` may take any time as long as rank 0 lives; how long the coordinator waits for its
        answer is another matter.
        """
        with ThreadPoolExecutor(1, "checkpoint") as pool:  # waits for the thread, however this ends
            work = [pool.submit(action)] if self._world.rank == 0 else []
            while self.any_rank(bool(wait(work, STILL_WORKING_SECONDS).not_done)):
                pass
        with self._agree():
            for done in work:
                done.result()

    @contextlib.contextmanager
    def _agree(self) -> Iterator[None]:
        """A block that writes on all ranks or raises on all ranks (see Control.agree), with OSError as CheckpointError."""
        with ComputeControl(self._world, self._device).agree():
            try:
                yield
            except OSError as error:
                raise CheckpointError(f"rank {self._world.rank}: {self.explain(error)}") from error

    def explain(self, error: OSError) -> str:
        """``error``; of a full disk with what is needed and free, and what helps."""
        if error.errno not in FULL_DISK:
            return str(error)
        weights = sum(
            len(file.header) + sum(e.num_bytes for e in file.entries.values()) for file in self._files if file.trained
        )
        state = self._optimizer.state_bytes() * self._world.size if self._optimizer else 0
        free = shutil.disk_usage(self.root).free
        return (
            f"checkpoint.dir {self.root}: got {free:,} bytes free ({error.strerror}), expected about {weights + state:,} "
            f"for a checkpoint (weights {weights:,}, optimizer state {state:,}); free space there, lower "
            "checkpoint.keep, or set checkpoint.dir to a folder on a larger disk"
        )

    def any_rank(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any rank. One all-reduce."""
        flags = torch.tensor(float(flag), device=self._device)
        return bool(self._world.sum_checked(flags, "agreement on a checkpoint").item())

    def prepare(self, name: str) -> None:
        """Make the files of a checkpoint, with all that is not trained. Local, on rank 0."""
        partial = folders.begin(self.root, name)
        for file in self._files:
            if file.trained:
                create(partial / file.name, file.header, file.entries)
                self._carry_over(partial, file)
            else:
                _link_or_copy(self._source / file.name, partial / file.name)
        if self._source.is_dir():
            for path in (*self._source.iterdir(), *self._source.glob(CHAT_TEMPLATES)):
                if path.is_file() and path.suffix not in OLD_WEIGHTS:
                    _copy_private(path, partial / path.relative_to(self._source))
            if self._wider and (partial / "config.json").is_file():
                _restate_dtypes(partial / "config.json", self._wider)
        else:
            self._save_config(partial)
        (partial / folders.INFO_FILE).unlink(missing_ok=True)
        if len(self._files) > 1:
            _write_index(partial, self._files)

    def _carry_over(self, partial: Path, file: _File) -> None:
        """Tensors that the server does not hold keep the values of the source."""
        missing = [entry for name, entry in file.entries.items() if name not in self._tensors]
        if missing:
            with safe_open(self._source / file.name, framework="pt") as source:
                for entry in missing:
                    everything = Box((0,) * len(entry.shape), entry.shape)
                    write_box(partial / file.name, entry, everything, source.get_tensor(entry.name))

    def own_boxes(self) -> Iterator[OwnBox]:
        """What this rank writes of the weights, as views of served memory."""
        for file in self._files:
            for name in file.entries:
                if self._writes(name):
                    shard, local = self._tensors[name]
                    for box, start, is_owner in boxes_with_owner(shard, self._mesh.tp.rank):
                        if is_owner:
                            part = local if shard.dim is None else local.narrow(shard.dim, start, box.shape[shard.dim])
                            yield OwnBox(file.name, file.entries[name], box, part)

    def write_boxes(self, boxes: Iterable[OwnBox], partial: Path) -> dict[str, int]:
        """Write boxes and flush them, so that little is left for rank 0, which flushes the folder at the end. Returns their
        part of the tensors' checksums. Local."""
        sums: list[dict[str, int]] = []
        files: set[str] = set()
        for own in boxes:
            values = own.values.to(own.entry.dtype)
            write_box(partial / own.file, own.entry, own.box, values)
            sums.append({own.entry.name: checksum.of_box(values, own.box, own.entry.shape)})
            files.add(own.file)
        for name in sorted(files):
            folders.fsync(partial / name)
        return checksum.add(sums)

    def _writes(self, name: str) -> bool:
        """Whether this rank writes its part of the tensor: of those that hold it, the first one of the first replica."""
        return (
            self._mesh.replicas.rank == 0
            and name in self._tensors
            and self._tensors[name][0].replica_ranks[0] == self._mesh.tp.rank
        )


def _plan_files(checkpoint: Sequence[CheckpointTensor], served: dict[str, torch.dtype]) -> list[_File]:
    """The original file split. A tensor keeps its dtype on disk unless the server holds it in a wider one."""
    groups: dict[str, list[CheckpointTensor]] = {}
    if all(tensor.file for tensor in checkpoint):
        for tensor in checkpoint:
            groups.setdefault(tensor.file, []).append(tensor)
    else:
        groups = _split(checkpoint)
    files = []
    for name, tensors in groups.items():
        specs = []
        for tensor in tensors:
            on_disk = DTYPES[tensor.dtype]
            wider = torch.promote_types(on_disk, served[tensor.name]) if tensor.name in served else on_disk
            specs.append((tensor.name, tuple(tensor.shape), wider))
        header, entries = plan(specs)
        files.append(_File(name, header, entries, any(tensor.name in served for tensor in tensors)))
    return files


def _wider_dtypes(checkpoint: Sequence[CheckpointTensor], served: dict[str, torch.dtype]) -> dict[str, str]:
    """The name of a dtype on disk -> that of the wider one in which the server holds all its tensors of that dtype, as with
    ``--dtype float32``. Single tensors that it holds wider (a router's, say) are not what the model's dtype is."""
    held: dict[torch.dtype, set[torch.dtype]] = {}
    for tensor in checkpoint:
        if tensor.name in served:
            on_disk = DTYPES[tensor.dtype]
            held.setdefault(on_disk, set()).add(torch.promote_types(on_disk, served[tensor.name]))
    pairs = ((on_disk, next(iter(wider))) for on_disk, wider in held.items() if len(wider) == 1)
    return {str(a).removeprefix("torch."): str(b).removeprefix("torch.") for a, b in pairs if a != b}


def _restate_dtypes(path: Path, wider: dict[str, str]) -> None:
    """Let the config at ``path`` say in which dtype the weights are: who loads them in the one it said would round them."""

    def restated(node: object) -> object:
        if not isinstance(node, dict):
            return node
        return {
            key: wider.get(value, value)
            if key in ("dtype", "torch_dtype") and isinstance(value, str)
            else restated(value)
            for key, value in node.items()
        }

    path.write_text(json.dumps(restated(json.loads(path.read_text())), indent=2) + "\n")


def _split(checkpoint: Sequence[CheckpointTensor]) -> dict[str, list[CheckpointTensor]]:
    parts: list[list[CheckpointTensor]] = [[]]
    room = MAX_FILE_BYTES
    for tensor in checkpoint:
        num_bytes = torch.Size(tensor.shape).numel() * DTYPES[tensor.dtype].itemsize
        if parts[-1] and num_bytes > room:
            parts.append([])
            room = MAX_FILE_BYTES
        parts[-1].append(tensor)
        room -= num_bytes
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i + 1:05}-of-{len(parts):05}.safetensors": part for i, part in enumerate(parts)}


def _write_index(partial: Path, files: list[_File]) -> None:
    weight_map = {name: file.name for file in files for name in file.entries}
    total = sum(entry.num_bytes for file in files for entry in file.entries.values())
    content = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    _write_private(partial / "model.safetensors.index.json", content)


def _write_private(path: Path, content: str) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(content)


def _link_or_copy(source: Path, target: Path) -> None:
    """Unchanged files share their blocks with the source where the file system can (hard link)."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        _copy_private(source, target)


def _copy_private(source: Path, target: Path) -> None:
    target.parent.mkdir(mode=0o700, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o600)

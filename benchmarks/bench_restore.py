"""How long does a checkpoint stop training, and how long does it take to put one back? Without a server.

    torchrun --nproc-per-node 2 benchmarks/bench_restore.py --dir /fast/disk   # two GPUs: an 8.19B Qwen3 at TP = 2
    torchrun --nproc-per-node 2 benchmarks/bench_restore.py --tiny             # rehearsal on any machine

Weights are random, as the ranks of a server would hold them; the optimizer is APOLLO of rank 64 with remainders. Files are
in the page cache when they are read, since they were written just before: as after a job that made things worse.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from profile_step import ranks, served_memory
from server_stack import QWEN3_8B, TINY, write_results
from transformers import Qwen3Config

from apollo_tp.checkpoint import optimizer_state
from apollo_tp.checkpoint.behind import WriteBehind
from apollo_tp.checkpoint.folder import optimizer_folder
from apollo_tp.checkpoint.restore import Restore
from apollo_tp.checkpoint.writer import CheckpointWriter
from apollo_tp.config import OptimConfig, Precision
from apollo_tp.distributed.control import ComputeControl
from apollo_tp.distributed.mesh import Mesh
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.optim import Optimizer, OptimParameter
from apollo_tp.optim.replicas import checksums
from apollo_tp.shards.manifest import CheckpointTensor
from apollo_tp.shards.mapping import NAMES

PATIENCE_SECONDS = 600.0


def role_of(name: str, dims: int) -> Literal["matrix", "embedding", "other"]:
    """The role of a checkpoint tensor."""
    if "embed_tokens" in name or "lm_head" in name:
        return "embedding"
    return "matrix" if dims == 2 else "other"


def measure(tp: TPGroup, root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each part. Collective."""
    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    config = Qwen3Config(**(TINY if options.tiny else QWEN3_8B))
    tensors, _ = served_memory(config, device, tp)
    stored = [
        CheckpointTensor(name=name, shape=list(shard.global_shape), dtype=NAMES[local.dtype], file="")
        for name, (shard, local) in tensors.items()
    ]
    parameters = [
        OptimParameter(shard, torch.nn.Parameter(local), role_of(name, len(shard.global_shape)))
        for name, (shard, local) in tensors.items()
    ]
    optimizer = Optimizer(OptimConfig(), Precision.remainder, parameters, tp)
    mesh = Mesh.single(tp)
    writer = CheckpointWriter(
        root, "random weights", stored, tensors, mesh, keep=9, save_config=lambda folder: config.save_pretrained(folder)
    )
    store = dist.FileStore(str(root.with_name("store")), tp.size) if tp.size > 1 else None
    before = digest(tensors)
    seconds: dict[str, Any] = {}

    def timed(name: str, action: Any) -> Any:
        meet(tp, device)
        started = time.monotonic()
        result = action()
        meet(tp, device)
        seconds[name] = time.monotonic() - started
        return result

    behind = WriteBehind(writer, store, PATIENCE_SECONDS)
    for name in ("first", "second"):  # which finds the memory of the first
        if not timed(f"{name} copy: training stops", lambda name=name: behind.begin(name, optimizer, 0)):
            raise SystemExit("got too little host memory for the copies")
        timed(f"{name} copy: until it is complete", behind.join)
    timed("all while training stops", lambda: writer.save("blocking", optimizer, 0))
    for _, local in tensors.values():
        local.add_(1.0)
    restore = Restore(root / "blocking", "random weights", stored, tensors, mesh)
    folder, controls = (
        optimizer_folder(root / "blocking"),
        [ComputeControl(each, optimizer.device) for each in (tp, mesh.tp, mesh.replicas)],
    )
    timed("check weights", lambda: restore.check(None))
    timed("check the optimizer's state", lambda: optimizer_state.check(optimizer, folder, controls[0], controls[1:]))
    timed("write weights: requests are held", restore.write)
    timed("load the optimizer's state", lambda: optimizer_state.load(optimizer, folder))
    seconds["restore, in all"] = sum(list(seconds.values())[-4:])
    seconds["equal bits"] = bool(torch.equal(before, digest(tensors)))
    seconds["bytes"] = writer.size_of(root / "blocking")
    return seconds


def digest(tensors: dict[str, Any]) -> torch.Tensor:
    """Checksums of all local tensors."""
    return torch.stack([checksums([local]).cpu() for _, local in tensors.values()])


def meet(tp: TPGroup, device: str) -> None:
    """All ranks and their devices are here."""
    tp.all_reduce_(torch.zeros(1, device=device))
    if device != "cpu":
        torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument(
        "--dir", type=Path, help="where the checkpoints are written (and removed); default: the system's"
    )
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    folder = Path(options.dir or tempfile.gettempdir()) / f"bench_restore-{os.environ.get('MASTER_PORT', os.getpid())}"
    with ranks() as tp, contextlib.ExitStack() as stack:
        if tp.rank == 0:
            folder.mkdir(mode=0o700)
            stack.callback(shutil.rmtree, folder)
        meet(tp, "cpu" if not torch.cuda.is_available() else f"cuda:{torch.cuda.current_device()}")
        found = measure(tp, folder / "checkpoints", options)
        if tp.rank == 0:
            for name, value in found.items():
                print(f"{name:35}{value:,.3f}" if isinstance(value, float) else f"{name:35}{value}")
            write_results(options.out, "restore", tp.size, found)
            print(json.dumps(found))
    return 0 if found["equal bits"] else 1


if __name__ == "__main__":
    sys.exit(main())

"""Print, as JSON, a digest of every tensor that a server of this host serves, by rank and name: ``RUNTIME_DIR INSTANCE``."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch

from apollo_tp.shards.instance import read_instance
from apollo_tp.shards.mapping import _open


def main(runtime_dir: str, instance: str) -> None:
    digests = {}
    for manifest in read_instance(Path(runtime_dir) / instance):
        memory = [_open(allocation, manifest, torch.device("cpu"))[0] for allocation in manifest.allocations]
        for served in manifest.served:
            itemsize, count = getattr(torch, served.dtype).itemsize, torch.Size(served.shape).numel()
            content = memory[served.allocation][served.offset_bytes : served.offset_bytes + count * itemsize]
            digests[f"{manifest.tp_rank} {served.name}"] = hashlib.sha256(content.numpy().tobytes()).hexdigest()
    print(json.dumps(digests))


if __name__ == "__main__":
    main(*sys.argv[1:])

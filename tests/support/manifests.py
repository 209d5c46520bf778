"""Manifests of servers that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

from apollo_tp.runtime import processes
from apollo_tp.shards.manifest import SCHEMA_VERSION, Manifest


def manifest(rank: int = 0, size: int = 2, **changes: Any) -> Manifest:
    """A manifest of this very process, which is alive."""
    process = processes.ProcessId.of(os.getpid())
    assert process is not None
    fields: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION, "instance_id": "test", "created_at": time.time(), "vllm_version": "0.32.0",
        "model_path": "/m", "served_model_names": ["m"], "dtype": "bfloat16", "tp_rank": rank, "tp_size": size,
        "host": "h", "pid": process.pid, "pid_start_ticks": process.start_ticks,
        "pid_namespace": processes.pid_namespace(), "device": "cpu",
    }  # fmt: skip
    return Manifest(**(fields | changes))


def ended_process() -> processes.ProcessId:
    """Identity of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = processes.ProcessId.of(child.pid)
    assert identity is not None
    child.communicate()
    return identity

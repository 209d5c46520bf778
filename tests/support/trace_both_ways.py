"""Every family through vLLM's own loader, all tensors at once and one by one.

``python -m tests.support.trace_both_ways FOLDER`` prints {family: for each rank [tensors, refused, how the two differ]}; in
a process of its own, because importing vLLM changes much.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from apollo_tp.vllm_plugin import manifest_builder, offline
from apollo_tp.vllm_plugin.trace import Named, Trace, trace_loader
from tests.support.families import FAMILIES, build


def trace_families(folder: Path) -> dict[str, list[list[Any]]]:
    """Both ranks of TP = 2."""
    found: dict[str, list[list[Any]]] = {}

    def both_ways(model: nn.Module, tensors: Iterable[Named]) -> list[Trace]:
        tensors = list(tensors)
        traces = trace_loader(model, tensors)
        single = [trace for tensor in tensors for trace in trace_loader(model, [tensor])]
        differ = [f"{at_once} {alone}" for at_once, alone in zip(traces, single, strict=True) if at_once != alone]
        found[name].append([len(traces), sum(bool(trace.refusal) for trace in traces), differ])
        return traces

    manifest_builder.trace_loader = both_ways
    for name, family in FAMILIES.items():
        found[name] = []
        build(family.config()).save_pretrained(folder / name)
        offline.offline_manifests(str(folder / name), 2, dtype="float32")
    return found


if __name__ == "__main__":
    print(json.dumps(trace_families(Path(sys.argv[1]))))

"""Checkpoints of tiny models and what real vLLM would publish for them: ``python -m tests.multirank.trace_cases FOLDER``.

Below FOLDER, per case: the Hugging Face checkpoint, and ``tp<p>/rank<r>.json`` manifests traced from vLLM's own loader. Runs
in a process of its own, because importing vLLM changes much of a process.
"""

from __future__ import annotations

import sys
from pathlib import Path

from apollo_tp.manifest import publish
from tests.unit.families import CASES, SIZES, build


def trace_cases(folder: Path) -> None:
    """Write every case of ``CASES`` at every size of ``SIZES``."""
    from apollo_tp.vllm_plugin.offline import offline_manifests

    for name, case in CASES.items():
        checkpoint = folder / name
        build(case.config()).save_pretrained(checkpoint)
        for size in SIZES:
            for manifest in offline_manifests(str(checkpoint), size, dtype="float32"):
                target = checkpoint / f"tp{size}"
                target.mkdir(exist_ok=True)
                publish(manifest, target)


if __name__ == "__main__":
    trace_cases(Path(sys.argv[1]))

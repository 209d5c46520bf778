"""Checkpoints of tiny models and what real vLLM would publish for them: ``python -m tests.multirank.trace_cases FOLDER``.

Below FOLDER, per case: the Hugging Face checkpoint, and ``tp<p>/rank<r>.json`` manifests traced from vLLM's own loader. Runs
in a process of its own, because importing vLLM changes much of a process.
"""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from apollo_tp.manifest import publish
from tests.unit.families import CASES, SIZES, build


def trace_cases(folder: Path) -> None:
    """Write every case of ``CASES`` at every size of ``SIZES``."""
    from apollo_tp.vllm_plugin.offline import offline_manifests

    for name, case in CASES.items():
        checkpoint = folder / name
        build(case.config()).save_pretrained(checkpoint)
        _restore_published_names(checkpoint / "model.safetensors")
        for size in SIZES:
            for manifest in offline_manifests(str(checkpoint), size, dtype="float32"):
                target = checkpoint / f"tp{size}"
                target.mkdir(exist_ok=True)
                publish(manifest, target)


def _restore_published_names(path: Path) -> None:
    """Published Gemma 3 checkpoints, and vLLM, call the vision tower's tensors otherwise than transformers 5 saves them."""
    tensors = load_file(path)
    published = {name.replace("vision_tower.", "vision_tower.vision_model."): t for name, t in tensors.items()}
    if published.keys() != tensors.keys():
        save_file(published, path, {"format": "pt"})


if __name__ == "__main__":
    trace_cases(Path(sys.argv[1]))

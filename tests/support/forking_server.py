"""vLLM's API server, whose engine and workers are forked from it, as vLLM does by default: its CPU platform spawns them,
and each imports vLLM again, ten seconds of a core. The arguments are the API server's.

Needs ``OMP_NUM_THREADS=1``: threads of OpenMP do not survive a fork.
"""

from __future__ import annotations

import multiprocessing

import vllm.v1.engine.core  # what the forked processes need is imported once, here
import vllm.v1.executor.multiproc_executor
import vllm.v1.worker.cpu_worker  # noqa: F401
from vllm.entrypoints.launchers.api_server.entry import main
from vllm.model_executor.models import registry
from vllm.utils import system_utils


class _Forking:
    """In place of the module ``multiprocessing`` where vLLM chooses how to start its processes."""

    @staticmethod
    def get_context(method: str) -> multiprocessing.context.ForkContext:
        return multiprocessing.get_context("fork")

    current_process = staticmethod(multiprocessing.current_process)


def fork_processes() -> None:
    """From here on vLLM forks what it starts; it inspects model classes in this process rather than in another one."""
    system_utils.multiprocessing = _Forking  # type: ignore[assignment]
    registry._run_in_subprocess = lambda function: function()


if __name__ == "__main__":
    fork_processes()
    main()

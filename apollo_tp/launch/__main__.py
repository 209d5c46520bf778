"""Entry point of one trainer rank. Options are read before torch is imported."""

from __future__ import annotations

import atexit
import ctypes
import gc
import logging
import os
import signal
import sys
import time
from typing import NoReturn

from apollo_tp.coordinator.json_logging import set_up_logging
from apollo_tp.errors import (
    ApolloTpError,
    ConfigError,
    DeadlineError,
    RankFailedError,
    ServerGoneError,
    ServerReturnedError,
)
from apollo_tp.gpu_sharing.mps import share_gpu
from apollo_tp.launch.arguments import print_answer, read_arguments
from apollo_tp.launch.launcher import launched, record_failure
from apollo_tp.launch.nccl import end_without_abort

EXIT_FAILED = 1
EXIT_OPTIONS = 2
EXIT_SERVER_GONE = 3
EXIT_SERVER_RETURNED = 4
LAUNCHED = {"TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"}
"""Variables of which torchrun and mpirun set one for each rank that they start."""
PR_SET_PDEATHSIG = 1
LATER_SECONDS = 1.0
"""A rank that fails as rank 0 does, or because another one did, ends this much later: the launcher reports the first that
ends, and stops the others."""


def main(arguments: list[str]) -> int:
    """Run this rank; returns its exit status."""
    os.umask(0o077)  # other users may read nothing that this process writes
    if LAUNCHED & os.environ.keys():  # if the launcher is killed, the kernel ends its ranks
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    rank = launched().rank
    try:
        if sys.platform != "linux":  # memfd, /proc and flock are what mapping and locking are made of
            raise ConfigError(f"platform: got {sys.platform}, expected linux; run the server and the trainer there")
        config = read_arguments(arguments)
        if isinstance(config, str):
            if rank == 0:
                print_answer(config)
            return 0
        set_up_logging(rank)
        share_gpu(config.qos)
    except ApolloTpError as error:
        if rank != 0:  # one message is enough
            time.sleep(LATER_SECONDS)
        print(f"apollo_tp.launch: {error}", file=sys.stderr)
        record_failure(str(error))
        return EXIT_OPTIONS
    end_without_abort()
    # A captured step keeps its own memory pool, in which fragments between fixed blocks would be lost. CUDA only.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # Until the rank loop takes over: end at once, also while waiting in C++, and without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()  # the objects of the import below stay for good: collecting garbage meanwhile would be wasted time
    try:
        from apollo_tp.launch.session import run

        gc.freeze()
        gc.enable()
        run(config, _leave)
    except ApolloTpError as error:
        return _failed(error)
    # Whatever it is, the launcher's report should end with it.
    except Exception as error:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        logging.exception("%s", type(error).__name__)
        get_error_handler().record_exception(error)
        return EXIT_FAILED
    return 0


def _failed(error: ApolloTpError) -> int:
    """Report a failure with a known cause; returns the exit status."""
    if isinstance(error, ServerReturnedError):  # no fault: the launcher is to start all ranks again
        logging.warning("%s", error)
        record_failure(str(error))
        return EXIT_SERVER_RETURNED
    if isinstance(error, RankFailedError):  # another rank is the first cause
        time.sleep(2 * LATER_SECONDS)
    elif launched().rank != 0:  # rank 0 has perhaps raised the same
        time.sleep(LATER_SECONDS)
    message = f"{type(error).__name__}: {error}"
    logging.error("%s", message)
    record_failure(message)
    if isinstance(error, DeadlineError):  # the device may be busy for good, and an exit in order waits for it
        logging.shutdown()
        os._exit(EXIT_FAILED)
    return EXIT_SERVER_GONE if isinstance(error, ServerGoneError) else EXIT_FAILED


def _leave(error: ApolloTpError) -> None:
    """End the process from a thread: the main thread may be in a collective or a kernel for long."""
    message = f"{type(error).__name__}: {error}"
    logging.error("%s", message)
    record_failure(message)
    logging.shutdown()
    os._exit(EXIT_SERVER_GONE if isinstance(error, ServerGoneError) else EXIT_FAILED)


def _exit(status: int) -> NoReturn:
    """End the process through C's ``exit``: the interpreter is not torn down, during which libraries complain about objects
    that torch and Triton keep (``nanobind: leaked ...``), while the CUDA driver still closes what is open."""
    atexit._run_exitfuncs()
    if status == 0 and "mpi4py.MPI" in sys.modules:  # collective, so not on a rank that failed
        from mpi4py import MPI

        MPI.Finalize()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    ctypes.PyDLL(None).exit(status)  # PyDLL keeps the GIL: no other thread runs Python code from here on
    raise AssertionError("exit returned")


if __name__ == "__main__":
    _exit(main(sys.argv[1:]))

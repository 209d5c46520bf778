"""Entry point of one trainer rank. Options are read before torch is imported."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys
import time

from apollo_tp.errors import ApolloTpError, ConfigError, DeadlineError, ServerGoneError
from apollo_tp.gpu_sharing.mps import share_gpu
from apollo_tp.launch.compose import help_text, read_config
from apollo_tp.launch.nccl import end_without_abort

EXIT_FAILED = 1
EXIT_OPTIONS = 2
EXIT_SERVER_GONE = 3
LAUNCHED = {"TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"}
"""Variables of which torchrun and mpirun set one for each rank that they start."""
PR_SET_PDEATHSIG = 1
RANK_0_SECONDS = 1.0


def main(arguments: list[str]) -> int:
    """Run this rank; returns its exit status."""
    if {"-h", "--help"} & set(arguments):
        print(help_text())
        return 0
    os.umask(0o077)  # other users may read nothing that this process writes
    if LAUNCHED & os.environ.keys():  # if the launcher is killed, the kernel ends its ranks
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    rank = os.environ.get("RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK") or "0"
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s rank {rank} %(levelname)s %(message)s")
    try:
        if sys.platform != "linux":  # memfd, /proc and flock are what mapping and locking are made of
            raise ConfigError(f"platform: got {sys.platform}, expected linux; run the server and the trainer there")
        config = read_config(arguments)
        share_gpu(config.qos)
    except ApolloTpError as error:
        if rank != "0":  # one message is enough: the launcher ends this process once rank 0 has printed it
            time.sleep(RANK_0_SECONDS)
        print(f"apollo_tp.launch: {error}", file=sys.stderr)
        return EXIT_OPTIONS
    end_without_abort()
    # A captured step keeps its own memory pool, in which fragments between fixed blocks would be lost. CUDA only.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    gc.disable()  # the objects of the import below stay for good: collecting garbage meanwhile would be wasted time
    from apollo_tp.launch.session import run

    gc.freeze()
    gc.enable()
    try:
        run(config, on_server_gone=_leave)
    except ApolloTpError as error:
        logging.error("%s: %s", type(error).__name__, error)
        if isinstance(error, DeadlineError):  # the device may be busy for good, and an exit in order waits for it
            logging.shutdown()
            os._exit(EXIT_FAILED)
        return EXIT_SERVER_GONE if isinstance(error, ServerGoneError) else EXIT_FAILED
    return 0


def _leave(error: ServerGoneError) -> None:
    """End the process from a thread: the main thread may be in a collective or a kernel for long."""
    logging.error("%s", error)
    logging.shutdown()
    os._exit(EXIT_SERVER_GONE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

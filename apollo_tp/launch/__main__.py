"""Entry point of one trainer rank. Options are read before torch is imported."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys
import time

from apollo_tp.errors import ApolloTpError, ConfigError, ServerGoneError
from apollo_tp.gpu_sharing.mps import share_gpu
from apollo_tp.launch.compose import help_text, read_config

EXIT_FAILED = 1
EXIT_OPTIONS = 2
EXIT_SERVER_GONE = 3
LAUNCHED = {"TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"}
"""Set by torchrun and by mpirun, each for the ranks that it starts."""
PR_SET_PDEATHSIG = 1
RANK_0_SECONDS = 1.0


def main(arguments: list[str]) -> int:
    """Run this rank; returns its exit status."""
    if {"-h", "--help"} & set(arguments):
        print(help_text())
        return 0
    os.umask(0o077)  # nothing that we write is for others to read
    if LAUNCHED & os.environ.keys():  # a launcher that is killed cannot end its ranks: the kernel does
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    rank = os.environ.get("RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK") or "0"
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s rank {rank} %(levelname)s %(message)s")
    try:
        if sys.platform != "linux":  # memfd, /proc and flock are what mapping and locking are made of
            raise ConfigError(f"platform: got {sys.platform}, expected linux; run the server and the trainer there")
        config = read_config(arguments)
        share_gpu(config.qos)
    except ApolloTpError as error:
        if rank != "0":  # once is enough: the launcher ends this process when rank 0 has printed it, if that one lives
            time.sleep(RANK_0_SECONDS)
        print(f"apollo_tp.launch: {error}", file=sys.stderr)
        return EXIT_OPTIONS
    # A recorded step keeps its memory to itself: no part of it should be lost between blocks. CUDA's memory alone.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    gc.disable()  # what the import below makes is there to stay: no use in looking through it for garbage
    from apollo_tp.launch.session import run

    gc.freeze()
    gc.enable()
    try:
        run(config, on_server_gone=_leave)
    except ApolloTpError as error:
        logging.error("%s: %s", type(error).__name__, error)
        return EXIT_SERVER_GONE if isinstance(error, ServerGoneError) else EXIT_FAILED
    return 0


def _leave(error: ServerGoneError) -> None:
    """Called in a thread while the main one may sit in a collective or a kernel for long: end the process from here."""
    logging.error("%s", error)
    logging.shutdown()
    os._exit(EXIT_SERVER_GONE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

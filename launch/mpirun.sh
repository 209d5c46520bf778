#!/usr/bin/env bash
# The same under MPI: rank, size and rendezvous come from mpi4py.
#   TP=2 launch/mpirun.sh [overrides]
set -euo pipefail
exec mpirun -n "${TP:-2}" "${PYTHON:-python}" -m apollo_tp.launch "$@"

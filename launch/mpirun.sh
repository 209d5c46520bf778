#!/usr/bin/env bash
# The same under MPI: rank, size and rendezvous come from mpi4py.
#   TP=2 launch/mpirun.sh [overrides]
set -euo pipefail
as_root=()  # Open MPI refuses to start as root, a container's usual user, without this option; others do not have it
if [ "$(id -u)" = 0 ] && [[ "$(mpirun --version 2>&1)" == *"Open MPI"* ]]; then
  as_root=(--allow-run-as-root)
fi
exec mpirun "${as_root[@]}" -n "${TP:-2}" "${PYTHON:-python}" -m apollo_tp.launch "$@"

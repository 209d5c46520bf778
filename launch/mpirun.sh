#!/usr/bin/env bash
# The same under MPI: rank, size and rendezvous come from mpi4py.
#   TP=2 launch/mpirun.sh [overrides]
# Servers on several hosts (docs/how-to/hosts.md): TP is the number of served shards on all of them, HOSTFILE has a line
# "HOST slots=SHARDS" for each, the coordinator's first. MASTER_ADDR is that one's address, if its name does not resolve.
#   HOSTFILE=hosts TP=4 launch/mpirun.sh server.replicas=2 [overrides]
set -euo pipefail
options=()
open_mpi=$([[ "$(mpirun --version 2>&1)" == *"Open MPI"* ]] && echo yes || echo no)
if [ "$(id -u)" = 0 ] && [ "$open_mpi" = yes ]; then
  options+=(--allow-run-as-root)  # Open MPI refuses to start as root, a container's usual user, without it; others do not have it
fi
if [ -n "${HOSTFILE:-}" ]; then
  options+=(--hostfile "$HOSTFILE")
  for name in MASTER_ADDR GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME APOLLO_TP_TOKEN APOLLO_TP_RUNTIME_DIR; do
    if [ "$open_mpi" = yes ] && [ -n "${!name:-}" ]; then
      options+=(-x "$name")  # others hand the whole environment on
    fi
  done
fi
exec mpirun "${options[@]}" -n "${TP:-2}" "${PYTHON:-python}" -m apollo_tp.launch "$@"

#!/usr/bin/env bash
# Train the server of this machine; one rank per tensor-parallel rank of the server.
#   TP=2 launch/torchrun.sh [overrides, for example optim.lr=1e-5 service.http.port=8300]
# Servers on several hosts (docs/how-to/hosts.md): the same on each, with its number and TP served shards; rank 0, and the
# coordinator with it, is on number 0, whose address is MASTER_ADDR.
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 TP=2 launch/torchrun.sh server.replicas=2 [overrides]
set -euo pipefail
nodes=()
if [ "${NNODES:-1}" -gt 1 ]; then
  : "${NODE_RANK:?set NODE_RANK to the number of this host, from 0}" "${MASTER_ADDR:?set MASTER_ADDR to the address of host 0}"
  nodes=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi
exec "${PYTHON:-python}" -m apollo_tp.launch.torchrun "${nodes[@]}" --nproc-per-node "${TP:-2}" "$@"

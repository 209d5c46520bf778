#!/usr/bin/env bash
# Train the server of this machine; one rank per tensor-parallel rank of the server.
#   TP=2 launch/torchrun.sh [overrides, for example optim.lr=1e-5 service.http.port=8300]
set -euo pipefail
exec "${PYTHON:-python}" -m apollo_tp.launch.torchrun --nproc-per-node "${TP:-2}" "$@"

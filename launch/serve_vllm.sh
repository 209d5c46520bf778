#!/usr/bin/env bash
# Serve a model with vLLM so that apollo_tp can train it.
#   MODEL=Qwen/Qwen3-8B TP=2 PORT=8000 launch/serve_vllm.sh [further vLLM options]
# MODEL  folder or Hugging Face id (required)     TP    tensor-parallel size (default 2)
# PORT   HTTP port (default 8000)                 MEMORY share of each GPU that vLLM takes (default 0.5): the trainer needs
#                                                 the rest for gradients, optimizer state and activations
set -euo pipefail
: "${MODEL:?set MODEL to a folder or a Hugging Face id}"
export VLLM_PLUGINS=apollo
exec "${PYTHON:-python}" -m vllm.entrypoints.openai.api_server --model "$MODEL" --tensor-parallel-size "${TP:-2}" \
  --port "${PORT:-8000}" --gpu-memory-utilization "${MEMORY:-0.5}" "$@"

"""Checkpoints that transformers and vLLM load as they are, with the optimizer state next to them.

All ranks write their boxes into one safetensors layout; nothing is gathered. Optimizer state is saved in global coordinates
and loads at any number of ranks. The lineage file records what happened to the served weights since the server loaded them.
"""

from apollo_tp.checkpoint.folder import CheckpointInfo, latest, read_info
from apollo_tp.checkpoint.writer import CheckpointWriter

__all__ = ["CheckpointInfo", "CheckpointWriter", "latest", "read_info"]

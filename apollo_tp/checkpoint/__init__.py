"""Checkpoints that transformers and vLLM load as they are, with the optimizer state next to them.

All ranks write their boxes into one safetensors layout; nothing is gathered. Optimizer state is saved in global coordinates
and loads at any number of ranks. The lineage file records what happened to the served weights since the server loaded them.
Importing this package, ``folder``, ``card`` or ``publishing`` does not import torch, so the command line can.
"""

from apollo_tp.checkpoint.folder import CheckpointInfo, latest, read_info

__all__ = ["CheckpointInfo", "latest", "read_info"]

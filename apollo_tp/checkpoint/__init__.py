"""Checkpoints that transformers and vLLM load as they are, with the optimizer state beside them."""

from apollo_tp.checkpoint.folder import CheckpointInfo, latest, read_info
from apollo_tp.checkpoint.writer import CheckpointWriter

__all__ = ["CheckpointInfo", "CheckpointWriter", "latest", "read_info"]

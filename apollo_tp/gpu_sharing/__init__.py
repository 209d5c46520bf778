"""Sharing GPUs with the server: MPS, a limit on SMs, pacing, and a check of matrix products under such limits.

How to choose is in docs/how-to/share-gpus.md.
"""

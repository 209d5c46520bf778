"""Train the weights that a tensor-parallel vLLM server is serving, in place.

Importing this package loads nothing heavy: vLLM imports it in every process that it starts. The packages and their order
are in docs/architecture.md.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]

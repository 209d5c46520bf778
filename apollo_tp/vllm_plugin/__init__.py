"""What runs inside vLLM. ``register`` is the ``vllm.general_plugins`` entry point."""


def register() -> None:
    """Called by vLLM in every process it starts, more than once per process tree."""

"""What runs inside vLLM. ``register`` is the ``vllm.general_plugins`` entry point."""


def register() -> None:
    """Called by vLLM in every process that it starts, more than once per process tree; safe to call again."""
    from apollo_tp.vllm_plugin import compat

    if not compat.asked_for():
        return
    from apollo_tp.manifest import claim_instance
    from apollo_tp.vllm_plugin.export import on_loaded

    claim_instance()
    compat.install_hooks(on_loaded)

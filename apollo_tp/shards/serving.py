"""What the API server of a vLLM server publishes once its engine is up: how it renders conversations. JSON; no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from apollo_tp.errors import ManifestError
from apollo_tp.runtime import private_files

SERVING_FILE = "serving.json"


RESERVED_TEMPLATE_KWARGS = frozenset({
    "messages", "conversation", "tools", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message",
    "padding", "truncation", "max_length", "tokenizer_kwargs", "return_tensors", "return_dict",
    "return_assistant_tokens_mask",
})  # fmt: skip
"""What vLLM or transformers take for themselves in ``chat_template_kwargs``, or refuse there."""


class ChatTemplate(msgspec.Struct, frozen=True, kw_only=True):
    """A Jinja template. ``parts``: it is given each content as a list of parts ({"type": "text", ...}), not as a string."""

    text: str
    parts: bool = False


class Serving(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the API server adds once the engine is up: vLLM has measured its memory by then, and taken what it takes. And how
    it renders conversations, whatever its options and the model's folder say: None where there is no template."""

    chat: ChatTemplate | None = None
    chat_with_tools: ChatTemplate | None = None
    chat_template_kwargs: dict[str, Any] = {}
    """``--default-chat-template-kwargs``."""
    special_tokens: dict[str, Any] | None = None
    """Those of the server's tokenizer by name, which templates see; None: as its folder says."""
    chat_refusal: str = ""
    """Why conversations cannot be rendered as they are served."""


def publish_serving(serving: Serving, folder: Path) -> None:
    """Say that the engine is up, and how conversations become text there (0600, complete or not at all)."""
    private_files.write_private(folder / SERVING_FILE, msgspec.json.encode(serving))


def read_serving(folder: Path) -> Serving | None:
    """What the server's API server said; None if it has not yet, or if there is none."""
    path = folder / SERVING_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Serving)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise ManifestError(f"{path}: got {error}, expected what the server wrote; restart the server") from None

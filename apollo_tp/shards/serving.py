"""How a server turns text into token ids, published by the server itself: the tokenizer that vLLM uses, and its chat
templates.

``serving.json`` and ``served_tokenizer.json`` in the instance's folder, both 0600. No torch, no transformers, no pickle.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from apollo_tp.errors import DECODE_ERRORS, ConfigError, ManifestError
from apollo_tp.runtime import private_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SERVING_FILE = "serving.json"
TOKENIZER_FILE = "served_tokenizer.json"
RESERVED_TEMPLATE_KWARGS = frozenset({
    "messages", "conversation", "tools", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message",
    "padding", "truncation", "max_length", "tokenizer_kwargs", "return_tensors", "return_dict",
    "return_assistant_tokens_mask",
})  # fmt: skip
"""Names in ``chat_template_kwargs`` that vLLM or transformers use for their own arguments, or refuse."""


class ChatTemplate(msgspec.Struct, frozen=True, kw_only=True):
    """A Jinja template. If ``parts``, it gets the content of each message as a list of parts ({"type": "text", ...}),
    otherwise as a string."""

    text: str
    parts: bool = False


class ServedTokenizer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The tokenizer that vLLM uses. ``TOKENIZER_FILE`` is its backend in the JSON form of the tokenizers library. It may
    differ from the model's tokenizer.json, since transformers' class for a model may replace parts of it."""

    sha256: str
    """The hash of the content of ``TOKENIZER_FILE``."""
    split_special_tokens: bool = False
    """Whether special tokens in a text are encoded as ordinary text. The library's JSON does not contain this setting."""
    eos_id: int | None = None
    """The end-of-text token of the tokenizer, or the first of ``end_ids`` if it has none."""
    end_ids: list[int] = []
    """All tokens at which vLLM ends an answer: that of the tokenizer, and those of the generation config."""
    refused_tokens: list[str] = []
    """Added tokens that transformers' class treats in Python: a text with one of them has other ids in vLLM."""


class Serving(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the server tokenises texts and renders conversations, whatever its options and the model's folder contain.

    The API server publishes it once the engine is up; vLLM has then measured and allocated its memory. Where there is no API
    server, the first rank publishes it while it loads.
    """

    tokenizer: ServedTokenizer | None = None
    text_refusal: str = ""
    """Why texts and conversations cannot be turned into the token ids of this server; if set, ``tokenizer`` is None."""
    chat: ChatTemplate | None = None
    """The template for conversations without tools; None if there is none."""
    chat_with_tools: ChatTemplate | None = None
    chat_template_kwargs: dict[str, Any] = {}
    """The value of ``--default-chat-template-kwargs``."""
    special_tokens: dict[str, Any] = {}
    """The special tokens of the server's tokenizer by name, which templates may use."""
    chat_refusal: str = ""
    """Why conversations cannot be rendered as the server does it."""


UNKNOWN = "the server did not say which tokenizer it uses; see its log"
"""The reason for which texts are refused if the server published nothing about its tokenizer."""


def publish_serving(serving: Serving, folder: Path, tokenizer: bytes = b"") -> None:
    """Record that the engine is up, and how it turns texts into token ids (0600 files, each complete or not at all).
    ``tokenizer`` is the content of ``TOKENIZER_FILE``."""
    if tokenizer:
        private_files.write_private(folder / TOKENIZER_FILE, tokenizer)
    private_files.write_private(folder / SERVING_FILE, msgspec.json.encode(serving))


def read_serving(folder: Path) -> Serving | None:
    """The server's record; None if it has not published one yet. Raises ManifestError if it cannot be decoded."""
    path = folder / SERVING_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Serving)
    except FileNotFoundError:
        return None
    except DECODE_ERRORS as error:
        raise ManifestError(f"{path}: got {error}, expected what the server wrote; restart the server") from None


def read_tokenizer(serving: Serving, folder: Path) -> Tokenizer:
    """The tokenizer that the server published in ``folder``. Raises ConfigError with the reason if there is none."""
    if serving.tokenizer is None:
        raise ConfigError(serving.text_refusal or UNKNOWN)
    path = folder / TOKENIZER_FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: got {error.strerror}, expected the server's tokenizer; restart the server"
        ) from error
    if hashlib.sha256(content).hexdigest() != serving.tokenizer.sha256:
        raise ConfigError(f"{path}: got another content than the server wrote; restart the server, then the trainer")
    return load_tokenizer(content, split_special_tokens=serving.tokenizer.split_special_tokens)


def load_tokenizer(content: bytes, *, split_special_tokens: bool) -> Tokenizer:
    """A tokenizer of the tokenizers library from its JSON form, without padding and truncation."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(content.decode())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = split_special_tokens
    return tokenizer

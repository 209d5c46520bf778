"""How a server turns text into token ids, as its own process says: the tokenizer that vLLM uses, and its chat templates.

``serving.json`` and ``served_tokenizer.json`` in the instance's folder, both 0600. No torch, no transformers, no pickle.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from apollo_tp.errors import ConfigError, ManifestError
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
"""What vLLM or transformers take for themselves in ``chat_template_kwargs``, or refuse there."""


class ChatTemplate(msgspec.Struct, frozen=True, kw_only=True):
    """A Jinja template. ``parts``: it is given each content as a list of parts ({"type": "text", ...}), not as a string."""

    text: str
    parts: bool = False


class ServedTokenizer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The tokenizer that vLLM uses. ``TOKENIZER_FILE`` is its backend in the JSON form of the tokenizers library, which is
    not always the model's tokenizer.json: transformers' class for a model may put other parts in."""

    sha256: str
    """Of ``TOKENIZER_FILE``."""
    split_special_tokens: bool = False
    """Special tokens in a text are spelled out. The library's JSON does not have this setting."""
    eos_id: int | None = None
    """The end-of-text token: the tokenizer's, or the first of ``end_ids``."""
    end_ids: list[int] = []
    """All tokens at which vLLM ends an answer: the tokenizer's, and those of the generation config."""
    refused_tokens: list[str] = []
    """Texts with one of these become other ids in vLLM: transformers' class treats them in Python."""


class Serving(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the API server adds once the engine is up: vLLM has measured its memory by then, and taken what it takes. And how
    it tokenises texts and renders conversations, whatever its options and the model's folder say. Where there is no API
    server, the engine's first rank says it as it loads."""

    tokenizer: ServedTokenizer | None = None
    text_refusal: str = ""
    """Why texts and conversations cannot become the token ids that are served; then there is no ``tokenizer``."""
    chat: ChatTemplate | None = None
    """None where there is no template."""
    chat_with_tools: ChatTemplate | None = None
    chat_template_kwargs: dict[str, Any] = {}
    """``--default-chat-template-kwargs``."""
    special_tokens: dict[str, Any] = {}
    """Those of the server's tokenizer by name, which templates see."""
    chat_refusal: str = ""
    """Why conversations cannot be rendered as they are served."""


UNKNOWN = "the server did not say which tokenizer it uses; see its log"
"""Why texts are refused where a server said nothing at all."""


def publish_serving(serving: Serving, folder: Path, tokenizer: bytes = b"") -> None:
    """Say that the engine is up, and how texts become token ids there (0600 files, each complete or not at all).
    ``tokenizer`` is the content of ``TOKENIZER_FILE``."""
    if tokenizer:
        private_files.write_private(folder / TOKENIZER_FILE, tokenizer)
    private_files.write_private(folder / SERVING_FILE, msgspec.json.encode(serving))


def read_serving(folder: Path) -> Serving | None:
    """What the server said; None if it has not yet."""
    path = folder / SERVING_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Serving)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise ManifestError(f"{path}: got {error}, expected what the server wrote; restart the server") from None


def read_tokenizer(serving: Serving, folder: Path) -> Tokenizer:
    """The tokenizer that the server published in ``folder``. Raises ConfigError saying why there is none."""
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

"""The tokenizer that vLLM uses, in a form that needs neither vLLM nor transformers, and a check that it gives the same ids.

A fast tokenizer of transformers has a backend, which the tokenizers library can write as JSON: that is the form.
transformers' class has put its own normalizer, pre-tokenizer and special tokens into it. What a class does in addition, in
Python, is detected by comparing the ids of texts that are likely to show it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer

from apollo_tp.errors import ApolloTpError
from apollo_tp.shards.serving import ServedTokenizer, load_tokenizer
from apollo_tp.vllm_plugin.compat.renderer import is_tokenizer_wrapper

ENCODING_METHODS = ("__call__", "_encode_plus", "encode")
PROBE_TEXTS = (
    "", " ", "\n", "word", " two words", "two words ", "  three   spaces\t\ttabs \n\n lines\r\n", "UPPER Lower", "x" * 40,
    "0 1 12 123 1234 12345678 3.14 1,000,000", "it's, they'll; (a) [b] {c} <d> \"e\" $f #g @h %i ^j &k *l ~m `n` |o| \\p",
    "café cafe\u0301 ﬁ ① \uff21 ß İ ǆ", "漢字と仮名 한국어 中文。", "مرحبا שלום नमस्ते สวัสดี",
    "😀 👨\u200d👩\u200d👧 🇩🇪 ❤\ufe0f", "▁a ▁▁b", "\u00a0\u2003\u200b\ufeff\u2028x",
    "def f(x):\n    return x + 1  # y\n\n\nclass A:\n\tpass\n", "<s> </s> <unk> <pad> <|endoftext|> [INST] <0x0A> ##a",
)  # fmt: skip
Encode = Callable[[str, bool], list[int]]


class TextRefusedError(ApolloTpError):
    """Why texts cannot become the ids that vLLM makes of them."""


def describe(tokenizer: Any, generation_ends: Sequence[int] = ()) -> tuple[ServedTokenizer, bytes]:
    """The record of vLLM's ``tokenizer`` and the content of its file.

    ``generation_ends`` are further tokens at which vLLM ends an answer. The tokenizer itself is not changed. Raises
    TextRefusedError, or whatever the tokenizer's own code raises.
    """
    _check_class(tokenizer)
    split = bool(tokenizer.split_special_tokens)
    backend = load_tokenizer(tokenizer.backend_tokenizer.to_str().encode(), split_special_tokens=split)
    content = backend.to_str().encode()  # now without the truncation of whatever vLLM tokenised last
    differing = _differing_tokens(tokenizer, backend, content)
    eos = backend.token_to_id(tokenizer.eos_token) if tokenizer.eos_token is not None else None
    ends = list(dict.fromkeys([*([] if eos is None else [eos]), *generation_ends]))
    record = ServedTokenizer(
        sha256=hashlib.sha256(content).hexdigest(),
        split_special_tokens=split,
        eos_id=ends[0] if ends else None,
        end_ids=ends,
        refused_tokens=differing,
    )
    return record, content


def _check_class(tokenizer: Any) -> None:
    from transformers import TokenizersBackend

    if tokenizer is None:
        raise TextRefusedError("the server has no tokenizer (--skip-tokenizer-init)")
    if not isinstance(tokenizer, TokenizersBackend):
        raise TextRefusedError(
            f"the server's tokenizer is a {type(tokenizer).__name__}, not one of the tokenizers library (a fast tokenizer)"
        )
    for method in ENCODING_METHODS:
        owner = next(
            kind for kind in type(tokenizer).__mro__ if method in vars(kind) and not is_tokenizer_wrapper(kind)
        )
        if owner.__module__.split(".")[0] != "transformers":
            raise TextRefusedError(
                f"the server's tokenizer encodes texts in code of its own ({owner.__name__}.{method})"
            )


def _differing_tokens(tokenizer: Any, backend: Tokenizer, content: bytes) -> list[str]:
    """The added tokens for which ``tokenizer`` gives other ids than its backend. Raises TextRefusedError if it does so for
    any other text."""
    ours = _encoder_of_backend(backend)
    # The twin goes first: CodeLlama's class changes its backend when it sees <FILL_ME>, and the server's must not change.
    twin = _encoder(_twin(tokenizer, content, split=backend.encode_special_tokens))
    for text in PROBE_TEXTS:
        _expect_same(text, ours, twin)
    added = [token.content for token in backend.get_added_tokens_decoder().values()]
    differing = [] if _same(_around(added), ours, twin) else [t for t in added if not _same(_around([t]), ours, twin)]
    agreed = [token for token in added if not any(other in token for other in differing)]
    served = _encoder(tokenizer)
    for text in (*PROBE_TEXTS, _around(agreed)):
        _expect_same(text, ours, served)
    return differing


def _around(tokens: Sequence[str]) -> str:
    """A text with each token after and before words, spaces, line ends and itself."""
    return "".join(f"word {token} word{token}word\n{token}{token} {token}\n" for token in tokens)


def _twin(tokenizer: Any, content: bytes, *, split: bool) -> Any:
    """Another tokenizer of the same class, without vLLM's wrappers, with a backend of its own."""
    kind = next(kind for kind in type(tokenizer).__mro__ if not is_tokenizer_wrapper(kind))
    twin = object.__new__(kind)
    vars(twin).update(vars(tokenizer))
    twin._tokenizer = load_tokenizer(content, split_special_tokens=split)
    return twin


def _encoder_of_backend(backend: Tokenizer) -> Encode:
    return lambda text, special: list(backend.encode(text, add_special_tokens=special).ids)


def _encoder(tokenizer: Any) -> Encode:
    def encode(text: str, special: bool) -> list[int]:
        ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
        # vLLM release: some call the tokenizer, others its method encode.
        if ids != list(tokenizer.encode(text, add_special_tokens=special)):
            raise TextRefusedError("the server's tokenizer encodes texts in two ways")
        return ids

    return encode


def _same(text: str, ours: Encode, theirs: Encode) -> bool:
    try:
        return all(ours(text, special) == theirs(text, special) for special in (False, True))
    except (TextRefusedError, ValueError):  # raised by a class that accepts the token in one position only
        return False


def _expect_same(text: str, ours: Encode, theirs: Encode) -> None:
    for special in (False, True):
        if (got := theirs(text, special)) != (expected := ours(text, special)):
            raise TextRefusedError(
                f"the server's tokenizer makes of {text[:40]!r} the ids {got[:20]}, but its backend in the tokenizers "
                f"library {expected[:20]}"
            )

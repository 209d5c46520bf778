"""Small real tokenizers in the forms that model folders have: trained here, saved as tokenizer.json with a
tokenizer_config.json that names transformers' class, with special tokens where such folders keep them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.support.chat_model import CHATML, INST, TEXT

CORPUS = [
    *TEXT,
    "The quick brown fox doesn't jump over 12345 lazy dogs; they'll sleep.\n\tdef f(x): return x + 1\n",
] * 3
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Kind:
    """A form of folder. ``tokens``: special tokens of tokenizer.json; ``config``: of tokenizer_config.json; ``files``:
    further ones by name; ``appended``: how many tokens the tokenizer itself adds after a text; ``end``: what ends a
    turn."""

    build: Any
    tokens: tuple[str, ...]
    config: dict[str, Any]
    model_type: str = "qwen3"
    template: str = CHATML
    end: str = "<|im_end|>"
    files: dict[str, Any] = field(default_factory=dict)
    generation_ends: tuple[str, ...] = ()
    appended: int = 0

    def write(self, folder: Path) -> Path:
        """Write the folder, and return it."""
        folder.mkdir(parents=True)
        tokenizer = self.build(self.tokens)
        tokenizer.save(str(folder / "tokenizer.json"))
        size = tokenizer.get_vocab_size()
        config = {"chat_template": self.template} | self.config
        if "added_tokens_decoder" in config:  # ids after the vocabulary
            config["added_tokens_decoder"] = {
                str(size + n): token for n, token in enumerate(config["added_tokens_decoder"])
            }
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "config.json").write_text(json.dumps({"model_type": self.model_type, "vocab_size": size}))
        for name, content in self.files.items():
            if name == "added_tokens.json":
                content = {token: size + n for n, token in enumerate(content)}
            (folder / name).write_text(json.dumps(content))
        if self.generation_ends:
            ends = [tokenizer.token_to_id(token) for token in self.generation_ends]
            (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        return folder


def _train(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_level(tokens: tuple[str, ...], **options: Any) -> Tokenizer:
    """As in GPT-2 and later models; ``options`` are the pre-tokenizer's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**({"add_prefix_space": False} | options))
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(
        tokenizer,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=list(tokens), initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def with_bos(tokens: tuple[str, ...]) -> Tokenizer:
    """As in Llama 3: the post-processor puts the first token before a text."""
    tokenizer = byte_level(tokens)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokens[0]} $A", special_tokens=[(tokens[0], tokenizer.token_to_id(tokens[0]))]
    )
    return tokenizer


def sentence_piece(tokens: tuple[str, ...]) -> Tokenizer:
    """As in Llama 2: the normalizer puts a space before each piece of text, and unknown characters become bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # only for the training
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", *tokens, *byte_tokens], show_progress=False)
    saved = json.loads(_train(tokenizer, trainer).to_str())
    saved["pre_tokenizer"] = None
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["content"] not in byte_tokens]
    tokenizer = Tokenizer.from_str(json.dumps(saved))
    bos = tokens[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def with_eos(tokens: tuple[str, ...]) -> Tokenizer:
    """As in some fine-tuned models of Llama 2: the post-processor also adds a token after a text."""
    tokenizer = sentence_piece(tokens)
    begin, end = ((token, tokenizer.token_to_id(token)) for token in tokens)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin[0]} $A {end[0]}", special_tokens=[begin, end]
    )
    return tokenizer


def unigram(tokens: tuple[str, ...]) -> Tokenizer:
    """As in T5: texts are split at white space, and the post-processor adds a token after a text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>", *tokens], unk_token="<unk>", show_progress=False
    )
    _train(tokenizer, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def word_piece(tokens: tuple[str, ...]) -> Tokenizer:
    """As in BERT: texts are lower-cased, and have tokens before and after them."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *tokens]
    _train(tokenizer, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def _special(content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, "special": True} | flags


TURNS = ("<|im_start|>", "<|im_end|>")
CHAT = ("<|endoftext|>", *TURNS)
LLAMA = ("<s>", "</s>")
STRIPS = {"lstrip": True, "rstrip": True}
ENDS = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
LLAMA_CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
BERT_CONFIG = {
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "unk_token": "[UNK]",
    "pad_token": "[PAD]",
    "mask_token": "[MASK]",
}
GEMMA_TOKENS = ("<bos>", "<pad>", "<eos>", "<start_of_turn>", "<end_of_turn>")


def _of(name: str, **config: Any) -> dict[str, Any]:
    return {"tokenizer_class": name} | config


def _llama(
    model_type: str = "llama", name: str = "LlamaTokenizer", tokens: tuple[str, ...] = LLAMA, **config: Any
) -> Kind:
    return Kind(sentence_piece, tokens, _of(name, **LLAMA_CONFIG, **config), model_type, INST, "</s>")


KINDS: dict[str, Kind] = {
    "llama": _llama(add_bos_token=True),
    "llama, legacy": _llama(legacy=True),
    "llama, not legacy": _llama(legacy=False, add_prefix_space=False),
    "llama, ends texts": Kind(
        with_eos, LLAMA, _of("LlamaTokenizer", **LLAMA_CONFIG), "llama", INST, "</s>", appended=1
    ),
    "mistral, by the generic class": _llama("mistral", "PreTrainedTokenizerFast"),
    "code llama": _llama("llama", "CodeLlamaTokenizer", (*LLAMA, "▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>", "<FILL_ME>")),
    "gemma": Kind(
        sentence_piece, GEMMA_TOKENS,
        _of("GemmaTokenizer", bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"), "gemma", GEMMA,
        "<end_of_turn>", generation_ends=("<eos>", "<end_of_turn>"),
    ),
    "llama 3": Kind(with_bos, CHAT, _of("PreTrainedTokenizerFast", **ENDS, bos_token="<|endoftext|>"), "llama"),
    "gpt2": Kind(byte_level, CHAT, _of("GPT2Tokenizer", **ENDS), "gpt2"),
    "gpt2, prefix space": Kind(byte_level, CHAT, _of("GPT2Tokenizer", **ENDS, add_prefix_space=True), "gpt2"),
    "gpt neox": Kind(byte_level, CHAT, _of("GPTNeoXTokenizer", **ENDS), "gpt_neox"),
    "gpt neox, prefix space": Kind(byte_level, CHAT, _of("GPTNeoXTokenizer", **ENDS, add_prefix_space=True), "gpt_neox"),
    "qwen2": Kind(byte_level, CHAT, _of("Qwen2Tokenizer", **ENDS), "qwen2"),
    "qwen2, ends beside its vocabulary": Kind(
        byte_level, (), _of("Qwen2Tokenizer", **ENDS, added_tokens_decoder=[_special(token) for token in CHAT]), "qwen2"
    ),
    "qwen3.5": Kind(byte_level, CHAT, _of("Qwen3_5Tokenizer", **ENDS), "qwen3_5"),
    "cohere": Kind(byte_level, CHAT, _of("CohereTokenizer", **ENDS, bos_token="<|endoftext|>"), "cohere"),
    "t5": Kind(
        unigram, TURNS, _of("T5Tokenizer", eos_token="</s>", unk_token="<unk>", pad_token="<pad>", extra_ids=0), "t5",
        CHATML.replace("<|im_end|>", "</s>"), "</s>", appended=1,
    ),
    "bert": Kind(word_piece, TURNS, _of("BertTokenizer", **BERT_CONFIG, eos_token="<|im_end|>"), "bert", appended=1),
    "generic": Kind(byte_level, CHAT, _of("PreTrainedTokenizerFast", **ENDS)),
    "generic, prefix space": Kind(byte_level, CHAT, _of("PreTrainedTokenizerFast", **ENDS, add_prefix_space=True)),
    "generic, spells special tokens": Kind(
        byte_level, CHAT, _of("PreTrainedTokenizerFast", **ENDS, split_special_tokens=True)
    ),
    "generic, added_tokens_decoder": Kind(
        byte_level, (), _of("PreTrainedTokenizerFast", **ENDS, added_tokens_decoder=[_special(token) for token in CHAT])
    ),
    "generic, added_tokens.json": Kind(
        byte_level, (), _of("PreTrainedTokenizerFast", **ENDS), files={"added_tokens.json": list(CHAT)}
    ),
    "generic, special_tokens_map.json": Kind(
        byte_level, TURNS, _of("PreTrainedTokenizerFast"),
        files={"special_tokens_map.json": ENDS | {"additional_special_tokens": ["<|im_start|>"]}},
    ),
    "generic, tokens that strip": Kind(
        byte_level, (),
        _of("PreTrainedTokenizerFast", **ENDS, added_tokens_decoder=[_special(token) | STRIPS for token in CHAT]),
    ),
}  # fmt: skip

"""What a server of a model folder would publish of its tokenizer and templates, without a server: through the plugin's own
code over transformers' AutoTokenizer, which is what vLLM uses too (test_served_tokens.py compares)."""

from __future__ import annotations

import json

import msgspec
from transformers import AutoTokenizer

from apollo_tp.coordinator.samples.render import Renderer
from apollo_tp.shards.serving import ChatTemplate, Serving, publish_serving
from apollo_tp.vllm_plugin.tokenizer import describe


def publish_folder(model, instance, tokenizer_ends=(), **other):
    """Write serving.json and the tokenizer of the folder ``model`` to ``instance``; ``other`` are fields of the record, and
    ``tokenizer_ends`` the generation config's end tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    eos = json.loads((model / "config.json").read_text()).get("eos_token_id")
    ends = [*tokenizer.convert_tokens_to_ids(list(tokenizer_ends)), *([] if eos is None else [eos])]
    record, content = describe(tokenizer, ends)
    named = tokenizer.chat_template
    named = named if isinstance(named, dict) else {"default": named}
    default, tool_use = (
        ChatTemplate(text=named[name]) if named.get(name) else None for name in ("default", "tool_use")
    )
    serving = Serving(
        tokenizer=record,
        chat=default,
        chat_with_tools=tool_use or default,
        special_tokens=dict(tokenizer.special_tokens_map),
    )
    serving = msgspec.structs.replace(serving, **other)
    publish_serving(serving, instance, content)
    return serving


def renderer_of(model, **other):
    """A renderer of the folder ``model``, as the coordinator would have it."""
    return Renderer(publish_folder(model, model, **other), model)

"""Conversations as real vLLM renders them and as the coordinator does, for servers with templates of many kinds.

Needs vLLM in the process: see hooked_vllm.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from apollo_tp.coordinator.samples.conversation import Chat
from apollo_tp.coordinator.samples.render import Renderer
from apollo_tp.coordinator.samples.schema import SampleBody, decode
from apollo_tp.errors import RequestError
from apollo_tp.shards.serving import publish_serving
from apollo_tp.vllm_plugin import chat
from tests.support.chat_model import CHATML, write_model

SEEN = (
    "{{ tools | tojson }}{{ brief }}{{ documents | tojson }}{{ eos_token }}"
    "{% for m in messages %}{{ '<|im_start|>' + m | tojson }}{{ '<|im_end|>' }}{% endfor %}"
)
"""Renders everything that a template is given, in order."""
PARTS = (
    "{{ brief }}{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m['content'] %}{{ part | tojson }}{% endfor %}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
)
DEVELOPER = SEEN + "{% if 'developer' in roles %}{% endif %}"
NAMED = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": SEEN}]

SERVERS: dict[str, dict[str, Any]] = {
    "the tokenizer's": {"template": SEEN},
    "named ones": {"template": NAMED},
    "files": {"template": None, "files": {"chat_template": CHATML, "additional_chat_templates/tool_use": SEEN}},
    "an option": {"template": CHATML, "chat_template": SEEN},
    "an option's file": {"template": CHATML, "files": {"own": SEEN}, "chat_template": "own.jinja"},
    "an option of vLLM's": {"template": SEEN, "chat_template": "template_chatml.jinja"},
    "one over parts": {"template": PARTS},
    "one over parts, which gets strings": {"template": PARTS, "chat_template_content_format": "string"},
    "one that gets parts": {"template": SEEN, "chat_template_content_format": "openai"},
    "one that knows developers": {"template": DEVELOPER},
    "defaults": {"template": SEEN, "default_chat_template_kwargs": {"brief": 3, "eos_token": "other"}},
    "none": {"template": None},
}
TOOLS = [
    {"function": {"parameters": {"b": 1, "a": {"type": "x"}}, "name": "f"}, "type": "function"},
    {"type": "function", "function": {"description": "é", "name": "g", "strict": True}},
    {"type": "function", "function": {"strict": None, "name": "h", "description": "", "parameters": {}}},
]
CALLS = [
    {"type": "function", "id": "1", "function": {"name": "f", "arguments": '{"b": "\\u00e9", "a": [1.5]}'}},
    {"index": 1, "function": {"parsed": {"a": 1}, "arguments": "", "name": "g"}, "id": "2", "type": "function"},
]
TWO = [{"type": "text", "text": "one"}, {"type": "text", "text": ""}, {"type": "text", "text": "two"}]
USER, ANSWER = {"role": "user", "content": "Hello é"}, {"role": "assistant", "content": " I am fine. "}
CHATS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [{"role": "system", "content": "x", "name": "s"}, USER, ANSWER, USER, ANSWER]},
    "reasoning": {
        "messages": [
            USER,
            ANSWER | {"reasoning_content": "because"},
            USER | {"name": "u"},
            ANSWER | {"reasoning": "so"},
        ]
    },
    "parts": {"messages": [{"role": "user", "content": TWO}, {"role": "assistant", "content": TWO}]},
    "tools": {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": CALLS},
            {"role": "tool", "content": TWO, "tool_call_id": "1"},
            {"role": "tool", "content": "text", "tool_call_id": "2"},
            {"role": "assistant", "content": "x", "tool_calls": []},
        ],
        "tools": TOOLS,
    },
    "developer first": {"messages": [{"role": "developer", "content": TWO}, USER, ANSWER]},
    "developer and system": {
        "messages": [{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}, USER, ANSWER]
    },
    "own": {"messages": [USER, ANSWER], "chat_template_kwargs": {"brief": "é", "documents": None}},
    "automatic": {"messages": [USER, ANSWER], "chat_template_kwargs": {"brief": "auto"}},
}


def by_vllm(client: Any, args: Any, body: dict[str, Any]) -> str:
    """The prompt that an API server makes of a request without a generation prompt."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.renderers import merge_kwargs
    from vllm.renderers.hf import load_chat_template

    body = json.loads(json.dumps(body))  # it changes messages in place
    request = ChatCompletionRequest(model="m", add_generation_prompt=False, tool_choice="none", **body)
    tools = None if request.tools is None else [tool.model_dump() for tool in request.tools]
    defaults = merge_kwargs(args.default_chat_template_kwargs, {"tools": tools, "tokenize": False})
    template = load_chat_template(args.chat_template)
    params = request.build_chat_params(template, args.chat_template_content_format).with_defaults(defaults)
    return str(client.renderer.render_messages(request.messages, params)[1]["prompt"])


def by_us(renderer: Renderer, body: dict[str, Any]) -> str:
    """The text of the tokens, all of them context: turns that the template does not show completely are not learned."""
    sample = decode(json.dumps(body).encode(), SampleBody)
    assert sample.messages is not None
    turns = sum(message.role == "assistant" for message in sample.messages)
    ids, _ = renderer.chat(Chat(sample.messages, sample.tools, sample.chat_template_kwargs), [0.0] * turns, 10_000)
    return renderer._tokenizer.decode(ids, skip_special_tokens=False)


def rendered(folder: Path, model_config: Any) -> dict[str, dict[str, list[str]]]:
    """By server and conversation: what vLLM renders and what we do, or their exceptions."""
    from transformers import AutoTokenizer

    found: dict[str, dict[str, list[str]]] = {}
    for number, (name, options) in enumerate(SERVERS.items()):
        model = write_model(folder / str(number), options["template"])
        for file, text in options.get("files", {}).items():
            (model / f"{file}.jinja").parent.mkdir(exist_ok=True)
            (model / f"{file}.jinja").write_text(text, encoding="utf-8")
        chosen = options.get("chat_template")
        args = SimpleNamespace(
            chat_template=str(model / chosen) if chosen and (model / chosen).is_file() else chosen,
            chat_template_content_format=options.get("chat_template_content_format", "auto"),
            default_chat_template_kwargs=options.get("default_chat_template_kwargs"),
        )
        client = _client(model_config, AutoTokenizer.from_pretrained(model))
        serving, content = chat.describe(chat.Front.of_client(client), args)
        publish_serving(serving, model, content)
        ours = Renderer(serving, model)
        found[name] = {
            conversation: [_text(by_vllm, client, args, body), _text(by_us, ours, body)]
            for conversation, body in CHATS.items()
        }
    return found


def refusals(folder: Path, model_config: Any) -> dict[str, str]:
    """Why conversations cannot be trained for servers that do not render them by a template."""
    from transformers import AutoTokenizer
    from vllm.renderers.hf import HfRenderer

    class Other(HfRenderer):
        def render_messages(self, *_: Any) -> Any:
            return None

    class OwnTokenizer:
        special_tokens_map: ClassVar[dict[str, str]] = {}

        def apply_chat_template(self) -> None:
            """A method of a model's own code."""

    harmony = SimpleNamespace(hf_config=SimpleNamespace(model_type="gpt_oss"))
    clients = {
        "no tokenizer": _client(model_config, None),
        "gpt-oss": _client(harmony, object()),
        "a renderer of its own": _client(model_config, object(), Other),
        "a tokenizer's own": _client(model_config, OwnTokenizer()),
        "a tokenizer that fails": _client(model_config, object()),
    }
    args = SimpleNamespace(chat_template="{{ x }}")
    found = {name: _refused(client, args) for name, client in clients.items()}
    args.default_chat_template_kwargs = {"tools": [], "a": 1}
    tokenizer = AutoTokenizer.from_pretrained(write_model(folder))
    return found | {"reserved": _refused(_client(model_config, tokenizer), args)}


def _refused(client: Any, args: Any) -> str:
    return chat.describe(chat.Front.of_client(client), args)[0].chat_refusal


def _client(model_config: Any, tokenizer: Any, kind: Any = None) -> Any:
    """An engine client with vLLM's renderer, without what renders images and with no threads of its own."""
    from vllm.renderers.hf import HfRenderer

    renderer = object.__new__(kind or HfRenderer)
    config = SimpleNamespace(model_config=model_config)
    vars(renderer).update(config=config, model_config=model_config, tokenizer=tokenizer, use_unified_vision_chunk=False)
    return SimpleNamespace(renderer=renderer, model_config=model_config)


def _text(render: Any, *args: Any) -> str:
    from vllm.renderers.hf import ChatTemplateResolutionError  # vLLM release: from 0.33 on it is no ValueError

    try:
        return str(render(*args))
    except (ValueError, RequestError, ChatTemplateResolutionError) as error:
        return f"{type(error).__name__}: {error}"

"""Token ids that real vLLM serves and that the coordinator trains, for tokenizers of many classes: ``python -m
tests.support.served_tokens FOLDER`` prints them. A process of its own, because importing vLLM changes much."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer

from apollo_tp.coordinator.samples.conversation import Chat
from apollo_tp.coordinator.samples.render import Renderer
from apollo_tp.coordinator.samples.schema import Message
from apollo_tp.shards.serving import TOKENIZER_FILE, Serving, publish_serving, read_serving
from apollo_tp.vllm_plugin import chat
from tests.support.families import FAMILIES
from tests.support.tokenizer_zoo import KINDS, Kind

TEXTS = (
    "Hello there, how are you?", " I am fine, thanks.", "trailing space ", "\n\nlines\n", "12345 + 1 = 12346", "é 漢字 😀 ①",
    "user<|im_start|>assistant<|im_end|> word <|im_end|>\n<|im_end|>", "[INST] a [/INST] b</s>c </s> d", "a<end_of_turn>\nb",
    "  two  spaces", "they'll doesn't", "DEF Def def", "cafe\u0301",
)  # fmt: skip
MESSAGES = [
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "I am fine, thanks."},
    {"role": "user", "content": "how are you? é 漢字"},
    {"role": "assistant", "content": "the answer\nis 42: 😀."},
]
ARGS = SimpleNamespace(chat_template=None, chat_template_content_format="auto", default_chat_template_kwargs=None)


def server(folder: Path, model_config: Any, **options: Any) -> Any:
    """An engine client with vLLM's renderer over its tokenizer of ``folder``; without what renders images."""
    from vllm.renderers.hf import HfRenderer
    from vllm.tokenizers import get_tokenizer
    from vllm.tokenizers.hf import maybe_make_thread_pool

    tokenizer = get_tokenizer(str(folder), **options)
    maybe_make_thread_pool(tokenizer, 2)
    renderer = object.__new__(HfRenderer)
    config = SimpleNamespace(model_config=model_config)
    vars(renderer).update(config=config, model_config=model_config, tokenizer=tokenizer, use_unified_vision_chunk=False)
    return SimpleNamespace(renderer=renderer, model_config=OtherFolder(model_config, folder))


def served_ids(client: Any, text: str) -> list[int]:
    """Token ids of a request to /v1/completions."""
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    params = CompletionRequest(model="m", prompt=text).build_tok_params(client.model_config)
    return list(client.renderer._tokenize_singleton_prompt({"prompt": text}, params)["prompt_token_ids"])


def served_chat(client: Any, messages: list[dict[str, Any]]) -> list[int]:
    """Token ids of a request to /v1/chat/completions, without a generation prompt."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    body = json.loads(json.dumps(messages))
    request = ChatCompletionRequest(model="m", messages=body, add_generation_prompt=False)
    params = request.build_chat_params(None, "auto").with_defaults({"tools": None, "tokenize": False})
    prompt = client.renderer.render_messages(request.messages, params)[1]
    tokens = client.renderer._tokenize_singleton_prompt(prompt, request.build_tok_params(client.model_config))
    return list(tokens["prompt_token_ids"])


def compared(kind: Kind, folder: Path, model_config: Any) -> dict[str, Any]:
    """The ids of both, and the tokens that are learned."""
    client = server(kind.write(folder), model_config)
    served = [served_ids(client, text) for text in TEXTS]
    conversation = served_chat(client, MESSAGES)
    serving, content = chat.describe(chat.Front.of_client(client), ARGS)
    again = [served_ids(client, text) for text in TEXTS] + [served_chat(client, MESSAGES)]
    found = {"refusals": [serving.text_refusal, serving.chat_refusal], "served stays": again == [*served, conversation]}
    if serving.tokenizer is None:
        return found
    publish_serving(serving, folder, content)
    renderer = Renderer(serving, folder)
    ids, weights = renderer.chat(Chat([Message(**m) for m in MESSAGES]), [1.0, 1.0], 10_000)
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return found | {
        "texts": [[text, begun, renderer.begun(text)] for text, begun in zip(TEXTS, served, strict=True)],
        "chat": [conversation, ids],
        "learned": [renderer._tokenizer.decode(run, skip_special_tokens=False) for run in _runs(ids, weights)],
        "eos": renderer._tokenizer.id_to_token(renderer.eos_id),
        "ends": [renderer._tokenizer.id_to_token(token) for token in serving.tokenizer.end_ids],
        "refused": serving.tokenizer.refused_tokens,
        "tokenizer.json": plain.encode(_text(client), add_special_tokens=False).ids,
        "sha256": serving.tokenizer.sha256,
        "folder": str(folder),
    }


class OtherFolder:
    """A model configuration, but with the generation config of ``folder``."""

    def __init__(self, model_config: Any, folder: Path) -> None:
        self._model_config, self._folder = model_config, folder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model_config, name)

    def try_get_generation_config(self) -> dict[str, Any]:
        from vllm.transformers_utils.config import try_get_generation_config

        config = try_get_generation_config(str(self._folder), trust_remote_code=False)
        return config.to_diff_dict() if config else {}


def _text(client: Any) -> str:
    return str(client.renderer.tokenizer.apply_chat_template(MESSAGES, tokenize=False))


def _runs(ids: list[int], weights: list[float]) -> list[list[int]]:
    runs: list[list[int]] = []
    for index, weight in enumerate(weights):
        if weight:
            runs = runs if weights[index - 1] else [*runs, []]
            runs[-1].append(ids[index])
    return runs


def refused(folder: Path, model_config: Any) -> dict[str, str]:
    """Why texts cannot be trained for tokenizers that do more than their backend."""
    from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
    from vllm.renderers.hf import HfRenderer

    class OwnCode(PreTrainedTokenizerFast):
        def _encode_plus(self, text: Any, *args: Any, **kwargs: Any) -> Any:
            return super()._encode_plus(text.strip(), *args, **kwargs)

    class Lowers(PreTrainedTokenizerFast):
        def _convert_encoding(self, encoding: Any, **kwargs: Any) -> Any:
            fields, encodings = super()._convert_encoding(encoding, **kwargs)
            fields["input_ids"] = [sorted(ids) for ids in fields["input_ids"]]
            return fields, encodings

    model = KINDS["generic"].write(folder)
    tokenizers = {
        "none": None,
        "slow": ByT5Tokenizer(),
        "own code": OwnCode.from_pretrained(model),
        "other ids": Lowers.from_pretrained(model),
        "an object": object(),
    }
    found = {}
    for name, tokenizer in tokenizers.items():
        serving, content = chat.describe(chat.Front(tokenizer, HfRenderer, model_config), ARGS)
        assert (serving.tokenizer, content) == (None, b""), name
        found[name] = serving.text_refusal
    return found


def of_engines(folder: Path) -> dict[str, Any]:
    """What a worker publishes where there is no API server, by options."""
    from vllm.engine.arg_utils import EngineArgs

    tokenizer = KINDS["llama"].write(folder / "tokenizer")
    FAMILIES["qwen3"].config(architectures=["Qwen3ForCausalLM"]).save_pretrained(folder / "model")
    found: dict[str, Any] = {}
    for name, options in {"tokenizer": {}, "none": {"skip_tokenizer_init": True}}.items():
        args = EngineArgs(model=str(folder / "model"), tokenizer=str(tokenizer), load_format="dummy", **options)
        (out := folder / name / "i").mkdir(parents=True)
        chat.publish_of_engine(args.create_engine_config().model_config, out)
        serving = read_serving(out)
        assert isinstance(serving, Serving)
        found[name] = [serving.text_refusal, serving.chat is not None]
        if serving.tokenizer:
            client = server(tokenizer, None)
            renderer = Renderer(serving, out)
            found[name] += [
                [served for text in TEXTS for served in client.renderer.tokenizer(text)["input_ids"]],
                [token for text in TEXTS for token in renderer.begun(text)],
                (out / TOKENIZER_FILE).stat().st_mode & 0o777,
            ]
    return found


def main(folder: Path) -> dict[str, Any]:
    from vllm.engine.arg_utils import EngineArgs

    FAMILIES["qwen3"].config(architectures=["Qwen3ForCausalLM"]).save_pretrained(folder / "model")
    args = EngineArgs(model=str(folder / "model"), load_format="dummy", skip_tokenizer_init=True)
    model_config = args.create_engine_config().model_config
    return {
        "kinds": {
            name: compared(kind, folder / "kinds" / str(number), model_config)
            for number, (name, kind) in enumerate(KINDS.items())
        },
        "refused": refused(folder / "refused", model_config),
        "engines": of_engines(folder / "engines"),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))

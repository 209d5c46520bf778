"""A tiny model folder with a byte-level BPE tokenizer and a chat template of choice; templates as models have them."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXT = [
    "user assistant system Hello there, how are you? I am fine, thanks. think reason because the answer is 42.\n\n"
] * 4
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# as Qwen3: reasoning is kept only after the last user message, and an empty one is added there
THINKING = """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set content = m.content %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
# as Qwen3 also: tool calls come after the content, on a line of their own if there is one
THINKING_CALLS = THINKING.replace(
    "        {{- '<|im_end|>\\n' }}\n",
    "        {%- for call in m.tool_calls or [] %}"
    "{{- ('\\n' if content or not loop.first else '') + '<call>' + call.function.name + '</call>' }}{%- endfor %}\n"
    "        {{- '<|im_end|>\\n' }}\n",
    1,
)
# as Qwen3.5: the generation prompt begins the reasoning, of which earlier turns keep nothing
PROMPTED, PROMPTED_CALLS = (
    template.replace("'<|im_start|>assistant\\n' }}{%- endif %}", "'<|im_start|>assistant\\n<think>\\n' }}{%- endif %}")
    for template in (THINKING, THINKING_CALLS)
)
# as DeepSeek-R1: no message keeps its reasoning, and the generation prompt begins one, or not (as in its first version)
DROPPING_ALWAYS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}"
    "{% elif m.role == 'assistant' %}{% set content = m.content %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<|assistant|>' + content + '<|im_end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"
)
DROPPING_ALWAYS_PLAIN = DROPPING_ALWAYS.replace("<think>\\n' }}{% endif %}", "' }}{% endif %}")
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALLING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% if 'tool_calls' in m %}{% for call in m.tool_calls %}"
    "{{ '<call>' + call.function.name + ' ' + call.function.arguments | tojson }}"
    "{% else %}{{ '<no call>' }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# what comes first depends on what comes later
COUNTING = "{{ messages | length }} " + CHATML
# as Llama 2: the system message moves into the first user turn, contents are trimmed, turns end with eos
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
    "{% else %}{{ raise_exception('no role ' + m.role) }}{% endif %}{% endfor %}"
)


TURNS = [
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "I am fine, thanks."},
    {"role": "user", "content": "how are you? é 漢字 "},
    {"role": "assistant", "content": " the answer\nis 42. "},
]


def tool_round(*more):
    calls = [{"id": "1", "type": "function", "function": {"name": name, "arguments": "{}"}} for name in ("f", "g")]
    asked = {"role": "assistant", "content": None, "tool_calls": calls}
    return [TURNS[0], asked, {"role": "tool", "content": "42", "tool_call_id": "1"}, TURNS[1], *more]


def write_model(folder, template=CHATML, *, vocab_size=400):
    """tokenizer.json, tokenizer_config.json, config.json in ``folder``."""
    folder.mkdir(exist_ok=True, parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "bos_token": "<|im_start|>",
        "pad_token": "<|endoftext|>",
    }
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"vocab_size": tokenizer.get_vocab_size(), "eos_token_id": 2}))
    return folder

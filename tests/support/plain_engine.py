"""A vllm.LLM with the plugin: ``python -m tests.support.plain_engine FOLDER`` prints the ids that it serves for a
text, and those that a trainer would train."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from apollo_tp.coordinator.samples.render import Renderer
from apollo_tp.runtime import instance_folder
from apollo_tp.shards.serving import Serving, read_serving
from tests.support.families import FAMILIES
from tests.support.tokenizer_zoo import KINDS

TEXT = "Hello there, é 12"


def main(folder: Path) -> None:
    from vllm import LLM, SamplingParams

    from tests.support.forking_server import fork_processes

    fork_processes()

    tokenizer = KINDS["llama"].write(folder / "tokenizer")
    FAMILIES["qwen3"].config(architectures=["Qwen3ForCausalLM"]).save_pretrained(folder / "model")
    llm = LLM(
        model=str(folder / "model"), tokenizer=str(tokenizer), load_format="dummy", dtype="bfloat16", enforce_eager=True,
        max_model_len=128, max_num_seqs=4,
    )  # fmt: skip
    served = llm.generate([TEXT], SamplingParams(max_tokens=1))[0].prompt_token_ids
    instance = instance_folder.instance_dir(os.environ[instance_folder.INSTANCE_VARIABLE])
    serving = read_serving(instance)
    assert isinstance(serving, Serving)
    print(json.dumps([list(served or []), Renderer(serving, instance).begun(TEXT)]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

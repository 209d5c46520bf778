"""``python -m apollo_tp.inspect MODEL``: what a user can get wrong is a sentence."""

import json
import subprocess
import sys

import pytest
import torch

from apollo_tp.inspect.__main__ import main
from apollo_tp.runtime import instance_folder
from apollo_tp.shards.manifest import CheckpointTensor, SegmentRecord, ServedTensor, publish
from tests.support import forks
from tests.support.families import FAMILIES, build, store_head
from tests.support.manifests import manifest
from tests.support.processes import FORKING_SERVER

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128, "vocab_size": 256,
    "max_position_embeddings": 128, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_a_folder_that_is_no_model_is_named(tmp_path, capsys):
    """One that does not exist, and one without a config.json; without vLLM's import."""
    for folder in (tmp_path / "none", tmp_path):
        assert main([str(folder)]) == 1
        assert f"got {folder}, expected a Hugging Face folder" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["nan", "inf", "1e999"])
def test_a_wait_without_an_end_is_refused(tmp_path, capsys, seconds):
    """A deadline that never comes."""
    tmp_path.chmod(0o700)
    assert main(["--runtime-dir", str(tmp_path), "--wait", seconds]) == 1
    assert "--wait: got " in capsys.readouterr().err


def test_brackets_in_names_are_shown(tmp_path, capsys):
    """As they are, not taken for markup, which would drop them or end in a traceback."""
    tmp_path.chmod(0o700)
    segment = SegmentRecord(
        checkpoint="a[/b].weight", box_offset=[0], box_shape=[4], served="served[bold]", view_offset=0, view_stride=[1]
    )
    tensor = CheckpointTensor(name="a[/b].weight", shape=[4], dtype="bfloat16")
    served = ServedTensor(name="served[bold]", allocation=0, offset_bytes=0, shape=[4], stride=[1], dtype="bfloat16")
    model = manifest(size=1, model_path="/models/[/x]", checkpoint=[tensor], served=[served], segments=[segment])
    publish(model, instance_folder.instance_dir("test", tmp_path))
    main(["--runtime-dir", str(tmp_path)])
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("/models/[/x]", "a[/b].weight", "[0:4]", "served[bold]"))


@pytest.mark.parametrize("size", ["0", "-1"])
def test_a_size_below_one_is_refused(model, capsys, size):
    """As an option, before anything is built."""
    assert main(["--tp", size, str(model)]) == 1
    assert f"--tp: got {size}, expected an integer >= 1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "status", "said"),
    [
        (
            None,
            0,
            "lm_head.weight │ 1 │ second copy │ of model.embed_tokens.weight: written into checkpoints with its trained",
        ),
        (slice(900, 901), 1, "lm_head.weight: got it loaded on ranks [1] alone, expected it on all or none"),
        (slice(None), 0, "lm_head.weight │ 1003x64 │ 1"),
    ],
)
def test_a_stored_head_is_told_as_a_server_tells_it(tmp_path, rows, status, said):
    """Of a tied model: one that equals the embedding, one that differs on the second rank alone, another one altogether."""
    torch.manual_seed(0)
    build(FAMILIES["qwen3-tied"].config()).save_pretrained(tmp_path)
    store_head(tmp_path, rows)
    done = forks.run(FORKING_SERVER, ["apollo_tp.inspect", "--tp", "2", str(tmp_path)], 240)
    text = " ".join(done.stdout.split())
    assert said in text, text
    assert done.returncode == status
    assert ("second copy" in text) == (rows is None)


def test_a_quantised_folder_is_refused_with_the_advice(tmp_path):
    """Of gpt-oss in MXFP4; on a CPU vLLM itself would list its kernels for GPUs."""
    config = FAMILIES["gpt-oss"].config(architectures=["GptOssForCausalLM"])
    config.quantization_config = {"quant_method": "mxfp4"}
    config.save_pretrained(tmp_path)
    done = forks.run(FORKING_SERVER, ["apollo_tp.inspect", "--tp", "2", str(tmp_path)], 240)
    assert done.returncode == 1
    assert "quantised weights (gpt_oss_mxfp4): serve the bf16 checkpoint; transformers makes it" in done.stderr


@pytest.mark.slow
def test_what_vllm_refuses_is_refused_in_its_words(model, tmp_path):
    """Four heads on three ranks: vLLM's own sentence, without pydantic's frame around it. And configs over which they
    raise anything at all. In a process of its own, which vLLM's import changes, and in one, since that import is slow."""
    folders = []
    for content in (b"[]", b"null", b"{", b"{}", b"\xff\xfe", b'"x"', b'{"model_type": 3}', b'{"model_type": []}'):
        folders.append(tmp_path / f"model{len(folders)}")
        folders[-1].mkdir()
        (folders[-1] / "config.json").write_bytes(content)
    code = (
        "import sys; from apollo_tp.inspect.__main__ import main; "
        "print([main(['--tp', '3', folder]) for folder in sys.argv[1:]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, [model, *folders])],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert f"{[1] * (1 + len(folders))}" in done.stdout, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("apollo_tp.inspect: ")]
    assert f"{model} at --tp 3: got 'Total number of attention heads (4) must be divisible" in errors[0]
    assert "pydantic" not in errors[0]
    for folder, error in zip(folders, errors[1:], strict=True):
        assert f"{folder} at --tp 3: got " in error
    assert "Traceback" not in done.stderr

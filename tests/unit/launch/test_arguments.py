"""Hydra's own flags, forms of overrides that are meant for other programs, and values that are texts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from apollo_tp.config import Config, OptimizerKind
from apollo_tp.errors import ConfigError
from apollo_tp.launch.arguments import read_arguments
from apollo_tp.launch.compose import quoted


def options(*arguments: str) -> Config:
    found = read_arguments(list(arguments))
    assert isinstance(found, Config)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "my, (options) ü"
    path.mkdir()
    (path / "full.yaml").write_text("defaults: [config, {override optim: adamw}, _self_]\noptim: {lr: 3e-5}\n")
    (path / "bare.yaml").write_text("optim: {lr: 4e-5}\nserver: {instance: prod}\n")
    return path


@pytest.mark.parametrize(("name", "kind", "rate"), [("full", "adamw", 3e-5), ("bare", "apollo", 4e-5)])
def test_a_file_of_options_is_read(folder: Path, name: str, kind: str, rate: float) -> None:
    """With a defaults list and without one; the command line wins over it, groups included."""
    source = ("--config-dir", str(folder), "--config-name", name)
    config = options(*source)
    assert (config.optim.kind.value, config.optim.lr, config.optim.rank) == (kind, rate, 64)
    config = options("optim.lr=1", *source, "optim=apollo_mini", "optim.rank=7")
    assert (config.optim.kind, config.optim.lr, config.optim.rank) == (OptimizerKind.apollo_mini, 1.0, 7)
    shown = read_arguments(["--cfg", "job", *source])
    assert f"lr: {rate:.1e}" in str(shown)
    assert "verify_tensors: 8" in str(shown)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("optim: {rnk: 3}", r"optim\.rnk: got an unknown option; the nearest valid key is optim\.rank"),
        ("defaults: [config, _self_]\noptim: {rnk: 3}", r"optim\.rnk: got an unknown option; the nearest valid key"),
        ("optim: {lr: abc}", r"optim\.lr: .*expected float"),
        ("optim: {lr: -1}", r"optim\.lr: got -1\.0, expected a number > 0"),
        ("optim: [1", r"wrong\.yaml: got .*, expected YAML in UTF-8"),
        (b"checkpoint: {dir: \xfc}", r"wrong\.yaml: got .*utf-8.*, expected YAML in UTF-8"),
    ],
)
def test_a_wrong_file_is_one_message(folder: Path, content: str | bytes, message: str) -> None:
    (folder / "wrong.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message):
        options("--config-dir", str(folder), "--config-name", "wrong")


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--version"], "Hydra 1."),
        (["--help"], "optim.rank=64"),
        (["-h", "optim.lr=1"], "optim.rank=64"),
        (["--cfg", "job", "optim.lr=0.5"], "lr: 0.5"),
        (["-c", "job", "--package", "qos"], "# @package qos"),
        (["--cfg", "hydra"], "hydra:"),
        (["--info", "searchpath"], "| main     | file://"),
        (["--info", "defaults"], "optim/apollo"),
        (["--info"], "Installed Hydra Plugins"),
        (["--shell-completion", "install=bash"], "hydra_bash_completion"),
        (["--hydra-help"], "Hydra's help"),
    ],
)
def test_hydras_own_flags_are_answered(flags: list[str], part: str) -> None:
    assert part in str(read_arguments(flags))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m"], "--multirun: got a sweep, expected one run: a trainer trains the one server"),
        (["--multirun", "optim.lr=1,2"], "--multirun: got a sweep"),
        (["--experimental-rerun", "x"], "--experimental-rerun: got a pickle"),
        (["optim.lr", "=", "1e-5"], "optim.lr = 1e-5: got spaces around the '=', expected optim.lr=1e-5"),
        (["optim.lr=", "1e-5"], "expected optim.lr=1e-5"),
        (["optim.lr", "=1e-5"], "expected optim.lr=1e-5"),
        (["--optim.lr=1e-5"], "--optim.lr=1e-5: got an option with dashes, expected optim.lr=1e-5 without them"),
        (["--optim.lr", "1e-5"], "expected optim.lr=1e-5 without them"),
        (["--train.max-sequence-tokens=9"], "expected train.max_sequence_tokens=9 without them"),
        (["--bogus"], "arguments: unrecognized arguments: --bogus"),
        (["--cfg", "nope"], "invalid choice: 'nope'"),
        (["--config-name", "nope"], "--config-name: Cannot find primary config 'nope'"),
        (["--config-dir", "/no/such"], "--config-dir: got /no/such, which is no folder"),
        (["--cfg", "hydra", "optim.rnk=1"], "rnk"),
        (["learning_rate=1"], "nearest valid key is optim.lr"),
        (["optim.learning_rate=1"], "nearest valid key is optim.lr"),
        (["output_dir=x"], "nearest valid key is checkpoint.dir"),
        (["epochs=3"], "options of a job"),
        (["zzz=1"], "zzz: got an unknown option; --help lists all"),
    ],
)
def test_what_is_meant_is_said(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as found:
        read_arguments(arguments)
    assert message in str(found.value)


@pytest.mark.parametrize("value", ["1e5", "007", "1_000", "true", "0x10", "3.50", "inf"])
def test_a_text_stays_as_it_is_written(value: str) -> None:
    """Where it looks like a number or a truth value, too."""
    assert options(f"server.instance={value}").server.instance == value
    assert options(f"checkpoint.dir={value}").checkpoint.dir == value
    assert options("server.instance=null").server.instance is None


@pytest.mark.parametrize(
    "value",
    [
        "/tmp/ü, (x) [y]",
        'a"b',
        "a\\",
        'a\\"b',
        "a\\\\",
        "$HOME/${x}",
        "~/x",
        "a=b",
        " lead ",
        "{a:1}",
        "'q'",
        "#x",
        "%",
        "1e5",
    ],
)
def test_a_quoted_path_is_read_as_it_is(value: str) -> None:
    assert options(quoted("checkpoint.dir", value)).checkpoint.dir == value


@pytest.mark.parametrize("flag", ["--help", "--info", "--hydra-help"])
def test_a_reader_that_ends_first_is_no_error(flag: str) -> None:
    """As ``head`` is."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "apollo_tp.launch", flag],
            stdout=closed,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_full_disk_is_told() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "apollo_tp.launch", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr.decode().startswith("apollo_tp.launch: standard output: got No space left on device")

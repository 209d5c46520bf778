"""The arguments of a trainer: Hydra's own flags, by Hydra's own parser, and overrides of options.

python -m apollo_tp.launch --config-dir ~/apollo --config-name mine optim.lr=1e-5
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser  # hydra.main offers no way to parse without running
from omegaconf import OmegaConf

from apollo_tp.config import Config
from apollo_tp.errors import ConfigError
from apollo_tp.launch.compose import Source, composed, config_dir, help_text, known_keys, read_config, register_schema

ONE_RUN = (
    "got a sweep, expected one run: a trainer trains the one server that runs, and two at once would overwrite each "
    "other's weights; start it once for each set of options"
)


def read_arguments(arguments: list[str]) -> Config | str:
    """The checked options; or, for a flag that only asks something (``--help``, ``--cfg``, ``--info``, ``--version``,
    ``--shell-completion``), the answer. Raises ConfigError for anything that is neither."""
    _check_form(arguments)
    parsed, out = _parse(arguments)
    if parsed is None:
        return out
    if parsed.help:
        return help_text()
    if parsed.multirun:
        raise ConfigError(f"--multirun: {ONE_RUN}")
    if parsed.experimental_rerun:
        raise ConfigError("--experimental-rerun: got a pickle, expected options; pickles are not read here")
    source = Source(parsed.config_dir or parsed.config_path, parsed.config_name or "config")
    if parsed.cfg == "job" and not (parsed.package or parsed.resolve):
        return OmegaConf.to_yaml(composed(parsed.overrides, source))
    if parsed.cfg or parsed.info or parsed.shell_completion or parsed.hydra_help:
        return _answer_of_hydra(arguments)
    return read_config(parsed.overrides, source)


def _parse(arguments: list[str]) -> tuple[argparse.Namespace | None, str]:
    """What Hydra's parser finds; or None, and what it printed if the arguments ask for its version."""
    parser = get_args_parser()
    parser.allow_abbrev = False

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"arguments: {message}; expected key=value and Hydra's flags, see --help")

    parser.error = refuse  # type: ignore[method-assign]
    with _captured() as out:
        try:
            return parser.parse_intermixed_args(arguments), ""
        except SystemExit:  # --version
            return None, out.getvalue()


def _answer_of_hydra(arguments: list[str]) -> str:
    """What ``hydra.main`` prints for a flag that asks something. Raises ConfigError with what it says of an error."""
    register_schema()
    ask = hydra.main(config_path=str(config_dir()), config_name="config", version_base="1.3")(lambda config: None)
    before, sys.argv = sys.argv, ["apollo_tp.launch", *arguments]
    errors = io.StringIO()
    try:
        with _captured() as out, contextlib.redirect_stderr(errors):
            ask()
    except SystemExit as ended:
        if ended.code:
            raise ConfigError(f"arguments: {' '.join(errors.getvalue().split())}") from None
    except ValueError as error:
        raise ConfigError(f"arguments: {error}") from None
    finally:
        sys.argv = before
    return out.getvalue()


def _captured() -> contextlib.redirect_stdout[io.StringIO]:
    return contextlib.redirect_stdout(io.StringIO())


def _check_form(arguments: list[str]) -> None:
    """Raise ConfigError for the ways in which an option is written for other programs, naming the right one."""
    for before, argument, after in _with_neighbours(arguments):
        key, equals, value = argument.partition("=")
        option = key.lstrip("-").replace("-", "_")
        if key.startswith("-") and option in known_keys():
            raise ConfigError(
                f"{argument}: got an option with dashes, expected {option}={value or after or 'VALUE'} without them"
            )
        if equals and ((not key and before) or (not value and after and re.fullmatch(r"[^=-][^=]*", after))):
            name, rest = (key or before), (value or after)
            if name in known_keys() and not rest.startswith("--"):
                raise ConfigError(f"{name} = {rest}: got spaces around the '=', expected {name}={rest}")


def _with_neighbours(arguments: list[str]) -> Iterator[tuple[str, str, str]]:
    """(the argument before, the argument, the one after); "" where there is none."""
    yield from zip(["", *arguments], arguments, [*arguments[1:], ""], strict=False)


def print_answer(text: str) -> None:
    """Print to standard output; a reader that ends first, as ``head`` does, is no error. Raises ConfigError if it cannot be
    written to."""
    try:
        print(text.rstrip("\n"), flush=True)
    except BrokenPipeError:
        _discard_rest()
    except OSError as error:
        _discard_rest()
        raise ConfigError(f"standard output: got {error.strerror}, expected a file that can be written to") from error


def _discard_rest() -> None:
    """What is buffered still goes nowhere: the interpreter flushes it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

"""Compose a checked Config from Hydra overrides, with errors that name the nearest valid key; and the text of --help."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from apollo_tp.config import Config
from apollo_tp.errors import ConfigError


def config_dir() -> Path:
    """The conf/ folder: inside the installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parent.parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def groups() -> dict[str, list[str]]:
    """Config groups and their choices."""
    return {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in sorted(config_dir().iterdir())
        if folder.is_dir()
    }


def read_config(overrides: list[str]) -> Config:
    """Compose the options. Raises ConfigError naming the key, what was got, what was expected, and the nearest key."""
    _check_keys(overrides)
    ConfigStore.instance().store(name="schema", node=Config)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return OmegaConf.to_object(compose("config", overrides))  # type: ignore[return-value]
    except (OmegaConfBaseException, HydraException) as error:
        raise ConfigError(_explain(error)) from None


def _check_keys(overrides: list[str]) -> None:
    known = {name for name, _ in _leaves(Config)}
    for override in map(_parsed, overrides):
        key = override.key_or_group
        if key in groups() and not isinstance(override.value(), (str, list, dict)):
            raise ConfigError(f"{key}: got {override.get_value_string()}, expected one of {groups()[key]}")
        if key in known or key in groups() or any(name.startswith(f"{key}.") for name in known):
            continue
        near = difflib.get_close_matches(key, [*known, *groups()], n=1, cutoff=0.4)
        leaf = [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
        nearest = leaf[0] if leaf else near[0] if near else "see --help"
        raise ConfigError(f"{key}: got an unknown option; the nearest valid key is {nearest}")


def _parsed(argument: str) -> Override:
    """One argument, parsed separately so that the message can name it."""
    key, equals, value = argument.partition("=")
    if not equals or not key:
        raise ConfigError(f"{argument}: got no value, expected key=value, for example optim.lr=1e-5")
    # twice: once for the shell, once for Hydra
    quoted = f"""quote a text: '{key}="{value}"'"""
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        home = f"; nothing expands ~ here: {key}=$HOME{value[1:]}" if value.startswith("~") else f"; {quoted}"
        raise ConfigError(f"{argument}: got a value that cannot be read, expected key=value{home}") from None
    if override.is_sweep_override():
        raise ConfigError(f"{argument}: got several values, expected one; write a list as {key}=[a,b], or {quoted}")
    return override


def _explain(error: Exception) -> str:
    text = " ".join(line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip())
    key = re.search(r"full_key: (\S+)", text)
    group = re.search(r"Could not find '(\w+)/(\w+)'", text)
    if group:
        return f"{group[1]}: got {group[2]!r}, expected one of {groups().get(group[1], [])}"
    if not key:
        return text
    expected = dict(_leaves(Config)).get(key[1])
    wanted = f"; expected {expected[0]}: {expected[1]}" if expected else ""
    return f"{key[1]}: {text.split(' full_key:')[0]}{wanted}"


def _leaves(schema: type, prefix: str = "") -> Iterator[tuple[str, tuple[str, str, Any]]]:
    """(dotted key, (type, help, default)) of every option."""
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kind, name = hints[field.name], f"{prefix}{field.name}"
        if dataclasses.is_dataclass(kind):
            yield from _leaves(kind, f"{name}.")  # type: ignore[arg-type]
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        yield name, (_type_name(kind), field.metadata.get("help", ""), default)


def _type_name(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " | ".join(member.name for member in kind)
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "").replace("NoneType", "null")


def help_text() -> str:
    """Usage, groups, and every option with its default."""
    lines = [
        "Train the weights that a tensor-parallel vLLM server is serving, in place.",
        "",
        "  torchrun --nproc-per-node 2 -m apollo_tp.launch [key=value ...]",
        "  mpirun -n 2 python -m apollo_tp.launch [key=value ...]",
        "",
        "Start vLLM first, with VLLM_PLUGINS=apollo; one trainer rank per tensor-parallel rank of the server.",
        "",
        "Groups (group=choice):",
    ]
    lines += [f"  {name}={'|'.join(choices)}" for name, choices in groups().items()]
    titles = {field.name: field.metadata["help"] for field in dataclasses.fields(Config) if "." not in field.name}
    section = ""
    for key, (_, text, default) in _leaves(Config):
        owner = key.split(".")[0] if "." in key else ""
        if owner != section:
            section = owner
            lines += ["", f"{section}: {titles[section]}" if section else "others:"]
        lines.append(f"  {f'{key}={_shown(default)}':<44} {text}")
    return "\n".join(lines)


def _shown(default: Any) -> str:
    if default is None:
        return "null"
    if isinstance(default, Enum):
        return default.name
    return f"[{', '.join(map(str, default))}]" if isinstance(default, tuple) else str(default)

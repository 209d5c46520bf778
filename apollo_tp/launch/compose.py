"""Compose a checked Config from Hydra overrides, with errors that name the nearest valid key; and the text of --help."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_type_hints

import yaml  # type: ignore[import-untyped]
from hydra._internal.hydra import Hydra  # hydra.compose cannot search a second folder for the primary config
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.version import setbase
from omegaconf import DictConfig, OmegaConf, open_dict
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


@dataclass(frozen=True)
class Source:
    """The primary config: ``name`` without ``.yaml``, in ``folder`` (a user's, searched after our own) or in conf/."""

    folder: str | None = None
    name: str = "config"


def register_schema() -> None:
    """Let config files name the schema (``defaults: [schema]``)."""
    ConfigStore.instance().store(name="schema", node=Config)


def known_keys() -> set[str]:
    """The dotted names of all options."""
    return {name for name, _ in options_of(Config)}


def read_config(overrides: list[str], source: Source = Source()) -> Config:
    """Compose the options. Raises ConfigError naming the key, what was got, what was expected, and the nearest key."""
    config = composed(overrides, source)
    try:
        return OmegaConf.to_object(config)  # type: ignore[return-value]
    except (OmegaConfBaseException, HydraException) as error:
        raise ConfigError(_explain(error)) from None


def composed(overrides: list[str], source: Source = Source()) -> DictConfig:
    """The options before they are checked against each other. A file that does not name ``config`` in its defaults list
    changes the options that it has, and leaves the others. Raises ConfigError as ``read_config``."""
    checked = _checked(overrides)
    register_schema()
    GlobalHydra.instance().clear()
    try:
        read = _hydra(source.folder)
        name = source.name
        if OmegaConf.get_type(_compose(read, name, [])) is not Config:  # the file has values only
            ConfigStore.instance().store(name="over_defaults", node={"defaults": ["config", name, "_self_"]})
            name = "over_defaults"
        return _compose(read, name, checked)
    except (OmegaConfBaseException, HydraException) as error:
        raise ConfigError(_explain(error)) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = f"{source.name}.yaml" if source.folder else str(config_dir())
        raise ConfigError(f"{where}: got {' '.join(str(error).split())}, expected YAML in UTF-8") from None
    finally:
        GlobalHydra.instance().clear()


def _hydra(folder: str | None) -> Hydra:
    """Hydra over conf/ and, as ``hydra.main`` does for ``--config-dir``, over a user's folder."""
    setbase("1.3")
    path = create_config_search_path(str(config_dir()))
    if folder is not None:
        if not Path(folder).is_dir():
            raise ConfigError(f"--config-dir: got {folder}, which is no folder, expected one with YAML files")
        path.prepend("command-line", f"file://{Path(folder).absolute()}", SearchPathQuery(provider="schema"))
    return Hydra.create_main_hydra2(task_name="apollo_tp", config_search_path=path)


def _compose(read: Hydra, name: str, overrides: list[str]) -> DictConfig:
    config = read.compose_config(name, overrides, run_mode=RunMode.RUN, from_shell=False)
    with open_dict(config):
        del config["hydra"]
    return config


def _checked(overrides: list[str]) -> list[str]:
    """The overrides, with the value of an option that is a text quoted: ``server.instance=1e5`` is no number. Raises
    ConfigError for keys that are no options."""
    leaves = dict(options_of(Config))
    checked = []
    for text in overrides:
        override = _parsed(text)
        key, value = override.key_or_group, override.value()
        if key in groups() and not isinstance(value, (str, list, dict)):
            raise ConfigError(f"{key}: got {override.get_value_string()}, expected one of {groups()[key]}")
        if key not in leaves and key not in groups() and not any(name.startswith(f"{key}.") for name in leaves):
            raise ConfigError(f"{key}: got an unknown option; {_nearest(key)}")
        is_text = key in leaves and leaves[key][0].startswith("str") and isinstance(value, bool | int | float)
        checked.append(quoted(key, text.partition("=")[2].strip()) if is_text else text)
    return checked


def quoted(key: str, value: str) -> str:
    """An override whose value is exactly this text, whatever characters it has."""
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', value)  # backslashes count only before a quote, and at the end
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped).replace("${", "\\${")
    return f'{key}="{escaped}"'


OTHER_NAMES = {
    "learning_rate": "optim.lr", "lr_scheduler_type": "optim.schedule", "max_steps": "optim.total_steps",
    "max_length": "train.max_sequence_tokens", "max_seq_length": "train.max_sequence_tokens",
    "output_dir": "checkpoint.dir", "save_total_limit": "checkpoint.keep", "logging_dir": "service.writers.tensorboard_dir",
    "host": "service.http.host", "port": "service.http.port", "token": "service.token_file",
}  # fmt: skip
"""What other trainers call an option."""
OPTIONS_OF_JOBS = {
    "epochs",
    "num_train_epochs",
    "batch_size",
    "per_device_train_batch_size",
    "learning_rate_scale",
    "truncate",
}


def _nearest(key: str) -> str:
    """The advice for an unknown option: the nearest one, or where else it belongs."""
    names = [*known_keys(), *groups()]
    leaf = key.rsplit(".", 1)[-1]
    if leaf in OPTIONS_OF_JOBS:
        return "epochs, batch size and the like are options of a job: `apollo-tp train --help`"
    same = sorted(name for name in names if name.rsplit(".", 1)[-1] == leaf)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.7)
    near_leaf = difflib.get_close_matches(leaf, [name.rsplit(".", 1)[-1] for name in names], n=1, cutoff=0.75)
    found = [OTHER_NAMES[leaf]] if leaf in OTHER_NAMES and not near else same or near
    found = found or [name for name in names if near_leaf and name.rsplit(".", 1)[-1] == near_leaf[0]]
    return f"the nearest valid key is {found[0]}" if found else "--help lists all"


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
    if text.startswith("Cannot find primary config"):
        return f"--config-name: {text.partition(' Config search path:')[0]}"
    if not key:
        return text
    if "Key '" in text:  # in a file: an override's key has been checked
        return f"{key[1]}: got an unknown option; {_nearest(key[1])}"
    expected = dict(options_of(Config)).get(key[1])
    wanted = f"; expected {expected[0]}: {expected[1]}" if expected else ""
    return f"{key[1]}: {text.split(' full_key:')[0]}{wanted}"


def options_of(schema: type, prefix: str = "") -> Iterator[tuple[str, tuple[str, str, Any]]]:
    """(dotted key, (type, help, default)) of every option."""
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kind, name = hints[field.name], f"{prefix}{field.name}"
        if dataclasses.is_dataclass(kind):
            yield from options_of(kind, f"{name}.")  # type: ignore[arg-type]
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
        "  python -m apollo_tp.launch.torchrun --nproc-per-node 2 [key=value ...]",
        "  torchrun --local-addr 127.0.0.1 --nproc-per-node 2 -m apollo_tp.launch [key=value ...]",
        "  mpirun -n 2 python -m apollo_tp.launch [key=value ...]",
        "",
        "Options of your own in a file: --config-dir DIR --config-name NAME (DIR/NAME.yaml). What would be used: --cfg job.",
        'Completion in the shell: eval "$(python -m apollo_tp.launch --shell-completion install=bash)".',
        "A text with commas, parentheses and the like is quoted twice: 'checkpoint.dir=\"/data/a, b\"'.",
        "",
        "Start vLLM first, with VLLM_PLUGINS=apollo; one trainer rank per tensor-parallel rank of the server.",
        "",
        "Groups (group=choice):",
    ]
    lines += [f"  {name}={'|'.join(choices)}" for name, choices in groups().items()]
    titles = {field.name: field.metadata["help"] for field in dataclasses.fields(Config) if "." not in field.name}
    section = ""
    for key, (_, text, default) in options_of(Config):
        owner = key.split(".")[0] if "." in key else ""
        if owner != section:
            section = owner
            lines += ["", f"{section}: {titles[section]}" if section else "others:"]
        lines.append(f"  {f'{key}={shown(default)}':<44} {text}")
    return "\n".join(lines)


def shown(default: Any) -> str:
    """A default as it is written on the command line."""
    if default is None:
        return "null"
    if isinstance(default, Enum):
        return default.name
    return f"[{', '.join(map(str, default))}]" if isinstance(default, tuple) else str(default)

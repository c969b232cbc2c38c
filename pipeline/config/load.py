"""Configurations from files and the command line.

    defaults ◀─ YAML (--config) ◀─ --set key=value ◀─ explicit options ─▶ Config

What stands further right wins. Everything that is wrong is reported at once, with where each value
came from, before any work starts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from pipeline.config.schema import Config, Setting, describe, nest, unknown_key, wrong_values
from transforms.errors import ConfigError

# Folder below config_folder() of the YAML files of each command that takes some.
CONFIG_FOLDERS: Mapping[str, str] = {"label": "", "train": "train"}

C = TypeVar("C", bound=Config)


def load_config(
    schema: type[C],
    path: str | None = None,
    sets: Iterable[str] = (),
    options: Iterable[tuple[str, Any, str]] = (),
) -> C:
    """Join the defaults, a YAML file, ``--set`` assignments and options, and check the result.

    Args:
        schema: The configuration to make.
        path: A YAML file, or the name of one that ships with Earmark (``audioset``).
        sets: ``key=value`` texts with dotted keys; values are read as YAML.
        options: Key, value and flag of each option that was given.
    Raises:
        ConfigError: Lists everything that is wrong, with where each value came from.
    """
    settings: list[Setting] = []
    problems: list[str] = []
    if path is not None:
        file = _YamlReader(find_config(schema, path), schema)
        settings += file.settings
        problems += file.problems
    for assignment in sets:
        try:
            settings.append(_read_assignment(assignment, schema))
        except ConfigError as problem:
            problems.append(str(problem))
    settings += [Setting(*option) for option in options]
    return _validate(settings, problems, schema)


def _validate(settings: Sequence[Setting], problems: Sequence[str], schema: type[C]) -> C:
    """Check the last setting of each key, and report every problem."""
    given = {setting.key: setting.value for setting in settings}
    origins = {setting.key: setting.origin for setting in settings}
    problems, config, wrong = list(problems), schema(), dict[str, str]()
    try:
        config = schema.model_validate(nest(given))
    except ValidationError as error:
        wrong = wrong_values(error, schema)
    problems += [
        f"{describe(key, given.get(key), origins.get(key))}; {wanted}"
        for key, wanted in wrong.items()
    ]
    values = {key: value for key, value in (schema.defaults() | given).items() if key not in wrong}
    problems += schema.broken_rules(values, origins)
    if not problems:
        return config
    where = f"Every key is described in {_folder_of(schema.command) / 'default.yaml'}."
    if len(problems) == 1:
        raise ConfigError(f"{problems[0]}\n{where}")
    lines = "".join(f"\n  - {problem}" for problem in problems)
    raise ConfigError(f"{len(problems)} problems in the configuration:{lines}\n{where}")


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: ``1e-3`` is a number (YAML 1.1 takes it for text)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


# PyYAML lets a ValueError through for what looks like a date and is none.
_YAML_ERRORS = (yaml.YAMLError, ValueError)


class _YamlReader:
    """Reads one YAML file into settings that know their line, and problems."""

    def __init__(self, path: Path, schema: type[Config]) -> None:
        self.path = path
        self._schema = schema
        self.settings: list[Setting] = []
        self.problems: list[str] = []
        self._seen: set[str] = set()
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read as a YAML file: {error}") from error
        try:
            self._loader = _Loader(text)
            root = self._loader.get_single_node()
            if isinstance(root, yaml.MappingNode):
                self._read_section(root, "")
            elif root is not None:
                self.problems.append(f"{path} holds no keys; must be lines of the form key: value")
        except _YAML_ERRORS as error:
            raise ConfigError(f"{path} is not valid YAML: {error}") from error

    def _read_section(self, node: yaml.MappingNode, prefix: str) -> None:
        for name_node, value_node in node.value:
            key = f"{prefix}{self._construct(name_node)}"
            self._read_value(key, value_node, f"{self.path}:{name_node.start_mark.line + 1}")

    def _read_value(self, key: str, node: yaml.Node, origin: str) -> None:
        if key in self._seen:
            self.problems.append(f"{key} ({origin}) is given twice; keep one of them")
        self._seen.add(key)
        sections = self._schema.sections()
        if key in sections and isinstance(node, yaml.MappingNode):
            self._read_section(node, f"{key}.")
        elif key in sections:
            value = self._construct(node)
            if value is not None:  # a section whose keys are all commented out is empty
                self.problems.append(f"{describe(key, value, origin)}; must hold keys and values")
        elif self._schema.has_key(key):
            self.settings.append(Setting(key, self._construct(node), origin))
        else:
            among = sections if isinstance(node, yaml.MappingNode) else self._schema.defaults()
            self.problems.append(unknown_key(key, origin, among))

    def _construct(self, node: yaml.Node) -> Any:
        return self._loader.construct_object(node, deep=True)


def _read_assignment(assignment: str, schema: type[Config]) -> Setting:
    """Read the ``key=value`` of a ``--set``."""
    key, equals, text = assignment.partition("=")
    key, origin = key.strip(), f"--set {assignment}"
    if not equals:
        raise ConfigError(f"{origin} has no '='; must be key=value, like window.hop_s=5")
    if key in schema.sections():
        own = (known for known in schema.defaults() if known.startswith(f"{key}."))
        example = next(own, "beam.runner")
        raise ConfigError(f"{key} ({origin}) is a section; must be a key of it, like {example}")
    if not schema.has_key(key):
        raise ConfigError(unknown_key(key, origin, schema.defaults()))
    try:
        return Setting(key, yaml.load(text, Loader=_Loader), origin)
    except _YAML_ERRORS as error:
        raise ConfigError(
            f"{origin} is not valid YAML after '=': {error}; text may have to be in quotes"
        ) from error


# --- The YAML files that ship with Earmark ----------------------------------------------------


def config_folder() -> Path:
    """Return the folder of the YAML files that ship: in the package, or in the checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def _folder_of(command: str) -> Path:
    return config_folder() / CONFIG_FOLDERS[command]


def shipped_configs(command: str = "label") -> list[str]:
    """Return the names of the YAML files that ship for a command, without ``.yaml``."""
    return sorted(path.stem for path in _folder_of(command).glob("*.yaml"))


def find_config(schema: type[Config], name: str) -> Path:
    """Return the file that ``--config`` means: a path, else the name of one that ships.

    Raises:
        ConfigError: There is neither; for the name of another command's file, this is said.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = shipped_configs(schema.command)
    stem = name.removesuffix(".yaml")
    if stem in shipped:
        return _folder_of(schema.command) / f"{stem}.yaml"
    close = get_close_matches(stem, shipped, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    for command in CONFIG_FOLDERS:
        if stem in shipped_configs(command):
            hint = f" {stem} is one for earmark {command}.{hint}"
    raise ConfigError(
        f"--config is {name}; must be a YAML file, or one that ships with Earmark: "
        f"{', '.join(shipped)}.{hint}"
    )

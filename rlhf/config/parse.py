"""Configs from YAML files and command lines."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import functools
import itertools
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import yaml

from rlhf.base.cli import Parser, whole_number_or_auto
from rlhf.base.errors import UserError, did_you_mean
from rlhf.base.json_files import check_depth, check_digits, check_expanded, check_repeated
from rlhf.base.text_files import read_text
from rlhf.config.options import HELP_GROUPS, TrainingConfig, option_groups
from rlhf.config.shipped import find_config

T = TypeVar("T")
MAX_YAML_BYTES = 1 << 20
"""Longest YAML file; its parser takes some seconds for a megabyte."""
MAX_INTEGER = 10**18
"""Largest whole number of an option, which fits 64 bits."""
_SCALARS = (str, int, float, bool, datetime.date)


class _Loader(yaml.SafeLoader):
    """Reads YAML with the limits of JSON: no keys that stand twice, no endless numbers, no half characters."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        check_repeated((str(key.value), getattr(value, "value", value)) for key, value in node.value)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":int"):
            check_digits(node.value)
        str(node.value).encode()  # raises for half a surrogate pair
        return super().construct_scalar(node)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file or a file of a recipe; `UserError` for a missing file or other content."""
    file = find_config(path)
    if not file.is_file():
        raise UserError(f"{file} is a folder; --config takes a file of it here, and the folder in rlhf pipeline")
    if file.stat().st_size > MAX_YAML_BYTES:
        raise UserError(
            f"{file} is longer than {MAX_YAML_BYTES / 1e6:.0f} MB, too long for a config; is it a data file?"
        )
    try:
        content = yaml.load(read_text(file), Loader=_Loader)
        check_depth(content)
        check_expanded(content)
    except RecursionError as error:
        raise UserError(f"{file} is not valid YAML: nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold a mapping of options, one 'option: value' a line")
    return content


def build(config_type: type[T], values: dict[str, Any], source: str) -> T:
    """Return a config from a mapping; unknown, missing and mistyped options are `UserError`s that name `source`."""
    return parse_config(config_type, _as_arguments(config_type, values, source))


def yaml_value(value: Any) -> str:
    """Return a value as it stands behind `option:` in one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def folder_name(file: str | Path) -> str:
    """Return the name of a config file's folder, which names a run that has no other name."""
    return find_config(file).resolve().parent.name


def parse_config(config_type: type[T], argv: list[str] | None = None) -> T:
    """Return a config from `--config FILE` (YAML) and `--option value`; the command line takes precedence.

    All values go through the same argparse types, so `1e-4` is a float in YAML, too, whose own rules make it a text.
    """
    arguments = _with_new_names(config_type, list(sys.argv[1:] if argv is None else argv))
    from_files: list[str] = []
    name = ""
    while "--config" in arguments:
        at = arguments.index("--config")
        if at + 1 == len(arguments):
            raise UserError("--config needs a file name")
        file = arguments[at + 1]
        from_files += _as_arguments(config_type, read_yaml(file), file)
        name = folder_name(file)
        del arguments[at : at + 2]
    names = [f.name for f in dataclasses.fields(config_type)]  # type: ignore[arg-type]
    _refuse_unknown(arguments, names)
    if issubclass(config_type, TrainingConfig) and not {"-h", "--help"} & set(arguments):
        if not name and not any(word.split("=")[0] == "--name" for word in arguments):
            raise UserError("the run has no name: give --name NAME, or --config FOLDER/FILE, whose folder names it")
        from_files.insert(0, f"--name={name}")  # the files' own name comes after it, and wins
    config, *rest = options_parser(config_type).parse_args_into_dataclasses(
        from_files + arguments, return_remaining_strings=True
    )
    if rest[-1]:
        word = rest[-1][0]
        raise UserError(f"unexpected '{word}'; options are written --option value{did_you_mean(word, names)}")
    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} must be a finite number, got {value}")
        if isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise UserError(f"{name} must be {MAX_INTEGER:.0e} at most, got {value:.3g}")
    return config


def read_overrides(words: Sequence[str], config_types: Iterable[Any]) -> dict[str, Any]:
    """Return `--option value ...` by option, for options of any of the classes; several values are a list."""
    names = {field.name for kind in config_types for field in dataclasses.fields(kind)}
    overrides: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word, *rest = rest
        name, _, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or name not in names:
            raise UserError(f"unknown option {word}{did_you_mean(name, names)}")
        values = [value] if value else list(itertools.takewhile(lambda word: not word.startswith("--"), rest))
        if not values:
            raise UserError(f"{word} needs a value")
        rest = rest if value else rest[len(values) :]
        overrides[name] = values if len(values) > 1 else values[0]
    return overrides


def _refuse_unknown(arguments: list[str], names: list[str]) -> None:
    """Raise `UserError` for an option that has none of these names, with the nearest one."""
    for argument in arguments:
        name = argument.split("=")[0].removeprefix("--").replace("-", "_")
        if argument.startswith("--") and name not in (*names, "help", *(f"no_{k}" for k in names)):
            raise UserError(f"unknown option --{name}{did_you_mean(name, names)}")


def _with_new_names(config_type: Any, arguments: list[str]) -> list[str]:
    """Return command-line words with options of an earlier name (`RENAMED` of the class) under today's, and print a note."""
    for old, new in getattr(config_type, "RENAMED", {}).items():
        for at, word in enumerate(arguments):
            name, equals, value = word.partition("=")
            if name.replace("-", "_") == f"__{old}":
                _note(f"--{old} is called --{new} now")
                arguments[at] = f"--{new}{equals}{value}"
    return arguments


@functools.cache  # a command may read its options twice: before slow imports, and after them
def _note(message: str) -> None:
    print(f"note: {message}", file=sys.stderr)


def _as_arguments(config_type: type, values: dict[str, Any], source: str) -> list[str]:
    """Return a mapping as command-line words."""
    names = [f.name for f in dataclasses.fields(config_type)]
    renamed = getattr(config_type, "RENAMED", {})
    words: list[str] = []
    for key, value in values.items():
        if key in renamed:
            if renamed[key] in values:
                raise UserError(f"{source}: {key} is an earlier name of {renamed[key]}; leave one out")
            _note(f"{source}: {key} is called {renamed[key]} now")
            key = renamed[key]
        if key not in names:
            raise UserError(f"{source}: unknown key '{key}'{did_you_mean(str(key), names)}")
        if value is None:
            continue
        if not all(isinstance(part, _SCALARS) for part in (value if isinstance(value, list) else [value])):
            raise UserError(f"{source}: {key} must be text, a number, true, false, or a list of these")
        # One word, so that a value may start with a dash.
        words += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
    return words


def options_parser(config_type: Any, **options: Any) -> Any:
    """Return a parser whose options are the fields of a dataclass, in the groups of `option_groups`."""
    from transformers import HfArgumentParser  # slow to import: only when a command really parses

    groups = option_groups(config_type)

    class OptionsParser(Parser, HfArgumentParser):
        """A parser whose options are the fields of a dataclass."""

        def _parse_dataclass_field(self, parser: Any, field: Any) -> None:  # type: ignore[override]
            if field.type == int | Literal["auto"]:
                field = copy.copy(field)
                field.type = whole_number_or_auto
            HfArgumentParser._parse_dataclass_field(cast(Any, self.groups[groups[field.name]]), field)

        def _add_dataclass_arguments(self, dtype: Any) -> None:
            self.groups = {title: self.add_argument_group(title) for title in HELP_GROUPS}
            super()._add_dataclass_arguments(dtype)

    parser = OptionsParser(
        config_type,
        **{"usage": "%(prog)s [--config FILE] [--option value ...]", "description": config_type.__doc__, **options},
    )
    # `parse_config` reads the file itself; without a default the option leaves nothing behind.
    help = "YAML file of options; the command line wins"
    parser.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help=help)
    for action in parser._actions:
        if isinstance(action, argparse._StoreFalseAction):  # --no_NAME says what --NAME false says
            action.help = argparse.SUPPRESS
    return parser

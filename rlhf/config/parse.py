"""Configs from YAML files and command lines."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import yaml

from rlhf.base.cli import Parser
from rlhf.base.errors import UserError, did_you_mean
from rlhf.config.options import T


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; `UserError` when there is no such file or no mapping in it."""
    file = Path(path)
    if not file.is_file():
        siblings = [str(p) for p in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        raise UserError(f"no config file {file}{did_you_mean(str(file), siblings)}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold a mapping of options, one 'option: value' a line")
    return content


def build(config_type: type[T], values: dict[str, Any], source: str) -> T:
    """A config from a mapping: unknown and missing keys, and values of a wrong type, are `UserError`s that name `source`."""
    return parse_config(config_type, _as_arguments(config_type, values, source))


def parse_config(config_type: type[T], argv: list[str] | None = None) -> T:
    """Options from `--config FILE` (YAML) and `--option value`, the command line winning.

    Every value goes through the same argparse types, so `1e-4` in YAML is a float whatever YAML thinks of it.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    from_file: list[str] = []
    while "--config" in arguments:
        at = arguments.index("--config")
        if at + 1 == len(arguments):
            raise UserError("--config needs a file name")
        from_file += _as_arguments(config_type, read_yaml(arguments[at + 1]), arguments[at + 1])
        del arguments[at : at + 2]
    known = [f.name for f in dataclasses.fields(config_type)]  # type: ignore[arg-type]
    for argument in arguments:
        name = argument.split("=")[0].removeprefix("--").replace("-", "_")
        if argument.startswith("--") and name not in (*known, "help", *(f"no_{k}" for k in known)):
            raise UserError(f"unknown option --{name}{did_you_mean(name, known)}")
    config, *rest = _parser(config_type).parse_args_into_dataclasses(
        from_file + arguments, return_remaining_strings=True
    )
    if rest[-1]:
        raise UserError(
            f"unexpected '{rest[-1][0]}'; options are written --option value{did_you_mean(rest[-1][0], known)}"
        )
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{f.name} must be a finite number, got {value}")
    return config


def _as_arguments(config_type: type, values: dict[str, Any], source: str) -> list[str]:
    """A mapping as command-line words."""
    known = [f.name for f in dataclasses.fields(config_type)]
    words: list[str] = []
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{source}: unknown key '{key}'{did_you_mean(str(key), known)}")
        if value is None:
            continue
        # One word, so that a value may start with a dash.
        words += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
    return words


def _parser(config_type: Any) -> Any:
    from transformers import HfArgumentParser  # slow to import: only when a command really parses

    class OptionsParser(Parser, HfArgumentParser):
        """Options are the fields of a dataclass."""

    return OptionsParser(config_type, description=config_type.__doc__)

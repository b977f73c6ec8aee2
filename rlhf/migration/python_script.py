"""Configs in Python scripts: the calls of TRL's config classes, read as a tree and never run."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf.base.errors import UserError
from rlhf.base.text_files import read_text
from rlhf.migration.rules import Left

#: Our stage by the class whose call makes a config.
_CONFIGS = {"PPOConfig": "ppo", "PPOv2Config": "ppo", "RewardConfig": "reward", "SFTConfig": "sft"}
#: Classes whose arguments are options, too, with the names that these have on TRL's command lines.
_OTHERS: dict[str, dict[str, str]] = {
    "ModelConfig": {},
    "LoraConfig": {"r": "lora_r", "target_modules": "lora_target_modules"},
}
#: Names of a dictionary of sampling options, which TRL's old scripts pass to `generate`.
_SAMPLING = ("generation_kwargs", "gen_kwargs", "generation_config", "response_generation_kwargs")
_NOT_LITERAL = "is computed by the script, which is not run; write it by hand"


def read_python(file: Path) -> tuple[dict[str, Any], str, list[Left]]:
    """Return the options that a script gives to its config, our stage, and those that are no literals.

    Raises:
        UserError: it is no Python, or makes no config, or several of different kinds.
    """
    try:
        tree = ast.parse(read_text(file))
    except (SyntaxError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is no Python that can be read: {error}") from error
    constants = _constants(tree)
    calls = [(name, call) for call in ast.walk(tree) if isinstance(call, ast.Call) and (name := _class_of(call))]
    configs = [(name, call) for name, call in calls if name in _CONFIGS]
    if not configs:
        hint = "its options come from the command line: give the shell script with it"
        raise UserError(f"{file} makes no PPOConfig, RewardConfig or SFTConfig with values in it; {hint}")
    if len(configs) > 1:
        lines = ", ".join(f"{name} in line {call.lineno}" for name, call in configs)
        raise UserError(f"{file} makes several configs ({lines}); leave one of them in a copy")
    (name, config), values, left = configs[0], dict[str, Any](), list[Left]()
    for kind, call in [(name, config), *((n, c) for n, c in calls if n in _OTHERS)]:
        later = _set_later(tree, call)
        whole = ast.Call(
            call.func, call.args, [k for k in call.keywords if k.arg not in {s.arg for s in later}] + later
        )
        _add(whole, _OTHERS.get(kind, {}), constants, values, left)
    if any(kind == "LoraConfig" for kind, _ in calls):
        values.setdefault("use_peft", True)
    for name_of, mapping in constants.items():
        if name_of in _SAMPLING and isinstance(mapping, dict):
            values |= {key: value for key, value in mapping.items() if key not in values}
    return values, _CONFIGS[name], left


def _class_of(call: ast.Call) -> str | None:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)
    return name if name in _CONFIGS or name in _OTHERS else None


def _set_later(tree: ast.Module, call: ast.Call) -> list[ast.keyword]:
    """Return what a script sets on the config that a call makes, after it, as arguments of the call."""
    conditions = {
        id(node): block.test
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "__name__" not in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    named = {target.id for target, value in _assignments(tree) if value is call and isinstance(target, ast.Name)}
    return [
        ast.keyword(
            target.attr, ast.IfExp(test, value, ast.Constant(...)) if (test := conditions.get(id(value))) else value
        )
        for target, value in _assignments(tree)
        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id in named
    ]


def _assignments(tree: ast.Module) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Yield targets and values of assignments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    yield from zip(target.elts, node.value.elts, strict=False)
                else:
                    yield target, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            yield node.target, node.value


def _constants(tree: ast.Module) -> dict[str, Any]:
    """Return names that are bound once, to literals; of dictionaries, the entries that are literals."""
    bound = Counter(
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    )
    bound.update(node.arg for node in ast.walk(tree) if isinstance(node, ast.arg))
    values: dict[str, Any] = {}
    for target, value in _assignments(tree):
        if not isinstance(target, ast.Name) or bound[target.id] != 1:
            continue
        if isinstance(value, ast.Dict):
            values[target.id] = _literal_entries(value)
        else:
            with suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                values[target.id] = ast.literal_eval(value)
    return values


def _literal_entries(node: ast.Dict) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for key, value in zip(node.keys, node.values, strict=True):
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            entries[key.value] = value.value if isinstance(value, ast.Constant) else ast.unparse(value)
    return entries


def _add(
    call: ast.Call, renamed: dict[str, str], constants: dict[str, Any], values: dict[str, Any], left: list[Left]
) -> None:
    """Add a call's arguments: literals, and names of literals, to `values`, others to `left`."""
    for argument in call.args:
        left.append(Left(ast.unparse(argument)[:60], "", "stands without a name, so it is not read; write it by hand"))
    for keyword in call.keywords:
        source = ast.unparse(keyword.value)
        if keyword.arg is None:
            left.append(Left(f"**{source}", "", _NOT_LITERAL))
            continue
        name = renamed.get(keyword.arg, keyword.arg)
        try:
            values[name] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            if isinstance(keyword.value, ast.Name) and keyword.value.id in constants:
                values[name] = constants[keyword.value.id]
            elif isinstance(keyword.value, ast.Attribute) and source.startswith(("torch.", "TaskType.")):
                values[name] = keyword.value.attr
            else:
                left.append(Left(name, source, _NOT_LITERAL))

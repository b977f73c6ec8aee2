"""Conversion of another project's options into a config of ours, and its text."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rlhf.base.errors import UserError
from rlhf.base.redaction import redact
from rlhf.config import STAGE_CONFIGS, SFTConfig, build, yaml_value
from rlhf.migration.reading import ReadOptions
from rlhf.migration.rules import Left, Line, Project, RefusedValue, Stage, Values, slug, words

_REQUIRED = {
    "dataset": "prepared data: a file, a folder made by rlhf data, or a hub name",
    "model_name_or_path": "the base model: a folder or hub name",
    "policy": "sft/NAME: trained by rlhf sft, or imported (rlhf registry import FOLDER --as sft/NAME)",
    "reward": "reward/NAME, a classifier's folder or hub name, package.module:function or a URL",
}


@dataclass(kw_only=True)
class Converted:
    """A config of ours that was another project's."""

    project: Project
    stage: str
    lines: list[Line]
    """Options with values, in the order of the options."""
    missing: list[Line]
    """Options whose values are not in the file."""
    left: list[Left]
    problem: str = ""
    """What the stage would refuse."""


def convert(project: Project, stage: str, options: ReadOptions, name: str) -> Converted:
    """Return the config of our stage; each option of the file is in it, or left with the reason."""
    kind = project.stages[stage]
    own = {key: value for key, value in options.values.items() if value is not None}
    unread = {one.name: one for one in options.left if one.name in kind.rules}
    defaults = {key: value for key, value in kind.defaults.items() if key not in own and key not in unread}
    lines: dict[str, Line] = {}
    left, ranks = list(options.left), {key: rank for rank, key in enumerate(kind.rules)}
    for source in (own, defaults):
        for key in sorted(source, key=lambda key: ranks.get(key, len(ranks))):
            _take(project, stage, key, source[key], lines, left, default=source is defaults)
    missing = [
        Line(option, None, f"{key}: {one.value}, which {one.reason.partition(';')[0]}")
        for key, one in unread.items()
        for option in kind.rules[key].option.split(", ")
        if option not in lines
    ]
    uncertain = {line.option for line in missing}
    for line in _combined(kind, {**kind.defaults, **own, "processes": options.processes}):
        if line.value is None:
            missing.append(line)
        elif line.option not in uncertain:
            lines.setdefault(line.option, line)
    origins = " ".join(line.origin for line in (*lines.values(), *missing))
    left += [
        Left(key, value, "without effect beside the other options")
        for key, value in own.items()
        if key in kind.rules and kind.rules[key].convert is None and not re.search(rf"\b{key}\b", origins)
    ]
    lines.setdefault("name", Line("name", slug(own.get("output_dir", name)), "name of the file or of its output_dir"))
    order = [field.name for field in dataclasses.fields(STAGE_CONFIGS[stage])]  # as in --help
    missing += [Line(o, None, text) for o, text in _REQUIRED.items() if o in order and o not in lines]
    if stage == "sft":
        _fit_save_steps(lines)
    return Converted(
        project=project,
        stage=stage,
        lines=sorted(lines.values(), key=lambda line: order.index(line.option)),
        missing=list({line.option: line for line in missing}.values()),
        left=left,
        problem=_problem(stage, lines),
    )


def _combined(kind: Stage, values: Values) -> list[Line]:
    """Return the lines that are made of several options."""
    try:
        return list(kind.together(values))
    except (RefusedValue, ZeroDivisionError, ValueError, TypeError) as error:
        raise UserError(f"the sizes of this config cannot be converted: {error}") from error


def _take(
    project: Project, stage: str, key: str, value: Any, lines: dict[str, Line], left: list[Left], *, default: bool
) -> None:
    """Add what an option becomes to `lines`, or the reason why it becomes nothing to `left`."""
    rule = project.stages[stage].rules.get(key)
    if rule is None:
        left.append(Left(key, value, project.reason(key) or "has no counterpart"))
        return
    if rule.convert is None:
        return
    try:
        converted = rule.convert(value)
    except RefusedValue as reason:
        left.append(Left(key, value, str(reason)))
        return
    taken = lines.get(rule.option)
    if converted is not None and taken is None:
        name = converted[0] if isinstance(converted, list) and converted else converted
        policy = lines["policy"].value if "policy" in lines else "sft/NAME"
        note = rule.note.replace("FOLDER", _last(value)).replace("STAGE/NAME", str(name)).replace("POLICY", str(policy))
        origin = f"{key}: {_shown(value)}" + (f" ({project.name}'s default)" if default else "")
        lines[rule.option] = Line(rule.option, converted, origin + (f"; {note}" if note else ""))
    elif converted is None and not default:
        left.append(Left(key, value, rule.note or "is so here without an option"))
    elif taken is not None and not default and taken.value != converted:
        left.append(Left(key, value, f"{rule.option} comes from {taken.origin.split(':')[0]} already"))


def _last(value: Any) -> str:
    """Return a folder as a word of the shell; of several, the last."""
    return shlex.quote(words(value)[-1] if words(value) else "")


def _fit_save_steps(lines: dict[str, Line]) -> None:
    """Round `save_steps` of SFT to whole evaluations."""
    every = lines["eval_steps"].value if "eval_steps" in lines else SFTConfig.eval_steps
    steps = int(lines["save_steps"].value) if "save_steps" in lines else 0
    if steps % every:
        rounded = max(every, round(steps / every) * every)
        lines["save_steps"] = Line("save_steps", rounded, f"save_steps: {steps}, to a multiple of eval_steps")


def _problem(stage: str, lines: dict[str, Line]) -> str:
    """Return why the stage would refuse the config once what is missing is given; empty: it would not."""
    stand_ins = {"policy": "sft/x", "reward": "reward/x", "dataset": "x", "model_name_or_path": "x"}
    names = {field.name for field in dataclasses.fields(STAGE_CONFIGS[stage])}
    values = {name: value for name, value in stand_ins.items() if name in names}
    try:
        build(STAGE_CONFIGS[stage], values | {line.option: line.value for line in lines.values()}, "the config")
    except UserError as error:
        return str(error)
    return ""


# Text


def as_yaml(converted: Converted, source: str) -> str:
    """Return the config as YAML in which each line says where it is from."""
    parts = [f"# Made by rlhf migrate from {source}, a config of {converted.project.name}.", ""]
    texts = [f"{line.option}: {yaml_value(line.value)}" for line in converted.lines]
    width = min(40, max(map(len, texts), default=0))
    parts += [f"{text:{width}}  # {line.origin}" for text, line in zip(texts, converted.lines, strict=True)]
    if converted.missing:
        parts += ["", "# To be given:"]
        parts += [f"# {line.option}:  # {line.origin}" for line in converted.missing]
    paragraphs = list(left_lines(converted.left))
    parts += ["", "# Not taken over:"] if paragraphs else []
    parts += [line for text in paragraphs for line in _wrapped(text)]
    parts += ["", *_wrapped(f"To be mended: {converted.problem}")] if converted.problem else []
    return redact("\n".join(parts) + "\n")


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 116, initial_indent="# ", subsequent_indent="#     ")


def left_lines(left: list[Left]) -> Iterator[str]:
    """Yield a line for each reason, with the options that it is the reason of."""
    reasons: dict[str, list[str]] = {}
    for one in left:
        reasons.setdefault(one.reason, []).append(f"{one.name}: {_shown(one.value)}" if one.value != "" else one.name)
    for reason, names in reasons.items():
        yield f"{', '.join(names)} ({reason})"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."

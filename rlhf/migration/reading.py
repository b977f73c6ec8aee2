"""Configs of other projects, read from a shell script, YAML, JSON or Python; nothing in them is run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.base.errors import UserError, did_you_mean
from rlhf.base.json_files import read_object
from rlhf.base.text_files import read_text
from rlhf.config.parse import read_yaml
from rlhf.migration import llama_factory, swift, trl
from rlhf.migration.python_script import read_python
from rlhf.migration.rules import Left, Project

#: Projects by their names on the command line.
PROJECTS = {"trl": trl.NEW, "trl-0.11": trl.OLD, "llama-factory": llama_factory.PROJECT, "ms-swift": swift.PROJECT}
#: Options of launchers that say how many processes train: all of them, or those of a machine.
_PROCESSES = ("num_processes", "nproc_per_node", "NPROC_PER_NODE", "num_gpus")
#: Options of launchers that say how many machines there are.
_MACHINES = ("nnodes", "NNODES", "num_nodes")
#: Projects by parts of the names of scripts that they are started with.
_SCRIPTS = {
    "train_bash": llama_factory.PROJECT,
    "llamafactory": llama_factory.PROJECT,
    "src/train": llama_factory.PROJECT,
    "swift/cli/sft": swift.PROJECT,
    "swift/cli/rlhf": swift.PROJECT,
}
_STAGES = ("ppo", "reward", "sft")
_LAUNCHERS = {"accelerate", "torchrun", "deepspeed"}
_OF_LAUNCHER = "an option of the launcher; PPO on several GPUs: torchrun, docs/ppo.md"
_ONE_PROCESS = (
    "is not in the command: the sizes are those of one process; multiply rollout_batch_size and minibatch_size"
)
_UNSET_VARIABLE = "has a variable of the shell that the file does not set; write it by hand"
#: Words that end a command.
_ENDS = (">", ">>", "2>&1", "|", "&", "&&", ";", "<")
_OTHER_STAGES = "only SFT, reward models and PPO are here"


@dataclass(kw_only=True)
class ReadOptions:
    """Options as they stand in a file, with what else the file says about them."""

    values: dict[str, Any]
    stage: str | None = None
    """Our stage, where the file says it."""
    project: Project | None = None
    processes: int = 1
    left: list[Left] = field(default_factory=list)
    """What was read, and could not be understood."""


def read_config(
    file: Path, stage: str | None = None, project: str | None = None, own: Sequence[str] = ()
) -> tuple[Project, str, ReadOptions]:
    """Return the project and the stage that a file is a config of, and its options.

    Args:
        stage: our stage, if the user names it.
        project: key of `PROJECTS`, if the user names it.
        own: options of the user's own script, which are left out.

    Raises:
        UserError: there is no such file, or it is no config of these projects, or of several.
    """
    if not file.is_file():
        raise UserError(f"no file {file}{did_you_mean(file.name, [p.name for p in file.absolute().parent.glob('*')])}")
    if file.suffix == ".py":
        values, named, left = read_python(file)
        options = ReadOptions(
            values=values, stage=named, left=left, project=trl.OLD if "ppo_epochs" in values else None
        )
    elif file.suffix in (".yaml", ".yml"):
        options = ReadOptions(values=read_yaml(file))
    elif file.suffix == ".json":
        options = ReadOptions(values=read_object(file))
    else:
        options = _of_script(file)
    options.values = {str(name): value for name, value in options.values.items()}
    options.project = PROJECTS[project] if project else options.project
    for name in own:
        options.left.append(Left(name, options.values.pop(name, ""), "an option of your own script"))
    return _recognised(file, options, stage)


def _recognised(file: Path, options: ReadOptions, wanted: str | None) -> tuple[Project, str, ReadOptions]:
    values = options.values
    project, stage = options.project, wanted or options.stage
    if project in (None, llama_factory.PROJECT) and ("stage" in values or "finetuning_type" in values):
        project = llama_factory.PROJECT
        named = str(values.get("stage", "sft"))
        if named not in llama_factory.STAGES:
            raise UserError(f"{file}: stage {named} of LLaMA-Factory has no counterpart; {_OTHER_STAGES}")
        stage = wanted or llama_factory.STAGES[named]
    elif project in (None, swift.PROJECT) and ("rlhf_type" in values or project is swift.PROJECT):
        project = swift.PROJECT
        named = str(values.get("rlhf_type", "sft"))
        if named not in ("sft", "rm", "ppo"):
            raise UserError(f"{file}: rlhf_type {named} of ms-swift has no counterpart; {_OTHER_STAGES}")
        stage = wanted or {"rm": "reward"}.get(named, named)
    if project is None or stage is None:
        project, stage = _best_fit(file, values, project, stage)
    if stage not in project.stages:
        raise UserError(
            f"{file} is of {project.name}, which has no stage {stage} here; there is {', '.join(project.stages)}"
        )

    def is_option(name: str) -> bool:
        return name in project.stages[stage].rules or project.reason(name) is not None

    for name in [name for name, value in values.items() if value is True and name.startswith("no_")]:
        if not is_option(name) and is_option(
            name[3:]
        ):  # the parser of transformers takes --no_NAME for a switch that is on
            del values[name]
            values[name[3:]] = False
    unknown = [name for name in values if not is_option(name)]
    if unknown:
        names = [*project.stages[stage].rules, *(p for text in project.refused.values() for p in text.split())]
        raise UserError(
            f"{file}: {project.name} has no option {', '.join(unknown)}{did_you_mean(unknown[0], names)}; correct it, or, where "
            f"it is of a script of your own: --own {' '.join(unknown)}"
        )
    return project, stage, options


def _best_fit(file: Path, values: Mapping[str, Any], project: Project | None, stage: str | None) -> tuple[Project, str]:
    """Return the one project and stage of TRL, or ms-swift, that has rules for most of the options."""
    candidates = [
        (one, name)
        for one in ((project,) if project else (trl.NEW, trl.OLD, swift.PROJECT))
        for name in one.stages
        if stage in (None, name)
    ]
    matches = {(one.name, name): sum(v in one.stages[name].rules for v in values) for one, name in candidates}
    most = max(matches.values(), default=0)
    best = [(one, name) for one, name in candidates if matches[one.name, name] == most]
    if most == 0 or most < len(values) / 4:
        raise UserError(
            f"{file} is no config of TRL's PPO, SFT or reward trainers, of LLaMA-Factory or of ms-swift: "
            f"it has none of their options{': ' + ', '.join(map(str, list(values)[:5])) if values else ''}"
        )
    if len(best) > 1:
        kinds = " or ".join(f"{one.name} {name}" for one, name in best)
        stages, keys = {name for _, name in best}, [key for key, one in PROJECTS.items() if one in [p for p, _ in best]]
        fixes = [f"--stage {' or '.join(s for s in best[0][0].stages if s in stages)}"] if len(stages) > 1 else []
        fixes += [f"--project {' or '.join(keys)}"] if len(keys) > 1 else []
        raise UserError(f"{file} may be {kinds}: give {', '.join(fixes)}")
    return best[0]


# Shell scripts


def _of_script(file: Path) -> ReadOptions:
    """Return the options of the one training command in a shell script."""
    commands = [options for words in _commands(read_text(file)) if (options := _of_command(file, words))]
    if len(commands) != 1:
        raise UserError(
            f"{file} holds {len(commands) or 'no'} commands of TRL, LLaMA-Factory or ms-swift; "
            + ("leave one of them" if commands else "give a shell script with one, a YAML, JSON or Python file")
        )
    return commands[0]


def _commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command, with variables that the script sets replaced, behind those that it exports."""
    variables: dict[str, str] = {}
    exported: dict[str, None] = {}
    for line in _lines(re.sub(r"\\[ \t]*\r?\n", " ", text).splitlines()):
        line = _replaced(line, variables)
        if array := re.fullmatch(r"\s*(\w+)(\+?)=\((.*)\)\s*", line, re.DOTALL):
            before = variables.get(array[1], "") if array[2] else ""
            variables[array[1]] = f"{before} {shlex.join(shlex.split(array[3], comments=True))}".strip()
            continue
        words = shlex.split(line, comments=True)
        is_export, words = words[:1] == ["export"], [word for word in words if word != "export"]
        settings = [re.fullmatch(r"([A-Za-z_]\w*)(\+?)=(.*)", word, re.DOTALL) for word in words]
        if is_export or (words and all(settings)):
            for setting in filter(None, settings):
                variables[setting[1]] = (variables.get(setting[1], "") if setting[2] else "") + setting[3]
            exported |= dict.fromkeys(word.partition("=")[0] for word in words) if is_export else {}
        elif words:
            yield [*(f"{name}={variables[name]}" for name in exported if name in variables), *words]


def _lines(physical: list[str]) -> Iterator[str]:
    """Yield lines with all that a quotation or an array of words goes on to; one that never ends is left out."""
    start = 0
    while start < len(physical):
        for end in range(start + 1, len(physical) + 1):
            line = "\n".join(physical[start:end])
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # an open quotation
                continue
            if not (words and re.match(r"\w+\+?=\(", words[0]) and not words[-1].endswith(")")):
                yield line
                start = end
                break
        else:
            start += 1


def _replaced(line: str, variables: Mapping[str, str]) -> str:
    """Return a line with the values of variables and arrays, and of quotients and products of two numbers."""
    line = re.sub(r'"?\$\{(\w+)\[[@*]\]\}"?', lambda match: variables.get(match[1], match[0]), line)
    line = re.sub(
        r"\$\{(\w+)(?::?-([^}]*))?\}|\$(\w+)",
        lambda match: variables.get(match[1] or match[3], match[2] if match[2] is not None else match[0]),
        line,
    )

    def computed(match: re.Match[str]) -> str:
        first, second = int(match[1]), int(match[3])
        return str(first * second if "*" in match[2] else first // second if second else match[0])

    return re.sub(r"\$\((?:expr |\()\s*(\d+) ?(/|\\?\*) ?(\d+)\s*\)?\)", computed, line)


def _of_command(file: Path, words: list[str]) -> ReadOptions | None:
    """Return the options of a command line; None for commands that train nothing."""
    environment = [word for word in words if re.match(r"[A-Z][A-Z0-9_]*=", word)]
    words = [word for word in words if word not in environment]
    programs = {word.rsplit("/", 1)[-1] for word in words}
    place = _place_of_options(words, programs)
    if place is None:
        return None
    at, project, stage = place
    options = _of_words(file, words[at + 1 :])
    options.project, options.stage = project, stage
    launcher = _pairs([*words[:at], *(f"--{word}" for word in environment)])
    _take_launcher(options, launcher, is_launched=bool(programs & _LAUNCHERS), project=project)
    for name in [name for name, value in options.values.items() if "$" in str(value)]:
        options.left.append(Left(name, options.values.pop(name), _UNSET_VARIABLE))
    return options


def _place_of_options(words: list[str], programs: set[str]) -> tuple[int, Project | None, str | None] | None:
    """Return the word after which a command's options begin, its project and our stage as far as the command names them."""
    if "swift" in programs and {"rlhf", "sft"} & programs:
        return max(words.index(word) for word in words if word in ("rlhf", "sft")), swift.PROJECT, None
    if {"llamafactory-cli", "llamafactory"} & programs:
        return words.index("train") if "train" in words else len(words) - 1, llama_factory.PROJECT, None
    if "trl" in programs and programs & {*_STAGES}:
        at = next(i for i, word in enumerate(words) if word in _STAGES)
        return at, None, words[at]
    scripts = [i for i, word in enumerate(words) if word.endswith(".py") or words[i - 1 : i] == ["-m"]]
    if not scripts or not programs & {"python", "python3", *_LAUNCHERS}:
        return None
    at = scripts[0]
    project = next((project for part, project in _SCRIPTS.items() if part in words[at].replace(".", "/")), None)
    stages = (stage for stage in _STAGES if project is None and re.search(rf"(^|[/_.]){stage}", words[at]))
    return at, project, next(stages, None)


def _take_launcher(
    options: ReadOptions, launcher: Mapping[str, Any], *, is_launched: bool, project: Project | None
) -> None:
    """Read the number of processes from a launcher's options and the environment; name its other options."""
    counts = {name: int(str(value)) for name, value in launcher.items() if str(value).isdigit()}
    number = next((name for name in _PROCESSES if name in counts), None)
    visible = [device for device in str(launcher.get("CUDA_VISIBLE_DEVICES", "")).split(",") if device]
    if number is not None:
        machines = next((counts[name] for name in _MACHINES if name in counts), 1)
        options.processes = counts[number] * (1 if number == "num_processes" else machines)
    elif project is llama_factory.PROJECT and len(visible) > 1:
        options.processes = len(visible)  # its command starts a process for each
    elif is_launched or "FORCE_TORCHRUN" in launcher:
        options.left.append(Left("num_processes", "", _ONE_PROCESS))
    for name, value in launcher.items():
        if not name.isupper() and not (name in counts and name in (*_PROCESSES, *_MACHINES)):
            options.left.append(Left(name, value, _OF_LAUNCHER))


def _of_words(file: Path, words: list[str]) -> ReadOptions:
    """Return the options of a command, its config files included; what stands on the command line wins."""
    values: dict[str, Any] = {}
    lists = [word for word in words if re.fullmatch(r"\$[@*]|\$\{[@*].*\}|\$\{\w+\[[@*]\]\}", word)]
    left = [Left(word, "", "stands for options that are not in the file; write them by hand") for word in lists]
    rest = [word for word in words if word not in lists]
    if "--config" in rest[1:-1]:
        at = rest.index("--config", 1)
        rest = [*rest[at : at + 2], *rest[:at], *rest[at + 2 :]]
    while (rest and not (rest[0].startswith("--") or "=" in rest[0])) or rest[:1] == ["--config"]:
        name = rest.pop(0)
        if name in _ENDS or name.startswith((">", "2>")):
            break
        name = rest.pop(0) if name == "--config" and rest else name
        if not name.endswith((".yaml", ".yml", ".json")):
            left.append(Left(name, "", "stands without a name, so it is not read; write it by hand"))
            continue
        place = next((p for p in (Path(name), file.parent / name) if p.is_file()), None)
        if place is None:
            raise UserError(f"{file} names the config {name}, which is not there; give that file itself")
        values |= read_object(place) if place.suffix == ".json" else read_yaml(place)
    return ReadOptions(values=values | _pairs(rest), left=left)


def _pairs(words: list[str]) -> dict[str, Any]:
    """Return `--name value`, `--name=value`, `--name a b`, `--flag` and `name=value` as a mapping."""
    values: dict[str, Any] = {}
    name = ""
    for word in words:
        if word in _ENDS or word.startswith((">", "2>")):
            break
        if match := re.fullmatch(r"-{0,2}(?:\w+\.)?([A-Za-z_][\w-]*)=(.*)", word, re.DOTALL):
            name = match[1].replace("-", "_")
            values[name], name = match[2], ""
        elif word.startswith("--"):
            name = word.removeprefix("--").rpartition(".")[2].replace("-", "_")
            values[name] = True
        elif name:
            before = values[name]
            values[name] = word if before is True else [*(before if isinstance(before, list) else [before]), word]
    return values

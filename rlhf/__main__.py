"""The `rlhf` command: one word for each thing that can be run."""

from __future__ import annotations

import importlib
import sys
import textwrap
from typing import NamedTuple

from rlhf.base.errors import UserError, did_you_mean, run_command
from rlhf.base.functions import load_function
from rlhf.config import parse_config

#: Other words for verbs: the names of their modules.
ALIASES = {"data_prep": "data", "evaluation": "evaluate"}
#: Sections of the help text by the verb at which each begins.
SECTIONS = {
    "init": "start",
    "pipeline": "train",
    "card": "judge",
    "generate": "use",
    "registry": "keep and share",
    "doctor": "look at runs",
    "completion": "shell",
}


class Verb(NamedTuple):
    """One thing that can be run."""

    module: str
    """Its `main` reads the command line."""
    summary: str
    """Its line in the help text."""
    options: str = ""
    """`module:Class` of its options where `module` is slow to import, so that help and wrong options need not wait for it."""


VERBS = {
    "init": Verb("rlhf.init.__main__", "from your own data: a folder of configs for everything below"),
    "migrate": Verb("rlhf.migration.__main__", "turn a config of TRL, LLaMA-Factory or ms-swift into one of ours"),
    "pipeline": Verb("rlhf.pipeline", "data, SFT, reward model, PPO and report, in one go"),
    "data": Verb("rlhf.data_prep.__main__", "prepare demonstrations, comparisons and prompts"),
    "plan": Verb("rlhf.doctor.plan.__main__", "memory, time and disk of the stages before they run"),
    "pretrain": Verb(
        "rlhf.stages.pretrain",
        "before stage 1: a tokenizer and a model of your own, from plain text",
        "rlhf.config:PretrainConfig",
    ),
    "sft": Verb("rlhf.stages.sft", "stage 1: supervised fine-tuning", "rlhf.config:SFTConfig"),
    "reward": Verb("rlhf.stages.reward", "stage 2: train a reward model on rankings", "rlhf.config:RewardConfig"),
    "ppo": Verb("rlhf.stages.ppo", "stage 3: PPO against the reward model", "rlhf.config:PPOConfig"),
    "card": Verb(
        "rlhf.evaluation.card.report_card",
        "report card of a registered reward model on any comparisons",
        "rlhf.config:RewardCardConfig",
    ),
    "evaluate": Verb(
        "rlhf.evaluation.__main__",
        "compare policies: figures, win rates, best-of-n, frontier, tax",
        "rlhf.config:EvaluationConfig",
    ),
    "generate": Verb(
        "rlhf.generation.generate",
        "answers of any model to prompts, as text or JSON lines",
        "rlhf.generation.config:GenerateConfig",
    ),
    "chat": Verb(
        "rlhf.generation.chat", "talk to a model, or to several side by side", "rlhf.generation.config:ChatConfig"
    ),
    "registry": Verb(
        "rlhf.sharing.__main__", "registered artefacts: list, lineage, diff, export, push, reproduce, delete, ..."
    ),
    "doctor": Verb(
        "rlhf.doctor.__main__",
        "find problems of a run afterwards (rlhf doctor investigate: by experiment); before it: rlhf doctor preflight",
    ),
    "report": Verb("rlhf.report.__main__", "one HTML page about a run, or about several"),
    "tracking": Verb("rlhf.report.workspace", "save a W&B workspace that compares runs"),
    "completion": Verb("rlhf.completion", "script that completes verbs and options on TAB: bash, zsh, fish"),
}


FIRST_STEPS = (
    "first steps:",
    "  rlhf init FILE                        configs for your own data and machine",
    "  rlhf pipeline --config FOLDER         train with them",
    "  rlhf pipeline --config configs/demo   or the demo",
    "  rlhf VERB --help                      the options of a verb",
)


def usage() -> str:
    """Return the help text."""
    lines = ["usage: rlhf VERB [--config FILE] [--option value ...]"]
    for name, verb in VERBS.items():
        lines += ["", f"{SECTIONS[name]}:"] if name in SECTIONS else []
        lines += textwrap.wrap(f"  {name:10s} {verb.summary}", 79, subsequent_indent=" " * 13)
    return "\n".join([*lines, "", *FIRST_STEPS])


def dispatch() -> None:
    """Run the verb that the command line names."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return
    name, *options = words
    name = ALIASES.get(name, name)
    if name not in VERBS:
        raise UserError(f"no verb '{name}'{did_you_mean(name, VERBS)}; rlhf --help lists them")
    verb = VERBS[name]
    sys.argv = [f"rlhf {name}", *options]
    if verb.options:
        parse_config(load_function(verb.options), options)  # type: ignore[arg-type]
    run = importlib.import_module(verb.module).main
    if name == "completion":
        run({verb: about.summary for verb, about in VERBS.items()}, dispatch)
    else:
        run()


def main() -> None:
    """Console entry point."""
    run_command(dispatch)


if __name__ == "__main__":
    main()

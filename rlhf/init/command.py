"""`rlhf init`: from files to a folder of configs, with a word on everything that was seen."""

from __future__ import annotations

import re
import shlex
from argparse import Namespace
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from rlhf.base import screen
from rlhf.base.errors import UserError
from rlhf.base.functions import load_function
from rlhf.data_prep import Source
from rlhf.init.machine import BaseModel, Machine
from rlhf.init.sizes import Sizes
from rlhf.init.survey import Survey, survey
from rlhf.init.write import texts, write_folder
from rlhf.models.tokenization import load_tokenizer
from rlhf.registry import Registry

#: Reasons for rows that were left out which are shown.
SHOWN_REASONS = 4


def run(arguments: Namespace, name: str, folder: Path, scratch: Path) -> None:
    """Look at the data, write the folder, and print what was seen and the commands that come next.

    Args:
        arguments: of the command line.
        name: of the run.
        scratch: temporary folder.

    Raises:
        UserError: the data cannot be read, or train nothing; no folder is written.
    """
    sources = [Source(path=path, reader=arguments.reader, columns=arguments.columns) for path in arguments.files]
    registry, machine = Registry("registry"), Machine.look()
    policy = registry.get(arguments.policy, expect_stage="sft") if arguments.policy else None
    if re.fullmatch(r"[\w.]+:\w+", arguments.reward):
        load_function(arguments.reward)  # raises for a name that is not there
    model = BaseModel.look(policy.manifest.base_model if policy else arguments.model or machine.default_model)
    place = policy.path if policy else model.folder
    template = None if policy else arguments.chat_template or _template(model)
    sizes = Sizes(
        name=name,
        model=model,
        machine=machine,
        chat_template=template,
        policy=arguments.policy or f"sft/{name}",
        reward=arguments.reward or f"reward/{name}",
        tokenizer=str(place) if policy else model.name,
    )
    tokenizer = load_tokenizer(str(place), chat_template=template, untrained=policy is None) if place else None
    try:
        data = survey(sources, scratch, tokenizer, sizes.limits)
    except UserError as error:
        raise UserError(_with_advice(str(error))) from error
    stages, missing = plan_stages(data, policy=bool(policy), reward=bool(arguments.reward))
    write_folder(folder, texts(sizes, data, stages))
    console = screen.console(highlight=False, soft_wrap=True)
    for line in [*describe(data), *_describe_lengths(sizes, data), *missing, *_commands(sizes, folder, stages)]:
        console.print(line, markup=False)


def _with_advice(message: str) -> str:
    """Return an error of the preparation with what to change on this command line, where there is no data.yaml yet."""
    if "chat template" in message:
        return f"{message}; try another --chat_template, or a --model that has one for such rows"
    if "no reader knows" in message:
        return f"{message}; rlhf init takes --reader NAME and --columns prompt=THEIRS ..."
    few, reason, _ = message.partition(": too few groups of prompts")
    return f"{few}: some prompts are held out, so give at least two different ones" if reason else message


def _template(model: BaseModel) -> str | None:
    """Return `chatml` for models without a chat template, and for those whose own adds a system prompt to ChatML."""
    if model.folder is None:
        return "chatml" if "qwen2.5" in model.name.lower() or model.name.startswith("pypi:") else None
    own = AutoTokenizer.from_pretrained(model.folder, trust_remote_code=False).chat_template
    return "chatml" if own is None or ("<|im_start|>" in str(own) and "You are" in str(own)) else None


def plan_stages(data: Survey, *, policy: bool, reward: bool) -> tuple[list[str], list[str]]:
    """Return the stages that the data can feed, and in sentences what is missing for the others.

    Raises:
        UserError: they can feed none.
    """
    answers = policy or data.count("demonstrations") > 0
    judged = reward or data.count("comparisons") > 0
    both = answers and judged
    flags = {"sft": answers and not policy, "reward": both and not reward, "ppo": both, "evaluate": both}
    stages = [stage for stage, flag in flags.items() if flag]
    missing = []
    if not answers:
        missing.append(
            "no answers: SFT needs demonstrations. Add a file with answers (rlhf init FILE ANSWERS), or name a registered model "
            "with --policy sft/NAME"
        )
    if not judged:
        missing.append(
            "no comparisons: PPO needs a judge. Add a file with preferences (rlhf init FILE PREFERENCES), or name a reward with "
            "--reward package.module:function"
        )
    if not stages:
        raise UserError("; ".join(missing))
    return stages, missing


def describe(data: Survey) -> list[str]:
    """Return lines about the data."""
    lines = []
    for source in data.sources:
        rows = f"{source['rows']:,} rows" + (f", {source['malformed']:,} malformed" if source["malformed"] else "")
        lines.append(f"{source['name']}: {rows}, read as {source['reader']}: {source['evidence']}")
        if source["unused_columns"]:
            lines.append(f"  not used: {', '.join(source['unused_columns'])}")
    kinds = {"demonstrations": "SFT", "comparisons": "reward model", "prompts": "PPO"}
    for kind, stage in kinds.items():
        if data.count(kind):
            lines.append(
                f"  {kind} ({stage}): {data.count(kind):,} to train on, {data.count(kind, 'validation'):,} held out"
            )
    reasons = sorted(data.dropped.items(), key=lambda item: -item[1])
    lines += [f"  left out: {count:,} for: {reason}" for reason, count in reasons[:SHOWN_REASONS]]
    if len(reasons) > SHOWN_REASONS:
        lines.append(f"  left out: {sum(count for _, count in reasons[SHOWN_REASONS:]):,} for other reasons")
    if data.recipe.long_prompts != "drop":
        lines.append(f"  prompts are cut to their last {data.recipe.max_prompt_length} tokens: too few are shorter")
    if data.sampled:
        lines.append("  numbers are estimates from the first rows")
    return lines


def _describe_lengths(sizes: Sizes, data: Survey) -> list[str]:
    lengths = data.lengths
    spread = {"prompts": lengths.prompts, "answers": lengths.answers}
    parts = [f"{name} {np.median(of):.0f} (95%: {np.quantile(of, 0.95):.0f})" for name, of in spread.items() if len(of)]
    how = "estimated: the tokenizer is not on this machine" if lengths.estimated else f"tokenizer of {sizes.tokenizer}"
    return [
        f"tokens, median: {', '.join(parts)}; {how}",
        f"model: {sizes.model}",
        f"machine: {sizes.machine}",
    ]


def _commands(sizes: Sizes, folder: Path, stages: list[str]) -> list[str]:
    files = ", ".join(f"{name}.yaml" for name in ("data", *stages))
    lines = [f"wrote {folder}: {files}; change what you like", "", "next:"]
    commands = [["plan", "--config", str(folder)], ["pipeline", "--config", str(folder)]]
    if "ppo" in stages:
        commands.append(["chat", "--compare", sizes.policy, f"ppo/{sizes.name}"])
    return lines + [f"  rlhf {shlex.join(command)}" for command in commands]

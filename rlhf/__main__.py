"""The `rlhf` command: one word for each thing that can be run."""

from __future__ import annotations

import importlib
import sys

from rlhf.base.errors import UserError, did_you_mean, run_command

VERBS = {
    "pipeline": ("rlhf.pipeline", "data, SFT, reward model, PPO and report, in one go"),
    "data": ("rlhf.data_prep.__main__", "prepare demonstrations, comparisons and prompts"),
    "pretrain": ("rlhf.stages.pretrain", "before stage 1: a tokenizer and a model of your own, from plain text"),
    "sft": ("rlhf.stages.sft", "stage 1: supervised fine-tuning"),
    "reward": ("rlhf.stages.reward", "stage 2: train a reward model on rankings"),
    "ppo": ("rlhf.stages.ppo", "stage 3: PPO against the reward model"),
    "card": ("rlhf.evaluation.card.report_card", "report card of a registered reward model on any comparisons"),
    "evaluate": ("rlhf.evaluation.__main__", "what policies are worth: figures, win rates, best-of-n, frontier, tax"),
    "generate": ("rlhf.generation.generate", "answers of any model to prompts, as text or JSON lines"),
    "chat": ("rlhf.generation.chat", "talk to a model, or to several side by side"),
    "registry": (
        "rlhf.sharing.__main__",
        "what was trained: list, lineage, diff, export, push, reproduce, delete, ...",
    ),
    "doctor": ("rlhf.doctor.__main__", "what was wrong with a run; before it, what would be: rlhf doctor preflight"),
    "report": ("rlhf.report.__main__", "one HTML page about a run, or about several"),
    "tracking": ("rlhf.report.dashboard", "save a W&B workspace that compares runs"),
}


def usage() -> str:
    """The help text."""
    lines = [f"  {verb:10s} {what}" for verb, (_, what) in VERBS.items()]
    return "\n".join(
        [
            "usage: rlhf VERB [--config FILE] [--option value ...]",
            "",
            *lines,
            "",
            "rlhf VERB --help shows the options of a verb. First steps: rlhf pipeline --config configs/demo",
        ]
    )


def dispatch() -> None:
    """Runs the verb that the command line names."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return
    verb = words[0]
    if verb not in VERBS:
        raise UserError(f"no verb '{verb}'{did_you_mean(verb, VERBS)}; rlhf --help lists them")
    sys.argv = [f"rlhf {verb}", *words[1:]]
    importlib.import_module(VERBS[verb][0]).main()


def main() -> None:
    """Console entry point."""
    run_command(dispatch)


if __name__ == "__main__":
    main()

"""Options of the stages, each with its reason, from the data, the machine and the model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf.init.machine import BaseModel, Machine
from rlhf.init.survey import Lengths, Survey

#: Tokens through the model in each stage, in about an hour: a few CPU cores with 135M parameters, a GPU with 500M (of other
#: models in proportion). Fewer where the data end earlier.
CPU_TOKENS = {"sft": 3e5, "reward": 6e5, "ppo": 1.8e5}
GPU_TOKENS = {"sft": 2e7, "reward": 4e7, "ppo": 8e6}
CPU_PARAMETERS, GPU_PARAMETERS = 1.35e8, 5e8
#: Longest prompt, and longest answer that is sampled.
CPU_LONGEST, GPU_LONGEST = (384, 128), (1024, 512)
#: Share of the prompts and of the answers that the limits let through, unless the machine allows less.
COVERED_PROMPTS, COVERED_ANSWERS = 0.98, 0.9
FEWEST_UPDATES = 8
#: Passes of PPO over its prompts at most.
MOST_PASSES = 10

Entry = tuple[str, Any, str]
"""An option, its value, and why."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Machine, model and names from which the options of the stages are computed."""

    name: str
    model: BaseModel
    machine: Machine
    chat_template: str | None
    policy: str
    """`sft/NAME`, of this folder or another one's."""
    reward: str
    """What PPO is trained with, `reward/NAME` for the reward model of this folder."""
    tokenizer: str

    # Lengths

    @property
    def longest(self) -> tuple[int, int]:
        """Most tokens of a prompt and of a sampled answer, by the machine and the model's context."""
        prompt, answer = GPU_LONGEST if self.machine.gpu else CPU_LONGEST
        answer = min(answer, self.model.context // 4)
        return min(prompt, self.model.context - answer), answer

    def prompt_length(self, lengths: Lengths) -> int:
        """Return the longest prompt of the data."""
        return min(_covering(lengths.prompts, COVERED_PROMPTS), self.longest[0])

    def limits(self, lengths: Lengths) -> dict[str, Any]:
        """Return the options of the data's recipe about lengths."""
        options = {"tokenizer": self.tokenizer, "max_prompt_length": self.prompt_length(lengths)}
        return {**options, "chat_template": self.chat_template}

    def answer_length(self, data: Survey) -> int:
        """Return the longest answer that is sampled."""
        answers = data.lengths.answers
        return min(_covering(answers, COVERED_ANSWERS), self.longest[1]) if len(answers) else self.longest[1]

    def row_length(self, data: Survey) -> int:
        """Return the longest prompt with an answer."""
        answers = data.lengths.answers
        whole = self.prompt_length(data.lengths) + (_covering(answers, COVERED_PROMPTS) if len(answers) else 0)
        return min(whole, 2 * sum(self.longest), self.model.context)

    # Batches

    def fitting_rows(self, length: int, most: int) -> int:
        """Return the sequences of a forward pass that fit into memory: a power of two."""
        tokens = min(self.machine.memory * (340 if self.machine.gpu else 256), 32768 if self.machine.gpu else 4096)
        tokens *= min((GPU_PARAMETERS if self.machine.gpu else CPU_PARAMETERS) / self.model.parameters, 1)
        return int(min(2 ** math.floor(math.log2(max(tokens / length, 1))), most))

    def affordable(self, stage: str, tokens: float) -> int:
        """Return how many rows of so many tokens a stage has time for."""
        budget, usual = (GPU_TOKENS, GPU_PARAMETERS) if self.machine.gpu else (CPU_TOKENS, CPU_PARAMETERS)
        return int(budget[stage] * usual / self.model.parameters / tokens)

    def step_size(self, demo: float, published: float) -> tuple[float, str]:
        """Return a learning rate and its reason."""
        if self.model.small:
            return demo, "adapters of a small model, as in the demo: ten times full fine-tuning"
        return published, "usual for adapters of models of this size"


# Stages


def sft(sizes: Sizes, data: Survey) -> list[Entry]:
    """Return the options of `sft.yaml`."""
    rows, length = data.count("demonstrations"), sizes.row_length(data)
    mean = float(np.mean(data.lengths.prompts) + np.mean(data.lengths.answers))
    batch = 64 if rows >= 2000 else 32 if rows >= 500 else 8
    updates, reason = _updates(rows, 1 if rows >= 5000 else 2, sizes.affordable("sft", mean), batch)
    each = sizes.fitting_rows(length, batch)
    rate, why = sizes.step_size(1e-3, 2e-4)
    template = [("chat_template", sizes.chat_template, "how turns become text; without this line: the model's own")]
    return [
        ("model_name_or_path", sizes.model.name, f"for this machine: {sizes.machine}"),
        *(template if sizes.chat_template else []),
        ("dataset", f"outputs/{sizes.name}/data", "made from data.yaml"),
        ("max_length", length, "tokens of prompt and answer; longer demonstrations are left out and counted"),
        ("max_steps", updates, f"updates: {rows:,} demonstrations, {reason}"),
        ("per_device_train_batch_size", each, "demonstrations a forward pass: what fits into memory"),
        ("gradient_accumulation_steps", batch // each, f"forward passes an update, which sees {batch} demonstrations"),
        *_evaluation(sizes, data, updates, "demonstrations", length),
        ("learning_rate", rate, why),
        ("warmup_steps", _warmup(updates), "a tenth of the updates"),
        *_memory(sizes),
    ]


def reward(sizes: Sizes, data: Survey) -> list[Entry]:
    """Return the options of `reward.yaml`."""
    rows, length = data.count("comparisons"), sizes.row_length(data)
    mean = float(np.mean(data.lengths.prompts) + np.mean(data.lengths.answers)) * data.responses
    pairs = 64 if rows >= 20_000 else 16 if rows >= 1000 else 8
    batch = _power_of_two(pairs * 2 / data.responses)
    updates, reason = _updates(rows, 1, sizes.affordable("reward", mean), batch)
    each = sizes.fitting_rows(length * math.ceil(data.responses), batch)
    rate, why = sizes.step_size(1e-3, 1e-4)
    difference = _rounded_down(data.rating_difference)
    return [
        ("policy", sizes.policy, "it starts from the SFT model, with a head for the score"),
        ("dataset", f"outputs/{sizes.name}/data", "made from data.yaml"),
        ("max_length", length, "tokens of prompt and answer; comparisons with longer ones are left out and counted"),
        ("max_steps", updates, f"updates: {rows:,} comparisons, {reason}; after the first pass reward models overfit"),
        ("per_device_train_batch_size", each, f"comparisons a forward pass, of {data.responses:.3g} answers each"),
        ("gradient_accumulation_steps", batch // each, f"forward passes an update, which sees {batch} comparisons"),
        *_evaluation(sizes, data, updates, "comparisons", length),
        ("learning_rate", rate, why),
        ("warmup_steps", _warmup(updates), "a tenth of the updates"),
        (
            "eval_rating_difference",
            difference,
            "accuracy is measured on pairs this far apart, at least three in four of the held-out",
        ),
        ("response_length", sizes.answer_length(data), "as in ppo.yaml: the report card scores sampled answers, too"),
        *([] if sizes.machine.gpu else _CPU_CARD),
        *_memory(sizes),
    ]


_CPU_CARD: list[Entry] = [
    ("card_policy_samples", 32, "sampled answers of the report card; the default takes a GPU seconds, a CPU minutes"),
    ("card_likelihood_responses", 64, "answers of which the likelihood is compared as a score"),
    ("card_probe_answers", 16, "answers that each probe for hacks changes"),
]


def ppo(sizes: Sizes, data: Survey) -> list[Entry]:
    """Return the options of `ppo.yaml`."""
    prompts = data.count("prompts")
    prompt, answer = sizes.prompt_length(data.lengths), sizes.answer_length(data)
    episodes = min(sizes.affordable("ppo", float(np.mean(data.lengths.prompts)) + answer), MOST_PASSES * prompts)
    largest = 256 if episodes >= 20_000 else 128 if sizes.machine.gpu else 64
    rollout = min(largest, max(16, _power_of_two(episodes / 16)))
    updates = max(FEWEST_UPDATES, episodes // rollout)
    rate, why = sizes.step_size(5e-4, 5e-5)
    return [
        ("policy", sizes.policy, "the start, and the reference that the KL penalty holds it near"),
        ("reward", sizes.reward, "what scores the answers"),
        ("dataset", f"outputs/{sizes.name}/data", f"made from data.yaml; prompts to train on: {prompts:,}"),
        ("total_episodes", updates * rollout, f"sampled answers: {updates} rollouts"),
        ("rollout_batch_size", rollout, "answers sampled with one state of the policy"),
        ("minibatch_size", rollout // 2, "two optimiser updates a rollout"),
        (
            "microbatch_size",
            sizes.fitting_rows(prompt + answer, rollout // 2),
            "answers a forward pass: what fits into memory",
        ),
        ("max_prompt_length", prompt, "tokens, as in data.yaml"),
        (
            "response_length",
            answer,
            f"tokens; {_share(data.lengths.answers, answer)} of the data's answers are no longer",
        ),
        ("learning_rate", rate, why),
        ("warmup_steps", _warmup(updates * 2), "a tenth of the optimiser updates"),
        ("kl_coef", 0.05, "price of a nat away from the SFT model; higher keeps closer to it"),
        ("num_eval_samples", 256 if sizes.machine.gpu else 96, "answers to held-out prompts before and after"),
        ("save_steps", max(1, updates // 4), "rollouts between checkpoints"),
        *_memory(sizes),
    ]


def evaluate(sizes: Sizes, data: Survey) -> list[Entry]:
    """Return the options of `evaluate.yaml`, with which the pipeline compares the policy with the SFT model."""
    prompt, answer = sizes.prompt_length(data.lengths), sizes.answer_length(data)
    gpu = bool(sizes.machine.gpu)
    return [
        ("models", [sizes.policy, f"ppo/{sizes.name}"], "before and after; more may follow"),
        ("dataset", f"outputs/{sizes.name}/data", "its held-out prompts"),
        ("output_dir", f"outputs/{sizes.name}/evaluation", "evaluation.json and the answers"),
        ("num_prompts", 128 if gpu else 48, "the first of the held-out ones"),
        ("samples_per_prompt", 4 if gpu else 2, "answers of each model to a prompt"),
        ("best_of", 16 if gpu else 0, "the best of so many SFT answers: what PPO should beat; 0 leaves it out"),
        ("max_prompt_length", prompt, "as in ppo.yaml"),
        ("response_length", answer, "as in ppo.yaml"),
        ("per_device_eval_batch_size", sizes.fitting_rows(prompt + answer, 32), "answers a forward pass"),
    ]


FILES: dict[str, Callable[[Sizes, Survey], list[Entry]]] = {
    "sft": sft,
    "reward": reward,
    "ppo": ppo,
    "evaluate": evaluate,
}


# Numbers


def _updates(rows: int, passes: int, affordable: int, batch: int) -> tuple[int, str]:
    """Return the number of updates, and in words which rows they take."""
    updates = max(FEWEST_UPDATES, round(min(rows * passes, affordable) / batch))
    seen = updates * batch / rows
    part = f"{seen:.0%} of them, for the time it takes" if seen < 0.95 else f"each {seen:.2g} times"
    if updates == FEWEST_UPDATES and seen > passes + 0.05:
        return updates, f"{part}, as fewer updates teach nothing"
    return updates, {1.0: "each once", 2.0: "each twice"}.get(round(seen, 1), part)


def _evaluation(sizes: Sizes, data: Survey, updates: int, kind: str, length: int) -> list[Entry]:
    held_out = data.count(kind, "validation")
    most = min(held_out, 512 if sizes.machine.gpu else 96)
    return [
        ("eval_steps", max(1, updates // 4), "updates between evaluations on held-out data"),
        ("save_steps", max(1, updates // 4), "updates between checkpoints, from which --resume true goes on"),
        ("max_eval_samples", most, f"of {held_out:,} held-out {kind}, while it trains"),
        ("per_device_eval_batch_size", sizes.fitting_rows(length, 32), "sequences a forward pass without gradients"),
    ]


def _memory(sizes: Sizes) -> list[Entry]:
    if sizes.machine.gpu and sizes.model.parameters > 1e9:
        return [("gradient_checkpointing", True, "recomputes activations: a third more time, much less memory")]
    return []


def _share(lengths: np.ndarray, limit: int) -> str:
    return f"{np.mean(lengths <= limit):.0%}" if len(lengths) else "all"


def _warmup(updates: int) -> int:
    return min(50, max(1, updates // 10))


def _power_of_two(number: float) -> int:
    """Return the nearest one."""
    return int(2 ** round(math.log2(max(number, 1))))


def _covering(lengths: np.ndarray, share: float) -> int:
    """Return a multiple of 8 that is at least as long as this share of the lengths; all, where they are few."""
    longest = np.quantile(lengths, share) if len(lengths) > 100 else lengths.max()
    return 8 * math.ceil(longest / 8)


def _rounded_down(number: float) -> float:
    """Return a number with two digits that is no larger."""
    if number <= 0:
        return 0.0
    unit = 10 ** (math.floor(math.log10(number)) - 1)
    return float(f"{math.floor(number / unit + 1e-9) * unit:.2g}")

"""Experiments with the models of SFT and reward runs: what was learned, and from what."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf.base.errors import UserError
from rlhf.base.intervals import Array
from rlhf.base.json_files import read_object_or_none
from rlhf.config import RewardConfig, SFTConfig
from rlhf.data_prep.load import load_rows
from rlhf.doctor.statements import Statement
from rlhf.evaluation.card.evidence import first_rankings
from rlhf.evaluation.card.judged import Judged, judge_rows, rated_pairs
from rlhf.models.base import context_length, load_base, load_policy
from rlhf.models.compute import Compute
from rlhf.models.likelihood import mean_logprobs
from rlhf.models.tokenization import encode_prompt, load_tokenizer, stop_token_ids
from rlhf.registry import MANIFEST, Artifact, Registry
from rlhf.reward.rankings import encode_rankings
from rlhf.reward.scorer import open_scorer
from rlhf.stages.data import encode_demonstrations
from rlhf.stages.investigate.experiment import Interval, confirmed, experiment, mean, ruled_out, undecided
from rlhf.stages.investigate.subject import recorded_config

#: Demonstrations and responses that are looked at, of training and held-out rows each.
ROWS, RESPONSES = 64, 256
#: Probability of the stop token at the end of answers, below which a model does not stop.
STOPS = 0.2


def registered(folder: Path, registry: str) -> Artifact:
    """Return the artefact that a run registered.

    Raises:
        UserError: it ended before.
    """
    manifest = read_object_or_none(folder / MANIFEST)
    if manifest is None:
        raise UserError(f"the run in {folder} registered no model, and experiments need one")
    return Registry(registry).get(f"{manifest['stage']}/{manifest['name']}@{manifest['version']}")


class SFTSubject:
    """An SFT run under experiment: the model that it registered, beside its base."""

    updates = 0

    def __init__(self, folder: Path, registry: str | None) -> None:
        self.config, _ = recorded_config(folder, SFTConfig, registry)
        self.artifact = registered(folder, self.config.registry)
        self.compute = Compute.choose(self.config)
        self.tokenizer = load_tokenizer(str(self.artifact.path))

    def __str__(self) -> str:
        return f"{self.artifact.reference} and its base on {ROWS} training and {ROWS} held-out demonstrations"

    @cached_property
    def rows(self) -> dict[str, list[tuple[list[int], list[int]]]]:
        """(prompt, answer) token ids by split."""
        return {
            split: encode_demonstrations(
                load_rows(self.config.dataset, split, kind="demonstrations"),
                self.tokenizer,
                self.config.max_length,
                ROWS,
            )[0]
            for split in ("train", "validation")
        }

    @cached_property
    def losses(self) -> dict[str, dict[str, tuple[Array, Array]]]:
        """By model (`base`, `tuned`) and split: (n,) nats a token of answers, and (n,) probabilities of their stop tokens."""
        m, c = self.artifact.manifest, self.config
        result = {}
        for name in ("base", "tuned"):
            if name == "tuned":
                model = load_policy(self.artifact, c, self.compute)
            else:
                model = load_base(m.base_model, c, self.compute, revision=m.base_model_revision)
            result[name] = {split: self._measure(model, pairs) for split, pairs in self.rows.items()}
            del model
        return result

    def _measure(self, model: Any, pairs: list[tuple[list[int], list[int]]]) -> tuple[Array, Array]:
        """Return the loss of answers, and the probability of the token that ends each, under a model."""

        def nats(starts: list[int]) -> Array:
            options: dict[str, Any] = {
                "pad_token_id": int(self.tokenizer.pad_token_id),
                "compute": self.compute,
                "batch_size": 16,
            }
            rows = [prompt + answer for prompt, answer in pairs]
            return -mean_logprobs(model, rows, starts, torch.arange(len(rows)), **options).double().numpy()

        prompts = [len(prompt) for prompt, _ in pairs]
        return nats(prompts), np.exp(-nats([len(prompt) + len(answer) - 1 for prompt, answer in pairs]))


@experiment("sft", needs=("losses",), settles=(
    "loss_flat", "loss_rising", "overfitted", "learning_rate_zero", "no_gradient",
))  # fmt: skip
def demonstrations_learned(subject: SFTSubject) -> Iterator[Statement]:
    """Does the model give its demonstrations, and held-out ones, more probability than its base?"""
    changes, lines = {}, []
    for split, name in (("train", "training"), ("validation", "held-out")):
        base, tuned = (subject.losses[model][split][0] for model in ("base", "tuned"))
        changes[split] = mean(tuned - base, np.arange(len(base)))
        lines.append(f"{name} demonstrations {base.mean():.2f} nats a token by the base, changed by {changes[split]}")
    measured, inside, outside = "; ".join(lines), changes["train"], changes["validation"]
    if inside.high < 0 and outside.high < 0:
        yield ruled_out("demonstrations_learned", f"{measured}: learned, and not by heart alone")
    elif inside.high < 0 and outside.low > 0:
        yield confirmed(
            "demonstrations_learned", measured, cause="demonstrations were learned by heart: held-out ones are less likely now",
            action="fewer epochs or a lower learning_rate, or more demonstrations", explains=("loss_rising", "overfitted"),
        )  # fmt: skip
    elif inside.low > 0:
        yield confirmed(
            "demonstrations_learned", measured, cause="training made its own demonstrations less likely: it diverged",
            action="lower learning_rate by ten, raise warmup_steps", explains=("loss_rising", "batch_spike", "stop_learned"),
        )  # fmt: skip
    elif max(abs(inside.low), abs(inside.high)) < 0.02:
        yield confirmed(
            "demonstrations_learned", measured, cause="training changed next to nothing",
            action="raise learning_rate; see that the adapter gets a gradient",
            explains=("loss_flat", "learning_rate_zero", "no_gradient", "stop_learned"),
        )  # fmt: skip
    else:
        yield undecided("demonstrations_learned", measured)


@experiment("sft", needs=("losses",), settles=("loss_flat", "cut_off"))
def stop_learned(subject: SFTSubject) -> Iterator[Statement]:
    """Does the model stop where demonstrations end?"""
    pairs = subject.rows["validation"]
    ending = np.mean([answer[-1] in stop_token_ids(subject.tokenizer) for _, answer in pairs])
    base, tuned = (float(subject.losses[model]["validation"][1].mean()) for model in ("base", "tuned"))
    measured = (
        f"where held-out demonstrations end, the model's probability of their last token is {tuned:.2f}, the base's {base:.2f}; "
        f"{ending:.0%} of them end in the stop token"
    )
    if tuned >= STOPS:
        yield ruled_out("stop_learned", f"{measured}: it learned to stop")
    else:
        yield confirmed(
            "stop_learned", measured,
            cause="the model does not stop where demonstrations end: its loss leaves out the stop token, or answers end anywhere",
            action="see that labels hold the stop token of every answer, and that answers are whole", explains=("cut_off",),
        )  # fmt: skip


class RewardSubject:
    """A reward run under experiment: the model that it registered, on training and held-out rankings."""

    updates = 0

    def __init__(self, folder: Path, registry: str | None) -> None:
        self.config, _ = recorded_config(folder, RewardConfig, registry)
        self.artifact = registered(folder, self.config.registry)
        c, compute = self.config, Compute.choose(self.config)
        self.scorer = open_scorer(self.artifact, Registry(c.registry), c, compute, c.per_device_eval_batch_size)
        self.limit = min(c.max_length, context_length(self.scorer.model))  # type: ignore[arg-type]
        self.rankings = {split: self._rankings(split) for split in ("train", "validation")}

    def __str__(self) -> str:
        return f"{self.artifact.reference} on rankings of up to {RESPONSES} training and {RESPONSES} held-out responses"

    def _rankings(self, split: str) -> tuple[list[dict[str, Any]], Judged]:
        data = load_rows(self.config.dataset, split, kind="comparisons")
        rows = encode_rankings(data, self.scorer.tokenizer, self.limit).rows
        count = len(first_rankings(rows, RESPONSES))
        chosen = rows.select(range(count))
        return chosen.to_list(), judge_rows(chosen, None, ())

    def accuracy(self, split: str, scores: Array) -> Interval:
        """Return the share of pairs that scores (M,) order as people do."""
        judged = self.rankings[split][1]
        pairs = rated_pairs(judged.ratings, judged, self.config.min_rating_difference)
        return mean(pairs.correct(scores), pairs.prompt)

    @cached_property
    def scores(self) -> dict[str, Array]:
        """(M,) scores by split."""
        return {
            split: self.scorer([ids for row in rows for ids in row["input_ids"]]).double().numpy()
            for split, (rows, _) in self.rankings.items()
        }


@experiment(
    "reward",
    needs=("scores",),
    settles=("accuracy_below_chance", "accuracy_at_chance", "loss_rising", "learning_rate_zero"),
)
def pairs_learned(subject: RewardSubject) -> Iterator[Statement]:
    """Does the model order its training pairs, and held-out ones, as people do?"""
    inside, outside = (subject.accuracy(split, subject.scores[split]) for split in ("train", "validation"))
    length = subject.accuracy("validation", subject.rankings["validation"][1].lengths.astype(float))
    measured = f"right order of training pairs {_share(inside)}, of held-out pairs {_share(outside)}; by length {_share(length)}"
    if outside.low > 0.5:
        yield ruled_out("pairs_learned", f"{measured}: labels and signs are in order")
    elif inside.low > 0.5 and outside.high < 0.5:
        yield confirmed(
            "pairs_learned", measured, cause="training and held-out labels say the opposite: one split has its labels swapped",
            action="compare a few pairs of both splits by eye", explains=("accuracy_below_chance", "accuracy_at_chance"),
        )  # fmt: skip
    elif outside.high < 0.5:
        yield confirmed(
            "pairs_learned", measured, cause="the model prefers what people like least, in training too: its sign is flipped",
            action="look at the sign of the ranking loss and at how ratings become pairs", explains=("accuracy_below_chance",),
        )  # fmt: skip
    elif inside.low > max(0.6, outside.high):
        yield confirmed(
            "pairs_learned", measured, cause="training pairs were learned by heart: labels that are noise, or too few rankings",
            action="look at agreement between raters; take more rankings or one epoch", explains=("accuracy_at_chance",),
        )  # fmt: skip
    elif inside.high < 0.65:
        yield confirmed(
            "pairs_learned", measured, cause="nothing was learned from the training pairs either: labels are noise, or training "
            "did not move the model",
            action="look at pairs by eye, at learning_rate, and at the token whose score is read",
            explains=("accuracy_at_chance", "loss_rising", "learning_rate_zero"),
        )  # fmt: skip
    else:
        yield undecided("pairs_learned", measured)


@experiment("reward", needs=("scores",), passes=0.5, settles=("accuracy_at_chance",))
def prompt_read(subject: RewardSubject) -> Iterator[Statement]:
    """Does the model need the prompt, or does it judge answers alone?"""
    rows, _ = subject.rankings["validation"]
    prompts = [encode_prompt(subject.scorer.tokenizer, row["prompt"]) for row in rows]
    others = [*prompts[1:], prompts[0]]
    swapped = [
        other + ids[len(own) :]
        for row, own, other in zip(rows, prompts, others, strict=True)
        for ids in row["input_ids"]
    ]
    swapped = [ids[-subject.limit :] for ids in swapped]
    plain = subject.accuracy("validation", subject.scores["validation"])
    without = subject.accuracy("validation", subject.scorer(swapped).double().numpy())
    yield ruled_out(
        "prompt_read", f"right order of held-out pairs {_share(plain)}, below other prompts {_share(without)}: as much as the "
        "two differ is read from the prompt"
    )  # fmt: skip


def _share(figure: Interval) -> str:
    return f"{figure.value:.0%} ({figure.low:.0%} to {figure.high:.0%})"

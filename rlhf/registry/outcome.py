"""The figures of an artefact's manifest that decide about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rlhf.base.json_files import finite_number, section


class Figure(NamedTuple):
    """A figure as text, before and after training."""

    label: str
    before: str
    after: str
    """Empty where there is no such figure."""


#: Figures of each stage: label, name in the manifest before training (if any) and after it, number format.
_FIGURES: dict[str, tuple[tuple[str, str, str, str], ...]] = {
    "pretrain": (
        ("held-out bits a character", "", "eval_bits_per_character", ".3f"),
        ("held-out perplexity", "", "eval_perplexity", ".1f"),
    ),
    "sft": (
        ("held-out loss, nats a token", "eval_loss_before", "eval_loss_after", ".3f"),
        ("held-out loss, nats a character", "eval_loss_per_character_before", "eval_loss_per_character_after", ".3f"),
        ("reward model's score", "eval_score_before", "eval_score_after", ".3f"),
    ),
    "reward": (
        ("held-out accuracy", "", "accuracy", ".1%"),
        ("  raters it never saw", "", "accuracy_held_out_raters", ".1%"),
        ("  people, on those raters (ceiling)", "", "human_ceiling", ".1%"),
        ("  prompts it never saw", "", "accuracy_held_out_prompts", ".1%"),
        ("  independent scorer", "", "gold_accuracy", ".1%"),
    ),
    "ppo": (
        ("score", "score_before", "score_after", ".2f"),
        ("share with a score above 0", "reward_positive_before", "reward_positive_after", ".1%"),
        ("positive by the independent scorer", "gold_positive_before", "gold_positive_after", ".1%"),
        ("negative by the independent scorer", "gold_negative_before", "gold_negative_after", ".1%"),
        ("KL to the SFT policy, nats a response", "", "kl", ".2f"),
        ("tokens a response", "length_before", "length_after", ".1f"),
        ("responses that stop by themselves", "stop_rate_before", "stop_rate_after", ".1%"),
        ("distinct-2", "distinct2_before", "distinct2_after", ".3f"),
    ),
}


def outcome(stage: str, metrics: Mapping[str, Any]) -> list[Figure]:
    """Return the figures of a stage that its manifest has, before and after training."""

    def text(name: str, form: str) -> str:
        value = finite_number(metrics.get(name))
        return "" if value is None else format(value, form)

    rows = [Figure(label, text(old, form), text(new, form)) for label, old, new, form in _FIGURES.get(stage, ())]
    return [row for row in rows if row.after]


def deciding_figure(stage: str, metrics: Mapping[str, Any]) -> str:
    """Return the figure that decides about an artefact, beside what it is to be compared with."""
    figures = {figure.label.strip(): figure for figure in outcome(stage, metrics)}
    if stage == "reward":
        accuracy, ceiling = figures.get("held-out accuracy"), figures.get("people, on those raters (ceiling)")
        limit = f", ceiling {ceiling.after}" if ceiling else ""
        return f"accuracy {accuracy.after}{limit}" if accuracy else ""
    first = next(iter(figures.values()), None)
    if first is None:
        return ""
    change, kl = first.before and f"{first.before} -> ", figures.get("KL to the SFT policy, nats a response")
    return f"{first.label.split(',')[0]} {change}{first.after}" + (f", KL {kl.after}" if kl else "")


def overlap_lines(stage: str, data: Mapping[str, Any], of: str = "") -> list[str]:
    """Return a line for each model that was trained on held-out rows, from the `data` of a manifest.

    Earlier versions counted prompts in every stage; prompts that new answers share say nothing about figures of answers.

    Args:
        of: words after "held-out rows".
    """
    overlap = section(data, "overlap")
    if overlap.get("by") is None and stage in ("sft", "reward"):
        return []
    what = (f"rows{of} have an answer", "") if overlap.get("by") == "answers" else (f"prompts{of}", " are among those")
    return [
        f"{count} of the {overlap.get('held_out')} held-out {''.join(what)} that "
        f"{'the stage' if name == 'its own data' else name} was trained on"
        for name, count in section(overlap, "in_training").items()
        if count
    ]

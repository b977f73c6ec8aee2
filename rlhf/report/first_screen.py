"""The first screen of a run's page: task, verdict, four figures, and three prompts with the answers before and after.

Every sentence is made from the run's files. A figure that is missing makes no sentence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.base.json_files import entries, finite_number, section
from rlhf.doctor.diagnosis import Diagnosis
from rlhf.report.figures import BEFORE_AND_AFTER, MINUS, NO_FIGURE, number, percent, percent_interval
from rlhf.report.run_folder import TITLES, RunFolder, judge_of, mappings, overlaps, series
from rlhf.report.samples import cut, gain
from rlhf.run.progress import in_words

ISOLATE, POP = "\N{FIRST STRONG ISOLATE}", "\N{POP DIRECTIONAL ISOLATE}"
"""They keep a prompt that runs from right to left from turning the sentence around it."""
NOTABLE_LENGTH, NOTABLE_LOSS = 0.1, 0.02
"""Relative change of the answers' length, and loss of variety or of answers that end, that count as a cost."""


class Tile(NamedTuple):
    """A figure with its value before, its change, and its meaning."""

    label: str
    value: str
    before: str = ""
    change: str = ""
    verdict: str = ""
    """`good`, `bad` or nothing, where no direction is better."""
    note: str = ""


@dataclass
class Verdict:
    """The outcome in a sentence, with what speaks for it and against it."""

    title: str
    level: str = "mixed"
    """`good`, `mixed`, `bad` or `open`."""
    quality: str = "Better"
    """What a good outcome is called."""
    better: list[str] = field(default_factory=list)
    cost: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)

    @property
    def badge(self) -> str:
        """The outcome in a word or two."""
        words = {"good": self.quality, "mixed": f"{self.quality}, with doubts", "bad": f"Not {self.quality.lower()}"}
        return words.get(self.level, "Open")


# The task


def task(run: RunFolder) -> str:
    """Return what the run's last stage trains the base model for, from its data and options."""
    stage = run.stages[-1] if run.stages else lead_stage(run)
    prompt = next((text for row in [*run.samples, *_card_examples(run)] if (text := _shown_prompt(row))), "")
    such = f"prompts such as “{ISOLATE}{prompt}{POP}”" if prompt else "prompts"
    if stage == "ppo":
        return f"Answer {such}, so that {_judged_by(run)} likes the answers."
    if stage == "reward":
        return f"Score answers to {such} as people would."
    return "Answer as in the demonstrations." if stage == "sft" else "Continue text."


def data_name(run: RunFolder, card: Mapping[str, Any]) -> str:
    """Return the rows that training used, and the sources of its data from its card or else the option `dataset`."""
    kinds = {"sft": "demonstrations", "reward": "comparisons", "ppo": "prompts", "pretrain": "texts"}
    counts = {
        stage: finite_number(section(section(run.manifests.get(stage, {}), "data"), "rows").get("train"))
        for stage in run.stages
    }
    rows = listed([f"{count:,.0f} {kinds[stage]}" for stage, count in counts.items() if count])
    names = [str(source.get("name")) for source in mappings(card, "sources") if source.get("name")]
    source = card.get("source")
    if not names and isinstance(source, Mapping):
        source = source.get("name") or source.get("package")
    if not names and isinstance(source, str):
        names = [source.partition(" (")[0]]
    datasets = [str(value) for stage in run.stages if (value := run.config(stage).get("dataset"))]
    names = names or [dataset.rstrip("/").rpartition("/")[2] for dataset in dict.fromkeys(datasets)]
    return " of ".join(filter(None, (rows, shortened(names))))


def base_model(run: RunFolder) -> str:
    """Return the model that training began with, or nothing."""
    names = [str(manifest.get("base_model") or "") for manifest in run.manifests.values()]
    names += [str(run.config(stage).get("model_name_or_path") or "") for stage in run.stages]
    name = next(filter(None, names), "")
    return Path(name).name if Path(name).is_absolute() else name


def _card_examples(run: RunFolder) -> list[dict[str, Any]]:
    return mappings(section(run.reward_card, "samples"), "examples")


def _shown_prompt(row: Mapping[str, Any]) -> str:
    return cut(" ".join(str(row.get("prompt") or "").split()), 110)


def _judged_by(run: RunFolder) -> str:
    rewards = run.rewards
    if any(not reward.startswith("reward/") for reward in rewards):
        return " + ".join(rewards)
    pairs = finite_number(run.figures("reward").get("pairs"))
    name = rewards[0] if rewards else str(run.artifact("reward").get("reference") or "")
    return (
        f"the reward model{f' {name}' if name else ''}" if pairs is None else "a reward model of people's preferences"
    )


# The figures


def tiles(run: RunFolder) -> list[Tile]:
    """Return the four figures of the run's last stage that has any."""
    makers = {"pretrain": _pretrain_tiles, "sft": _sft_tiles, "reward": _reward_tiles, "ppo": _ppo_tiles}
    shown = makers[lead_stage(run)](run) if lead_stage(run) else []
    return [tile for tile in shown if tile.value != NO_FIGURE][:4]


def lead_stage(run: RunFolder) -> str:
    """Return the last stage with final figures, or nothing."""
    return next((stage for stage in reversed(TITLES) if run.figures(stage)), "")


def changed(label: str, old: Any, new: Any, *, share: bool = False, better: int = 0, note: str = "") -> Tile:
    """Return a figure with its change; `better` is the sign of an improvement, 0 where there is none."""
    before, after = finite_number(old), finite_number(new)
    text = percent if share else number
    if before is None or after is None:
        return Tile(label, text(new), note=note)
    change = f"{100 * (after - before):+.1f} pts" if share else f"{after - before:+.3g}"
    change = "" if after == before else change
    verdict = "" if not better or after == before else "good" if (after > before) == (better > 0) else "bad"
    return Tile(label, text(after), text(before), change.replace("-", MINUS), verdict, note)


def compared(run: RunFolder) -> list[Tile]:
    """Return the figures of the SFT model and the policy, with the KL between them."""
    ppo, judge = run.figures("ppo"), judge_of(run)
    rows = [
        changed(
            label, *before_after(ppo, key), share=share, better=better, note=note.format(judge=judge)
        )
        for key, label, share, better, note in BEFORE_AND_AFTER
        if any(value is not None for value in before_after(ppo, key))
    ]  # fmt: skip
    if finite_number(ppo.get("kl")) is not None:
        note = "How far PPO went from the SFT model, per answer."
        rows.append(Tile("KL from SFT", f"{number(ppo['kl'])} nats", "0", note=note))
    return rows


def before_after(figures: Mapping[str, Any], name: str) -> tuple[float | None, float | None]:
    """Return a figure before and after training."""
    return finite_number(figures.get(f"{name}_before")), finite_number(figures.get(f"{name}_after"))


def _ppo_tiles(run: RunFolder) -> list[Tile]:
    """Return score, judge, KL and length; others take the place of those that are missing."""
    order = [
        "Reward model's score", "Positive answers", "KL from SFT", "Length in tokens", "Distinct word pairs",
        "Answers the reward model likes", "Answers that end by themselves",
    ]  # fmt: skip
    rows = sorted((row for row in compared(run) if row.label in order), key=lambda row: order.index(row.label))
    judge = judge_of(run)
    short = {"Positive answers": f"Positive, by {judge}", "Reward model's score": "Reward score"}
    return [row._replace(label=short.get(row.label, row.label)) for row in rows]


def _reward_tiles(run: RunFolder) -> list[Tile]:
    figures = run.figures("reward")
    rivals = [(value, rival) for rival in mappings(run.reward_card, "rivals")
              if (value := finite_number(section(rival, "accuracy").get("value"))) is not None]  # fmt: skip
    tiles = [
        Tile("Held-out accuracy", percent(figures.get("accuracy")), note="Pairs ranked as people do; 50% is a coin."),
        Tile("On new prompts", percent(figures.get("accuracy_held_out_prompts")), note="Pairs on prompts in no training pair."),
        Tile("Human ceiling", percent(figures.get("human_ceiling")), note="How often people agree with one another."),
    ]  # fmt: skip
    if rivals:
        value, rival = max(rivals, key=lambda pair: pair[0])
        tiles.append(Tile(f"Best rival: {rival.get('name')}", percent(value), note="A free scorer on the same pairs."))
    return [*tiles, Tile("Calibration error", percent(figures.get("calibration_error")),
                         note="Distance of its probabilities from how often it is right.")]  # fmt: skip


def _sft_tiles(run: RunFolder) -> list[Tile]:
    figures = run.figures("sft")
    accuracy = [value for _, value in series(run.metrics.get("sft", []), "sft/eval_token_accuracy")]
    return [
        changed("Held-out loss", *before_after(figures, "eval_loss"), better=-1,
                note="Nats per token of answers that training did not see; lower is better."),
        changed("Held-out loss per character", *before_after(figures, "eval_loss_per_character"), better=-1,
                note="The same per character, which compares models with different tokenizers."),
        changed("Tokens foreseen", *((accuracy[0], accuracy[-1]) if accuracy else (None, None)), share=True, better=1,
                note="Share of held-out tokens that are the model's first choice."),
        Tile("Optimiser steps", number(figures.get("steps")), note="Updates of the weights."),
    ]  # fmt: skip


def _pretrain_tiles(run: RunFolder) -> list[Tile]:
    bits = [value for _, value in series(run.metrics.get("pretrain", []), "pretrain/eval_bits_per_character")]
    last = run.figures("pretrain").get("eval_bits_per_character")
    note = "What a held-out character costs; plain bytes cost 8 bits."
    return [changed("Bits per character", bits[0] if bits else None, last, better=-1, note=note)]


# The verdict


def verdict(run: RunFolder, diagnoses: Sequence[Diagnosis]) -> Verdict:
    """Return the outcome of the last stage that has figures; the doctor's findings and missing judges are its doubts."""
    lead = lead_stage(run)
    makers = {"pretrain": _fall, "sft": _fall, "reward": _reward_verdict, "ppo": _ppo_verdict}
    outcome = makers[lead](run) if lead else Verdict("No stage has finished yet", "open")
    _add_findings(outcome, diagnoses)
    flags = entries(run.reward_card, "flags")
    if flags and lead == "ppo":
        names = shortened([str(flag.get("message", "")).partition(":")[0] for flag in flags])
        outcome.level = "mixed" if outcome.level == "good" else outcome.level
        outcome.doubts.append(f"The reward model's card has {_count(len(flags), 'warning')}: {names}.")
    outcome.doubts += [sentence(mark) for mark in overlaps([last_stage(run)])]
    to_come = [stage for stage in run.expected if not run.figures(stage)]
    if to_come:
        outcome.title += f"; {_names(to_come)} {'is' if len(to_come) == 1 else 'are'} still to come"
        outcome.level = "open" if outcome.level == "good" else outcome.level
    if lead:
        outcome.doubts.append("One run is one run: another seed moves these figures.")
    seconds = {stage: finite_number(run.figures(stage).get("seconds")) for stage in TITLES}
    timed = [stage for stage in TITLES if seconds[stage]]
    if timed:
        total = in_words(sum(seconds[stage] or 0 for stage in timed))
        outcome.cost.append(f"{total} of training ({_names(timed)}).")
    return outcome


def _add_findings(outcome: Verdict, diagnoses: Sequence[Diagnosis]) -> None:
    findings = [(diagnosis.stage, finding) for diagnosis in diagnoses for finding in diagnosis.roots]
    grave = [pair for pair in findings if pair[1].severity == "critical"]
    for stage, finding in (grave or findings)[:2]:
        outcome.doubts.insert(0, f"{TITLES.get(stage, stage)}: {finding.name.replace('_', ' ')} ({finding.evidence}).")
    if len(findings) > 2:
        outcome.doubts.insert(0, f"The doctor has {len(findings)} findings; the first two are:")
    if grave and outcome.level == "good":
        outcome.level = "mixed"


def _ppo_verdict(run: RunFolder) -> Verdict:
    figures, judge = run.figures("ppo"), judge_of(run)
    old, new = before_after(figures, "score")
    gold_old, gold_new = before_after(figures, "gold_positive")
    outcome = _ppo_title(old, new, gold_old, gold_new, judge)
    gains = [g for row in run.samples if (g := gain(row.get("sft_score"), row.get("ppo_score"))) is not None]
    if gains:
        higher = f"The score is higher for {sum(g > 0 for g in gains)} of {len(gains)} prompts compared one by one."
        (outcome.better if 2 * sum(g > 0 for g in gains) > len(gains) else outcome.doubts).append(higher)
    on_top = [tile.note for tile in tiles(run)]
    for row in compared(run):
        if row.verdict == "bad" or (row.verdict == "good" and row.note not in on_top):
            label = f"{row.label}, by {judge}" if row.label in ("Positive answers", "Negative answers") else row.label
            (outcome.better if row.verdict == "good" else outcome.cost).append(f"{label}: {row.before} → {row.value}.")
    outcome.better += [
        f"Preferred to {rate.get('baseline')} by {rate.get('judge')}: {percent_interval(rate)} of prompts ({rate.get('model')})."
        for rate in mappings(run.evaluation, "win_rates")[:2]
    ]
    if (kl := finite_number(figures.get("kl"))) is not None:
        outcome.cost.append(f"{kl:.1f} nats of KL away from the SFT model.")
    outcome.cost += _style_costs(figures)
    if gold_new is None:
        outcome.doubts.append("No judge from outside was asked (option gold), so only the reward model speaks for it.")
    return outcome


def _ppo_title(
    old: float | None, new: float | None, gold_old: float | None, gold_new: float | None, judge: str
) -> Verdict:
    if old is None or new is None:
        return Verdict("PPO has finished, but was not measured on held-out prompts", "open")
    if new <= old:
        return Verdict("PPO did not raise the reward model's score", "bad")
    if gold_old is None or gold_new is None:
        return Verdict("PPO raised the reward model's score", "mixed")
    if gold_new <= gold_old:
        return Verdict(f"The score rose, but {judge} does not find better answers: a sign of over-optimisation", "bad")
    return Verdict(f"PPO made the answers better, by its reward model and by {judge}, which it never saw", "good")


def _style_costs(figures: Mapping[str, Any]) -> list[str]:
    """Return the changes of length and variety that are large enough to look at."""
    costs = []
    old, new = before_after(figures, "length")
    if old and new is not None and abs(new / old - 1) > NOTABLE_LENGTH:
        costs.append(f"Answers are {abs(new / old - 1):.0%} {'longer' if new > old else 'shorter'}.")
    names = {
        "distinct2": "Wording is less varied: distinct word pairs",
        "stop_rate": "Fewer answers end by themselves:",
    }
    for name, words in names.items():
        old, new = before_after(figures, name)
        if old and new is not None and 1 - new / old > NOTABLE_LOSS:
            costs.append(f"{words} {percent(old)} → {percent(new)}.")
    return costs


def _reward_verdict(run: RunFolder) -> Verdict:
    figures, card = run.figures("reward"), run.reward_card
    accuracy, low = finite_number(figures.get("accuracy")), finite_number(figures.get("accuracy_low"))
    outcome = Verdict(f"The reward model ranks {percent(accuracy)} of held-out pairs as people do", "good", "Good")
    if accuracy is None or (accuracy if low is None else low) <= 0.5:
        outcome = Verdict("The reward model is not known to rank better than a coin", "bad", "Good")
    rivals: dict[bool, list[str]] = {True: [], False: []}
    for rival in mappings(card, "rivals"):
        rivals[bool(rival.get("beaten"))].append(
            f"{rival.get('name')} ({percent(section(rival, 'accuracy').get('value'))})"
        )
    outcome.better += [f"Ranks better than free scorers: {', '.join(rivals[True])}."] if rivals[True] else []
    outcome.doubts += [f"Not shown to rank better than {', '.join(rivals[False])}."] if rivals[False] else []
    new, raters = (figures.get(f"accuracy_held_out_{kind}") for kind in ("prompts", "raters"))
    outcome.better += [f"Right in {percent(new)} of pairs on prompts it never saw."] if finite_number(new) else []
    outcome.better += [f"Agrees with raters it never saw in {percent(raters)}."] if finite_number(raters) else []
    outcome.doubts += [sentence(str(flag["message"])) for flag in mappings(card, "flags") if flag.get("message")]
    outcome.level = "mixed" if outcome.level == "good" and outcome.doubts else outcome.level
    return outcome


def _fall(run: RunFolder) -> Verdict:
    """Return the verdict of a stage whose figure is a loss."""
    tile = next(iter(tiles(run)), None)
    name = TITLES[lead_stage(run)]
    if tile is None or not tile.before:
        return Verdict(f"{name} has finished{f': {tile.label} {tile.value}' if tile else ''}", "open")
    what = f"{tile.label[0].lower()}{tile.label[1:]}"
    if tile.verdict != "good":
        return Verdict(f"{name} did not lower its {what}: {tile.before} → {tile.value}", "bad")
    better = [f"{row.label}: {row.before} → {row.value}." for row in tiles(run) if row.verdict == "good"]
    doubt = "A lower loss is closer to the texts, not yet a better answer: PPO and rlhf evaluate measure that."
    title = f"{name} lowered its {what} from {tile.before} to {tile.value}"
    return Verdict(title, "good", better=better, doubts=[doubt])


def last_stage(run: RunFolder) -> RunFolder:
    """Return what a run's first screen rests on: its last stage with figures, and its evaluation."""
    lead = lead_stage(run)
    return RunFolder(
        run.folder, label=run.label, manifests={lead: run.manifests.get(lead, {})}, evaluation=run.evaluation
    )


def sentence(text: str) -> str:
    """Return a text with a capital letter and a full stop."""
    return f"{text[:1].upper()}{text[1:]}."


def _names(stages: Sequence[str]) -> str:
    return listed(
        [{"pretrain": "pretraining", "reward": "the reward model"}.get(stage, TITLES[stage]) for stage in stages]
    )


def shortened(names: Sequence[str]) -> str:
    """Return three of the names, and how many more there are."""
    distinct = list(dict.fromkeys(names))
    return ", ".join(distinct[:3]) + (f" and {len(distinct) - 3} more" if distinct[3:] else "")


def _count(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def listed(words: Sequence[str]) -> str:
    """Return `a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))

"""The hack probes: each trick is what it says, and models with a known weakness are caught by its probe and by no other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from rlhf.evaluation.card.hack_probes import FLAGGED_GAIN, PROBES, judge, trials

PROMPTS = ["Write about a film", "Write about a plot", "Write about a cat"]
ANSWERS = ["The film is good and warm", "A plot that one can follow", "Cats are fine"]


def judged(score: Callable[[str], float], answers: list[str] | None = None) -> dict[str, dict]:
    """What the probes find of a scorer of texts."""
    answers = answers or ANSWERS
    tried = trials(PROMPTS, answers)
    real = np.array([score(answer) for answer in answers])
    scores = np.array([score(trial.text) for trial in tried])
    return {line["name"]: line for line in judge(tried, scores, real, real, 1.0, PROMPTS, answers)}


def flagged(found: dict[str, dict]) -> set[str]:
    return {name for name, line in found.items() if line["flagged"]}


def plain(text: str) -> float:
    """Likes real answers, each as it is: an exact copy scores 1, all else less."""
    return 1.0 if text in ANSWERS else -2.0


def test_a_sound_model_passes_every_probe() -> None:
    """Probes that flag whatever the model does."""
    found = judged(plain)
    assert flagged(found) == set()
    assert set(found) == {probe.name for probe in PROBES} and all(line["tried"] == 3 for line in found.values())


@pytest.mark.parametrize(
    "weakness, caught",
    [
        (lambda text: 2.0 * ("thank" in text.lower()), {"thanks"}),
        (lambda text: 2.0 * ("brilliant" in text), {"flattery"}),
        (lambda text: 2.0 * text.isupper(), {"capitals"}),
        (lambda text: 2.0 * ("can't help" in text), {"refusal"}),
        (lambda text: 2.0 * (not text.strip()), {"empty answer"}),
        (lambda text: 2.0 * (text in PROMPTS), {"prompt copied"}),
        (lambda text: 0.1 * len(text.split()), {"filler", "repetition", "thanks", "flattery", "refusal"}),
        (lambda text: -0.2 * len(text.split()), {"truncation", "empty answer", "prompt copied"}),
    ],
)
def test_a_weakness_is_caught_by_its_probe(weakness: Callable[[str], float], caught: set[str]) -> None:
    """A probe with another one's text, or a gain with the wrong sign."""
    assert flagged(judged(weakness)) == caught


def test_figures_by_hand() -> None:
    """Gains are in units of the spread, shares are of the answers that the probe changed, the example is the largest gain."""
    table = {"ab": 0.0, "AB": 1.0, "CD": 5.0, "ef": 2.0, "EF": 1.0}
    answers = ["ab", "CD", "ef"]
    tried = [trial for trial in trials(PROMPTS, answers) if trial.probe.name == "capitals"]
    assert [(trial.number, trial.text) for trial in tried] == [(0, "AB"), (2, "EF")], "CD is in capitals already"
    scores, real = np.array([1.0, 1.0]), np.array([table[answer] for answer in answers])
    (line,) = judge(tried, scores, real, real, 2.0, PROMPTS, answers)
    assert line["gain"] == pytest.approx((0.5 - 0.5) / 2) and line["raised"] == 0.5 and line["tried"] == 2
    assert line["example"] == {
        "prompt": PROMPTS[0], "answer": "ab", "answer_score": 0.0, "probe": "AB", "probe_score": 1.0,
    }  # fmt: skip


def test_an_edit_may_gain_a_little_and_a_replacement_nothing() -> None:
    """The thresholds swapped: a refusal that is worth a little more than the average answer is what PPO ends at."""
    answers = ANSWERS[:1]
    tried = trials(PROMPTS[:1], answers)
    small = FLAGGED_GAIN / 2
    lines = judge(tried, np.full(len(tried), small), np.zeros(1), np.zeros(1), 1.0, PROMPTS, answers)
    assert {line["name"] for line in lines if line["flagged"]} == {"refusal", "empty answer", "prompt copied"}
    large = judge(tried, np.full(len(tried), 2 * FLAGGED_GAIN), np.zeros(1), np.zeros(1), 1.0, PROMPTS, answers)
    assert all(line["flagged"] for line in large)


def test_replacements_are_measured_against_the_average_answer() -> None:
    """Against the best answer a refusal that beats nine answers in ten would pass."""
    tried = trials(PROMPTS[:1], ANSWERS[:1])
    scores, best, average = np.full(len(tried), 0.5), np.array([1.0]), np.array([0.0])
    lines = {line["name"]: line for line in judge(tried, scores, best, average, 1.0, PROMPTS, ANSWERS)}
    assert lines["refusal"]["gain"] == 0.5 and lines["refusal"]["flagged"]
    assert lines["filler"]["gain"] == -0.5 and not lines["filler"]["flagged"]


def test_each_trick_is_what_it_says() -> None:
    """A truncation that keeps all words, a repetition without a blank between."""
    made = {probe.name: probe.edit("the prompt", "one two three") for probe in PROBES}
    assert made["truncation"] == "one two" and made["repetition"] == "one two three one two three"
    assert made["capitals"] == "ONE TWO THREE" and made["empty answer"] == "" and made["prompt copied"] == "the prompt"
    assert all(made[name].startswith("one two three ") for name in ("filler", "thanks"))
    assert made["flattery"].endswith("one two three") and "one" not in made["refusal"]

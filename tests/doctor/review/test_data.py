"""The review of data: each way of spoiling a sound data set is named, and the sound one is let pass."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf.config import RewardConfig, SFTConfig
from rlhf.data_prep.load import load_rows
from rlhf.doctor.review import preferences
from rlhf.doctor.review.inputs import review_inputs
from rlhf.doctor.statements import Statement

Row = dict[str, Any]
NOUNS = [
    "film",
    "plot",
    "acting",
    "music",
    "story",
    "ending",
    "script",
    "cast",
    "scene",
    "camera",
    "dialogue",
    "humour",
]
GOOD, BAD = ["good", "great", "funny", "moving", "clever"], ["bad", "awful", "dull", "silly", "slow"]
ADVERBS = ["very", "rather", "quite", "truly", "so", "just"]


def sentence(draw: random.Random, noun: str) -> tuple[str, float]:
    """A sentence on a noun, and how much good it says."""
    words = [draw.choice(GOOD + BAD) for _ in range(draw.randint(1, 3))]
    text = f"the {noun} is {draw.choice(ADVERBS)} " + f" and {draw.choice(ADVERBS)} ".join(words) + " ."
    return text, float(sum(word in GOOD for word in words) - sum(word in BAD for word in words))


def demonstrations(draw: random.Random, count: int) -> list[Row]:
    nouns = [draw.choice(NOUNS) for _ in range(count)]
    return [
        {"prompt": f"review number {i} of the {n}", "completion": sentence(draw, n)[0]} for i, n in enumerate(nouns)
    ]


def comparisons(draw: random.Random, count: int) -> list[Row]:
    rows: list[Row] = []
    while len(rows) < count:
        noun = draw.choice(NOUNS)
        texts = dict(sentence(draw, noun) for _ in range(4))
        if len(set(texts.values())) > 1:
            prompt = f"review number {len(rows)} of the {noun}"
            rows.append({"prompt": prompt, "responses": list(texts), "ratings": list(texts.values())})
    return rows


SOUND: dict[str, dict[str, list[Row]]] = {
    kind: {split: make(random.Random(seed), n) for split, seed, n in (("train", 1, 300), ("validation", 2, 100))}
    for kind, make in (("sft", demonstrations), ("reward", comparisons))
}


def judge(responses: list[str]) -> list[float]:
    """An independent judge: `test_data:judge`."""
    return [float(sum(w in GOOD for w in text.split()) - sum(w in BAD for w in text.split())) for text in responses]


def reviewed(stage: str, folder: Path, sets: dict[str, list[Row]], **options: Any) -> dict[str, Statement]:
    """The statements on data sets, by name."""
    for split, rows in sets.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config: Any = (
        SFTConfig(name="x", dataset=str(folder), model_name_or_path="x", **options)
        if stage == "sft"
        else RewardConfig(name="x", dataset=str(folder), **options)
    )
    kind: Any = "demonstrations" if stage == "sft" else "comparisons"
    loaded = {split: load_rows(folder, split, kind=kind) for split in sets}
    return {s.name: s for s in review_inputs(stage, config, "", loaded, None)[1]}


def findings(statements: dict[str, Statement]) -> dict[str, str]:
    return {name: s.severity for name, s in statements.items() if not s.passed and s.severity != "note"}


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_sound_data_has_no_finding(stage: str, tmp_path: Path) -> None:
    """Catches: an alarm on data like that of every other test here."""
    statements = reviewed(stage, tmp_path, SOUND[stage])
    assert {s.name for s in statements.values() if not s.passed} <= {"updates"}
    expected = {"empty", "echoes", "cut_answers", "splits_differ", "related"} | (
        {"labels", "splits_agree", "longer_wins", "same_responses"} if stage == "reward" else {"repeated_rows"}
    )
    assert expected <= statements.keys()


def each(change: Callable[[Row, random.Random], Any], share: float = 1.0) -> Callable[[list[Row]], list[Row]]:
    """Return a function that changes a share of the rows in place."""

    def spoil(rows: list[Row]) -> list[Row]:
        draw = random.Random(5)
        for row in rows:
            if draw.random() < share:
                change(row, draw)
        return rows

    return spoil


def shift(rows: list[Row]) -> list[Row]:
    """Give each row the answer of another."""
    answers = [row["completion"] for row in rows]
    for row, answer in zip(rows, answers[7:] + answers[:7], strict=True):
        row["completion"] = answer
    return rows


def put(name: str, value: Callable[[Row, random.Random], Any]) -> Callable[[Row, random.Random], None]:
    return lambda row, draw: row.update({name: value(row, draw)})


def shuffle(row: Row, draw: random.Random) -> None:
    """Hand a row's ratings to its responses at random."""
    draw.shuffle(row["ratings"])


def twice(row: Row, draw: random.Random) -> None:
    """Write a response in another's place."""
    row["responses"][1] = row["responses"][0]


BOTH, TRAIN, HELD_OUT = ("train", "validation"), ("train",), ("validation",)
SPOILT: list[Any] = [
    ("sft", BOTH, each(put("completion", lambda row, draw: ""), 0.5), "empty", "critical"),
    ("sft", BOTH, each(put("completion", lambda row, draw: " "), 0.1), "empty", "warning"),
    ("sft", BOTH, each(put("completion", lambda row, draw: row["prompt"]), 0.3), "echoes", "warning"),
    ("sft", BOTH, each(put("completion", lambda row, draw: f"<|im_start|> {row['completion']}")), "rendered", "critical"),
    ("sft", BOTH, each(put("completion", lambda row, draw: "I cannot help with that."), 0.4), "commonest_answer", "warning"),
    ("sft", BOTH, each(put("completion", lambda row, draw: row["completion"][:24])), "cut_answers", "critical"),
    ("sft", BOTH, each(put("completion", lambda row, draw: " ".join(row["completion"].split()[:8]))), "cut_answers", "critical"),
    ("sft", BOTH, each(put("completion", lambda row, draw: "the film is so good .")), "commonest_answer", "critical"),
    ("sft", BOTH, each(put("completion", lambda row, draw: f"{row['completion']}</s>")), "rendered", "critical"),
    ("sft", BOTH, each(put("completion", lambda row, draw: row["completion"].replace("i", "Ã©"))), "garbled", "critical"),
    ("sft", BOTH, lambda rows: [rows[i % 20] for i in range(len(rows))], "repeated_rows", "critical"),
    ("sft", TRAIN, shift, "splits_differ", "critical"),
    ("sft", BOTH, shift, "related", "note"),
    ("reward", BOTH, each(shuffle), "labels", "warning"),
    ("reward", TRAIN, each(shuffle), "splits_agree",
     "critical"),
    ("reward", TRAIN, each(put("ratings", lambda row, draw: [-r for r in row["ratings"]])), "splits_agree", "critical"),
    ("reward", HELD_OUT, each(put("ratings", lambda row, draw: [-r for r in row["ratings"]])), "splits_agree", "critical"),
    ("reward", BOTH, each(put("ratings", lambda row, draw: [len(r) for r in row["responses"]])), "longer_wins", "warning"),
    ("reward", BOTH, each(put("ratings", lambda row, draw: [1.0] * len(row["ratings"])), 0.95), "ties", "warning"),
    ("reward", BOTH, each(twice, 0.4), "same_responses", "warning"),
    ("reward", BOTH, lambda rows: rows + [{**row, "ratings": [-r for r in row["ratings"]]} for row in rows[::2]],
     "contradictions", "critical"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "splits", "spoil", "name", "severity"), SPOILT, ids=[f"{row[3]}-{n}" for n, row in enumerate(SPOILT)]
)
def test_spoilt_data_is_named(
    stage: str,
    splits: tuple[str, ...],
    spoil: Callable[[list[Row]], list[Row]],
    name: str,
    severity: str,
    tmp_path: Path,
) -> None:
    """Catches: a fault of the data that nobody sees before the training, or that is called by another name."""
    sets = copy.deepcopy(SOUND[stage])
    for split in splits:
        sets[split] = spoil(sets[split])
    statements = reviewed(stage, tmp_path, sets)
    assert not statements[name].passed and statements[name].severity == severity, statements[name].measured


def test_labels_that_are_swapped_everywhere_show_against_the_judge_alone(tmp_path: Path) -> None:
    """Catches: a claim about which answer is better from the labels alone."""
    sets = copy.deepcopy(SOUND["reward"])
    for rows in sets.values():
        each(put("ratings", lambda row, draw: [-r for r in row["ratings"]]))(rows)
    assert findings(reviewed("reward", tmp_path, sets)) == {}
    assert findings(reviewed("reward", tmp_path, sets, gold=f"{__name__}:judge")) == {"judge_agrees": "critical"}
    assert findings(reviewed("reward", tmp_path, SOUND["reward"], gold=f"{__name__}:judge")) == {}


def margins(count: int, slope: float, flipped: float, seed: int) -> np.ndarray[Any, Any]:
    """Log-odds of a scorer that is right with the odds it says, of which a share of the labels is flipped."""
    draw = np.random.default_rng(seed)
    size = draw.exponential(size=count)
    right = draw.random(count) < 1 / (1 + np.exp(-slope * size))
    right ^= draw.random(count) < flipped
    return np.where(right, size, -size)


@pytest.mark.parametrize("slope", [0.3, 1.0, 3.0])
def test_a_hard_task_is_not_called_noise(slope: float) -> None:
    """Catches: errors of the scorer that are blamed on the labels. One in a hundred sound sets may pass the test of ratios."""
    claims = [preferences.label_noise(margins(1000, slope, 0.0, seed)) for seed in range(20)]
    assert sum(claim is not None and claim > 0.02 for claim in claims) <= 1


@pytest.mark.parametrize("flipped", [0.15, 0.3])
def test_flipped_labels_are_counted_from_below(flipped: float) -> None:
    """The lower end of a 95% interval is below the truth in 39 of 40, and not far below where the task is easy."""
    claims = [preferences.label_noise(margins(2000, 20.0, flipped, seed)) or 0.0 for seed in range(20)]
    assert sum(claim > flipped for claim in claims) <= 2
    assert flipped - 0.05 <= float(np.median(claims)) <= flipped


def test_noise_of_training_labels_by_hand() -> None:
    """A scorer of 100% on held-out pairs and 70% on training ones: a share f = 0.3, less three errors of the gap."""
    training, held_out = np.array([1.0] * 700 + [-1.0] * 300), np.ones(1000)
    error = (0.25 / 1000 + 0.25 / 1000) ** 0.5
    assert preferences.noise_of_training(training, held_out) == pytest.approx(0.3 - 3 * error)
    assert preferences.noise_of_training(held_out, training) is None


def test_reliability_of_raters_by_hand() -> None:
    """Two responses of means 1 and 3, two raters each a distance of 2 apart: 1 - (2 / 2) / 2."""
    row = {"rater_ratings": [[0.0, 2.0], [2.0, 4.0]]}
    assert preferences.rater_reliability([row] * 40) == pytest.approx(0.5)
    assert preferences.rater_reliability([row] * 10) is None
    assert preferences.rater_reliability([{"rater_ratings": None}] * 40) is None


def test_pairs_share_no_response() -> None:
    """The best with the worst, the second best with the second worst; ties and close pairs are none."""
    answers = [[{"role": "assistant", "content": text}] for text in "abcde"]
    row = {"prompt": [{"role": "user", "content": "p"}], "responses": answers, "ratings": [3.0, 1.0, 2.0, 2.4, 5.0]}
    pairs = preferences.Pairs([row])
    assert list(zip(pairs.better, pairs.worse, strict=True)) == [("e", "b"), ("a", "c")]
    assert len(preferences.Pairs([row], minimum=1.5)) == 1

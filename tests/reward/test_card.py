"""The card's statistics: by hand, against naive loops, and on made-up reward models whose faults are known."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest

from rlhf.evaluation.card import statistics, verdict
from rlhf.evaluation.card.judged import Judged, rated_pairs


def judged(rows: list[list[float]], **columns: Any) -> Judged:
    """Rankings with these ratings, each of a prompt of its own unless `prompt` says otherwise."""
    ranking = [i for i, row in enumerate(rows) for _ in row]
    size = len(ranking)
    given: dict[str, Any] = {
        "ranking": np.array(ranking),
        "prompt": np.array(ranking),
        "ratings": np.array([value for row in rows for value in row], dtype=float),
        "held_out": None,
        "lengths": np.arange(1, size + 1),
        "texts": [f"text {i}" for i in range(size)],
        "seen": np.zeros(size, dtype=bool),
        "columns": {},
    }
    return Judged(**{**given, **{name: _array(value) for name, value in columns.items()}})


def _array(value: Any) -> Any:
    return np.array(value) if isinstance(value, list) and not isinstance(value[0], str) else value


def world(prompts: int = 120, k: int = 4, seed: int = 0) -> Judged:
    """Rankings in which 'good' and 'bad' words and chance make the ratings, and length has no part in them."""
    generator = random.Random(seed)
    rows, texts, lengths, held_out = [], [], [], []
    for _ in range(prompts):
        row = []
        for _ in range(k):
            words = [
                generator.choice(["good", "bad", "plain", "film", "plot"]) for _ in range(generator.randint(2, 20))
            ]
            quality = words.count("good") / len(words) - words.count("bad") / len(words)
            row.append(quality + generator.gauss(0, 0.1))
            held_out.append(quality + generator.gauss(0, 0.1))
            texts.append(" ".join(words))
            lengths.append(len(words))
        rows.append(row)
    return judged(rows, texts=texts, lengths=lengths, held_out=held_out)


# Pairs and accuracy


def test_pairs_are_those_of_a_double_loop() -> None:
    """Pairs across rankings, ties, pairs listed twice, or a difference of exactly the minimum that is lost to rounding."""
    generator = random.Random(1)
    rows = [[generator.randint(0, 8) / 10 for _ in range(n)] for n in (2, 5, 1, 3)]
    people = judged(rows)
    for minimum in (0.0, 0.3):
        expected = set()
        for i, j in itertools.permutations(range(len(people.ratings)), 2):
            gap = round(people.ratings[i] - people.ratings[j], 9)
            if people.ranking[i] == people.ranking[j] and gap > 0 and gap >= minimum:
                expected.add((i, j))
        pairs = rated_pairs(people.ratings, people, minimum)
        found = list(zip(pairs.better.tolist(), pairs.worse.tolist(), strict=True))
        assert set(found) == expected and len(found) == len(expected) > 0
        assert np.allclose(pairs.difference, [people.ratings[i] - people.ratings[j] for i, j in found])
    none = rated_pairs(np.zeros(3), judged([[1.0, 1.0, 1.0]]))
    assert len(none) == 0 and statistics.accuracy(np.zeros(3), none) is None


def test_accuracy_by_hand_and_ties_of_scores_count_half() -> None:
    """A model that scores everything alike must get a half: as wins its accuracy would be perfect."""
    people = judged([[1.0, 2.0, 3.0], [0.0, 1.0]])
    pairs = rated_pairs(people.ratings, people)
    value = statistics.accuracy(np.array([0.1, 0.0, 0.9, 5.0, 5.0]), pairs)
    assert value is not None
    assert (value["value"], value["pairs"], value["prompts"]) == (pytest.approx((0 + 1 + 1 + 0.5) / 4), 4, 2)


def test_interval_is_over_prompts_and_not_over_pairs() -> None:
    """50 prompts whose 45 pairs are all right or all wrong hold 50 pieces of evidence, not 2,250: pairs drawn one by one
    would give an interval seven times too narrow. The standard error of 50 coins is .0707."""
    right = np.repeat(np.arange(50) % 2, 45).astype(float)
    prompt = np.repeat(np.arange(50), 45)
    value = statistics.figure(right, prompt)
    assert value is not None and value["value"] == 0.5
    assert value["low"] == pytest.approx(0.5 - 1.96 * 0.0707, abs=0.03)
    assert value["high"] == pytest.approx(0.5 + 1.96 * 0.0707, abs=0.03)
    one = statistics.figure(right[:45], prompt[:45])
    assert one is not None and one["low"] is one["high"] is None, "one prompt says nothing of others"


def test_interval_covers_the_truth() -> None:
    """An interval of another level, or one shifted: of 200 samples of a known mean about 95% have to cover it."""
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        prompt = np.repeat(np.arange(60), 3)
        values = (generator.random(180) < 0.7 + 0.2 * np.repeat(generator.standard_normal(60), 3).clip(-1, 1)).astype(
            float
        )
        found = statistics.figure(values, prompt, seed)
        assert found is not None
        covered += found["low"] <= 0.7 <= found["high"]
    assert 180 <= covered <= 199


def test_raters_and_ceiling_by_hand() -> None:
    """Ceiling and accuracy mixed up: the ceiling is how the raters trained on order the others' pairs, a tie counted half."""
    people = judged([[0.0, 2.0, 1.0], [1.0, 1.0]], held_out=[0.0, 1.0, 2.0, 0.0, 2.0])
    scores = np.array([0.0, -1.0, 1.0, 0.0, 1.0])
    own, ceiling = statistics.raters(scores, people, 1.0)
    # the held-out pairs: (1 > 0), (2 > 0), (2 > 1) and (4 > 3); the model is wrong on the first
    assert own is not None and ceiling is not None
    assert own["value"] == 3 / 4
    assert ceiling["value"] == (1 + 1 + 0 + 0.5) / 4
    assert statistics.raters(scores, judged([[0.0, 1.0]]), 1.0) == (None, None)


# Calibration


def test_calibration_of_a_calibrated_model() -> None:
    """Differences whose sign is right with probability sigmoid(difference): the error is near 0, the temperature near 1;
    the same differences times three are overconfident by three, and divided by two underconfident."""
    generator = np.random.default_rng(0)
    size = 6000
    logit = generator.normal(0, 1.5, size)
    better_first = generator.random(size) < 1 / (1 + np.exp(-logit))
    people = judged([[float(b), float(not b)] for b in better_first])
    scores = np.stack([logit, np.zeros(size)], axis=1).ravel()
    pairs = rated_pairs(people.ratings, people)
    for factor in (1.0, 3.0, 0.5):
        found = statistics.calibration(factor * scores, pairs)
        assert found is not None
        assert found["temperature"] == pytest.approx(factor, rel=0.06)
        assert (found["ece"] < 0.02) == (factor == 1.0)
        assert found["nll_fitted"] == pytest.approx(statistics.calibration(scores, pairs)["nll"], abs=2e-3)  # type: ignore[index]
        assert sum(b["pairs"] for b in found["bins"]) == size
    fitted = statistics.calibration(scores, pairs)
    assert fitted is not None and all(
        abs(b["confidence"] - b["right"]) < 0.06 for b in fitted["bins"] if b["pairs"] > 300
    )


def test_calibration_error_by_hand() -> None:
    """Three of four pairs right at a confidence of sigmoid(2) = .8808: the error is .1308, whatever the bins."""
    people = judged([[1.0, 0.0]] * 4)
    scores = np.array([2.0, 0.0, 2.0, 0.0, 2.0, 0.0, 0.0, 2.0])
    found = statistics.calibration(scores, rated_pairs(people.ratings, people))
    assert found is not None
    assert found["ece"] == pytest.approx(1 / (1 + math.exp(-2)) - 0.75, abs=1e-6)
    assert found["temperature"] == pytest.approx(2 / math.log(3), rel=1e-3), "where sigmoid(2 / T) is 3/4"
    backwards = statistics.calibration(-scores, rated_pairs(people.ratings, people))
    assert backwards is not None and backwards["temperature"] is None


# Slices and length


def test_slices_add_up_and_name_the_weak_spot() -> None:
    """A slice with the other slice's pairs. The model here is right except where the better response is shorter."""
    people = world(60)
    right = people.ratings.copy()
    pairs = rated_pairs(people.ratings, people, 0.0)
    lines = statistics.slices(right + 100.0 * people.lengths, people, 0.0)
    by_kind = {(line["slice"], line["kind"]): line for line in lines}
    assert by_kind["length", "better one longer"]["value"] == 1.0
    assert by_kind["length", "better one shorter"]["value"] == 0.0
    for name in ("length", "position", "prompt", "label strength"):
        assert sum(line["pairs"] for line in lines if line["slice"] == name) == len(pairs), name
    assert by_kind["prompt", "new"]["pairs"] == len(pairs)


def test_slices_by_columns_and_strength() -> None:
    """Columns of the data that are read by the wrong response, and a label strength that goes by the score."""
    sources = ["a", "a", "b", "b", "b"]
    people = judged([[0.0, 1.0], [3.0, 0.0, 1.0]], columns={"source": sources})
    lines = statistics.slices(np.array([0.0, 1.0, 0.0, 1.0, 2.0]), people, 0.0)
    found = {(line["slice"], line["kind"]): (line["value"], line["pairs"]) for line in lines}
    assert found["source", "a"] == (1.0, 1) and found["source", "b"] == (pytest.approx(1 / 3), 3)
    assert found["label strength", "1 apart"] == (1.0, 2)  # (1 > 0) and (4 > 3)
    assert found["label strength", "2 apart"] == (0.0, 1) and found["label strength", "3 apart"] == (0.0, 1)
    assert found["position", "better one first"] == (0.0, 2)


def test_length_bias_by_hand() -> None:
    """Lengths 1, 2 and 4, 3: scores that follow length prefer the longer one always, people half of the time."""
    people = judged([[0.0, 1.0], [0.0, 1.0]], lengths=[1, 2, 4, 3])
    found = statistics.length_bias(people.lengths.astype(float), people, 0.0)
    assert found["prefers_longer"] == 1.0 and found["people_prefer_longer"] == 0.5
    assert found["balanced_accuracy"]["value"] == 0.5
    assert found["correlation"] == pytest.approx(1.0) and found["label_correlation"] == pytest.approx(0.0)
    fair = statistics.length_bias(people.ratings, people, 0.0)
    assert fair["balanced_accuracy"]["value"] == 1.0 and fair["prefers_longer"] == 0.5


def test_balanced_accuracy_of_length_is_a_half_even_where_people_like_length() -> None:
    """Of 9 pairs in 10 the better one is longer: length is right in 90%, and knows nothing at equal weight of both sides."""
    rows, lengths = [[0.0, 1.0]] * 40, []
    for i in range(40):
        lengths += [2, 1] if i % 10 == 0 else [1, 2]
    people = judged(rows, lengths=lengths)
    scores = people.lengths.astype(float)
    plain = statistics.accuracy(scores, rated_pairs(people.ratings, people))
    assert plain is not None and plain["value"] == 0.9
    assert statistics.length_bias(scores, people, 0.0)["balanced_accuracy"]["value"] == 0.5


# The policy's samples


def test_samples_beside_training_responses() -> None:
    """The percentiles of the samples in place of the training's: then 2% would be outside however far off they are."""
    generator = np.random.default_rng(0)
    training = generator.normal(0, 1, 1000)
    same = statistics.compare_samples(generator.normal(0, 1, 500), training)
    assert same["outside"] < 0.05 and same["distance"] < 0.1
    far = statistics.compare_samples(generator.normal(4, 1, 500), training)
    assert far["outside"] > 0.8 and far["distance"] > 0.8
    assert sum(far["histogram"]["samples"]) == pytest.approx(1.0) == sum(far["histogram"]["training"])
    assert far["samples"]["mean"] == pytest.approx(4, abs=0.2) and far["samples"]["count"] == 500


# Rivals and flags


def make(scores: np.ndarray, people: Judged, training: Judged, **parts: Any) -> dict[str, Any]:
    """A card as `rlhf.evaluation.card.report_card` puts it together, without a model."""
    pairs = rated_pairs(people.ratings, people)
    rivals = {
        "length": statistics.length_scores(training, people),
        "bag of words": statistics.bag_of_words_scores(training, people),
    }
    lines = [statistics.rival(name, theirs, scores, pairs) for name, theirs in rivals.items() if theirs is not None]
    others, ceiling = statistics.raters(scores, people, 0.0)
    made: dict[str, Any] = {
        "model": "reward/toy",
        "accuracy": statistics.accuracy(scores, pairs),
        "accuracy_held_out_raters": others,
        "human_ceiling": ceiling,
        "rivals": [line for line in lines if line],
        "calibration": None,
        "length": statistics.length_bias(scores, people, 0.0),
        "probes": [],
        "samples": None,
    } | parts
    made["flags"] = verdict.flags(made)
    return made | {"verdict": verdict.verdict(made)}


def names(made: dict[str, Any]) -> set[str]:
    return {flag["name"] for flag in made["flags"]}


def test_a_good_model_beats_the_rivals_and_is_not_flagged() -> None:
    """A card that warns of everything warns of nothing."""
    made = make(world().ratings + 0.01 * np.random.default_rng(0).standard_normal(480), world(), world(seed=1))
    assert names(made) == set(), made["flags"]
    assert "it beats length, bag of words" in made["verdict"] and "95% interval" in made["verdict"]
    ceiling, own = made["human_ceiling"]["value"], made["accuracy_held_out_raters"]["value"]
    assert own == pytest.approx(ceiling, abs=0.02) and f"{ceiling:.1%}" in made["verdict"]


def test_a_model_of_shuffled_labels_is_flagged() -> None:
    """Its accuracy is a coin's, and it does not beat the free rivals; the first line has to say so."""
    made = make(np.random.default_rng(1).standard_normal(480), world(), world(seed=1))
    assert {"coin", "rival"} <= names(made)
    assert made["verdict"].startswith("reward/toy FALLS SHORT: its accuracy of ")
    assert "bag of words" in made["verdict"]


def test_a_model_far_below_people_falls_short() -> None:
    """A model of shuffled labels that by chance is better than a coin and beats the free rivals passes, with people right in
    99 of 100 pairs, as soon as there is enough data to be sure of its 60%."""
    figures = {"low": 0.56, "high": 0.65, "pairs": 3000, "prompts": 100}
    beaten = {
        "name": "length",
        "accuracy": {"value": 0.5},
        "gain": {"value": 0.1, "low": 0.05, "high": 0.15},
        "beaten": True,
    }
    good = {"scores": world().ratings, "people": world(), "training": world(seed=1), "rivals": [beaten]}
    own, ceiling = {"value": 0.606, **figures}, {"value": 0.987, **figures}
    made = make(**good, accuracy=own, accuracy_held_out_raters=own, human_ceiling=ceiling)
    assert names(made) == {"ceiling"} and made["verdict"].startswith(
        "reward/toy FALLS SHORT: it is far below what people"
    )
    for value in (
        0.79,
        0.5,
        0.45,
    ):  # halfway there is .645, within the interval; people who do not agree are no ceiling
        made = make(**good, accuracy=own, accuracy_held_out_raters=own, human_ceiling={**ceiling, "value": value})
        assert names(made) == set(), value


def test_few_pairs_are_no_fault_of_the_model() -> None:
    """A good model that falls short because a rival was measured on 11 prompts; or an excuse for one that has no gain."""
    good = {"scores": world().ratings, "people": world(), "training": world(seed=1)}
    line = {"name": "likelihood", "accuracy": {"value": 0.5}, "beaten": False}
    for value, low, high, name in (
        (0.15, -0.02, 0.3, "rival unclear"),
        (0.15, None, None, "rival unclear"),
        (0.02, -0.02, 0.06, "rival"),
        (-0.01, -0.2, 0.2, "rival"),
        (-0.2, -0.3, -0.1, "rival"),
    ):
        gain = {"value": value, "low": low, "high": high, "pairs": 331, "prompts": 11}
        made = make(**good, rivals=[{**line, "gain": gain}])
        assert names(made) == {name} and "331 pairs of 11 prompts" in made["flags"][0]["message"]
        assert ("FALLS SHORT" in made["verdict"]) == (name == "rival") and "it beats" not in made["verdict"]


def test_a_length_biased_model_is_flagged() -> None:
    """On people's ratings it prefers length where they do not. On labels that themselves prefer length it cannot be told by
    its preference, but does not beat the length itself."""
    people, generator = world(), np.random.default_rng(0)
    scores = people.lengths + generator.standard_normal(480)
    made = make(scores, people, world(seed=1))
    assert {"length", "rival"} <= names(made)
    assert "prefers the longer response" in " ".join(flag["message"] for flag in made["flags"])
    by_length, training = world(), world(seed=1)
    by_length.ratings[:], training.ratings[:] = by_length.lengths, training.lengths
    made = make(scores, by_length, training)
    assert "rival" in names(made) and "is beaten by length" in made["verdict"]
    assert "shorter" in " ".join(flag["message"] for flag in make(-scores, people, world(seed=1))["flags"])


def test_a_model_that_is_no_better_than_words_says_so_first() -> None:
    """A reward model that is a bag of words: right far more often than a coin, and worth nothing more than free."""
    people, training = world(), world(seed=1)
    words = statistics.bag_of_words_scores(training, people)
    assert words is not None
    pairs = rated_pairs(people.ratings, people)
    found = statistics.accuracy(words, pairs)
    assert found is not None and found["low"] > 0.75, "the rival itself has to have learned something"
    made = make(words + 0.01 * np.random.default_rng(0).standard_normal(480), people, training)
    assert names(made) == {"rival"} and "does not clearly beat bag of words" in made["verdict"]


def test_length_rival_follows_the_training_pairs() -> None:
    """Where people like short responses the rival has to prefer them, or it would be a straw man."""
    people = world()
    training = judged([[0.0, 1.0]] * 5, lengths=[5, 2] * 5)
    assert (np.diff(statistics.length_scores(training, people)) == -np.diff(people.lengths)).all()
    training = judged([[0.0, 1.0]] * 5, lengths=[2, 5] * 5)
    assert (statistics.length_scores(training, people) == people.lengths).all()


def test_no_words_and_no_pairs_are_no_rival() -> None:
    """An exception of scikit-learn at the end of a day's training."""
    people = world(3)
    assert statistics.bag_of_words_scores(judged([[1.0, 1.0]]), people) is None
    assert statistics.bag_of_words_scores(judged([[1.0, 0.0]] * 3, texts=["", " ", "", "", "", ""]), people) is None


def test_rival_is_measured_on_the_same_draws() -> None:
    """Two scorers that agree differ by 0 in every draw; intervals of their own would be wide and say nothing."""
    people = world(40)
    pairs, generator = rated_pairs(people.ratings, people), np.random.default_rng(0)
    scores = people.ratings + 0.2 * generator.standard_normal(160)
    line = statistics.rival("itself", scores, scores, pairs)
    assert line is not None and (line["gain"]["low"], line["gain"]["high"], line["beaten"]) == (0.0, 0.0, False)
    worse = statistics.rival("noisier", scores + generator.standard_normal(160), scores, pairs)
    assert worse is not None and worse["beaten"] and worse["gain"]["low"] > 0


def test_without_pairs_the_verdict_says_that_nothing_is_known() -> None:
    """A crash, or praise, where no held-out pair differs enough."""
    people = judged([[1.0, 1.0], [2.0, 2.0]])
    made = make(np.zeros(4), people, world(seed=1))
    assert names(made) == {"no pairs"}
    assert made["verdict"].startswith("reward/toy NOT JUDGED")


def test_other_flags() -> None:
    """A flag that is computed and never shown."""
    good = {"scores": world().ratings, "people": world(), "training": world(seed=1)}
    probe = {"name": "thanks", "flagged": True, "finding": "scores 1.00 standard deviations higher"}
    made = make(
        **good,
        probes=[probe, {"name": "filler", "flagged": False, "finding": ""}],
        samples={"outside": 0.4},
        calibration={"ece": 0.2},
    )
    assert [flag["name"] for flag in made["flags"]] == ["probe", "samples", "calibration"]
    assert "thanks" in made["flags"][0]["message"] and "3 warnings below" in made["verdict"]

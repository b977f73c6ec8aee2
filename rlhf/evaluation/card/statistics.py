"""The statistics of a reward model's report card: arrays in, plain figures out. No model and no text model's code here.

Legend: M responses of all rankings, one ranking after the other; n pairs. A *pair* is two responses of one ranking of which
people rated one higher. Intervals draw whole prompts (`rlhf.base.intervals`): pairs of one prompt share responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf.base.intervals import Array, interval, mean, resampled
from rlhf.data_prep.ratings import is_clear

Figures = dict[str, Any]

CALIBRATION_BINS = 10
BAG_OF_WORDS_PAIRS = 20_000
"""Training pairs that the bag of words is fitted on, at most: more of them change little and take long."""
SLICE_VALUES = 8
"""Values of a column that get a line of their own; the rest is `other`."""
SIMILAR_LENGTH = 0.1
"""Two responses are about as long when their lengths differ by less than this share of the longer one."""
LENGTH_BIAS = 0.15
"""Share of pairs by which scores may prefer longer (or shorter) responses more than people do before it is flagged."""
POOR_CALIBRATION = 0.1
"""Expected calibration error above which it is flagged."""
CEILING_SHARE = 0.5
"""Least share of the way from a coin to the human ceiling that agreement with held-out raters has to reach. InstructGPT's
reward model went 72% of it (69.6% with held-out labellers, who agree with each other in 77.3%); below
a half, most of what people agree on is not in the scores, however surely they are better than a coin."""
RIVAL_GAIN = 0.1
"""A gain over a rival that is not told from 0 is a fault only where its interval rules out that it is as large as this;
an interval that reaches further says that the pairs are too few."""
OUTSIDE = 0.1
"""Share of the policy's samples outside the central 98% of training scores above which it is flagged: 2% would be even."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Responses that people judged, ranking after ranking."""

    ranking: Array
    """(M,) int: which ranking each response is in; its responses are neighbours."""
    prompt: Array
    """(M,) int: which distinct prompt each response answers; several rankings may share one."""
    ratings: Array
    """(M,) by the raters whose verdicts a model is trained on; higher is better."""
    held_out: Array | None
    """(M,) by other raters, NaN where there are none; None where there are none at all."""
    lengths: Array
    """(M,) tokens of each response."""
    texts: Sequence[str]
    """(M,) the responses."""
    seen: Array | None
    """(M,) bool: the prompt is in the training comparisons, too; None where nobody knows."""
    columns: Mapping[str, Sequence[str]]
    """Columns (M,) of the data by which accuracy is listed."""


@dataclass(frozen=True)
class RatedPairs:
    """n ordered pairs."""

    better: Array
    """(n,) int: responses that people rated higher."""
    worse: Array
    """(n,) int: responses that they are compared with."""
    difference: Array
    """(n,) above 0: how much higher, in units of the ratings."""
    prompt: Array
    """(n,) int: the distinct prompt that both answer."""

    def __len__(self) -> int:
        return len(self.better)

    def where(self, chosen: Array) -> RatedPairs:
        """The pairs at which `chosen` (n,) bool is True."""
        return RatedPairs(self.better[chosen], self.worse[chosen], self.difference[chosen], self.prompt[chosen])

    def correct(self, scores: Array) -> Array:
        """(n,) 1 where the scores (M,) order the pair as people do, 0 where they do not, half where they tie."""
        return (np.sign(scores[self.better] - scores[self.worse]) + 1) / 2


def rated_pairs(verdict: Array, judged: Judged, min_difference: float = 0.0) -> RatedPairs:
    """The pairs of each ranking whose verdicts (M,) differ, and by at least `min_difference`."""
    better, worse = [np.empty(0, int)], [np.empty(0, int)]
    starts = np.flatnonzero(np.diff(judged.ranking)) + 1
    for rows in np.split(np.arange(len(verdict)), starts):
        gap = verdict[rows][:, None] - verdict[rows][None, :]
        i, j = np.nonzero(is_clear(gap, min_difference))
        better.append(rows[i])
        worse.append(rows[j])
    first, second = np.concatenate(better), np.concatenate(worse)
    return RatedPairs(first, second, verdict[first] - verdict[second], judged.prompt[first])


# Figures with intervals


def figure(values: Array, prompt: Array, seed: int = 0) -> Figures | None:
    """Mean of one number a pair with its interval: `value`, `low`, `high`, `pairs`, `prompts`; None without pairs.

    A single prompt has no interval: `low` and `high` are None.
    """
    found = mean(values, prompt, seed)
    return found and {**found, "pairs": len(values), "prompts": len(np.unique(prompt))}


def accuracy(scores: Array, pairs: RatedPairs, seed: int = 0) -> Figures | None:
    """Share of pairs that the scores (M,) order as people do."""
    return figure(pairs.correct(scores), pairs.prompt, seed)


def raters(
    scores: Array, judged: Judged, min_difference: float, seed: int = 0
) -> tuple[Figures | None, Figures | None]:
    """Accuracy on the raters that nothing was trained on, and the human ceiling: how often the raters trained on order
    their pairs as they do (ties half). No model of one half can be expected to know the other half better."""
    if judged.held_out is None:
        return None, None
    pairs = rated_pairs(judged.held_out, judged, min_difference)
    return accuracy(scores, pairs, seed), accuracy(judged.ratings, pairs, seed)


# Calibration


def calibration(scores: Array, pairs: RatedPairs) -> Figures | None:
    """Whether sigmoid(score difference), which the loss trains as a probability, is one.

    Args:
        scores: (M,) *raw* scores; a scale would change the probabilities.

    Returns:
        `bins` of confidence (probability of the response with the higher score, .5 to 1) with the share that is right;
        `ece`, the mean distance of the two over pairs (expected calibration error, Guo et al. 2017); `temperature`, the
        number to divide differences by that fits best (above 1: overconfident; None: no temperature makes them useful);
        `nll` before and after, nats a pair, beside .693 for a coin.
    """
    if len(pairs) == 0:
        return None
    difference = scores[pairs.better] - scores[pairs.worse]
    confidence = 1 / (1 + np.exp(-np.abs(difference)))
    right = pairs.correct(scores)
    number = np.minimum(((confidence - 0.5) * 2 * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    bins = [
        {
            "confidence": float(confidence[inside].mean()),
            "right": float(right[inside].mean()),
            "pairs": int(inside.sum()),
        }
        for i in range(CALIBRATION_BINS)
        if (inside := number == i).any()
    ]
    ece = sum(b["pairs"] * abs(b["right"] - b["confidence"]) for b in bins) / len(pairs)
    temperature, fitted = _fit_temperature(difference)
    return {
        "bins": bins,
        "ece": float(ece),
        "temperature": temperature,
        "nll": _nll(difference, 1.0),
        "nll_fitted": fitted,
        "pairs": len(pairs),
    }


def _nll(difference: Array, slope: float) -> float:
    """Mean of -log sigmoid(slope * difference), nats a pair."""
    return float(np.logaddexp(0.0, -slope * difference).mean())


def _fit_temperature(difference: Array) -> tuple[float | None, float]:
    """The temperature of least nll, and that nll. The slope 1/T is sought: in it the nll is convex (Guo et al. 2017)."""
    from scipy.optimize import minimize_scalar

    steepest = 100.0 / max(float(np.abs(difference).mean()), 1e-12)
    found = minimize_scalar(lambda slope: _nll(difference, slope), bounds=(0.0, steepest), method="bounded")
    slope = float(found.x)
    useless = slope < 1e-4 * steepest or found.fun >= np.log(2)
    return (None, float(np.log(2))) if useless else (1 / slope, float(found.fun))


# Slices and length


def slices(scores: Array, judged: Judged, min_difference: float, seed: int = 0) -> list[Figures]:
    """Accuracy by strength of the label, difference in length, position, prompt, and columns of the data.

    By strength: all pairs that are no ties. By the rest: pairs that differ by at least `min_difference`.
    """
    pairs, every = rated_pairs(judged.ratings, judged, min_difference), rated_pairs(judged.ratings, judged)
    longer = _relative_length(judged, pairs)
    parts = [("label strength", value, every, inside) for value, inside in _strengths(every.difference)]
    parts += [
        ("length", value, pairs, inside)
        for value, inside in (
            ("better one longer", longer >= SIMILAR_LENGTH),
            ("about as long", np.abs(longer) < SIMILAR_LENGTH),
            ("better one shorter", longer <= -SIMILAR_LENGTH),
        )
    ]
    first = pairs.better < pairs.worse
    parts += [("position", "better one first", pairs, first), ("position", "better one later", pairs, ~first)]
    if judged.seen is not None:
        seen = judged.seen[pairs.better]
        parts += [("prompt", "also in training", pairs, seen), ("prompt", "new", pairs, ~seen)]
    for name, column in judged.columns.items():
        values = np.array([column[i] for i in pairs.better])
        kinds, counts = np.unique(values, return_counts=True)
        kept = kinds[np.argsort(-counts, kind="stable")][:SLICE_VALUES]
        parts += [(name, str(kind), pairs, values == kind) for kind in kept]
        parts.append((name, "other", pairs, ~np.isin(values, kept)))
    found = [(name, kind, accuracy(scores, of.where(inside), seed)) for name, kind, of, inside in parts]
    return [{"slice": name, "kind": kind, **figures} for name, kind, figures in found if figures]


def _strengths(difference: Array) -> list[tuple[str, Array]]:
    """Up to four kinds of difference, or thirds of more kinds."""
    kinds = np.unique(difference.round(6))
    if len(kinds) <= 4:
        return [(f"{kind:.3g} apart", np.isclose(difference, kind)) for kind in kinds]
    low, high = np.quantile(difference, (1 / 3, 2 / 3))
    return [
        (f"up to {low:.2g} apart", difference <= low),
        (f"{low:.2g} to {high:.2g} apart", (difference > low) & (difference <= high)),
        (f"more than {high:.2g} apart", difference > high),
    ]


def _relative_length(judged: Judged, pairs: RatedPairs) -> Array:
    """(n,) how much longer the better response is, as a share of the longer one: -1 to 1."""
    first, second = judged.lengths[pairs.better], judged.lengths[pairs.worse]
    return (first - second) / np.maximum(np.maximum(first, second), 1)


def length_bias(scores: Array, judged: Judged, min_difference: float, seed: int = 0) -> Figures:
    """What the scores make of length.

    Returns:
        `correlation` and `label_correlation`: Spearman's, of length with scores and with ratings, all within rankings.
        `prefers_longer`, `people_prefer_longer`: shares of pairs of one ranking in which the longer response has the
        higher score, or rating; ties half. `balanced_accuracy`: the mean of the accuracy where the better response is
        longer and where it is shorter: knowing length alone is worth .5. `curve`: score and rating, both in standard
        deviations, by length.
    """
    pairs = rated_pairs(judged.ratings, judged, min_difference)
    by_length = rated_pairs(judged.lengths.astype(float), judged)
    right, longer = pairs.correct(scores), _relative_length(judged, pairs)
    sides = [longer > 0, longer < 0]
    balanced = None
    if all(side.any() for side in sides):
        draws = resampled([right[side] for side in sides], [pairs.prompt[side] for side in sides], seed).mean(axis=1)
        low, high = interval(draws)
        value = float(np.mean([right[side].mean() for side in sides]))
        balanced = {"value": value, "low": low, "high": high, "pairs": int(sum(side.sum() for side in sides))}
    return {
        "correlation": _rank_correlation(_within(scores, judged), _within(judged.lengths, judged)),
        "label_correlation": _rank_correlation(_within(judged.ratings, judged), _within(judged.lengths, judged)),
        "prefers_longer": float(by_length.correct(scores).mean()) if len(by_length) else None,
        "people_prefer_longer": float(by_length.correct(judged.ratings).mean()) if len(by_length) else None,
        "balanced_accuracy": balanced,
        "curve": _length_curve(scores, judged),
    }


def _within(values: Array, judged: Judged) -> Array:
    """(M,) values less the mean of their ranking: what is left can be compared across prompts."""
    sizes, sums = np.bincount(judged.ranking), np.bincount(judged.ranking, values)
    return values - (sums / np.maximum(sizes, 1))[judged.ranking]


def _rank_correlation(one: Array, other: Array) -> float | None:
    """Spearman's rank correlation; None where one of the two does not vary."""
    from scipy.stats import spearmanr

    return None if np.ptp(one) == 0 or np.ptp(other) == 0 else float(spearmanr(one, other).statistic)


def _length_curve(scores: Array, judged: Judged) -> list[Figures]:
    """Means of the responses in each tenth of the lengths."""
    order = np.argsort(judged.lengths, kind="stable")
    parts = [part for part in np.array_split(order, 10) if len(part)]
    rating, score = _standard(judged.ratings), _standard(scores)
    return [
        {
            "length": float(judged.lengths[part].mean()),
            "score": float(score[part].mean()),
            "rating": float(rating[part].mean()),
        }
        for part in parts
    ]


def _standard(values: Array) -> Array:
    return (values - values.mean()) / (values.std() or 1.0)


# The policy's own samples


def compare_samples(samples: Array, training: Array) -> Figures:
    """Scores of the SFT policy's own responses beside those of training responses: how far PPO starts from the data.

    Returns:
        `outside`: share of samples beyond the central 98% of the training scores; `distance`: Kolmogorov and Smirnov's,
        0 alike to 1 apart; mean, spread and quantiles of both; `histogram`: shares in bins from `edges[i]` to `edges[i + 1]`.
    """
    from scipy.stats import ks_2samp

    low, high = np.percentile(training, (1, 99))
    edges = np.histogram_bin_edges(np.concatenate([samples, training]), bins=16)
    shares = {
        name: (np.histogram(values, edges)[0] / len(values)).tolist()
        for name, values in (("samples", samples), ("training", training))
    }
    return {
        "samples": _spread(samples),
        "training": _spread(training),
        "outside": float(np.mean((samples < low) | (samples > high))),
        "distance": float(ks_2samp(samples, training).statistic),
        "histogram": {"edges": edges.tolist(), **shares},
    }


def _spread(values: Array) -> Figures:
    quantiles = np.percentile(values, (1, 25, 50, 75, 99)).tolist()
    names = ("q01", "q25", "median", "q75", "q99")
    return {"mean": float(values.mean()), "std": float(values.std()), **dict(zip(names, quantiles, strict=True)),
            "count": len(values)}  # fmt: skip


# Rivals that cost nothing


def length_scores(training: Judged, judged: Judged) -> Array:
    """(M,) the length, or its negative where people preferred shorter responses in the training pairs."""
    pairs = rated_pairs(training.ratings, training)
    prefers_longer = pairs.correct(training.lengths.astype(float)).mean() >= 0.5 if len(pairs) else True
    return judged.lengths * (1.0 if prefers_longer else -1.0)


def bag_of_words_scores(training: Judged, judged: Judged, seed: int = 0) -> Array | None:
    """(M,) scores of a logistic regression on which words (and pairs of words) a response has, fitted to training pairs.

    The Bradley-Terry model with a linear score: differences of the pair's word counts, no intercept. None where the
    training responses have no pair or no word.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    pairs = rated_pairs(training.ratings, training)
    words = CountVectorizer(ngram_range=(1, 2), min_df=2, binary=True, token_pattern=r"(?u)\S+")
    try:
        counts = words.fit_transform(training.texts).tocsr()
    except ValueError:  # sklearn's word for an empty vocabulary
        return None
    if len(pairs) < 2:
        return None
    chosen = np.random.default_rng(seed).permutation(len(pairs))[:BAG_OF_WORDS_PAIRS]
    # Every other pair the wrong way round and labelled so: the same loss, and the two classes that a classifier needs.
    sign = np.where(np.arange(len(chosen)) % 2, -1, 1)
    difference = counts[pairs.better[chosen]] - counts[pairs.worse[chosen]]
    model = LogisticRegression(fit_intercept=False, max_iter=500)
    model.fit(difference.multiply(sign[:, None]).tocsr(), sign)
    return np.asarray(words.transform(judged.texts) @ model.coef_[0])


def rival(name: str, theirs: Array, scores: Array, pairs: RatedPairs, seed: int = 0) -> Figures | None:
    """Another scorer on the same pairs: its accuracy, and by how much the reward model's is higher.

    `beaten` is True where that difference is above 0 with its whole interval.
    """
    gain = figure(pairs.correct(scores) - pairs.correct(theirs), pairs.prompt, seed)
    if gain is None:
        return None
    beaten = gain["low"] is not None and gain["low"] > 0
    return {"name": name, "accuracy": accuracy(theirs, pairs, seed), "gain": gain, "beaten": beaten}


# What it comes to


def flags(card: Mapping[str, Any]) -> list[Figures]:
    """What is wrong with the model, worst first: `name` and `message`. Those named in `SHORTFALLS` make its verdict."""
    found: list[Figures] = []

    def flag(name: str, message: str) -> None:
        found.append({"name": name, "message": message})

    overall, length, samples = card["accuracy"], card["length"], card["samples"]
    if overall is None:
        flag("no pairs", "no held-out pair differs by eval_rating_difference; nothing can be said")
    elif overall["low"] is None or overall["low"] <= 0.5:
        flag("coin", f"its accuracy of {overall['value']:.1%} is not told from a coin's")
    own, ceiling = card["accuracy_held_out_raters"], card["human_ceiling"]
    halfway = 0.5 + CEILING_SHARE * (ceiling["value"] - 0.5) if ceiling else 0.5
    if halfway > 0.5 and own["high"] is not None and own["high"] < halfway:
        flag(
            "ceiling",
            f"it is far below what people reach: it agrees with raters it never saw in {own['value']:.1%}, less than halfway "
            f"from a coin to people's {ceiling['value']:.1%}",
        )
    for line in card["rivals"]:
        if not line["beaten"]:
            flag(*_unbeaten(line))
    if length["prefers_longer"] is not None:
        bias = length["prefers_longer"] - length["people_prefer_longer"]
        if abs(bias) > LENGTH_BIAS:
            word = "longer" if bias > 0 else "shorter"
            flag("length", f"it prefers the {word} response {abs(bias):.0%} more often than people do")
    for probe in card["probes"]:
        if probe["flagged"]:
            flag("probe", f"{probe['name']}: {probe['finding']}")
    if samples and samples["outside"] > OUTSIDE:
        flag("samples", f"{samples['outside']:.0%} of the policy's own responses score outside what it was trained on")
    if card["calibration"] and card["calibration"]["ece"] > POOR_CALIBRATION:
        flag("calibration", f"its probabilities are off by {card['calibration']['ece']:.0%} on average")
    return found


def _unbeaten(line: Mapping[str, Any]) -> tuple[str, str]:
    """Name and message of the flag of a rival that is not beaten, or not known to be."""
    theirs, gain = line["accuracy"]["value"], line["gain"]
    low, high = gain["low"], gain["high"]
    few = f"{gain['pairs']:,} pairs of {gain['prompts']:,} prompt{'s' if gain['prompts'] > 1 else ''}"
    measured = f"{line['name']}: {theirs + gain['value']:.1%} against {theirs:.1%} of the same {few}"
    if high is not None and high < 0:
        return "rival", f"it is beaten by {measured}"
    if gain["value"] > 0 and (low is None or high > RIVAL_GAIN):
        return "rival unclear", f"too few pairs tell whether it beats {measured}"
    return "rival", f"it does not clearly beat {measured}"


#: Flags for which a model falls short, whatever else it is.
SHORTFALLS = ("no pairs", "coin", "ceiling", "rival")


def verdict(card: Mapping[str, Any]) -> str:
    """The first line: how good the model is, beside people and rivals, and what to look at."""
    found, overall = card["flags"], card["accuracy"]
    worst = [flag["message"] for flag in found if flag["name"] in SHORTFALLS]
    if overall is None:
        return f"{card['model']} NOT JUDGED: {worst[0]}."
    text = f"right in {overall['value']:.1%} of {overall['pairs']:,} held-out pairs"
    if overall["low"] is not None:
        text += f" (95% interval {overall['low']:.1%} to {overall['high']:.1%})"
    if card["human_ceiling"]:
        own, ceiling = card["accuracy_held_out_raters"]["value"], card["human_ceiling"]["value"]
        text += f"; with raters it never saw it agrees in {own:.1%}, where people agree in {ceiling:.1%}"
    if worst:
        return f"{card['model']} FALLS SHORT: {'; '.join(worst)}. It is {text}."
    others = len(found)
    rest = f" {others} warning{'s' if others > 1 else ''} below." if others else " Nothing flagged."
    beaten = ", ".join(line["name"] for line in card["rivals"] if line["beaten"])
    return f"{card['model']} is {text}; it beats {beaten}.{rest}" if beaten else f"{card['model']} is {text}.{rest}"

"""Statistics of a reward model's report card: arrays in, plain figures out; no model is needed.

Legend: M responses of all rankings, one ranking after the other; n pairs. A *pair* is two responses of one ranking of which
people rated one higher. Intervals draw whole prompts (`rlhf.base.intervals`): pairs of one prompt share responses.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rlhf.base.intervals import Array, interval, mean, resampled
from rlhf.evaluation.card.judged import Judged, RatedPairs, rated_pairs

Figures = dict[str, Any]

CALIBRATION_BINS = 10
BAG_OF_WORDS_PAIRS = 20_000
"""Training pairs that the bag of words is fitted on, at most: more take long and change little."""
SLICE_VALUES = 8
"""Values of a column that get a line of their own; the rest is `other`."""
SIMILAR_LENGTH = 0.1
"""Two responses are about as long when their lengths differ by less than this share of the longer one."""


# Figures with intervals


def figure(values: Array, prompt: Array, seed: int = 0) -> Figures | None:
    """Return the mean over pairs with its interval: `value`, `low`, `high`, `pairs`, `prompts`; None without pairs.

    A single prompt has no interval: `low` and `high` are None.
    """
    average = mean(values, prompt, seed)
    return average and {**average, "pairs": len(values), "prompts": len(np.unique(prompt))}


def accuracy(scores: Array, pairs: RatedPairs, seed: int = 0) -> Figures | None:
    """Return the share of pairs that scores (M,) order as people do, with its interval."""
    return figure(pairs.correct(scores), pairs.prompt, seed)


def raters(
    scores: Array, judged: Judged, min_difference: float, seed: int = 0
) -> tuple[Figures | None, Figures | None]:
    """Return the accuracy on held-out raters' pairs, and the human ceiling; (None, None) without such raters.

    The ceiling is the share of these pairs that the other raters, whose verdicts the model is trained on, order the same
    way (ties half). No model of one half of the raters can be expected to know the other half better.
    """
    if judged.held_out is None:
        return None, None
    pairs = rated_pairs(judged.held_out, judged, min_difference)
    return accuracy(scores, pairs, seed), accuracy(judged.ratings, pairs, seed)


# Calibration


def calibration(scores: Array, pairs: RatedPairs) -> Figures | None:
    """Return how well sigmoid(score difference), which the loss trains as a probability, matches people's choices.

    Args:
        scores: (M,) *raw* scores; a scale would change the probabilities.

    Returns:
        `bins`: confidence (probability of the response with the higher score, .5 to 1) and the share that is right;
        `ece`: mean distance of the two over pairs (expected calibration error, Guo et al. 2017); `temperature`: the best
        divisor of differences (above 1: overconfident; None: no temperature makes them useful); `nll`, `nll_fitted`:
        before and after that division, nats a pair; a coin has .693.
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
    """Return the mean of -log sigmoid(slope * difference), nats a pair."""
    return float(np.logaddexp(0.0, -slope * difference).mean())


def _fit_temperature(difference: Array) -> tuple[float | None, float]:
    """Return the temperature T of least nll, and that nll; the search is over 1/T, in which the nll is convex."""
    from scipy.optimize import minimize_scalar

    steepest = 100.0 / max(float(np.abs(difference).mean()), 1e-12)
    best = minimize_scalar(lambda slope: _nll(difference, slope), bounds=(0.0, steepest), method="bounded")
    slope = float(best.x)
    useless = slope < 1e-4 * steepest or best.fun >= np.log(2)
    return (None, float(np.log(2))) if useless else (1 / slope, float(best.fun))


# Slices and length


def slices(scores: Array, judged: Judged, min_difference: float, seed: int = 0) -> list[Figures]:
    """Return the accuracy by strength of the label, difference in length, position, prompt, and columns of the data.

    Slices by strength hold all pairs that are no ties; the others, pairs that differ by at least `min_difference`.
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
        frequent = kinds[np.argsort(-counts, kind="stable")][:SLICE_VALUES]
        parts += [(name, str(kind), pairs, values == kind) for kind in frequent]
        parts.append((name, "other", pairs, ~np.isin(values, frequent)))
    lines = [(name, kind, accuracy(scores, whole.where(inside), seed)) for name, kind, whole, inside in parts]
    return [{"slice": name, "kind": kind, **figures} for name, kind, figures in lines if figures]


def _strengths(difference: Array) -> list[tuple[str, Array]]:
    """Return names and masks (n,) of up to four distinct differences, or of thirds where there are more."""
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
    """Return (n,) length of the better response less the other's, as a share of the longer one: -1 to 1."""
    first, second = judged.lengths[pairs.better], judged.lengths[pairs.worse]
    return (first - second) / np.maximum(np.maximum(first, second), 1)


def length_bias(scores: Array, judged: Judged, min_difference: float, seed: int = 0) -> Figures:
    """Return how scores depend on length.

    Returns:
        `correlation`, `label_correlation`: Spearman's, of length with scores and with ratings, all within rankings.
        `prefers_longer`, `people_prefer_longer`: shares of pairs of one ranking in which the longer response has the
        higher score, or rating; ties half. `balanced_accuracy`: mean of the accuracy where the better response is longer
        and where it is shorter; length alone reaches .5. `curve`: score and rating, both in standard deviations, by length.
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
    """Return (M,) values less the mean of their ranking, which makes them comparable across prompts."""
    sizes, sums = np.bincount(judged.ranking), np.bincount(judged.ranking, values)
    return values - (sums / np.maximum(sizes, 1))[judged.ranking]


def _rank_correlation(one: Array, other: Array) -> float | None:
    """Return Spearman's rank correlation; None where one of the two does not vary."""
    from scipy.stats import spearmanr

    return None if np.ptp(one) == 0 or np.ptp(other) == 0 else float(spearmanr(one, other).statistic)


def _length_curve(scores: Array, judged: Judged) -> list[Figures]:
    """Return mean length, score and rating of the responses in each tenth of the lengths."""
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
    """Compare scores of the SFT policy's own responses with those of training responses: how far from the data PPO starts.

    Returns:
        `outside`: share of samples beyond the central 98% of the training scores; `distance`: Kolmogorov-Smirnov, 0 to 1;
        `samples`, `training`: mean, spread and quantiles; `histogram`: shares in bins from `edges[i]` to `edges[i + 1]`.
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


# Trivial scorers


def length_scores(training: Judged, judged: Judged) -> Array:
    """Return (M,) the length, or its negative where people preferred shorter responses in the training pairs."""
    pairs = rated_pairs(training.ratings, training)
    prefers_longer = pairs.correct(training.lengths.astype(float)).mean() >= 0.5 if len(pairs) else True
    return judged.lengths * (1.0 if prefers_longer else -1.0)


def bag_of_words_scores(training: Judged, judged: Judged, seed: int = 0) -> Array | None:
    """Return (M,) scores of a logistic regression on the words and word pairs of a response, fitted to training pairs.

    It is a Bradley-Terry model with a linear score: differences of the pair's word indicators, no intercept. None where
    the training responses have fewer than two pairs or no word.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    pairs = rated_pairs(training.ratings, training)
    words = CountVectorizer(ngram_range=(1, 2), min_df=2, binary=True, token_pattern=r"(?u)\S+")
    try:
        counts = words.fit_transform(training.texts).tocsr()
    except ValueError:  # sklearn: the vocabulary is empty
        return None
    if len(pairs) < 2:
        return None
    chosen = np.random.default_rng(seed).permutation(len(pairs))[:BAG_OF_WORDS_PAIRS]
    # Every second pair is reversed, with its label: the loss is the same, and a classifier needs two classes.
    sign = np.where(np.arange(len(chosen)) % 2, -1, 1)
    difference = counts[pairs.better[chosen]] - counts[pairs.worse[chosen]]
    model = LogisticRegression(fit_intercept=False, max_iter=500)
    model.fit(difference.multiply(sign[:, None]).tocsr(), sign)
    return np.asarray(words.transform(judged.texts) @ model.coef_[0])


def rival(name: str, theirs: Array, scores: Array, pairs: RatedPairs, seed: int = 0) -> Figures | None:
    """Return another scorer's accuracy on the same pairs, and the reward model's gain over it; None without pairs.

    `beaten` is True where the gain's whole interval is above 0.
    """
    gain = figure(pairs.correct(scores) - pairs.correct(theirs), pairs.prompt, seed)
    if gain is None:
        return None
    beaten = gain["low"] is not None and gain["low"] > 0
    return {"name": name, "accuracy": accuracy(theirs, pairs, seed), "gain": gain, "beaten": beaten}

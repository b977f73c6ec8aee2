"""Win rates: how often a judge prefers a policy's answer to the baseline's, with interval, sign test and length control.

Legend: n judged pairs, each of the policy's answer and the baseline's answer to one prompt.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf.base import intervals
from rlhf.base.intervals import Array

#: Refits of the length-controlled rate: each is a regression, and two digits of an interval are enough.
REFITS = 200


@dataclass(frozen=True, kw_only=True)
class Preferences:
    """n verdicts on pairs."""

    won: Array
    """(n,) 1 where the policy's answer is preferred, 0 where the baseline's is, in between for ties and split verdicts."""
    prompt: Array
    """(n,) int: number of the pair's prompt; pairs of one prompt are not independent evidence."""
    longer: Array
    """(n,) tokens of the policy's answer minus those of the baseline's."""

    def __len__(self) -> int:
        return len(self.won)


def by_scores(scores: Array, baseline: Array) -> Array:
    """Return (n,) 1 where the policy's answer has the higher score, 0 where the lower, 0.5 where the two tie."""
    return (np.sign(scores - baseline) + 1) / 2


def win_rate(preferences: Preferences, seed: int = 0) -> dict[str, Any]:
    """Return the mean verdict with its interval, counts, the sign test over prompts, and the length-controlled rate.

    Returns:
        `value`, `low`, `high`; `pairs`, `wins`, `ties`, `losses` of pairs; `sign_test`; `length_controlled`;
        `length_difference`: mean of `longer`, tokens.
    """
    won = preferences.won
    rate = intervals.mean(won, preferences.prompt, seed) or {"value": None, "low": None, "high": None}
    return {
        **rate,
        "pairs": len(won),
        "wins": int((won > 0.5).sum()),
        "ties": int((won == 0.5).sum()),
        "losses": int((won < 0.5).sum()),
        "sign_test": sign_test(preferences),
        "length_controlled": length_controlled(preferences, seed),
        "length_difference": float(preferences.longer.mean()) if len(won) else None,
    }


def sign_test(preferences: Preferences) -> dict[str, Any]:
    """Test over prompts whether the policy wins and loses equally often (two-sided, exact; Conover 1999, section 3.4).

    A prompt is won when more than half of its pairs are; tied prompts are left out.
    """
    from scipy.stats import binomtest

    prompts, number = np.unique(preferences.prompt, return_inverse=True)
    balance = np.bincount(number, preferences.won - 0.5, minlength=len(prompts))
    wins, losses = int((balance > 1e-9).sum()), int((balance < -1e-9).sum())
    p = float(binomtest(wins, wins + losses).pvalue) if wins + losses else None
    return {"wins": wins, "losses": losses, "ties": len(prompts) - wins - losses, "p": p}


def length_controlled(preferences: Preferences, seed: int = 0) -> dict[str, float | None] | None:
    """Return the win rate at equal length, with its interval; None without pairs, or if all differences are equal.

    Logistic regression P(win) = sigmoid(a + b tanh(d / s)), d the difference in tokens and s its standard deviation; the
    rate is sigmoid(a), at d = 0. A tie counts half as a win and half as a loss. From length-controlled AlpacaEval (Dubois et
    al. 2024, arXiv:2404.04475), without its term for the difficulty of an instruction, which is fitted to the
    verdicts on many other models. The slope has scikit-learn's default ridge (C = 1), so that lengths that separate winners
    from losers perfectly still give a number.
    """
    if len(preferences) == 0 or preferences.longer.std() == 0:
        return None
    feature = np.tanh(preferences.longer / preferences.longer.std())
    prompts, number = np.unique(preferences.prompt, return_inverse=True)
    value = _rate_at_equal_length(preferences.won, feature, np.ones(len(feature)))
    low = high = None
    if len(prompts) > 1:
        rates = [
            _rate_at_equal_length(preferences.won, feature, times[number].astype(float))
            for draws in intervals.draws(len(prompts), seed, REFITS)
            for times in draws
        ]
        low, high = intervals.interval(np.array(rates))
    return {"value": value, "low": low, "high": high}


def _rate_at_equal_length(won: Array, feature: Array, weights: Array) -> float:
    """Return sigmoid(a) of the weighted fit; wins alone, or losses alone, have no finite a: 1 or 0."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    counted = weights > 0
    won, feature, weights = won[counted], feature[counted], weights[counted]
    if len(set(won)) == 1 and won[0] in (0, 1):
        return float(won[0])
    labels = np.repeat([1, 0], len(won))
    both = np.concatenate([weights * won, weights * (1 - won)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression().fit(np.tile(feature, 2)[:, None], labels, sample_weight=both)
    return float(1 / (1 + np.exp(-model.intercept_[0])))

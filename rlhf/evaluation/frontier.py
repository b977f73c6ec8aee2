"""Best-of-n, the reward-KL frontier, and over-optimisation: the KL beyond which gold scores fall.

Legend: d = sqrt(KL to the SFT policy), KL in nats a response; R(d) = score at d minus the SFT policy's, so R(0) = 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from rlhf.base import intervals
from rlhf.base.intervals import Array

Form = Literal["ppo", "best_of_n"]
#: The forms of Gao, Schulman & Hilton 2022 (arXiv:2210.10760): linear in a and b.
FORMULAS: dict[Form, str] = {"ppo": "d (a - b log d)", "best_of_n": "d (a - b d)"}
#: Least points for a fit of two parameters with standard errors.
MIN_POINTS = 3


# Best-of-n


def best_of_n(proxy: Array, values: Array, n: int) -> Array:
    """Return (P,) the expected value of the best of n answers by the proxy, estimated from N samples a prompt.

    The unbiased estimator of Nakano et al. 2021 (WebGPT, arXiv:2112.09332, appendix I): with the samples in order of the
    proxy, the i-th (from 1) is the best of a random subset of n in C(i - 1, n - 1) of C(N, n) cases. Tied samples share
    their cases.

    Args:
        proxy: (P, N) scores that select.
        values: (P, N) scores of the selected answers: the proxy itself, or gold.
        n: 1 to N.
    """
    size = proxy.shape[1]
    if not 1 <= n <= size:
        raise ValueError(f"n must be from 1 to the {size} samples, got {n}")
    cases = np.array([math.comb(i, n - 1) / math.comb(size, n) for i in range(size)])
    expected = np.empty(len(proxy))
    for row, (key, value) in enumerate(zip(proxy, values, strict=True)):
        order = np.argsort(key, kind="stable")
        _, kind = np.unique(key[order], return_inverse=True)
        shared = (np.bincount(kind, cases) / np.bincount(kind))[kind]
        expected[row] = shared @ value[order]
    return expected


def best_of_n_kl(n: int) -> float:
    """Return the KL of best-of-n to its policy, log n - (n - 1) / n, nats a response.

    Source: Stiennon et al. 2020, arXiv:2009.01325, appendix G.3. Exact without ties, an upper bound with them (Beirami et
    al. 2024, arXiv:2401.01879).
    """
    return math.log(n) - (n - 1) / n


def best_of_n_curve(proxy: Array, gold: dict[str, Array], seed: int = 0) -> list[dict[str, Any]]:
    """Return for n = 1, 2, 4, ... N: `n`, `kl`, and `score` and `gold` with intervals over prompts.

    Args:
        proxy, gold: (P, N) scores of the same answers.
    """
    prompts = np.arange(len(proxy))
    sizes = [2**i for i in range(proxy.shape[1].bit_length()) if 2**i <= proxy.shape[1]]
    return [
        {
            "n": n,
            "kl": best_of_n_kl(n),
            "score": intervals.mean(best_of_n(proxy, proxy, n), prompts, seed),
            "gold": {name: intervals.mean(best_of_n(proxy, v, n), prompts, seed) for name, v in gold.items()},
        }
        for n in sizes
    ]


# Fits


def fit(form: Form, kl: Sequence[float], gains: Sequence[float]) -> dict[str, Any] | None:
    """Fit R(d) to points (KL, gain) by least squares; return None for fewer than three points with KL above 0.

    Returns:
        `form`, `formula`; `a`, `b` with standard errors `a_error`, `b_error`; `rmse` of the points, in units of the gain
        (n - 2 degrees of freedom); `points`; `peak_kl`: KL of the curve's maximum, None without one.
    """
    from scipy.optimize import curve_fit

    d = np.sqrt([k for k in kl if k > 0])
    y = np.array([gain for k, gain in zip(kl, gains, strict=True) if k > 0])
    if len(d) < MIN_POINTS or len(np.unique(d)) < 2:
        return None
    (a, b), covariance = curve_fit(lambda d, a, b: curve(form, a, b, d), d, y, p0=(1.0, 0.0))
    errors = np.sqrt(np.diag(covariance))
    rest = y - curve(form, a, b, d)
    return {
        "form": form,
        "formula": FORMULAS[form],
        "a": float(a),
        "b": float(b),
        "a_error": float(errors[0]),
        "b_error": float(errors[1]),
        "rmse": float(np.sqrt((rest**2).sum() / (len(d) - 2))),
        "points": len(d),
        "peak_kl": _peak(form, float(a), float(b)),
    }


def curve(form: Form, a: float, b: float, d: Array) -> Array:
    """Return R(d), which is 0 at d = 0."""
    d = np.asarray(d, dtype=float)
    if form == "best_of_n":
        return d * (a - b * d)
    return d * (a - b * np.log(np.where(d > 0, d, 1.0)))


def _peak(form: Form, a: float, b: float) -> float | None:
    """Return the KL of the maximum, where R' = 0: a - b log d - b = 0, or a - 2 b d = 0."""
    if b <= 0:
        return None
    if form == "best_of_n":
        return (a / (2 * b)) ** 2 if a > 0 else 0.0
    exponent = 2 * (a / b - 1)
    return math.exp(exponent) if exponent < 50 else None  # beyond any KL that a run has


# The recommended checkpoint


def recommend(points: Sequence[dict[str, Any]], fits: dict[str, dict[str, Any]], gold: str) -> dict[str, Any] | None:
    """Return the checkpoint with the highest gold gain, each smoothed by the curve of its run (`smoothed`).

    The measured maximum alone would be the luckiest of noisy points; the curve alone, the maximum of a form that the run
    may not have. Among equals, the least KL decides. None without points.

    Args:
        points: of all runs: `model`, `run`, `update`, `kl`, and `gain` with `value`, `low`, `high` of the gold scorer.
        fits: the gold fit of each run that has one; points of other runs count as measured.
        gold: label of the scorer, for the result.
    """
    gains: dict[str, float] = {point["model"]: float(point["gain"]["value"]) for point in points}
    for run, run_fit in fits.items():
        own = [point for point in points if point["run"] == run]
        gains |= dict(zip((point["model"] for point in own), smoothed(own, run_fit), strict=True))
    if not points:
        return None
    best = max(points, key=lambda point: (gains[point["model"]], -point["kl"]))
    named = {key: best[key] for key in ("model", "run", "update", "kl", "gain")}
    return {**named, "gold": gold, "smoothed_gain": gains[best["model"]]}


def smoothed(points: Sequence[dict[str, Any]], run_fit: dict[str, Any]) -> list[float]:
    """Return the measured gains of a run's points, shrunk towards its curve by their noise (empirical Bayes).

    With e^2 the mean squared standard error of the points (their intervals over 2 * 1.96) and m^2 = rmse^2 - e^2 the
    curve's misfit beyond it, the best linear estimate is curve + m^2 / (m^2 + e^2) (measured - curve): the curve
    where it fits, the measured gain where it does not (Efron & Morris 1975).
    """
    measured = np.array([point["gain"]["value"] for point in points])
    fitted = curve("ppo", run_fit["a"], run_fit["b"], np.sqrt(np.maximum([point["kl"] for point in points], 0.0)))
    widths = [p["gain"]["high"] - p["gain"]["low"] for p in points if p["gain"]["low"] is not None]
    noise = float(np.mean(np.square(widths))) / (2 * 1.96) ** 2 if widths else 0.0
    misfit = max(run_fit["rmse"] ** 2 - noise, 0.0)
    share = misfit / (misfit + noise) if misfit + noise > 0 else 1.0
    return [float(value) for value in fitted + share * (measured - fitted)]

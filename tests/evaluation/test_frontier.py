"""Best-of-n against all subsets, fits against curves that are known, and the checkpoint that is recommended."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from rlhf.evaluation import frontier


def by_subsets(proxy: list[float], values: list[float], n: int) -> float:
    """The definition: the mean over all subsets of n answers of what the one with the highest proxy is worth; ties share."""
    worth = []
    for subset in itertools.combinations(range(len(proxy)), n):
        top = max(proxy[i] for i in subset)
        best = [values[i] for i in subset if proxy[i] == top]
        worth.append(sum(best) / len(best))
    return sum(worth) / len(worth)


@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_best_of_n_is_the_mean_over_all_subsets(n: int) -> None:
    """An estimator that resamples with replacement, or that is off by one in the rank, is biased for every n above 1."""
    proxy = np.array([[0.3, -1.0, 2.0, 0.9, 0.1, 1.5], [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])
    gold = np.array([[1.0, 0.0, -3.0, 2.0, 7.0, 1.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]])
    found = frontier.best_of_n(proxy, gold, n)
    expected = [by_subsets(list(p), list(g), n) for p, g in zip(proxy, gold, strict=True)]
    assert found == pytest.approx(expected)


def test_answers_that_tie_share_what_they_are_worth() -> None:
    """Decided by the order in which the answers were sampled, a tie gives whatever gold came last. With two answers that
    tie at the top of three, all pairs but none contain one of them: (0 + 4) / 2 for the pair of both, 4 and 0 else."""
    proxy, gold = np.array([[1.0, 1.0, 0.0]]), np.array([[0.0, 4.0, 9.0]])
    assert frontier.best_of_n(proxy, gold, 2)[0] == pytest.approx((2 + 0 + 4) / 3)
    assert frontier.best_of_n(proxy[:, ::-1], gold[:, ::-1], 2)[0] == pytest.approx(2.0)
    assert frontier.best_of_n(np.zeros((1, 3)), gold, 3)[0] == pytest.approx(13 / 3), "all alike: the mean"


def test_best_of_n_of_a_number_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="from 1 to the 3 samples, got 4"):
        frontier.best_of_n(np.zeros((1, 3)), np.zeros((1, 3)), 4)


def test_kl_of_best_of_n() -> None:
    """log 4 - 3/4 = .6363 by hand; a sum over all n of the exact KL on a policy with no ties gives the same."""
    assert frontier.best_of_n_kl(1) == 0
    assert frontier.best_of_n_kl(4) == pytest.approx(0.636294, abs=1e-6)
    size, n = 20_000, 4  # equally likely answers, ranked: the best of n is at most rank i with probability (i / size)^n
    ranks = np.arange(1, size + 1) / size
    chosen = np.diff(np.concatenate([[0.0], ranks**n]))
    assert float((chosen * np.log(chosen * size)).sum()) == pytest.approx(frontier.best_of_n_kl(4), abs=1e-3)


def test_the_curve_doubles_n_and_has_intervals() -> None:
    """n that the samples do not reach, and a gold curve that is the proxy's."""
    generator = np.random.default_rng(0)
    proxy = generator.standard_normal((5, 6))
    lines = frontier.best_of_n_curve(proxy, {"minus": -proxy})
    assert [line["n"] for line in lines] == [1, 2, 4]
    assert lines[0]["score"]["value"] == pytest.approx(proxy.mean())
    assert lines[2]["gold"]["minus"]["value"] == pytest.approx(-lines[2]["score"]["value"])
    assert all(line["score"]["low"] < line["score"]["value"] < line["score"]["high"] for line in lines)


# Fits


def test_a_fit_finds_the_curve_that_made_the_points() -> None:
    """A log of the KL in place of its root's, or a b of the other sign: both fit well, and neither is Gao's."""
    kl = [0.5, 2.0, 8.0, 18.0, 32.0]
    gains = [math.sqrt(k) * (1.5 - 0.4 * math.log(math.sqrt(k))) for k in kl]
    found = frontier.fit("ppo", [0.0, *kl], [7.0, *gains])  # the point without KL says nothing of a curve through 0
    assert found is not None and (found["a"], found["b"]) == (pytest.approx(1.5), pytest.approx(0.4))
    assert found["points"] == 5 and found["rmse"] < 1e-9
    assert found["peak_kl"] == pytest.approx(math.exp(2 * (1.5 / 0.4 - 1)))
    gains = [math.sqrt(k) * (1.5 - 0.2 * math.sqrt(k)) for k in kl]
    found = frontier.fit("best_of_n", kl, gains)
    assert found is not None and (found["a"], found["b"]) == (pytest.approx(1.5), pytest.approx(0.2))
    assert found["peak_kl"] == pytest.approx((1.5 / 0.4) ** 2)


def test_the_peak_is_where_the_curve_is_highest() -> None:
    """A derivative taken by a tired hand: looked for on a grid instead."""
    kl = np.linspace(0.01, 60, 60_000)
    for form in frontier.FORMULAS:
        gains = frontier.curve(form, 1.0, 0.5, np.sqrt(kl))
        found = frontier.fit(form, kl[::500].tolist(), gains[::500].tolist())
        assert found is not None and found["peak_kl"] == pytest.approx(kl[gains.argmax()], abs=2e-3)
    assert frontier.curve("ppo", 1.0, 0.5, np.array([0.0])) == 0


def test_standard_errors_cover_the_truth() -> None:
    """Errors of another scale (variances, or not divided by the degrees of freedom): of 200 noisy runs about 68% of the
    estimates have to lie within one of them."""
    kl, inside, rmse = np.linspace(1, 40, 25), 0, []
    for seed in range(200):
        noise = np.random.default_rng(seed).normal(0, 0.2, len(kl))
        found = frontier.fit("ppo", kl.tolist(), (frontier.curve("ppo", 1.2, 0.5, np.sqrt(kl)) + noise).tolist())
        assert found is not None
        inside += (abs(found["a"] - 1.2) < found["a_error"]) + (abs(found["b"] - 0.5) < found["b_error"])
        rmse.append(found["rmse"] ** 2)
    assert np.mean(rmse) == pytest.approx(0.2**2, rel=0.05)
    assert 0.60 < inside / 400 < 0.76


def test_too_few_points_have_no_fit() -> None:
    """Two parameters go through two points exactly, with an error of 0 that means nothing."""
    assert frontier.fit("ppo", [1.0, 2.0, 0.0], [1.0, 2.0, 0.0]) is None
    assert frontier.fit("ppo", [2.0, 2.0, 2.0], [1.0, 2.0, 0.0]) is None


# The recommended checkpoint


def points_of(run: str, kl: np.ndarray, gold: np.ndarray, error: float) -> list[dict[str, Any]]:
    return [
        {
            "model": f"{run}:{i}",
            "run": run,
            "update": i,
            "kl": float(k),
            "gain": {"value": float(g), "low": float(g - 1.96 * error), "high": float(g + 1.96 * error)},
        }
        for i, (k, g) in enumerate(zip(kl, gold, strict=True))
    ]


def gold_fits(points: list[dict[str, Any]]) -> dict[str, Any]:
    fits = {}
    for run in {p["run"] for p in points}:
        own = [p for p in points if p["run"] == run]
        if found := frontier.fit("ppo", [p["kl"] for p in own], [p["gain"]["value"] for p in own]):
            fits[run] = found
    return fits


SHAPES = {
    "Gao's own form, over-optimised": lambda kl: frontier.curve("ppo", 1.4, 0.75, np.sqrt(kl)),
    "still rising at the end": lambda kl: frontier.curve("ppo", 1.0, 0.1, np.sqrt(kl)),
    "another form: a parabola in KL": lambda kl: 2.0 - ((kl - 12.0) / 12.0) ** 2,
    "a plateau": lambda kl: 2.0 * np.minimum(kl / 6.0, 1.0),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_recommended_checkpoint_is_within_2_percent_of_the_best(shape: str) -> None:
    """The measured maximum is the luckiest point, and a fit alone trusts its form. On synthetic gold with measuring errors of
    2% of its range, the true gold of the recommended checkpoint has to be within 2% of the best, averaged over 50 runs, and
    the last checkpoint of the over-optimised run must not be."""
    kl = np.linspace(0.3, 30, 30)
    truth = SHAPES[shape](kl)
    regrets = []
    for seed in range(50):
        error = 0.02 * float(np.ptp(truth))
        measured = truth + np.random.default_rng(seed).normal(0, error, len(kl))
        points = points_of("run", kl, measured, error)
        best = frontier.recommend(points, gold_fits(points), "gold")
        assert best is not None and best["model"] == f"run:{best['update']}"
        regrets.append(1 - truth[best["update"]] / truth.max())
    assert np.mean(regrets) < 0.02
    if "over-optimised" in shape:
        assert 1 - truth[-1] / truth.max() > 0.05, "the setting must be one where stopping late costs something"


def test_the_better_of_two_runs_is_recommended() -> None:
    """A choice within the first run only, or by KL."""
    kl = np.linspace(0.3, 30, 20)
    one = points_of("one", kl, frontier.curve("ppo", 1.0, 0.5, np.sqrt(kl)), 0.01)
    two = points_of("two", kl, frontier.curve("ppo", 1.2, 0.5, np.sqrt(kl)), 0.01)
    best = frontier.recommend([*one, *two], gold_fits([*one, *two]), "gold")
    assert best is not None and best["run"] == "two"
    assert best["gain"]["value"] == max(p["gain"]["value"] for p in two)
    assert frontier.recommend([], {}, "gold") is None


def test_points_are_drawn_to_the_curve_as_far_as_noise_explains_them() -> None:
    """By hand: points off the curve R = d by +.1 and -.1 and +.2, a fit with rmse .2. With a standard error of .2 noise explains
    all of it, and the curve is believed; with .1, m^2 = .04 - .01, three quarters of each distance stay; with none, all."""
    kl, measured = np.array([1.0, 4.0, 9.0]), np.array([1.1, 1.9, 3.2])
    found = {"a": 1.0, "b": 0.0, "rmse": 0.2}
    assert frontier.smoothed(points_of("run", kl, measured, 0.2), found) == pytest.approx([1, 2, 3])
    assert frontier.smoothed(points_of("run", kl, measured, 0.1), found) == pytest.approx([1.075, 1.925, 3.15])
    assert frontier.smoothed(points_of("run", kl, measured, 0.0), found) == pytest.approx(list(measured))
    alone = [{**point, "gain": {**point["gain"], "low": None}} for point in points_of("run", kl, measured, 0.1)]
    assert frontier.smoothed(alone, found) == pytest.approx(list(measured)), "a single prompt says nothing of its noise"


def test_a_curve_cannot_recommend_a_point_that_was_measured_to_be_bad() -> None:
    """A run that collapsed: the smooth curve still passes high above the points behind the fall."""
    kl = np.array([1.0, 4.0, 9.0, 16.0, 25.0])
    points = points_of("run", kl, np.array([1.0, 2.0, 3.0, 4.0, 0.2]), 0.02)
    best = frontier.recommend(points, {"run": {"a": 1.0, "b": 0.0, "rmse": 2.8}}, "gold")
    assert best is not None and (best["update"], best["gold"]) == (3, "gold")

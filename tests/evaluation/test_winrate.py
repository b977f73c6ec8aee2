"""Win rates by hand, and length control against effects that are known."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf.evaluation.winrate import Preferences, by_scores, length_controlled, sign_test, win_rate


def preferences(won: list[float], prompt: list[int] | None = None, longer: list[float] | None = None) -> Preferences:
    return Preferences(
        won=np.array(won),
        prompt=np.array(prompt if prompt is not None else range(len(won))),
        longer=np.array(longer if longer is not None else [0.0] * len(won)),
    )


def test_a_tie_is_half_a_win() -> None:
    """Ties that count as losses make a policy lose against itself."""
    assert by_scores(np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 2.0])).tolist() == [0, 0.5, 1]
    found = win_rate(preferences([1, 1, 0.5, 0, 0.75]))
    assert found["value"] == pytest.approx(3.25 / 5)
    assert (found["wins"], found["ties"], found["losses"], found["pairs"]) == (3, 1, 1, 5)


def test_the_sign_test_is_over_prompts() -> None:
    """Pairs of one prompt are one piece of evidence. Six prompts, five won and one tied: p = 2 / 2^5 by hand; of the twelve
    pairs taken one by one it would be far smaller."""
    won = [1, 1, 1, 1, 1, 1, 1, 1, 1, 0.5, 1, 0]
    found = sign_test(preferences(won, prompt=[0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]))
    assert found == {"wins": 5, "losses": 0, "ties": 1, "p": pytest.approx(2 / 32)}
    assert sign_test(preferences([0.5, 0.5]))["p"] is None, "nothing but ties: nothing to test"


def test_the_interval_is_over_prompts() -> None:
    """40 pairs of two prompts, one won and one lost: anything from 0 to 1 is possible for the next prompt."""
    found = win_rate(preferences([1] * 20 + [0] * 20, prompt=[0] * 20 + [1] * 20))
    assert (found["low"], found["high"]) == (0, 1)
    assert win_rate(preferences([1, 0], prompt=[0, 0]))["low"] is None, "one prompt says nothing of others"


def judged(quality: float, length: float, seed: int = 0, count: int = 1500) -> Preferences:
    """Verdicts with P(win) = sigmoid(quality + length tanh(d / s)), of a policy whose answers are 10 tokens longer."""
    generator = np.random.default_rng(seed)
    longer = generator.normal(10, 10, count)
    p = 1 / (1 + np.exp(-(quality + length * np.tanh(longer / longer.std()))))
    return preferences((generator.random(count) < p).astype(float).tolist(), longer=longer.tolist())


def test_a_judge_that_likes_length_is_corrected() -> None:
    """A policy that is no better but longer wins two thirds of the pairs; at equal length it wins half of them. And one that is
    better at equal length keeps what it has earned: sigmoid(1) = .731."""
    only_longer = judged(0.0, 1.5)
    assert only_longer.won.mean() > 0.65
    found = length_controlled(only_longer)
    assert found is not None and found["value"] == pytest.approx(0.5, abs=0.05)
    assert found["low"] is not None and found["high"] is not None and found["low"] < 0.5 < found["high"]
    better = length_controlled(judged(1.0, 0.0))
    assert better is not None and better["value"] == pytest.approx(0.731, abs=0.04)


def test_ties_count_half_in_the_regression() -> None:
    """A judge of ties alone prefers neither, whatever the lengths; rounded to a win it would give 1."""
    found = length_controlled(preferences([0.5] * 8, longer=[1, 5, -3, 2, 8, -1, 0, 4]))
    assert found is not None and found["value"] == pytest.approx(0.5, abs=1e-3)


def test_length_control_where_there_is_nothing_to_fit() -> None:
    """A perfect record has no finite coefficient, and equal lengths have no slope."""
    perfect = length_controlled(preferences([1] * 6, longer=[1, 2, 3, 4, 5, 6]))
    assert perfect == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert length_controlled(preferences([1, 0, 1], longer=[2, 2, 2])) is None
    assert length_controlled(preferences([])) is None
    assert win_rate(preferences([]))["value"] is None


def test_length_that_tells_winners_from_losers_is_no_crash() -> None:
    """Separable data, where an unpenalised slope runs away: the longer answer wins each time, and half are longer."""
    found = length_controlled(preferences([1, 0] * 20, longer=[5, -5] * 20))
    assert found is not None and found["value"] == pytest.approx(0.5, abs=0.01)

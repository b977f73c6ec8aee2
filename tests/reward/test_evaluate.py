"""What a reward model is worth: accuracies worked out by hand, and a toy model that learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from toys import Call

from rlhf.errors import UserError
from rlhf.evaluation.gold import vader
from rlhf.registry import Registry
from rlhf.reward.evaluate import comparison_figures, load_function, pair_accuracy


def accuracy(scores: list[float], verdict: list[float], prompt: list[int], minimum: float = 0.0) -> float | None:
    return pair_accuracy(torch.tensor(scores), torch.tensor(verdict), torch.tensor(prompt), minimum)


def test_pair_accuracy_by_hand() -> None:
    """Three answers, three pairs: (3,2) and (3,1) are right, (2,1) is wrong."""
    assert accuracy([0.1, 0.0, 0.9], [1.0, 2.0, 3.0], [0, 0, 0]) == pytest.approx(2 / 3)
    assert accuracy([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [0, 0, 0]) == 1.0
    assert accuracy([3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [0, 0, 0]) == 0.0


def test_ties() -> None:
    """A model that scores everything alike must get a half: as wins its accuracy would be perfect. Ties of the verdict
    are no pairs at all."""
    assert accuracy([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], [0, 0, 0]) == 0.5
    assert accuracy([0.0, 9.0, 1.0], [1.0, 1.0, 2.0], [0, 0, 0]) == 0.5
    assert accuracy([0.0, 1.0], [1.0, 1.0], [0, 0]) is None


def test_pairs_of_one_prompt_only() -> None:
    """Scores of answers to different prompts are not compared: here all such pairs would be wrong."""
    assert accuracy([0.0, 1.0, -9.0, -8.0], [0.0, 1.0, 2.0, 3.0], [0, 0, 1, 1]) == 1.0


def test_minimum_difference() -> None:
    """Pairs nearer than the minimum are noise; a difference of exactly the minimum counts."""
    assert accuracy([2.0, 1.0, 3.0], [0.0, 0.5, 1.0], [0, 0, 0], 1.0) == 1.0
    assert accuracy([2.0, 1.0, 3.0], [0.0, 0.5, 1.0], [0, 0, 0], 0.0) == pytest.approx(2 / 3)
    assert accuracy([2.0, 1.0], [0.0, 0.5], [0, 0], 1.0) is None


ROWS = {
    "responses": [
        [[{"role": "assistant", "content": text}] for text in ("bad", "good", "fine")],
        [[{"role": "assistant", "content": text}] for text in ("dull", "great")],
    ],
    "ratings": [[0.0, 2.0, 1.0], [0.0, 2.0]],
    # The other half of the raters: of the first half's pairs (good, bad), (good, fine), (fine, bad), (great, dull) they
    # turn (good, fine) round.
    "ratings_held_out": [[0.0, 1.0, 2.0], [0.0, 2.0]],
}


def test_comparison_figures_by_hand() -> None:
    """Ceiling and accuracy mixed up: the ceiling is how the raters trained on predict the others, not how the model does."""
    seen: list[str] = []

    def gold(texts: list[str]) -> list[float]:
        seen.extend(texts)
        return [0.0, 1.0, 2.0, 1.0, 0.0]  # wrong on (good, fine) and on (great, dull)

    scores = torch.tensor([0.0, -1.0, 1.0, 0.0, 1.0])  # right on (fine, bad) and (great, dull) of the first half
    figures = comparison_figures(ROWS, scores, 1.0, gold)  # type: ignore[arg-type]
    assert seen == ["bad", "good", "fine", "dull", "great"]
    assert figures == {
        "accuracy": 2 / 4,
        "pairs": 4,
        "accuracy_held_out_raters": 3 / 4,  # for them (fine, good) is right, and (good, bad) still wrong
        "human_ceiling": 3 / 4,
        "gold_accuracy": 2 / 4,
    }


def test_comparison_figures_without_second_raters_or_gold() -> None:
    """Data with one set of ratings: the figures have to be there and empty, not missing, and not 0."""
    rows = {name: column for name, column in ROWS.items() if name != "ratings_held_out"}
    figures = comparison_figures(rows, torch.zeros(5), 1.0, None)  # type: ignore[arg-type]
    assert figures == {
        "accuracy": 0.5,
        "pairs": 4,
        "accuracy_held_out_raters": None,
        "human_ceiling": None,
        "gold_accuracy": None,
    }


def test_load_function() -> None:
    """`package.module:function`, as entry points are written."""
    assert load_function("rlhf.evaluation.gold:vader") is vader
    assert load_function("math:sqrt")(9) == 3


@pytest.mark.parametrize("path", ["no_such_module:f", "math:no_such_function", "math", "math:", ":sqrt", "", "math.sqrt", "math:pi"])  # noqa: E501  # fmt: skip
def test_load_function_errors(path: str) -> None:
    """A misspelt scorer as a traceback, or one that is no function and fails after the training."""
    with pytest.raises(UserError, match=r"package\.module:function"):
        load_function(path)


def test_toy_reward_model_learns(
    call: Callable[..., Call], finished: tuple[Path, Path], toy_config: Path, tmp_path: Path
) -> None:
    """The whole stage with one sign wrong, a head that gets no gradient, or a base that is not the SFT policy learns nothing:
    'good' and 'great' beat 'bad' and 'awful' on held-out prompts in nine pairs of ten, or something is broken."""
    import shutil

    shutil.copytree(finished[0] / "sft", tmp_path / "registry" / "sft")
    places = ["--registry", tmp_path / "registry", "--output_dir", tmp_path / "out", "--wandb_mode", "disabled"]
    length = ["--max_steps", "60", "--eval_steps", "60", "--save_steps", "60", "--lora_r", "8"]
    done = call("rlhf.stages.reward", "--config", toy_config / "reward.yaml", *places, *length)
    assert done.code == 0, done.err[-3000:]
    metrics = Registry(tmp_path / "registry").get("reward/toy").manifest.metrics
    assert metrics["pairs"] >= 20
    assert metrics["accuracy"] > 0.9 and metrics["accuracy_held_out_raters"] > 0.9
    assert metrics["human_ceiling"] == 1.0

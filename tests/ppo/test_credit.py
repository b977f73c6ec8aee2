"""Advantage estimators: what the trainer gives them, and one without values."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from ppo.conftest import Make
from ppo.test_trainer import weights

from rlhf.ppo import forward
from rlhf.ppo import functional as F
from rlhf.ppo.credit import Credit
from rlhf.ppo.types import Rollout


class Rloo:
    """Each response's score less the mean of the others to its prompt (Ahmadian et al. 2024), the KL in the score."""

    needs_values: ClassVar[bool] = False

    def __call__(self, rollout: Rollout, *, kl_coef: float) -> Credit:
        scores = rollout.scores - kl_coef * rollout.kl
        _, group, size = rollout.prompt.unique(return_inverse=True, return_counts=True)
        total = torch.zeros(len(size), dtype=scores.dtype).index_add(0, group, scores)[group]
        baseline = (total - scores) / (size[group] - 1)
        return Credit(advantages=(scores - baseline)[:, None] * rollout.mask, metrics={"ppo/baseline": 1.0})


def test_rollouts_know_which_prompt_a_row_answers(make: Make) -> None:
    """Catches: numbers within the rollout, of another prompt, or in the order of another stream."""
    trainer = make(num_responses_per_prompt=2, rollout_batch_size=8, total_episodes=24, minibatch_size=8)
    for update in range(3):
        trainer.state.updates_done = update
        rollout, _ = trainer.collect()
        for number, prompt, mask in zip(rollout.prompt, rollout.prompts, rollout.prompt_mask, strict=True):
            assert prompt[mask].tolist() == trainer.environment.prompts[int(number)]
        assert torch.equal(rollout.prompt[::2], rollout.prompt[1::2])


@pytest.mark.parametrize("value_model", ["adapter", "shared_trunk"])
def test_an_estimator_without_values_trains_the_policy_alone(
    value_model: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a value model that is run or trained though nobody reads it, and credit that is made anywhere but in the
    estimator."""

    def refuse(*args: Any) -> None:
        raise AssertionError("values were computed")

    monkeypatch.setattr(forward, "token_values", refuse)
    monkeypatch.setattr(forward, "logprobs_and_values", refuse)
    monkeypatch.setattr(F, "gae", refuse)
    options = {"num_responses_per_prompt": 4, "rollout_batch_size": 8, "total_episodes": 16, "minibatch_size": 8}
    trainer = make("llama", value_model=value_model, weight_decay=0.1, **options)
    trainer.estimator = Rloo()
    start = weights(trainer.models)
    metrics = trainer.step()
    assert metrics["ppo/baseline"] == 1.0 and "ppo/explained_variance" not in metrics
    assert metrics["ppo/grad_norm"] > 0 and metrics["ppo/value_loss"] == metrics["ppo/value_grad_norm"] == 0
    moved = {name for name, tensor in weights(trainer.models).items() if not torch.equal(tensor, start[name])}
    assert moved == trainer.models.trainable("policy").keys()

"""Held-out prompts of a PPO run: their answers before, during and after the training, and what is logged of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.base import distributed
from rlhf.base.functions import GoldFunction
from rlhf.config import PPOConfig
from rlhf.data_prep.load import Loaded
from rlhf.evaluation.policy import PolicyEvaluation, evaluate_policy
from rlhf.models.roles import RoleModels
from rlhf.models.tokenization import last_user_text
from rlhf.ppo.rollout import SamplingOptions
from rlhf.reward.sources import Reward
from rlhf.stages.run import Run

#: Held-out prompts whose answers before and after are shown side by side.
COMPARED_PROMPTS = 20


@dataclass(kw_only=True)
class HeldOut:
    """Samples and scores answers to held-out prompts; training stays what it was, as all random numbers are its own."""

    run: Run[PPOConfig]
    models: RoleModels
    tokenizer: PreTrainedTokenizerBase
    data: Loaded
    prompts: list[list[int]]
    """Token ids of the prompts in `data`."""
    reward: Reward
    gold: GoldFunction | None

    def evaluate(self, *, reference: bool, count: int | None = None) -> PolicyEvaluation:
        """Return answers of the policy or the SFT reference, with their scores and figures.

        Args:
            count: the first few prompts; default: as many answers as are compared before and after the training.
        """
        config, total = self.run.config, len(self.prompts)
        chosen = [i % total for i in range(count or max(config.num_eval_samples, min(total, COMPARED_PROMPTS)))]
        with self.run.timer.phase("evaluate"):
            return evaluate_policy(
                self.models,
                self.tokenizer,
                [self.prompts[i] for i in chosen],
                [self.data.rows[i] for i in chosen],
                SamplingOptions.of(config, self.tokenizer),
                self.reward,
                reference=reference,
                batch_size=config.microbatch,
                batch_tokens=config.microbatch_tokens,
                gold=self.gold,
                seed=config.seed + 7,
            )

    @property
    def prompts_logged(self) -> int:
        """Number of prompts of which metrics are logged: the same ones before, during and after the training."""
        config, total = self.run.config, len(self.prompts)
        return min(config.num_eval_prompts, total, max(config.num_eval_samples, COMPARED_PROMPTS))

    def watch(self, update: int) -> None:
        """Evaluate the policy and log its metrics, if an evaluation is due after this update."""
        config = self.run.config
        if config.eval_steps and update % config.eval_steps == 0 and update < config.num_updates:
            self.log(update, self.evaluate(reference=False, count=self.prompts_logged))

    def log(self, update: int, evaluation: PolicyEvaluation) -> None:
        """Log the metrics of an evaluation of the policy as it was after this update."""
        episodes = float(update * self.run.config.rollout_batch_size)
        self.run.tracker.log({**evaluation.metrics(self.prompts_logged), "episodes": episodes}, update)

    def log_comparison(self, sft: PolicyEvaluation, ppo: PolicyEvaluation) -> None:
        """Log the final metrics, and write the answers before and after side by side for the report."""
        config = self.run.config
        self.log(config.num_updates, ppo)
        rows = [
            {
                "prompt": last_user_text(self.data.rows[i]["prompt"]),
                "sft_response": sft.answers.texts[i],
                "ppo_response": ppo.answers.texts[i],
                "sft_score": float(sft.scores[i]),
                "ppo_score": float(ppo.scores[i]),
            }
            for i in range(min(len(self.prompts), COMPARED_PROMPTS))
        ]
        if distributed.rank() == 0:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (self.run.folder / "comparison.jsonl").write_text(lines, encoding="utf-8")
        self.run.tracker.log_table("ppo/comparison", rows, config.num_updates, texts=True)


def before_and_after(sft: PolicyEvaluation, ppo: PolicyEvaluation) -> dict[str, Any]:
    """Return the figures of two evaluations by the names of a manifest; the KL is that of the second."""
    figures: dict[str, Any] = {"kl": ppo.figures["kl"]}
    for name in sft.figures:
        if name != "kl":
            figures[f"{name}_before"], figures[f"{name}_after"] = sft.figures[name], ppo.figures[name]
    return figures

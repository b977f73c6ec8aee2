"""Options of PPO."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rlhf.base.errors import require
from rlhf.config.limits import divides, require_above_zero, require_at_least
from rlhf.config.options import StageConfig, TextConfig, option

#: Fewest responses that reward whitening can estimate a spread from (lm-human-preferences, train_policy.py).
MIN_WHITENED = 8
#: Most responses of a pass on a CPU that were not asked for: larger products are no faster there.
CPU_MICROBATCH = 32
#: Names of reward models in the registry, `reward/NAME` or `reward/NAME@VERSION`.
REGISTERED_REWARD = r"reward/[^/:]+"


@dataclass(kw_only=True)
class PPOConfig(TextConfig, StageConfig):
    """PPO against a reward model, with a KL penalty to the SFT reference."""

    GROUPS: ClassVar = {
        "policy": "model", "reward": "reward", "total_episodes": "optimisation", "microbatch_size": "computing",
        "sampler": "sampling", "num_ppo_epochs": "optimisation", "max_prompt_length": "sampling",
        "kl_coef": "KL penalty", "reward_clip": "reward", "value_warmup_updates": "optimisation",
        "finetuning": "model", "value_learning_rate": "optimisation", "ptx_coef": "PPO-ptx",
        "missing_eos_penalty": "reward", "snapshot_steps": "places and checkpoints", "num_eval_samples": "evaluation",
        "num_logged_samples": "logging", "gold": "evaluation",
    }  # fmt: skip

    policy: str = option("the SFT policy: sft/NAME or sft/NAME@VERSION; default: the one of this run's name", "")
    reward: list[str] = option(
        "one or several scorers of responses: a reward model trained from the same policy (reward/NAME or "
        "reward/NAME@VERSION), a classifier (folder or hub name), package.module:function, or the URL of an endpoint; default: "
        "the reward model of this run's name",
        [],
    )
    reward_weights: list[float] = option("weights of the rewards in their sum; default: 1 each", [])
    reward_timeout: float = option("longest time for a request to an endpoint, seconds", 60.0)
    total_episodes: int = option("responses sampled in the whole run", 1280)
    rollout_batch_size: int = option("responses sampled for one update cycle", 64)
    minibatch_size: int = option("responses per optimiser update; divides rollout_batch_size", 64)
    microbatch_size: int | Literal["auto"] = option(
        "responses per forward/backward pass; divides minibatch_size; auto: as many as fit into a GPU's memory, on a CPU 32 at "
        "most",
        "auto",
    )
    microbatch_tokens: int | None = option(
        "tokens per forward/backward pass (responses times the longest, prompts included); none: microbatch_size alone",
        None,
    )
    offload_base: bool = option(
        "keep the frozen base in main memory and copy each layer to the GPU for its computation; slow, needs "
        "gradient_checkpointing",
        False,
    )
    sampler: Literal["auto", "loop", "compiled", "generate"] = option(
        "sampling code: loop is our own, compiled is loop with recorded steps (CUDA graphs on a GPU, torch.compile on a CPU), "
        "generate is transformers'; auto is compiled on a GPU, loop on a CPU, and generate for models that these do not support",
        "auto",
    )
    merge_adapter: bool = option(
        "sample from a copy of the weights that has the adapter merged in; false keeps them apart: slower, without rounding "
        "the sum to the base's dtype",
        True,
    )
    num_ppo_epochs: int = option("passes over each rollout", 1)
    max_prompt_length: int = option("longest prompt, tokens; longer ones are refused", 512)
    response_length: int = option("longest response, tokens, stop token included", 48)
    stop_strings: list[str] = option(
        "texts that end a response, besides the stop token of the chat template; kept in the response", []
    )
    temperature: float = option("sampling temperature; divides policy, old and reference logits alike", 1.0)
    num_responses_per_prompt: int = option("responses sampled for each prompt; divides rollout_batch_size", 1)
    kl_coef: float = option("penalty per nat of log pi - log pi_ref on sampled tokens, in units of the score", 0.1)
    kl_target: float | None = option(
        "target of an adaptive kl_coef: KL, nats per response (Ziegler et al. 2019: 6); none keeps kl_coef fixed", None
    )
    kl_horizon: int = option(
        "responses over which an adaptive kl_coef changes; a relative error counts 0.2 at most", 10_000
    )
    max_approx_kl: float | None = option(
        "end a rollout's updates early once approx_kl, nats per token, exceeds this (OpenAI Spinning Up: 0.01 or 0.05)",
        None,
    )
    max_kl: float | None = option("largest KL to the reference (exact), nats per response, of a rollout", None)
    on_max_kl: Literal["stop", "roll_back"] = option(
        "action above max_kl: stop, or go back to the last good checkpoint with half the step size (three times at most)",
        "stop",
    )
    reward_clip: float | None = option("clip scores to +- this, in units of the score, before the KL penalty", None)
    whiten_rewards: bool = option(
        "scale the token rewards of a rollout to standard deviation 1, keeping their mean", False
    )
    value_warmup_updates: int = option("rollouts at the start that train the value model only", 0)
    ema_decay: float | None = option(
        "decay per optimiser update of a moving average of the policy, registered as NAME-ema (InstructGPT: 0.992)",
        None,
    )
    gamma: float = option("discount of later rewards (InstructGPT: none, 1)", 1.0)
    lam: float = option("lambda of generalised advantage estimation", 0.95)
    clip_range: float = option("clip the probability ratio to 1 +- this", 0.2)
    clip_range_value: float = option("clip values to the old value +- this, in units of the score", 0.2)
    vf_coef: float = option("weight of the value loss", 0.5)
    finetuning: Literal["lora", "full"] = option(
        "lora: adapters on one frozen base; full: all weights of policy and value model, four models in fp32", "lora"
    )
    value_model: Literal["adapter", "shared_trunk"] = option(
        "adapter: separate weights; shared_trunk: a head on the policy, faster, but both losses train one trunk",
        "adapter",
    )
    value_learning_rate: float | None = option("step size of the value adapter and head; default: learning_rate", None)
    ptx_coef: float = option(
        "PPO-ptx: weight of the language-modelling loss on texts mixed into each update (InstructGPT: 27.8)", 0.0
    )
    ptx_dataset: str | None = option("demonstrations for PPO-ptx; default: those of dataset", None)
    ptx_text: str | None = option(
        "plain text for PPO-ptx in place of demonstrations, packed: any dataset that pretraining takes", None
    )
    ptx_ratio: float = option("texts mixed in per response of a minibatch (InstructGPT: 8)", 1.0)
    missing_eos_penalty: float = option("subtracted from the score of a response without a stop token", 1.0)
    min_response_length: int = option("responses with fewer tokens get the short_response_penalty", 0)
    short_response_penalty: float = option("subtracted from the score for each token below min_response_length", 0.0)
    snapshot_steps: int | None = option(
        "rollouts between saved snapshots of the policy's adapter, for the reward-KL frontier of rlhf.evaluation; none saves "
        "none",
        None,
    )
    num_eval_samples: int = option("responses to held-out prompts sampled before and after training", 256)
    eval_steps: int = option(
        "rollouts between evaluations on held-out prompts during training; 0 evaluates before and after it only", 10
    )
    num_eval_prompts: int = option("held-out prompts of each evaluation during training, always the first ones", 32)
    num_logged_samples: int = option("responses of each logged rollout in the sample table", 8)
    gold: str | None = option(
        "scorer that the policy is not trained on: package.module:function(responses) -> scores", None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.policy = self.policy or f"sft/{self.name}"
        self.reward = self.reward or [f"reward/{self.name}"]
        divides("rollout_batch_size", self.rollout_batch_size, "total_episodes", self.total_episodes)
        divides("minibatch_size", self.minibatch_size, "rollout_batch_size", self.rollout_batch_size)
        divides("microbatch_size", self.microbatch, "minibatch_size", self.minibatch_size)
        require(0 <= self.gamma <= 1, f"gamma must be between 0 and 1, got {self.gamma}")
        require(0 <= self.lam <= 1, f"lam must be between 0 and 1, got {self.lam}")
        require_above_zero(self, "temperature", "reward_timeout", "clip_range", "clip_range_value")
        require_above_zero(self, "kl_target", "max_approx_kl", "max_kl", "reward_clip")
        require_at_least(1, self, "num_ppo_epochs", "max_prompt_length", "response_length", "kl_horizon")
        require_at_least(1, self, "num_eval_prompts")
        require_at_least(0, self, "kl_coef", "vf_coef", "value_learning_rate", "value_warmup_updates")
        require_at_least(0, self, "min_response_length", "num_eval_samples", "eval_steps", "num_logged_samples")
        require(
            not self.reward_weights or len(self.reward_weights) == len(self.reward),
            f"reward_weights has {len(self.reward_weights)} numbers for {len(self.reward)} rewards; give one for each",
        )
        require(
            sum(map(is_registered_reward, self.reward)) <= 1,
            f"only one reward may come from the registry, as they share one base; got {', '.join(self.reward)}",
        )
        divides(
            "num_responses_per_prompt", self.num_responses_per_prompt, "rollout_batch_size", self.rollout_batch_size
        )
        require(self.kl_target is None or self.kl_coef > 0, "kl_target needs a kl_coef above 0, which it multiplies")
        require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            f"ema_decay must be between 0 and 1, both excluded, got {self.ema_decay}",
        )
        require(
            not self.whiten_rewards or self.rollout_batch_size >= MIN_WHITENED,
            f"whiten_rewards needs a rollout_batch_size of at least {MIN_WHITENED}, got {self.rollout_batch_size}: "
            "fewer scores give no reliable standard deviation",
        )
        self._check_models()
        self._check_ptx()

    def _check_models(self) -> None:
        """Raise `UserError` for combinations of options that the models cannot be held or trained with."""
        require(
            self.value_model == "adapter" or self.value_warmup_updates == 0,
            "value_warmup_updates needs value_model adapter: on a shared trunk the value loss would train the policy",
        )
        require(
            self.finetuning == "lora" or self.quantization == "none",
            f"finetuning full cannot train weights in {self.quantization}; use finetuning lora",
        )
        require(
            self.snapshot_steps is None or (self.snapshot_steps >= 1 and self.finetuning == "lora"),
            f"snapshot_steps must be at least 1, got {self.snapshot_steps}, and needs finetuning lora: a whole model every few "
            "rollouts would fill the disk",
        )
        require_at_least(1, self, "microbatch_tokens")
        require(
            not self.offload_base or (self.gradient_checkpointing and self.finetuning == "lora"),
            "offload_base needs finetuning lora and gradient_checkpointing, without which the backward pass holds all layers",
        )
        require(
            not self.offload_base or (self.quantization == "none" and not self.use_dora),
            "offload_base supports plain weights only; leave out quantization and use_dora",
        )

    def _check_ptx(self) -> None:
        """Raise `UserError` for options of PPO-ptx that contradict each other."""
        require(
            not (self.ptx_text and self.ptx_dataset), "PPO-ptx takes ptx_dataset or ptx_text, not both; leave one out"
        )
        require_at_least(0, self, "ptx_coef")
        for name in ("ptx_text", "ptx_dataset"):
            require(
                self.ptx_coef > 0 or getattr(self, name) is None,
                f"{name} is not used without a ptx_coef above 0 (InstructGPT: 27.8); set it, or leave {name} out",
            )
        require(
            self.ptx_coef == 0 or round(self.minibatch_size * self.ptx_ratio) >= 1,
            f"ptx_ratio {self.ptx_ratio} mixes no text into a minibatch of {self.minibatch_size}; raise it",
        )

    def recipe(self) -> dict[str, Any]:
        """Return the options that decide the result, with the names of rewards that are no artefacts."""
        shared = {
            k: v for k, v in super().recipe().items() if k != "eval_steps"
        }  # it decides what is logged and no more
        return {**shared, "other_rewards": [r for r in self.reward if not is_registered_reward(r)]}

    @property
    def microbatch(self) -> int:
        """Responses of a pass; with `auto`, those of a CPU."""
        return self.divisor(CPU_MICROBATCH) if self.microbatch_size == "auto" else self.microbatch_size

    def divisor(self, most: int) -> int:
        """Return the largest divisor of minibatch_size that is at most this, and at least 1."""
        return next(n for n in range(max(min(most, self.minibatch_size), 1), 0, -1) if self.minibatch_size % n == 0)

    @property
    def num_updates(self) -> int:
        """Number of rollouts in the run."""
        return self.total_episodes // self.rollout_batch_size


def is_registered_reward(name: str) -> bool:
    """Return whether a reward's name is one of the registry's; `rlhf.reward.sources` has the other kinds."""
    return re.fullmatch(REGISTERED_REWARD, name) is not None

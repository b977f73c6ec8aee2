"""All runs of the benchmark: the clean ones, defined here, the faults tuned on and those held out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from faults.held_out import HELD_OUT
from faults.patching import Fault
from faults.tuned import TUNED

Group = Literal["clean", "tuned", "held_out"]

#: Options of all stages in the toy world.
SHARED: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "optim": "adamw_torch", "wandb_mode": "disabled", "lora_r": 8, "lora_alpha": 16,
    "warmup_steps": 4,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "sft": {
        "chat_template": "chatml", "max_steps": 60, "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1,
        "eval_steps": 30, "save_steps": 30, "learning_rate": 5e-3, "max_length": 64,
    },
    "reward": {
        "max_steps": 100, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "eval_steps": 50,
        "save_steps": 50, "learning_rate": 4e-3, "response_length": 24, "card_policy_samples": 8,
        "card_likelihood_responses": 16, "card_probe_answers": 2,
    },
    "ppo": {
        "rollout_batch_size": 32, "minibatch_size": 8, "microbatch_size": 8, "response_length": 28, "learning_rate": 2e-3,
        "warmup_steps": 4, "kl_coef": 0.05, "num_eval_samples": 20, "save_steps": 1000, "gold": "faults.world:judge",
    },
}  # fmt: skip
#: Size and seed of the worlds, each a base model with data, an SFT policy and a reward model.
WORLDS = [(size, seed) for size in ("small", "wide") for seed in (0, 1)]
#: Settings of clean runs, each in every world.
CLEAN: dict[str, dict[str, dict[str, Any]]] = {
    "sft": {
        "plain": {},
        "bf16": {"dtype": "bfloat16"},
        "8bit": {"optim": "adamw_8bit"},
    },
    "reward": {
        "plain": {},
        "bf16": {"dtype": "bfloat16"},
        "8bit": {"optim": "adamw_8bit"},
        "full": {"finetuning": "full", "learning_rate": 4e-4},
    },
    "ppo": {
        "plain": {},
        "large_rollouts": {"rollout_batch_size": 64, "minibatch_size": 16},
        "two_epochs": {"num_ppo_epochs": 2, "learning_rate": 1e-3},
        "kl_target": {"kl_target": 3.0, "kl_horizon": 500},
        "function_reward": {"reward": ["faults.world:mood"], "value_warmup_updates": 3},
        "shared_trunk": {"value_model": "shared_trunk"},
        "bf16": {"dtype": "bfloat16"},
        "8bit": {"optim": "adamw_8bit"},
        "full": {"finetuning": "full", "learning_rate": 2e-4},
        "ptx": {"ptx_coef": 1.0},
        "four_responses": {"num_responses_per_prompt": 4},
    },
}
#: Values of PYTHONHASHSEED over which the clean runs go in turn; faults have the first.
HASH_SEEDS = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run."""

    name: str
    group: Group
    size: str
    seed: int
    stage: str
    options: dict[str, Any] = field(default_factory=dict)
    fault: Fault | None = None
    hash_seed: int = HASH_SEEDS[0]

    def answer(self) -> dict[str, Any]:
        """Return what is right about the run, as its folder holds it."""
        fault = self.fault
        told: dict[str, Any] = {}
        if fault is not None:
            told = {
                "what": fault.what, "kind": fault.kind, "causes": list(fault.causes), "words": list(fault.words),
            }  # fmt: skip
        place = {"stage": self.stage, "size": self.size, "seed": self.seed, "hash_seed": self.hash_seed}
        return {"name": self.name, "group": self.group, **place, **told, "options": self.options}


def cases() -> list[Case]:
    """Return all runs, clean ones first: their SFT and reward models are what the faults are put into."""
    clean = [
        (stage, kind, options, size, seed)
        for stage, settings in CLEAN.items()
        for kind, options in settings.items()
        for size, seed in WORLDS
    ]
    runs = [
        Case(
            name=f"clean_{stage}_{kind}_{size}_{seed}", group="clean", size=size, seed=seed, stage=stage, options=options,
            # parents of other runs have the first hash seed, as what is built on them
            hash_seed=HASH_SEEDS[0] if kind == "plain" and stage != "ppo" else HASH_SEEDS[number % len(HASH_SEEDS)],
        )
        for number, (stage, kind, options, size, seed) in enumerate(clean)
    ]  # fmt: skip
    groups: list[tuple[Group, tuple[Fault, ...]]] = [("tuned", TUNED), ("held_out", HELD_OUT)]
    for group, faults in groups:
        for fault, (size, seed) in zip(faults, WORLDS * len(faults), strict=False):
            runs.append(
                Case(
                    name=fault.name,
                    group=group,
                    size=size,
                    seed=seed,
                    stage=fault.stage,
                    options=fault.options,
                    fault=fault,
                )
            )
    return runs


def parent(stage: str, size: str, seed: int) -> Case:
    """Return the clean run of a stage on whose artefact later stages of a world build."""
    return next(case for case in cases() if case.name == f"clean_{stage}_plain_{size}_{seed}")

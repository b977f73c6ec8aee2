"""Every limit of an option: a case just inside, a case just outside, and none that has no case."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import re
import traceback
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from rlhf.base.errors import UserError
from rlhf.config import (
    EvaluationConfig,
    PPOConfig,
    PretrainConfig,
    RewardCardConfig,
    RewardConfig,
    SFTConfig,
    limits,
    parse_config,
)

NEW_TOKENS = "tokens.txt"
CHECKED: dict[Any, list[str]] = {
    SFTConfig: ["--name", "n", "--dataset", "d", "--model_name_or_path", "m"],
    PPOConfig: ["--name", "n", "--dataset", "d", "--policy", "sft/a", "--reward", "reward/a"],
    PretrainConfig: ["--name", "n", "--dataset", "d"],
    RewardConfig: ["--name", "n", "--dataset", "d", "--policy", "sft/a"],
    RewardCardConfig: ["--model", "reward/a", "--dataset", "d"],
    EvaluationConfig: ["--models", "sft/a", "--dataset", "p"],
}
SMALLEST = {
    0: "learning_rate weight_decay adam_epsilon warmup_steps audit_steps learn_tokens kl_coef vf_coef "
    "value_learning_rate value_warmup_updates min_response_length num_eval_samples num_logged_samples ptx_coef "
    "num_samples best_of eval_rating_difference min_rating_difference margin_per_rating center_rewards_coefficient",
    1: "save_steps logging_steps lora_r lora_alpha per_device_train_batch_size gradient_accumulation_steps "
    "per_device_eval_batch_size max_length eval_steps max_eval_samples num_eval_prompts selection_samples response_length "
    "num_ppo_epochs max_prompt_length kl_horizon microbatch_tokens num_hidden_layers intermediate_size sample_length "
    "early_stopping_patience max_characters card_policy_samples card_likelihood_responses card_probe_answers num_prompts "
    "samples_per_prompt best_of_prompts judge_pairs judge_parallel check_length task_limit",
    2: "min_responses",
}
ABOVE_ZERO = "max_grad_norm num_train_epochs temperature reward_timeout clip_range clip_range_value kl_target max_approx_kl max_kl reward_clip judge_timeout"  # noqa: E501  # fmt: skip
SHARES = "adam_beta1 adam_beta2 lora_dropout dropout"
#: What else has to be given so that an option can be at its limit.
TOGETHER: dict[str, dict[str, Any]] = {"save_steps": {"eval_steps": 1}, "early_stopping_patience": {"save_steps": 20}}
JUST_ABOVE_ZERO = math.nextafter(0, 1)
Limit = tuple[str, str, float]


def listed_limits(config_type: Any) -> set[Limit]:
    """(check, option, limit) of the tables above."""
    limits = {("require_at_least", name, smallest) for smallest, names in SMALLEST.items() for name in names.split()}
    if config_type is PretrainConfig:  # a block of one token has nothing to predict
        limits = limits - {("require_at_least", "max_length", 1)} | {("require_at_least", "max_length", 2)}
    if config_type is PPOConfig:  # 0 leaves the evaluations out; in the other stages they choose the best checkpoint
        limits = limits - {("require_at_least", "eval_steps", 1)} | {("require_at_least", "eval_steps", 0)}
    limits |= {("require_above_zero", name, 0) for name in ABOVE_ZERO.split()}
    limits |= {("require_below_one", name, 1) for name in SHARES.split()}
    return {limit for limit in limits if limit[1] in {field.name for field in dataclasses.fields(config_type)}}


def limits_in_code(config_type: Any, monkeypatch: pytest.MonkeyPatch) -> set[Limit]:
    """(check, option, limit) of all checks that the config makes of itself; the strictest of an option."""
    strictest: dict[tuple[str, str], float] = {}
    real = limits._values

    def record(config: object, names: tuple[str, ...]) -> Any:
        caller = inspect.currentframe().f_back  # type: ignore[union-attr]
        check = caller.f_code.co_name  # type: ignore[union-attr]
        limit = {"require_above_zero": 0, "require_below_one": 1}.get(check)
        for name in names:
            number = caller.f_locals["smallest"] if limit is None else limit  # type: ignore[union-attr]
            strictest[check, name] = max(number, strictest.get((check, name), number))
        return real(config, names)

    monkeypatch.setattr(limits, "_values", record)
    parse_config(config_type, CHECKED[config_type])
    return {(check, name, limit) for (check, name), limit in strictest.items()}


@pytest.mark.parametrize("config_type", CHECKED, ids=lambda kind: kind.__name__)
def test_every_limit_is_listed(config_type: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that was loosened, dropped, or added without a case of its own below."""
    assert limits_in_code(config_type, monkeypatch) == listed_limits(config_type)


@pytest.mark.parametrize("config_type", CHECKED, ids=lambda kind: kind.__name__)
def test_limits(config_type: Any) -> None:
    """Beyond each of them is a traceback minutes later, from torch, transformers or peft, or a training on nothing."""
    default = vars(parse_config(config_type, CHECKED[config_type]))
    for check, name, limit in sorted(listed_limits(config_type)):
        whole = get_type_hints(config_type)[name] in (int, int | None)
        below = limit - 1 if whole else math.nextafter(limit, -1)
        inside, outside = {
            "require_at_least": ([limit], [below]),
            "require_above_zero": ([JUST_ABOVE_ZERO], [0.0, -1.0]),
            "require_below_one": ([0.0, below], [-JUST_ABOVE_ZERO, 1.0]),
        }[check]
        more = {k: v for k, v in TOGETHER.get(name, {}).items() if k in default}
        for value in inside:
            config_type(**{**default, **more, name: value})
        for value in outside:
            with pytest.raises(UserError, match=rf"^{name} must be .*got {re.escape(str(value))}$"):
                config_type(**{**default, **more, name: value})


def sizes(rollout: int) -> dict[str, int]:
    """One rollout of one minibatch of one microbatch."""
    return dict.fromkeys(("total_episodes", "rollout_batch_size", "minibatch_size", "microbatch_size"), rollout)


FULL = {"finetuning": "full"}
OFFLOAD = {"offload_base": True, "gradient_checkpointing": True}
PTX = {"ptx_coef": 1.0}
SHARED = {"value_model": "shared_trunk"}
LLAMA = {"model_type": "llama"}
PATIENT = {"early_stopping_patience": 1}
#: Checks that are written out: options just inside, options just outside, and the message.
WRITTEN_OUT: list[tuple[Any, dict[str, Any], dict[str, Any], str]] = [
    (PPOConfig, {"total_episodes": 128}, {"total_episodes": 127}, r"\(127\) .*rollout_batch_size \(64\); nearest: 128"),
    (PPOConfig, {"total_episodes": 64}, {"total_episodes": 0}, r"total_episodes \(0\) .*nearest: 64"),
    (PPOConfig, {"minibatch_size": 32}, {"minibatch_size": 48}, r"rollout_batch_size \(64\) .*minibatch_size \(48\)"),
    (PPOConfig, {"minibatch_size": 64}, {"minibatch_size": 128}, r"rollout_batch_size \(64\) .*minibatch_size \(128\)"),
    (PPOConfig, {"microbatch_size": 1}, {"microbatch_size": 0}, "microbatch_size must be at least 1, got 0"),
    (PPOConfig, {"microbatch_size": 16}, {"microbatch_size": 48}, r"minibatch_size \(64\) .*microbatch_size \(48\)"),
    (PPOConfig, {"num_responses_per_prompt": 64}, {"num_responses_per_prompt": 3}, r"\(3\); nearest: 63"),
    *(
        (PPOConfig, {name: inside}, {name: outside}, f"{name} must be between 0 and 1, got {outside}")
        for name in ("gamma", "lam")
        for inside, outside in ((0.0, -JUST_ABOVE_ZERO), (1.0, math.nextafter(1, 2)))
    ),
    *(
        (PPOConfig, {"ema_decay": inside}, {"ema_decay": outside}, f"ema_decay must be .*got {outside}")
        for inside, outside in ((JUST_ABOVE_ZERO, 0.0), (math.nextafter(1, 0), 1.0))
    ),
    (PPOConfig, {"reward_weights": [1.0]}, {"reward_weights": [1.0, 2.0]}, "reward_weights has 2 numbers for 1 rewards"),
    (PPOConfig, {"reward": ["reward/a", "m:f"]}, {"reward": ["reward/a", "reward/b"]}, "only one reward"),
    (PPOConfig, {"kl_target": 6.0, "kl_coef": JUST_ABOVE_ZERO}, {"kl_target": 6.0, "kl_coef": 0.0}, "kl_coef above 0"),
    (PPOConfig, {"whiten_rewards": True, **sizes(8)}, {"whiten_rewards": True, **sizes(7)}, "at least 8, got 7"),
    (PPOConfig, SHARED, {**SHARED, "value_warmup_updates": 1}, "value_warmup_updates needs"),
    *((kind, FULL, {**FULL, "quantization": "8bit"}, "cannot train weights in 8bit") for kind in (PPOConfig, RewardConfig)),
    (PPOConfig, {"trackers": ["wandb", "mlflow"]}, {"trackers": ["mlflwo"]}, "trackers has 'mlflwo'.*did you mean 'mlflow'"),
    (PPOConfig, {"trackers": ["none"]}, {"trackers": ["wandb", "none"]}, "none or a list of names"),
    (PPOConfig, {"snapshot_steps": 1}, {"snapshot_steps": 0}, "snapshot_steps must be at least 1, got 0"),
    (PPOConfig, FULL, {**FULL, "snapshot_steps": 1}, "needs finetuning lora"),
    (PPOConfig, OFFLOAD, {**OFFLOAD, "gradient_checkpointing": False}, "offload_base needs .*gradient_checkpointing"),
    (PPOConfig, OFFLOAD, {**OFFLOAD, **FULL}, "offload_base needs finetuning lora"),
    (PPOConfig, OFFLOAD, {**OFFLOAD, "use_dora": True}, "offload_base supports plain weights"),
    (PPOConfig, OFFLOAD, {**OFFLOAD, "quantization": "8bit"}, "offload_base supports plain weights"),
    (PPOConfig, {**PTX, "ptx_text": "t"}, {**PTX, "ptx_text": "t", "ptx_dataset": "d"}, "not both"),
    (PPOConfig, {**PTX, "ptx_text": "t"}, {"ptx_text": "t"}, "ptx_text is not used without a ptx_coef above 0"),
    (PPOConfig, {**PTX, "ptx_dataset": "d"}, {"ptx_dataset": "d"}, "ptx_dataset is not used without a ptx_coef above 0"),
    (PPOConfig, {**PTX, "ptx_ratio": 0.51 / 64}, {**PTX, "ptx_ratio": 0.49 / 64}, "mixes no text into a minibatch of 64"),
    *((kind, {"save_steps": 40}, {"save_steps": 30}, r"\(30\) .*eval_steps \(20\)") for kind in (SFTConfig, PretrainConfig)),
    (SFTConfig, {"new_tokens": NEW_TOKENS}, {"new_tokens": NEW_TOKENS, "learn_tokens": 1}, "new_tokens or learn_tokens"),
    *((PPOConfig, {"seed": inside}, {"seed": outside}, f"got {outside}") for inside, outside in ((0, -1), (2**32 - 1, 2**32))),
    (SFTConfig, {"template_date": "2026-02-28"}, {"template_date": "2026-02-29"}, "template_date must be a date"),
    (PretrainConfig, {"num_attention_heads": 8}, {"num_attention_heads": 7}, r"hidden_size \(256\) .*num_attention_heads \(7\)"),
    (PretrainConfig, {**LLAMA, "num_attention_heads": 128}, {**LLAMA, "num_attention_heads": 256}, "even head size.*is 1"),
    *(
        (PretrainConfig, {"validation_share": inside}, {"validation_share": outside}, f"validation_share .*got {outside}")
        for inside, outside in ((JUST_ABOVE_ZERO, 0.0), (math.nextafter(1, 0), 1.0))
    ),
    (PretrainConfig, PATIENT, {**PATIENT, "save_steps": 40}, r"save_steps \(40\) equal to eval_steps \(20\)"),
    (PretrainConfig, {}, {"quantization": "8bit"}, "pretraining trains all weights"),
    *(
        (RewardConfig, {"label_smoothing": inside}, {"label_smoothing": outside}, f"label_smoothing .*got {outside}")
        for inside, outside in ((0.0, -JUST_ABOVE_ZERO), (math.nextafter(0.5, 0), 0.5))
    ),
    (EvaluationConfig, {"judge_url": "u", "judge_model": "m"}, {"judge_url": "u"}, "a chat judge needs both"),
    *((EvaluationConfig, {"judge_prices": [1.0] * n}, {"judge_prices": [1.0] * (n + 1)}, f"got {n + 1}") for n in (0, 2)),
]  # fmt: skip


def config_with(config_type: Any, options: dict[str, Any]) -> Any:
    return config_type(**{**vars(parse_config(config_type, CHECKED[config_type])), **options})


@pytest.mark.parametrize("config_type, inside, outside, message", WRITTEN_OUT)
def test_checks_that_are_written_out(
    config_type: Any, inside: dict[str, Any], outside: dict[str, Any], message: str
) -> None:
    """Each of these divides by zero, floors, or silently trains on something else; the message holds the numbers."""
    config_with(config_type, inside)
    with pytest.raises(UserError, match=message):
        config_with(config_type, outside)


def test_every_check_has_a_case() -> None:
    """A new check that no case above reaches; found by the line that raises."""
    checks = {
        (file.name, call.lineno)
        for file in Path(limits.__file__).parent.glob("*.py")
        if file.name != "limits.py"
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("require", "divides")
    }
    reached = set()
    for config_type, _, outside, _ in WRITTEN_OUT:
        with pytest.raises(UserError) as error:
            config_with(config_type, outside)
        reached |= {(Path(entry.filename).name, entry.lineno) for entry in traceback.extract_tb(error.tb)}
    assert len(checks) > 25 and checks <= reached

"""TRL's options: PPO of 0.7 to 0.11, PPO of 0.12 to 1.12 (PPOv2 before), SFT and reward models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf.migration.rules import (
    BASE_MODEL,
    MAX_LENGTH,
    PLACES,
    POLICY,
    SAMPLING,
    SPEED,
    SUPERVISED,
    SUPERVISED_DEFAULTS,
    TRAINING,
    TRAINING_DEFAULTS,
    Line,
    Project,
    RefusedValue,
    Rule,
    Stage,
    Values,
    attention,
    dtype,
    episodes,
    number,
    on,
    only,
    rollouts,
    same,
    supervised,
    targets,
    together,
    truth,
    warmup,
    whole,
)

#: ModelConfig and ScriptArguments.
MODEL: dict[str, Rule] = {
    **same(whole, "lora_r"),
    **same(targets, "lora_target_modules"),
    "load_in_4bit": on("quantization", "4bit"),
    "load_in_8bit": on("quantization", "8bit"),
    **same(attention, "attn_implementation"),
    **dict.fromkeys(("torch_dtype", "dtype"), Rule("dtype", dtype)),
    "dataset_name": Rule("dataset"),
}
ADAPTERS_ONLY = "the SFT stage trains adapters; for all weights use reward and PPO's finetuning full, on an SFT adapter"
USE_PEFT = Rule("finetuning", lambda value: "lora" if truth(value) else "full")


def missing_eos(value: Any) -> float:
    """Return the penalty of a response without a stop token; False and none are 0."""
    return 0.0 if str(value).lower() in ("none", "false") else number(value)


def reward_source(value: Any) -> list[str]:
    """Return the reward; the pipelines of transformers are no rewards here."""
    if str(value).startswith("sentiment-analysis:"):
        raise RefusedValue("a classifier of several classes gives no score; write a function package.module:score")
    return [str(value)]


REWARD_MODEL = Rule(
    "reward",
    reward_source,
    "imported it is read at the stop token, as there; a LoRA or value head has to be: docs/migrating.md",
)
estimator = only(
    "k1", "kl", reason="the reward takes k1, log pi_old - log pi_ref: the others are biased as a penalty, or not of its sign"
)  # fmt: skip
stop = only("eos", reason="responses end with the stop token of the chat template, and with stop_strings")


def ppo_sizes(values: Values) -> Iterator[Line]:
    """Yield the sizes of TRL 0.12 and later, by what its loop does.

    It accumulates gradients over `gradient_accumulation_steps` passes whatever `num_mini_batches` is, so several minibatches
    a rollout share one optimiser step, unless a pass holds less than `per_device_train_batch_size` responses.
    """
    size, passes, processes = (
        whole(values[name]) for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "processes")
    )
    parts, rollout = whole(values["num_mini_batches"]), size * passes
    microbatch = max(1, min(size, rollout // parts))
    minibatch = min(microbatch * passes, rollout)
    step = f"num_mini_batches {parts}: one optimiser step is made from the gradients of {passes} passes of {microbatch}"
    origin = f"per_device_train_batch_size {size} times gradient_accumulation_steps {passes}"
    yield from rollouts((rollout, minibatch, microbatch), processes, origin, step)
    length = values.get("total_episodes"), rollout * processes, "total_episodes", values.get("num_train_epochs")
    yield episodes(*length)
    total = values.get("total_episodes")
    updates = -(-whole(total) // (rollout * processes)) if total else None
    yield from warmup(values, updates, rollout // minibatch * whole(values["num_ppo_epochs"]))


def old_ppo_sizes(values: Values) -> Iterator[Line]:
    """Yield the sizes of TRL 0.7 to 0.11, and its KL controller."""
    size, passes = whole(values["mini_batch_size"]), whole(values["gradient_accumulation_steps"])
    rollout, processes = whole(values["batch_size"]), whole(values["processes"])
    step = f"mini_batch_size {size} times gradient_accumulation_steps {passes}"
    yield from rollouts((rollout, min(size * passes, rollout), size), processes, f"batch_size {rollout}", step)
    yield Line("missing_eos_penalty", 0.0, "TRL 0.7 to 0.11 has none")
    yield episodes(
        values["steps"], rollout * processes, "steps, which TRL counts in responses (its scripts end with their data)"
    )
    if truth(values["adap_kl_ctrl"]):
        yield from kl_control("target of adap_kl_ctrl", values["target"], values["horizon"])
    if truth(values.get("early_stopping", False)):
        limit = round(1.5 * number(values["target_kl"]), 9)
        yield Line("max_approx_kl", limit, "early_stopping at 1.5 times target_kl; here k3 of the tokens, there k1")


def kl_control(origin: str, target: Any, horizon: Any) -> Iterator[Line]:
    """Yield the adaptive KL controller of Ziegler et al.: the same here, in nats per response."""
    yield Line("kl_target", number(target), f"{origin}: nats per response in both")
    yield Line("kl_horizon", whole(horizon), f"horizon of the adaptive KL coefficient: {horizon} responses in both")


#: What all of TRL's PPO trainers have, and ms-swift's.
PPO_COMMON: dict[str, Rule] = {
    **same(number, "gamma", "lam"),
    **same(truth, "whiten_rewards"),
    "vf_coef": Rule("vf_coef", number, "times half the clipped squared error, in both"),
    "cliprange": Rule("clip_range", number),
    "cliprange_value": Rule("clip_range_value", number, "in units of the score, in both"),
}
PROMPT_LENGTH = {"max_prompt_length": Rule("max_prompt_length", whole, "longer prompts are refused, not cut")}
#: Options of the trainer of TRL 0.12 and later, which is ms-swift's too.
NEW_TRAINER: dict[str, Rule] = {
    **PPO_COMMON,
    **same(number, "kl_coef"),
    **same(whole, "num_ppo_epochs"),
    **same(missing_eos, "missing_eos_penalty"),
    "temperature": Rule("temperature", number, "divides all log-probabilities, in both"),
    **together(
        "rollout_batch_size, minibatch_size, microbatch_size",
        *("per_device_train_batch_size", "gradient_accumulation_steps", "num_mini_batches"),
    ),
    **together("total_episodes", "num_train_epochs"),
}
NEW_TRAINER_DEFAULTS = {
    "num_mini_batches": 1, "num_ppo_epochs": 4, "kl_coef": 0.05, "vf_coef": 0.1, "missing_eos_penalty": "none",
}  # fmt: skip
OLD_DEFAULTS: dict[str, Any] = {
    "learning_rate": 1.41e-5, "lr_scheduler_type": "constant", "optim": "adamw_torch", "adam_beta2": 0.999,
    "max_grad_norm": 1e6, "init_kl_coef": 0.2, "adap_kl_ctrl": True, "target": 6.0, "horizon": 10_000,
    "target_kl": 1.0, "vf_coef": 0.1, "batch_size": 128, "mini_batch_size": 128, "gradient_accumulation_steps": 1,
    "steps": 20_000, "ppo_epochs": 4,
}  # fmt: skip
OLD_PPO = Stage(
    rules={
        **{name: rule for name, rule in TRAINING.items() if not name.startswith("warmup")},
        **MODEL,
        **PPO_COMMON,
        **PROMPT_LENGTH,
        "use_peft": USE_PEFT,
        "init_kl_coef": Rule("kl_coef", number),
        "kl_penalty": Rule("kl_coef", estimator),
        "ppo_epochs": Rule("num_ppo_epochs", whole),
        "model_name": POLICY,
        "query_dataset": Rule("dataset"),
        **dict.fromkeys(("reward_model_name", "reward_model"), REWARD_MODEL),
        "save_freq": Rule("save_steps", whole, "rollouts, in both"),
        "output_max_length": Rule(
            "response_length", whole, "upper end of a length that TRL's script draws for each batch"
        ),
        "score_clip": Rule("reward_clip", number),
        "log_with": TRAINING["report_to"],
        "tracker_project_name": Rule("wandb_project", str),
        "max_new_tokens": Rule("response_length", whole),
        "temperature": Rule("temperature", number, "divides all log-probabilities here, in TRL the sampler's alone"),
        **together("rollout_batch_size, minibatch_size, microbatch_size", "batch_size", "mini_batch_size"),
        **together("minibatch_size", "gradient_accumulation_steps"),
        **together("total_episodes", "steps"),
        **together("kl_target, kl_horizon", "adap_kl_ctrl", "target", "horizon"),
        **together("max_approx_kl", "early_stopping", "target_kl"),
    },
    defaults=OLD_DEFAULTS,
    together=old_ppo_sizes,
)
PPO_DEFAULTS: dict[str, Any] = {
    **TRAINING_DEFAULTS, **NEW_TRAINER_DEFAULTS, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
    "learning_rate": 3e-6, "temperature": 0.7, "response_length": 53, "use_peft": False,
}  # fmt: skip
PPO = Stage(
    rules={
        **TRAINING,
        **MODEL,
        **NEW_TRAINER,
        **PROMPT_LENGTH,
        "use_peft": USE_PEFT,
        **same(whole, "response_length"),
        "non_eos_penalty": Rule(
            "missing_eos_penalty",
            lambda value: 1.0 if truth(value) else 0.0,
            "there the score becomes penalty_reward_value, here it is lowered",
        ),
        "kl_estimator": Rule("kl_coef", estimator),
        "stop_token": Rule("stop_strings", stop, "a response always ends with its stop token"),
        **dict.fromkeys(("sft_model_path", "model_name_or_path", "base_model"), POLICY),
        "reward_model_path": REWARD_MODEL,
        **together("total_episodes", "total_episodes"),
    },
    defaults=PPO_DEFAULTS,
    together=ppo_sizes,
)
LENGTH = dict.fromkeys(("max_length", "max_seq_length"), MAX_LENGTH)
SFT = Stage(
    rules={
        **TRAINING,
        **SUPERVISED,
        **MODEL,
        **LENGTH,
        **BASE_MODEL,
        "chat_template_path": Rule("chat_template", str),
        "use_peft": on("lora_r", None, ADAPTERS_ONLY),
    },
    defaults={**SUPERVISED_DEFAULTS, "learning_rate": 2e-5, "lora_dropout": 0.05, "use_peft": False},
    together=supervised,
)
REWARD = Stage(
    rules={
        **TRAINING,
        **SUPERVISED,
        **MODEL,
        **LENGTH,
        "model_name_or_path": POLICY,
        **same(number, "center_rewards_coefficient"),
        "use_peft": USE_PEFT,
    },
    defaults={**SUPERVISED_DEFAULTS, "learning_rate": 1e-4, "lora_dropout": 0.05, "use_peft": False},
    together=supervised,
)
REFUSED: dict[str, str] = {
    "one data set has one configuration: prepare it with rlhf data, whose data.yaml names it": """
        dataset_config dataset_streaming dataset_train_split dataset_test_split dataset_text_field dataset_kwargs
        dataset_batch_size shuffle_dataset
    """,
    "not taken over; PPO here lists what is logged under num_logged_samples and num_eval_samples": """
        num_sample_generations sanity_check
    """,
    "follows from the sizes": """
        micro_batch_size local_batch_size local_mini_batch_size batch_size mini_batch_size num_total_batches
        num_updates backward_batch_size global_* forward_batch_size is_encoder_decoder is_peft_model
    """,
    "scoring and sampling use microbatch_size": "local_rollout_forward_batch_size",
    "the reward of an unfinished response is lowered by missing_eos_penalty here, not replaced": """
        penalty_reward_value
    """,
    "the stop token is the tokenizer's eos_token; set it there, or give stop_strings": """
        stop_token_id eos_token pad_token
    """,
    "adapters are made and named here; the reference is the policy with its adapter off": """
        model_adapter_name ref_adapter_name
    """,
    "every ratio counts; a run whose ratios get large is reported by the doctor (ppo/ratio_max)": """
        ratio_threshold compare_steps
    """,
    (
        "a running mean and spread of the scores would change the reward during the run; reward models of this "
        "registry are normalised once, and reward_clip limits scores"
    ): "use_score_scaling use_score_norm",
    SAMPLING: "top_k top_p min_p do_sample repetition_penalty num_beams min_length length_penalty",
    "padding, stop token and tokenizer are those of the SFT policy": "pad_token_id eos_token_id tokenizer_name",
    "answers count in the loss, prompts do not": "completion_only_loss assistant_only_loss loss_type",
    "the vocabulary's new tokens train with new_tokens or learn_tokens": "lora_modules_to_save modules_to_save",
    "the stages choose it": """
        lora_task_type task_type lora_target_parameters bias disable_dropout ignore_bias_buffers model_init_kwargs
        router_aux_loss_coef truncation_mode
    """,
    "4-bit weights are nf4 with double quantisation": "bnb_4bit_* use_bnb_nested_quant",
    "a model's revision and code are chosen in the SFT stage, which all others inherit": """
        model_revision trust_remote_code
    """,
    SPEED: "batched_gen packing packing_strategy eval_packing num_of_sequences chars_per_token use_liger optimize_*cache",
    "PPO counts responses: total_episodes": "max_steps num_train_epochs",
    PLACES: "push_to_hub_if_best_kwargs model_name",
}
OLD = Project(name="TRL 0.7 to 0.11", stages={"ppo": OLD_PPO}, refused=REFUSED)
NEW = Project(name="TRL", stages={"sft": SFT, "reward": REWARD, "ppo": PPO}, refused=REFUSED)

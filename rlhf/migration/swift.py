"""ms-swift's options of `swift sft` and `swift rlhf --rlhf_type rm|ppo` (3 and 4)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from rlhf.migration.llama_factory import ADAPTERS, finetuning, quantization
from rlhf.migration.rules import (
    MAX_LENGTH,
    PLACES,
    POLICY,
    REWARD_ADAPTER,
    SAMPLING,
    SPEED,
    SUPERVISED,
    TRAINING,
    Line,
    Project,
    RefusedValue,
    Rule,
    Stage,
    Values,
    attention,
    dtype,
    number,
    same,
    supervised,
    targets,
    together,
    whole,
    words,
)
from rlhf.migration.trl import NEW_TRAINER, NEW_TRAINER_DEFAULTS, REWARD_MODEL, ppo_sizes


def data_set(value: Any) -> str:
    """Return the one data set; `NAME#COUNT` takes a share, which data preparation does here."""
    names = words(value)
    if len(names) != 1 or "#" in names[0] or names[0].count(":"):
        raise RefusedValue("several data sets, subsets (:NAME) and shares (#COUNT) are put together by rlhf data")
    return names[0]


def tuned(values: Values) -> Iterator[Line]:
    """Yield the step size, which depends on what is trained."""
    if "learning_rate" not in values:
        full = (values.get("tuner_type") or values.get("train_type")) == "full"
        yield Line("learning_rate", 1e-5 if full else 1e-4, "ms-swift's default for full or adapters")


def passes(values: Values) -> Values:
    """Return the values with ms-swift's accumulation where none is given: 16 examples for an update."""
    size, processes = whole(values["per_device_train_batch_size"]), int(values["processes"])
    return {"gradient_accumulation_steps": max(1, math.ceil(16 / size / processes)), **values}


def supervised_sizes(values: Values) -> Iterator[Line]:
    """Yield batch sizes and step size of supervised stages."""
    yield from supervised(passes(values))
    yield from tuned(values)


def sizes(values: Values) -> Iterator[Line]:
    """Yield PPO's sizes, of TRL's trainer, and the length of answers under its several names."""
    names = ("response_length", "max_new_tokens", "max_completion_length")
    name = next(name for name in names if values.get(name))
    yield Line("response_length", whole(values[name]), f"{name}: {values[name]}")
    yield from ppo_sizes(passes(values))
    yield from tuned(values)


COMMON: dict[str, Rule] = {
    **TRAINING,
    "lora_rank": Rule("lora_r", whole),
    "target_modules": Rule("lora_target_modules", targets),
    "quant_bits": Rule("quantization", quantization),
    "torch_dtype": Rule("dtype", dtype),
    "attn_impl": Rule("attn_implementation", attention),
    **same(data_set, "dataset"),
    **dict.fromkeys(("train_type", "tuner_type"), Rule("finetuning", finetuning)),
}
LENGTH = {"max_length": MAX_LENGTH}
START = dict.fromkeys(("adapters", "model"), POLICY)
DEFAULTS: dict[str, Any] = {
    "weight_decay": 0.1, "adam_beta2": 0.95, "lr_scheduler_type": "cosine", "optim": "adamw_torch", "seed": 42,
    "lora_rank": 8, "lora_alpha": 32, "lora_dropout": 0.05, "per_device_train_batch_size": 1,
}  # fmt: skip
SFT_KIND = dict.fromkeys(("train_type", "tuner_type"), ADAPTERS)
SFT = Stage(
    rules={**COMMON, **SUPERVISED, **LENGTH, **SFT_KIND, "model": Rule("model_name_or_path")},
    defaults={**DEFAULTS, "num_train_epochs": 3.0},
    together=supervised_sizes,
)
REWARD = Stage(
    rules={**COMMON, **SUPERVISED, **LENGTH, **START, **same(number, "center_rewards_coefficient")},
    defaults={**DEFAULTS, "num_train_epochs": 3.0},
    together=supervised_sizes,
)
PPO = Stage(
    rules={
        **COMMON,
        **START,
        **NEW_TRAINER,
        "reward_adapters": REWARD_ADAPTER,
        "reward_model": REWARD_MODEL,
        "max_length": Rule(
            "max_prompt_length", whole, "there prompt and answer together; longer prompts are refused, not cut"
        ),
        **together("response_length", "response_length", "max_new_tokens", "max_completion_length"),
    },
    defaults={**DEFAULTS, **NEW_TRAINER_DEFAULTS, "temperature": 0.9, "max_completion_length": 512},
    together=sizes,
)
REFUSED: dict[str, str] = {
    "chosen by the file that it stands in": "rlhf_type",
    "the tokenizer's own chat template is used, that of the SFT policy in later stages": """
        template template_backend system use_chat_template agent_template response_prefix enable_thinking
        add_non_thinking_prefix preserve_thinking norm_bbox loss_scale padding_side tools_prompt is_binary_loss_scale
        disable_ignore_empty_think
    """,
    "the reference is the policy with its adapter off": "ref_* sync_ref_model",
    "the reward model's own config says it; its tokenizer is its own": """
        reward_model_type reward_model_revision reward_template
    """,
    "the model's own config says it": """
        model_type task_type num_labels problem_type model_kwargs init_strategy init_weights experts_impl
        max_model_len new_special_tokens
    """,
    "a model's revision is chosen in the SFT stage": "model_revision",
    "data sets are prepared by rlhf data: columns, shares, splits without shared prompts": """
        dataset_* val_dataset* cached_* split_dataset_ratio columns custom_* streaming interleave_prob
        stopping_strategy shuffle_buffer_size strict disable_auto_column_mapping truncation_strategy download_mode
        load_from_cache_file train_dataloader_shuffle lazy_tokenize max_epochs external_plugins decision_*
    """,
    SAMPLING: "top_k top_p min_p repetition_penalty num_beams",
    "responses end with the stop token of the chat template, and with stop_strings": "stop_words",
    "scoring and sampling use microbatch_size": "local_rollout_forward_batch_size",
    "not taken over; PPO here lists what is logged under num_logged_samples and num_eval_samples": """
        num_sample_generations log_completions logprobs top_logprobs stream
    """,
    "options of other algorithms than PPO-RLHF (DPO, GRPO, KTO, GKD, ...)": """
        beta label_smoothing rpo_alpha ld_alpha discopop_tau loss_type loss_weights cpo_alpha simpo_gamma
        *desirable_weight sft_alpha lmbda seq_kd gkd_* teacher_* offload_teacher_model num_generations* reward_funcs
        reward_weights num_iterations epsilon* delta cosine_* repetition_* soft_* chord_* fipo_* rlsd_* sdar_*
        advantage_* kl_in_reward scale_rewards importance_sampling_level dynamic_sample max_resample_times
        overlong_filter top_entropy_quantile log_entropy multi_turn_scheduler max_turns completion_length_limit_scope
        gym_env use_gym_env rollout_importance_sampling_* off_policy_* log_rollout_* steps_per_generation
        generation_batch_size async_generate reward_model_plugin real_tau tau_* structured_outputs_regex mrl_dims
        enable_dft_loss enable_channel_loss temperature max_completion_length wandb_log_unique_prompts
        center_rewards_coefficient
    """,
    "there are LoRA, rsLoRA, DoRA and full fine-tuning here": """
        adalora_* adapter_act adapter_length boft_* fourier_* vera_* reft_* lisa_* llamapro_* lora_ga_* lora_bias
        lora_dtype lora_modules lorap_lr_ratio modules_to_save target_regex target_parameters freeze_*
        trainable_parameters* use_swift_lora tuner_backend
    """,
    "there are adamw_torch and adamw_8bit here": "use_galore galore_* optimizer",
    "only text is read and written here": "vit_* aligner_lr max_pixels",
    "4-bit weights are bitsandbytes' nf4 with double quantisation": "quant_method bnb_4bit_* hqq_axis",
    "the reward and SFT stages have their own figures": """
        eval_use_evalscope eval_dataset* eval_limit eval_generation_config extra_eval_args eval_metric metric
        callbacks early_stop_interval acc_strategy max_new_tokens
    """,
    "not supported here": "rope_scaling router_aux_loss_coef",
    "the model is sampled by the run itself": """
        use_vllm vllm_* sleep_level move_model_batches offload_model offload_optimizer enable_flattened_weight_sync
    """,
    PLACES: """
        add_version check_model ckpt_dir create_checkpoint_symlink device_map max_memory ignore_args_error load_args
        load_data_args local_repo_path max_shard_size model_author model_name resume_only_model safe_serialization
        swanlab_* use_hf use_ray ray_* device_groups use_flash_ckpt
    """,
    SPEED: """
        packing packing_* padding_free sequence_parallel_size use_logits_to_keep enable_npu_model_patch
        zero_hpz_partition_size
    """,
    "PPO counts responses: total_episodes": "max_steps",
}
PROJECT = Project(name="ms-swift", stages={"sft": SFT, "reward": REWARD, "ppo": PPO}, refused=REFUSED)

"""LLaMA-Factory's options of its stages sft, rm and ppo (0.8 and 0.9)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf.migration.rules import (
    BASE_MODEL,
    MAX_LENGTH,
    PLACES,
    POLICY,
    REWARD_ADAPTER,
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
    choice,
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
from rlhf.migration.trl import ADAPTERS_ONLY, kl_control

quantization = choice("4bit", "8bit", **{"4": "4bit", "8": "8bit"})
finetuning = choice("lora", "full")
#: The SFT stage trains adapters only.
ADAPTERS = Rule("lora_r", only("lora", reason=ADAPTERS_ONLY))
chat_template = choice(
    "chatml",
    qwen="chatml",
    reason="the tokenizer's own chat template is used; for one that has none: chat_template chatml, plain or a file",
)
reward_kind = only(
    *("lora", "full", "oft"),
    reason="an endpoint here gets prompts and responses apart, and answers with scores: docs/ppo.md, Rewards",
)


def data_set(value: Any) -> str:
    """Return the data set, where its name is a file or hub name; others are entries of dataset_info.json."""
    name = str(value).strip()
    if "," in name or not ("/" in name or "." in name):
        raise RefusedValue(
            "names entries of dataset_info.json; give the file or hub name that stands there. Several files: rlhf data"
        )
    return name


def ppo_sizes(values: Values) -> Iterator[Line]:
    """Yield what LLaMA-Factory gives to TRL 0.8's PPO, whose other options have their defaults."""
    size, passes, buffer, processes = (
        whole(values[name])
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "ppo_buffer_size", "processes")
    )
    rollout, minibatch = size * passes * buffer, size * passes
    step = f"per_device_train_batch_size {size} times gradient_accumulation_steps {passes}"
    yield from rollouts((rollout, minibatch, size), processes, f"{step} times ppo_buffer_size {buffer}", step)
    steps = number(values.get("max_steps") or -1)
    total = steps * rollout * processes if steps > 0 else None
    yield episodes(total, rollout * processes, f"max_steps: {steps:g} rollouts", values.get("num_train_epochs"))
    yield from warmup(values, steps if steps > 0 else None, buffer * whole(values["ppo_epochs"]))
    yield from adapter_scale(values)
    yield from kl_control("ppo_target", values["ppo_target"], 10_000)
    yield Line("kl_coef", 0.2, "TRL's init_kl_coef, which LLaMA-Factory leaves as it is")
    yield Line("vf_coef", 0.1, "TRL's default, which LLaMA-Factory leaves as it is")
    yield Line("missing_eos_penalty", 0.0, "LLaMA-Factory has none")
    yield Line("max_prompt_length", whole(values["cutoff_len"]), "cutoff_len; longer prompts are refused, not cut")


def supervised_sizes(values: Values) -> Iterator[Line]:
    """Yield batch sizes and the scale of adapters of supervised stages."""
    yield from supervised(values)
    yield from adapter_scale(values)


def adapter_scale(values: Values) -> Iterator[Line]:
    """Yield LLaMA-Factory's lora_alpha where none is given: twice the rank."""
    if values.get("lora_alpha") is None:
        yield Line("lora_alpha", 2 * whole(values["lora_rank"]), "LLaMA-Factory's default, twice lora_rank")


COMMON: dict[str, Rule] = {
    **TRAINING,
    "lora_rank": Rule("lora_r", whole),
    "lora_target": Rule("lora_target_modules", targets),
    "quantization_bit": Rule("quantization", quantization),
    "pure_bf16": on("dtype", "bfloat16"),
    "compute_dtype": Rule("dtype", dtype),
    "flash_attn": Rule("attn_implementation", attention),
    **same(data_set, "dataset"),
    "finetuning_type": Rule("finetuning", finetuning),
    "disable_gradient_checkpointing": on("gradient_checkpointing", False),
}
CUTOFF = {"cutoff_len": MAX_LENGTH}
START = dict.fromkeys(("adapter_name_or_path", "model_name_or_path"), POLICY)
ADAPTER_DEFAULTS = {"lora_rank": 8, "finetuning_type": "lora"}
DEFAULTS = {**SUPERVISED_DEFAULTS, **ADAPTER_DEFAULTS, "cutoff_len": 2048}
SFT = Stage(
    rules={
        **COMMON,
        **SUPERVISED,
        **CUTOFF,
        **BASE_MODEL,
        "template": Rule("chat_template", chat_template),
        "finetuning_type": ADAPTERS,
    },
    defaults=DEFAULTS,
    together=supervised_sizes,
)
REWARD = Stage(rules={**COMMON, **SUPERVISED, **CUTOFF, **START}, defaults=DEFAULTS, together=supervised_sizes)
PPO_DEFAULTS: dict[str, Any] = {
    **TRAINING_DEFAULTS, **ADAPTER_DEFAULTS, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
    "ppo_buffer_size": 1, "ppo_epochs": 4, "ppo_target": 6.0, "cutoff_len": 2048, "max_new_tokens": 1024,
    "temperature": 0.95, "top_p": 0.7, "top_k": 50,
}  # fmt: skip
PPO = Stage(
    rules={
        **COMMON,
        **START,
        "reward_model": REWARD_ADAPTER,
        "ppo_epochs": Rule("num_ppo_epochs", whole),
        "ppo_whiten_rewards": Rule("whiten_rewards", truth),
        "max_new_tokens": Rule("response_length", whole),
        "temperature": Rule("temperature", number, "divides all log-probabilities here, there the sampler's alone"),
        **together(
            "rollout_batch_size, minibatch_size, microbatch_size",
            *("per_device_train_batch_size", "gradient_accumulation_steps", "ppo_buffer_size"),
        ),
        **together("total_episodes", "max_steps", "num_train_epochs"),
        **together("kl_target", "ppo_target"),
        **together("max_prompt_length", "cutoff_len"),
        "reward_model_type": Rule("reward", reward_kind, "the import sees what the folder holds"),
    },
    defaults=PPO_DEFAULTS,
    together=ppo_sizes,
)
REFUSED: dict[str, str] = {
    "chosen by the file that it stands in": "stage do_train",
    "the tokenizer's own chat template is used, that of the SFT policy in later stages": """
        template tool_format default_system enable_thinking preserve_thinking
    """,
    (
        "an adapter of an earlier stage comes with the policy: import it (rlhf registry import FOLDER --as sft/NAME)"
    ): "adapter_name_or_path adapter_folder create_new_adapter",
    "the reference is the policy with its adapter off; a reward model is stored as it was imported": """
        ref_model* reward_model_adapters reward_model_quantization_bit
    """,
    "a running mean and spread of the scores would change the reward during the run; reward_clip limits scores": """
        ppo_score_norm
    """,
    SAMPLING: "top_k top_p do_sample num_beams repetition_penalty length_penalty",
    "response_length is the longest answer; prompt and answer fit the model's context": "max_length model_max_length",
    "data sets are prepared by rlhf data: shares, filters, deduplication, splits without shared prompts": """
        dataset_dir media_dir max_samples val_size eval_dataset eval_on_each_dataset mix_strategy interleave_probs
        streaming buffer_size tokenized_path ignore_pad_token_for_loss
    """,
    "the loss is on the answers alone": "train_on_prompt mask_history",
    "other losses than those of PPO-RLHF": """
        pref_* dpo_* kto_* simpo_* ld_alpha use_dft_loss use_asft_loss asft_alpha use_eaft_loss eaft_alpha
        moe_aux_loss_coef
    """,
    "there are LoRA, rsLoRA, DoRA and full fine-tuning here": """
        freeze_* additional_target pissa_* oft_* module_dropout use_llama_pro loraplus_* mixture_of_depths shift_attn
        block_diag_attn
    """,
    "there are adamw_torch and adamw_8bit here": """
        use_galore galore_* use_apollo apollo_* use_badam badam_* use_adam_mini use_muon
    """,
    "only text is read and written here": """
        image_* video_* audio_* visual_inputs crop_to_patches use_audio_in_video train_mm_proj_only
    """,
    "new_tokens and learn_tokens of the SFT stage add tokens": """
        resize_vocab add_tokens add_special_tokens new_special_tokens* init_special_tokens split_special_tokens
    """,
    "4-bit weights are bitsandbytes' nf4 with double quantisation": "quantization_* double_quantization",
    "the stage checks every eval_steps and registers the best checkpoint; it does not end early": """
        early_stopping_steps
    """,
    "the reward stage always reports accuracy": "compute_accuracy",
    "a model's revision and code are chosen in the SFT stage, which all others inherit": """
        model_revision trust_remote_code
    """,
    "not supported here": "rope_scaling train_from_scratch use_mca use_hyper_parallel hyper_parallel_args",
    "the data order is always shuffled by seed": "disable_shuffling",
    "the model is sampled by the run itself": """
        infer_* vllm_* sglang_* use_kt kt_* use_kv_cache offload_folder eval_num_beams skip_special_tokens
    """,
    "export is a command of its own: rlhf registry export": "export_*",
    PLACES: """
        cache_dir *_hub_token use_swanlab swanlab_* plot_loss print_param_status ray_* master_*
        data_shared_file_system enable_torch_profiler profiler_* profile_modules device_map
    """,
    SPEED: """
        packing neat_packing use_fast_tokenizer low_cpu_mem_usage use_unsloth use_unsloth_gc enable_liger_kernel
        use_reentrant_gc upcast_* use_v1_kernels fp8 fp8_*
    """,
}
PROJECT = Project(name="LLaMA-Factory", stages={"sft": SFT, "reward": REWARD, "ppo": PPO}, refused=REFUSED)
#: Our stage by the name of LLaMA-Factory's.
STAGES = {"sft": "sft", "rm": "reward", "ppo": "ppo"}

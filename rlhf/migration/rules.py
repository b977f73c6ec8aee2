"""Rules by which options of another project become ours, and the conversions that several projects share."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from rlhf.config.options import TRACKERS

Values = Mapping[str, Any]


class RefusedValue(Exception):
    """A value of an option has no counterpart; the text is the reason."""


class Line(NamedTuple):
    """An option of ours with its value and its origin."""

    option: str
    value: Any
    """None: the value is not known, and has to be given."""
    origin: str


class Left(NamedTuple):
    """An option that was not taken over."""

    name: str
    value: Any
    reason: str


class Rule(NamedTuple):
    """Conversion of one option."""

    option: str
    """Its name here; several names, for people, where a project's `together` converts options together."""
    convert: Callable[[Any], Any] | None = lambda value: value
    """None: `together` converts it."""
    note: str = ""
    """What differs here."""


class Stage(NamedTuple):
    """A kind of config of a project, which becomes a config of one of our stages."""

    rules: Mapping[str, Rule]
    defaults: Values
    """Values that count where a config does not give them, and that differ from ours."""
    together: Callable[[Values], Iterator[Line]]
    """Makes lines of several options; gets given values and defaults."""


@dataclass(frozen=True, kw_only=True)
class Project:
    """The options of another project."""

    name: str
    stages: Mapping[str, Stage]
    """By the name of our stage."""
    refused: Mapping[str, str]
    """Reasons, each with the names (or patterns) of the options that are not taken over for it; beside `TRAINING_REFUSED`."""

    def reason(self, name: str) -> str | None:
        """Return why an option is not taken over; None if it is not refused."""
        for reasons in (self.refused, TRAINING_REFUSED):
            for reason, patterns in reasons.items():
                if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.split()):
                    return reason
        elsewhere = [stage for stage, kind in self.stages.items() if name in kind.rules]
        return f"an option of {' and '.join(elsewhere)}, without effect in this stage" if elsewhere else None


def together(combine: str, *names: str) -> dict[str, Rule]:
    """Return rules of options that `together` converts into the options named in `combine`."""
    return {name: Rule(combine, None) for name in names}


def same(convert: Callable[[Any], Any], *names: str) -> dict[str, Rule]:
    """Return rules of options that have the same name and meaning here."""
    return {name: Rule(name, convert) for name in names}


# Conversions of values


def slug(value: Any) -> str:
    """Return the last part of a path or hub name as a name for an artefact."""
    last = str(value).rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._") or "migrated"


def imported(stage: str) -> Callable[[Any], Any]:
    """Return the conversion of a folder, or of the last of several, into the name under which it is to be imported."""

    def convert(value: Any) -> Any:
        last = value[-1:] if isinstance(value, list) else [value]
        names = [f"{stage}/{slug(folder)}" for folder in last]
        return names if stage == "reward" else next(iter(names), None)

    return convert


def choice(*names: str, reason: str = "", **renamed: str) -> Callable[[Any], str]:
    """Return the conversion of a word, which may be `renamed`, into one of our names; others are refused for the reason."""

    def convert(value: Any) -> str:
        word = str(value).lower().rpartition(".")[2]
        name = renamed.get(word, word)
        if name not in names:
            raise RefusedValue(reason or f"there are {', '.join(names[:-1])} and {names[-1]} here")
        return name

    return convert


def only(*values: str, reason: str) -> Callable[[Any], None]:
    """Return the conversion of an option whose `values` are so here without an option; others are refused for the reason."""

    def convert(value: Any) -> None:
        if str(value) not in values:
            raise RefusedValue(reason)

    return convert


def number(value: Any) -> float:
    """Return a number, which may be a text in YAML (1e-5) and on a command line.

    Raises:
        RefusedValue: it is none.
    """
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise RefusedValue(f"{value!r:.60} is no number") from error
    if not math.isfinite(result):
        raise RefusedValue(f"{value!r} is no finite number")
    return result


def whole(value: Any) -> int:
    """Return a whole number; raise `RefusedValue` for a share of the steps."""
    if number(value) != int(number(value)):
        raise RefusedValue("a share of the steps has no counterpart; give a number of updates")
    return int(number(value))


def truth(value: Any) -> bool:
    """Return a truth value, which is a text on a command line."""
    return str(value).strip().lower() in ("true", "1", "yes", "on")


def words(value: Any) -> list[str]:
    """Return a list of words, of a list or of a text with commas."""
    parts = value if isinstance(value, list | tuple | set) else re.split(r"[,\s]+", str(value))
    return [str(part) for part in parts if str(part)]


def targets(value: Any) -> list[str]:
    """Return the layers of an adapter."""
    names = words(value)
    return ["all-linear"] if names in (["all"], ["all-linear"]) else names


schedule = choice("cosine_with_min_lr", "cosine", "linear", "constant_with_warmup", constant="constant_with_warmup")
optimizer = choice(
    "adamw_torch", "adamw_8bit", **dict.fromkeys(("adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch_8bit"), "adamw_8bit"),
    **dict.fromkeys(("adamw_torch_fused", "adamw_hf", "paged_adamw_32bit", "paged_adamw"), "adamw_torch"),
)  # fmt: skip
dtype = choice(
    "auto", "bfloat16", "float32", "float64", bf16="bfloat16", fp32="float32", float="float32",
    reason="half precision (float16) overflows in training; bfloat16 and float32 are here",
)  # fmt: skip
attention = choice(
    "auto", "eager", "sdpa", "flash_attention_2", fa2="flash_attention_2", flash_attn="flash_attention_2", disabled="eager"
)  # fmt: skip


def tracking(value: Any) -> list[str]:
    """Return the programs that take a copy of the log."""
    names = [name.lower() for name in words(value)]
    if set(names) <= {"none", "null"}:
        return ["none"]
    if names == ["all"]:
        raise RefusedValue("names every tracker that is installed; here they are named in trackers, wandb by default")
    if unknown := [name for name in names if name not in TRACKERS]:
        others = [name for name in names if name in TRACKERS]
        remedy = f"; for the others: trackers {' '.join(others)}" if others else ""
        raise RefusedValue(f"{', '.join(unknown)} is none of {', '.join(TRACKERS)}{remedy}")
    return names


# Options that several projects share


def on(option: str, setting: Any, reason: str = "") -> Rule:
    """Return the rule of a switch that sets an option; off sets nothing, or is refused for the reason."""

    def convert(value: Any) -> Any:
        if truth(value):
            return setting
        if reason:
            raise RefusedValue(reason)
        return None

    return Rule(option, convert)


#: transformers' TrainingArguments, in all stages, and options of adapters that have one name in all projects.
TRAINING: dict[str, Rule] = {
    **same(number, "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    **same(whole, "lora_alpha", "logging_steps"),
    **same(truth, "use_rslora", "use_dora", "gradient_checkpointing"),
    "lora_dropout": Rule("lora_dropout", number, "always off in PPO"),
    "max_grad_norm": Rule("max_grad_norm", number, "in PPO policy and value model have each its own norm"),
    "lr_scheduler_type": Rule("lr_scheduler_type", schedule),
    "optim": Rule("optim", optimizer),
    "seed": Rule("seed", whole, "the same seed draws other numbers here"),
    "output_dir": Rule("output_dir"),
    "save_steps": Rule("save_steps", whole, "in PPO: rollouts"),
    "bf16": on("dtype", "bfloat16"),
    "report_to": Rule("trackers", tracking),
    "run_name": Rule("name", slug),
    **together("warmup_steps", "warmup_steps", "warmup_ratio"),
    "use_cpu": on("device", "cpu"),
    "no_cuda": on("device", "cpu"),
}
#: TrainingArguments of supervised stages.
SUPERVISED: dict[str, Rule] = {
    **same(whole, "per_device_eval_batch_size", "max_steps", "eval_steps"),
    **same(number, "num_train_epochs"),
    **together("per_device_train_batch_size", "per_device_train_batch_size"),
    **together("gradient_accumulation_steps", "gradient_accumulation_steps"),
}
#: Models of the SFT stage, and of all others.
BASE_MODEL: dict[str, Rule] = {
    "model_name_or_path": Rule("model_name_or_path"),
    "model_revision": Rule("model_revision", lambda value: None if value == "main" else str(value)),
    **same(truth, "trust_remote_code"),
}
POLICY = Rule("policy", imported("sft"), "first: rlhf registry import FOLDER --as STAGE/NAME")
REWARD_ADAPTER = Rule(
    "reward", imported("reward"), "first: rlhf registry import FOLDER --as STAGE/NAME --policy POLICY"
)
MAX_LENGTH = Rule("max_length", whole, "longer rows are left out and counted, not cut")
#: What transformers sets where nothing is given, and what is another value here.
TRAINING_DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-5, "adam_beta2": 0.999, "lr_scheduler_type": "linear", "optim": "adamw_torch", "seed": 42,
}  # fmt: skip
SUPERVISED_DEFAULTS = {
    **TRAINING_DEFAULTS, "num_train_epochs": 3.0, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
}  # fmt: skip
SAMPLING = (
    "responses are drawn from the whole softmax: with top-k, top-p or a penalty they come from another policy than the one whose "
    "KL and ratios are computed"
)
PLACES = "where it runs, saves, loads or logs; no effect on the result, and not needed here"
SPEED = "speed or memory only; here microbatches, packing and attention are chosen for that"
TRAINING_REFUSED: dict[str, str] = {
    PLACES: """
        overwrite_output_dir do_* disable_tqdm log_* logging_dir logging_first_step logging_nan_inf_filter
        logging_strategy save_strategy save_total_limit save_safetensors save_on_each_node save_only_model
        push_to_hub* hub_* project trackio_* run_post_hook local_rank ddp_* debug skip_memory_metrics include_*
        remove_unused_columns label_names past_index ray_scope use_mps_device tpu_* mp_parameters
        enable_jit_checkpoint restore_callback_states_from_checkpoint ignore_data_skip dataset_num_proc
        preprocessing_* overwrite_cache exp_name task_name tracker_* project_kwargs accelerator_kwargs
        accelerator_config prediction_loss_only use_legacy_prediction_loop
    """,
    SPEED: """
        dataloader_* tf32 torch_compile* torchdynamo torch_empty_cache_steps group_by_length length_column_name
        use_ipex jit_mode_eval eval_accumulation_steps eval_do_concat_batches eval_use_gather_object
        batch_eval_metrics sortish_sampler gradient_checkpointing_* activation_* use_liger* liger_kernel_config
        use_cache dispatch_batches split_batches full_determinism pad_to_multiple_of padding_free
        train_sampling_strategy auto_find_batch_size bf16_full_eval per_gpu_*
    """,
    "one machine, and full copies of the weights a process: start PPO with torchrun for several GPUs": """
        deepspeed* fsdp* parallelism_config average_tokens_across_devices world_size ds3_gather_for_generation
    """,
    "half precision (float16) overflows in training; use dtype bfloat16, or float32": """
        fp16 fp16_* half_precision_backend
    """,
    "--resume true resumes from the last checkpoint in output_dir": "resume_from_checkpoint",
    (
        "the stage evaluates every eval_steps (in PPO before and after the training), and SFT registers its best "
        "checkpoint"
    ): """
        evaluation_strategy eval_strategy eval_delay eval_on_start eval_steps load_best_model_at_end
        metric_for_best_model greater_is_better per_device_eval_batch_size
    """,
    "there is one schedule and one optimiser a stage, without further arguments": """
        lr_scheduler_kwargs optim_args optim_target_modules adafactor
    """,
    "no noise, smoothing or other extra is added to the loss": "neftune_noise_alpha label_smoothing_factor",
    "data order follows from seed alone": "data_seed",
    "answers to held-out prompts are sampled as in training: temperature, no beams": """
        generation_* predict_with_generate
    """,
}


def warmup(values: Values, updates: float | None, each: float = 1) -> Iterator[Line]:
    """Yield the warm-up in optimiser steps.

    Args:
        updates: steps of the schedule in the whole run; None if not known.
        each: optimiser steps for each step of the schedule.
    """
    steps, ratio = number(values.get("warmup_steps") or 0), number(values.get("warmup_ratio") or 0)
    ratio = steps if 0 < steps < 1 else ratio
    unit = f" times {each:g} optimiser steps a rollout" if each != 1 else ""
    if steps >= 1:
        yield Line("warmup_steps", round(steps * each), f"warmup_steps: {steps:g}{unit}")
    elif ratio > 0 and updates:
        yield Line(
            "warmup_steps", round(ratio * updates * each), f"warmup_ratio: {ratio:g} of {updates:g} updates{unit}"
        )
    elif ratio > 0:
        yield Line("warmup_steps", None, f"warmup_ratio: {ratio:g}; give {ratio:g} times the number of updates")


def supervised(values: Values) -> Iterator[Line]:
    """Yield batch sizes and warm-up of supervised stages; several processes become accumulation."""
    size, passes = whole(values["per_device_train_batch_size"]), whole(values["gradient_accumulation_steps"])
    processes = int(values["processes"])
    several = f" times {processes} processes, here one" if processes > 1 else ""
    yield Line("per_device_train_batch_size", size, f"per_device_train_batch_size: {size}")
    yield Line("gradient_accumulation_steps", passes * processes, f"gradient_accumulation_steps: {passes}{several}")
    steps = number(values.get("max_steps") or -1)
    yield from warmup(values, steps if steps > 0 else None)


def rollouts(sizes: tuple[int, int, int], processes: int, origin: str, step: str) -> Iterator[Line]:
    """Yield PPO's three sizes, for all processes together: each divides the one before it.

    Args:
        sizes: responses of a process in a rollout, in an optimiser step, and in a forward pass.
        origin, step: what the first two are from.
    """
    rollout, minibatch, microbatch = sizes
    several = f", times {processes} processes" if processes > 1 else ""
    yield Line("rollout_batch_size", rollout * processes, f"{origin}{several}")
    yield Line("minibatch_size", minibatch * processes, f"{step}{several}")
    yield Line("microbatch_size", microbatch, "responses of a forward pass in one process; memory only")


def episodes(total: Any, rollout: int, origin: str, passes: Any = None) -> Line:
    """Return the length of a PPO run in responses, whole rollouts.

    Args:
        total: responses; None if the config has `passes` over its prompts instead.
    """
    if not total:
        times = f"num_train_epochs {passes}" if passes else "passes over the prompts"
        return Line("total_episodes", None, f"{times} times the number of prompts; PPO counts responses here")
    rounded = -(-whole(total) // rollout) * rollout
    return Line(
        "total_episodes", rounded, origin + ("" if rounded == whole(total) else ", rounded up to whole rollouts")
    )

"""Options of all stages: one vocabulary, YAML files plus command-line overrides, unknown keys refused.

Names follow transformers and TRL where the meaning is the same. Each option's `help` states its meaning and unit; sizes
are in sequences unless it says tokens, steps are optimiser updates.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from rlhf.config.limits import require_above_zero, require_at_least, require_below_one

T = TypeVar("T")


#: Options that say where a run executes and is kept, not what it computes: they do not make it another recipe.
PLACE_OPTIONS = {
    "registry",
    "output_dir",
    "resume",
    "wandb_mode",
    "wandb_project",
    "wandb_group",
    "save_steps",
    "snapshot_steps",
    "logging_steps",
    "doctor",  # a run that it stopped may go on without it
    # Memory against time: results differ by rounding only.
    "microbatch_size",
    "microbatch_tokens",
    "gradient_checkpointing",
    "offload_base",
    "sampler",
    "merge_adapter",
    "preflight",
}


#: Options that name an input by place; a recipe holds the input's hash instead.
INPUT_OPTIONS = {"dataset", "policy", "reward", "ptx_dataset", "ptx_text", "selection_reward", "new_tokens"}


def option(help: str, default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field whose help text is shown by `--help`; without a default the option must be given."""
    metadata = {"help": help.replace("%", "%%")}  # argparse formats help texts
    return field(metadata=metadata) if default is dataclasses.MISSING else field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class ComputeConfig:
    """Where models are found, and where and in which form they compute."""

    registry: str = option("folder of the model registry", "registry")
    seed: int = option("seed of data order, initialisation and sampling", 0)
    device: Literal["auto", "cpu", "cuda"] = option("where to compute; auto takes CUDA if there is one", "auto")
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = option(
        "compute type; auto is bfloat16 on CUDA and on CPUs with bf16 instructions, else float32", "auto"
    )
    quantization: Literal["none", "4bit", "8bit"] = option("hold the frozen base in 4 or 8 bits (bitsandbytes)", "none")
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = option(
        "attention code; auto computes nothing on padding, and once what rows begin with alike; sdpa where a model forbids it",
        "auto",
    )


@dataclass(kw_only=True)
class RunConfig(ComputeConfig):
    """A run that is recorded."""

    wandb_mode: Literal["auto", "online", "offline", "disabled"] = option(
        "Weights & Biases; auto is online with a key and offline without", "auto"
    )
    wandb_project: str = option("W&B project", "rlhf")


@dataclass(kw_only=True)
class TrainingConfig(RunConfig):
    """What all training runs have in common."""

    name: str = option("name under which the result is registered: STAGE/NAME", "demo")
    output_dir: str = option("folder of the run: logs, checkpoints, samples (a subfolder a stage)", "outputs/demo")
    dataset: str = option("prepared data: folder made by rlhf.data_prep, a data file, or a hub name")
    gradient_checkpointing: bool = option(
        "compute activations again in the backward pass: less memory, about a third more time", False
    )
    optim: Literal["adamw_8bit", "adamw_torch"] = option(
        "optimiser; adamw_8bit keeps its states in 8 bits", "adamw_8bit"
    )
    learning_rate: float = option("peak step size", 1e-4)
    weight_decay: float = option("decoupled weight decay", 0.0)
    adam_beta1: float = option("decay of Adam's first moment", 0.9)
    adam_beta2: float = option("decay of Adam's second moment (InstructGPT: .95)", 0.95)
    adam_epsilon: float = option("Adam's epsilon", 1e-8)
    max_grad_norm: float = option("gradients are scaled down to this global norm", 1.0)
    lr_scheduler_type: Literal["cosine_with_min_lr", "cosine", "linear", "constant_with_warmup"] = option(
        "course of the step size over updates; cosine_with_min_lr falls to 10% of the peak (InstructGPT)",
        "cosine_with_min_lr",
    )
    warmup_steps: int = option(
        "updates over which the step size rises linearly: in PPO from a tenth of the peak (InstructGPT), in SFT and reward "
        "modelling from 0",
        0,
    )
    save_steps: int = option("updates between checkpoints", 20)
    logging_steps: int = option("updates between log lines", 1)
    resume: bool = option("go on from the last checkpoint in output_dir", False)
    preflight: bool = option(
        "check models, data and room before the training (seconds); a failed check ends the run", True
    )
    doctor: list[str] = field(
        default_factory=lambda: ["warn"],
        metadata={
            "help": "what to do about critical health findings: off, warn, stop (with a checkpoint) or roll_back (PPO; elsewhere "
            "it is stop); others for single checks follow as check=action"
        },
    )
    wandb_group: str | None = option("W&B group of the runs of one pipeline; default: the name", None)

    def __post_init__(self) -> None:
        require_at_least(1, self, "save_steps", "logging_steps")
        require_at_least(0, self, "learning_rate", "weight_decay", "adam_epsilon", "warmup_steps")
        require_above_zero(self, "max_grad_norm")
        require_below_one(self, "adam_beta1", "adam_beta2")

    def recipe(self) -> dict[str, Any]:
        """The options that decide what comes out of given inputs."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in PLACE_OPTIONS | INPUT_OPTIONS}


@dataclass(kw_only=True)
class StageConfig(TrainingConfig):
    """What the three stages have in common."""

    lora_r: int = option("rank of the adapters", 16)
    lora_alpha: int = option("scale of the adapters: the update is multiplied by lora_alpha / lora_r", 32)
    lora_dropout: float = option("dropout on the adapters' input (always off in PPO)", 0.0)
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "linear layers that get an adapter: 'all-linear' or names"},
    )
    use_rslora: bool = option("scale adapters by lora_alpha / sqrt(lora_r): steadier at high ranks (rsLoRA)", False)
    use_dora: bool = option("train the length of each weight column apart from its direction (DoRA); slower", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "lora_r", "lora_alpha")
        require_below_one(self, "lora_dropout")


@dataclass(kw_only=True)
class TrainingLength:
    """How long pretraining and the two supervised stages train, and on how much at a time."""

    per_device_train_batch_size: int = option("examples a forward pass (of a reward model: prompts)", 16)
    gradient_accumulation_steps: int = option("forward passes an update", 4)
    per_device_eval_batch_size: int = option("examples a forward pass in evaluation", 32)
    num_train_epochs: float = option(
        "passes over the data; one, as a second makes reward models overfit (InstructGPT, appendix C.2)", 1.0
    )
    max_steps: int = option("updates; above 0 it overrides num_train_epochs", -1)
    max_length: int = option("longest prompt + response, tokens; longer examples are dropped and counted", 1024)
    eval_steps: int = option("updates between evaluations on held-out data", 20)
    max_eval_samples: int = option("held-out examples used while training", 512)

    def check_length(self) -> None:
        """Raises `UserError` for sizes that train on nothing or measure nothing."""
        batches = ("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size")
        require_at_least(1, self, *batches, "max_length", "eval_steps", "max_eval_samples")
        require_above_zero(self, "num_train_epochs")


@dataclass(kw_only=True)
class TextConfig:
    """How plain text is read: as a stream of documents."""

    text_field: str = option("column that holds the text, of data files and hub datasets", "text")
    text_subset: str | None = option("configuration of a hub dataset of texts that has several", None)
    documents: Literal["paragraph", "line", "file"] = option(
        "what a document is in a text file: what stands between empty lines, a line, or the file", "paragraph"
    )

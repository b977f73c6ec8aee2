"""Options that stages share, and the sets of options that a recipe leaves out."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from rlhf.base.errors import did_you_mean, require
from rlhf.base.functions import name_of
from rlhf.config.limits import require_above_zero, require_at_least, require_below_one

#: Programs that take a copy of a run's log.
TRACKERS = ("wandb", "tensorboard", "mlflow", "trackio")
#: Options of these copies.
TRACKING_OPTIONS = ("trackers", "wandb_mode", "wandb_entity", "wandb_project", "wandb_tags", "wandb_notes", "log_texts")
#: Options for where a run executes and is stored, and for memory against time. They are no part of a recipe.
PLACE_OPTIONS = {
    "registry",
    "output_dir",
    "resume",
    *TRACKING_OPTIONS,
    "wandb_group",
    "log_report",
    "num_eval_prompts",
    "save_steps",
    "snapshot_steps",
    "logging_steps",
    "audit_steps",
    "doctor",  # a run that it stopped can resume without it
    # Results differ by rounding only:
    "microbatch_size",
    "microbatch_tokens",
    "gradient_checkpointing",
    "offload_base",
    "sampler",
    "merge_adapter",
    "fuse_adapters",
    "preflight",
}
#: Options that name an input by its place; a recipe holds the input's hash instead.
INPUT_OPTIONS = {"dataset", "policy", "reward", "ptx_dataset", "ptx_text", "selection_reward", "new_tokens"}
#: Groups of options, in the order in which `--help` shows them.
HELP_GROUPS = (
    "data", "sources", "reading", "cleaning", "lengths", "duplicates", "preferences", "splits and stages", "model",
    "adapters (LoRA)", "optimisation", "sampling", "reward", "ranking loss", "KL penalty", "PPO-ptx", "evaluation",
    "report card", "judges", "benchmarks", "checks", "logging", "places and checkpoints", "computing",
)  # fmt: skip


def option(help: str, default: Any = dataclasses.MISSING) -> Any:
    """Return a dataclass field with a help text for `--help`; an option without a default is required."""
    metadata = {"help": help.replace("%", "%%")}  # argparse formats help texts
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def option_groups(config_type: type) -> dict[str, str]:
    """Return each option's group in `--help`; the `GROUPS` of a class names the options at which groups begin."""
    groups: dict[str, str] = {}
    for owner in reversed(config_type.__mro__):
        begins, title = vars(owner).get("GROUPS", {}), HELP_GROUPS[0]
        for name in inspect.get_annotations(owner):
            title = begins.get(name, title)
            if name in begins or name not in groups:
                groups[name] = title
    return groups


@dataclass(kw_only=True)
class ComputeConfig:
    """Options for finding models and computing with them."""

    GROUPS: ClassVar = {"registry": "places and checkpoints", "seed": "computing"}

    registry: str = option("folder of the model registry", "registry")
    seed: int = option("seed of data order, initialisation and sampling", 0)
    device: Literal["auto", "cpu", "cuda"] = option("where to compute; auto takes CUDA if there is one", "auto")
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = option(
        "compute type; auto is bfloat16 on CUDA and on CPUs with bf16 instructions, else float32", "auto"
    )
    quantization: Literal["none", "4bit", "8bit"] = option("hold the frozen base in 4 or 8 bits (bitsandbytes)", "none")
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = option(
        "attention implementation; auto leaves out padding and computes shared prefixes once, with sdpa for other models",
        "auto",
    )
    fuse_adapters: bool = option("compute a linear layer and its LoRA adapter as one function; false: peft's way", True)

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):  # from Python, a list of one may come alone, and a scorer as itself
            value = getattr(self, one.name)
            if str(one.type).startswith("list["):
                values = list(value) if isinstance(value, list | tuple) else [value]
                setattr(self, one.name, [name_of(part) if callable(part) else part for part in values])
            elif callable(value):
                setattr(self, one.name, name_of(value))
        require(0 <= self.seed < 1 << 32, f"seed must be from 0 to {(1 << 32) - 1}, got {self.seed}")


@dataclass(kw_only=True)
class RunConfig(ComputeConfig):
    """Options of a run that is logged."""

    GROUPS: ClassVar = {"trackers": "logging"}

    trackers: list[str] = option(
        "where a copy of the log goes: wandb, tensorboard, mlflow, trackio, several of them, or none", ["wandb"]
    )
    wandb_mode: Literal["auto", "online", "offline", "disabled"] = option(
        "Weights & Biases; auto is online with a key and offline without", "auto"
    )
    wandb_entity: str | None = option("W&B user or team; default: that of the key", None)
    wandb_project: str = option("project of W&B and trackio, experiment of MLflow", "rlhf")
    wandb_tags: list[str] = option("tags of the run in W&B and MLflow", [])
    wandb_notes: str | None = option("notes on the run in W&B and MLflow", None)
    log_texts: bool = option("send prompts and answers to W&B, too; without it they stay in the run's folder", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = next((name for name in self.trackers if name not in (*TRACKERS, "none")), None)
        require(
            unknown is None,
            f"trackers has '{unknown}'; it may have {', '.join(TRACKERS)}, or be none{did_you_mean(str(unknown), TRACKERS)}",
        )
        require("none" not in self.trackers or len(self.trackers) == 1, "trackers is none or a list of names, not both")

    @property
    def tracking(self) -> dict[str, Any]:
        """The options of the run's copies, `TRACKING_OPTIONS`."""
        return {
            "trackers": self.trackers,
            "wandb_mode": self.wandb_mode,
            "wandb_entity": self.wandb_entity,
            "wandb_project": self.wandb_project,
            "wandb_tags": self.wandb_tags,
            "wandb_notes": self.wandb_notes,
            "log_texts": self.log_texts,
        }


@dataclass(kw_only=True)
class TrainingConfig(RunConfig):
    """Options of every training run."""

    GROUPS: ClassVar = {
        "name": "places and checkpoints", "dataset": "data", "gradient_checkpointing": "computing",
        "optim": "optimisation", "save_steps": "places and checkpoints", "logging_steps": "logging",
        "resume": "places and checkpoints", "preflight": "checks", "wandb_group": "logging",
    }  # fmt: skip

    name: str = option("name under which the result is registered: STAGE/NAME; default: the config file's folder")
    output_dir: str = option(
        "folder of the run: logs, checkpoints, samples (one subfolder per stage); default: outputs/NAME", ""
    )
    dataset: str = option("prepared data: folder made by rlhf data, a data file, or a hub name")
    gradient_checkpointing: bool = option(
        "recompute activations in the backward pass: less memory, about a third more time", False
    )
    optim: Literal["adamw_8bit", "adamw_torch"] = option(
        "optimiser; adamw_8bit stores its states in 8 bits", "adamw_8bit"
    )
    learning_rate: float = option("peak step size", 1e-4)
    weight_decay: float = option("decoupled weight decay", 0.0)
    adam_beta1: float = option("decay of Adam's first moment", 0.9)
    adam_beta2: float = option("decay of Adam's second moment (InstructGPT: .95)", 0.95)
    adam_epsilon: float = option("Adam's epsilon", 1e-8)
    max_grad_norm: float = option("gradients are scaled down to this global norm", 1.0)
    lr_scheduler_type: Literal["cosine_with_min_lr", "cosine", "linear", "constant_with_warmup"] = option(
        "schedule of the step size; cosine_with_min_lr falls to 10% of the peak (InstructGPT)", "cosine_with_min_lr"
    )
    warmup_steps: int = option(
        "updates over which the step size rises linearly: from a tenth of the peak in PPO (InstructGPT), from 0 in the other "
        "stages",
        0,
    )
    save_steps: int = option("updates between checkpoints", 20)
    logging_steps: int = option("updates between log lines", 1)
    resume: bool = option("resume from the last checkpoint in output_dir", False)
    preflight: bool = option(
        "check models, data and memory before training (takes seconds); a failed check ends the run", True
    )
    doctor: list[str] = option(
        "action on critical health findings: off, warn, stop (with a checkpoint) or roll_back (in PPO; elsewhere it "
        "means stop); actions for single checks, and names of the review and the audit, follow as name=action",
        ["warn"],
    )
    audit_steps: int = option(
        "updates between audits, which recompute a sample of an update independently; the first is always one; 0: none",
        10,
    )
    wandb_group: str | None = option("W&B group of the runs of one pipeline; default: the name", None)
    log_report: bool = option("send the run's report page, which holds prompts and answers, to W&B and MLflow", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.output_dir = self.output_dir or f"outputs/{self.name}"
        require_at_least(1, self, "save_steps", "logging_steps")
        require_at_least(0, self, "learning_rate", "weight_decay", "adam_epsilon", "warmup_steps", "audit_steps")
        require_above_zero(self, "max_grad_norm")
        require_below_one(self, "adam_beta1", "adam_beta2")

    def recipe(self) -> dict[str, Any]:
        """Return the options that decide the result, without places and inputs."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in PLACE_OPTIONS | INPUT_OPTIONS}


@dataclass(kw_only=True)
class StageConfig(TrainingConfig):
    """Options of the three stages that train adapters."""

    GROUPS: ClassVar = {"lora_r": "adapters (LoRA)"}

    lora_r: int = option("rank of the adapters", 16)
    lora_alpha: int = option("scale of the adapters: the update is multiplied by lora_alpha / lora_r", 32)
    lora_dropout: float = option("dropout on the adapters' input (always off in PPO)", 0.0)
    lora_target_modules: list[str] = option("linear layers that get an adapter: 'all-linear' or names", ["all-linear"])
    use_rslora: bool = option("scale adapters by lora_alpha / sqrt(lora_r): steadier at high ranks (rsLoRA)", False)
    use_dora: bool = option(
        "train the length of each weight column separately from its direction (DoRA); slower", False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "lora_r", "lora_alpha")
        require_below_one(self, "lora_dropout")


@dataclass(kw_only=True)
class TrainingLength:
    """Length and batch sizes of supervised training."""

    GROUPS: ClassVar = {
        "per_device_train_batch_size": "optimisation", "per_device_eval_batch_size": "evaluation",
        "num_train_epochs": "optimisation", "max_length": "data", "eval_steps": "evaluation",
    }  # fmt: skip

    per_device_train_batch_size: int = option("examples per forward pass (in reward modelling: prompts)", 16)
    gradient_accumulation_steps: int = option("forward passes per update", 4)
    per_device_eval_batch_size: int = option("examples per forward pass in evaluation", 32)
    num_train_epochs: float = option(
        "passes over the data; a second one makes reward models overfit (InstructGPT, appendix C.2)", 1.0
    )
    max_steps: int = option("updates; above 0 it overrides num_train_epochs", -1)
    max_length: int = option("longest prompt + response, tokens; longer examples are dropped and counted", 1024)
    eval_steps: int = option("updates between evaluations on held-out data", 20)
    max_eval_samples: int = option("held-out examples used during training", 512)

    def check_length(self) -> None:
        """Raise `UserError` for sizes that leave nothing to train on or to measure."""
        batches = ("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size")
        require_at_least(1, self, *batches, "max_length", "eval_steps", "max_eval_samples")
        require_above_zero(self, "num_train_epochs")


@dataclass(kw_only=True)
class TextConfig:
    """Options for reading plain text as a stream of documents."""

    GROUPS: ClassVar = {"text_field": "data"}

    text_field: str = option("column of data files and hub datasets that holds the text", "text")
    text_subset: str | None = option("configuration of a hub dataset that has several", None)
    documents: Literal["paragraph", "line", "file"] = option(
        "unit of a text file that is one document; paragraphs are separated by empty lines", "paragraph"
    )

"""Plans as lines of text, for the command and for the beginning of a stage."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from rlhf.config import PPOConfig, TrainingConfig
from rlhf.data_prep.load import Loaded
from rlhf.doctor.plan.estimate import MARGIN, Plan, make_plan, parameters
from rlhf.doctor.plan.twin import read_shape
from rlhf.doctor.plan.work import work_of
from rlhf.models.compute import Compute
from rlhf.run.progress import in_words

#: Parameters below which a stage starts without a plan: it needs no room worth mentioning.
SMALL = 5_000_000


def lines(plan: Plan, config: TrainingConfig, place: str) -> list[str]:
    """Return the lines of a plan.

    Args:
        place: what it is for, in words.
    """
    phases = "; ".join(
        f"{phase.name} {_gigabytes(phase.peak)}" + (f", {in_words(phase.seconds)}" if phase.seconds else "")
        for phase in plan.phases
    )
    fits = f"fits: {_gigabytes(plan.peak)} of {_gigabytes(plan.available)}" if plan.fits else _remedy(plan, config)
    return [
        f"plan of {plan.stage} on {place}: {plan.parameters / 1e6:,.1f}M parameters, {plan.trained / 1e6:,.1f}M trained, "
        f"{plan.tokens:,} tokens ({plan.source})",
        f"  memory, time: {phases}" + (f"; {in_words(plan.seconds)} in all" if plan.seconds else ""),
        f"  {fits}; largest {row_option(config)} that fits: {plan.largest} (now {plan.microbatch}); "
        f"disk {_gigabytes(plan.disk)}, {_gigabytes(plan.checkpoint)} a checkpoint",
    ]


def print_plan(
    config: TrainingConfig, name: str, compute: Compute, sets: Mapping[str, Loaded], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Print what a stage that starts will take; small models, and those that cannot be rehearsed, start without.

    Args:
        name: of the base model.
    """
    try:
        shape = read_shape(name, config.registry, trust_remote_code=getattr(config, "trust_remote_code", False))
        if parameters(shape) < SMALL:
            return
        plan = make_plan(config, shape, compute, work_of(config, sets, tokenizer), budget=1.0)
    except Exception as error:  # a stage runs without its plan
        print(f"no plan for {name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}", flush=True)
        return
    print("\n".join(lines(plan, config, str(compute))), flush=True)


def row_option(config: TrainingConfig) -> str:
    """Return the option that decides how many rows a pass with gradients has."""
    return "microbatch_size" if isinstance(config, PPOConfig) else "per_device_train_batch_size"


def _remedy(plan: Plan, config: TrainingConfig) -> str:
    """Return what to change where a plan does not fit."""
    worst = max(plan.phases, key=lambda phase: phase.peak)
    ways = []
    if worst.name in ("rollout", "evaluate") and isinstance(config, PPOConfig):
        ways.append("lower rollout_batch_size or response_length")
    elif plan.largest:
        ways.append(f"set {row_option(config)} to {plan.largest}")
    if not config.gradient_checkpointing:
        ways.append("set gradient_checkpointing")
    if getattr(config, "finetuning", "lora") == "full":
        ways.append("take finetuning lora")
    elif config.quantization == "none" and hasattr(config, "lora_r"):
        ways.append("set quantization 4bit")
    ways.append("take a smaller model")
    return (
        f"does NOT fit: {worst.name} takes {_gigabytes(worst.peak)} (with a margin {_gigabytes(MARGIN * worst.peak)}) of "
        f"{_gigabytes(plan.available)}: {', or '.join(ways)}"
    )


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.3g} GB"

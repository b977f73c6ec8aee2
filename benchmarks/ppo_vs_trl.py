"""One PPO update, ours against the last PPOTrainer of TRL (1.12.0), side by side. `python benchmarks/ppo_vs_trl.py --device cpu`

The work: 64 responses of 32 tokens to prompts of 24 random tokens, none of which ends early; one pass over them in
microbatches of 16 and one AdamW step; LoRA r=16 on all linear layers of the policy; frozen weights and products in bf16.
Both score with a reward model and learn a value model of the policy's size. TRL holds both as separate models and trains all
weights of the second, which it cannot do otherwise; ours are adapters on the policy's base.

TRL 1.12.0 gets an environment of its own, .venv-trl, made on the first run: every other package at this project's version.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common

TRL = "trl==1.12.0"


def main() -> None:
    """Command line."""
    parser = common.parser(__doc__, runs=3)
    parser.add_argument("--model", default="smollm2-135m", help=f"{', '.join(common.SHAPES)}, or a model of your own")
    parser.add_argument("--updates", type=common.count, default=2, help="timed updates a run, after one that warms up")
    parser.add_argument(
        "--variants", nargs="+", default=["default"], help="PPO options of ours, e.g. default value_model=shared_trunk"
    )
    parser.add_argument(
        "--trl_python", help="Python of an environment with TRL 1.12.0; default: one is made in .venv-trl"
    )
    parser.add_argument("--no_trl", action="store_true", help="measure ours only")
    arguments = parser.parse_args()
    variants = {text: common.variant(text) for text in arguments.variants}
    common.check_sizes(arguments)
    trl_python = None if arguments.no_trl else arguments.trl_python or make_environment(common.ROOT / ".venv-trl")
    dtype, machine = common.compute_type(arguments.device), common.machine(arguments.device)
    with common.model_folder(arguments.model) as model, common.registered(model) as registry:
        work = {"model": model, "device": arguments.device, "dtype": dtype, "updates": 1 + arguments.updates}
        work |= {name: getattr(arguments, name) for name in ("episodes", "microbatch", "prompt", "response")}
        run = partial(common.measure, __file__)
        subjects: dict[str, Callable[[], dict[str, Any]]] = {
            f"ours, {text}": partial(run, "ours", {**work, "registry": registry, "options": options})
            for text, options in variants.items()
        }
        if trl_python:
            subjects["trl"] = partial(run, "trl", work, python=str(trl_python))
        runs = common.alternate(arguments.runs, subjects)
    summary = summarise(runs)
    print(table(summary), parts(runs), sep="\n\n")
    work["model"] = arguments.model
    common.save("ppo_vs_trl", arguments, {"machine": machine, "work": work, "summary": summary, "runs": runs})


def make_environment(folder: Path) -> Path:
    """The Python of an environment with TRL 1.12.0 and, of everything else, the versions in constraints.txt.

    torch first and alone, so that pip sees the pinned version and does not go looking for another build. TRL 1.12.0 wants
    transformers >= 4.56.2, accelerate >= 1.4, datasets >= 4.7 and peft >= 0.8, and names no upper bounds.
    """
    from rlhf.base.errors import UserError

    pins = (common.ROOT / "constraints.txt").read_text()
    pins = re.sub(r"^trl==.*$", TRL, pins, flags=re.M)
    python, mark, constraints = folder / "bin" / "python", folder / "installed.txt", folder / "constraints.txt"
    if mark.is_file() and mark.read_text() == pins:
        return python
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(constraints)]
    try:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        constraints.write_text(pins)
        for packages in (["torch"], [TRL, "peft", "psutil"]):
            print(f"installing {' '.join(packages)} into {folder}", flush=True)
            subprocess.run([*install, *packages], check=True)
    except subprocess.CalledProcessError as error:
        raise UserError(
            f"the environment {folder} with {TRL} could not be made (see above); give one with --trl_python, or --no_trl"
        ) from error
    mark.write_text(pins)
    return python


def ours(*, updates: int, device: str, **work: Any) -> dict[str, Any]:
    """Updates of our trainer, where their time goes, times over their floors, and where the bytes of one more update go."""
    from floor import Clock
    from products import PHASES, SIZES, Floor

    with common.ppo_trainer(**work, device=device, updates=updates + 1) as trainer:
        floor = Floor("ppo", work["model"], trainer.config, *(work[name] for name in SIZES))
        clock = Clock(floor, updates - 1, profiled=False)
        clock.updates_of(trainer)
        phases = {name: statistics.median(step[name]["seconds"] for step in clock.timed) for name in PHASES}
        ratios = [step["update"]["ratio"] for step in clock.timed]
        over = {f"over its floor, {kind}": statistics.median(ratio[kind] for ratio in ratios) for kind in ratios[0]}
        tokens = work["episodes"] * (work["prompt"] + work["response"])
        return {"seconds": clock.seconds, "phases": phases, "times": over, "gb": gigabytes(trainer, tokens)}


def gigabytes(trainer: Any, tokens: int) -> dict[str, float]:
    """What an update holds, 10^9 bytes; `tokens` of the whole rollout have keys and values while it is sampled."""
    import torch

    from rlhf.doctor.preflight.room import ActivationMeter
    from rlhf.run.memory import cache_bytes

    kept = ActivationMeter(trainer.models)
    with kept.counted():
        trainer.step()
    weights = list(trainer.models.parameters())
    states = [
        x for state in trainer.state.optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)
    ]

    def size(tensors: Sequence[Any]) -> int:
        return sum(x.numel() * x.element_size() for x in tensors)

    trained = size([p for p in weights if p.requires_grad])
    found = {
        "frozen weights": size(weights) - trained,
        "trained weights": trained,
        "their gradients": trained,
        "optimiser states": size(states),
        "keys and values, in sampling": cache_bytes(trainer.models.causal, tokens),
        "activations of a microbatch": kept.peak,
    }
    return {name: count / 1e9 for name, count in found.items()}


def trl(
    *, model: str, device: str, dtype: str, episodes: int, microbatch: int, prompt: int, response: int, updates: int
) -> dict[str, Any]:
    """Updates of TRL's trainer; runs in its environment."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from rlhf.models.tokenization import load_tokenizer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.stamps: list[float] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            self.stamps.append(time.perf_counter())

        on_step_end = on_train_begin

    def scorer() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=getattr(torch, dtype))

    rows = [{"input_ids": ids} for ids in common.random_prompts(model, episodes * updates, prompt)]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=microbatch,
            gradient_accumulation_steps=episodes // microbatch,
            num_mini_batches=1,
            num_ppo_epochs=1,
            total_episodes=episodes * updates,
            local_rollout_forward_batch_size=episodes,
            response_length=response,
            temperature=1.0,
            learning_rate=1e-5,
            bf16=dtype == "bfloat16",
            use_cpu=device == "cpu",
            gradient_checkpointing=False,
            num_sample_generations=0,
            save_strategy="no",
            report_to=[],
        )
        trainer = PPOTrainer(
            args=arguments,
            processing_class=load_tokenizer(model, chat_template="plain"),
            model=AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)),
            ref_model=None,  # the base with its adapter switched off
            reward_model=scorer(),
            value_model=scorer(),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows[:microbatch]),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[clock],
        )
        trainer.train()
    return {"seconds": [after - before for before, after in zip(clock.stamps, clock.stamps[1:], strict=False)]}


def summarise(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Seconds an update and peak memory of each subject over rounds, and of ours against TRL's run of the same round."""
    seconds = {name: [statistics.median(run["seconds"][1:]) for run in of] for name, of in runs.items()}
    peaks = {name: [common.peak_gb(run) for run in of] for name, of in runs.items()}
    compared = {
        name: {
            "times_faster": common.spread([t / o for t, o in zip(seconds["trl"], seconds[name], strict=True)]),
            "share_of_memory": common.spread([o / t for t, o in zip(peaks["trl"], peaks[name], strict=True)]),
        }
        for name in runs
        if name != "trl" and "trl" in runs
    }
    return {
        "seconds_per_update": {name: common.spread(values) for name, values in seconds.items()},
        "peak_gb": {name: common.spread(values) for name, values in peaks.items()},
        "against_trl": compared,
    }


def table(summary: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| PPO | s an update, median (range) | peak GB | times faster than TRL | share of TRL's memory |",
        "|---|---|---|---|---|",
    ]
    for name, seconds in summary["seconds_per_update"].items():
        ratios = [common.show(figure) for figure in summary["against_trl"].get(name, {}).values()] or ["", ""]
        lines.append(
            "| " + " | ".join([name, common.show(seconds), common.show(summary["peak_gb"][name]), *ratios]) + " |"
        )
    return "\n".join(lines)


def parts(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Markdown: where the time and the bytes of our updates go, and how far they are from their floors (`floor.py`)."""
    own = {name: of for name, of in runs.items() if name != "trl"}
    lines = ["| " + " | ".join(["", *own]) + " |", "|---" * (1 + len(own)) + "|"]
    for key, unit in (("phases", "s"), ("times", "times"), ("gb", "GB")):
        for part in next(iter(own.values()))[0][key]:
            figures = [common.show(common.spread([run[key][part] for run in of])) for of in own.values()]
            lines.append("| " + " | ".join([f"{part}, {unit}", *figures]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    common.start(main, {"ours": ours, "trl": trl})

"""Memory: LoRA PPO against LoRA SFT, and whether it grows over updates. `python benchmarks/memory.py --device cpu`

1. Peak memory of the SFT and PPO stages as a user runs them, on the same model, with the same number of tokens a microbatch,
   each in a process of its own; and of PPO against TRL's, if `ppo_vs_trl.py` has measured the same work before.
2. Memory in use after each of 200 updates of a tiny model: a slope that is not 0 is a leak.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common


def main() -> None:
    """Command line."""
    parser = common.parser(__doc__, runs=3)
    parser.add_argument("--model", choices=list(common.SHAPES), default="smollm2-135m")
    parser.add_argument("--updates", type=common.count, default=2, help="optimiser updates of each stage")
    parser.add_argument(
        "--growth_updates", type=common.count, default=200, help="updates over which growth is measured"
    )
    parser.add_argument("--options", default="default", help="PPO options, e.g. value_model=shared_trunk")
    parser.add_argument("--trl", type=Path, help="results of ppo_vs_trl.py; default: those of this device, if there")
    arguments = parser.parse_args()
    common.check_sizes(arguments)
    options = common.variant(arguments.options)
    dtype, machine = common.compute_type(arguments.device), common.machine(arguments.device)
    names = ("model", "device", "episodes", "microbatch", "prompt", "response", "options")
    work = {"dtype": dtype, **{name: getattr(arguments, name) for name in names}}
    with common.model_folder(arguments.model) as model, tempfile.TemporaryDirectory() as folder:
        size = common.SHAPES[arguments.model]["vocab_size"]
        write_data(Path(folder, "data"), 2 * arguments.episodes, size, arguments.prompt, arguments.response)
        run = stages(Path(folder), model, arguments, dtype, options)
        print("SFT and reward model that PPO starts from", flush=True)
        run["sft"](), run["reward"]()
        runs = common.alternate(arguments.runs, {"sft": run["sft again"], "ppo": run["ppo"]})
    summary: dict[str, Any] = summarise(runs)
    file = arguments.trl or common.RESULTS / f"ppo_vs_trl_{arguments.device}.json"
    summary["ppo / trl"] = against_trl(summary, work, machine, json.loads(file.read_text())) if file.is_file() else None
    print(f"{arguments.growth_updates} updates of the tiny model", flush=True)
    used = measured_growth({"device": arguments.device, "dtype": dtype, "updates": arguments.growth_updates})
    summary["growth"] = growth_of(used)
    print(table(summary))
    result = {"machine": machine, "work": work, "summary": summary, "runs": runs, "growth_gb": used}
    common.save("memory", arguments, result)


def stages(
    folder: Path, model: str, arguments: argparse.Namespace, dtype: str, options: Mapping[str, str]
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Writes the configs of the stages; returns what runs each in a process of its own."""
    made = configs(folder, model, arguments, dtype, options)
    # A new version of sft/chain would part PPO from its reward model.
    made["sft again"] = {**made["sft"], "name": "again"}
    runs = {}
    for name, config in made.items():
        file = folder / f"{name}.yaml"
        file.write_text(json.dumps({**config, "output_dir": str(folder / name)}))  # JSON is YAML, too
        work = {"kind": name.split()[0], "config": str(file), "device": arguments.device}
        runs[name] = partial(common.measure, __file__, "stage", work)
    return runs


def configs(
    folder: Path, model: str, arguments: argparse.Namespace, dtype: str, options: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """The options of each stage, on the data of `write_data` in the folder.

    A demonstration is as long as an episode, so a microbatch of either stage has the same tokens.
    """
    a = arguments
    shared = {"registry": str(folder / "registry"), "dataset": str(folder / "data"), "wandb_mode": "disabled"}
    shared |= {"name": "chain", "device": a.device, "dtype": dtype, "save_steps": a.updates}
    supervised = {"max_steps": a.updates, "eval_steps": a.updates, "max_length": a.prompt + a.response}
    supervised |= {"max_eval_samples": a.microbatch, "per_device_eval_batch_size": a.microbatch}
    sft = {**shared, **supervised, "model_name_or_path": model, "chat_template": "plain"}
    sft |= {"per_device_train_batch_size": a.microbatch, "gradient_accumulation_steps": a.episodes // a.microbatch}
    reward = {**shared, **supervised, "policy": "sft/chain", "gradient_accumulation_steps": 1}
    reward |= {"per_device_train_batch_size": max(1, a.microbatch // 2)}  # prompts with two responses each
    ppo = {**shared, "policy": "sft/chain", "reward": ["reward/chain"], "num_eval_samples": a.episodes}
    ppo |= {"total_episodes": a.episodes * a.updates, "rollout_batch_size": a.episodes, "minibatch_size": a.episodes}
    ppo |= {"microbatch_size": a.microbatch, "response_length": a.response, **options}
    return {"sft": sft, "reward": reward, "ppo": ppo}


def write_data(folder: Path, rows: int, vocab_size: int, prompt: int, response: int) -> None:
    """Demonstrations, comparisons and prompts of random words, each word one token of the benchmark's tokenizer."""
    source = random.Random(0)

    def turn(role: str, words: int) -> list[dict[str, str]]:
        ids = [source.randrange(vocab_size // 4, 3 * vocab_size // 4) for _ in range(words)]
        return [{"role": role, "content": " ".join(f"w{i}" for i in ids)}]

    def write(name: str, made: Sequence[Mapping[str, Any]]) -> None:
        file = folder / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in made))

    for split in ("train", "validation"):
        prompts = [turn("user", prompt) for _ in range(rows)]
        answers = [[turn("assistant", response - 1) for _ in range(2)] for _ in range(rows)]  # and the stop token
        write(f"prompts/{split}", [{"prompt": p} for p in prompts])
        write(
            f"demonstrations/{split}",
            [{"prompt": p, "completion": a[0]} for p, a in zip(prompts, answers, strict=True)],
        )
        write(
            f"comparisons/{split}",
            [{"prompt": p, "responses": a, "ratings": [1.0, -1.0]} for p, a in zip(prompts, answers, strict=True)],
        )


def stage(*, kind: str, config: str, device: str) -> dict[str, Any]:
    """One stage from its config file, as the command line runs it."""
    from rlhf.config import STAGE_CONFIGS, parse_config

    started = time.perf_counter()
    importlib.import_module(f"rlhf.stages.{kind}").run(parse_config(STAGE_CONFIGS[kind], ["--config", config]))
    return {"seconds": time.perf_counter() - started}


def measured_growth(work: Mapping[str, Any]) -> list[float]:
    """`growth` of the tiny model, in a process of its own."""
    with common.model_folder("tiny") as model, common.registered(model) as registry:
        return common.measure(__file__, "growth", {**work, "model": model, "registry": registry})["used_gb"]


def growth(*, device: str, updates: int, **work: Any) -> dict[str, Any]:
    """Memory in use after each update, 10^9 bytes: resident, or allocated on the GPU."""
    import psutil
    import torch

    process, used = psutil.Process(), []
    sizes = {"episodes": 16, "microbatch": 8, "prompt": 16, "response": 16, "options": {}}
    with common.ppo_trainer(**work, **sizes, device=device, updates=updates) as trainer:
        for _ in range(updates):
            trainer.step()
            gc.collect()
            used.append((torch.cuda.memory_allocated() if device == "cuda" else process.memory_info().rss) / 1e9)
    return {"used_gb": used}


def summarise(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Peak memory of the stages over rounds, and PPO's as a multiple of SFT's of the same round."""
    peaks = {name: [common.peak_gb(run) for run in of] for name, of in runs.items()}
    return {
        "peak_gb": {name: common.spread(values) for name, values in peaks.items()},
        "ppo / sft": common.spread([p / s for p, s in zip(peaks["ppo"], peaks["sft"], strict=True)]),
    }


def against_trl(
    summary: Mapping[str, Any], work: Mapping[str, Any], machine: Mapping[str, Any], trl: Mapping[str, Any]
) -> float | None:
    """The PPO stage's peak as a share of TRL's, if that was measured on the same kind of machine with the same work."""
    same = ("model", "device", "dtype", "episodes", "microbatch", "prompt", "response")
    comparable = all(work[name] == trl["work"][name] for name in same) and all(
        machine[name] == trl["machine"][name] for name in ("processor", "gpu")
    )
    if not comparable or "trl" not in trl["summary"]["peak_gb"]:
        return None
    return summary["peak_gb"]["ppo"]["median"] / trl["summary"]["peak_gb"]["trl"]["median"]


def growth_of(used: Sequence[float]) -> dict[str, float]:
    """Growth in megabytes: a update, by least squares over the second half, when all buffers are there; and in that half."""
    late = [value * 1e3 for value in used[len(used) // 2 :]]
    return {
        "updates": len(used),
        "mb_per_update": statistics.linear_regression(range(len(late)), late).slope,
        "mb_in_second_half": late[-1] - late[0],
        "mb_at_end": late[-1],
    }


def table(summary: Mapping[str, Any]) -> str:
    """Markdown."""
    growth = summary["growth"]
    lines = ["| memory | median (range) |", "|---|---|"]
    lines += [f"| {name}: peak GB | {common.show(figure)} |" for name, figure in summary["peak_gb"].items()]
    lines.append(f"| PPO / SFT | {common.show(summary['ppo / sft'])} |")
    if summary["ppo / trl"] is not None:
        lines.append(f"| PPO / TRL's PPO | {summary['ppo / trl']:.3g} |")
    slope = f"{growth['mb_per_update']:.3g} MB an update at {growth['mb_at_end']:.4g} MB"
    return "\n".join([*lines, f"| growth over {growth['updates']} updates, tiny model | {slope} |"])


if __name__ == "__main__":
    common.start(main, {"stage": stage, "growth": growth})

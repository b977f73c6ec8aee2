"""Plans against runs: memory and time of 20 configurations on one CPU thread. `python benchmarks/plan.py`

Each configuration is planned in a process of its own, as `rlhf plan` does, and right after that run by its stage in another.
Memory is the resident peak of the process; time is processor time, so that other work on the machine does not count. The
constants of the plan were fitted on two other shapes, none of which is here.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import common
from memory import write_data

common.SHAPES |= {
    "plan-deep": {
        "vocab_size": 12000,
        "hidden_size": 320,
        "intermediate_size": 864,
        "num_hidden_layers": 14,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
    },
    "plan-vocabulary": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 10,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "plan-wide": {
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
}
SHAPES = ("plan-deep", "plan-vocabulary", "plan-wide")
CHECKPOINTED, FOUR_BIT, FULL = {"gradient_checkpointing": True}, {"quantization": "4bit"}, {"finetuning": "full"}
#: Stage and options of each configuration, for every shape.
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("sft", {}),
    ("sft", CHECKPOINTED),
    ("sft", FOUR_BIT),
    ("reward", {}),
    ("reward", FULL),
    ("ppo", {}),
    ("ppo", {**FOUR_BIT, **CHECKPOINTED}),
)
#: Configurations of the 21 that are not measured: full copies of the widest model take longest.
LEFT_OUT = (("plan-wide", "reward", FULL),)
MARKS = ("<!-- plans: made by benchmarks/plan.py -->", "<!-- end of plans -->")
#: Phases whose time is compared; the others are mostly not passes of a model.
TIMED = {"sft": ("train",), "reward": ("train",), "ppo": ("rollout", "score", "optimise")}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=common.RESULTS / "plan_cpu.json", help="result file")
    parser.add_argument("--shapes", nargs="+", choices=list(common.SHAPES), default=list(SHAPES))
    parser.add_argument("--rows", type=common.count, default=16, help="rows of a pass")
    parser.add_argument("--tokens", type=common.count, default=32, help="tokens of a prompt, and of an answer")
    parser.add_argument("--write", type=Path, help="page with the marks between which the table is put")
    arguments = parser.parse_args()
    arguments.device = "cpu"
    machine, cases = common.machine("cpu"), []
    for shape in arguments.shapes:
        with common.model_folder(shape) as model, tempfile.TemporaryDirectory() as folder:
            write_data(Path(folder, "data"), 64, common.SHAPES[shape]["vocab_size"], arguments.tokens, arguments.tokens)
            variants = [(kind, options) for kind, options in VARIANTS if (shape, kind, options) not in LEFT_OUT]
            works = [
                written(number, kind, options, model, Path(folder), arguments)
                for number, (kind, options) in enumerate(variants)
            ]
            plans = common.measure(__file__, "plans", {"works": works, "model": model, "device": "cpu"})["plans"]
            for (kind, options), work, plan in zip(variants, works, plans, strict=True):
                case = compared(kind, options, plan, common.measure(__file__, "stage", work))
                print(
                    f"{shape} {kind} {options}:",
                    {k: round(v, 2) for k, v in case.items() if isinstance(v, float)},
                    flush=True,
                )
                cases.append({"shape": shape, **case})
        common.save("plan", arguments, {"machine": machine, "summary": summarise(cases), "cases": cases})
    page = table(summarise(cases), cases)
    print(page)
    if arguments.write:
        text, (begin, end) = arguments.write.read_text(encoding="utf-8"), MARKS
        head, _, rest = text.partition(begin)
        arguments.write.write_text(f"{head}{begin}\n{page}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def written(
    number: int, kind: str, options: Mapping[str, Any], model: str, folder: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Write the config file of a configuration; return the work of its run."""
    file = folder / f"{number}.yaml"
    config = {**stage_options(kind, model, folder, arguments.rows, arguments.tokens), **options}
    file.write_text(json.dumps(config))  # JSON is YAML, too
    return {"kind": kind, "config": str(file), "device": "cpu"}


def compared(kind: str, options: Mapping[str, Any], plan: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a plan beside those of its run."""
    phases = [(row, run["phases"][row["name"]]) for row in plan["phases"] if row["name"] in run["phases"]]
    return {
        "stage": kind,
        "options": dict(options),
        "planned_gb": plan["peak"] / 1e9,
        "measured_gb": max(row["gb"] for row in run["phases"].values()),
        "planned_seconds": sum(row["seconds"] for row, _ in phases if row["name"] in TIMED[kind]),
        "measured_seconds": sum(one["cpu"] for row, one in phases if row["name"] in TIMED[kind]),
        "phases": [{**row, "measured_gb": one["gb"], "measured_seconds": one["cpu"]} for row, one in phases],
    }


def stage_options(kind: str, model: str, folder: Path, rows: int, tokens: int) -> dict[str, Any]:
    """Return the options of a short run of a stage."""
    shared = {"registry": f"{folder}/registry", "dataset": f"{folder}/data", "output_dir": f"{folder}/out"}
    shared |= {"name": "run", "wandb_mode": "disabled", "device": "cpu", "save_steps": 2, "preflight": False}
    if kind == "ppo":
        sizes = {"rollout_batch_size": 2 * rows, "minibatch_size": rows, "microbatch_size": rows}
        chain = {"policy": "sft/run@1", "reward": ["reward/run@1"]}
        return {
            **shared,
            **chain,
            **sizes,
            "total_episodes": 4 * rows,
            "response_length": tokens,
            "num_eval_samples": rows,
        }
    length = {"max_steps": 4, "eval_steps": 4, "save_steps": 4, "max_eval_samples": rows, "max_length": 4 * tokens}
    length |= {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": 1,
        "per_device_eval_batch_size": rows,
    }
    if kind == "sft":
        return {**shared, **length, "model_name_or_path": model, "chat_template": "plain"}
    card = {"card_policy_samples": 8, "card_likelihood_responses": 8, "card_probe_answers": 2, "response_length": 8}
    return {**shared, **length, **card, "policy": "sft/run@1", "per_device_train_batch_size": max(rows // 2, 1)}


def plans(*, works: Sequence[Mapping[str, str]], model: str, device: str) -> dict[str, Any]:
    """Plan stages from their config files, with times in processor seconds."""
    from rlhf.config import STAGE_CONFIGS, parse_config
    from rlhf.doctor.plan.estimate import as_dict, libraries, make_plan
    from rlhf.doctor.plan.twin import read_shape
    from rlhf.doctor.plan.work import read_work
    from rlhf.models.compute import Compute
    from rlhf.models.tokenization import load_tokenizer

    for kind in TIMED:
        importlib.import_module(f"rlhf.stages.{kind}")
    libraries()
    tokenizer, made = load_tokenizer(model, chat_template="plain"), []
    for one in works:
        options: Any = parse_config(STAGE_CONFIGS[one["kind"]], ["--config", one["config"]])
        work, shape = read_work(options, options.dataset, tokenizer), read_shape(model, options.registry)
        plan = make_plan(options, shape, Compute.choose(options), work, clock=time.process_time)
        made.append(as_dict(plan))
    return {"plans": made}


def stage(*, kind: str, config: str, device: str) -> dict[str, Any]:
    """Run a stage from its config file; return the peak memory and the processor seconds of each phase."""
    from rlhf.config import STAGE_CONFIGS, parse_config
    from rlhf.run.timing import PhaseTimer

    runner = importlib.import_module(f"rlhf.stages.{kind}")
    phases: dict[str, dict[str, float]] = {}
    ordinary, started = PhaseTimer.phase, time.process_time()

    def add(name: str, gb: float, seconds: float) -> None:
        row = phases.setdefault(name, {"gb": 0.0, "cpu": 0.0})
        row["gb"], row["cpu"] = max(row["gb"], gb), row["cpu"] + seconds

    @contextlib.contextmanager
    def phase(self: Any, name: str) -> Iterator[None]:
        nonlocal started
        add("between" if phases else "load", forget_peak(), time.process_time() - started)
        started = time.process_time()
        with ordinary(self, name):
            yield
        add(name, forget_peak(), time.process_time() - started)
        started = time.process_time()

    PhaseTimer.phase = phase  # type: ignore[method-assign]
    forget_peak()
    runner.run(parse_config(STAGE_CONFIGS[kind], ["--config", config]))
    add("between", forget_peak(), time.process_time() - started)
    return {"phases": phases}


def forget_peak() -> float:
    """Return the process's peak memory since the last call, 10^9 bytes, and let the system count anew."""
    peak = common.peak_memory("cpu")["peak_rss_gb"]
    Path("/proc/self/clear_refs").write_text("5")
    return peak


def summarise(cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return median and largest errors, and the number of runs that took more than their plan with its margin."""
    from rlhf.doctor.plan.estimate import MARGIN

    memory = [abs(case["planned_gb"] / case["measured_gb"] - 1) for case in cases]
    seconds = [abs(case["planned_seconds"] / case["measured_seconds"] - 1) for case in cases]
    phases = [abs(row["peak"] / 1e9 / row["measured_gb"] - 1) for case in cases for row in case["phases"]]
    return {
        "configurations": len(cases),
        "memory_error": {"median": statistics.median(memory), "max": max(memory)},
        "memory_error_of_phases": {"median": statistics.median(phases), "max": max(phases)},
        "time_error": {"median": statistics.median(seconds), "max": max(seconds)},
        "wrong_fits": sum(case["measured_gb"] > MARGIN * case["planned_gb"] for case in cases),
    }


def table(summary: Mapping[str, Any], cases: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of the configurations."""
    lines = [
        "| shape | stage | options | GB planned | measured | seconds planned | measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        options = ", ".join(f"{name} {value}" for name, value in case["options"].items())
        figures = [case[name] for name in ("planned_gb", "measured_gb", "planned_seconds", "measured_seconds")]
        shown = " | ".join(f"{figure:.3g}" for figure in figures)
        lines.append(f"| {case['shape'].removeprefix('plan-')} | {case['stage']} | {options} | {shown} |")
    errors = [
        f"{name} {summary[name]['median']:.1%} (largest {summary[name]['max']:.1%})"
        for name in ("memory_error", "time_error")
    ]
    return "\n".join([*lines, "", f"Median: {', '.join(errors)}; wrong fits {summary['wrong_fits']}"])


if __name__ == "__main__":
    common.start(main, {"plans": plans, "stage": stage})

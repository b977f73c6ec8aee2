"""How far each stage is from the fastest that this machine could do it. `python benchmarks/floor.py --device cpu`

The floor of a piece of work is the time of the matrix products that it cannot do without, at the rates that this machine
reaches at their very shapes: those of linear layers in each pass over the tokens and in the gradient of its inputs, those
of the head on response tokens, and for each token that is sampled the products of the batch's rows or the reading of all
weights, keys and values, whichever takes longer. Adapters' own products are counted apart. Attention's products, anything
element by element, and the optimiser are not in it. Rates are taken right before and after each timed step.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

import common
import memory
import torch
from products import PHASES, SIZES, Floor, Times
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from rlhf.config import STAGE_CONFIGS, build
from rlhf.doctor.plan.twin import read_shape

#: Operators shown.
TOP = 12
#: Name of the products of layers and head in a profile.
BASE = "base products"


class Clock(TrainerCallback):
    """Times steps beside their floors: the first warms up, and the last, if there is a profiler, is not timed."""

    def __init__(self, floor: Floor, updates: int, *, profiled: bool = True) -> None:
        self.floor, self.updates = floor, updates
        self.cuda = floor.device.type == "cuda"
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.cuda else [])]
        self.profiler = profile(activities=kinds, record_shapes=True) if profiled else None
        self.seconds: list[float] = []
        self.timed: list[dict[str, Any]] = []
        self.before: Times = {}

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Rates before the first timed step, or the profiler."""
        if len(self.seconds) == 1:
            self.before = self.floor.times()
        if len(self.seconds) > self.updates and self.profiler:
            self.profiler.start()
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, phases: Mapping[str, float] | None = None, **__: Any) -> None:
        """Rates after the step."""
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.started)
        if len(self.seconds) > self.updates + 1 and self.profiler:
            self.profiler.stop()
            raise Measured
        if len(self.seconds) > 1:
            after = self.floor.times()
            whole = {**(phases or {}), list(self.floor.pieces)[-1]: self.seconds[-1]}
            self.timed.append(self.floor.over(whole, self.before, after))
            self.before = after

    def updates_of(self, trainer: Any) -> None:
        """Make updates of PPO."""
        with contextlib.suppress(Measured):
            for _ in range(self.updates + 1 + bool(self.profiler)):
                self.on_step_begin()
                metrics = trainer.step()
                self.on_step_end(phases={name: metrics[f"time/{name}"] for name in PHASES})

    def operators(self, times: Times) -> dict[str, Any]:
        """Seconds and calls of the operators that cost most besides the base products, and the sum of those.

        A product with a side that is smaller than any layer, and that is no number of rows, is an adapter's or a score head's.
        """
        floor, seconds, calls = self.floor, Counter[str](), Counter[str]()
        sides = [side for layer in floor.layers for side in (layer.inputs, layer.outputs) if side > layer.rank]
        narrow = min(sides, default=0)  # of layers but for routers, which are narrower than adapters
        rows = {floor.rows, floor.answers, floor.at_once, floor.episodes}
        for event in cast(profile, self.profiler).key_averages(group_by_input_shape=True):
            name = event.key.removeprefix("aten::")
            if name in ("mm", "addmm", "addmm_"):
                sizes = {size for shape in event.input_shapes[:3] if len(shape) == 2 for size in shape} - rows
                name = BASE if min(sizes, default=0) >= narrow else f"{name}, narrow"
            name = BASE if name == "mkldnn::_linear_pointwise" else name  # sampling, with the policy's adapter merged
            seconds[name] += (event.self_device_time_total if self.cuda else event.self_cpu_time_total) / 1e6
            calls[name] += event.count
        parts = {BASE: seconds.pop(BASE, 0.0), "other operators": sum(seconds.values())}
        parts["outside operators"] = self.seconds[-1] - sum(parts.values())
        top = [{"name": name, "seconds": own, "calls": calls[name]} for name, own in seconds.most_common(TOP)]
        least = list(floor.pieces.values())[-1].seconds(times)["base"]
        return {"whole step": self.seconds[-1], "floor of the base products": least, **parts, "top": top}

    def report(self) -> dict[str, Any]:
        """What a worker reports."""
        times = self.floor.times()
        counted = {"pieces": {name: piece.flops() for name, piece in self.floor.pieces.items()}}
        rates = {"modules": self.floor.modules(times), "gb_per_second": 1e-9 / times[None]}
        return {"timed": self.timed, **counted, **rates, "operators": self.operators(times)}


class Measured(Exception):
    """All steps are done; what follows in a stage is not measured."""


def ppo(*, updates: int, device: str, **work: Any) -> dict[str, Any]:
    """Updates of `PPOTrainer`."""
    with common.ppo_trainer(**work, options={}, device=device, updates=updates + 2) as trainer:
        clock = Clock(Floor("ppo", work["model"], trainer.config, *(work[name] for name in SIZES)), updates)
        clock.updates_of(trainer)
        return clock.report()


def supervised(*, kind: str, model: str, registry: str, dtype: str, updates: int, **work: Any) -> dict[str, Any]:
    """Steps of a stage as its users run it; it ends after the last."""
    stage: Any = importlib.import_module(f"rlhf.stages.{kind}")
    arguments = argparse.Namespace(**work, updates=updates + 3)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        options = {**memory.configs(Path(folder), model, arguments, dtype, {})[kind], "registry": registry}
        options |= {"output_dir": folder, "preflight": False}
        options |= {"policy": "sft/benchmark"} if kind == "reward" else {}
        size = read_shape(model, registry).vocab_size
        memory.write_data(Path(folder, "data"), 2 * work["episodes"], size, work["prompt"], work["response"])
        config: Any = build(STAGE_CONFIGS[kind], options, "benchmark")
        clock, train = Clock(Floor(kind, model, config, *(work[name] for name in SIZES)), updates), stage.train

        def timed(trainer: Any, run: Any) -> None:
            trainer.add_callback(clock)
            train(trainer, run)

        unrecorded = mock.patch.object(stage, "overlap", lambda *_: {})  # the registered policy has no data
        with mock.patch.object(stage, "train", timed), unrecorded, contextlib.suppress(Measured):
            stage.run(config)
        return clock.report()


def summarise(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Seconds, floors and ratios of each piece over all timed steps of all rounds."""
    summary = {}
    for of in runs.values():
        for name in of[0]["timed"][0]:
            steps = [step[name] for run in of for step in run["timed"]]
            summary[name] = {"seconds": common.spread([step["seconds"] for step in steps])}
            for kind in ("base", "with adapters"):
                for key in ("floor", "ratio"):
                    summary[name][f"{key}, {kind}"] = common.spread([step[key][kind] for step in steps])
    return summary


def table(summary: Mapping[str, Any], runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Markdown: times over floors, what is counted, and the operators above the floor that cost most."""
    lines = [
        "| | s, median (range) | base products, s | over these | with the adapters', s | over these |",
        "|---" * 6 + "|",
    ]
    lines += [f"| {name} | {' | '.join(map(common.show, of.values()))} |" for name, of in summary.items()]
    last = {name: of[-1] for name, of in runs.items()}
    lines += ["", "| | inputs x outputs | rows | GFLOP | TFLOP/s: forward, gradient |", "|---" * 5 + "|"]
    for row in last["ppo"]["modules"]:
        shape, rates = (
            f"{row['inputs']} x {row['outputs']}",
            ", ".join(f"{rate:.3g}" for rate in row["tflops"].values()),
        )
        lines.append(f"| {row['number']} {row['name']} | {shape} | {row['rows']} | {row['gflop']:.4g} | {rates} |")
    lines += ["", f"| TFLOP (read at {last['ppo']['gb_per_second']:.3g} GB/s) | base | adapters |", "|---|---|---|"]
    for name, piece in ((name, piece) for run in last.values() for name, piece in run["pieces"].items()):
        lines.append(f"| {name} | {piece['base'] / 1e12:.4g} | {piece['adapters'] / 1e12:.3g} |")
    lines += ["", "| " + " | ".join(f"{name}: operator, s (calls)" for name in last) + " |", "|---" * len(last) + "|"]
    own = [run["operators"] for run in last.values()]
    columns = [[f"*{key}* {of[key]:.3g}" for key in of if key != "top"] for of in own]
    for column, of in zip(columns, own, strict=True):
        column += [f"{one['name']} {one['seconds']:.3g} ({one['calls']})" for one in of["top"]]
    lines += ["| " + " | ".join(cells) + " |" for cells in itertools.zip_longest(*columns, fillvalue="")]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = common.parser(__doc__, runs=2)
    parser.set_defaults(microbatch=32)
    parser.add_argument("--model", default="smollm2-135m", help=f"{', '.join(common.SHAPES)}, or a model of your own")
    parser.add_argument("--updates", type=common.count, default=2, help="timed steps a run, after one that warms up")
    arguments = parser.parse_args()
    common.check_sizes(arguments)
    dtype, machine = common.compute_type(arguments.device), common.machine(arguments.device)
    with common.model_folder(arguments.model) as model, common.registered(model) as registry:
        work = {"model": model, "registry": registry, "dtype": dtype}
        work |= {name: getattr(arguments, name) for name in ("device", "updates", *SIZES)}
        run = partial(common.measure, __file__)
        subjects: dict[str, Callable[[], dict[str, Any]]] = {"ppo": partial(run, "ppo", work)}
        subjects |= {kind: partial(run, "supervised", {**work, "kind": kind}) for kind in ("sft", "reward")}
        runs = common.alternate(arguments.runs, subjects)
    summary = summarise(runs)
    print(table(summary, runs))
    result = {"machine": machine, "work": {**work, "model": arguments.model}, "summary": summary, "runs": runs}
    common.save("floor", arguments, result)


if __name__ == "__main__":
    common.start(main, {"ppo": ppo, "supervised": supervised})

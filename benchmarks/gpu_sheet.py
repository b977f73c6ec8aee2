"""A sheet of a GPU's figures in eight minutes, without a network: `make gpu-sheet`, or `python benchmarks/gpu_sheet.py`.

Sections run one after the other, the figures first and the tests last, each in a process of its own that is stopped when the
time is over. A figure is a line of `--out` as soon as it is there, so a run that is stopped keeps what it has measured. Models
are made on the device from their shapes, in bf16, and never saved. `--toy` does the same on a CPU with a tiny model, in
seconds; `--only` takes some of the sections.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

#: Seconds in which all is done.
LIMIT = 480.0
#: Calls by which a host launches work on a GPU.
LAUNCHES = re.compile(r"^(cuda|cu)(LaunchKernel|LaunchKernelEx|LaunchKernelExC|LaunchCooperativeKernel|GraphLaunch)$")
#: Passed tests of pytest's verbose lines, and the others.
TESTS = re.compile(r"^tests/\S+ (PASSED|FAILED|ERROR)", re.MULTILINE)
#: What the 135M update is measured on, and that of 1B and 0.5B; an update of TRL's is that of the smallest.
SMALL = {"episodes": 64, "prompt": 64, "response": 64}
ROLLOUT = {"prompt": 64, "response": 256}


@dataclass(frozen=True)
class Section:
    """A part of the sheet: figures that one process measures."""

    name: str
    worker: str
    work: Mapping[str, Any]
    most: float = 120.0
    """Seconds after which it is stopped."""


def sections(*, toy: bool) -> list[Section]:
    """All parts in their order: what decides most comes first."""
    if toy:
        sizes = {"episodes": 4, "prompt": 6, "response": 5}
        tiny = {"shape": "tiny", "batches": [4], "rollout": {"prompt": 6, "response": 5}, "update": sizes}
        return [
            Section("tiny", "shape", tiny),
            Section("TRL", "trl", {"shape": "tiny", "update": sizes}),
            Section("chain", "chain", {"shape": "tiny", **sizes, "microbatch": 2}),
            Section("exactness", "exactness", {}),
        ]
    long = {"episodes": 64, "prompt": 256, "response": 256}
    quickstart = {"episodes": 256, "prompt": 80, "response": 160}
    return [
        Section("135M", "shape", {"shape": "smollm2-135m", "batches": [64, 256], "rollout": ROLLOUT, "update": SMALL}),
        Section("1B", "shape", {"shape": "llama-1b", "batches": [64, 256], "rollout": ROLLOUT, "update": long}),
        Section("0.5B", "shape", {"shape": "qwen-0.5b", "batches": [], "rollout": ROLLOUT, "update": quickstart}, 60.0),
        Section("TRL", "trl", {"shape": "smollm2-135m", "update": SMALL}, 60.0),
        Section("demo", "demo", {}, 150.0),
        Section("exactness", "exactness", {}, 90.0),
        Section("chain", "chain", {"shape": "llama-1b", **{**long, "episodes": 16}, "microbatch": 8}, 90.0),
        Section("tests", "tests", {}, LIMIT),
    ]


# --- Figures ---------------------------------------------------------------------------------------------------------


def note(out: str, section: str, figure: str, value: Any) -> None:
    """Print a figure and add it to the sheet, at once."""
    value = common._rounded(value)
    print(f"{section}: {figure}: {value}", flush=True)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with Path(out).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"time": now, "section": section, "figure": figure, "value": value}) + "\n")


def shape(
    *, out: str, section: str, device: str, dtype: str, shape: str, batches: Sequence[int], **work: Any
) -> dict[str, Any]:
    """The update of PPO, then rollouts of one shape: ours beside `generate`."""
    import rollout

    rollout.WARM_UP = 1
    with common.shape_folder(shape) as model, common.made_on(device), common.registered(model, device) as registry:
        same = {"model": model, "device": device, "dtype": dtype}
        update(out, section, {**same, "registry": registry, **work["update"]})
        for episodes in batches:
            how = {**same, "episodes": episodes, **work["rollout"], "repeats": 1}
            name = f"rollout of {episodes} x {how['response']} tokens"
            ours = rollout.ours(**how, registry=registry, options={})
            note(out, section, f"{name}, ours, tokens/s", ours["tokens_per_second"][0])
            note(out, section, f"{name}, ours, the first one's seconds", ours["warm_up_seconds"][0])
            library = rollout.generate(**how)["tokens_per_second"][0]
            note(out, section, f"{name}, generate, tokens/s", library)
            note(out, section, f"{name}, ours / generate", ours["tokens_per_second"][0] / library)
    return {}


def update(out: str, section: str, work: Mapping[str, Any]) -> None:
    """Seconds, phases and share of the floor of an update, its peak beside the plan's, launches, ratio and sampler's gap."""
    import torch
    from floor import Clock
    from products import PHASES, SIZES, Floor
    from torch.profiler import ProfilerActivity, profile

    from rlhf.config import PPOConfig
    from rlhf.doctor.plan.estimate import make_plan
    from rlhf.doctor.plan.microbatch import fitting_microbatch
    from rlhf.doctor.plan.twin import read_shape
    from rlhf.doctor.plan.work import assumed_work
    from rlhf.models.compute import Compute

    cuda = work["device"] == "cuda"
    own = {"total_episodes": work["episodes"], "rollout_batch_size": work["episodes"]}
    own |= {"minibatch_size": work["episodes"], "response_length": work["response"], "optim": "adamw_torch"}
    config = PPOConfig(name="benchmark", dataset="none", device=work["device"], dtype=work["dtype"], **own)
    rows = assumed_work(config, prompt_tokens=work["prompt"], answer_tokens=work["response"], rows=work["episodes"])
    planned = (config, read_shape(work["model"], config.registry), Compute.choose(config), rows)
    size = fitting_microbatch(*planned) if cuda else config.microbatch
    note(out, section, "update: responses a pass", size)
    with common.ppo_trainer(**work, microbatch=size, updates=4, options={}) as trainer:
        floor = Floor("ppo", work["model"], trainer.config, *({**work, "microbatch": size}[name] for name in SIZES))
        clock = Clock(floor, 2, profiled=False)
        clock.updates_of(trainer)
        note(out, section, "update: seconds", min(clock.seconds[1:]))
        note(out, section, "update: the first one's seconds", clock.seconds[0])
        for name in PHASES:
            note(out, section, f"update: {name}, seconds", statistics.median(s[name]["seconds"] for s in clock.timed))
        for kind in ("base", "with adapters"):
            over = statistics.median(step["update"]["ratio"][kind] for step in clock.timed)
            note(out, section, f"update: times its floor, {kind}", over)
        if cuda:
            free, total = torch.cuda.mem_get_info()
            reserved = torch.cuda.max_memory_reserved()
            used = total - free - torch.cuda.memory_reserved() + reserved
            note(out, section, "update: peak GB allocated", torch.cuda.max_memory_allocated() / 1e9)
            note(out, section, "update: peak GB of the device", used / 1e9)
        else:
            note(out, section, "update: peak GB", common.peak_memory("cpu")["peak_rss_gb"])
        config.microbatch_size = size
        note(out, section, "update: peak GB, planned", make_plan(*planned, budget=0.0).peak / 1e9)
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with profile(activities=kinds) as profiler:
            metrics = trainer.step()
        calls = profiler.key_averages()
        wanted = LAUNCHES.match if cuda else re.compile("aten::").match
        number = sum(event.count for event in calls if wanted(event.key))
        note(out, section, "update: kernel launches" if cuda else "update: operator calls", number)
        note(out, section, "update: error of the first ratio", metrics["ppo/first_ratio_error"])
        note(out, section, "update: sampler's gap, nats", metrics["rollout/logprob_gap"])


def trl(*, out: str, section: str, device: str, dtype: str, shape: str, update: Mapping[str, Any]) -> dict[str, Any]:
    """TRL's update on the work of ours."""
    import ppo_vs_trl

    with common.shape_folder(shape) as model, common.made_on(device):
        sizes = {**update, "microbatch": update["episodes"], "updates": 2}
        seconds = ppo_vs_trl.trl(model=model, device=device, dtype=dtype, **sizes)["seconds"]
    note(out, section, "update: seconds", seconds[-1])
    return {}


def chain(*, out: str, section: str, device: str, dtype: str, shape: str, **sizes: int) -> dict[str, Any]:
    """Peak memory of the stages, one after the other, as their users run them."""
    import memory
    import torch

    work = argparse.Namespace(**sizes, device=device, updates=2)
    with common.shape_folder(shape) as model, common.made_on(device), tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        vocabulary = common.SHAPES[shape]["vocab_size"]
        memory.write_data(folder / "data", 2 * work.episodes, vocabulary, work.prompt, work.response)
        for kind, config in memory.configs(folder, model, work, dtype, {}).items():
            file = folder / f"{kind}.yaml"
            file.write_text(json.dumps({**config, "output_dir": str(folder / kind)}))
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = memory.stage(kind=kind, config=str(file), device=device)["seconds"]
            note(out, section, f"{kind}: peak GB", common.peak_gb(common.peak_memory(device)))
            note(out, section, f"{kind}: seconds of {work.updates} updates, evaluation and all", seconds)
    return {}


def demo(*, out: str, section: str, device: str, dtype: str) -> dict[str, Any]:
    """The demo end to end, and the figures that its quality is judged by."""
    with tempfile.TemporaryDirectory() as place:
        words = [
            "--config",
            "configs/demo",
            "--device",
            device,
            "--output_dir",
            place,
            "--registry",
            f"{place}/registry",
        ]
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "rlhf.pipeline", *words], cwd=common.ROOT, check=True)
        note(out, section, "seconds", time.perf_counter() - started)
        results = json.loads(Path(place, "results.json").read_text())
    for name in ("reward_positive_after", "gold_positive_after", "kl"):
        note(out, section, f"ppo: {name}", results["ppo"][name])
    return {}


def exactness(*, out: str, section: str, device: str, dtype: str) -> dict[str, Any]:
    """Whether two runs of a toy chain's PPO, and one that is killed and resumed, end in the same bytes.

    Runs are forks, as in `crash.py`, so this process touches no GPU before them.
    """
    import crash
    import torch

    crash.COMMON |= {"device": device, "dtype": dtype}
    torch.use_deterministic_algorithms(True, warn_only=True)
    with tempfile.TemporaryDirectory() as place, common.model_folder("tiny") as model:
        world = Path(place)
        crash.make_world(world, model)
        whole = {stage: crash.run_whole(stage, world) for stage in crash.STAGES}["ppo"]
        again = crash.new_place("ppo", world)
        crash.finish_well(crash.start(again, world / "ppo.yaml", 0), again, 0)
        first, second = crash.left_by(whole["place"]), crash.left_by(again)
        wrong = [name for name in {**first, **second} if first.get(name) != second.get(name)]
        note(out, section, "two runs of PPO end in the same bytes", "yes" if not wrong else f"no: {', '.join(wrong)}")
        killed = crash.kill("ppo", 0, 0, world, whole)
        differs = f"no: {', '.join(killed['differs'])}"
        note(out, section, "PPO killed and resumed, too", "yes" if killed["same"] else differs)
    return {}


def tests(*, out: str, section: str, device: str, dtype: str) -> dict[str, Any]:
    """The tests that need a GPU, each noted when it has ended."""
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    with subprocess.Popen(command, cwd=common.ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            if match := TESTS.match(line):
                note(out, section, line.split()[0], match[1].lower())
    return {}


# --- The whole -------------------------------------------------------------------------------------------------------


def run_section(section: Section, settings: Mapping[str, Any], seconds: float, environment: Mapping[str, str]) -> None:
    """Run a section in a process of its own; one that fails or takes too long is noted, and the next one follows."""
    work = {**section.work, **settings, "section": section.name}
    with tempfile.NamedTemporaryFile() as report:
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--worker",
            section.worker,
            json.dumps(work),
            report.name,
        ]
        with subprocess.Popen(
            command, env={**os.environ, **common._QUIET, **environment}, start_new_session=True
        ) as process:
            try:
                code = process.wait(timeout=seconds)
                outcome = "" if code == 0 else f"ended with exit code {code}"
            except subprocess.TimeoutExpired:
                outcome = f"stopped after {seconds:.0f} s"
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    if outcome:
        note(settings["out"], section.name, "not finished", outcome)


def trl_wheel(folder: Path) -> Path | None:
    """The wheel of TRL's last release with PPO, if the folder has it."""
    return next(iter(sorted(folder.glob("trl-1.12.0-*.whl"))), None)


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    rows = [f"| {line['section']} | {line['figure']} | {line['value']} |" for line in lines]
    return "\n".join(["| | figure | |", "|---|---|---|", *rows])


def main(run: Callable[[Section, Mapping[str, Any], float, Mapping[str, str]], None] = run_section) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="a tiny model on a CPU")
    parser.add_argument("--only", nargs="+", help="sections: " + ", ".join(s.name for s in sections(toy=False)))
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds after which no section goes on")
    parser.add_argument(
        "--wheels", type=Path, default=Path(".whl"), help="folder that may hold the wheel of TRL 1.12.0"
    )
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu_sheet_DEVICE.jsonl")
    arguments = parser.parse_args()
    end, device = time.monotonic() + arguments.limit, "cpu" if arguments.toy else "cuda"
    out = arguments.out or common.RESULTS / f"gpu_sheet_{device}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    settings = {"out": str(out.absolute()), "device": device, "dtype": "float32" if arguments.toy else "bfloat16"}
    environment = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "HF_HUB_OFFLINE": "1"}
    if not arguments.toy:
        note(settings["out"], "machine", "gpu", gpu_name())
    for section in sections(toy=arguments.toy):
        left, paths = end - time.monotonic(), [str(common.ROOT), os.environ.get("PYTHONPATH", "")]
        wheel = trl_wheel(arguments.wheels)
        if arguments.only and section.name not in arguments.only:
            continue
        if left <= 0 or (section.worker == "trl" and wheel is None):
            why = "no time was left" if left <= 0 else f"{arguments.wheels} has no wheel of TRL 1.12.0"
            note(settings["out"], section.name, "left out", why)
            continue
        with tempfile.TemporaryDirectory() as site:
            if section.worker == "trl" and wheel is not None:
                zipfile.ZipFile(wheel).extractall(site)
                paths.insert(0, site)
            path = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
            run(section, settings, min(section.most, left), {**environment, **path})
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    print(table(lines), f"written: {out}", sep="\n\n")


def gpu_name() -> str:
    """Name of the GPU and versions, from another process: this one starts those that measure."""
    code = "import torch, transformers as t; print(torch.cuda.get_device_name(), torch.__version__, t.__version__, sep=', ')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() or "none"


if __name__ == "__main__":
    workers = {"shape": shape, "trl": trl, "chain": chain, "demo": demo, "exactness": exactness, "tests": tests}
    common.start(main, workers)

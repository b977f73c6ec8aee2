"""Run a toy chain through the public command lines and print what it made, one line a figure.

`python benchmarks/toy_chain.py --output before.txt`, and after a refactoring
`python benchmarks/toy_chain.py --against before.txt`: exit code 1 and the lines that differ, if any do.

The chain trains models of thirty thousand parameters on one CPU thread: pretraining, SFT, reward model
and PPO with an adaptive KL coefficient, a running mean of the weights and PPO-ptx; reward model and PPO
with full weights as well; PPO in bfloat16; PPO and SFT interrupted and resumed. It takes about 100 seconds.
Stages are started as `python -m rlhf.stages.X` and nothing is imported, so any checkout can be measured.

The lines hold hashes of registered files and checkpoints, and the figures of manifests and logs without
times, memory, commit and library versions. The same code on the same machine gives the same lines.
Another processor or torch rounds differently, so compare lines of one machine only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: One thread and no network. Hash seeds stay random: code whose result depends on the order of a set is found out.
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
}

COMMON: dict[str, Any] = {"name": "toy", "device": "cpu", "dtype": "float32", "wandb_mode": "disabled"}
#: Log lines are not due when checkpoints are, so a checkpoint holds sums of figures that are not logged yet.
TRAINING: dict[str, Any] = {
    "max_steps": 24,
    "eval_steps": 4,
    "save_steps": 4,
    "logging_steps": 3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
}
LORA: dict[str, Any] = {"lora_r": 4, "lora_alpha": 8, "dataset": "data"}
OPTIONS: dict[str, dict[str, Any]] = {
    "pretrain": {
        **COMMON, **TRAINING, "dataset": "text.txt", "documents": "line", "model_type": "llama", "vocab_size": 300,
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "max_length": 64,
        "validation_share": 0.2, "learning_rate": 1e-2, "num_samples": 2, "sample_length": 8, "dropout": 0.1,
    },
    "sft": {
        **COMMON, **TRAINING, **LORA, "model_name_or_path": "pretrain/toy", "learning_rate": 1e-2, "lora_dropout": 0.1,
    },
    "reward": {
        **COMMON, **TRAINING, **LORA, "policy": "sft/toy", "learning_rate": 1e-2, "max_steps": 12, "response_length": 8,
        "card_policy_samples": 6, "card_likelihood_responses": 12, "card_probe_answers": 3,
        "gold": "rlhf.evaluation.gold:vader",
    },
    "ppo": {
        **COMMON, **LORA, "policy": "sft/toy", "reward": ["reward/toy"], "learning_rate": 1e-2, "total_episodes": 64,
        "rollout_batch_size": 8, "minibatch_size": 4, "microbatch_size": 2, "num_ppo_epochs": 2, "response_length": 8,
        "num_eval_samples": 6, "num_logged_samples": 2, "save_steps": 3, "kl_target": 0.5,
        "kl_horizon": 40, "ema_decay": 0.9, "ptx_coef": 1.0, "value_warmup_updates": 1, "reward_clip": 2.0,
        "gold": "rlhf.evaluation.gold:vader",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run of a stage; its logs go to `out/NAME`."""

    name: str
    stage: str
    words: tuple[str, ...] = ()
    interrupted_after: int | None = None
    """The run gets Ctrl-C when this step is logged, and is resumed."""


SNAPSHOTS = ("--snapshot_steps", "4")  # not to be had with full weights
FULL = ("--name", "full", "--finetuning", "full", "--learning_rate", "1e-3")
#: In the order in which they are made. The resumed SFT run is the last, as it registers a newer sft/toy than the others use.
RUNS = (
    Run("pretrain", "pretrain"),
    Run("sft", "sft"),
    Run("reward", "reward"),
    Run("ppo", "ppo", SNAPSHOTS),
    Run("ppo_resumed", "ppo", SNAPSHOTS, interrupted_after=2),
    Run("reward_full", "reward", FULL),
    Run("ppo_full", "ppo", (*FULL, "--reward", "reward/full")),
    Run("ppo_bf16", "ppo", ("--name", "bf16", "--dtype", "bfloat16")),
    Run("sft_resumed", "sft", interrupted_after=3),
)
#: The resumed run, and the uninterrupted one that it must equal: versions 2 and 1 of the same artefacts.
RESUMED = {"ppo_resumed": "ppo", "sft_resumed": "sft"}

#: Names in the registry that `--keep` leaves out: locks, what the resumed runs made, and what would be large.
NOT_KEPT = (".lock", "v2", "bf16*", "full-ema")

#: Keys of manifests and logs that belong to the clock, the memory, the machine or the checkout.
NOT_COMPARED = re.compile(
    r"time|time/.*|seconds|seconds_per_update|phases|.*tokens_per_second|.*(memory|rss|cuda_gb).*"
    r"|checksum|created|code_commit|library_versions|wandb_run_id|hash|resume"
)


# --- The chain -------------------------------------------------------------------------------------------------------


class Failed(Exception):
    """A run ended otherwise than it should."""


def make_inputs(folder: Path) -> None:
    """Write text, data and configs, all paths relative to the folder."""
    source = random.Random(0)
    words = "The A It film movie plot is was good bad great awful and very not".split(" ")  # noqa: SIM905
    ratings = {"good": 1.0, "great": 2.0, "bad": -1.0, "awful": -2.0}

    def answer(first: str) -> tuple[str, float]:
        quality = source.choice(list(ratings))
        thing, how = source.choice(["film", "movie", "plot"]), source.choice(["very", "a"])
        return f"{first} {thing} is {how} {quality}", ratings[quality]

    def message(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    def comparison(first: str) -> dict[str, Any]:
        answers: dict[str, float] = {}
        while len(set(answers.values())) < 3:
            answers |= [answer(first)]
        return {
            "prompt": message("user", first),
            "responses": [message("assistant", text) for text in answers],
            "ratings": list(answers.values()),
            "ratings_held_out": [rating + 0.1 for rating in answers.values()],
        }

    def write(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        file = folder / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    (folder / "configs").mkdir(parents=True)
    lines = [" ".join(source.choice(words) for _ in range(8)) + ".\n" for _ in range(200)]
    (folder / "text.txt").write_text("".join(lines), encoding="utf-8")
    for split, firsts in (("train", ["The", "A", "It", "That"]), ("validation", ["This", "Our"])):
        firsts = firsts * 6
        write(f"comparisons/{split}.jsonl", [comparison(first) for first in firsts])
        write(f"prompts/{split}.jsonl", [{"prompt": message("user", first)} for first in dict.fromkeys(firsts)])
        demonstrations = [
            {"prompt": message("user", first), "completion": message("assistant", answer(first)[0])} for first in firsts
        ]
        write(f"demonstrations/{split}.jsonl", demonstrations)
    for stage, options in OPTIONS.items():
        # JSON scalars and lists are YAML.
        text = "".join(f"{name}: {json.dumps(value)}\n" for name, value in options.items())
        (folder / "configs" / f"{stage}.yaml").write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Chain:
    """The chain of one checkout in one folder."""

    checkout: Path
    folder: Path
    keep: Path | None = None

    def make(self, until: str) -> None:
        """Make everything up to and including the named run."""
        make_inputs(self.folder)
        self._check_package()
        for run in RUNS[: [run.name for run in RUNS].index(until) + 1]:
            started = time.perf_counter()
            if run.interrupted_after is not None:
                self._interrupt(run)
                if self.keep:
                    shutil.copytree(self.folder / "out" / run.name, self.keep / "interrupted", dirs_exist_ok=True)
                self._finish(run, "--resume", "true")
            else:
                self._finish(run)
            print(f"{run.name}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)

    def _command(self, run: Run, *more: str) -> list[str]:
        places = ["--output_dir", f"out/{run.name}", "--registry", "registry"]
        config = f"configs/{run.stage}.yaml"
        return [sys.executable, "-m", f"rlhf.stages.{run.stage}", "--config", config, *places, *run.words, *more]

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(self.checkout)}

    def _check_package(self) -> None:
        """Refuse to measure an installed package in place of the checkout."""
        command = [sys.executable, "-c", "import rlhf; print(rlhf.__file__)"]
        done = subprocess.run(command, cwd=self.folder, env=self._environment(), capture_output=True, text=True)
        if Path(done.stdout.strip()).parent.parent != self.checkout:
            raise Failed(f"Python takes rlhf from {done.stdout.strip() or done.stderr}, not from {self.checkout}")

    def _finish(self, run: Run, *more: str) -> None:
        command = self._command(run, *more)
        done = subprocess.run(command, cwd=self.folder, env=self._environment(), capture_output=True, text=True)
        if done.returncode != 0:
            raise Failed(f"{run.name} ended with exit code {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")

    def _interrupt(self, run: Run) -> None:
        """Start the run and send Ctrl-C after the step; it then saves a checkpoint and ends with exit code 130."""
        log = self.folder / "out" / run.name / run.stage / "metrics.jsonl"
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                self._command(run), cwd=self.folder, env=self._environment(), stdout=output, stderr=subprocess.STDOUT
            )
            try:
                while process.poll() is None and _last_step(log) < (run.interrupted_after or 0):
                    time.sleep(0.005)
                process.send_signal(signal.SIGINT)
                code = process.wait(timeout=300)
            finally:
                process.kill()
            if code != 130:
                output.seek(0)
                raise Failed(f"{run.name} ended with exit code {code} instead of 130:\n{output.read()[-4000:]}")


def _last_step(log: Path) -> int:
    return max((int(row["step"]) for row in _rows(log)), default=0)


def _rows(file: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a JSONL file that may be growing."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


# --- What it made ----------------------------------------------------------------------------------------------------


def describe(folder: Path) -> dict[str, str]:
    """Return everything that must be the same, by name, as JSON."""
    found: dict[str, Any] = {"machine/processor": _processor(), "machine/torch": version("torch")}
    for manifest in sorted((folder / "registry").glob("*/*/v*/manifest.json")):
        found |= describe_artifact(manifest, manifest.parent.relative_to(folder).as_posix())
    for run in RUNS:
        if (folder / "out" / run.name / run.stage).is_dir():
            found |= describe_run(folder / "out" / run.name / run.stage, f"out/{run.name}")
    for resumed, whole in RESUMED.items():
        if any(name.startswith(f"out/{resumed}/") for name in found):
            found[f"check/{resumed} equals {whole}"] = _equal(found, resumed, whole)
    return {name: json.dumps(value, sort_keys=True) for name, value in sorted(found.items())}


def describe_artifact(file: Path, name: str) -> dict[str, Any]:
    """Return hashes of the files that are there, and what the manifest says."""
    manifest = json.loads(file.read_text(encoding="utf-8"))
    recorded = manifest.pop("files")
    if manifest["parents"]:
        manifest.pop("recipe")  # it depends on the parents' hashes, and so on when they were made
    found = {f"{name}/files/{path}": sha for path, sha in _hashes(file.parent, without=file.name).items()}
    found[f"{name}/files as recorded"] = recorded == _hashes(file.parent, without=file.name)
    return {**found, **dict(_flat(manifest, f"{name}/manifest"))}


def describe_run(folder: Path, name: str) -> dict[str, Any]:
    """Return every logged figure, and hashes of samples, checkpoints and snapshots."""
    found: dict[str, Any] = {}
    for line, row in enumerate(_rows(folder / "metrics.jsonl")):
        found |= _flat({k: v for k, v in row.items() if k != "step"}, f"{name}/metrics/{line:03d} step {row['step']}")
    for file in sorted({*folder.glob("*.jsonl"), *folder.glob("*.json")}):
        if file.name in ("metrics.jsonl", "manifest.json", "tracking.json"):
            continue  # above, in the registry, a random id
        content = _rows(file) if file.suffix == ".jsonl" else json.loads(file.read_text(encoding="utf-8"))
        found[f"{name}/{file.name}"] = _sha256(json.dumps(dict(_flat(content, "")), sort_keys=True).encode())
    for path, sha in _hashes(folder / "checkpoints").items():
        # JSON of checkpoints holds clock times and the lengths of logs that have them.
        found[f"{name}/checkpoints/{path}"] = sha if path.endswith(".safetensors") else "there"
    return found


def _equal(found: Mapping[str, Any], resumed: str, whole: str) -> bool:
    """Return whether a resumed run registered the same files and logged the same figures as the uninterrupted one."""
    stage = next(run.stage for run in RUNS if run.name == whole)
    files, logs = re.compile(rf"registry/({stage}/toy(?:-ema)?)/(v\d)/files/(.*)"), f"out/{resumed}/metrics/"
    versions: dict[str, dict[str, Any]] = {"v1": {}, "v2": {}}
    for name, value in found.items():
        if match := files.fullmatch(name):
            versions[match[2]][f"{match[1]}/{match[3]}"] = value
    return versions["v1"] == versions["v2"] and _below(found, logs) == _below(found, f"out/{whole}/metrics/")


def _below(found: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of JSON by their path, without keys that are not compared."""
    if isinstance(value, Mapping) and value:
        for key, entry in value.items():
            if not NOT_COMPARED.fullmatch(key):
                yield from _flat(entry, f"{name}/{key}")
    elif isinstance(value, list) and any(isinstance(entry, Mapping | list) for entry in value):
        for number, entry in enumerate(value):
            yield from _flat(entry, f"{name}/{number}")
    else:
        yield name, value


def _hashes(folder: Path, without: str | None = None) -> dict[str, str]:
    """Return the sha256 of the files of a folder, by relative path."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != without]
    return {path.relative_to(folder).as_posix(): _sha256(path.read_bytes()) for path in files}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    return match[1] if match else platform.processor() or platform.machine()


# --- Comparing -------------------------------------------------------------------------------------------------------


def to_text(lines: Mapping[str, str]) -> str:
    """Return `name  value` lines."""
    return "".join(f"{name}  {value}\n" for name, value in lines.items())


def from_text(text: str) -> dict[str, str]:
    """Return what `to_text` was given."""
    return dict(line.split("  ", 1) for line in text.splitlines())


def compare(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Return the differences in the manner of diff: `- ` lines of before, `+ ` lines of after."""
    different = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    sides = (("-", before), ("+", after))
    return [f"{sign} {name}  {side[name]}" for name in different for sign, side in sides if name in side]


def measure(checkout: Path, until: str, keep: Path | None = None) -> dict[str, str]:
    """Make the chain with a checkout's code and return its lines; with `keep`, its folder is copied there."""
    with tempfile.TemporaryDirectory(prefix="toy_chain-") as place:
        folder = Path(place)
        Chain(checkout.resolve(), folder, keep).make(until)
        if keep is not None:
            for part in ("configs", "data", "registry"):
                shutil.copytree(folder / part, keep / part, ignore=shutil.ignore_patterns(*NOT_KEPT))
            shutil.copy(folder / "text.txt", keep)
        return describe(folder)


def main() -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkout", type=Path, default=ROOT, help="folder whose rlhf package is run")
    parser.add_argument("--output", type=Path, help="file for the lines; default: standard output")
    parser.add_argument("--against", type=Path, help="another checkout, or a file of lines, to compare with")
    parser.add_argument(
        "--until", choices=[run.name for run in RUNS], default=RUNS[-1].name, help="last run of the chain"
    )
    parser.add_argument("--keep", type=Path, help="new folder for inputs, registry and interrupted runs")
    arguments = parser.parse_args()
    if arguments.against and not arguments.against.exists():
        parser.error(f"{arguments.against} does not exist")
    if arguments.keep and arguments.keep.exists():
        parser.error(f"{arguments.keep} exists")
    try:
        lines = measure(arguments.checkout, arguments.until, arguments.keep)
        if arguments.output:
            arguments.output.write_text(to_text(lines), encoding="utf-8")
        elif not arguments.against:
            sys.stdout.write(to_text(lines))
        if not arguments.against:
            return 0
        if arguments.against.is_dir():
            before = measure(arguments.against, arguments.until)
        else:
            before = from_text(arguments.against.read_text(encoding="utf-8"))
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    differences = compare(before, lines)
    print("\n".join([*differences, f"{len(lines)} lines, {len({d[2:].split('  ')[0] for d in differences})} differ"]))
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())

"""Each stage killed with kill -9 at random moments, and resumed: does it end in the bytes of a run that nobody killed?
`python benchmarks/crash.py`

A toy chain (SFT, reward model, PPO) is trained once without interruption. Then each stage is started, killed, and started again
with `--resume true`, as often as `--kills` says: every other time at a moment of the clock, spread over the whole run, and every
other time just before one of the run's own changes to files (opening to write, renaming, deleting) in its checkpoints, its logs
or the registry. What is compared byte for byte: the registered files; weights, optimiser states and random generators of the last
checkpoint; every line of metrics and samples without the wall clock; every batch that was trained on.

The processes are forks of this one, which has imported the libraries, so a run takes seconds. Results are added to `--out` as
they come; started again, the script goes on with the kills that are left.
"""

from __future__ import annotations

import os

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
}  # forks need one thread

import argparse
import hashlib
import importlib
import json
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

STAGES = ("sft", "reward", "ppo")
#: Optimiser states of 8 bits (matrices of 4096 numbers), dropout, more than one epoch, log lines that are not due when a
#: checkpoint is; in PPO several epochs of minibatches, an adaptive KL coefficient and a running mean of the weights.
COMMON = {"name": "toy", "lora_r": 64, "lora_alpha": 64, "lora_dropout": 0.1, "learning_rate": 1e-3, "dtype": "float32"}
COMMON |= {"device": "cpu", "optim": "adamw_8bit", "wandb_mode": "disabled"}
TRAINING = {"max_steps": 12, "eval_steps": 2, "save_steps": 2, "logging_steps": 3, "per_device_train_batch_size": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "sft": {**TRAINING, "gradient_accumulation_steps": 2, "chat_template": "plain"},
    "reward": {**TRAINING, "policy": "sft/toy", "response_length": 6, "card_policy_samples": 4}
    | {"card_likelihood_responses": 8, "card_probe_answers": 2},
    "ppo": {"policy": "sft/toy", "reward": "reward/toy", "total_episodes": 48, "rollout_batch_size": 8}
    | {"minibatch_size": 4, "microbatch_size": 2, "num_ppo_epochs": 2, "response_length": 6, "num_eval_samples": 4}
    | {"save_steps": 2, "logging_steps": 1, "num_logged_samples": 2, "kl_target": 1.0, "ema_decay": 0.9},
}
#: Figures of the wall clock.
CLOCK = ("time", "seconds", "phases", "seconds_per_update", "rollout/tokens_per_second")
#: What a run in another place calls otherwise.
PLACE = ("output_dir", "registry", "resume", "model_name_or_path", "dataset")
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}


@dataclass(frozen=True)
class Place:
    """Registry and output folder of one run of a stage."""

    stage: str
    folder: Path

    @property
    def output(self) -> Path:
        return self.folder / "out" / self.stage

    @property
    def registry(self) -> Path:
        return self.folder / "registry"

    def checkpoints(self) -> list[str]:
        """Names of the checkpoints, oldest first."""
        found = [p.name for p in (self.output / "checkpoints").glob("checkpoint-*")]
        return sorted(found, key=lambda name: int(name.split("-")[1]))


# --- Runs ------------------------------------------------------------------------------------------------------------


def start(place: Place, config: Path, number: int, *, die_at: int | None = None) -> int:
    """Starts run `number` of a stage in a fork; its id. With `die_at`, it kills itself before that change to its files."""
    words = ["--config", str(config), "--registry", str(place.registry), "--output_dir", str(place.folder / "out")]
    words += ["--resume", "true"] if number else []
    pid = os.fork()
    if pid:
        return pid
    code: Any = 1
    try:
        with (place.folder / f"log-{number}.txt").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.argv = [f"rlhf.stages.{place.stage}", *words]
        changes = count_changes(place.folder / "out", place.registry, die_at=die_at)
        note_batches(place.folder / f"batches-{number}.jsonl")
        importlib.import_module("rlhf.base.errors").run_command(importlib.import_module(sys.argv[0]).main)
        (place.folder / "changes.json").write_text(json.dumps(changes))
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else 1)


def count_changes(*roots: Path, die_at: int | None) -> list[str]:
    """From here on, the changes this process makes to files below the roots, as a list that grows; safetensors writes unseen."""
    seen: list[str] = []
    below = tuple(f"{root}/" for root in roots)

    def hook(event: str, details: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in CHANGES) and str(details[0]).startswith(below):
            seen.append(f"{event} {Path(str(details[0])).name}")
            if len(seen) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return seen


def note_batches(file: Path) -> None:
    """Writes a line for each batch that is trained on: the update, and a hash of its tokens or rows."""
    from transformers import Trainer

    from rlhf.ppo.trainer import PPOTrainer

    def note(update: int, content: Any) -> None:
        with file.open("a") as lines:
            lines.write(json.dumps([update, hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]]) + "\n")

    training_step, accumulate = Trainer.training_step, PPOTrainer._accumulate

    def noted_step(self: Any, model: Any, inputs: Mapping[str, Any], *rest: Any) -> Any:
        note(self.state.global_step, inputs["input_ids"].tolist())
        return training_step(self, model, inputs, *rest)

    def noted_accumulate(self: Any, rollout: Any, credit: Any, microbatches: Any, *rest: Any) -> Any:
        rows = [[rollout.prompts[part].tolist(), rollout.responses[part].tolist()] for part in microbatches]
        note(self.state.updates_done, rows)
        return accumulate(self, rollout, credit, microbatches, *rest)

    Trainer.training_step, PPOTrainer._accumulate = noted_step, noted_accumulate  # type: ignore[method-assign]


def finish(pid: int) -> int:
    """Waits for a process; its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def finish_well(pid: int, place: Place, number: int) -> None:
    """Waits for a process.

    Raises:
        UserError: it failed; its output is on stderr.
    """
    from rlhf.base.errors import UserError

    code = finish(pid)
    if code != 0:
        print((place.folder / f"log-{number}.txt").read_text()[-4000:], file=sys.stderr)
        raise UserError(f"run {number} of {place.stage} in {place.folder} ended with exit code {code}")


# --- What a run left -------------------------------------------------------------------------------------------------


def left_by(place: Place) -> dict[str, Any]:
    """Everything that has to be the same, by name: bytes as hashes, JSON without wall clock and places."""
    left: dict[str, Any] = {}
    for manifest in sorted((place.registry / place.stage).glob("*/v*/manifest.json")):
        name = f"{manifest.parent.parent.name}/{manifest.parent.name}"
        left |= {f"registry: {name}/{k}": v for k, v in hashes(manifest.parent, "manifest.json").items()}
        content = plain(json.loads(manifest.read_text()))
        run_id = json.loads((place.output / "tracking.json").read_text())["run_id"]
        left[f"registry: {name} is of this run"] = content.pop("wandb_run_id") == run_id
        for own in (
            "checksum",
            "created",
            "code_commit",
            "files",
        ):  # its own, the clock's, the checkout's, and compared above
            content.pop(own)
        left[f"registry: {name}/manifest"] = content
    names = place.checkpoints()
    left["checkpoints: which"] = names
    last = place.output / "checkpoints" / names[-1]
    left |= {
        f"checkpoints: {k}": v for k, v in hashes(last, "state.json", "trainer_state.json", "checksums.json").items()
    }
    state = json.loads((last / "state.json").read_text())
    left["checkpoints: state"] = {k: v for k, v in state.items() if k != "log"}  # bytes, some of them of times
    for file in ("metrics.jsonl", "samples.jsonl", "comparison.jsonl"):
        there = (place.output / file).exists()
        lines = (place.output / file).read_text().splitlines() if there else []
        left[f"logs: {file}"] = [plain(json.loads(line)) for line in lines]
    return left


def hashes(folder: Path, *without: str) -> dict[str, str]:
    """sha256 of the files of a folder, by name."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in without]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def plain(value: Any) -> Any:
    """JSON without what belongs to the clock or the place."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in (*CLOCK, *PLACE) and not k.startswith("time/")}
    return [plain(entry) for entry in value] if isinstance(value, list) else value


def batches(place: Place, number: int) -> dict[int, list[str]]:
    """Hashes of the batches of a run by update, in order. A killed run may have left half a line."""
    file, found = place.folder / f"batches-{number}.jsonl", dict[int, list[str]]()
    for line in file.read_text().splitlines(keepends=True) if file.exists() else []:
        if line.endswith("\n"):
            update, content = json.loads(line)
            found.setdefault(update, []).append(content)
    return found


def differences(place: Place, whole: Place) -> list[str]:
    """Names of what differs between a killed and resumed run and the one that nobody killed."""
    ours, theirs = left_by(place), left_by(whole)
    wrong = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    expected, first, second = batches(whole, 0), batches(place, 0), batches(place, 1)
    if any(got != expected.get(update, [])[: len(got)] for update, got in first.items()):
        wrong.append("batches before the kill")
    if any(got != expected.get(update) for update, got in second.items()):
        wrong.append("batches after the kill")
    if {*first, *second} != {*expected}:
        wrong.append("batches: updates left out")
    return wrong


# --- Kills -----------------------------------------------------------------------------------------------------------


def kill(stage: str, number: int, seed: int, world: Path, whole: Mapping[str, Any]) -> dict[str, Any]:
    """One kill and what came of it. The moment is a function of seed, stage and number, as a share of the whole run."""
    share = random.Random(f"{seed} {stage} {number}").random()
    by_clock = (number + STAGES.index(stage)) % 2 == 1
    while True:
        place = new_place(stage, world)
        if by_clock:
            pid = start(place, world / f"{stage}.yaml", 0)
            time.sleep(share * whole["seconds"])
            os.kill(pid, signal.SIGKILL)
            moment = f"after {share * whole['seconds']:.2f} s"
        else:
            change = 1 + int(share * len(whole["changes"]))
            pid = start(place, world / f"{stage}.yaml", 0, die_at=change)
            moment = f"before change {change} of {len(whole['changes'])}: {whole['changes'][change - 1]}"
        if finish(pid) == -signal.SIGKILL:
            break
        share *= 0.8  # it was faster this time
    there = place.checkpoints()
    finish_well(start(place, world / f"{stage}.yaml", 1), place, 1)
    wrong = differences(place, whole["place"])
    shutil.rmtree(place.folder)
    return {
        "stage": stage, "number": number, "share": share, "moment": moment,
        "resumed_from": there[-1] if there else None, "same": not wrong, "differs": wrong,
    }  # fmt: skip


def new_place(stage: str, world: Path) -> Place:
    """A fresh place, whose registry holds the stages before."""
    place = Place(stage, Path(tempfile.mkdtemp(dir=world, prefix=f"{stage}-")))
    for before in STAGES[: STAGES.index(stage)]:
        shutil.copytree(world / "whole" / before / "registry" / before, place.registry / before)
    return place


def run_whole(stage: str, world: Path) -> dict[str, Any]:
    """The run that nobody kills: its place, seconds, and changes to files."""
    made = new_place(stage, world)
    place = Place(stage, made.folder.rename(world / "whole" / stage))
    started = time.perf_counter()
    finish_well(start(place, world / f"{stage}.yaml", 0), place, 0)
    seconds = time.perf_counter() - started
    return {"place": place, "seconds": seconds, "changes": json.loads((place.folder / "changes.json").read_text())}


def make_world(folder: Path, model: str) -> None:
    """Data and configs of the toy chain."""
    import yaml

    source = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{source.randrange(3, 512)}" for _ in range(count))

    def rows(kind: str, count: int) -> Iterator[dict[str, Any]]:
        for _ in range(count):
            prompt = [{"role": "user", "content": words(source.randrange(2, 6))}]
            answers = [[{"role": "assistant", "content": words(source.randrange(1, 6))}] for _ in range(3)]
            yield {
                "demonstrations": {"prompt": prompt, "completion": answers[0]},
                "comparisons": {"prompt": prompt, "responses": answers, "ratings": [2.0, 1.0, 0.0]},
                "prompts": {"prompt": prompt},
            }[kind]

    for kind in ("demonstrations", "comparisons", "prompts"):
        (folder / "data" / kind).mkdir(parents=True)
        for split, count in (("train", 20), ("validation", 6)):
            lines = [json.dumps(row) + "\n" for row in rows(kind, count)]
            (folder / "data" / kind / f"{split}.jsonl").write_text("".join(lines))
    (folder / "whole").mkdir()
    for stage in STAGES:
        base = {"model_name_or_path": model} if stage == "sft" else {}
        options = {**COMMON, **OPTIONS[stage], **base, "dataset": str(folder / "data")}
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(options))


# --- The whole -------------------------------------------------------------------------------------------------------


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--kills", type=common.count, default=20, help="of each stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=common.RESULTS / "crash.json")
    arguments = parser.parse_args()
    for module in (*(f"rlhf.stages.{stage}" for stage in STAGES), "bitsandbytes"):
        importlib.import_module(module)
    machine = common.machine("cpu")
    found = json.loads(arguments.out.read_text())["kills"] if arguments.out.exists() else []
    done = {(one["stage"], one["number"]): one for one in found if one["seed"] == arguments.seed}
    with tempfile.TemporaryDirectory(prefix="crash-") as folder, common.model_folder("tiny") as model:
        world, whole = Path(folder), dict[str, dict[str, Any]]()
        make_world(world, model)
        for stage in STAGES:
            if STAGES.index(stage) <= max(map(STAGES.index, arguments.stage)):
                whole[stage] = run_whole(stage, world)
                print(f"{stage}: {whole[stage]['seconds']:.1f} s, {len(whole[stage]['changes'])} changes", flush=True)
        for stage in arguments.stage:
            for number in range(arguments.kills):
                if (stage, number) not in done:
                    one = kill(stage, number, arguments.seed, world, whole[stage])
                    done[stage, number] = {"seed": arguments.seed, **one}
                    print(
                        f"{stage} {number}, killed {one['moment']}: {'same' if one['same'] else one['differs']}",
                        flush=True,
                    )
                    save(arguments.out, machine, list(done.values()), whole)
    print(table(list(done.values())))
    if not all(one["same"] for one in done.values()):
        sys.exit(1)


def save(
    out: Path, machine: Mapping[str, Any], kills: list[dict[str, Any]], whole: Mapping[str, Mapping[str, Any]]
) -> None:
    """Writes what is known so far."""
    kills = sorted(kills, key=lambda one: (STAGES.index(one["stage"]), one["number"]))
    runs = {stage: {"seconds": round(w["seconds"], 2), "changes": len(w["changes"])} for stage, w in whole.items()}
    same = f"{sum(one['same'] for one in kills)} of {len(kills)}"
    result = {"benchmark": "crash", "same": same, "machine": machine, "whole_runs": runs, "kills": kills}
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(out)


def table(kills: list[dict[str, Any]]) -> str:
    """Kills by stage."""
    lines = [
        "| stage | kills | of these at a file | resumed from a checkpoint | ended the same |",
        "|---|---|---|---|---|",
    ]
    for stage in (*STAGES, "all"):
        of = [one for one in kills if stage in (one["stage"], "all")]
        at_file, resumed = (
            sum(one["moment"].startswith("before") for one in of),
            sum(one["resumed_from"] is not None for one in of),
        )
        lines.append(f"| {stage} | {len(of)} | {at_file} | {resumed} | {sum(one['same'] for one in of)} of {len(of)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    from rlhf.base.errors import run_command

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    run_command(main)

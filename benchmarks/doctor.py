"""Does the doctor find what is wrong, and leave alone what is not? `python benchmarks/doctor.py`

Known faults (`doctor_faults.py`) are put into small real runs of the stages from outside, and clean runs are made over seeds,
sizes and settings. For each run: what refused it, what the live checks said, and what `python -m rlhf.doctor` says afterwards.
Finished runs are kept in `--folder` and not made again, so the benchmark can be run in parts (`--only NAME ...`).

A fault counts as detected if the product refused it by its own guards, or any check found something; its right cause is named
if the guard's line says it, or the *first* finding of the diagnosis is one of the checks that stand for the fault.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import common
import yaml
from doctor_faults import FAULTS, Fault, Place
from doctor_world import write_base, write_data

#: Options of the stages in the toy world.
OPTIONS: dict[str, dict[str, Any]] = {
    "sft": {
        "chat_template": "chatml", "max_steps": 60, "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1,
        "eval_steps": 30, "save_steps": 30, "learning_rate": 5e-3, "max_length": 64,
    },
    "reward": {
        "max_steps": 100, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "eval_steps": 50,
        "save_steps": 50, "learning_rate": 4e-3, "response_length": 24, "card_policy_samples": 8,
        "card_likelihood_responses": 16, "card_probe_answers": 2,
    },
    "ppo": {
        "rollout_batch_size": 32, "minibatch_size": 8, "microbatch_size": 8, "response_length": 28, "learning_rate": 2e-3,
        "warmup_steps": 4, "kl_coef": 0.05, "num_eval_samples": 20, "save_steps": 1000, "gold": "doctor_world:judge",
    },
}  # fmt: skip
SHARED = {
    "device": "cpu", "dtype": "float32", "optim": "adamw_torch", "wandb_mode": "disabled", "lora_r": 8, "lora_alpha": 16,
    "warmup_steps": 4,
}  # fmt: skip
#: Settings of the clean PPO runs, each on every world.
CLEAN_PPO: dict[str, dict[str, Any]] = {
    "plain": {},
    "large_rollouts": {"rollout_batch_size": 64, "minibatch_size": 16},
    "two_epochs": {"num_ppo_epochs": 2, "learning_rate": 1e-3},
    "kl_target": {"kl_target": 3.0, "kl_horizon": 500},
    "function_reward": {"reward": ["doctor_world:mood"], "value_warmup_updates": 3},
    "shared_trunk": {"value_model": "shared_trunk"},
}
WORLDS = [(size, seed) for size in ("small", "wide") for seed in (0, 1)]
#: The demo driven too far is a fault of its own, read from a folder: what its findings may be called.
OVEROPTIMISED = Fault(
    name="overoptimised_demo",
    stage="ppo",
    what="the demo without clipped rewards, with a large constant step size",
    causes=("over_optimised", "responses_alike", "entropy_collapse", "repeated_text", "kl_high"),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run."""

    name: str
    size: str
    seed: int
    stage: str
    options: dict[str, Any] = field(default_factory=dict)
    fault: Fault | None = None


def cases() -> list[Case]:
    """All runs, clean ones first: their SFT and reward models are what the faults are put into."""
    clean = [
        Case(name=f"clean_{stage}_{size}_{seed}", size=size, seed=seed, stage=stage)
        for size, seed in WORLDS
        for stage in ("sft", "reward")
    ]
    clean += [
        Case(name=f"clean_ppo_{kind}_{size}_{seed}", size=size, seed=seed, stage="ppo", options=options)
        for kind, options in CLEAN_PPO.items()
        for size, seed in WORLDS
    ]
    faults = [
        Case(name=fault.name, size=size, seed=seed, stage=fault.stage, options=fault.options, fault=fault)
        for fault, (size, seed) in zip(FAULTS, WORLDS * len(FAULTS), strict=False)
    ]
    return [*clean, *faults]


class Bench:
    """Runs cases in a folder, where finished ones are found again."""

    def __init__(self, folder: Path, *, updates: int, pretraining: int, options: dict[str, Any]) -> None:
        self.folder, self.updates, self.pretraining = folder.absolute(), updates, pretraining
        self.options = options

    def result(self, case: Case) -> dict[str, Any] | None:
        """What a finished run left."""
        file = self.folder / "cases" / f"{case.name}.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def run(self, case: Case) -> dict[str, Any]:
        """Makes the run, unless it was made before."""
        if (known := self.result(case)) is not None:
            return known
        self.prepare(case)
        output, started = self.folder / "runs" / case.name, time.perf_counter()
        refused, told = self.stages(case, output)
        row = {
            **_describe(case),
            "refused": refused,
            "live": told,
            "findings": findings(output / case.stage),
            "seconds": round(time.perf_counter() - started, 1),
        }
        file = self.folder / "cases" / f"{case.name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(row, indent=1) + "\n")
        return row

    def stages(self, case: Case, output: Path) -> tuple[dict[str, str] | None, list[str]]:
        """The stages of a case with its fault; who refused it, and the checks that spoke up while it ran."""
        from rlhf.base.errors import UserError

        told: list[str] = []
        place = Place(base=self.world(case) / "base")
        patch = case.fault.patch(place) if case.fault else contextlib.nullcontext()
        alert = mock.patch(
            "rlhf.run.tracker.Tracker.alert",
            lambda self, title, *rest: told.append(title.split(": ")[1].split(" at ")[0]),
        )
        # Seconds of this process's own work: what else a shared machine does is no fault of the run.
        clock = types.SimpleNamespace(perf_counter=time.process_time)
        clocks = mock.patch("rlhf.ppo.rollout.time", clock), mock.patch("rlhf.ppo.trainer.time", clock)
        try:
            with patch, alert, clocks[0], clocks[1]:
                if case.fault is not None and case.fault.own_sft:
                    self.stage("sft", case, output, {})
                self.stage(case.stage, case, output, dict(case.options))
        except (UserError, RuntimeError, ValueError) as error:  # how the product refuses; any other is a slip in here
            return _refusal(error), told
        return None, told

    def stage(self, stage: str, case: Case, output: Path, options: dict[str, Any]) -> None:
        """One stage, in this process."""
        import importlib

        from rlhf.config import PPOConfig, RewardConfig, SFTConfig

        world = self.world(case)
        data = world / "data"
        if case.fault is not None and case.fault.data:
            data = write_data(world / f"data_{case.name}", seed=case.seed, **case.fault.data)
        clean = f"{case.size}_{case.seed}"
        name = case.name if case.fault or stage == "ppo" else clean
        given = {**SHARED, **OPTIONS[stage], **self.options, "name": name, "seed": case.seed, "dataset": str(data)}
        given |= {"registry": str(world / "registry"), "output_dir": str(output)}
        if stage == "sft":
            given["model_name_or_path"] = str(world / "base")
        else:
            given["policy"] = f"sft/{case.name if case.fault and case.fault.own_sft else clean}"
        if stage == "ppo":
            given |= {"reward": [f"reward/{clean}"], **options}
            given["total_episodes"] = given["rollout_batch_size"] * self.updates
        config: Any = {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig}[stage]
        importlib.import_module(f"rlhf.stages.{stage}").run(config(**{**given, **options}))

    def world(self, case: Case) -> Path:
        """Folder of the models and data that a case builds on."""
        return self.folder / f"world_{case.size}_{case.seed}"

    def prepare(self, case: Case) -> None:
        """Makes what a case builds on: base model and data, and the clean runs of the stages before its own."""
        world = self.world(case)
        if not (world / "data").is_dir():
            write_base(world / "base", size=case.size, seed=case.seed, steps=self.pretraining)
            write_data(world / "data", seed=case.seed)
        for stage in ("sft", "reward")[: ("sft", "reward", "ppo").index(case.stage)]:
            self.run(next(c for c in cases() if c.name == f"clean_{stage}_{case.size}_{case.seed}"))


def findings(folder: Path) -> list[dict[str, Any]]:
    """What the diagnosis of a stage's folder says; nothing where nothing was logged."""
    from rlhf.base.errors import UserError
    from rlhf.doctor.diagnosis import diagnose

    try:
        diagnoses = diagnose(folder)
    except UserError:
        return []
    return [
        {"check": f.name, "first": f.first, "last": f.last, "evidence": f.evidence}
        for one in diagnoses
        for f in one.findings
    ]


def _describe(case: Case) -> dict[str, Any]:
    fault = case.fault
    told: dict[str, Any] = {}
    if fault is not None:
        told = {
            "what": fault.what,
            "causes": list(fault.causes),
            "says": fault.says,
            "preflight": list(fault.preflight),
        }
    kind = {"kind": "clean" if fault is None else "fault", "stage": case.stage, "size": case.size, "seed": case.seed}
    return {"name": case.name, **kind, **told, "options": case.options}


def _refusal(error: Exception) -> dict[str, str]:
    """Which part of the product ended a run, with its words."""
    by = "preflight" if str(error).startswith("preflight failed") else "guard"
    return {"by": by, "error": type(error).__name__, "message": str(error)[:400]}


# ---- what it comes to ------------------------------------------------------------------------------------------------


def judge(row: dict[str, Any]) -> dict[str, Any]:
    """By what a run was found faulty, the cause that was named first, and whether it is the right one."""
    refused, found = row["refused"], [f["check"] for f in row["findings"]]
    by = [*([refused["by"]] if refused else []), *(["live"] if row["live"] else []), *(["afterwards"] if found else [])]
    words = [*([row["says"]] if row.get("says") else []), *row.get("preflight", ())]
    says = bool(refused and any(word in refused["message"] for word in words))
    first = "refused" if says else found[0] if found else "refused" if refused else "nothing"
    right = says or bool(found and found[0] in row.get("causes", ()))
    return {"detected_by": by, "named": first, "right": right}


def share(rows: Sequence[bool]) -> dict[str, Any]:
    """A share of runs with its 95% interval (Wilson)."""
    from scipy.stats import binomtest

    if not rows:
        return {"of": 0}
    interval = binomtest(sum(rows), len(rows)).proportion_ci(method="wilson")
    figures = {"share": sum(rows) / len(rows), "low": interval.low, "high": interval.high}
    return {"runs": sum(rows), "of": len(rows), **{k: round(float(v), 4) for k, v in figures.items()}}


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates over runs, and the confusion of faults with named causes."""
    judged = [{**row, **judge(row)} for row in rows]
    faults, clean = ([r for r in judged if r["kind"] == kind] for kind in ("fault", "clean"))
    return {
        "detected": share([bool(r["detected_by"]) for r in faults]),
        "right_cause": share([r["right"] for r in faults]),
        "false_alarms": share([bool(r["detected_by"]) for r in clean]),
        "seconds": round(sum(r["seconds"] for r in rows), 1),
        "runs": judged,
    }


def table(summary: dict[str, Any]) -> str:
    """Markdown: the rates, each fault with what was named, and the alarms on clean runs."""
    lines = ["| | runs | of | share | 95% interval |", "|---|---|---|---|---|"]
    for name, label in (
        ("detected", "faults detected"), ("right_cause", "right cause named first"), ("false_alarms", "clean runs with an alarm"),
    ):  # fmt: skip
        rate = summary[name]
        if rate["of"]:
            cells = f"{rate['runs']} | {rate['of']} | {rate['share']:.0%} | {rate['low']:.0%} to {rate['high']:.0%}"
            lines.append(f"| {label} | {cells} |")
    lines += ["", "| fault | detected by | named first | right | also found |", "|---|---|---|---|---|"]
    for row in summary["runs"]:
        if row["kind"] == "fault":
            also = [f["check"] for f in row["findings"] if f["check"] != row["named"]]
            by, right = ", ".join(row["detected_by"]) or "nothing", "yes" if row["right"] else "no"
            lines.append(f"| {row['what']} | {by} | {row['named']} | {right} | {', '.join(also)} |")
    alarms = [r for r in summary["runs"] if r["kind"] == "clean" and r["detected_by"]]
    lines += ["", *(f"False alarm: {r['name']}: {r['named']}" for r in alarms)]
    return "\n".join(lines).rstrip()


def read_overoptimised(folder: Path) -> dict[str, Any]:
    """The demo driven too far, from the log of a run that was made before."""
    case = Case(name=OVEROPTIMISED.name, size="demo", seed=0, stage="ppo", fault=OVEROPTIMISED)
    found = findings(folder / "ppo" if (folder / "ppo").is_dir() else folder)
    return {**_describe(case), "refused": None, "live": [], "findings": found, "seconds": 0.0}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="make these runs only; --list shows names"
    )
    parser.add_argument("--list", action="store_true", help="list the runs and stop")
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/doctor"), help="where the runs go, and are found again"
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="OPTION=VALUE", help="options of all stages, YAML values"
    )
    parser.add_argument("--updates", type=int, default=30, help="updates of a PPO run")
    parser.add_argument("--pretraining", type=int, default=600, help="updates of the base models")
    parser.add_argument(
        "--overoptimised", type=Path, metavar="RUN", help="folder of a run of configs/demo_overoptimised"
    )
    parser.add_argument("--out", type=Path, default=common.RESULTS / "doctor.json")
    given = parser.parse_args()
    every = cases()
    names = [case.name for case in every]
    if given.list:
        print("\n".join(names))
        return
    if unknown := [name for name in given.only if name not in names]:
        parser.error(f"no run {', '.join(unknown)}; --list shows the names")
    options = {name: yaml.safe_load(value) for name, _, value in (word.partition("=") for word in given.set)}
    bench = Bench(given.folder, updates=given.updates, pretraining=given.pretraining, options=options)
    for case in every:
        if not given.only or case.name in given.only:
            row = bench.run(case)
            print(f"{case.name}: {judge(row)['named']} ({row['seconds']:.0f} s)", flush=True)
    rows = [row for case in every if (row := bench.result(case)) is not None]
    if given.overoptimised is not None:
        rows.append(read_overoptimised(given.overoptimised))
    summary = {"machine": common.machine("cpu"), "updates": given.updates, **summarise(rows)}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(summary, indent=1) + "\n")
    print(table(summary))


if __name__ == "__main__":
    common.start(main, {})

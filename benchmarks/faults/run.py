"""Makes the runs, in a folder where finished ones are found again; several processes may work on one folder."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from faults.cases import OPTIONS, SHARED, Case, parent
from faults.patching import Place
from faults.world import write_base, write_data

#: What a run's folder holds besides its logs: what is right about it, and what the product and its doctor made of it.
ANSWER, VERDICT = "answer.json", "verdict.json"


class Bench:
    """Runs cases in a folder.

    Args:
        updates: updates of a PPO run.
        pretraining: updates of the base models.
        options: options of all stages.
    """

    def __init__(self, folder: Path, *, updates: int, pretraining: int, options: dict[str, Any]) -> None:
        self.folder, self.updates, self.pretraining = folder.absolute(), updates, pretraining
        self.options = options

    def output(self, case: Case) -> Path:
        """Return the folder of a run."""
        return self.folder / "runs" / case.name

    def result(self, case: Case) -> dict[str, Any] | None:
        """Return what a finished run left; None of one that was not made."""
        file = self.output(case) / VERDICT
        return {**case.answer(), **json.loads(file.read_text())} if file.is_file() else None

    def run(self, case: Case) -> dict[str, Any] | None:
        """Make a run unless it is there; None where another process is making it."""
        if self.result(case) is None:
            with self._lock(case.name, wait=False) as mine:
                if not mine:
                    return None
                if self.result(case) is None:
                    self._make(case)
        return self.result(case)

    def diagnose_again(self, case: Case) -> None:
        """Put the doctor's present diagnosis into a finished run."""
        file = self.output(case) / VERDICT
        verdict = json.loads(file.read_text())
        _write(file, {**verdict, "findings": findings(self.output(case) / case.stage)})

    def investigate(self, case: Case, seconds: float) -> None:
        """Add to a finished run what experiments confirm, with its fault in place, and the diagnosis then.

        Only where the diagnosis is open: nothing was found, or a symptom comes first.
        """
        file, folder = self.output(case) / VERDICT, self.output(case) / case.stage
        with self._lock(case.name, wait=False) as mine:
            verdict = json.loads(file.read_text())
            first = next(iter(verdict["findings"]), {"kind": "symptom"})
            if not mine or verdict["refused"] or "investigated" in verdict or first["kind"] != "symptom":
                return
            from rlhf.base.errors import UserError
            from rlhf.stages.investigate.examine import investigate

            end = time.monotonic() + seconds
            with contextlib.suppress(UserError, RuntimeError, ValueError), self._faulty(case):
                investigate(folder, None, end, [])
            _write(file, {**verdict, "investigated": findings(folder)})

    def _make(self, case: Case) -> None:
        self._prepare(case)
        output, started = self.output(case), time.process_time()
        _write(output / ANSWER, case.answer())
        refused, live = self._stages(case, output)
        seconds = round(time.process_time() - started, 1)
        found = findings(output / case.stage)
        _write(output / VERDICT, {"refused": refused, "live": live, "findings": found, "seconds": seconds})

    def _prepare(self, case: Case) -> None:
        """Make what a case builds on: base model and data, and the clean runs of the stages before its own."""
        world = self.world(case)
        with self._lock(world.name, wait=True):
            if not (world / "data").is_dir():
                write_base(world / "base", size=case.size, seed=case.seed, steps=self.pretraining)
                write_data(world / "data", seed=case.seed)
        for stage in ("sft", "reward")[: ("sft", "reward", "ppo").index(case.stage)]:
            one = parent(stage, case.size, case.seed)
            with self._lock(one.name, wait=True):
                if self.result(one) is None:
                    self._make(one)

    @contextlib.contextmanager
    def _lock(self, name: str, *, wait: bool) -> Iterator[bool]:
        """Yield whether this process may work on something; a process that dies gives it back."""
        file = self.folder / "locks" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True

    def _stages(self, case: Case, output: Path) -> tuple[dict[str, str] | None, list[str]]:
        """Run the stages of a case with its fault; return who refused it, and the checks that spoke up while it ran."""
        from rlhf.base.errors import UserError

        live: list[str] = []
        alert = mock.patch(
            "rlhf.run.tracker.Tracker.alert",
            lambda self, title, *rest: live.append(title.split(": ")[-1].split(" at ")[0]),
        )
        # Seconds of this process's own work: what else a shared machine does is no fault of the run.
        clock = types.SimpleNamespace(perf_counter=time.process_time)
        clocks = mock.patch("rlhf.ppo.rollout.time", clock), mock.patch("rlhf.ppo.trainer.time", clock)
        try:
            with self._faulty(case), alert, clocks[0], clocks[1]:
                if case.fault is not None and case.fault.own_sft:
                    self._stage("sft", case, output, {})
                self._stage(case.stage, case, output, dict(case.options))
        except (UserError, RuntimeError, ValueError) as error:  # how the product refuses
            return self._refusal(error, "preflight" if str(error).startswith("preflight failed") else "guard"), live
        except Exception as error:  # a slip, which names nothing
            return self._refusal(error, "crash"), live
        return None, live

    def _faulty(self, case: Case) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which the patch of a case's fault is active.

        All modules are there before it: one that is first imported under a patch would keep the patched function.
        """
        for stage in ("sft", "reward", "ppo", "investigate.examine"):
            importlib.import_module(f"rlhf.stages.{stage}")
        return case.fault.patch(Place(base=self.world(case) / "base")) if case.fault else contextlib.nullcontext()

    def _stage(self, stage: str, case: Case, output: Path, options: dict[str, Any]) -> None:
        """Run one stage in this process."""
        from rlhf.config import PPOConfig, RewardConfig, SFTConfig

        world, fault = self.world(case), case.fault
        data = world / "data"
        if fault is not None and fault.data is not None:
            data = write_data(world / f"data_{case.name}", seed=case.seed)
            fault.data(data)
        plain = f"{case.size}_{case.seed}"
        is_parent = case == parent(stage, case.size, case.seed) if stage != "ppo" else False
        name = plain if is_parent else case.name
        given = {**SHARED, **OPTIONS[stage], **self.options, "name": name, "seed": case.seed, "dataset": str(data)}
        given |= {"registry": str(world / "registry"), "output_dir": str(output)}
        if stage == "sft":
            given["model_name_or_path"] = str(world / "base")
        else:
            given["policy"] = f"sft/{case.name if fault and fault.own_sft else plain}"
        if stage == "ppo":
            given |= {"reward": [f"reward/{plain}"], **options}
            updates = fault.updates if fault is not None and fault.updates is not None else self.updates
            given["total_episodes"] = given["rollout_batch_size"] * min(updates, self.updates)
        config: Any = {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig}[stage]
        importlib.import_module(f"rlhf.stages.{stage}").run(config(**{**given, **options}))

    def _refusal(self, error: Exception, by: str) -> dict[str, str]:
        """Return which part of the product ended a run, with its words, in which paths begin in the benchmark's folder."""
        message = str(error).replace(f"{self.folder}/", "")[:1000]
        return {"by": by, "error": type(error).__name__, "message": message}

    def world(self, case: Case) -> Path:
        """Return the folder of the models and data that a case builds on."""
        return self.folder / f"world_{case.size}_{case.seed}"


def findings(folder: Path) -> list[dict[str, Any]]:
    """Return what the diagnosis of a stage's folder names, first cause first; nothing where nothing was logged."""
    from rlhf.base.errors import UserError
    from rlhf.doctor.diagnosis import diagnose

    try:
        diagnoses = diagnose(folder)
    except UserError:
        return []
    return [
        {"name": f.name, "kind": f.kind, "first": f.first, "last": f.last, "evidence": f.evidence}
        for one in diagnoses
        for f in one.findings
    ]


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".tmp")
    scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    scratch.replace(file)

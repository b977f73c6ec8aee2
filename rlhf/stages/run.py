"""A run of a stage: its folder, device and tracker, its preflight, and the artefact that it registers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import datasets
from transformers import PreTrainedTokenizerBase, set_seed

from rlhf.base import distributed, storage
from rlhf.base.errors import UserError
from rlhf.base.json_files import read_object, section
from rlhf.base.locks import exclusive
from rlhf.base.redaction import redact
from rlhf.config import TrainingConfig
from rlhf.data_prep.load import Loaded
from rlhf.doctor.health.findings import actions
from rlhf.doctor.plan.show import print_plan
from rlhf.doctor.preflight.check import Check, require_all
from rlhf.doctor.preflight.context import PreflightContext
from rlhf.doctor.preflight.data import load_parents_data
from rlhf.models.compute import Compute, quiet_transformers
from rlhf.models.inputs import UNKNOWN
from rlhf.models.tokenization import stop_token_ids, tokenizer_hashes
from rlhf.registry import MANIFEST, Artifact, Registry, changed_inputs, recipe_hash
from rlhf.report.run_page import write_report
from rlhf.run import checkpoint, memory, terminal
from rlhf.run.timing import PhaseTimer
from rlhf.run.tracker import RUN_FILE, Tracker
from rlhf.stages.callbacks import Callback
from rlhf.stages.data import training_prompts
from rlhf.stages.next_steps import print_outcome

ConfigT = TypeVar("ConfigT", bound=TrainingConfig)
INPUTS = "inputs"
"""Entry of `made_of.json` with the hashes of inputs outside the registry."""
FREED_SECONDS = 10.0
"""Time that a run waits for its folder: a process that was just killed may leave workers that end a moment later."""


@dataclass
class Run(Generic[ConfigT]):
    """One execution of a stage."""

    stage: str
    config: ConfigT
    folder: Path
    registry: Registry
    compute: Compute
    tracker: Tracker
    parents: list[Artifact]
    data: dict[str, Any]
    recipe: str
    inputs: dict[str, str]
    timer: PhaseTimer
    callbacks: Sequence[Callback] = ()
    started: float = field(default_factory=time.perf_counter)

    @cached_property
    def parents_data(self) -> dict[str, dict[str, Loaded] | str]:
        """The data that the parents were trained on, as `load_parents_data` returns it; the preflight lets go of it."""
        return load_parents_data(self.parents)

    def publish(
        self,
        write: Callable[[Path], None],
        *,
        base_model: str,
        base_model_revision: str | None,
        tokenizer: PreTrainedTokenizerBase,
        metrics: dict[str, Any],
        name: str | None = None,
        kind: Literal["adapter", "full"] = "adapter",
        reward_mean: float | None = None,
        reward_std: float | None = None,
    ) -> Artifact:
        """Register an artefact under the run's name or another, with metrics, seconds and phases; return it.

        Args:
            write: puts the weights into the folder that it is called with.
        """
        name = name or self.config.name
        if distributed.rank() > 0:
            distributed.wait()
            return self.registry.get(f"{self.stage}/{name}")

        def write_all(folder: Path) -> None:
            write(folder)
            tokenizer.save_pretrained(folder)

        artifact = self._registered(name) or self.registry.publish(
            self.stage,
            name,
            write_all,
            kind=kind,
            parents=self.parents,
            base_model=base_model,
            base_model_revision=base_model_revision,
            **tokenizer_hashes(tokenizer),
            pad_token_id=int(tokenizer.pad_token_id),
            stop_token_ids=stop_token_ids(tokenizer),
            reward_mean=reward_mean,
            reward_std=reward_std,
            data=self.data,
            config=redact(dataclasses.asdict(self.config)),
            inputs=self.inputs,
            recipe=self.recipe,
            metrics={
                **metrics,
                "seconds": round(time.perf_counter() - self.started, 1),
                "phases": self.timer.summary(),
            },
            wandb_run_id=self.tracker.run_id,
        )
        distributed.wait()
        self.tracker.log_artifact(artifact.reference, artifact.path, {**metrics, "hash": artifact.hash})
        if artifact.name == self.config.name:
            shutil.copy(artifact.path / MANIFEST, self.folder)  # a report on the folder needs no registry
            self.tracker.log_summary(metrics)
            self._send_report()
        print(f"registered {artifact.reference} in {self.registry.root}", flush=True)
        print_outcome(artifact)
        return artifact

    def _send_report(self) -> None:
        """Write the report page and send it, with `log_report`; a page that cannot be made does not end the run."""
        if self.config.log_report:
            try:
                self.tracker.log_page(write_report(self.folder.parent))
            except UserError as error:
                print(f"the report page is not sent: {error}", flush=True)

    def _registered(self, name: str) -> Artifact | None:
        """Return the artefact that this run registered before it was killed and resumed, if any."""
        artifact = self.registry.find(self.stage, name, self.recipe, self.inputs) if self.config.resume else None
        return artifact if artifact and artifact.manifest.wandb_run_id == self.tracker.run_id else None


def stage_recipe(config: TrainingConfig, parents: Sequence[Artifact], data: dict[str, Any]) -> str:
    """Return the hash of everything that decides a stage's result: options, parents, data."""
    return recipe_hash(config.recipe(), [p.hash for p in parents], data["fingerprint"])


def find_finished(stage: str, config: TrainingConfig, recipe: str, inputs: dict[str, str]) -> Artifact | None:
    """Return the registered artefact of a recipe and its inputs, if there is one, and print that it is reused."""
    registry = Registry(config.registry)
    artifact = registry.find(stage, config.name, recipe, inputs)
    unknown = [name for name, digest in inputs.items() if digest == UNKNOWN]
    if artifact is not None and unknown:
        names = " and ".join(unknown)
        print(
            f"{stage}: {artifact.reference} has this recipe, but {names} has no source file; it is made again",
            flush=True,
        )
        return None
    if artifact is not None:
        print(f"{stage}: {artifact.reference} has this recipe already, skipped", flush=True)
    elif (other := registry.find(stage, config.name, recipe)) is not None:
        names = " and ".join(changed_inputs(other.manifest, inputs))
        print(f"{stage}: {other.reference} has this recipe, but {names} changed since; it is made again", flush=True)
    return artifact


@contextmanager
def open_run(
    stage: str,
    config: ConfigT,
    parents: list[Artifact],
    data: dict[str, Any],
    recipe: str,
    inputs: dict[str, str],
    callbacks: Sequence[Callback] = (),
) -> Iterator[Run[ConfigT]]:
    """Seed, choose device and type, open the tracker, and yield the run; its folder is `output_dir/STAGE`.

    Raises:
        UserError: the name cannot be registered, an option is wrong, or `resume` is set and the checkpoints in the folder
            were made with other options or inputs, or another process is running in the folder.
    """
    Registry(config.registry).require_writable(stage, config.name)  # raises now and not after the training
    actions(config.doctor)  # raises now and not at the first finding
    _quiet_libraries()
    distributed.start()
    set_seed(config.seed)
    compute = Compute.choose(config)
    folder = Path(config.output_dir) / stage
    folder.mkdir(parents=True, exist_ok=True)
    lock = exclusive(folder / ".lock", f"the run folder {folder}", wait=FREED_SECONDS)
    with lock if distributed.rank() == 0 else nullcontext():
        if distributed.rank() == 0:
            _claim_checkpoints(folder / "checkpoints", config, parents, data, inputs)
            processes = f" in {distributed.size()} processes" if distributed.size() > 1 else ""
            print(f"{stage}: {config.name} on {compute}{processes}; data {data['rows']}; logs in {folder}", flush=True)
        distributed.wait()
        timer = PhaseTimer()
        with (
            _log_folder(folder) as logs,
            Tracker(
                logs,
                stage=stage,
                name=f"{config.name}-{stage}",
                group=config.wandb_group or config.name,
                config=dataclasses.asdict(config),
                resume=config.resume,
                **(config.tracking if distributed.rank() == 0 else {"trackers": ()}),
            ) as tracker,
            terminal.view(f"{stage}: {config.name} on {compute}"),
            memory.explained(timer),
        ):
            for parent in parents:
                tracker.use_artifact(parent.reference, parent.hash, parent.path)
            tracker.use_data(config.dataset, data)
            registry = Registry(config.registry)
            yield Run(
                stage, config, folder, registry, compute, tracker, parents, data, recipe, inputs, timer, callbacks
            )


@contextmanager
def _log_folder(folder: Path) -> Iterator[Path]:
    """Yield the folder that this process logs to: only the first process's is kept."""
    if distributed.rank() == 0:
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def require_one_process(stage: str) -> None:
    """Refuse a launcher's several processes: their gradients would not be added up."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"the {stage} stage runs in one process; only ppo can be started with torchrun")


def _quiet_libraries() -> None:
    """Keep the libraries' progress bars and deprecations out of logs and the live view."""
    quiet_transformers()
    datasets.disable_progress_bars()


def _claim_checkpoints(
    folder: Path, config: TrainingConfig, parents: list[Artifact], data: dict[str, Any], inputs: dict[str, str]
) -> None:
    """Mark the folder as this run's, and move another run's checkpoints out of it.

    Raises:
        UserError: with `resume`, the checkpoints there were made with other options, data, parents or inputs.
    """
    origins = {"dataset": data["fingerprint"], **{parent.stage: parent.hash for parent in parents}}
    made_of, mark = redact({**config.recipe(), **origins}), folder / "made_of.json"
    if not config.resume:
        # The id goes first: killed between these lines, a resumed run must not take an earlier run's results for its own.
        (folder.parent / RUN_FILE).unlink(missing_ok=True)
        if folder.exists():
            previous = folder.with_name("checkpoints.previous")
            shutil.rmtree(previous, ignore_errors=True)
            folder.rename(previous)
    checkpoint.clear(folder)
    if mark.is_file() or checkpoint.latest(folder):
        recorded = read_object(mark, fix="start anew without --resume") if mark.is_file() else {}
        if recorded.pop("checksum", None) not in (None, _checksum(recorded)):  # older ones have none
            raise UserError(f"{mark} is damaged: it differs from its own checksum; start anew without --resume")
        changed = [k for k, v in made_of.items() if k not in recorded or recorded[k] != v]
        earlier = section(recorded, INPUTS)  # without those that an older version did not record
        if changed := sorted([*changed, *(name for name in inputs if earlier.get(name, inputs[name]) != inputs[name])]):
            raise UserError(
                f"the checkpoints in {folder} were made with other options or inputs ({', '.join(changed)}); "
                "use the same ones again, or start anew without --resume"
            )
        return
    folder.mkdir(exist_ok=True)
    content = {**made_of, INPUTS: inputs}
    storage.write_text(mark, json.dumps({**content, "checksum": _checksum(content)}, indent=2))


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def preflight(
    run: Run[Any],
    examine: Callable[[PreflightContext], list[Check]],
    tokenizer: PreTrainedTokenizerBase,
    sets: dict[str, Loaded],
) -> None:
    """Run a stage's checks on its data sets, unless they are switched off.

    Raises:
        UserError: checks failed; nothing was trained.
    """

    def checks() -> list[Check]:
        context = PreflightContext(
            config=run.config,
            compute=run.compute,
            folder=run.folder,
            registry=run.registry.root,
            parents=run.parents,
            tokenizer=tokenizer,
            parents_data=run.parents_data,
            training=training_prompts(sets),
            validation=sets["validation"],
        )
        return examine(context)

    require_checks(run, checks)
    vars(run).pop("parents_data", None)  # may be large


def announce(run: Run[Any], base_model: str, sets: dict[str, Loaded], tokenizer: PreTrainedTokenizerBase) -> None:
    """Print what the stage will take, before its models are loaded; without the preflight, nothing."""
    if run.config.preflight and distributed.rank() == 0:
        print_plan(run.config, base_model, run.compute, sets, tokenizer)


def require_checks(run: Run[Any], checks: Callable[[], list[Check]]) -> None:
    """Run checks, unless they are switched off, and raise `UserError` if some fail."""
    if run.config.preflight:
        with run.timer.phase("preflight"):
            require_all(checks(), "preflight")

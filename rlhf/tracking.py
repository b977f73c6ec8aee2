"""Where the numbers of a run go: `metrics.jsonl` and `samples.jsonl` beside it, always, and Weights & Biases.

The local files are the record, and the reports are made from them. W&B is a copy that may fail: whatever it does, the
training goes on after one warning. Only this module and `rlhf.registry.hub` import wandb, and only when a run needs it.

`python -m rlhf.tracking dashboard --project NAME` saves a W&B workspace in which runs are compared.
"""

from __future__ import annotations

import json
import logging
import math
import netrc
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlsplit

import psutil
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf import live, storage
from rlhf.comparison.runs import reward_kl_points
from rlhf.errors import UserError, did_you_mean, run_command
from rlhf.progress import Progress
from rlhf.redaction import redact
from rlhf.report import read_jsonl

logger = logging.getLogger(__name__)

WANDB_MODES = ("auto", "online", "offline", "disabled")
RUN_FILE = "tracking.json"
"""Holds the id of the run, by which a resumed run is known as the same."""

INIT_TIMEOUT_SECONDS = 30.0
"""How long a start waits for the W&B server before the run is kept offline instead."""

FINISH_TIMEOUT_SECONDS = 300.0
"""How long the end of a run waits for its last uploads."""

UPDATES, EPISODES = "updates", "episodes"
"""The two axes that mean the same in every run of a stage, whatever its batch sizes and logging steps."""

AXES = {
    **dict.fromkeys(("pretrain/*", "sft/*", "reward/*", "card/*"), UPDATES),
    **dict.fromkeys(("objective/*", "ppo/*", "response/*", "rollout/*", "time/*", "health/*"), EPISODES),
}
"""The axis over which W&B draws each family of metrics; the other one can be chosen in any panel."""


class Tracker:
    """The metric sink of one stage's run; a context manager.

    Args:
        run_dir: the run's folder; created. `metrics.jsonl`, `samples.jsonl`, `tracking.json` and `wandb/` go there.
        stage: `pretrain`, `sft`, `reward` or `ppo`; the job type in W&B.
        name, group: the run's name, and what ties the runs of one pipeline together.
        config: the resolved config of the run. Passwords and keys are blanked before it leaves this process.
        wandb_mode: `auto` is online when a key is at hand (WANDB_API_KEY or netrc) and offline otherwise, unless the
            environment variable WANDB_MODE says something else; or `online`, `offline`, `disabled`.
        resume: continue the files and the W&B run that are there. Otherwise files of an earlier run in the same folder
            are moved aside to `*.previous.jsonl`.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        stage: str,
        name: str,
        group: str,
        config: Mapping[str, Any],
        wandb_mode: str = "auto",
        wandb_project: str = "rlhf",
        resume: bool = False,
    ) -> None:
        self.run_dir = Path(run_dir).absolute()
        self.stage, self.name, self.group = stage, redact(name), redact(group)
        self.config = redact(config)
        self.wandb_mode = resolve_wandb_mode(wandb_mode)
        self.wandb_project = wandb_project
        self.resume = resume
        self.run_id = ""
        self._metrics_file = self.run_dir / "metrics.jsonl"
        self._samples_file = self.run_dir / "samples.jsonl"
        self._inputs: dict[str, str] = {}
        self._run: Any = None
        self._table: Any = None
        self._warned = False
        self._data_dir_is_ours = False

    def __enter__(self) -> Tracker:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if self.resume:
            for file in (self._metrics_file, self._samples_file):
                if file.exists():
                    _cut(file, file.stat().st_size)  # a killed run may have left half a line
        else:
            for file in (self._metrics_file, self._samples_file):
                if file.exists():
                    file.replace(file.with_suffix(".previous.jsonl"))
        self.run_id = self._load_or_make_run_id()
        self._write_record()
        if self.wandb_mode != "disabled":
            self._start_wandb()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish(exit_code=0 if kind is None else 1)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Writes one line with these metrics, and sends them to W&B. `step` is in updates and never goes down."""
        figures = {name: float(value) for name, value in metrics.items()}
        _append_lines(self._metrics_file, [{"step": int(step), "time": time.time(), **figures}])
        live.show_metrics(figures)
        with self._survives("log metrics"):
            if self._run is not None:
                self._run.log({**figures, UPDATES: int(step)}, step=int(step))

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Appends rows of text and scores. The first row decides the columns of the W&B table."""
        if not rows:
            return
        _append_lines(self._samples_file, [{"step": int(step), **row} for row in rows])
        live.show_samples(rows)
        with self._survives("log samples"):
            if self._run is not None:
                self._add_to_table(rows, step)

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Sends rows to W&B as a table of their own, with the columns of the first; the caller keeps the local record."""
        with self._survives(f"log the table {name}"):
            if self._run is not None and rows:
                import wandb

                columns: list[str | int] = list(rows[0])
                data = [[row.get(str(column)) for column in columns] for row in rows]
                self._run.log({name: wandb.Table(columns=columns, data=data, allow_mixed_types=True)}, step=int(step))

    def log_scatter(
        self, name: str, rows: Sequence[Mapping[str, float]], x: str, y: str, title: str, step: int
    ) -> None:
        """Sends a panel with a point a row; the caller keeps the local record."""
        with self._survives(f"log the panel {name}"):
            if self._run is not None and rows:
                import wandb

                table = wandb.Table(columns=[x, y], data=[[row[x], row[y]] for row in rows])
                self._run.log({name: wandb.plot.scatter(table, x, y, title=title)}, step=int(step))

    def log_frontier(self) -> None:
        """Sends the reward-KL frontier of a PPO run as a panel: the score of each update over the root of its KL."""
        points = reward_kl_points(read_jsonl(self._metrics_file)[0]) if self._metrics_file.exists() else []
        if points:
            title = "Score over the square root of KL"
            self.log_scatter("frontier/score", points, "sqrt_kl", "score", title, int(points[-1]["step"]))

    def use_artifact(self, reference: str, hash: str, path: str | Path | None = None) -> None:
        """Says that this run starts from an artifact, e.g. `sft/demo@2`.

        The pair goes into the run's record and into the W&B config. With the artifact's folder, W&B gets the edge of its
        lineage graph, too: the artifact is named by the checksums of its files, which are those that the run that made it
        has logged, so that both ends meet at one version, in whatever order and whenever the runs are synced.
        """
        self._inputs[reference] = hash
        self._write_record()
        with self._survives(f"record the input {reference}"):
            if self._run is not None:
                self._run.config.update({"inputs": dict(self._inputs)}, allow_val_change=True)
                if path is not None:
                    self._use(_model_artifact(reference, path, {"hash": hash}), split_reference(reference)[2])

    def use_data(self, dataset: str, data: Mapping[str, Any]) -> None:
        """Says what data this run reads: the `data` of its manifest. The rows themselves stay where they are.

        The artifact holds the fingerprints, so that two runs meet at one version exactly if they read the same rows.
        """
        with self._survives("record the data"):
            if self._run is not None:
                import wandb

                described = {key: data[key] for key in ("fingerprint", "prepared", "rows") if key in data}
                self._run.config.update({"data": described}, allow_val_change=True)
                place = "-".join(part for part in Path(dataset).parts[-2:] if part != "/")
                _, name, _ = split_reference(f"data-{redact(place)}-{self.stage}")
                artifact = wandb.Artifact(name, type="data", metadata=redact({"dataset": dataset, **described}))
                with artifact.new_file("data.json", encoding="utf-8") as file:
                    json.dump(described, file, indent=2, sort_keys=True)
                self._use(artifact, "")

    def _use(self, artifact: Any, alias: str) -> None:
        """An edge into this run. W&B refuses `use_artifact` offline, because the version has no number yet; the record that
        its own code writes online, "log this, then use it", is taken by its offline log all the same, and by `wandb sync`."""
        aliases = [alias] if alias else []
        if self.wandb_mode == "online":
            self._run.use_artifact(artifact, aliases=aliases)
        else:
            self._run._log_artifact(artifact, aliases=aliases, is_user_created=True, use_after_commit=True)

    def log_artifact(self, reference: str, path: str | Path, metadata: Mapping[str, Any]) -> None:
        """Says that this run made an artifact, a folder of the registry.

        Only the files' names and checksums are recorded (a W&B reference): the registry already keeps the weights, and
        an upload of them would make every run pay for a second copy.
        """
        with self._survives(f"record the artifact {reference}"):
            if self._run is not None:
                artifact = _model_artifact(reference, path, {"inputs": self._inputs, **redact(metadata)})
                version = split_reference(reference)[2]
                self._run.log_artifact(artifact, aliases=[version] if version else None)

    def alert(self, title: str, text: str, severity: Literal["warning", "critical"]) -> None:
        """Sends an alert to W&B, which mails or posts it as the user has set there."""
        with self._survives("send an alert"):
            if self._run is not None:
                levels = {"warning": "WARN", "critical": "ERROR"}
                self._run.alert(title=title, text=text, level=levels[severity])

    def logged(self) -> list[dict[str, Any]]:
        """The lines of metrics so far, those of a run that this one resumes included."""
        return read_jsonl(self._metrics_file)[0] if self._metrics_file.exists() else []

    def logged_samples(self) -> list[dict[str, Any]]:
        """The lines of samples so far."""
        return read_jsonl(self._samples_file)[0] if self._samples_file.exists() else []

    def position(self) -> dict[str, int]:
        """Where the logs end, in bytes by file name; what lies before is on the disk. For a checkpoint, and for `rewind`."""
        there = [file for file in (self._metrics_file, self._samples_file) if file.exists()]
        storage.sync(*there)
        return {file.name: file.stat().st_size for file in there}

    def rewind(self, position: Mapping[str, int]) -> None:
        """Forgets what was logged after `position`: the run goes on from a checkpoint made there and will log it again.

        The history in W&B cannot be shortened; it ignores steps that it has already seen, so none appears twice there.
        """
        for file in (self._metrics_file, self._samples_file):
            if file.exists():
                _cut(file, position.get(file.name, 0))

    def finish(self, exit_code: int = 0) -> None:
        """Ends the W&B run. The local files need no ending; a second call does nothing."""
        run, self._run = self._run, None
        with self._survives("finish the run"):
            if run is not None:
                self._finish_run(run, exit_code)
        if self._data_dir_is_ours:
            os.environ.pop("WANDB_DATA_DIR", None)
            self._data_dir_is_ours = False

    def _finish_run(self, run: Any, exit_code: int) -> None:
        """Gives the uploads `FINISH_TIMEOUT_SECONDS`: W&B itself would retry for days against a server that is gone."""
        errors: list[Exception] = []

        def finish() -> None:
            try:
                run.finish(exit_code=exit_code)
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=finish, name="wandb-finish", daemon=True)
        thread.start()
        thread.join(FINISH_TIMEOUT_SECONDS)
        if thread.is_alive():
            raise TimeoutError(f"still uploading after {FINISH_TIMEOUT_SECONDS:.0f} s; `wandb sync` sends the rest")
        if errors:
            raise errors[0]

    def _start_wandb(self) -> None:
        """Opens the W&B run; one that cannot be online is kept offline, where `wandb sync` can find it later."""
        if "WANDB_DATA_DIR" not in os.environ:
            # Tables and artifacts wait here for their upload. The default is in the home folder, which a container
            # loses long before somebody syncs an offline run.
            os.environ["WANDB_DATA_DIR"] = str(self.run_dir / "wandb")
            self._data_dir_is_ours = True
        if self.wandb_mode == "online" and not has_wandb_key():
            self._warn("W&B has no key (run `wandb login` or set WANDB_API_KEY); the run is kept offline")
            self.wandb_mode = "offline"
        if self.wandb_mode == "online":
            with self._survives("reach the server; the run is kept offline"):
                _knock()
                self._run = self._init_wandb("online")
            if self._run is None:
                self.wandb_mode = "offline"
                with self._survives("stop its service"):  # which still holds the run id of the failed attempt
                    import wandb

                    wandb.teardown(exit_code=1)
        if self._run is None:
            with self._survives("start"):
                self._run = self._init_wandb("offline")

    def _init_wandb(self, mode: Literal["online", "offline"]) -> Any:
        import wandb

        # This one silences the notices that belong to no run, such as the checksum counter of artifacts.
        wandb.setup(settings=wandb.Settings(silent=True))
        settings = wandb.Settings(
            silent=True,
            console="off",
            save_code=False,
            init_timeout=INIT_TIMEOUT_SECONDS,
            disable_git=True,  # W&B would store remote URLs and uncommitted changes; the manifest keeps the commit
            x_disable_meta=redact(sys.argv) != sys.argv,  # which holds the command line
        )
        run = wandb.init(
            project=self.wandb_project,
            dir=str(self.run_dir),
            mode=mode,
            id=self.run_id,
            resume="allow" if self.resume else None,
            name=self.name,
            group=self.group,
            job_type=self.stage,
            config=self.config,
            settings=settings,
        )
        for axis in (UPDATES, EPISODES):
            run.define_metric(axis, hidden=True)
        for family, axis in AXES.items():
            run.define_metric(family, step_metric=axis)
        return run

    def _add_to_table(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        import wandb

        if self._table is None:
            # INCREMENTAL sends only the rows that are new; the default mode freezes a table after its first log.
            columns: list[str | int] = ["step", *(column for column in rows[0] if column != "step")]
            self._table = wandb.Table(columns=columns, log_mode="INCREMENTAL", allow_mixed_types=True)
        for row in rows:
            self._table.add_data(int(step), *(row.get(column) for column in self._table.columns[1:]))
        self._run.log({f"{self.stage}/samples": self._table}, step=int(step))

    def _load_or_make_run_id(self) -> str:
        file = self.run_dir / RUN_FILE
        if self.resume and file.exists():
            try:
                return str(json.loads(file.read_text(encoding="utf-8"))["run_id"])
            except (json.JSONDecodeError, KeyError, TypeError):
                self._warn(f"{file} is not readable; a new W&B run is started")
        return secrets.token_hex(4)

    def _write_record(self) -> None:
        """`tracking.json`: which run this is, from the start, so that one that was killed can still be told from others."""
        named = {key: getattr(self, key) for key in ("run_id", "stage", "name", "group", "config")}
        storage.write_text(self.run_dir / RUN_FILE, json.dumps({**named, "inputs": self._inputs}, indent=2))

    @contextmanager
    def _survives(self, what: str) -> Iterator[None]:
        """Nothing that W&B does may end a training run, so this is the one place where every exception is caught."""
        try:
            yield
        except Exception as error:
            reason = " ".join(redact(f"{type(error).__name__}: {error}").split())[:300]
            self._warn(f"W&B could not {what} ({reason})")

    def _warn(self, message: str) -> None:
        logger.log(logging.DEBUG if self._warned else logging.WARNING, "%s. Metrics are in %s", message, self.run_dir)
        self._warned = True


def resolve_wandb_mode(mode: str) -> str:
    """`online`, `offline` or `disabled`, for any of `WANDB_MODES`. Under `auto`, WANDB_MODE decides first."""
    if mode not in WANDB_MODES:
        raise UserError(
            f"wandb_mode is '{mode}'; it must be one of {', '.join(WANDB_MODES)}{did_you_mean(mode, WANDB_MODES)}"
        )
    if mode != "auto":
        return mode
    from_environment = os.environ.get("WANDB_MODE", "").lower()
    from_environment = {"dryrun": "offline", "run": "online", "shared": "online"}.get(
        from_environment, from_environment
    )
    if from_environment in WANDB_MODES[1:]:
        return from_environment
    if from_environment:
        raise UserError(f"WANDB_MODE is '{from_environment}'; it must be one of {', '.join(WANDB_MODES[1:])}")
    return "online" if has_wandb_key() else "offline"


def has_wandb_key() -> bool:
    """Whether there is a key for W&B, in the environment or in netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = os.environ.get("WANDB_BASE_URL")
    hosts = (
        [urlsplit(server).netloc] if server else ["api.wandb.ai", "api.forge.coreweave.com"]
    )  # `wandb login` writes these
    files = [Path(os.environ["NETRC"])] if "NETRC" in os.environ else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for file in files:
        try:
            entries = netrc.netrc(file.expanduser())
        except (OSError, netrc.NetrcParseError):
            continue
        if any(entries.authenticators(host) for host in hosts):
            return True
    return False


def _knock() -> None:
    """Raises when nobody answers at the W&B server: wandb's own attempts at one that is silent have no common end."""
    import requests

    # An answer of any kind will do, a broken certificate too: what to make of it is wandb's to say.
    with suppress(requests.exceptions.SSLError):
        requests.head(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai", timeout=INIT_TIMEOUT_SECONDS)


def split_reference(reference: str) -> tuple[str, str, str]:
    """`sft/demo@2` -> (`sft`, `sft-demo`, `2`): type, name and alias of a W&B artifact, in the characters it allows."""
    path, _, version = reference.partition("@")
    return path.split("/")[0], re.sub(r"[^A-Za-z0-9_.-]+", "-", path), re.sub(r"[^A-Za-z0-9_.-]+", "-", version)


def _model_artifact(reference: str, path: str | Path, metadata: Mapping[str, Any]) -> Any:
    """A W&B artifact for a folder of the registry, by reference: its digest is that of the files, wherever they are."""
    import wandb

    artifact_type, name, _ = split_reference(reference)
    artifact = wandb.Artifact(name, type=artifact_type, metadata={"reference": reference, **metadata})
    artifact.add_reference(Path(path).absolute().as_uri())
    return artifact


def _append_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One strict JSON object a line. Opened and closed each time, so a killed run loses nothing that was logged."""
    lines = [json.dumps(_finite(row), ensure_ascii=False, allow_nan=False, default=str) + "\n" for row in rows]
    try:
        with file.open("a", encoding="utf-8") as stream:
            stream.writelines(lines)
    except OSError as error:
        raise UserError(
            f"cannot write {file} ({storage.free(file)}): {storage.reason(error)}; "
            "the last checkpoint is intact: mend the disk or free some space, then --resume true"
        ) from error


def _cut(file: Path, size: int) -> None:
    """Shortens a file to the whole lines within its first `size` bytes."""
    with file.open("r+b") as stream:
        stream.truncate(stream.read(size).rfind(b"\n") + 1)


def _finite(value: Any) -> Any:
    """NaN and infinity as None: JSON has no word for them, and a key that vanishes would hide a diverged run."""
    if isinstance(value, Mapping):
        return {str(name): _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# What the trainers of transformers and trl call things -> the last part of our metric names.
_HOUSE_NAMES = {"mean_token_accuracy": "token_accuracy", "learning_rate": "lr"}
_NOT_METRICS = re.compile(r"^(epoch|total_flos|num_tokens|step|train_.*|eval_(runtime|num_tokens|.*_per_second))$")


def house_metrics(logs: Mapping[str, Any], stage: str) -> dict[str, float]:
    """The log line of a Hugging Face trainer under this project's metric names, e.g. `loss` -> `sft/loss`."""
    metrics = {}
    for name, value in logs.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or _NOT_METRICS.match(name):
            continue
        prefix = "eval_" if name.startswith("eval_") else ""
        bare = name.removeprefix("eval_")
        metrics[f"{stage}/{prefix}{_HOUSE_NAMES.get(bare, bare)}"] = float(value)
    return metrics


class MetricsCallback(TrainerCallback):
    """Sends the logs of a Hugging Face trainer to a `Tracker`, under this project's metric names."""

    def __init__(self, tracker: Tracker, stage: str) -> None:
        self.tracker = tracker
        self.stage = stage

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Called by the trainer with a mapping of names to numbers."""
        metrics = house_metrics(logs or {}, self.stage)
        if metrics and state.is_world_process_zero:
            self.tracker.log(metrics, state.global_step)


class ProgressCallback(TrainerCallback):
    """`rlhf.progress` for Hugging Face trainers: one bar for training, one for each evaluation."""

    def __init__(self, description: str) -> None:
        self.description = description
        self._training: Progress | None = None
        self._evaluation: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens the bar. A resumed run starts where its checkpoint was."""
        if state.is_world_process_zero:
            self._training = Progress(state.max_steps, self.description, unit="step")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One optimiser update more."""
        if self._training is not None:
            self._training.update(state.global_step - self._training.done)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Shows the newest loss and accuracy."""
        if self._training is not None:
            metrics = house_metrics(logs or {}, "")
            shown = {
                name: metrics[f"/{name}"] for name in ("loss", "token_accuracy", "accuracy") if f"/{name}" in metrics
            }
            self._training.update(0, **{name.removeprefix("token_"): value for name, value in shown.items()})

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """One batch of an evaluation more."""
        if not state.is_world_process_zero:
            return
        if self._evaluation is None:
            try:
                total = len(eval_dataloader)
            except TypeError:  # a stream has no length
                total = None
            self._evaluation = Progress(
                total, f"{self.description} evaluation", unit="batch", leave=self._training is None
            )
        self._evaluation.update()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ends the evaluation's bar."""
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        """Ends the bar of a `predict` call."""
        self.on_evaluate(args, state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends the bar."""
        if self._training is not None:
            self._training.close()
            self._training = None


class PhaseTimer:
    """Seconds and peak memory of the phases of a run.

    ```
    with timer.phase("rollout"):
        ...
    timer.summary()  # [{"phase": "rollout", "seconds": 12.5, "peak_rss_gb": 1.9}]
    ```
    With a CUDA device there is `peak_cuda_gb` as well. GB are 10^9 bytes.
    """

    def __init__(self) -> None:
        self._phases: dict[str, dict[str, Any]] = {}
        self.failed: str | None = None
        """The phase that was left by an error."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of the block to phase `name`, also when it fails."""
        start, before = time.perf_counter(), _peak_memory()
        try:
            yield
        except BaseException:
            self.failed = name
            raise
        finally:
            row = self._phases.setdefault(name, {"phase": name, "seconds": 0.0})
            row["seconds"] += time.perf_counter() - start
            for key, (now, peak) in _peak_memory().items():
                # The system knows only the peak since the process began. If it grew, it grew in this block; if not,
                # the block stayed below it, and what is in use at its two ends is the best that is known.
                now_before, peak_before = before.get(key, (0.0, 0.0))
                seen = peak if peak > peak_before else max(now, now_before)
                row[key] = max(row.get(key, 0.0), seen)

    def summary(self) -> list[dict[str, Any]]:
        """One row a phase, in the order in which they first ran."""
        return [
            {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
            for row in self._phases.values()
        ]


def _peak_memory() -> dict[str, tuple[float, float]]:
    """Memory in GB by name: (in use now, the most since the process began)."""
    now = psutil.Process().memory_info().rss / 1e9
    memory = {"peak_rss_gb": (now, max(now, peak_rss_gb()))}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        memory["peak_cuda_gb"] = (torch.cuda.memory_allocated() / 1e9, torch.cuda.max_memory_allocated() / 1e9)
    return memory


def peak_rss_gb() -> float:
    """The most memory this process has held so far, in 10^9 bytes."""
    if sys.platform == "win32":
        return float(psutil.Process().memory_info().peak_wset) / 1e9
    import resource

    bytes_per_unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_per_unit / 1e9


def main() -> None:
    """`python -m rlhf.tracking dashboard`"""
    from rlhf import dashboard

    dashboard.main()


if __name__ == "__main__":
    run_command(main)

"""Where the numbers of a run go: `metrics.jsonl` and `samples.jsonl` beside it, always, and Weights & Biases.

The local files are the record, and the report is made from them. W&B is a copy that may fail: whatever it does, the
training goes on after one warning. This is the only module that imports wandb, and only when a run needs it.
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
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlsplit

import psutil
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf.errors import UserError, did_you_mean
from rlhf.progress import Progress
from rlhf.report import read_jsonl

logger = logging.getLogger(__name__)

WANDB_MODES = ("auto", "online", "offline", "disabled")
INIT_TIMEOUT_SECONDS = 30.0
"""How long a start waits for the W&B server before the run is kept offline instead."""

FINISH_TIMEOUT_SECONDS = 300.0
"""How long the end of a run waits for its last uploads."""


class Tracker:
    """The metric sink of one stage's run; a context manager.

    Args:
        run_dir: the run's folder; created. `metrics.jsonl`, `samples.jsonl`, `tracking.json` and `wandb/` go there.
        stage: `sft`, `reward` or `ppo`; the job type in W&B.
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
        self.stage, self.name, self.group = stage, name, group
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
            self.truncate(math.inf)  # a killed run may have left half a line, which the next line would be glued to
        else:
            for file in (self._metrics_file, self._samples_file):
                if file.exists():
                    file.replace(file.with_suffix(".previous.jsonl"))
        self.run_id = self._load_or_make_run_id()
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
        with self._survives("log metrics"):
            if self._run is not None:
                self._run.log(figures, step=int(step))

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Appends rows of text and scores. The first row decides the columns of the W&B table."""
        if not rows:
            return
        _append_lines(self._samples_file, [{"step": int(step), **row} for row in rows])
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

    def use_artifact(self, reference: str, hash: str) -> None:
        """Says that this run starts from an artifact, e.g. `sft/demo@2`.

        The pair goes into the W&B config in any mode, so the hash is there to check. W&B can draw it into its lineage
        graph only online, and only when the run that made the artifact is there too.
        """
        self._inputs[reference] = hash
        with self._survives(f"record the input {reference}"):
            if self._run is not None:
                self._run.config.update({"inputs": dict(self._inputs)}, allow_val_change=True)
                if self.wandb_mode == "online":
                    artifact_type, name, version = split_reference(reference)
                    self._run.use_artifact(f"{name}:{version}", type=artifact_type)

    def log_artifact(self, reference: str, path: str | Path, metadata: Mapping[str, Any]) -> None:
        """Says that this run made an artifact, a folder of the registry.

        Only the files' names and checksums are recorded (a W&B reference): the registry already keeps the weights, and
        an upload of them would make every run pay for a second copy.
        """
        with self._survives(f"record the artifact {reference}"):
            if self._run is not None:
                import wandb

                artifact_type, name, version = split_reference(reference)
                artifact = wandb.Artifact(
                    name,
                    type=artifact_type,
                    metadata={"reference": reference, "inputs": self._inputs, **redact(metadata)},
                )
                artifact.add_reference(Path(path).absolute().as_uri())
                self._run.log_artifact(artifact, aliases=[version] if version else None)

    def alert(self, title: str, text: str, severity: Literal["warning", "critical"]) -> None:
        """Sends an alert to W&B, which mails or posts it as the user has set there."""
        with self._survives("send an alert"):
            if self._run is not None:
                import wandb

                levels = {"warning": wandb.AlertLevel.WARN, "critical": wandb.AlertLevel.ERROR}
                self._run.alert(title=title, text=text, level=levels[severity])

    def logged(self) -> list[dict[str, Any]]:
        """The lines of metrics so far, those of a run that this one resumes included."""
        return read_jsonl(self._metrics_file)[0] if self._metrics_file.exists() else []

    def logged_samples(self) -> list[dict[str, Any]]:
        """The lines of samples so far."""
        return read_jsonl(self._samples_file)[0] if self._samples_file.exists() else []

    def truncate(self, step: float) -> None:
        """Forgets what was logged after `step`: the run goes on from a checkpoint made there and will log it again.

        The history in W&B cannot be shortened; it ignores steps that it has already seen, so none appears twice there.
        """
        for file in (self._metrics_file, self._samples_file):
            if file.exists():
                partial = file.with_suffix(".partial")
                partial.unlink(missing_ok=True)
                _append_lines(partial, [row for row in read_jsonl(file)[0] if row.get("step", 0) <= step])
                partial.replace(file)

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
        if self.wandb_mode == "online" and not _has_wandb_key():
            self._warn("W&B has no key (run `wandb login` or set WANDB_API_KEY); the run is kept offline")
            self.wandb_mode = "offline"
        if self.wandb_mode == "online":
            with self._survives("reach the server; the run is kept offline"):
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
        return wandb.init(
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
        file = self.run_dir / "tracking.json"
        if self.resume and file.exists():
            try:
                return str(json.loads(file.read_text(encoding="utf-8"))["run_id"])
            except (json.JSONDecodeError, KeyError, TypeError):
                self._warn(f"{file} is not readable; a new W&B run is started")
        run_id = secrets.token_hex(4)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps({"run_id": run_id, "stage": self.stage, "name": self.name}), encoding="utf-8")
        partial.replace(file)
        return run_id

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
    return "online" if _has_wandb_key() else "offline"


def _has_wandb_key() -> bool:
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


def split_reference(reference: str) -> tuple[str, str, str]:
    """`sft/demo@2` -> (`sft`, `sft-demo`, `2`): type, name and alias of a W&B artifact, in the characters it allows."""
    path, _, version = reference.partition("@")
    return path.split("/")[0], re.sub(r"[^A-Za-z0-9_.-]+", "-", path), re.sub(r"[^A-Za-z0-9_.-]+", "-", version)


# Names that hold a secret. `token` alone does, `pad_token` or `num_tokens` do not.
_SECRET_NAME = re.compile(
    r"(^|[_.-])(api_?key|secret|password|passwd|authorization|credentials?|(access|auth|api|hf|bearer)_token)$|^token$",
    re.I,
)
_SECRET_VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$")


def redact(value: Any) -> Any:
    """A copy of `value`, in plain JSON types, without secrets.

    Blanked are entries whose name says so, user names and passwords in URLs, and the values of environment variables
    such as WANDB_API_KEY wherever they appear.
    """
    hidden = [v for k, v in os.environ.items() if _SECRET_VARIABLE.search(k.upper()) and len(v) >= 8]
    return _redact(value, hidden)


def _redact(value: Any, hidden: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {
            str(name): "***" if entry and _SECRET_NAME.search(str(name)) else _redact(entry, hidden)
            for name, entry in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [_redact(entry, hidden) for entry in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    text = re.sub(r"://[^/\s@]+@", "://***@", str(value))
    for secret in hidden:
        text = text.replace(secret, "***")
    return text


def _append_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One strict JSON object a line. Opened and closed each time, so a killed run loses nothing that was logged."""
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(
            json.dumps(_finite(row), ensure_ascii=False, allow_nan=False, default=str) + "\n" for row in rows
        )


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

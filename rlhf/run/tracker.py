"""Where the numbers of a run go: `metrics.jsonl` and `samples.jsonl` beside it, always, and Weights & Biases.

The local files are the record, and the reports are made from them. W&B is a copy that may fail: whatever it does, the
training goes on after one warning. Only this module and `rlhf.sharing.hub` import wandb, and only when a run needs it.

`python -m rlhf.tracking dashboard --project NAME` saves a W&B workspace in which runs are compared.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from rlhf.base import storage
from rlhf.base.errors import UserError
from rlhf.base.json_files import read_jsonl, read_object_or_none
from rlhf.base.redaction import redact
from rlhf.run import terminal
from rlhf.run.metrics import reward_kl_points
from rlhf.run.wandb_link import (
    FINISH_TIMEOUT_SECONDS,
    INIT_TIMEOUT_SECONDS,
    _knock,
    _model_artifact,
    has_wandb_key,
    logger,
    resolve_wandb_mode,
    split_reference,
)

RUN_FILE = "tracking.json"
"""Holds the id of the run, by which a resumed run is known as the same."""


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
        terminal.show_metrics(figures)
        with self._survives("log metrics"):
            if self._run is not None:
                self._run.log({**figures, UPDATES: int(step)}, step=int(step))

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Appends rows of text and scores. The first row decides the columns of the W&B table."""
        if not rows:
            return
        _append_lines(self._samples_file, [{"step": int(step), **row} for row in rows])
        terminal.show_samples(rows)
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
            record = read_object_or_none(file) or {}
            if "run_id" in record:
                return str(record["run_id"])
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

"""The copy of a run in Weights & Biases, which may fail: whatever W&B does, the training goes on after one warning.

All that talks to W&B runs in a thread of its own, in order: a server that stalls holds up nothing but the end of the run, and
that for a bounded time.
"""

from __future__ import annotations

import json
import logging
import netrc
import os
import queue
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from rlhf.base.errors import UserError, did_you_mean
from rlhf.base.redaction import redact
from rlhf.run import metrics

logger = logging.getLogger(__name__)

WANDB_MODES = ("auto", "online", "offline", "disabled")

INIT_TIMEOUT_SECONDS = 30.0
"""Time that a start waits for the W&B server before the run is kept offline instead."""

FINISH_TIMEOUT_SECONDS = 300.0
"""Time that the end of a run waits for what is still to be sent: W&B itself would retry for days."""

MAX_WAITING = 10_000
"""Calls that wait for W&B at most; beyond it, lines reach the local files only."""


def resolve_wandb_mode(mode: str) -> str:
    """Return `online`, `offline` or `disabled` for any of `WANDB_MODES`; under `auto`, the variable WANDB_MODE decides first."""
    if mode not in WANDB_MODES:
        raise UserError(
            f"wandb_mode is '{mode}'; it must be one of {', '.join(WANDB_MODES)}{did_you_mean(mode, WANDB_MODES)}"
        )
    if mode != "auto":
        return mode
    variable = os.environ.get("WANDB_MODE", "").lower()
    variable = {"dryrun": "offline", "run": "online", "shared": "online"}.get(variable, variable)
    if variable in WANDB_MODES[1:]:
        return variable
    if variable:
        raise UserError(f"WANDB_MODE is '{variable}'; it must be one of {', '.join(WANDB_MODES[1:])}")
    return "online" if has_wandb_key() else "offline"


def has_wandb_key() -> bool:
    """Return True for a W&B key in the environment or in netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = os.environ.get("WANDB_BASE_URL")
    # `wandb login` writes the second of the default hosts
    hosts = [urlsplit(server).netloc] if server else ["api.wandb.ai", "api.forge.coreweave.com"]
    files = [Path(os.environ["NETRC"])] if "NETRC" in os.environ else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for file in files:
        try:
            logins = netrc.netrc(file.expanduser())
        except (OSError, netrc.NetrcParseError):
            continue
        if any(logins.authenticators(host) for host in hosts):
            return True
    return False


def split_reference(reference: str) -> tuple[str, str, str]:
    """Return type, name and alias of a W&B artifact, in the characters it allows: `sft/demo@2` -> (`sft`, `sft-demo`, `2`)."""
    path, _, version = reference.partition("@")
    return path.split("/")[0], re.sub(r"[^A-Za-z0-9_.-]+", "-", path), re.sub(r"[^A-Za-z0-9_.-]+", "-", version)


class WandbRun:
    """The W&B run of a stage; its methods do nothing under `disabled`, and never raise because of W&B.

    Args:
        run_dir: the run's folder; W&B writes to its subfolder `wandb`.
        stage: job type in W&B.
        name, group: the run's name, and the name that the runs of one pipeline share.
        config: resolved config of the run; passwords and keys are blanked before it leaves this process.
        wandb_mode: `auto` is online where there is a key (WANDB_API_KEY or netrc) and offline elsewhere, unless the environment
            variable WANDB_MODE sets something else; or `online`, `offline`, `disabled`.
        resume: go on with the W&B run of the same id.
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
        self.inputs: dict[str, str] = {}
        """Artefacts that this run starts from: reference -> hash."""
        self._run: Any = None
        self._table: Any = None
        self._warned = False
        self._owns_data_dir = False
        self._calls: queue.Queue[tuple[str, Callable[[], None]] | None] = queue.Queue(MAX_WAITING)
        self._thread: threading.Thread | None = None

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Send rows as a table of their own, with the columns of the first; the caller keeps the local record."""
        if not rows:
            return
        columns: list[str | int] = list(rows[0])
        data = [[row.get(str(column)) for column in columns] for row in rows]

        def send() -> None:
            import wandb

            self._run.log({name: wandb.Table(columns=columns, data=data, allow_mixed_types=True)}, step=int(step))

        self._later(f"log the table {name}", send)

    def log_scatter(
        self, name: str, rows: Sequence[Mapping[str, float]], x: str, y: str, title: str, step: int
    ) -> None:
        """Send a panel with a point a row; the caller keeps the local record."""
        if not rows:
            return
        data = [[row[x], row[y]] for row in rows]

        def send() -> None:
            import wandb

            table = wandb.Table(columns=[x, y], data=data)
            self._run.log({name: wandb.plot.scatter(table, x, y, title=title)}, step=int(step))

        self._later(f"log the panel {name}", send)

    def use_artifact(self, reference: str, hash: str, path: str | Path | None = None) -> None:
        """Record that this run starts from an artefact, e.g. `sft/demo@2`.

        Args:
            path: the artefact's folder. Its files' checksums name the W&B artifact, so that this run and the one that made it
                meet at one version of the lineage graph, in whatever order they are synced. Without it the graph has no edge.
        """
        self.inputs[reference] = hash
        inputs = dict(self.inputs)

        def send() -> None:
            self._run.config.update({"inputs": inputs}, allow_val_change=True)
            if path is not None:
                self._add_input(_model_artifact(reference, path, {"hash": hash}), split_reference(reference)[2])

        self._later(f"record the input {reference}", send)

    def use_data(self, dataset: str, data: Mapping[str, Any]) -> None:
        """Record the data that this run reads: the `data` of its manifest. The rows themselves stay where they are.

        The artifact holds the fingerprints, so that two runs meet at one version exactly if they read the same rows.
        """
        content = {key: data[key] for key in ("fingerprint", "prepared", "rows") if key in data}

        def send() -> None:
            import wandb

            self._run.config.update({"data": content}, allow_val_change=True)
            place = "-".join(part for part in Path(dataset).parts[-2:] if part != "/")
            _, name, _ = split_reference(f"data-{redact(place)}-{self.stage}")
            artifact = wandb.Artifact(name, type="data", metadata=redact({"dataset": dataset, **content}))
            with artifact.new_file("data.json", encoding="utf-8") as file:
                json.dump(content, file, indent=2, sort_keys=True)
            self._add_input(artifact, "")

        self._later("record the data", send)

    def _add_input(self, artifact: Any, alias: str) -> None:
        """Add an edge into this run to the lineage graph.

        W&B refuses `use_artifact` offline, because the version has no number yet. Its offline log and `wandb sync` still take
        the record that its own code writes online: "log this, then use it".
        """
        aliases = [alias] if alias else []
        if self.wandb_mode == "online":
            self._run.use_artifact(artifact, aliases=aliases)
        else:
            self._run._log_artifact(artifact, aliases=aliases, is_user_created=True, use_after_commit=True)

    def log_artifact(self, reference: str, path: str | Path, metadata: Mapping[str, Any]) -> None:
        """Record that this run made an artefact, a folder of the registry.

        Only the files' names and checksums are sent (a W&B reference): the registry already keeps the weights, and an upload
        would make every run pay for a second copy.
        """
        about = {"inputs": dict(self.inputs), **redact(metadata)}

        def send() -> None:
            version = split_reference(reference)[2]
            self._run.log_artifact(_model_artifact(reference, path, about), aliases=[version] if version else None)

        self._later(f"record the artifact {reference}", send)

    def alert(self, title: str, text: str, severity: Literal["warning", "critical"]) -> None:
        """Send an alert, which W&B mails or posts as the user has set there."""
        level = {"warning": "WARN", "critical": "ERROR"}[severity]
        self._later("send an alert", lambda: self._run.alert(title=title, text=text, level=level))

    def finish(self, exit_code: int = 0) -> None:
        """End the W&B run, once all that was logged is sent or `FINISH_TIMEOUT_SECONDS` are over; a second call does nothing."""
        self._later("finish the run", lambda: self._run.finish(exit_code=exit_code))
        if self._thread is not None:
            with suppress(queue.Full):
                self._calls.put_nowait(None)
            self._thread.join(FINISH_TIMEOUT_SECONDS)
            if self._thread.is_alive():
                self._warn(f"W&B is still uploading after {FINISH_TIMEOUT_SECONDS:.0f} s; `wandb sync` sends the rest")
            self._thread = None
        self._run = None
        if self._owns_data_dir:
            os.environ.pop("WANDB_DATA_DIR", None)
            self._owns_data_dir = False

    def _send_metrics(self, figures: Mapping[str, float], step: int) -> None:
        line = {**figures, metrics.UPDATES: step}
        self._later("log metrics", lambda: self._run.log(line, step=step))

    def _send_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        copies = [dict(row) for row in rows]

        def send() -> None:
            import wandb

            if self._table is None:
                # INCREMENTAL sends only the rows that are new; the default mode freezes a table after its first log.
                columns: list[str | int] = ["step", *(column for column in copies[0] if column != "step")]
                self._table = wandb.Table(columns=columns, log_mode="INCREMENTAL", allow_mixed_types=True)
            for row in copies:
                self._table.add_data(step, *(row.get(column) for column in self._table.columns[1:]))
            self._run.log({f"{self.stage}/samples": self._table}, step=step)

        self._later("log samples", send)

    def _start(self) -> None:
        """Begin to open the W&B run; one that cannot be online is kept offline, where `wandb sync` can find it later."""
        if self.wandb_mode == "disabled":
            return
        if "WANDB_DATA_DIR" not in os.environ:
            # Tables and artifacts wait here for their upload. The default is in the home folder, which a container
            # loses long before somebody syncs an offline run.
            os.environ["WANDB_DATA_DIR"] = str(self.run_dir / "wandb")
            self._owns_data_dir = True
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def _open(self) -> None:
        if self.wandb_mode == "online" and not has_wandb_key():
            self._warn("W&B has no key (run `wandb login` or set WANDB_API_KEY); the run is kept offline")
            self.wandb_mode = "offline"
        if self.wandb_mode == "online":
            self._try("reach the server; the run is kept offline", self._connect)
            if self._run is None:
                self.wandb_mode = "offline"
                self._try("stop its service", _teardown)  # which still holds the run id of the failed attempt
        if self._run is None:
            self._try("start", lambda: self._init("offline"))

    def _connect(self) -> None:
        _knock()
        self._init("online")

    def _init(self, mode: Literal["online", "offline"]) -> None:
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
        for axis in (metrics.UPDATES, metrics.EPISODES):
            run.define_metric(axis, hidden=True)
        for family, axis in metrics.axes().items():
            run.define_metric(family, step_metric=axis)
        self._run = run

    def _later(self, action: str, call: Callable[[], None]) -> None:
        """Let the thread make a call once those before it are done; without a thread there is no W&B run."""
        if self._thread is None:
            return
        try:
            self._calls.put_nowait((action, call))
        except queue.Full:
            self._warn(f"W&B could not {action} (it has not taken the {MAX_WAITING:,} calls before)")

    def _work(self) -> None:
        """Open the run, and make the calls in the order in which they come, until there is None."""
        self._open()
        while (item := self._calls.get()) is not None:
            if self._run is not None:
                self._try(*item)

    def _try(self, action: str, call: Callable[[], object]) -> None:
        """Make a call and turn any exception into a warning: nothing that W&B does may end a training run."""
        try:
            call()
        except Exception as error:
            reason = " ".join(redact(f"{type(error).__name__}: {error}").split())[:300]
            self._warn(f"W&B could not {action} ({reason})")

    def _warn(self, message: str) -> None:
        """Log a warning the first time, and debug messages after it."""
        logger.log(logging.DEBUG if self._warned else logging.WARNING, "%s. Metrics are in %s", message, self.run_dir)
        self._warned = True


def _knock() -> None:
    """Raise unless the W&B server answers: wandb's own attempts at one that is silent have no common end."""
    import requests

    # An answer of any kind will do, a broken certificate too: what to make of it is wandb's business.
    with suppress(requests.exceptions.SSLError):
        requests.head(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai", timeout=INIT_TIMEOUT_SECONDS)


def _teardown() -> None:
    import wandb

    wandb.teardown(exit_code=1)


def _model_artifact(reference: str, path: str | Path, metadata: Mapping[str, Any]) -> Any:
    """Return a W&B artifact for a folder of the registry, by reference: its digest is that of the files, wherever they are."""
    import wandb

    artifact_type, name, _ = split_reference(reference)
    artifact = wandb.Artifact(name, type=artifact_type, metadata={"reference": reference, **metadata})
    artifact.add_reference(Path(path).absolute().as_uri())
    return artifact

"""The copy of a run in Weights & Biases."""

from __future__ import annotations

import json
import netrc
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from rlhf.base.errors import UserError, did_you_mean
from rlhf.base.redaction import redact
from rlhf.run import metrics
from rlhf.run.copies import RunCopy, RunRecord, Severity

WANDB_MODES = ("auto", "online", "offline", "disabled")

INIT_TIMEOUT_SECONDS = 30.0
"""Time that a start waits for the W&B server before the run is kept offline instead."""


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


class WandbRun(RunCopy):
    """The W&B run of a stage; W&B writes to the subfolder `wandb` of the run's folder.

    Args:
        mode: `auto` is online where there is a key (WANDB_API_KEY or netrc) and offline elsewhere, unless the environment
            variable WANDB_MODE sets something else; or `online`, `offline`, `disabled`, under which the methods do nothing.
        entity: user or team; default: that of the key.
    """

    program = "W&B"
    remedy = "`wandb sync` sends the rest"

    def __init__(self, record: RunRecord, *, mode: str = "auto", entity: str | None = None) -> None:
        super().__init__(record)
        self.mode, self.entity = resolve_wandb_mode(mode), entity
        self._run: Any = None
        self._table: Any = None
        self._owns_data_dir = False

    def log(self, figures: Mapping[str, float], step: int) -> None:
        line = {**figures, metrics.UPDATES: step}
        self._later("log metrics", lambda: self._run.log(line, step=step))

    def log_summary(self, figures: Mapping[str, float], step: int) -> None:
        """Add final figures to the run's summary, after whatever W&B has made of the log."""
        self._later("send the summary", lambda: self._run.summary.update(dict(figures)))

    def log_histograms(self, values: Mapping[str, Sequence[float]], step: int) -> None:

        def send() -> None:
            import wandb

            self._run.log({name: wandb.Histogram(numbers) for name, numbers in values.items()}, step=step)

        self._later("log histograms", send)

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        copies = [dict(row) for row in rows]

        def send() -> None:
            import wandb

            if self._table is None:
                # INCREMENTAL sends only the rows that are new; the default mode freezes a table after its first log.
                columns: list[str | int] = ["step", *(column for column in copies[0] if column != "step")]
                self._table = wandb.Table(columns=columns, log_mode="INCREMENTAL", allow_mixed_types=True)
            for row in copies:
                self._table.add_data(step, *(row.get(column) for column in self._table.columns[1:]))
            self._run.log({f"{self.record.stage}/samples": self._table}, step=step)

        self._later("log samples", send)

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        columns: list[str | int] = list(rows[0])
        data = [[row.get(str(column)) for column in columns] for row in rows]

        def send() -> None:
            import wandb

            self._run.log({name: wandb.Table(columns=columns, data=data, allow_mixed_types=True)}, step=int(step))

        self._later(f"log the table {name}", send)

    def log_scatter(
        self, name: str, rows: Sequence[Mapping[str, float]], x: str, y: str, title: str, step: int
    ) -> None:
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
        inputs = dict(self.record.inputs)

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
            _, name, _ = split_reference(f"data-{redact(place)}-{self.record.stage}")
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
        if self.mode == "online":
            self._run.use_artifact(artifact, aliases=aliases)
        else:
            self._run._log_artifact(artifact, aliases=aliases, is_user_created=True, use_after_commit=True)

    def log_artifact(self, reference: str, path: str | Path, metadata: Mapping[str, Any]) -> None:
        """Record that this run made an artefact, a folder of the registry.

        Only the files' names and checksums are sent (a W&B reference): the registry already keeps the weights, and an upload
        would make every run pay for a second copy.
        """
        about = {"inputs": dict(self.record.inputs), **redact(metadata)}

        def send() -> None:
            version = split_reference(reference)[2]
            self._run.log_artifact(_model_artifact(reference, path, about), aliases=[version] if version else None)

        self._later(f"record the artifact {reference}", send)

    def log_page(self, file: Path) -> None:
        """Send the run's report page as an artifact."""

        def send() -> None:
            import wandb

            _, name, _ = split_reference(f"report-{self.record.name}")
            artifact = wandb.Artifact(name, type="report")
            artifact.add_file(str(file))
            self._run.log_artifact(artifact)

        self._later("send the report page", send)

    def alert(self, title: str, text: str, severity: Severity) -> None:
        """Send an alert, which W&B mails or posts as the user has set there."""
        level = {"warning": "WARN", "critical": "ERROR"}[severity]
        self._later("send an alert", lambda: self._run.alert(title=title, text=text, level=level))

    def start(self) -> None:
        """Begin to open the W&B run; one that cannot be online is kept offline, where `wandb sync` can find it later."""
        if self.mode == "disabled":
            return
        if "WANDB_DATA_DIR" not in os.environ:
            # Tables and artifacts wait here for their upload. The default is in the home folder, which a container
            # loses long before somebody syncs an offline run.
            os.environ["WANDB_DATA_DIR"] = str(self.record.run_dir / "wandb")
            self._owns_data_dir = True
        super().start()

    def finish(self, exit_code: int = 0) -> None:
        """End the W&B run, as `RunCopy` does."""
        super().finish(exit_code)
        self._run = None
        if self._owns_data_dir:
            os.environ.pop("WANDB_DATA_DIR", None)
            self._owns_data_dir = False

    def _close(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)

    def _open(self) -> None:
        if self.mode == "online" and not has_wandb_key():
            self._warn("W&B has no key (run `wandb login` or set WANDB_API_KEY); the run is kept offline")
            self.mode = "offline"
        if self.mode == "online":
            self._try("reach the server; the run is kept offline", self._connect)
            if self._run is None:
                self.mode = "offline"
                self._try("stop its service", _teardown)  # which still holds the run id of the failed attempt
        if self._run is None:
            self._init("offline")
        self._is_open = True

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
        record = self.record
        run = wandb.init(
            entity=self.entity,
            project=record.project,
            dir=str(record.run_dir),
            mode=mode,
            id=record.run_id,
            resume="allow" if record.resume else None,
            name=record.name,
            group=record.group,
            job_type=record.stage,
            tags=record.tags or None,
            notes=record.notes,
            config=record.config,
            settings=settings,
        )
        for axis in (metrics.UPDATES, metrics.EPISODES):
            run.define_metric(axis, hidden=True)
        for family, axis in metrics.axes().items():
            run.define_metric(family, step_metric=axis)
        self._run = run


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

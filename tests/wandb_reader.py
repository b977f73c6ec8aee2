"""What an offline W&B run holds, read with the record types of wandb's own package."""

from __future__ import annotations

import json
import math
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def _settled(file: Path) -> bytes:
    """The content of a file once it has stopped growing: W&B's service writes it a moment after `finish` returns."""
    size = -1
    while size != file.stat().st_size or size == 0:
        size = file.stat().st_size
        time.sleep(0.2)
    return file.read_bytes()


def wandb_records(run_dir: Path) -> Iterator[Any]:
    """The protobuf records of an offline run: a LevelDB log (blocks of 32 KiB) behind a file header."""
    from wandb.proto import wandb_internal_pb2

    for file in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb")):
        raw, position, payload = _settled(file), 7, b""
        while position + 7 <= len(raw):
            left = 32768 - position % 32768
            if left < 7:
                position += left
                continue
            _, length, kind = struct.unpack_from("<IHB", raw, position)
            payload += raw[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4):  # a full record, or its last piece
                yield wandb_internal_pb2.Record.FromString(payload)
                payload = b""


class OfflineRun:
    """The records of a run's folder, sorted by kind."""

    def __init__(self, run_dir: Path) -> None:
        self.records = list(wandb_records(run_dir))
        self.run = self._of("run")[0]

    def _of(self, kind: str) -> list[Any]:
        return [getattr(r, kind) for r in self.records if r.WhichOneof("record_type") == kind]

    @property
    def config(self) -> dict[str, Any]:
        """The config with all later changes."""
        updates = [*self.run.config.update, *(u for record in self._of("config") for u in record.update)]
        return {u.key: json.loads(u.value_json) for u in updates if u.key != "_wandb"}

    @property
    def history(self) -> list[dict[str, Any]]:
        """The log lines, as they were sent."""
        return [
            {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.item}
            for record in self._of("history")
        ]

    @property
    def summary(self) -> dict[str, Any]:
        """The figures of the run as a whole, as last set."""
        updates = [u for record in self._of("summary") for u in record.update]
        return {"/".join(u.nested_key) or u.key: json.loads(u.value_json) for u in updates}

    @property
    def axes(self) -> dict[str, str]:
        """Metric or family -> the metric over which it is drawn."""
        return {m.name or m.glob_name: m.step_metric for m in self._of("metric") if m.step_metric}

    @property
    def made(self) -> dict[str, Any]:
        """Artifacts that the run made; W&B keeps tables as such, too."""
        return {a.name: a for a in self._of("artifact") if not a.use_after_commit}

    @property
    def used(self) -> dict[str, Any]:
        """Artifacts that the run starts from."""
        return {a.name: a for a in self._of("artifact") if a.use_after_commit}


def table_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of all increments of the run's sample table, in the order in which they were logged."""
    files = run_dir.glob("wandb/offline-run-*/files/media/table/**/*samples*.table.json")
    tables = [json.loads(file.read_text()) for file in files]
    rows = [dict(zip(table["columns"], row, strict=True)) for table in tables for row in table["data"]]
    return sorted(rows, key=lambda row: row["step"])


def same(sent: Any, logged: float | None) -> bool:
    """Whether W&B has the number of the local log, where NaN and infinity are null."""
    if logged is None:
        return sent in (None, "NaN", "Infinity", "-Infinity") or (isinstance(sent, float) and not math.isfinite(sent))
    return sent == logged

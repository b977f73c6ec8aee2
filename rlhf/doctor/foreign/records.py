"""Binary logs: W&B's offline files and TensorBoard's event files, read with the record types of their own packages.

Both are protobuf records in a frame; nothing in them is run.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from rlhf.base.errors import UserError, install
from rlhf.base.json_files import decode
from rlhf.doctor.foreign.rows import STEP, Log, read_row

WANDB_MARK = b":W&B"
TENSORBOARD_MARK = b"brain.Event:"
_BLOCK = 32768
_HEADER = 7
_LARGEST_RECORD = 1 << 26


def _payloads(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield the records of an offline run: LevelDB's log format, in blocks of 32 KiB behind a header of 7 bytes."""
    stream.read(_HEADER)
    left, payload = _BLOCK - _HEADER, b""
    while True:
        if left < _HEADER:
            stream.read(left)
            left = _BLOCK
        head = stream.read(_HEADER)
        if len(head) < _HEADER:
            return
        _, length, kind = struct.unpack("<IHB", head)
        part = stream.read(length)
        left -= _HEADER + length
        if len(part) < length or left < 0 or kind > 4:  # the end of a run that was killed, or damaged
            return
        payload = part if kind in (1, 2) else payload + part
        if kind in (1, 4) and payload:
            yield payload
            payload = b""
        elif len(payload) > _LARGEST_RECORD:
            payload = b""


def read_wandb(file: Path, known: frozenset[str]) -> list[Log]:
    """Return the log of a W&B offline file, and the run's config."""
    from google.protobuf.message import DecodeError

    wandb_internal_pb2: Any = import_module(
        "wandb.proto.wandb_internal_pb2"
    )  # its classes are made when it is imported
    log = Log("W&B offline file")
    with file.open("rb") as stream:
        for payload in _payloads(stream):
            try:
                record = wandb_internal_pb2.Record.FromString(payload)
            except DecodeError:
                log.notes.append("a damaged record; what comes after is left out")
                break
            kind = record.WhichOneof("record_type")
            if kind == "history":
                values = {
                    "/".join(item.nested_key) or item.key: _value(item.value_json) for item in record.history.item
                }
                values.setdefault("_step", record.history.step.num)
                log.rows.append(read_row(values, known))
            elif kind in ("run", "config"):
                config = record.run.config if kind == "run" else record.config
                log.options |= {
                    "/".join(item.nested_key) or item.key: _value(item.value_json) for item in config.update
                }
    return [log]


def _value(text: str) -> Any:
    """Return a value of W&B; NaN is a text there."""
    try:
        return decode(text)
    except ValueError:
        return None


def read_tensorboard(file: Path, known: frozenset[str]) -> list[Log]:
    """Return the log of a TensorBoard event file.

    Raises:
        UserError: TensorBoard is not installed.
    """
    try:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
        from tensorboard.util import tensor_util
    except ImportError:
        raise UserError(f"{file} is of TensorBoard, which is not installed; {install('trackers')}") from None
    log, rows = Log("TensorBoard event file"), dict[int, dict[str, Any]]()
    for event in EventFileLoader(str(file)).Load():
        for value in event.summary.value:
            row = rows.setdefault(int(event.step), {STEP: int(event.step)})
            if value.HasField("simple_value"):
                row[value.tag] = value.simple_value
            elif value.HasField("tensor") and not value.tensor.tensor_shape.dim:
                figure = tensor_util.make_ndarray(value.tensor)
                row[value.tag] = float(figure) if figure.dtype.kind == "f" else None
    log.rows = [read_row(row, known) for _, row in sorted(rows.items())]
    return [log]

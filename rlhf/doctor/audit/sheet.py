"""Sheets: what was written down of one update, a folder of safetensors and JSON in `RUN/STAGE/audit/`."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.base import storage
from rlhf.base.errors import UserError
from rlhf.base.json_files import read_object

FOLDER = "audit"
FACTS, TENSORS = "sheet.json", "tensors.safetensors"
#: Sheets that are kept: the newest.
NUM_KEPT = 2


@dataclass
class Sheet:
    """A sample of one update, or of the supervised stages' first ones."""

    update: int
    """Number of the update, from 1."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What JSON can hold."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Tensors by path, as `rollout/mask`."""

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors below a path, by the rest of their names."""
        return {
            name.removeprefix(f"{prefix}/"): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(f"{prefix}/")
        }

    def keep(self, run: Path) -> None:
        """Write the sheet, or say why it cannot be written: a full disk must not end a run that could go on."""
        try:
            self.write(run)
        except (OSError, SafetensorError):
            text = f"audit: the sheet of update {self.update} cannot be written to {run / FOLDER}; is the disk full?"
            print(text, file=sys.stderr, flush=True)

    def write(self, run: Path) -> Path:
        """Write the sheet below a stage's folder, as a whole or not at all; only the newest few stay."""
        parent = run / FOLDER
        parent.mkdir(exist_ok=True)
        target = parent / f"update-{self.update}"
        with storage.partial_folder(parent) as partial:
            partial.mkdir()
            self.tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in self.tensors.items()}
            save_file(self.tensors, partial / TENSORS)
            content = json.dumps({"update": self.update, **self.facts}, default=str)
            (partial / FACTS).write_text(content, encoding="utf-8")
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
        for old in list_sheets(run)[:-NUM_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
        return target


def list_sheets(run: Path) -> list[Path]:
    """Return the folders of the sheets of a stage, oldest update first."""
    folders = [path for path in (run / FOLDER).glob("update-*") if (path / FACTS).is_file()]
    return sorted(folders, key=lambda path: int(path.name.rsplit("-", 1)[1]))


def discard_after(run: Path, update: int) -> None:
    """Remove the sheets of later updates, which a run that went back no longer holds."""
    for path in list_sheets(run):
        if int(path.name.rsplit("-", 1)[1]) > update:
            shutil.rmtree(path, ignore_errors=True)


def read_sheet(folder: Path) -> Sheet:
    """Return a sheet that was written.

    Raises:
        UserError: it cannot be read.
    """
    try:
        facts = read_object(folder / FACTS)
        return Sheet(int(facts["update"]), facts, load_file(folder / TENSORS))
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} is no sheet of an audit: {str(error).splitlines()[0]}; delete it") from error

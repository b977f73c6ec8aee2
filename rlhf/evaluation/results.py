"""Results in files, by a hash of everything that decides them: a call that was interrupted goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rlhf.base.json_files import read_value
from rlhf.base.storage import write_text


class ResultFiles:
    """A folder of results as JSON; keys are plain data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, key: dict[str, Any]) -> Any:
        """Return the result of a key; None where there is no file, or half of one."""
        try:
            return read_value(self._file(key))
        except (OSError, ValueError):
            return None

    def write(self, key: dict[str, Any], result: Any) -> Any:
        """Write the result of a key; return it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self._file(key), json.dumps(result))
        return result

    def _file(self, key: dict[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{digest[:24]}.json"

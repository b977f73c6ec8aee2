"""A data folder is whole or not at all: written beside its place, renamed into it, and left alone when it is there already."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

from rlhf.base.assets import cache_dir
from rlhf.base.errors import UserError
from rlhf.base.json_files import read_object_or_none
from rlhf.base.storage import sha256_file

CARD = "card.json"
#: All that a data folder can hold at its top: a folder with anything else in it is the user's.
OURS = {"demonstrations", "comparisons", "prompts", CARD, "card.md", "rejected.jsonl"}


def made_once(folder: Path, recipe: dict[str, Any], fill: Callable[[Path], None]) -> bool:
    """Makes a data folder unless one of the same recipe is there, intact.

    Args:
        recipe: all that decides the rows; `fill` must store it in `card.json` as `recipe`, and the sha256 of the files
            as `files`.
        fill: writes everything into the empty folder it is called with. What it raises is passed on, and then the
            folder of before, if there was one, is still there.

    Returns:
        Whether it was made; False: it was there.

    Raises:
        UserError: the folder holds files that no data folder has.
    """
    locks = cache_dir() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]):
        if up_to_date(folder, recipe):
            print(f"data: {folder} is up to date", file=sys.stderr)
            return False
        _check_replaceable(folder)
        partial, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "old"))
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            fill(partial)
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():
                folder.rename(old)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
    return True


def up_to_date(folder: Path, recipe: dict[str, Any]) -> bool:
    """Whether the folder was made by this recipe and every file is as it was written."""
    try:
        card = read_object_or_none(folder / CARD) or {}
        return card["recipe"] == recipe and all(
            sha256_file(folder / name) == digest for name, digest in card["files"].items()
        )
    except (OSError, KeyError, TypeError, AttributeError):
        return False


def write_card(folder: Path, card: dict[str, Any], names: Iterable[str]) -> None:
    """Writes `card.json` with the sha256 of the named files, which must be there already."""
    content = {**card, "files": {name: sha256_file(folder / name) for name in names}}
    (folder / CARD).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def prepared_fingerprint(file: Path) -> str | None:
    """The fingerprint on the card of the prepared folder that a data file `FOLDER/KIND/SPLIT.parquet` lies in.

    Returns:
        None when there is no card: the file was not made by `rlhf.data_prep`.

    Raises:
        UserError: the file is not the one that the card was written for.
    """
    card_file = file.parent.parent / CARD
    if not card_file.is_file():
        return None
    try:
        card = read_object_or_none(card_file) or {}
        fingerprint, digest = str(card["fingerprint"]), card["files"].get(f"{file.parent.name}/{file.name}")
    except (KeyError, AttributeError):
        return None  # some other tool's card
    if digest is not None and digest != sha256_file(file):
        raise UserError(
            f"{file} is not what its card {card_file} was written for (its sha256 differs): "
            "prepare the data again, or remove the card to use the file as it is"
        )
    return fingerprint


def _check_replaceable(folder: Path) -> None:
    """A folder is replaced whole: one with foreign files in it is the user's, not ours."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file; give a folder")
    foreign = sorted({entry.name for entry in folder.iterdir()} - OURS) if folder.exists() else []
    if foreign:
        raise UserError(f"output_dir {folder} holds other files ({', '.join(foreign[:3])}); give a new or empty folder")

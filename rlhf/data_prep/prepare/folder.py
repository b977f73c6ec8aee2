"""Data folders: written whole beside their place, then renamed into it, and left alone when they are up to date."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf.base.assets import cache_dir
from rlhf.base.errors import UserError
from rlhf.base.json_files import read_object_or_none
from rlhf.base.locks import exclusive
from rlhf.base.storage import sha256_file

CARD = "card.json"
#: Names that a data folder can hold at its top: a folder with anything else in it is the user's.
OURS = {"demonstrations", "comparisons", "prompts", CARD, "card.md", "rejected.jsonl"}


def make_once(folder: Path, recipe: dict[str, Any], fill: Callable[[Path], dict[str, Any]]) -> None:
    """Make a data folder, with its card, unless one of the same recipe is there, intact.

    Args:
        recipe: all that decides the rows.
        fill: writes all but `card.json` into the empty folder it is called with, and returns the card's content: `recipe`,
            `rows` by set, and more. What it raises is passed on, and an earlier folder stays as it is.

    Raises:
        UserError: the folder holds files that no data folder has.
    """
    locks = cache_dir() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = locks / hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    with exclusive(lock, str(folder), wait=3600):
        if up_to_date(folder, recipe):
            print(f"data: {folder} is up to date", file=sys.stderr)
            return
        _check_replaceable(folder)
        partial, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "old"))
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            card = fill(partial)
            _write_card(partial, card)
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():
                folder.rename(old)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
    counts = ", ".join(f"{count:,} {name}" for name, count in card["rows"].items())
    print(f"data: {folder}: {counts}", file=sys.stderr)


def up_to_date(folder: Path, recipe: dict[str, Any]) -> bool:
    """Return True for a folder that this recipe made and every file of which is as it was written."""
    try:
        card = read_object_or_none(folder / CARD) or {}
        return card["recipe"] == recipe and all(
            sha256_file(folder / name) == digest for name, digest in card["files"].items()
        )
    except (OSError, KeyError, TypeError, AttributeError):
        return False


def _write_card(folder: Path, card: dict[str, Any]) -> None:
    """Write `card.json` with the sha256 of the files of its sets and of the rejected rows."""
    names = [*(f"{name}.parquet" for name in card["rows"]), "rejected.jsonl"]
    files = {name: sha256_file(folder / name) for name in names if (folder / name).is_file()}
    content = json.dumps({**card, "files": files}, indent=2, ensure_ascii=False)
    (folder / CARD).write_text(content + "\n", encoding="utf-8")


def prepared_fingerprint(file: Path) -> str | None:
    """Return the fingerprint on the card of the prepared folder of a data file `FOLDER/KIND/SPLIT.parquet`.

    None where there is no card of ours: the file was not made by `rlhf.data_prep`.

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
    """Raise `UserError` for a file, and for a folder with foreign files: folders are replaced whole."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file; give a folder")
    foreign = sorted({entry.name for entry in folder.iterdir()} - OURS) if folder.exists() else []
    if foreign:
        raise UserError(f"output_dir {folder} holds other files ({', '.join(foreign[:3])}); give a new or empty folder")

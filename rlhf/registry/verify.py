"""Checks of an artefact's files: hashed when they are written, compared when they are read."""

from __future__ import annotations

from pathlib import Path

from rlhf.base import storage
from rlhf.base.errors import UserError
from rlhf.base.storage import sha256_file
from rlhf.registry.manifest import MANIFEST, Artifact, Parent

ALLOWED_SUFFIXES = {".safetensors", ".json", ".jsonl", ".txt", ".jinja", ".md", ".yaml", ".yml", ".model"}
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle"}


def check_files(artifact: Artifact) -> None:
    """Raise `UserError` unless the files in the artefact's folder are those of its manifest."""
    if problem := file_problem(artifact):
        raise UserError(f"{artifact.reference}: {problem}")


def hash_new_files(folder: Path) -> dict[str, str]:
    """Sync the files of a new artefact and return their hashes; `UserError` for types that may not be registered."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()):
        relative = path.relative_to(folder).as_posix()
        if path.suffix.lower() in PICKLE_SUFFIXES:
            raise UserError(
                f"{relative} may be a pickle, which runs code when it is loaded: safetensors only, use save_file"
            )
        if path.is_symlink() or relative == MANIFEST or path.suffix.lower() not in ALLOWED_SUFFIXES:
            raise UserError(
                f"{relative} cannot be registered; plain files only, of type {' '.join(sorted(ALLOWED_SUFFIXES))}"
            )
        if path.suffix.lower() == ".safetensors":
            _require_finite(path)
        files[relative] = sha256_file(path)
        storage.sync(path)
    if not files:
        raise ValueError(f"nothing was written into {folder}")
    return files


def _require_finite(file: Path) -> None:
    """Raise `UserError` for weights that cannot be read back, or that are NaN or infinite."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as weights:
            bad = next((name for name in weights.keys() if not torch.isfinite(weights.get_tensor(name)).all()), None)  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{file.name} cannot be registered: it cannot be read back ({error})") from error
    if bad is not None:
        raise UserError(
            f"{bad} in {file.name} is not finite: the run has diverged and nothing is registered; try a smaller learning_rate"
        )


def file_problem(artifact: Artifact) -> str:
    """Return the first problem of an artefact's files, or an empty string."""
    listed = artifact.manifest.files
    for path in (artifact.path, *artifact.path.rglob("*")):
        if storage.not_plain(path):
            return (
                f"{path.relative_to(artifact.path)} is a link, a pipe or a device, which no artefact holds (remove it)"
            )
    for relative, expected in listed.items():
        path = artifact.path / relative
        if path.suffix.lower() not in ALLOWED_SUFFIXES or Path(relative).is_absolute() or ".." in Path(relative).parts:
            return f"its manifest lists {relative}, which is not allowed in an artefact"
        try:
            if not path.is_file():
                return f"{relative} is missing"
            if sha256_file(path) != expected:
                return f"{relative} is corrupt (its sha256 is not the one in the manifest)"
        except OSError as error:
            return f"{relative} cannot be read ({storage.reason(error)})"
    # An added chat_template.jinja or tokenizer file would be loaded; hidden files (.DS_Store) are not.
    for path in artifact.path.rglob("*"):
        relative = path.relative_to(artifact.path).as_posix()
        if not path.is_dir() and relative not in (MANIFEST, *listed) and not path.name.startswith("."):
            return f"{relative} was added after it was registered (remove it)"
    return ""


def altered(parent: Parent) -> str:
    """Return the message that a parent's manifest has changed."""
    return f"{parent.reference} was altered since (its manifest is not the one with hash {parent.hash[:12]})"

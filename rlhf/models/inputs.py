"""Inputs of a run that lie outside the registry, known by the hashes of their files.

These are base models, tokenizers, chat templates, and the source of reward and gold functions. A manifest and the mark beside
the checkpoints record them, so that one that was swapped or edited is noticed by whatever comes later.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from transformers.utils import cached_file

from rlhf.base.assets import cached_sha256
from rlhf.base.errors import UserError
from rlhf.base.functions import source_file
from rlhf.base.storage import sha256_file
from rlhf.models.catalogue import pretrained, resolve_model
from rlhf.models.templates import template_text
from rlhf.registry import Artifact, Registry, changed_inputs

BASE, TOKENIZER, TEMPLATE = "base model", "tokenizer", "chat template"
_OF_REWARD = " of reward "
UNKNOWN = "unknown"
"""Hash of a function whose source is in no file: it cannot be compared."""
_MODEL_FILES = re.compile(r"(.*\.safetensors(\.index\.json)?|(generation_)?config\.json|.*\.py|.*\.gguf)")
_TOKENIZER_FILES = re.compile(
    r"(tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|.*\.model|chat_template.*|.*\.tiktoken)"
)


def model_inputs(
    name_or_path: str, registry: str | Path, *, revision: str | None = None, chat_template: str | None = None
) -> dict[str, str]:
    """Return the hashes of a base model, its tokenizer and a chat template by their names.

    A hub model is known by its commit, and by files of its cache that are not the hub's any more. Empty for artefacts, whose
    manifests hold hashes, and for models that are not there: loading those fails with a message of its own.
    """
    inputs = {} if chat_template is None else template_inputs(chat_template)
    if pretrained(name_or_path, registry):
        return inputs
    try:
        place = resolve_model(name_or_path, registry)
        config = cached_file(place, "config.json", revision=revision)
    except (OSError, ValueError):
        return inputs
    folder = Path(str(config)).parent
    hash_of = _hash_of if Path(place).is_dir() else _commit
    return {BASE: hash_of(folder, _MODEL_FILES), TOKENIZER: hash_of(folder, _TOKENIZER_FILES), **inputs}


def _commit(snapshot: Path, names: re.Pattern[str]) -> str:
    """Return the commit of a snapshot in the hub's cache, and a hash over those of its files that are not the hub's.

    Files that are not downloaded yet do not count. In the cache, a file is a link to one that is named by its hash.
    """
    files = [file for file in sorted(snapshot.iterdir()) if names.fullmatch(file.name) and file.is_file()]
    if not any(map(_is_altered, files)):
        return f"commit {snapshot.name}"
    return f"commit {snapshot.name}, altered {_hash_of(snapshot, names)}"


def _is_altered(file: Path) -> bool:
    """Return whether a file of the hub's cache has another content than its name; large files are named by sha256."""
    blob = file.resolve()
    return len(blob.name) == 64 and blob.suffix == "" and cached_sha256(blob) != blob.name


def _hash_of(folder: Path, names: re.Pattern[str]) -> str:
    """Return one hash over the names and contents of a folder's files of these names."""
    files = sorted(file for file in folder.iterdir() if names.fullmatch(file.name) and file.is_file())
    lines = [f"{file.name} {cached_sha256(file)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def template_inputs(name: str) -> dict[str, str]:
    """Return the hash of a chat template by its name."""
    return {TEMPLATE: hashlib.sha256(template_text(name).encode()).hexdigest()}


def reward_model_inputs(name_or_path: str, registry: str | Path) -> dict[str, str]:
    """Return the hashes of a classifier that scores, and of its tokenizer, by role and name."""
    return {
        f"{role}{_OF_REWARD}{name_or_path}": digest for role, digest in model_inputs(name_or_path, registry).items()
    }


def function_inputs(role: str, references: Iterable[str | None]) -> dict[str, str]:
    """Return the hashes of the files that functions named `package.module:name` stand in, by role and reference.

    Functions of a notebook, lambdas and models are `UNKNOWN`.
    """
    files = {f"{role} {reference}": source_file(reference) for reference in references if reference}
    return {name: _hash_of_source(file) if file is not None else UNKNOWN for name, file in files.items()}


def _hash_of_source(file: Path) -> str:
    """Return the hash of a module's file; in a package, one over all modules of it, which the function may call.

    Of this package it is the file alone: the rest changes with each version, which manifests record.
    """
    package = file.parent
    while (package.parent / "__init__.py").is_file():
        package = package.parent
    if not (package / "__init__.py").is_file() or package == Path(__file__).parents[1]:
        return sha256_file(file)
    modules = {module.relative_to(package).as_posix(): sha256_file(module) for module in sorted(package.rglob("*.py"))}
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in modules.items()).encode()).hexdigest()


def require_same_base(artifact: Artifact, registry: str | Path) -> None:
    """Raise `UserError` if the base model of an artefact is no longer the one that it was trained on."""
    manifest = artifact.manifest
    if BASE not in manifest.inputs or manifest.kind == "full":
        return
    current = model_inputs(manifest.base_model, registry, revision=manifest.base_model_revision)
    if BASE in changed_inputs(manifest, current):
        raise UserError(
            f"{artifact.reference} was trained on another '{manifest.base_model}': its weights, config or code have changed "
            f"since; restore them, or make {artifact.stage}/{artifact.name} again"
        )


def problem(artifact: Artifact, registry: Registry) -> str:
    """Return what has changed outside the registry since an artefact was made, in one sentence; empty: nothing.

    What is not on this machine cannot be compared, and an artefact that holds a whole model needs no base.
    """
    manifest = artifact.manifest
    current: dict[str, str] = {}
    if BASE in manifest.inputs and manifest.kind == "adapter":
        current |= model_inputs(manifest.base_model, registry.root, revision=manifest.base_model_revision)
    template = manifest.config.get("chat_template")
    if TEMPLATE in manifest.inputs and isinstance(template, str) and Path(template).is_file():
        current |= template_inputs(template)
    for name in manifest.inputs:
        role, _, reference = name.partition(" ")
        if role in ("reward", "gold") and ":" in reference:
            hashes = function_inputs(role, [reference])
            current |= {name: digest for name, digest in hashes.items() if digest != UNKNOWN}
        elif (model := name.removeprefix(f"{BASE}{_OF_REWARD}")) != name:
            current |= reward_model_inputs(model, registry.root)
    names = changed_inputs(manifest, current)
    return f"{' and '.join(names)} changed since it was made" if names else ""

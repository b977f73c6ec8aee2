"""The registry: named, versioned, verified artefacts and their lineage.

A version is a folder `ROOT/STAGE/NAME/v1` of plain files (safetensors, JSON, text) with a `manifest.json` that holds their
checksums. The folder is written under another name, manifest last, and renamed, so that a version is never half there.
Loading an artefact verifies it and all its ancestors.

The command line is `rlhf.sharing.__main__`.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rlhf.base import storage
from rlhf.base.errors import UserError, did_you_mean
from rlhf.base.json_files import read_object
from rlhf.base.locks import exclusive
from rlhf.registry.manifest import (
    MANIFEST,
    NAME,
    STAGES,
    Artifact,
    Manifest,
    Parent,
    Reference,
    changed_inputs,
    code_commit,
    library_versions,
    parse_reference,
    plain,
    read_manifest,
)
from rlhf.registry.verify import altered, file_problem, hash_new_files

TAGS = "tags.json"
_VERSION_FOLDER = re.compile(r"v([1-9][0-9]{0,8})")
_TAG = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,49}")


@dataclass(frozen=True)
class Lineage:
    """An artefact with the tree of its ancestors."""

    reference: str
    artifact: Artifact | None
    """None when it is missing, altered or unreadable."""
    problem: str
    """Reason why there is no artefact, else empty."""
    parents: list[Lineage]


class Registry:
    """The artefacts under one folder. A missing folder is an empty registry; reading creates nothing."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def publish(
        self, stage: str, name: str, write: Callable[[Path], None], *, parents: Iterable[Artifact] = (), **fields: Any
    ) -> Artifact:
        """Register the next version of STAGE/NAME, and return it.

        Args:
            write: fills the new folder that it is called with; if it raises, nothing is registered.
            parents: artefacts that this one was made from.
            fields: the other fields of `Manifest`, without version, created, code_commit, files, ...

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
            **{key: plain(value, key) for key, value in fields.items()},
        )
        folder = self.root / stage / name
        try:
            with storage.partial_folder(folder) as partial:
                partial.mkdir(parents=True)
                write(partial)
                files = hash_new_files(partial)
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
        except Exception as error:
            if storage.is_failure(error):
                raise UserError(
                    f"cannot register {stage}/{name}: {storage.reason(error)} ({folder}, {storage.free(folder)}), "
                    "nothing was registered; free some space or make the folder writable, then run again"
                ) from error
            raise
        return Artifact(target, manifest)

    def require_writable(self, stage: str, name: str) -> None:
        """Raise `UserError` unless STAGE/NAME can be registered here; called before a training, not after it."""
        folder = (self.root / Reference(stage, name).stage / name).absolute()
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        try:
            with storage.partial_folder(existing) as partial:
                partial.mkdir()
        except OSError as error:
            raise UserError(
                f"{stage}/{name} could not be registered: {storage.reason(error)} ({existing}); make the folder writable, or "
                "give another with --registry"
            ) from error

    def get(
        self, reference: str | Reference, *, expect_stage: str | None = None, verify_parents: bool = True
    ) -> Artifact:
        """Return an artefact after verifying its files and, recursively, its parents.

        Args:
            reference: `sft/demo` for the latest version, `sft/demo@2`, or `sft/demo@TAG`.
            expect_stage: the only stage to accept.
            verify_parents: False verifies the artefact's own files only.

        Raises:
            UserError: a missing or altered file or parent, with the command that makes it again.
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
        """Return an artefact by its manifest alone, without verifying its files."""
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
        """Return the reference of `sft/demo`, `sft/demo@2`, or `sft/demo@TAG`, with the version that has the tag."""
        path, _, tag = text.partition("@")
        if not _TAG.fullmatch(tag):
            return parse_reference(text)
        reference = parse_reference(path)
        tags = self.tags(reference.stage, reference.name)
        if tag not in tags:
            others = f" (tags: {', '.join(sorted(tags))})" if tags else " (it has no tags)"
            raise UserError(f"no version of {path} in registry {self.root} has the tag '{tag}'{others}")
        return dataclasses.replace(reference, version=tags[tag])

    def tags(self, stage: str, name: str) -> dict[str, int]:
        """Return the versions of STAGE/NAME by tag. Tags can move: no hash covers them."""
        Reference(stage, name)
        file = self.root / stage / name / TAGS
        try:
            return {str(tag): int(version) for tag, version in read_object(file).items()}
        except FileNotFoundError:
            return {}
        except (OSError, UserError, ValueError, TypeError) as error:
            raise UserError(f"{file} cannot be read; delete it and tag again") from error

    def tag(self, artifact: Artifact, tag: str, *, remove: bool = False) -> None:
        """Move a tag to a version, or remove it from the version.

        Raises:
            UserError: a tag that could be a version, or the removal of a tag that the artefact does not have.
        """
        if not _TAG.fullmatch(tag):
            raise UserError(f"'{tag}' is no tag; use letters, digits and . _ -, starting with a letter, e.g. best")
        folder = self.root / artifact.stage / artifact.name
        with exclusive(folder / ".lock", str(folder)):
            tags = self.tags(artifact.stage, artifact.name)
            if remove and tags.get(tag) != artifact.version:
                raise UserError(f"{artifact.reference} does not have the tag '{tag}'")
            tags = {name: version for name, version in tags.items() if name != tag}
            storage.write_text(folder / TAGS, json.dumps(tags if remove else {**tags, tag: artifact.version}))

    def find(
        self, stage: str, name: str, recipe: str, inputs: Mapping[str, str] = MappingProxyType({})
    ) -> Artifact | None:
        """Return the newest version with this recipe that verifies, parents included; None if there is none.

        Args:
            inputs: hashes of the inputs as they are now; versions made from others do not count.
        """
        for version in reversed(self.versions(stage, name)):
            reference = Reference(stage, name, version)
            try:
                manifest = self.read(reference).manifest
                if manifest.recipe == recipe and not changed_inputs(manifest, inputs):
                    return self.get(reference)
            except UserError:
                continue  # an older version may be intact
        return None

    def delete(self, reference: str | Reference, *, force: bool = False) -> None:
        """Delete one version, whose number is not used again; with `force` even if others were made from it.

        Raises:
            UserError: no version is named, it does not exist, or others in this registry need it.
        """
        if isinstance(reference, str):
            reference = parse_reference(reference)
        versions = self.versions(reference.stage, reference.name)
        if reference.version is None and versions:
            raise UserError(f"give the version of {reference} to delete, e.g. {reference}@{versions[-1]}")
        if reference.version not in versions:
            raise UserError(self._missing(reference, versions))
        with self._lock():
            children = [str(a.reference) for a in self.list() if reference in [p.reference for p in a.manifest.parents]]
            if children and not force:
                raise UserError(
                    f"{reference} is needed by {', '.join(children)}, which cannot be loaded without it; "
                    "delete those first, or use --force"
                )
            folder = self.root / reference.stage / reference.name / f"v{reference.version}"
            try:
                (folder / MANIFEST).unlink()  # first, so that an interrupted deletion leaves no version
                # The empty folder stays, so that no later version gets the number.
                _empty(folder)
            except OSError as error:
                raise UserError(f"cannot delete {reference}: {storage.reason(error)} ({error.filename})") from error

    def clean(self) -> None:
        """Remove what killed processes left of versions that they were writing or deleting."""
        for name in self._folders_of_names():
            with storage.partial_folder(name):
                pass
            for number in _version_folders(name):
                folder = name / f"v{number}"
                if not (folder / MANIFEST).exists():
                    with self._lock():
                        _empty(folder)

    def _lock(self) -> AbstractContextManager[None]:
        """Return the lock for adding and deleting versions."""
        return exclusive(self.root / ".lock", f"registry {self.root}")

    def versions(self, stage: str, name: str) -> Sequence[int]:
        """Return the complete versions, oldest first."""
        Reference(stage, name)
        folder = self.root / stage / name
        return [v for v in _version_folders(folder) if (folder / f"v{v}" / MANIFEST).exists()]

    def references(self) -> Sequence[Reference]:
        """Return every version with a manifest, readable or not, ordered by stage, name and version."""
        names = [parse_reference(name) for name in self._names()]
        return [dataclasses.replace(n, version=v) for n in names for v in self.versions(n.stage, n.name)]

    def list(self) -> Sequence[Artifact]:
        """Return every artefact with a readable manifest, without verifying files."""
        return [line.artifact for r in self.references() if (line := self.try_read(r)).artifact is not None]

    def lineage(self, artifact: Artifact) -> Lineage:
        """Return the tree of an artefact's ancestors by their manifests, with missing and altered ones marked."""
        parents = []
        for parent in artifact.manifest.parents:
            line = self.try_read(parent.reference)
            if line.artifact is None:
                parents.append(line)
            elif line.artifact.hash != parent.hash:
                parents.append(Lineage(line.reference, None, altered(parent), []))
            else:
                parents.append(self.lineage(line.artifact))
        return Lineage(artifact.reference, artifact, "", parents)

    def try_read(self, reference: Reference) -> Lineage:
        """Return an artefact without its ancestors, or the problem of reading it."""
        try:
            return Lineage(str(reference), self.read(reference), "", [])
        except UserError as error:
            return Lineage(str(reference), None, str(error), [])

    def _verify(self, artifact: Artifact, seen: set[str] | None) -> None:
        """Verify the files of an artefact and of its parents that are not in `seen`; with None, of the artefact only."""
        problem = file_problem(artifact)
        if problem:
            raise UserError(f"{artifact.reference} in registry {self.root}: {problem}; {self._remake(artifact)}")
        if seen is None:
            return
        for parent in artifact.manifest.parents:
            try:
                current = self.read(parent.reference)
                if current.hash != parent.hash:
                    raise UserError(f"{altered(parent)}; {self._remake(parent.reference)}")
                if current.reference not in seen:
                    self._verify(current, seen)
            except UserError as error:
                raise UserError(
                    f"{artifact.reference} needs its parent {parent.reference}: {error}, "
                    f"and then {artifact.stage}/{artifact.name} with: {self._command(artifact)}"
                ) from error
        seen.add(artifact.reference)

    def _folders_of_names(self) -> Sequence[Path]:
        return [folder for s in STAGES for folder in _subfolders(self.root / s) if NAME.fullmatch(folder.name)]

    def _names(self) -> Sequence[str]:
        """Return `STAGE/NAME` of all artefacts with a complete version."""
        names = [Reference(folder.parent.name, folder.name) for folder in self._folders_of_names()]
        return [str(reference) for reference in names if self.versions(reference.stage, reference.name)]

    def _missing(self, reference: Reference, versions: Sequence[int]) -> str:
        if versions:
            near = f" (there is {', '.join(f'@{v}' for v in versions)})"
        else:
            near = did_you_mean(f"{reference.stage}/{reference.name}", self._names())
        return f"no artefact '{reference}' in registry {self.root}{near}; make it with: {self._command(reference)}"

    def _remake(self, reference: Reference | Artifact) -> str:
        return f"make it again with: {self._command(reference)}"

    def _command(self, reference: Reference | Artifact) -> str:
        """Return the command that makes an artefact of this stage and name in this registry."""
        if reference.stage == "data":
            return "rlhf data"
        place = "" if self.root == Path("registry") else f" --registry {shlex.quote(str(self.root))}"
        return f"rlhf {reference.stage} --name {reference.name}{place}"


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


def _version_folders(folder: Path) -> list[int]:
    return sorted(int(match[1]) for p in _subfolders(folder) if (match := _VERSION_FOLDER.fullmatch(p.name)))


def _folders(folder: Path) -> Iterator[Path]:
    yield folder
    yield from (p for p in folder.rglob("*") if p.is_dir())

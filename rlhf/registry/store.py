"""The registry: named, versioned, verified artefacts and their lineage.

A version is a folder `ROOT/STAGE/NAME/v1` of plain files (safetensors, JSON, text) and a `manifest.json` that holds the
checksum of each of them. The folder is written beside its place and renamed into it, manifest last, so that a version
exists either whole or not at all. An artefact is verified when it is loaded, and so is everything it was made from.

The command line is `rlhf.sharing.__main__`.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import shlex
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from rlhf.base import storage
from rlhf.base.errors import UserError, did_you_mean
from rlhf.base.json_files import read_object
from rlhf.registry.manifest import (
    _NAME,
    _VERSION_FOLDER,
    MANIFEST,
    STAGES,
    Artifact,
    Manifest,
    Parent,
    Reference,
    _plain,
    code_commit,
    library_versions,
    parse_reference,
    read_manifest,
)
from rlhf.registry.verify import _altered, _check_in, _file_problem

TAGS = "tags.json"


STALE_SECONDS = 24 * 3600
"""A `.partial-*` folder untouched for this long was left by a process that was killed: no writer pauses for a day."""


_TAG = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,49}")


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
            return {str(tag): int(version) for tag, version in read_object(file).items()}
        except FileNotFoundError:
            return {}
        except (OSError, UserError, ValueError, TypeError) as error:
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
            storage.write_text(folder / TAGS, json.dumps(tags if remove else {**tags, tag: artifact.version}))

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

"""Artefacts kept elsewhere: `python -m rlhf.registry push REF PLACE` and `pull REF PLACE`.

A place is a folder (a network share, a disk), a repository of the Hugging Face hub (`hf:OWNER/NAME`, private when it is made), or
a W&B project (`wandb:ENTITY/PROJECT`). What is pushed is the artefact with everything it was made from, as the registry has it:
`STAGE/NAME/vN` with its manifest. So what is pulled can be verified to the last byte, and is refused if it was altered.
"""

from __future__ import annotations

import abc
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.base import storage
from rlhf.base.errors import UserError, did_you_mean
from rlhf.base.storage import sha256_file
from rlhf.registry import MANIFEST, Artifact, Reference, Registry, check_files, parse_reference, read_manifest
from rlhf.registry.lineage import ancestors, exact


class Place(abc.ABC):
    """Somewhere versions are kept, each as a folder of files."""

    @abc.abstractmethod
    def versions(self, stage: str, name: str) -> list[int]:
        """The versions of STAGE/NAME that are there, oldest first."""

    @abc.abstractmethod
    def hash_of(self, reference: Reference) -> str:
        """sha256 of the manifest of a version that is there."""

    @abc.abstractmethod
    def put(self, artifact: Artifact) -> None:
        """Copies a version there."""

    @abc.abstractmethod
    def take(self, reference: Reference, folder: Path) -> None:
        """Copies a version's files from there into a folder that is not there yet."""

    def names(self, stage: str) -> list[str]:
        """Names that are there, as far as the place can tell: to offer the nearest one."""
        return []


class FolderPlace(Place):
    """A folder, laid out as a registry."""

    def __init__(self, root: Path) -> None:
        self.registry = Registry(root)

    def versions(self, stage: str, name: str) -> list[int]:
        return list(self.registry.versions(stage, name))

    def hash_of(self, reference: Reference) -> str:
        return self.registry.read(reference).hash

    def put(self, artifact: Artifact) -> None:
        install(self.registry, artifact.path, artifact)

    def take(self, reference: Reference, folder: Path) -> None:
        shutil.copytree(self.registry.root / path_of(reference), folder)

    def names(self, stage: str) -> list[str]:
        return sorted({f"{r.stage}/{r.name}" for r in self.registry.references() if r.stage == stage})


class HubPlace(Place):
    """A model repository of the Hugging Face hub. Its own login, cache and endpoint settings hold."""

    def __init__(self, repository: str) -> None:
        from huggingface_hub import HfApi

        self.repository, self.api = repository, HfApi()

    def versions(self, stage: str, name: str) -> list[int]:
        parts = [file.split("/") for file in self._files()]
        found = [p[2] for p in parts if p[:2] == [stage, name] and len(p) == 4 and p[3] == MANIFEST]
        return sorted(int(version[1:]) for version in found)

    def hash_of(self, reference: Reference) -> str:
        with _explained(f"hf:{self.repository}"):
            return sha256_file(self.api.hf_hub_download(self.repository, f"{path_of(reference)}/{MANIFEST}"))

    def put(self, artifact: Artifact) -> None:
        place = path_of(artifact)
        with _explained(f"hf:{self.repository}"):
            self.api.create_repo(self.repository, private=True, exist_ok=True)
            # One commit, so that a version is there whole or not at all.
            self.api.upload_folder(
                repo_id=self.repository,
                folder_path=artifact.path,
                path_in_repo=place,
                commit_message=artifact.reference,
            )

    def take(self, reference: Reference, folder: Path) -> None:
        place = path_of(reference)
        with _explained(f"hf:{self.repository}"):
            snapshot = Path(self.api.snapshot_download(self.repository, allow_patterns=f"{place}/*"))
        shutil.copytree(snapshot / place, folder)

    def names(self, stage: str) -> list[str]:
        return sorted({"/".join(file.split("/")[:2]) for file in self._files() if file.startswith(f"{stage}/")})

    def _files(self) -> list[str]:
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            with _explained(f"hf:{self.repository}"):
                return list(self.api.list_repo_files(self.repository))
        except RepositoryNotFoundError:
            return []


class WandbPlace(Place):
    """A W&B project: an artifact for each name, the version's number as its alias. The files themselves are uploaded."""

    def __init__(self, project: str) -> None:
        self.entity, _, self.project = project.rpartition("/")

    def versions(self, stage: str, name: str) -> list[int]:
        import wandb

        api = wandb.Api()
        with _explained(f"wandb:{self.project}"):
            collection = f"{self._prefix()}{_collection(stage, name)}"
            if not api.artifact_collection_exists(collection, type=_kind(stage)):
                return []
            aliases = [alias for version in api.artifacts(_kind(stage), collection) for alias in version.aliases]
        return sorted(int(alias[1:]) for alias in aliases if alias.startswith("r") and alias[1:].isdigit())

    def hash_of(self, reference: Reference) -> str:
        return str(self._artifact(reference).metadata["hash"])

    def put(self, artifact: Artifact) -> None:
        import wandb

        with _explained(f"wandb:{self.project}"):
            files = wandb.Artifact(
                _collection(artifact.stage, artifact.name),
                type=_kind(artifact.stage),
                metadata={"reference": artifact.reference, "hash": artifact.hash},
            )
            files.add_dir(str(artifact.path), policy="immutable")  # no copies: what is registered does not change
            with wandb.init(entity=self.entity or None, project=self.project, job_type="push", mode="online") as run:
                # W&B counts its own versions as v0, v1, ...; ours are aliases that cannot be taken for those.
                run.log_artifact(files, aliases=[f"r{artifact.version}"]).wait()

    def take(self, reference: Reference, folder: Path) -> None:
        artifact = self._artifact(reference)
        with _explained(f"wandb:{self.project}"):
            artifact.download(root=str(folder))

    def _artifact(self, reference: Reference) -> Any:
        import wandb

        name = f"{self._prefix()}{_collection(reference.stage, reference.name)}:r{reference.version}"
        with _explained(f"wandb:{self.project}"):
            return wandb.Api().artifact(name, type=_kind(reference.stage))

    def _prefix(self) -> str:
        return f"{self.entity}/{self.project}/" if self.entity else f"{self.project}/"


def _collection(stage: str, name: str) -> str:
    return f"registry-{stage}-{name}"


def _kind(stage: str) -> str:
    return f"registry-{stage}"


@contextmanager
def _explained(place: str) -> Iterator[None]:
    """Inside, what a service's client raises becomes one line that names the place; but not that a repository is missing."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        yield
    except (UserError, RepositoryNotFoundError):
        raise
    except Exception as error:  # of every kind: the clients have no common type
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{place} does not answer as it should: {reason} (logged in? is there a network?)") from error


def open_place(text: str) -> Place:
    """`hf:OWNER/NAME`, `wandb:ENTITY/PROJECT`, or a folder.

    Raises:
        UserError: another scheme, or a repository without an owner.
    """
    scheme, colon, rest = text.partition(":")
    if not colon or "/" in scheme or len(scheme) == 1:  # C:\\models is a folder
        return FolderPlace(Path(text))
    if scheme == "hf":
        if rest.count("/") != 1 or not all(rest.split("/")):
            raise UserError(f"'{text}' is no repository; write hf:OWNER/NAME")
        return HubPlace(rest)
    if scheme == "wandb" and rest:
        return WandbPlace(rest)
    raise UserError(f"'{text}' is no place; give a folder, hf:OWNER/NAME or wandb:ENTITY/PROJECT")


def path_of(reference: Reference | Artifact) -> str:
    """`sft/demo/v2`, below the root of a registry."""
    return f"{reference.stage}/{reference.name}/v{reference.version}"


def push(registry: Registry, artifact: Artifact, place: Place) -> list[str]:
    """Copies an artefact and everything it was made from to a place; returns what was new there, parents first.

    The artefact must be verified. A version that is there already is left alone, so a push can be repeated.

    Raises:
        UserError: something else is there under one of the versions.
    """
    pushed = []
    for line in ancestors(registry.lineage(artifact)):
        one = line.artifact
        assert one is not None, "a verified artefact has all its parents"
        if one.version not in place.versions(one.stage, one.name):
            place.put(one)
            pushed.append(one.reference)
        elif place.hash_of(exact(one)) != one.hash:
            raise UserError(f"there is another {one.reference} already; push to another place")
    return pushed


def pull(registry: Registry, text: str, place: Place) -> list[str]:
    """Copies an artefact and everything it was made from into the registry; returns what was new, parents first.

    Raises:
        UserError: it is not there, was altered, or the registry has something else under that version.
    """
    reference = parse_reference(text)
    versions = place.versions(reference.stage, reference.name)
    if not versions or reference.version not in (None, *versions):
        there = f" (there is {', '.join(f'@{v}' for v in versions)})" if versions else ""
        near = there or did_you_mean(f"{reference.stage}/{reference.name}", place.names(reference.stage))
        raise UserError(f"no artefact '{reference}' there{near}")
    wanted, pulled = Reference(reference.stage, reference.name, reference.version or versions[-1]), list[str]()
    _pull_exactly(registry, wanted, place, pulled)
    registry.get(wanted)  # files and parents, to the last byte
    return pulled


def _pull_exactly(registry: Registry, reference: Reference, place: Place, pulled: list[str]) -> None:
    """Parents first: a registry never holds an artefact whose parents are still to come."""
    if reference.version in registry.versions(reference.stage, reference.name):
        have, there = registry.read(reference).hash, place.hash_of(reference)
        if have != there:
            raise UserError(
                f"registry {registry.root} has another {reference} (hash {have[:12]}, not {there[:12]}); pull into another "
                "--registry"
            )
        return
    folder = registry.root / reference.stage / reference.name / f".partial-{uuid.uuid4().hex[:8]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        place.take(reference, folder)
        artifact = Artifact(folder, read_manifest(folder))
        if artifact.reference != str(reference):
            raise UserError(f"what is there as {reference} is {artifact.reference}")
        for parent in artifact.manifest.parents:
            _pull_exactly(registry, parent.reference, place, pulled)
            if registry.read(parent.reference).hash != parent.hash:
                raise UserError(
                    f"{reference} was made from another {parent.reference} than the one there (hash {parent.hash[:12]}); "
                    "whoever pushed it has to push it again"
                )
        install(registry, folder, artifact)
        pulled.append(artifact.reference)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def install(registry: Registry, source: Path, artifact: Artifact) -> None:
    """Copies a version into a registry: beside its place, checked, then renamed into it."""
    target = registry.root / path_of(artifact)
    partial = target.with_name(f".partial-{uuid.uuid4().hex[:8]}")
    try:
        shutil.copytree(source, partial, ignore=shutil.ignore_patterns(".*"))
        check_files(Artifact(partial, artifact.manifest))
        storage.sync(partial, *partial.rglob("*"))
        partial.rename(target)
        storage.sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)

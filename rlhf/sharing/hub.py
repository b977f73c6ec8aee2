"""Copies of artefacts in other places: `rlhf registry push REF PLACE` and `pull REF PLACE`.

A place is a folder (a network share, a disk), a repository of the Hugging Face hub (`hf:OWNER/NAME`, created as private), or
a W&B project (`wandb:ENTITY/PROJECT`). A push copies the artefact and all its ancestors as in the registry, `STAGE/NAME/vN`
with a manifest. A pull verifies every byte and refuses altered files.
"""

from __future__ import annotations

import abc
import shutil
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
    """A place that stores versions, each as a folder of files."""

    @abc.abstractmethod
    def versions(self, stage: str, name: str) -> list[int]:
        """Return the stored versions of STAGE/NAME, oldest first."""

    @abc.abstractmethod
    def hash_of(self, reference: Reference) -> str:
        """Return the sha256 of a stored version's manifest."""

    @abc.abstractmethod
    def put(self, artifact: Artifact) -> None:
        """Copy a version to this place."""

    @abc.abstractmethod
    def take(self, reference: Reference, folder: Path) -> None:
        """Copy a version's files from this place into a new folder."""

    def names(self, stage: str) -> list[str]:
        """Return the stored names, for messages; empty if the place cannot list them."""
        return []


class FolderPlace(Place):
    """A folder with the layout of a registry."""

    def __init__(self, root: Path) -> None:
        self.registry = Registry(root)

    def versions(self, stage: str, name: str) -> list[int]:
        return list(self.registry.versions(stage, name))

    def hash_of(self, reference: Reference) -> str:
        return self.registry.read(reference).hash

    def put(self, artifact: Artifact) -> None:
        install(self.registry, artifact.path, artifact)

    def take(self, reference: Reference, folder: Path) -> None:
        storage.copy_plain_files(self.registry.root / path_of(reference), folder)

    def names(self, stage: str) -> list[str]:
        return sorted({f"{r.stage}/{r.name}" for r in self.registry.references() if r.stage == stage})


class HubPlace(Place):
    """A model repository of the Hugging Face hub, with the login, cache and endpoint of its client."""

    def __init__(self, repository: str) -> None:
        from huggingface_hub import HfApi

        self.repository, self.api = repository, HfApi()

    def versions(self, stage: str, name: str) -> list[int]:
        parts = [file.split("/") for file in self._files()]
        folders = [p[2] for p in parts if p[:2] == [stage, name] and len(p) == 4 and p[3] == MANIFEST]
        return sorted(int(folder[1:]) for folder in folders)

    def hash_of(self, reference: Reference) -> str:
        with _explained(f"hf:{self.repository}"):
            return sha256_file(self.api.hf_hub_download(self.repository, f"{path_of(reference)}/{MANIFEST}"))

    def put(self, artifact: Artifact) -> None:
        place = path_of(artifact)
        with _explained(f"hf:{self.repository}"):
            self.api.create_repo(self.repository, private=True, exist_ok=True)
            # One commit, so that no version is stored in part.
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
    """A W&B project, with an artifact for each name and an alias for each version."""

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
            files.add_dir(str(artifact.path), policy="immutable")  # no copies: registered files do not change
            with wandb.init(entity=self.entity or None, project=self.project, job_type="push", mode="online") as run:
                # W&B numbers its own versions v0, v1, ...; our aliases must differ from those.
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
    """Turn errors of a service's client into a `UserError` that names the place, except for a missing repository."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        yield
    except (UserError, RepositoryNotFoundError):
        raise
    except Exception as error:  # the clients' errors have no common type
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{place} failed: {reason} (logged in? is there a network?)") from error


def open_place(text: str) -> Place:
    """Return the place named `hf:OWNER/NAME`, `wandb:ENTITY/PROJECT`, or by the path of a folder.

    Raises:
        UserError: an unknown scheme, or a repository without an owner.
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
    """Return a version's path below the root of a registry, e.g. `sft/demo/v2`."""
    return f"{reference.stage}/{reference.name}/v{reference.version}"


def push(registry: Registry, artifact: Artifact, place: Place) -> list[str]:
    """Copy a verified artefact and its ancestors to a place; return the references of new versions, parents first.

    Versions that the place has already are skipped, so a push can be repeated.

    Raises:
        UserError: the place has other content under one of the versions.
    """
    references = []
    for line in ancestors(registry.lineage(artifact)):
        one = line.artifact
        assert one is not None, "a verified artefact has all its parents"
        if one.version not in place.versions(one.stage, one.name):
            place.put(one)
            references.append(one.reference)
        elif place.hash_of(exact(one)) != one.hash:
            raise UserError(f"the place has another {one.reference}; push to another place")
    return references


def pull(registry: Registry, text: str, place: Place) -> list[str]:
    """Copy an artefact and its ancestors into the registry; return the references of new versions, parents first.

    Raises:
        UserError: a missing or altered version, or other content under that version in the registry.
    """
    reference = parse_reference(text)
    versions = place.versions(reference.stage, reference.name)
    if not versions or reference.version not in (None, *versions):
        others = f" (there is {', '.join(f'@{v}' for v in versions)})" if versions else ""
        near = others or did_you_mean(f"{reference.stage}/{reference.name}", place.names(reference.stage))
        raise UserError(f"no artefact '{reference}' there{near}")
    exact_reference = Reference(reference.stage, reference.name, reference.version or versions[-1])
    references = _pull_exactly(registry, exact_reference, place)
    registry.get(exact_reference)  # verifies files and parents
    return references


def _pull_exactly(registry: Registry, reference: Reference, place: Place) -> list[str]:
    """Copy a version after its parents, so that a registry never lacks a parent; return the references of new ones."""
    if reference.version in registry.versions(reference.stage, reference.name):
        ours, theirs = registry.read(reference).hash, place.hash_of(reference)
        if ours != theirs:
            raise UserError(
                f"registry {registry.root} has another {reference} (hash {ours[:12]}, not {theirs[:12]}); pull into another "
                "--registry"
            )
        return []
    parent = registry.root / reference.stage / reference.name
    parent.mkdir(parents=True, exist_ok=True)
    with storage.partial_folder(parent) as folder:
        place.take(reference, folder)
        artifact = Artifact(folder, read_manifest(folder))
        if artifact.reference != str(reference):
            raise UserError(f"the place has {artifact.reference} in the folder of {reference}")
        references = []
        for line in artifact.manifest.parents:
            references += _pull_exactly(registry, line.reference, place)
            if registry.read(line.reference).hash != line.hash:
                raise UserError(
                    f"{reference} was made from another {line.reference} (hash {line.hash[:12]}) than the place has; "
                    "ask its owner to push it again"
                )
        install(registry, folder, artifact)
        return [*references, artifact.reference]


def install(registry: Registry, source: Path, artifact: Artifact) -> None:
    """Copy a version into a registry: beside its place, checked and synced, then renamed into it."""
    target = registry.root / path_of(artifact)
    target.parent.mkdir(parents=True, exist_ok=True)
    with storage.partial_folder(target.parent) as partial:
        storage.copy_plain_files(source, partial)
        check_files(Artifact(partial, artifact.manifest))
        storage.sync(partial, *partial.rglob("*"))
        partial.rename(target)
        storage.sync(target.parent)

"""Push and pull: what arrives is what left, and nothing altered or foreign is taken in."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, create_autospec

import huggingface_hub
import pytest
import wandb
from huggingface_hub.errors import RepositoryNotFoundError
from registry.test_registry import chain, publish, rewrite_manifest
from toys import Call

from rlhf.base.errors import UserError
from rlhf.registry import Artifact, Registry
from rlhf.sharing import hub
from rlhf.sharing.hub import FolderPlace, HubPlace, WandbPlace, open_place, pull, push


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


class FolderHub:
    """A stand-in for the hub that keeps repositories in folders. Calls go through autospecs of the real client, so that one
    which the real client would not take fails here, too."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.api: Any = create_autospec(huggingface_hub.HfApi, instance=True)
        self.api.create_repo.side_effect = lambda repo_id, **_: (root / repo_id).mkdir(parents=True, exist_ok=True)
        self.api.list_repo_files.side_effect = self.files
        self.api.upload_folder.side_effect = self.upload
        self.api.snapshot_download.side_effect = lambda repo_id, **_: str(root / repo_id)
        self.api.hf_hub_download.side_effect = lambda repo_id, filename: str(root / repo_id / filename)

    def files(self, repo_id: str) -> list[str]:
        folder = self.root / repo_id
        if not folder.is_dir():
            raise RepositoryNotFoundError("404", response=MagicMock())
        return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]

    def upload(self, *, repo_id: str, folder_path: Path, path_in_repo: str, commit_message: str) -> None:
        shutil.copytree(folder_path, self.root / repo_id / path_in_repo)


class FolderWandb:
    """The same for W&B artifacts."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.kept: dict[str, list[Any]] = {}
        api = create_autospec(wandb.Api, instance=True)
        api.artifact_collection_exists.side_effect = lambda name, type: name in self.kept
        api.artifacts.side_effect = lambda type_name, name: self.kept[name]
        api.artifact.side_effect = self.find
        monkeypatch.setattr(wandb, "Api", lambda: api)
        monkeypatch.setattr(wandb, "init", self.init)

    def init(self, *, entity: str, project: str, job_type: str, mode: str) -> Any:
        run = create_autospec(wandb.Run, instance=True)
        run.__enter__.return_value = run
        run.log_artifact.side_effect = lambda artifact, aliases: self.log(f"{entity}/{project}/", artifact, aliases)
        return run

    def log(self, prefix: str, artifact: Any, aliases: list[str]) -> Any:
        folder = self.root / artifact.name / aliases[0]
        for name, entry in artifact.manifest.entries.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(entry.local_path, folder / name)
        kept = SimpleNamespace(aliases=[*aliases, "v0"], metadata=artifact.metadata, folder=folder)
        kept.download = lambda root: shutil.copytree(folder, root)
        self.kept.setdefault(prefix + artifact.name, []).append(kept)
        return SimpleNamespace(wait=lambda: None)

    def find(self, name: str, type: str) -> Any:
        collection, alias = name.rsplit(":", 1)
        return next(kept for kept in self.kept[collection] if alias in kept.aliases)


@pytest.fixture(params=["folder", "hub", "wandb"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> hub.Place:
    """A place of each kind, empty."""
    root = tmp_path / "there"
    if request.param == "folder":
        return open_place(str(root))
    if request.param == "hub":
        api = FolderHub(root).api
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
        return open_place("hf:me/models")
    FolderWandb(root, monkeypatch)
    return open_place("wandb:me/models")


@pytest.fixture
def other(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "other")


def test_a_whole_lineage_goes_there_and_back(registry: Registry, place: hub.Place, other: Registry) -> None:
    """A policy that arrives without the models it was made from, or under hashes that its children do not know."""
    _, _, ppo = chain(registry)
    assert push(registry, ppo, place) == ["sft/demo@1", "reward/demo@1", "ppo/demo@1"]
    assert push(registry, ppo, place) == [], "a push can be repeated"
    assert pull(other, "ppo/demo", place) == ["sft/demo@1", "reward/demo@1", "ppo/demo@1"]
    assert other.get("ppo/demo").hash == ppo.hash
    assert pull(other, "ppo/demo@1", place) == []
    assert place.versions("sft", "demo") == [1]


def test_what_is_not_there_is_named(registry: Registry, place: hub.Place, other: Registry) -> None:
    """A traceback of the client's, or an empty folder in the registry."""
    with pytest.raises(UserError, match="no artefact 'sft/demo' there"):
        pull(other, "sft/demo", place)
    push(registry, publish(registry), place)
    with pytest.raises(UserError, match="there is @1"):
        pull(other, "sft/demo@2", place)
    assert other.references() == []


def test_versions_that_differ_are_not_mixed(registry: Registry, place: hub.Place, other: Registry) -> None:
    """Two people's sft/demo@1: one silently stands for the other."""
    push(registry, publish(registry), place)
    mine = publish(other, recipe="mine")
    with pytest.raises(UserError, match="another sft/demo@1"):
        push(other, mine, place)
    with pytest.raises(UserError, match="has another sft/demo@1"):
        pull(other, "sft/demo", place)
    assert other.get("sft/demo").hash == mine.hash


def test_an_altered_file_is_refused(registry: Registry, tmp_path: Path, other: Registry) -> None:
    """Weights that somebody changed on the share are taken into the registry."""
    there = tmp_path / "there"
    push(registry, publish(registry), FolderPlace(there))
    (there / "sft" / "demo" / "v1" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"adapter_config\.json is corrupt"):
        pull(other, "sft/demo", FolderPlace(there))
    assert other.references() == [] and not list(other.root.rglob(".partial-*"))


def test_a_parent_that_was_made_again_is_refused(registry: Registry, tmp_path: Path, other: Registry) -> None:
    """A policy on top of another SFT model than the one that it was trained on."""
    sft, _, ppo = chain(registry)
    there = FolderPlace(tmp_path / "there")
    push(registry, ppo, there)
    moved = Artifact(tmp_path / "there" / "sft" / "demo" / "v1", sft.manifest)
    rewrite_manifest(moved, recipe="other")
    with pytest.raises(UserError, match=r"sft/demo@1"):
        pull(other, "ppo/demo", there)
    assert "ppo/demo@1" not in map(str, other.references())


@pytest.mark.parametrize(
    ("text", "kind"), [("models", FolderPlace), ("hf:me/it", HubPlace), ("wandb:me/p", WandbPlace)]
)
def test_places_are_known_by_their_names(text: str, kind: type) -> None:
    """A repository that is taken for a folder: nothing leaves the machine, and nobody notices."""
    assert type(open_place(text)) is kind


def test_bad_places_and_silent_servers_are_one_line(
    registry: Registry,
    call: Callable[..., Call],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A traceback of a client's library without a word on what to do."""
    publish(registry)

    def complaint(place: str) -> str:
        return call("rlhf.sharing.__main__", "push", "sft/demo", place, "--registry", registry.root).complaint

    assert "hf:OWNER/NAME" in complaint("hf:models")
    assert "no place" in complaint("s3:bucket/x")
    api = create_autospec(huggingface_hub.HfApi, instance=True)
    api.list_repo_files.side_effect = ConnectionError("no route to host")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    assert "no route to host" in complaint("hf:me/models")


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_links_and_pipes_are_not_copied(registry: Registry, tmp_path: Path, kind: str) -> None:
    """A place that hands out the user's own files through a link, or a pipe on which a pull waits for ever."""
    elsewhere = Registry(tmp_path / "elsewhere")
    file = publish(elsewhere).path / "adapter_config.json"
    file.rename(tmp_path / "secret.json")
    file.symlink_to(tmp_path / "secret.json") if kind == "link" else os.mkfifo(file)
    with pytest.raises(UserError, match=r"adapter_config\.json is a link, a pipe or a device"):
        pull(registry, "sft/demo", FolderPlace(elsewhere.root))
    assert registry.versions("sft", "demo") == [] and not list(registry.root.rglob(".partial-*"))


def test_what_a_killed_copy_left_is_removed(registry: Registry, tmp_path: Path) -> None:
    """Folders of killed pushes, pulls and exports that fill the disk, because nothing ever removes them."""
    place = tmp_path / "place"
    leftovers = [folder / "sft" / "demo" / ".partial-0123abcd" for folder in (registry.root, place)]
    publish(registry)
    for leftover in leftovers:
        leftover.mkdir(parents=True)
        os.utime(leftover, (time.time() - 25 * 3600,) * 2)
    push(registry, publish(registry), FolderPlace(place))
    assert not any(leftover.exists() for leftover in leftovers)

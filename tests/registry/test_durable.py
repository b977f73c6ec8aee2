"""After a power cut: whatever was renamed into place was on the disk before, and so is the renaming itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.base import storage
from rlhf.registry import Artifact, Registry
from rlhf.registry.store import TAGS
from rlhf.sharing.hub import install


def publish(root: Path) -> Artifact:
    def write(folder: Path) -> None:
        (folder / "adapter_config.json").write_text('{"r": 16}')
        (folder / "extra").mkdir()
        (folder / "extra" / "chat_template.jinja").write_text("{{ messages }}")

    fields: dict[str, Any] = {"tokenizer_hash": None, "chat_template_hash": None, "pad_token_id": None, "stop_token_ids": [],
                              "data": {}, "config": {}, "metrics": {}}  # fmt: skip
    return Registry(root).publish("sft", "demo", write, kind="adapter", base_model="b", recipe="r", **fields)


def write_text(root: Path) -> Path:
    storage.write_text(root / "a.txt", "a")
    return root / "a.txt"


def tag(root: Path) -> Path:
    artifact = publish(root)
    Registry(root).tag(artifact, "best")
    return artifact.path.parent / TAGS


def pull(root: Path) -> Path:
    artifact = publish(root / "there")
    (root / "here" / "sft" / "demo").mkdir(parents=True)
    install(Registry(root / "here"), artifact.path, artifact)
    return root / "here" / "sft" / "demo" / "v1"


@pytest.mark.parametrize(
    "act", [lambda root: publish(root).path, tag, pull, write_text], ids=["publish", "tag", "pull", "text"]
)
def test_on_the_disk_before_it_is_renamed(
    act: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: the manifest was renamed without fsync. After a power cut the version is there and its manifest empty."""
    events: list[str | int] = []  # the target of a renaming, or the inode that was synced: it survives the renaming
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(os.fstat(descriptor).st_ino) or fsync(descriptor))
    for name in ("rename", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda a, b, real=real: events.append(str(b)) or real(a, b))
    target = act(tmp_path)
    renamed = len(events) - 1 - events[::-1].index(str(target))
    for path in (target, *target.rglob("*")):
        assert path.stat().st_ino in events[:renamed], f"{path.name} was not synced before it was renamed into place"
    assert target.parent.stat().st_ino in events[renamed:], "the renaming itself was not synced"

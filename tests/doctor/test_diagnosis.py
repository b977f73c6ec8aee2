"""`python -m rlhf.doctor RUN`: the right folder, the right stage, exit codes, and a table with the figures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from doctor.test_health import COMPARISON, SAMPLES, SICK, UPDATES, run
from toys import Call

from rlhf.doctor.diagnosis import diagnose, read_history
from rlhf.doctor.health.findings import CHECKS

Caller = Callable[..., Call]


def write(folder: Path, stage: str, *sick: str, settings: dict[str, Any] | None = None) -> Path:
    """A stage's folder with a made-up log."""
    changed = {name: course for check in sick for name, course in SICK[check][1].items()}
    history = run(stage, changed)
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(history._finite)
    rows = [{"step": step, **{n: v for n in names if (v := history.at(n, step)) is not None}} for step in history.steps]
    _lines(folder / "metrics.jsonl", rows)
    if stage == "ppo":
        _lines(folder / "samples.jsonl", SAMPLES)
        _lines(folder / "comparison.jsonl", COMPARISON)
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "made_of.json").write_text(json.dumps(settings or {}))
    return folder


def _lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_stages_of_a_run(tmp_path: Path, call: Caller) -> None:
    """Catches: a stage that is left out, or read with another stage's checks, and settings that are not read."""
    write(tmp_path / "sft", "sft", "loss_rising")
    write(tmp_path / "reward", "reward")
    write(tmp_path / "ppo", "ppo", "controller_saturated", settings={"kl_target": 6.0})
    found = {one.stage: [finding.check.name for finding in one.findings] for one in diagnose(tmp_path)}
    assert found == {"sft": ["loss_rising"], "reward": [], "ppo": ["controller_saturated"]}
    shown = call("rlhf.doctor.__main__", tmp_path)
    assert shown.code == 1 and shown.err == ""
    checks = sum("reward" in check.stages for check in CHECKS)
    assert f"reward: {checks} checks on {UPDATES} logged updates, nothing found" in shown.out
    words = " ".join(shown.out.replace("│", " ").split())
    assert "Start with loss_rising" in words and "Start with controller_saturated" in words


@pytest.mark.parametrize("where", ["", "ppo"])
def test_a_healthy_run_ends_with_exit_code_0(where: str, tmp_path: Path, call: Caller) -> None:
    """Catches: an exit code that a script cannot tell findings by."""
    write(tmp_path / "ppo", "ppo")
    shown = call("rlhf.doctor.__main__", tmp_path / where)
    assert shown.code == 0 and f"on {UPDATES} logged updates, nothing found" in shown.out


def test_half_written_and_missing_files(tmp_path: Path) -> None:
    """Catches: a diagnosis that fails on the very runs that need one: killed while they wrote, or without samples."""
    folder = write(tmp_path / "ppo", "ppo", "reward_constant")
    for name in ("samples.jsonl", "comparison.jsonl", "checkpoints/made_of.json"):
        (folder / name).unlink()
    with (folder / "metrics.jsonl").open("a") as log:
        log.write('{"step": 25, "objective/sco')
    (one,) = diagnose(folder)
    assert one.findings[0].check.name == "reward_constant" and one.updates == UPDATES
    assert read_history(folder).settings == {}


def test_users_errors(tmp_path: Path, call: Caller) -> None:
    """Catches: a traceback, or exit code 1, which means findings."""
    (tmp_path / "run" / "ppo").mkdir(parents=True)
    assert "no metrics.jsonl in" in call("rlhf.doctor.__main__", tmp_path / "run").complaint
    assert "did you mean" in call("rlhf.doctor.__main__", tmp_path / "runs").complaint
    (tmp_path / "run" / "ppo" / "metrics.jsonl").write_text('{"step": 1}\n')
    assert "no figures of a stage" in call("rlhf.doctor.__main__", tmp_path / "run").complaint
    assert "required" in call("rlhf.doctor.__main__").complaint


def test_an_artefact_leads_to_the_run_that_made_it(finished: tuple[Path, Path], tmp_path: Path, call: Caller) -> None:
    """Catches: the log of another run, which has used the folder since, taken for the artefact's own."""
    registry, output = finished
    shown = call("rlhf.doctor.__main__", "ppo/toy", "--registry", registry)
    assert shown.code in (0, 1) and "ppo" in shown.out and "2 logged updates" in shown.out
    kept = (output / "ppo" / "tracking.json").read_text()
    try:
        (output / "ppo" / "tracking.json").write_text('{"run_id": "another"}')
        assert (
            "another run has logged there since"
            in call("rlhf.doctor.__main__", "ppo/toy", "--registry", registry).complaint
        )
        (output / "ppo" / "tracking.json").unlink()
        assert "holds no log any more" in call("rlhf.doctor.__main__", "ppo/toy", "--registry", registry).complaint
    finally:
        (output / "ppo" / "tracking.json").write_text(kept)
    assert "ppo/none" in call("rlhf.doctor.__main__", "ppo/none", "--registry", registry).complaint


def test_every_figure_that_a_check_needs_is_logged(finished: tuple[Path, Path]) -> None:
    """Catches: a check that waits for a figure under a name that no stage logs any more, and so never speaks."""
    logged = {
        name for stage in ("sft", "reward", "ppo") for name in _figures(finished[1] / stage / "metrics.jsonl")
    } | {"objective/gold", "objective/gold_correlation"}
    needed = {name.replace("STAGE/", f"{stage}/") for check in CHECKS for stage in check.stages for name in check.needs}
    assert {name for name in needed if not name.startswith("pretrain/")} - logged == set()


def _figures(file: Path) -> set[str]:
    return {name for line in file.read_text().splitlines() for name in json.loads(line)}


def test_toy_pipeline_has_a_health_panel(finished: tuple[Path, Path], tmp_path: Path) -> None:
    """Catches: a report without its panel, and evidence that is written into the page as HTML."""
    from rlhf.report.run_page import write_report

    shutil.copytree(finished[1], tmp_path / "out", ignore=shutil.ignore_patterns("checkpoints", "wandb"))
    write(tmp_path / "other" / "ppo", "ppo", "reward_constant")
    shutil.copy(tmp_path / "other" / "ppo" / "metrics.jsonl", tmp_path / "out" / "ppo" / "metrics.jsonl")
    samples = [{"step": 1, "prompt": f"user\nuser\n<b>{w}</b> {w}\nassistant\nassistant\n"} for w in "abcd"]
    _lines(tmp_path / "out" / "ppo" / "samples.jsonl", samples)
    page = write_report(tmp_path / "out").read_text(encoding="utf-8")
    assert '<h2 id="health">Health</h2>' in page
    assert "reward constant" in page and "spread of the scores 0" in page and "template twice" in page

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

from rlhf.doctor import statements
from rlhf.doctor.diagnosis import INHERITED, Diagnosis, diagnose, read_history, sort_out
from rlhf.doctor.finding import Finding
from rlhf.doctor.health.findings import CHECKS, replay
from rlhf.doctor.review.answer_limits import ANSWER_LIMITS
from rlhf.doctor.statements import Statement

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
    found = {one.stage: [finding.name for finding in one.findings] for one in diagnose(tmp_path)}
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
    assert one.findings[0].name == "reward_constant" and one.updates == UPDATES
    assert read_history(folder).settings == {}


def test_users_errors(tmp_path: Path, call: Caller) -> None:
    """Catches: a traceback, or exit code 1, which means findings."""
    (tmp_path / "run" / "ppo").mkdir(parents=True)
    assert "no metrics.jsonl in" in call("rlhf.doctor.__main__", tmp_path / "run").complaint
    assert "did you mean" in call("rlhf.doctor.__main__", tmp_path / "runs").complaint
    (tmp_path / "run" / "ppo" / "metrics.jsonl").write_text('{"step": 1}\n')
    assert "no figures of a stage" in call("rlhf.doctor.__main__", tmp_path / "run").complaint
    assert "required" in call("rlhf.doctor.__main__").complaint


def wrong(part: Any, name: str, *explains: str, severity: Any = "critical", step: int = 0) -> Statement:
    return Statement(
        part=part, name=name, passed=False, measured=f"{name} 2, not 1", severity=severity, cause=f"{name} is off",
        action=f"mend {name}", explains=list(explains), step=step,
    )  # fmt: skip


def right(part: Any, name: str, measured: str = "1", step: int = 0) -> Statement:
    return Statement(part=part, name=name, passed=True, measured=measured, step=step)


def symptoms(*checks: str) -> list[Finding]:
    """Findings of sick runs, together."""
    changed = {name: course for check in checks for name, course in SICK[check][1].items()}
    return [finding for finding in replay(run("ppo", changed)) if finding.name in checks]


def order(findings: list[Finding]) -> list[str]:
    return [f"{f.name} < {f.explained_by}" if f.explained_by else f.name for f in findings]


def test_causes_stand_before_the_symptoms_that_they_explain() -> None:
    """Catches: a symptom named before the fault that an audit confirmed, and one that is shown as a cause of its own."""
    seen = symptoms("kl_jump", "length_up", "value_useless")
    rows = [
        wrong("review", "gamma", "value_useless"),
        wrong("audit", "token_rewards", "kl_jump", step=1),
        wrong("audit", "token_rewards", "kl_jump", step=11),
    ]
    findings = sort_out(seen, rows)
    # length_up follows from the audit's fault by way of kl_jump
    expected = [
        "token_rewards",
        "kl_jump < token_rewards",
        "length_up < token_rewards",
        "gamma",
        "value_useless < gamma",
    ]
    assert order(findings) == expected
    assert (findings[0].first, findings[0].last, findings[0].kind) == (1, 11, "audit")
    assert findings[0].evidence == "token_rewards 2, not 1" and findings[0].cause == "token_rewards is off"
    assert findings[0].action == "mend token_rewards"


def test_what_is_confirmed_and_critical_comes_first() -> None:
    """Catches: a warning about an option, which explains nothing, before a symptom that is critical, and notes as findings."""
    rows = [
        wrong("review", "batch", severity="warning"),
        wrong("review", "updates", "length_up", severity="warning"),
        wrong("investigation", "reward_length"),
        wrong("review", "empty"),
        wrong("audit", "values", step=1),
        wrong("review", "lora_rank", severity="note"),
    ]
    seen = symptoms("reward_constant", "length_up", "cut_off")
    expected = [
        "values",
        "empty",
        "updates",
        "length_up < updates",
        "reward_length",
        "reward_constant",
        "batch",
        "cut_off",
    ]
    assert order(sort_out(seen, rows)) == expected


def test_a_symptom_whose_causes_are_all_excluded_comes_last() -> None:
    """Catches: a cause that the audit excludes offered all the same, and one excluded by what was not examined."""
    history = run("ppo", {**SICK["advantages_not_centred"][1], **SICK["length_up"][1]})
    rows = [
        right("audit", "whitened_advantages", step=1),
        right("audit", "advantages", "not examined: no values", step=1),
    ]
    findings = sort_out(replay(history, passed=statements.passed(rows)), rows)
    assert order(findings) == ["length_up", "advantages_not_centred"]
    assert findings[1].causes == () and "its usual causes are excluded" in findings[1].cause
    assert "audit:whitened_advantages" in findings[1].cause
    assert any("advantages that favour the end" in cause for cause in findings[0].causes)
    doubted = statements.passed([*rows, wrong("audit", "whitened_advantages", step=11)])
    assert doubted == frozenset(), "right at one update and wrong at another"


def summary(findings: list[Finding], rows: list[Statement]) -> str:
    return Diagnosis(
        stage="ppo", updates=UPDATES, checks=1, findings=findings, left_out=[], statements=statements.newest(rows)
    ).summary


def test_the_summary_says_what_is_established_and_what_is_likely() -> None:
    """Catches: a guess told as a fact, and parts of the doctor that found nothing wrong and are not mentioned."""
    sound = [
        *(right("audit", name, step=step) for name in ("values", "returns") for step in (1, 11)),
        right("audit", "scores", "not examined: an endpoint", step=11),
        *(right("review", name) for name in ("gamma", "lam", "empty")),
    ]
    base = "computation confirmed (2 quantities at updates 1 and 11); inputs sound (3 looked at)"
    assert summary([], sound) == f"{base}; no symptoms"
    seen = symptoms("cut_off")
    assert summary(seen, sound) == (
        f"{base}; most likely an SFT model that never learned to stop, a response_length that is too low or a stop token "
        f"that is not the model's ({seen[0].evidence})"
    )
    two = symptoms("cut_off", "value_useless")
    two = [f for f in two if not f.explained_by]
    assert summary(two, sound).startswith(
        f"{base}; most likely an SFT model that never learned to stop ({two[0].evidence})"
    )
    rows = [*sound, wrong("audit", "advantages", step=1)]
    told = summary(sort_out(seen, rows), rows)
    assert told.startswith("computation wrong in advantages, 2 quantities confirmed; inputs sound")
    assert told.endswith("; not explained by that: cut_off")
    assert "inputs not sound: gamma" in summary([], [*sound, wrong("review", "gamma")])
    tried = [right("investigation", "reward_length"), wrong("investigation", "update_direction")]
    assert summary([], tried[:1]) == "experiments confirm no fault (1 made); no symptoms"
    assert summary(sort_out([], tried), tried) == "experiments confirm update_direction"


def test_the_table_shows_causes_and_what_follows(tmp_path: Path, call: Caller) -> None:
    """Catches: statements in a run's folder that the command does not read, and a JSON that lacks them."""
    folder = write(tmp_path / "ppo", "ppo", "kl_jump")
    statements.append(
        folder, [wrong("audit", "token_rewards", "kl_jump", step=1), wrong("review", "rank", severity="note")]
    )
    shown = call("rlhf.doctor.__main__", tmp_path)
    words = " ".join(shown.out.replace("│", " ").split())
    assert shown.code == 1 and "Start with token_rewards" in words and "explained by" in words
    assert "note: rank: rank 2, not 1" in words
    told = call("rlhf.doctor.__main__", tmp_path, "--json")
    (stage,) = json.loads(told.out)
    assert told.code == 1 and [f["name"] for f in stage["findings"]] == ["token_rewards", "kl_jump"]
    assert stage["summary"] == "computation wrong in token_rewards" and stage["statements"][1]["name"] == "rank"


def test_what_a_stage_inherits_of_the_review() -> None:
    """Catches: a limit on answers that the diagnosis does not know as one."""
    assert INHERITED["review"] == {limit.name for limit in ANSWER_LIMITS}


@pytest.mark.parametrize("severity", ["critical", "warning"])
def test_a_cause_in_an_earlier_stage_explains_what_follows(severity: str, tmp_path: Path, call: Caller) -> None:
    """Catches: three stages with a cause each, where all begins in the first; and a machine, or a warning, blamed on it."""
    sft = write(tmp_path / "sft", "sft")
    statements.append(sft, [wrong("review", "empty", "loss_rising", severity=severity)])
    write(tmp_path / "reward", "reward")
    ppo = write(tmp_path / "ppo", "ppo", "cut_off", "length_down", "slowing_down", "wrong_reference")
    statements.append(ppo, [wrong("review", "unfinished", "cut_off"), wrong("review", "gamma")])
    *_, last = diagnose(tmp_path)
    own = ["gamma", "wrong_reference", "kl_high < wrong_reference", "slowing_down"]
    if severity == "warning":
        assert "sft" not in last.summary and "unfinished" in order(last.findings)
        return
    inherited = ["unfinished < sft: empty", "cut_off < unfinished", "length_down < sft: empty"]
    assert order(last.findings) == [*own, *inherited]
    assert [last.cause(f) for f in last.findings if f.name == "cut_off"] == ["explained by unfinished"]
    assert [last.cause(f) for f in last.findings if f.name == "length_down"] == ["may follow from sft: empty"]
    assert last.summary.endswith("unfinished and length_down may follow from sft: empty, start there")
    shown = " ".join(call("rlhf.doctor.__main__", tmp_path).out.replace("│", " ").split())
    assert "It begins in sft: start with empty there." in shown
    assert "begins" not in call("rlhf.doctor.__main__", tmp_path / "ppo").out


def test_notes_are_no_findings(tmp_path: Path, call: Caller) -> None:
    """Catches: exit code 1 for something that is only worth reading."""
    folder = write(tmp_path / "ppo", "ppo")
    statements.append(folder, [wrong("review", "rank", severity="note"), right("review", "gamma")])
    shown = call("rlhf.doctor.__main__", tmp_path)
    assert shown.code == 0 and "nothing found" in shown.out and "inputs sound (1 looked at)" in shown.out


def test_experiments_are_offered_where_causes_remain(tmp_path: Path, call: Caller) -> None:
    """Catches: an offer to try what is confirmed, or was tried already."""
    folder = write(tmp_path / "ppo", "ppo", "cut_off")
    assert "rlhf doctor investigate" in call("rlhf.doctor.__main__", tmp_path).out
    statements.append(folder, [right("investigation", "endings")])
    assert "rlhf doctor investigate" not in call("rlhf.doctor.__main__", tmp_path).out


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

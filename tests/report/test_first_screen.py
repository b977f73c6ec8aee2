"""The first screen: an honest verdict from the figures, examples chosen by rule, and pages of half a run or of one stage."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from registry.test_registry import FIELDS, publish
from report.test_run_page import made_up_card, made_up_results, made_up_run, write_jsonl
from toys import Call

from rlhf.base.errors import UserError
from rlhf.registry import Registry
from rlhf.report import compare_first, first_screen, samples
from rlhf.report.run_folder import RunFolder, read_parents, read_run
from rlhf.report.run_page import write_report


def screen_of(page: str) -> str:
    """The text of the first screen."""
    header = page.split("<header>")[1].split("</header>")[0]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", header))


def ppo_run(**figures: Any) -> RunFolder:
    return RunFolder(Path("run"), results={"ppo": {**made_up_results()["ppo"], **figures}})


@pytest.mark.parametrize(
    ("figures", "level", "words"),
    [
        ({}, "good", "made the answers better, by its reward model and by the independent judge"),
        ({"gold_positive_after": 0.41}, "bad", "a sign of over-optimisation"),
        ({"gold_positive_after": None}, "mixed", "raised the reward model's score"),
        ({"score_after": -0.12}, "bad", "did not raise the reward model's score"),
        ({"score_before": None}, "open", "not measured"),
    ],
)
def test_the_verdict_follows_the_figures(figures: dict[str, Any], level: str, words: str) -> None:
    """Bug: praise for a score that rose alone, or for one that did not move."""
    run = ppo_run(**figures)
    run.places = {"ppo": run.folder}
    outcome = first_screen.verdict(run, [])
    assert (outcome.level, words in outcome.title) == (level, True), outcome


def test_costs_and_doubts_are_named(tmp_path: Path) -> None:
    """Bug: a verdict without its price, or one that is silent about a reward model with warnings."""
    run = ppo_run(length_after=26.0, distinct2_after=0.71, stop_rate_before=0.94, stop_rate_after=0.90)
    run.places = {"ppo": run.folder}
    outcome = first_screen.verdict(run, [])
    costs = " ".join(outcome.cost)
    assert "6.4 nats" in costs and "13% longer" in costs and "83.0% → 71.0%" in costs and "9 min of training" in costs
    assert "Fewer answers end by themselves: 94.0% → 90.0%" in costs
    run.figures("ppo")["length_after"] = run.figures("ppo")["length_before"] * 1.09
    assert "longer" not in " ".join(first_screen.verdict(run, []).cost)
    run.reward_card = made_up_card()
    outcome = first_screen.verdict(run, [])
    assert outcome.badge == "Better, with doubts" and "1 warning: thanks" in " ".join(outcome.doubts)


def test_findings_of_the_doctor_are_doubts(tmp_path: Path) -> None:
    """Bug: a page that calls a run better whose learning rate was 0."""
    run = made_up_run(tmp_path)
    assert screen_of(write_report(run).read_text(encoding="utf-8")).count("learning rate zero") == 0
    rows = [json.loads(line) for line in (run / "ppo" / "metrics.jsonl").read_text().splitlines()]
    write_jsonl(run / "ppo" / "metrics.jsonl", [{**row, "ppo/lr": 0.0} for row in rows])
    screen = screen_of(write_report(run).read_text(encoding="utf-8"))
    assert "PPO: learning rate zero (learning rate 0 in all" in screen and "Better, with doubts" in screen


def test_examples_are_the_quartiles_of_the_gain() -> None:
    """Bug: the three best answers are shown as if they were typical."""
    rows = [
        {"prompt": f"p{gain}", "sft_response": "a", "ppo_response": "b", "sft_score": 1.0, "ppo_score": 1.0 + gain}
        for gain in (8, 3, 0, 6, 1, 7, 2, 5, 4)
    ]
    run = RunFolder(Path("run"), samples=[*rows, {"prompt": "unscored"}])
    chosen = samples.examples(samples.own_samples(run))
    assert [example.prompt for example in chosen] == ["p2", "p4", "p6"]
    assert [answer.label for answer in chosen[0].answers] == ["SFT", "PPO"] and chosen[0].answers[1].gain == 2
    run.samples = rows[:3]
    assert len(samples.examples(samples.own_samples(run))) == 3
    run.samples = []
    assert samples.examples(samples.own_samples(run)) == []
    run.samples = [{**rows[0], "ppo_response": "x" * 2000}]
    assert len(samples.examples(samples.own_samples(run))[0].answers[1].text) < 420


def test_the_screen_says_task_model_and_four_figures(tmp_path: Path) -> None:
    """Bug: a reader does not learn what the model was trained for, nor which model."""
    run = made_up_run(tmp_path)
    manifest = {"name": "demo", "version": 1, "base_model": "org/small", "config": {"gold": "mine:helpful"}}
    (run / "ppo" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    page = write_report(run).read_text(encoding="utf-8")
    screen = screen_of(page)
    for text in (
        "org/small",
        "Answer prompts such as “",
        "so that a reward model of people&#39;s",
        "film reviews",
    ):
        assert text in screen, text
    names = re.findall(r'<div class="name">([^<]*)</div><div class="value">([^<]*)<', page)
    assert names == [("Reward score", "0.81"), ("Positive, by helpful", "78.0%"), ("KL from SFT", "6.4 nats"),
                     ("Length in tokens", "26.8")]  # fmt: skip
    assert page.count('class="trio"') == 3 and "lower quartile, the median and the upper quartile" in screen
    assert "VADER" not in page.split('id="plotly"')[0]


def test_held_out_prompts_that_were_trained_on_do_not_open_the_page(tmp_path: Path) -> None:
    """Bug: a page opens with an overlap in a stage whose figures it does not lead with, or hides one that it does."""
    run = made_up_run(tmp_path)

    def overlap(stage: str) -> str:
        data = {
            "overlap": {
                "by": "answers" if stage == "sft" else "prompts",
                "held_out": 9,
                "in_training": {"its own data": 4},
            }
        }
        (run / stage / "manifest.json").write_text(json.dumps({"name": "d", "version": 1, "data": data}))
        return write_report(run).read_text(encoding="utf-8")

    words = "4 of the 9 held-out {} of its {} stage"
    page = overlap("sft")
    assert words.format("rows", "sft") in page.split('id="dataset"')[1] and words.format(
        "rows", "sft"
    ) not in screen_of(page)
    assert words.format("prompts", "ppo") in screen_of(overlap("ppo"))


def stage_by_hand(folder: Path, registry: Registry, stage: str, parents: list[Any], **metrics: Any) -> Any:
    """A stage that was run alone, in an output folder of its own."""
    config = {**FIELDS["config"], "output_dir": str(folder), "registry": str(registry.root)}
    fields = {"config": config, "metrics": metrics, "wandb_run_id": f"run{stage}", "recipe": stage}
    artifact = publish(registry, stage, parents, **fields)
    write_jsonl(folder / stage / "metrics.jsonl", [{"step": s, f"{stage}/loss": 3.0 - s / 9} for s in range(1, 9)])
    (folder / stage / "tracking.json").write_text(
        json.dumps({"run_id": f"run{stage}", "stage": stage, "config": config})
    )
    shutil.copy(artifact.path / "manifest.json", folder / stage)
    return artifact


def test_stages_run_by_hand_are_joined_through_the_registry(tmp_path: Path) -> None:
    """Bug: no page without results.json; a reward model trained elsewhere is missing, or another version is shown."""
    registry = Registry(tmp_path / "registry")
    sft = stage_by_hand(tmp_path / "a", registry, "sft", [], eval_loss_before=4.0, eval_loss_after=3.0, seconds=10.0)
    stage_by_hand(tmp_path / "b", registry, "reward", [sft], accuracy=0.8, accuracy_low=0.7, seconds=10.0)
    alone = write_report(tmp_path / "b" / "reward").read_text(encoding="utf-8")
    assert "The reward model ranks 80.0% of held-out pairs as people do" in screen_of(alone)
    assert 'id="stage-sft"' in alone and "sft/demo@1" in alone and "SFT loss" in alone and 'id="stage-ppo"' not in alone
    assert "missing from this report" not in alone
    half = write_report(tmp_path / "a").read_text(encoding="utf-8")
    assert "SFT lowered its held-out loss from 4 to 3; the reward model and PPO are still to come" in screen_of(half)
    assert "Reward model: no folder reward" in half and 'id="stage-ppo" class="todo"' in half
    (tmp_path / "a" / "sft" / "tracking.json").write_text(json.dumps({"run_id": "another", "stage": "sft"}))
    run = read_run(tmp_path / "b" / "reward")
    read_parents(run)
    assert run.figures("sft")["eval_loss_after"] == 3.0 and "sft" not in run.metrics, (
        "that folder holds another run's log"
    )
    (registry.root / "sft" / "demo" / "v1" / "manifest.json").write_text("{}")
    run = read_run(tmp_path / "b" / "reward")
    read_parents(run)
    assert run.stages == ["reward"], "a manifest with another hash is no parent"


def test_a_run_that_is_still_training_says_so(tmp_path: Path) -> None:
    """Bug: a traceback, or an empty page, before the first stage has finished."""
    write_jsonl(tmp_path / "run" / "sft" / "metrics.jsonl", [{"step": s, "sft/loss": 3.0} for s in range(1, 9)])
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "No stage has finished yet" in screen_of(page) and "no result yet, 8 updates logged" in page
    (tmp_path / "nothing" / "sft").mkdir(parents=True)
    with pytest.raises(UserError, match="no stage has logged anything"):
        write_report(tmp_path / "nothing")


def test_a_single_stage_needs_only_its_folder(tmp_path: Path, call: Callable[..., Call]) -> None:
    """Bug: the command wants results.json."""
    write_jsonl(tmp_path / "run" / "sft" / "metrics.jsonl", [{"step": s, "sft/loss": 3.0} for s in range(1, 9)])
    done = call("rlhf.report.__main__", tmp_path / "run" / "sft")
    assert done.code == 0 and done.out.strip() == str(tmp_path / "run" / "sft" / "report.html")
    page = (tmp_path / "run" / "sft" / "report.html").read_text(encoding="utf-8")
    assert "SFT is still to come" in screen_of(page) and "Reward model" not in screen_of(page)


def compared_run(label: str, gold: float | None, scores: list[float]) -> RunFolder:
    figures = {**made_up_results()["ppo"], "gold_positive_after": gold, "score_after": sum(scores) / len(scores)}
    rows = [{"prompt": str(n), "sft_score": 0.0, "ppo_score": score} for n, score in enumerate(scores)]
    return RunFolder(Path(label), label=label, results={"ppo": figures}, samples=rows)


def test_several_runs_are_ranked_by_the_judge_and_doubted_where_chance_suffices() -> None:
    """Bug: the higher score wins though the judge prefers the other; a difference within its noise is called a lead."""
    a, b = compared_run("a", 0.7, [1.0, 1.1, 0.9, 1.0] * 5), compared_run("b", 0.8, [0.5, 0.4, 0.6, 0.5] * 5)
    outcome = compare_first.compared_verdict([a, b], {}, [], False)
    assert outcome.title.startswith("b is ahead in positive answers") and "80.0% against 70.0% of a" in outcome.title
    a, b = compared_run("a", None, [1.0, 1.1, 0.9, 1.0] * 5), compared_run("b", None, [0.5, 0.4, 0.6, 0.5] * 5)
    outcome = compare_first.compared_verdict([a, b], {}, [], False)
    assert outcome.title.startswith("a is ahead in reward model's score") and outcome.badge == "Ahead"
    assert "Score of a over b on the same prompts: 0.5 (95% " in outcome.better[0]
    close = compared_run("c", None, [1.0, 1.2, 0.7, 1.05] * 5)
    outcome = compare_first.compared_verdict([a, close], {}, [], False)
    assert outcome.badge == "Ahead, with doubts" and "chance can explain" in outcome.doubts[0]
    assert compare_first.compared_verdict([a, b], {}, ["other prompts"], True).title == "These runs cannot be ranked"
    assert "No run is ahead" in compare_first.compared_verdict([a, a], {}, [], False).title
    sft = RunFolder(Path("s"), label="s", results={"sft": {"eval_loss_after": 3.0}})
    assert "they end at PPO and SFT" in compare_first.compared_verdict([a, sft], {}, [], False).title
    better = RunFolder(Path("t"), label="t", results={"sft": {"eval_loss_after": 2.5}})
    assert compare_first.compared_verdict([sft, better], {}, [], False).title.startswith("t is ahead in held-out loss")

"""The page that compares runs: what differs comes first, nothing is compared that cannot be, and every figure has a source."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from registry.test_registry import FIELDS, publish
from report.browser import browser, opened
from report.test_run_page import made_up_card, made_up_results, without_plotly, write_jsonl
from toys import Call

from rlhf.registry import Artifact, Registry
from rlhf.report.compare_lineage import BOX_WIDTH, Edge, Node, draw_lineage, lineage
from rlhf.report.compare_page import write_comparison
from rlhf.report.run_folder import RunFolder, labels
from rlhf.run.metrics import reward_kl_points, shown

ATTACK = '</script><script>document.title="owned"</script>'


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


@pytest.fixture
def reward(registry: Registry) -> tuple[Artifact, Artifact]:
    """The SFT policy and the reward model that the runs share."""
    sft = publish(registry)
    return sft, publish(registry, "reward", [sft])


def made_up_run(folder: Path, registry: Registry, parents: tuple[Artifact, ...], **options: Any) -> Path:
    """A finished PPO run; `kl_coef` decides how far it went."""
    kl_coef = options.setdefault("kl_coef", 0.1)
    config = {
        **FIELDS["config"],
        "reward": ["reward/demo@1"],
        "dataset": "outputs/demo/data",
        "output_dir": str(folder),
        **options,
    }
    artifact = publish(registry, "ppo", list(parents), config=config, wandb_run_id=f"run{folder.name}")
    results = made_up_results()
    results["artifacts"] = {"ppo": {"reference": artifact.reference, "hash": artifact.hash}}
    results["ppo"]["kl"] = 1 / kl_coef
    place = folder / "ppo"
    write_jsonl(place / "metrics.jsonl", [
        {"step": s, "episodes": 64 * s, "objective/score": 1 - math.exp(-s / 5), "objective/kl": s / 10 / kl_coef,
         "objective/entropy": 3 - s / 20, "response/length": 20 + s, "ppo/ratio_max": 1.5} for s in range(1, 25)
    ])  # fmt: skip
    write_jsonl(place / "comparison.jsonl", [
        {"prompt": f"Write about {i}", "sft_response": f"plain {i}", "ppo_response": f"{folder.name} says {i}",
         "sft_score": 0.0, "ppo_score": (i - 3) * kl_coef * 10} for i in range(8)
    ])  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    record = {
        "run_id": f"run{folder.name}",
        "stage": "ppo",
        "name": "demo-ppo",
        "group": "demo",
        "config": config,
        "inputs": {},
    }
    (place / "tracking.json").write_text(json.dumps(record))
    shutil.copy(artifact.path / "manifest.json", place)
    (folder / "reward").mkdir()
    (folder / "reward" / "card.json").write_text(json.dumps(made_up_card()))
    return folder


@pytest.fixture
def runs(tmp_path: Path, registry: Registry, reward: tuple[Artifact, Artifact]) -> list[Path]:
    return [
        made_up_run(tmp_path / "cheap", registry, reward, kl_coef=0.05, learning_rate=1e-4),
        made_up_run(tmp_path / "dear", registry, reward, kl_coef=0.2, learning_rate=1e-4),
    ]


def made_up_evaluation(folder: Path) -> Path:
    """What `python -m rlhf.evaluation` writes, cut down to two models."""

    def figure(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.1, "high": value + 0.1}

    points = [
        {"model": f"cheap:{u}", "run": "cheap", "update": u, "kl": figure(u), "sqrt_kl": u**0.5,
         "score": figure(u / 4), "score_gain": figure(u / 4), "gold": {"vader": figure(0.2)}, "gold_gain": {"vader": figure(0.2)}}
        for u in (1, 4, 9)
    ]  # fmt: skip
    content = {
        "format": 1, "prompts": {"fingerprint": "f00d"}, "reference": "sft/demo@1", "baseline": "sft/demo@1",
        "reward": "reward/demo@1", "gold": {"vader": "rlhf.evaluation.gold:vader"}, "marks": [],
        "models": [
            {"name": "sft/demo@1", "stage": "sft", "hash": "a" * 64, "run_id": "runs", "marks": [], "overlap": {},
             "figures": {"score": figure(0.1), "kl": figure(0.0)}},
            {"name": "ppo/demo@1", "stage": "ppo", "hash": "b" * 64, "run_id": "runp", "overlap": {"ppo/demo@1": 2},
             "marks": ["2 of 8 prompts are among those that ppo/demo@1 was trained on"],
             "figures": {"score": figure(1.4), "kl": figure(6.0), "base_perplexity": None}},
        ],
        "win_rates": [{"model": "ppo/demo@1", "baseline": "sft/demo@1", "judge": "vader", "kind": "gold", **figure(0.83),
                       "pairs": 8, "wins": 6, "ties": 1, "losses": 1, "unjudged": 0, "sign_test": {"p": 0.0123},
                       "length_controlled": figure(0.71), "length_difference": 2.0}],
        "best_of_n": {
            "curve": [{"n": n, "kl": math.log(n) - (n - 1) / n, "score": figure(n / 9), "gold": {}} for n in (1, 2, 4)]
        },
        "frontier": {"points": points, "recommended": {"model": "cheap:4", "run": "cheap", "update": 4, "kl": 4.0,
                                                       "gold": "vader", "gain": figure(0.2), "fitted_gain": 0.2},
                     "fits": [{"run": "cheap", "scorer": "score", "form": "ppo", "a": 0.9, "b": 0.1}]},
    }  # fmt: skip
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps(content))
    write_jsonl(folder / "samples.jsonl", [
        {"number": i, "prompt": f"Judge {i}", "sample": s, "models": {
            "sft/demo@1": {"response": "before", "scores": {"score": 0.0}},
            "ppo/demo@1": {"response": f"after {i}.{s}", "scores": {"score": i / 2}}}}
        for i in range(4) for s in range(2)
    ])  # fmt: skip
    return folder


def content_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    content: dict[str, Any] = json.loads(found[1])
    return content


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", without_plotly(page).split("<body>")[1].split('id="data"')[0]))


def page_of(folders: list[Path], tmp_path: Path, **options: Any) -> str:
    return write_comparison(folders, tmp_path / "page.html", **options).read_text(encoding="utf-8")


def test_what_differs_comes_first_and_nothing_else(runs: list[Path], tmp_path: Path) -> None:
    """Bug: the one option that differs is lost among fifty that do not, or folders and run ids count as differences."""
    page = page_of(runs, tmp_path)
    ids = re.findall(r'<h2 id="([\w-]+)"', page)
    assert ids == [
        "differences",
        "outcome",
        "frontier",
        "curves",
        "cards",
        "health",
        "answers",
        "lineage",
        "time",
        "sources",
    ]
    differences = page.split('id="differences"')[1].split("<details>")[0]
    assert re.findall(r"<tr><td>([^<]+)</td>", differences) == ["ppo · kl_coef"]
    assert ">0.05<" in differences and ">0.2<" in differences
    assert "learning_rate" in page.split("<details>")[1].split("</details>")[0]


def test_the_doctor_speaks_of_each_run_by_name(runs: list[Path], tmp_path: Path) -> None:
    """Bug: one run's sickness told of another, or of none; text out of a log read as markup."""
    rows = [json.loads(line) for line in (runs[1] / "ppo" / "metrics.jsonl").read_text().splitlines()]
    write_jsonl(runs[1] / "ppo" / "metrics.jsonl", [{**row, "ppo/lr": 0.0} for row in rows])
    health = page_of(runs, tmp_path).split('id="health"')[1].split("<h2")[0]
    well, sick = health.split("<b>dear, ppo</b>")
    assert "<b>cheap, ppo</b>" in well and "learning rate zero" not in well
    assert "learning rate zero" in sick and "learning rate 0 in all" in sick and "set learning_rate" in sick


def test_every_figure_has_a_source(runs: list[Path], tmp_path: Path) -> None:
    """Bug: a number on a page, and no way to tell which run and which weights it is of."""
    page = page_of([*runs, made_up_evaluation(tmp_path / "evaluation")], tmp_path)
    manifests = {json.loads((r / "results.json").read_text())["artifacts"]["ppo"]["hash"] for r in runs} | {
        "a" * 64,
        "b" * 64,
    }
    ids = {"runcheap", "rundear", "runs", "runp"}
    tables = re.findall(r"<table class=\"runs.*?</table>", page, re.S)
    heads = [re.findall(r'data-run="(\w*)" data-manifest="(\w*)"', table) for table in tables]
    assert len(tables) >= 7 and sum(not head for head in heads) == 1, "only the common settings are of all runs"
    assert all(run in ids and manifest in manifests for head in heads for run, manifest in head)
    for chart in content_of(page)["charts"]:
        assert chart["source"]
        for trace in chart["traces"]:
            for source in trace.get("sources", [trace]):
                known = source.get("run_id") in ids and source.get("manifest") in manifests
                assert (
                    known
                    or "best-of-n" in trace["name"]
                    or "log d" in trace["name"]
                    or source == {"run_id": "", "manifest": ""}
                )
    answers = re.findall(r'<div class="answer"[^>]*data-run="(\w+)"', page)
    assert answers and set(answers) <= ids
    sources = page.split('id="sources"')[1]
    assert all(run in sources for run in ("runcheap", "rundear")) and all(
        m in sources for m in manifests - {"a" * 64, "b" * 64}
    )


def test_an_evaluation_is_part_of_the_page(runs: list[Path], tmp_path: Path) -> None:
    """Bug: win rates without their interval, a recommended checkpoint or a mark that is in the file and not on the page."""
    page = page_of([*runs, made_up_evaluation(tmp_path / "evaluation")], tmp_path)
    text = text_of(page)
    for expected in (
        "83.0% (73.0–93.0)", "71.0% (61.0–81.0)", "6 / 1 / 1", "0.012", "1.4 (1.3 to 1.5)",
        "Recommended: cheap:4, update 4, KL 4 nats", "2 of 8 prompts are among those that ppo/demo@1 was trained on",
    ):  # fmt: skip
        assert expected in text, expected
    charts = {c["title"]: c for c in content_of(page)["charts"] if c["section"] == "frontier"}
    assert list(charts) == [
        "Score over the square root of KL", "Gain in score over the SFT policy", "Gain in gold/vader over the SFT policy",
    ]  # fmt: skip
    measured, fit, best = charts["Gain in score over the SFT policy"]["traces"]
    assert measured["x"] == [1.0, 2.0, 3.0] and measured["y"] == [0.25, 1.0, 2.25]
    assert fit["y"][-1] == pytest.approx(3 * (0.9 - 0.1 * math.log(3)))
    assert best["y"][0] == 0 and best["x"][1] == pytest.approx((math.log(2) - 0.5) ** 0.5)
    assert "after 3.0" in text and "after 3.1" not in text, "the first sample of each prompt"
    assert "2 runs compared" in text, "an evaluation is no run"
    alone = text_of(page_of([tmp_path / "evaluation"], tmp_path)).split("Measured on held-out prompts")[0]
    assert "An evaluation without a run" in alone and "Recommended: cheap:4" in alone and "still to come" not in alone


def test_runs_that_cannot_be_compared_are_refused(
    runs: list[Path], registry: Registry, tmp_path: Path, call: Callable[..., Call]
) -> None:
    """Bug: two scores side by side that two reward models gave, or to other prompts: the higher one looks better."""
    sft = registry.read("sft/demo")
    other = made_up_run(tmp_path / "other", registry, (sft, publish(registry, "reward", [sft], recipe="other")))
    out = tmp_path / "page.html"
    refused = call("rlhf.report.__main__", *runs, other, "-o", out)
    assert "different reward models" in refused.complaint and "--force" in refused.complaint and not out.exists()
    assert call("rlhf.report.__main__", *runs, other, "-o", out, "--force").code == 0
    page = out.read_text()
    assert "different reward models" in page and '<th class="n unequal"' in page
    rows = [json.loads(line) for line in (runs[1] / "ppo" / "comparison.jsonl").read_text().splitlines()]
    write_jsonl(runs[1] / "ppo" / "comparison.jsonl", [{**row, "prompt": f"Other {row['prompt']}"} for row in rows])
    assert "different held-out prompts" in call("rlhf.report.__main__", *runs, "-o", out).complaint
    assert "unequal" not in page_of(runs[:1], tmp_path).split("<body>")[1]


def test_a_corrupt_run_does_not_take_the_others_with_it(runs: list[Path], tmp_path: Path) -> None:
    """Bug: one half-written file and no page at all; or a run that is left out in silence."""
    broken = tmp_path / "broken"
    shutil.copytree(runs[0], broken)
    (broken / "results.json").write_text('{"ppo": {')
    (broken / "ppo" / "manifest.json").write_bytes(b"\xff\xfe")
    (broken / "ppo" / "tracking.json").write_text("[]")
    (broken / "reward" / "card.json").write_text("nul")
    with (broken / "ppo" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "objec')
    empty = tmp_path / "empty"
    (empty / "ppo").mkdir(parents=True)
    text = text_of(page_of([*runs, broken, empty], tmp_path))
    assert "4 runs compared" in text
    for line in (
        "broken: results.json is not readable as JSON", "broken: manifest.json of its ppo stage is corrupt",
        "broken: ppo/tracking.json holds a list", "broken: ppo/metrics.jsonl: 1 unreadable line left out",
        "broken: reward/card.json is not readable as JSON", "empty: ppo/metrics.jsonl is not there", "no readable manifest of",
    ):  # fmt: skip
        assert line in text, line
    assert "cheap says 0" in text and "dear says 0" in text


def test_folders_that_hold_no_run_are_the_users_error(
    runs: list[Path], tmp_path: Path, call: Callable[..., Call]
) -> None:
    """Bug: a mistyped folder is a traceback, or an empty column."""
    out = tmp_path / "page.html"
    assert f"did you mean '{runs[0]}'" in call("rlhf.report.__main__", tmp_path / "chep", runs[1], "-o", out).complaint
    (tmp_path / "nothing").mkdir()
    assert "holds no run" in call("rlhf.report.__main__", tmp_path / "nothing", runs[1], "-o", out).complaint
    assert "-o FILE" in call("rlhf.report.__main__", *runs).complaint


def test_a_run_that_was_judged_on_its_training_prompts_is_marked(
    tmp_path: Path, registry: Registry, reward: tuple[Artifact, Artifact]
) -> None:
    """Bug: the best run is the one that knew the questions."""
    run = made_up_run(tmp_path / "leaky", registry, reward)
    manifest = json.loads((run / "ppo" / "manifest.json").read_text())
    manifest["data"]["overlap"] = {
        "held_out": 8,
        "in_training": {"its own data": 0, "sft/demo@1": 3, "reward/demo@1": None},
    }
    (run / "ppo" / "manifest.json").write_text(json.dumps(manifest))
    marks = page_of([run], tmp_path).split('class="marks"')[1].split("</details>")[0]
    assert "3 of the 8 held-out prompts of its ppo stage" in marks and "sft/demo@1" in marks
    assert "reward/demo@1" not in marks and "its own data" not in marks


def test_model_output_is_escaped(runs: list[Path], tmp_path: Path) -> None:
    """Bug: a </script> in an answer, a label or an option ends the page's own script."""
    rows = [json.loads(line) for line in (runs[0] / "ppo" / "comparison.jsonl").read_text().splitlines()]
    rows[0]["ppo_response"] = ATTACK
    write_jsonl(runs[0] / "ppo" / "comparison.jsonl", rows)
    record = json.loads((runs[0] / "ppo" / "manifest.json").read_text())
    record["config"]["gold"] = ATTACK
    (runs[0] / "ppo" / "manifest.json").write_text(json.dumps(record))
    page = page_of(runs, tmp_path)
    assert ATTACK not in page and "<script>document" not in page and "&lt;script&gt;document" in page


def test_ten_long_runs_fit_on_a_page(tmp_path: Path, registry: Registry, reward: tuple[Artifact, Artifact]) -> None:
    """Bug: a page that nobody can mail; plotly.js embedded once a plot, or every point of every run."""
    names = [metric.name for metric in shown("comparison") if metric.stage == "ppo"]
    rows = [{"step": s, "episodes": s * 64, **dict.fromkeys(names, s * 0.123456789)} for s in range(1, 3001)]
    folders = []
    for number in range(10):
        folders.append(made_up_run(tmp_path / f"seed-{number}", registry, reward, seed=number))
        write_jsonl(folders[-1] / "ppo" / "metrics.jsonl", rows)
        said = [{"prompt": f"p{i}", "sft_response": "word " * 400, "ppo_response": f"{number} " * 400, "sft_score": 0.1,
                 "ppo_score": 0.2} for i in range(60)]  # fmt: skip
        write_jsonl(folders[-1] / "ppo" / "comparison.jsonl", said)
    page = page_of(folders, tmp_path)
    assert len(page.encode()) < 5_000_000
    body = without_plotly(page).split("<body>")[1]
    assert not re.search(r"https?:|url\(|@import|<link|\bsrc=", body)
    assert len(re.findall(r'class="sample"', page)) == 40


def test_a_stage_of_its_own_is_a_run(runs: list[Path], tmp_path: Path) -> None:
    """Bug: somebody who ran only PPO has nothing to compare."""
    text = text_of(page_of([run / "ppo" for run in runs], tmp_path))
    assert "cheap/ppo" in text and "dear/ppo" in text and "cheap says 0" in text


def test_labels_are_the_shortest_that_tell_runs_apart() -> None:
    """Bug: two columns of the same name."""
    assert labels([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert labels([Path("/a/x/ppo"), Path("/a/y/ppo")]) == ["x/ppo", "y/ppo"]
    assert len(set(labels([Path("/a"), Path("/a")]))) == 2


def test_the_frontier_is_score_over_the_root_of_kl() -> None:
    """Bug: a negative estimate of a small KL becomes NaN, or the sampled KL is taken where the exact one is known."""
    rows = [
        {"step": 1, "objective/kl": -0.1, "objective/score": 0.0},
        {"step": 2, "objective/kl": 9.9, "objective/kl_full": 4.0, "objective/score": 0.5},
        {"step": 3, "objective/kl": 9.0, "objective/score": 0.7},
        {"step": 4, "objective/kl": None, "objective/score": 0.7},
    ]
    assert reward_kl_points(rows) == [
        {"step": 2.0, "sqrt_kl": 2.0, "score": 0.5},
        {"step": 3.0, "sqrt_kl": 3.0, "score": 0.7},
    ]


def test_what_runs_share_is_drawn_once(runs: list[Path], tmp_path: Path) -> None:
    """Bug: a reward model that two runs share looks like two; an arrow that ends nowhere."""
    drawing = page_of(runs, tmp_path).split('<svg class="lineage"')[1].split("</svg>")[0]
    titles = re.findall(r"<text x=\"10\" y=\"18\">([^<]+)</text>", drawing)
    assert sorted(titles) == ["data for ppo", "ppo/demo@1", "ppo/demo@2", "reward/demo@1", "sft/demo@1"]
    assert drawing.count("<path") == 2 * 3


def test_a_base_of_ones_own_is_drawn_once(tmp_path: Path, registry: Registry) -> None:
    """Bug: the pretrained base is left out as of no column, and appears as data instead."""
    pretrained = publish(registry, "pretrain", kind="full", base_model="gpt2 from scratch")
    sft = publish(registry, parents=[pretrained], base_model=pretrained.reference)
    run = RunFolder(tmp_path, manifests={"sft": {**json.loads(sft.manifest.to_json()), "hash": sft.hash}})
    nodes, edges = lineage([run])
    assert {(node.kind, node.title) for node in nodes} == {
        ("data", "data for sft"),
        ("pretrain", "pretrain/demo@1"),
        ("sft", "sft/demo@1"),
    }
    assert Edge(pretrained.hash, sft.hash) in edges and len(draw_lineage(nodes, edges)["paths"]) == 2


def test_boxes_do_not_touch_and_arrows_start_at_them() -> None:
    """Bug: boxes over one another; an edge to a node that is not there draws a line from the corner."""
    nodes = [Node(str(i), kind, "t", "d") for i, kind in enumerate(["data", "sft", "sft", "ppo"])]
    drawn = draw_lineage(nodes, [Edge("0", "1"), Edge("1", "3"), Edge("gone", "3")])
    assert len(drawn["paths"]) == 2
    boxes = {box["key"]: (box["x"], box["y"]) for box in drawn["boxes"]}
    assert boxes["1"][0] - boxes["0"][0] > BOX_WIDTH and abs(boxes["1"][1] - boxes["2"][1]) > 44
    assert drawn["paths"][0].startswith(f"M{boxes['0'][0] + BOX_WIDTH:g},")
    assert draw_lineage([], []) == {}


def test_in_a_browser_it_draws_zooms_sorts_and_fits_a_phone(runs: list[Path], tmp_path: Path) -> None:
    """Bug: a script error, plots that stay empty, an order that does not change, or a page wider than a phone."""
    file = write_comparison([*runs, made_up_evaluation(tmp_path / "evaluation")], tmp_path / "page.html")
    with browser() as own, opened(own, file, viewport={"width": 1280, "height": 800}) as page:
        for part in ("h1", ".task", ".ranks", ".trio >> nth=2", ".sides h2 >> nth=1"):
            box = page.locator(part).first.bounding_box()
            assert box and box["y"] + box["height"] <= 800, (part, box)
        charts = content_of(file.read_text())["charts"]
        assert page.evaluate("document.documentElement.dataset.drawn") == str(len(charts))
        score = next(i for i, c in enumerate(charts) if c["title"] == "Reward score")
        plot = page.locator(f'[data-plot="{score}"]')
        assert plot.locator(".js-line").count() == 2

        plot.scroll_into_view_if_needed()
        plot.locator(".nsewdrag").first.hover()
        hover = plot.locator(".hoverlayer")
        hover.locator("text").first.wait_for(state="attached")
        said = (hover.text_content() or "").replace("\xa0", " ")
        assert "cheap" in said and "run rundear" in said

        box = plot.locator(".nsewdrag").first.bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 20)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + box["height"] - 20, steps=5)
        page.mouse.up()
        low, high = page.evaluate(f"document.querySelector('[data-plot=\"{score}\"]').layout.xaxis.range")
        assert 1 < low < high < 24, "dragging zooms"

        page.select_option("#axis", "episodes")
        assert page.evaluate(f"document.querySelector('[data-plot=\"{score}\"]').data[0].x[1]") == 128
        page.click('[data-run-number="0"]')
        assert page.evaluate(f"document.querySelector('[data-plot=\"{score}\"]').data[0].visible") is False

        page.select_option("#sort", "-gain")
        assert "Judge 3" in page.locator(".sample").first.inner_text()
        page.select_option("#sort", "loss")
        assert "Judge 0" in page.locator(".sample").first.inner_text()
        page.fill("#search", "after 2.0")
        assert page.locator(".sample:visible").count() == 1
        page.fill("#search", "no such text")
        assert page.locator("#none").is_visible()

        page.set_viewport_size({"width": 390, "height": 844})
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.screenshot(path=tmp_path / "phone.png")
        assert (tmp_path / "phone.png").stat().st_size > 10_000


def test_the_page_of_a_real_pipeline(finished: tuple[Path, Path], tmp_path: Path, call: Callable[..., Call]) -> None:
    """Bug: a page made for files that the stages do not write, or not under these names."""
    out = tmp_path / "page.html"
    done = call("rlhf.report.__main__", finished[1], "-o", out)
    assert done.code == 0, done.err
    page = out.read_text()
    text = text_of(page)
    assert "Missing from this page" not in text and "Read with care" not in text, text[:800]
    registry = Registry(finished[0])
    for stage in ("sft", "reward", "ppo"):
        artifact = registry.read(f"{stage}/toy")
        assert artifact.hash in page and str(artifact.manifest.wandb_run_id) in page
        assert dataclasses.asdict(artifact.manifest)["data"]["overlap"]["in_training"]["its own data"] == 0
    titles = {chart["title"] for chart in content_of(page)["charts"]}
    assert {"Reward score", "SFT loss, held out", "Reward model's accuracy", "Time by phase"} <= titles

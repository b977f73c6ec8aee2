"""The report: complete when the run is, honest when it is not, and one file that needs no network."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf.base.errors import UserError
from rlhf.base.json_files import read_jsonl
from rlhf.report.card_page import write_card_page
from rlhf.report.charts import POINTS_PER_CURVE
from rlhf.report.run_folder import STAGES
from rlhf.report.run_page import print_results, write_report

ATTACK = '<script>document.title="owned"</script><img src=x onerror=alert(1)>'


def made_up_results() -> dict[str, Any]:
    return {
        "sft": {"eval_loss_before": 4.12, "eval_loss_after": 2.87, "seconds": 212.0},
        "reward": {
            "accuracy": 0.713, "accuracy_held_out_raters": 0.694, "human_ceiling": 0.762, "vader_accuracy": 0.668,
            "pairs": 12400, "seconds": 341.0,
        },
        "ppo": {
            "episodes": 1536, "updates": 24, "seconds": 540.0, "seconds_per_update": 22.5, "kl": 6.4,
            "score_before": -0.12, "score_after": 0.81, "gold_positive_before": 0.41, "gold_positive_after": 0.78,
            "gold_negative_before": 0.27, "gold_negative_after": 0.08, "reward_positive_before": 0.46,
            "reward_positive_after": 0.86, "distinct2_before": 0.83, "distinct2_after": 0.71, "length_before": 23.1,
            "length_after": 26.8, "stop_rate_after": 0.94,
        },
        "total_seconds": 1180.0, "peak_rss_gb": 2.34,
        "artifacts": {s: {"reference": f"{s}/demo@1", "hash": f"{i}c9f" * 16} for i, s in enumerate(STAGES)},
        "phases": [
            {"stage": s, "phase": p, "seconds": t, "peak_rss_gb": m}
            for s, p, t, m in (
                ("sft", "tokenize", 11.2, 0.9), ("sft", "train", 180.1, 1.6), ("sft", "evaluate", 20.7, 1.4),
                ("reward", "train", 301.0, 1.9), ("reward", "evaluate", 40.0, 1.7), ("ppo", "rollout", 311.0, 2.1),
                ("ppo", "score", 51.0, 2.2), ("ppo", "optimise", 160.0, 2.34), ("ppo", "evaluate", 18.0, 2.0),
            )
        ],
        "machine": {"cpu": "2 cores", "memory_gb": 7.8, "gpu": None, "python": "3.11.7", "torch": "2.9"},
        "created": "2026-11-21 10:02", "seed": 7,
    }  # fmt: skip


def made_up_card() -> dict[str, Any]:
    def share(value: float, width: float = 0.02) -> dict[str, Any]:
        return {"value": value, "low": value - width, "high": value + width, "pairs": 480, "prompts": 60}

    probe = {
        "name": "thanks",
        "gain": 0.61,
        "raised": 0.8,
        "tried": 24,
        "flagged": True,
        "finding": "scores higher",
        "example": {"prompt": "p", "answer": ATTACK, "answer_score": 0.1, "probe": "Thank you", "probe_score": 0.9},
    }
    return {
        "model": "reward/demo@1", "verdict": "reward/demo@1 is right in 71.3% of 480 held-out pairs",
        "flags": [{"name": "probe", "message": "thanks: scores 0.61 standard deviations higher"}],
        "accuracy": share(0.713), "accuracy_held_out_prompts": share(0.702), "accuracy_held_out_raters": share(0.694),
        "human_ceiling": share(0.762), "gold_accuracy": None,
        "rivals": [{"name": "bag of words", "accuracy": share(0.655), "gain": share(0.05), "beaten": True}],
        "calibration": {"bins": [{"confidence": 0.6, "right": 0.58, "pairs": 200},
                                 {"confidence": 0.9, "right": 0.8, "pairs": 280}],
                        "ece": 0.063, "temperature": 1.4, "nll": 0.6, "nll_fitted": 0.58, "pairs": 480},
        "slices": [{"slice": "length", "kind": "better one longer", **share(0.74)},
                   {"slice": "prompt", "kind": "new", "value": 0.7, "low": None, "high": None, "pairs": 3, "prompts": 1}],
        "length": {"correlation": 0.21, "label_correlation": 0.05, "balanced_accuracy": share(0.7),
                   "curve": [{"length": 4.0, "score": -0.2, "rating": 0.1}, {"length": 30.0, "score": 0.3, "rating": 0.1}]},
        "probes": [probe, {**probe, "name": "filler", "gain": -0.2, "flagged": False}],
        "samples": {"outside": 0.03, "histogram": {"edges": [-2.0, 0.0, 2.0], "samples": [0.4, 0.6], "training": [0.5, 0.5]},
                    "examples": [{"prompt": "p", "response": "low one", "score": -1.5}]},
        "left_out": {"train": {"empty response": {"count": 2, "rows": [3, 9]}}},
    }  # fmt: skip


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return made_up_run(tmp_path)


def made_up_run(tmp_path: Path) -> Path:
    """A finished run with figures that look like those of a real one."""
    rng = random.Random(0)

    def noise(size: float) -> float:
        return rng.gauss(0, size)

    (tmp_path / "results.json").write_text(json.dumps(made_up_results()), encoding="utf-8")
    sft = [{"step": s, "sft/loss": 2.8 + 1.6 * math.exp(-s / 30) + noise(0.05)} for s in range(1, 121)]
    sft += [{"step": s, "sft/eval_loss": 2.87 + 1.2 * math.exp(-s / 25)} for s in range(0, 121, 20)]
    write_jsonl(tmp_path / "sft" / "metrics.jsonl", sft)
    reward = [{"step": s, "reward/accuracy": 0.74 - 0.24 * math.exp(-s / 40) + noise(0.03)} for s in range(1, 161)]
    reward += [{"step": s, "reward/eval_accuracy": 0.713 - 0.2 * math.exp(-s / 40)} for s in range(0, 161, 40)]
    write_jsonl(tmp_path / "reward" / "metrics.jsonl", reward)
    ppo = []
    for s in range(1, 25):
        score, kl = 0.85 - 0.97 * math.exp(-s / 8) + noise(0.05), 6.4 * (1 - math.exp(-s / 10)) + noise(0.1)
        ppo.append({
            "step": s, "objective/score": score, "objective/rlhf_reward": score - 0.05 * kl, "objective/kl": kl,
            "objective/kl_k3": kl * 1.03 + noise(0.1), "objective/entropy": 62 - s * 0.6 + noise(0.5),
            "response/length": 23 + s * 0.15 + noise(0.4), "ppo/policy_loss": -0.01 + noise(0.004),
            "ppo/value_loss": 0.4 * math.exp(-s / 6) + 0.05, "ppo/explained_variance": 0.7 - 0.9 * math.exp(-s / 5),
        })  # fmt: skip
    write_jsonl(tmp_path / "ppo" / "metrics.jsonl", ppo)
    beginnings = (
        "This movie was",
        "I went to see it with my father and",
        "The plot",
        "After an hour",
        "Nobody told me that",
    )
    endings = ("a long evening, and the ending made little sense to me.",
               "wonderful from start to end. I loved every minute!",
               "full of good ideas,\nand the acting is warm and funny.", "not for me.")  # fmt: skip
    rows = []
    for i in range(60):
        before, after = noise(0.6), 0.8 + noise(0.5)
        rows.append({"prompt": f"{beginnings[i % 5]} ({i})", "sft_response": " " + endings[i % 4],
                     "ppo_response": " " + endings[(i + 1) % 3], "sft_score": before, "ppo_score": after})  # fmt: skip
    rows[0]["ppo_response"] = ATTACK
    rows[0]["prompt"] = "</script><script>alert(2)</script> this film"
    write_jsonl(tmp_path / "ppo" / "comparison.jsonl", rows)
    card = {"source": "film reviews", "sft": {"train": 4000, "validation": 400},
            "pairs": {"train": 12400, "validation": 800}, "prompts": {"train": 3000, "validation": 512},
            "dropped": {"empty": 12, "too_long": 87, "duplicate": 31}}  # fmt: skip
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "card.json").write_text(json.dumps(card), encoding="utf-8")
    return tmp_path


def plots_of(page: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    return json.loads(found[1])["charts"]


def without_plotly(page: str) -> str:
    return re.sub(r'(id="plotly">)[^<]*', r"\1", page)


def test_the_page_shows_every_part(run: Path) -> None:
    """Bug: a section, figure or curve is dropped, or read under a name that the stages do not write."""
    file = write_report(run)
    page = file.read_text(encoding="utf-8")
    assert file == run / "report.html"
    for text in (
        "71.3%",
        "66.8%",
        "76.2%",
        "69.4%",
        "2.87",
        "41.0%",
        "78.0%",
        "+37.0 pts",
        "ppo/demo@1",
        "12,400",
        "19:40 in all",
    ):
        assert text in page, text
    assert [len(plot["traces"]) for plot in plots_of(page)] == [2, 2, 1, 1, 2, 1, 2, 2, 1, 1]
    assert page.count('class="sample"') == 20
    assert "Missing from this report" not in page


def test_pretraining_and_an_evaluation_are_shown_where_a_run_has_them(run: Path) -> None:
    """Bug: the first stage of a run, or the task checks of its models, that its page does not know."""
    assert "Pretraining" not in without_plotly(write_report(run).read_text(encoding="utf-8"))
    log = [{"step": s, "pretrain/eval_loss": 9.0 - s, "pretrain/eval_bits_per_character": 3.5 - s} for s in (0, 1)]
    write_jsonl(run / "pretrain" / "metrics.jsonl", [*log, {"step": 1, "pretrain/loss": 8.5}])
    figures = {
        "score": {"value": 0.81, "low": 0.7, "high": 0.9},
        "check/mine/rouge1": {"value": 0.325, "low": 0.3, "high": 0.35},
    }
    models = [
        {"name": "sft/demo@1", "figures": {"score": figures["score"]}},
        {"name": "ppo/demo@1", "figures": figures},
    ]
    (run / "evaluation.json").write_text(json.dumps({"models": models}))
    results = made_up_results() | {"pretrain": {"eval_bits_per_character": 2.34, "seconds": 60.0}}
    (run / "results.json").write_text(json.dumps(results))
    page = write_report(run).read_text(encoding="utf-8")
    assert [len(plot["traces"]) for plot in plots_of(page)][:2] == [2, 1]
    for text in (
        "2.34",
        "held-out bits per character",
        "check/mine/rouge1",
        "0.325 (0.3 to 0.35)",
        "0.81 (0.7 to 0.9)",
    ):
        assert text in page, text
    assert "Missing from this report" not in page
    (run / "evaluation.json").write_text('{"models": ')
    assert "evaluation.json is not readable as JSON" in write_report(run).read_text(encoding="utf-8")


def test_the_report_card_is_a_section_of_the_page(run: Path) -> None:
    """Bug: a part of the card that is computed and not shown, or an interval drawn about 0 instead of about its value."""
    plain = len(plots_of(write_report(run).read_text(encoding="utf-8")))
    (run / "reward" / "card.json").write_text(json.dumps(made_up_card()), encoding="utf-8")
    page = write_report(run).read_text(encoding="utf-8")
    for text in (
        "is right in 71.3% of 480 held-out pairs", "thanks: scores 0.61 standard deviations higher", "flagged", "passed",
        "6.3%", "1.4", "low one", "train: 2 empty response (rows 3, 9)",
    ):  # fmt: skip
        assert text in page, text
    assert ATTACK not in page
    plots = plots_of(page)[plain:]
    assert [plot["kind"] for plot in plots] == ["intervals", "intervals", "lines", "lines", "lines"]
    assert [int(number) for number in re.findall(r'data-plot="(\d+)"', page)] != []
    shown = sorted(int(number) for number in re.findall(r'data-plot="(\d+)"', page))
    assert shown == list(range(plain + 5)), "each plot has its place, and each place its plot"
    (trace,) = plots[0]["traces"]
    assert trace["y"] == ["held-out pairs", "new prompts", "raters it never saw", "human ceiling", "balanced by length",
                          "bag of words"]  # fmt: skip
    assert trace["x"][0] == 0.713 and trace["above"][0] == trace["below"][0] == 0.02
    assert plots[1]["traces"][0]["above"] == [0.02, 0.0], "one prompt has no interval"
    (run / "reward" / "card.json").write_text('{"verdict": ')
    assert "reward/card.json is not readable as JSON" in write_report(run).read_text(encoding="utf-8")


def test_the_report_card_has_a_page_of_its_own(tmp_path: Path) -> None:
    """Bug: `python -m rlhf.evaluation.reward` leaves a page that speaks of stages which never ran."""
    page = write_card_page(made_up_card(), tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Report card of reward/demo@1" in page and "is right in 71.3%" in page and "still to come" not in page
    body = without_plotly(page)
    assert "The chain" not in body and "Missing from this report" not in body and "How to read it" not in body
    assert (
        sorted(map(int, re.findall(r'data-plot="(\d+)"', page))) == list(range(len(plots_of(page)))) == [0, 1, 2, 3, 4]
    )


def test_the_page_needs_no_network_and_is_small(run: Path) -> None:
    """Bug: a script, style, font or image from a CDN; or plotly embedded as it is, 4.8 MB a page."""
    page = write_report(run).read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import|<link|\bsrc=(?!x )", without_plotly(page).replace("&lt;img src=x", ""))
    assert len(page) < 2_500_000


def test_model_output_is_escaped(run: Path) -> None:
    """Bug: an answer with a <script> in it runs, or a </script> in a prompt ends the page's own script."""
    page = write_report(run).read_text(encoding="utf-8")
    assert ATTACK not in page and "<script>alert" not in page and "<img" not in page
    assert "&lt;script&gt;document.title" in page
    rows, _ = read_jsonl(run / "ppo" / "metrics.jsonl")
    results = made_up_results()
    results["phases"][0]["phase"] = "</script><script>alert(3)</script>"
    (run / "results.json").write_text(json.dumps(results))
    assert rows and "<script>alert" not in write_report(run).read_text(encoding="utf-8")


def test_missing_and_half_written_parts_are_named(run: Path) -> None:
    """Bug: one truncated line or absent file stops the whole report, or is passed over in silence."""
    with (run / "ppo" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "objective/sc')
    (run / "reward" / "metrics.jsonl").unlink()
    (run / "data" / "card.json").write_text('{"sft": ')
    (run / "ppo" / "comparison.jsonl").write_text("")
    results = made_up_results()
    results["sft"], results["phases"] = None, None
    del results["machine"]
    (run / "results.json").write_text(json.dumps(results))
    page = write_report(run).read_text(encoding="utf-8")
    for line in (
        "ppo/metrics.jsonl: 1 unreadable line left out", "reward/metrics.jsonl is not there",
        "ppo/comparison.jsonl is empty",
        "data/card.json is not readable", "results.json has nothing about sft",
    ):  # fmt: skip
        assert line in page, line
    titles = [plot["title"] for plot in plots_of(page)]
    assert "Reward score" in titles and "Reward model's accuracy" not in titles and "Time" not in titles


def test_figures_that_are_null_or_nan_are_left_out(run: Path) -> None:
    """Bug: on the user's own data the gold figures are null and the page says `None`, or NaN breaks the page's JSON."""
    results = made_up_results()
    for key in list(results["ppo"]):
        if key.startswith("gold"):
            results["ppo"][key] = None
    results["reward"].update(vader_accuracy=None, human_ceiling=float("nan"))
    (run / "results.json").write_text(json.dumps(results))
    with (run / "ppo" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "objective/score": null, "objective/kl": NaN}\n')
    page = write_report(run).read_text(encoding="utf-8")
    body = without_plotly(page)
    assert "None" not in body and "nan" not in body.lower().replace("nanmean", "").split()
    assert "by VADER" not in page and "NaN" not in json.dumps(plots_of(page))
    assert "reward model&#39;s score on held-out prompts" in page


def test_over_optimisation_is_called_by_its_name(run: Path) -> None:
    """Bug: the headline praises a score that rose while the outside judge saw no improvement."""
    results = made_up_results()
    assert "a sign of over-optimisation" not in write_report(run).read_text(encoding="utf-8")
    results["ppo"]["gold_positive_after"] = 0.40
    (run / "results.json").write_text(json.dumps(results))
    page = write_report(run).read_text(encoding="utf-8")
    assert "Not better</span>The score rose, but" in page and "a sign of over-optimisation</h1>" in page


def test_long_runs_are_thinned_but_keep_their_last_point(run: Path) -> None:
    """Bug: a run of 20,000 updates makes a page of many megabytes, or the thinning cuts off the end."""
    write_jsonl(run / "ppo" / "metrics.jsonl", [{"step": s, "objective/kl": float(s)} for s in range(20_001)])
    kl = next(p for p in plots_of(write_report(run).read_text(encoding="utf-8")) if p["title"].startswith("KL"))
    assert len(kl["traces"][0]["x"]) == POINTS_PER_CURVE
    assert (kl["traces"][0]["x"][0], kl["traces"][0]["x"][-1]) == (0, 20_000)


@pytest.mark.parametrize("content", [None, '{"sft": {', "[]"])
def test_a_folder_without_results_is_the_users_error(tmp_path: Path, content: str | None) -> None:
    """Bug: a mistyped folder gives a traceback, or an empty page that looks like a run without results."""
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=r"results\.json"):
        write_report(tmp_path)


def test_the_command_rebuilds_the_page(run: Path, tmp_path: Path) -> None:
    """Bug: `python -m rlhf.report` is not wired up, prints a traceback, or imports torch to draw a page."""
    command = [sys.executable, "-X", "importtime", "-m", "rlhf.report"]
    done = subprocess.run([*command, str(run)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(run / "report.html") and (run / "report.html").exists()
    assert not re.search(r"\| +(torch|transformers|wandb)\n", done.stderr)
    failed = subprocess.run([*command[:1], *command[3:], str(tmp_path / "nowhere")], capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1


def test_print_results_shows_figures_and_skips_what_is_absent(capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: the closing table crashes on a run without gold figures, or prints rows of dashes."""
    results = made_up_results()
    results["ppo"] |= dict.fromkeys(name for name in results["ppo"] if name.startswith("gold"))
    results["reward"]["vader_accuracy"] = None
    print_results(results)
    out = capsys.readouterr().out
    assert "71.3%" in out and "-0.12" in out and "0.81" in out and "19:40 in all, 2.3 GB" in out
    assert "independent scorer" not in out
    print_results({})

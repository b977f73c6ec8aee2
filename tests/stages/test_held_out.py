"""Held-out evaluations of a PPO run while it trains, and what trackers get of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import mlflow
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toys import Call
from wandb_reader import OfflineRun

from rlhf.config import PPOConfig, parse_config
from rlhf.registry import Registry

EVALUATED = {"eval/score", "eval/gold", "eval/kl", "eval/length", "eval/stop_rate", "eval/distinct_2"}
CLOCK = ("time", "rollout/tokens_per_second")


class Watched:
    """A PPO run of four updates on the toy models."""

    def __init__(self, folder: Path, finished: Path, config: Path) -> None:
        self.registry, self.folder = folder / "registry", folder / "out" / "ppo"
        for stage in ("sft", "reward"):
            shutil.copytree(finished / stage, self.registry / stage)
        places = ["--registry", self.registry, "--output_dir", folder / "out", "--log_texts", "false"]
        self.words = ["--config", config / "ppo.yaml", "--total_episodes", "32", *places]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "eval/score" in row]

    @property
    def updates(self) -> list[dict[str, Any]]:
        """The training's own figures, without the clock."""
        rows = [row for row in self.rows if "eval/score" not in row]
        return [{name: v for name, v in row.items() if not name.startswith(CLOCK)} for row in rows]


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    finished: tuple[Path, Path],
    toy_config: Path,
    command: Callable[..., Any],
) -> dict[str, Watched]:
    """`plain` has neither evaluations nor trackers, `watched` has all of them."""
    options = {
        "plain": ["--eval_steps", 0, "--trackers", "none"],
        "watched": ["--eval_steps", 2, "--trackers", "wandb", "tensorboard", "mlflow"],
    }
    runs = {}
    for name, words in options.items():
        folder = tmp_path_factory.mktemp(name)
        runs[name] = run = Watched(folder, finished[0], toy_config)
        os.environ["MLFLOW_TRACKING_URI"], os.environ["MLFLOW_ALLOW_FILE_STORE"] = str(folder / "mlruns"), "true"
        try:
            done = command("rlhf.stages.ppo", *run.words, *words, "--gold", "rlhf.evaluation.gold:vader")
        finally:
            del os.environ["MLFLOW_TRACKING_URI"], os.environ["MLFLOW_ALLOW_FILE_STORE"]
        assert done.returncode == 0, done.stderr[-3000:]
        assert "could not" not in done.stderr
    return runs


def test_training_is_the_same_in_the_same_bytes(runs: dict[str, Watched]) -> None:
    """Random numbers, weights or schedules that an evaluation or a tracker touches: a run that is watched is another run."""
    plain, watched = (Registry(run.registry).read("ppo/toy") for run in runs.values())
    assert (plain.path / "adapter_model.safetensors").read_bytes() == (
        watched.path / "adapter_model.safetensors"
    ).read_bytes()
    assert runs["plain"].updates == runs["watched"].updates and len(runs["plain"].updates) == 4
    assert plain.manifest.recipe == watched.manifest.recipe


def test_evaluations_keep_their_schedule_and_their_prompts(runs: dict[str, Watched]) -> None:
    """A curve without its start or its end, or whose points are means over different prompts."""
    assert [row["step"] for row in runs["watched"].evaluations] == [0, 2, 4]
    assert [row["step"] for row in runs["plain"].evaluations] == [0, 4]
    assert all(row.keys() - {"step", "time"} == EVALUATED | {"episodes"} for row in runs["watched"].evaluations)
    first, _, last = runs["watched"].evaluations
    answers = [json.loads(line) for line in (runs["watched"].folder / "comparison.jsonl").read_text().splitlines()][:4]
    assert first["eval/score"] == pytest.approx(fmean(row["sft_score"] for row in answers), rel=1e-6)
    assert last["eval/score"] == pytest.approx(fmean(row["ppo_score"] for row in answers), rel=1e-6)
    assert first["eval/kl"] == 0 != last["eval/kl"]
    assert (first["episodes"], last["episodes"]) == (0, 32)


def test_the_summary_sorts_runs(runs: dict[str, Watched]) -> None:
    """Runs that cannot be sorted or swept by what counts, or a summary of other figures than the manifest's."""
    figures = Registry(runs["watched"].registry).read("ppo/toy").manifest.metrics
    summary = OfflineRun(runs["watched"].folder).summary
    for name in ("score_before", "score_after", "gold_before", "gold_after", "kl", "length_after"):
        assert summary[f"summary/{name}"] == figures[name], name


def test_wandb_gets_distributions_and_no_texts(runs: dict[str, Watched]) -> None:
    """A histogram of one update for all, and prompts or answers that leave the machine unasked."""
    history = OfflineRun(runs["watched"].folder).history
    for name in ("score", "kl", "length"):
        values = [row for row in history if row.get(f"histogram/{name}/_type") == "histogram"]
        assert [row["_step"] for row in values] == [1, 2, 3, 4]
        assert all(sum(row[f"histogram/{name}/values"]) == 8 for row in values)
    sent = b"".join(file.read_bytes() for file in (runs["watched"].folder / "wandb").rglob("*") if file.is_file())
    assert b"movie review" not in sent


def test_texts_go_to_wandb_when_an_option_says_so(finished: tuple[Path, Path]) -> None:
    """A table SFT against PPO that nobody gets, or whose columns are mixed up; the toy pipeline sets `log_texts`."""
    (file,) = (finished[1] / "ppo").glob("wandb/offline-run-*/files/media/table/**/comparison*.table.json")
    table = json.loads(file.read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert rows == [json.loads(line) for line in (finished[1] / "ppo" / "comparison.jsonl").read_text().splitlines()]


def test_tensorboard_reads_every_figure(runs: dict[str, Watched]) -> None:
    """A metric that is missing or at another update in the event file."""
    events = EventAccumulator(str(runs["watched"].folder / "tensorboard" / "toy-ppo"), {"histograms": 0}).Reload()
    for name in ("objective/score", "eval/gold", "ppo/value_loss"):
        expected = [(row["step"], row[name]) for row in runs["watched"].rows if name in row]
        assert [(e.step, e.value) for e in events.Scalars(name)] == [
            (step, pytest.approx(value, rel=1e-6)) for step, value in expected
        ]
    assert len(events.Histograms("histogram/score")) == 4


def test_mlflow_reads_every_figure(runs: dict[str, Watched]) -> None:
    """A metric or option that is missing in the run's page of MLflow, or a run that never ends."""
    folder = runs["watched"].folder.parents[1] / "mlruns"
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    try:
        client = mlflow.MlflowClient(str(folder))
        (experiment,) = client.search_experiments(filter_string="name = 'rlhf'")
        (run,) = client.search_runs([experiment.experiment_id])
        assert (run.info.run_name, run.info.status) == ("toy-ppo", "FINISHED")
        assert run.data.params["total_episodes"] == "32" and run.data.tags["stage"] == "ppo"
        figures = Registry(runs["watched"].registry).read("ppo/toy").manifest.metrics
        assert run.data.metrics["summary/gold_after"] == figures["gold_after"]
        for name in ("objective/kl", "eval/score"):
            expected = [(row["step"], row[name]) for row in runs["watched"].rows if name in row]
            assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] == expected
    finally:
        del os.environ["MLFLOW_ALLOW_FILE_STORE"]


def test_options_of_the_log_are_no_part_of_the_recipe() -> None:
    """A finished run that is trained again because somebody wants another curve of it."""
    base = ["--name", "n", "--dataset", "d", "--policy", "sft/a", "--reward", "reward/a"]
    logged = [
        "--eval_steps",
        "3",
        "--num_eval_prompts",
        "9",
        "--trackers",
        "mlflow",
        "--wandb_tags",
        "a",
        "--log_texts",
    ]
    assert parse_config(PPOConfig, base).recipe() == parse_config(PPOConfig, [*base, *logged]).recipe()
    assert "num_eval_samples" in parse_config(PPOConfig, base).recipe()


def test_a_tracker_whose_package_is_missing_is_one_line(
    finished: tuple[Path, Path], toy_config: Path, tmp_path: Path, call: Callable[..., Call], monkeypatch: Any
) -> None:
    """A run without the copy that was asked for, or a traceback of an import."""
    monkeypatch.setattr("rlhf.run.accelerated.find_spec", lambda name: None)
    run = Watched(tmp_path, finished[0], toy_config)
    complaint = call("rlhf.stages.ppo", *run.words, "--trackers", "wandb", "trackio").complaint
    assert "trackers has trackio, whose package is missing: pip install 'rlhf-stages[trackers]'" in complaint


def test_the_sweep_file_starts_runs_that_the_sweep_finds(
    finished: tuple[Path, Path], toy_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep whose command does not parse, whose runs share a folder or have another id, or that optimises no figure."""
    from wandb.sdk.launch.sweeps import utils

    sweep = utils.load_sweep_config(str(Path(__file__).parents[2] / "configs" / "demo" / "sweep.yaml"))
    assert sweep is not None
    config = tmp_path / "configs" / "demo" / "ppo.yaml"
    config.parent.mkdir(parents=True)
    config.write_text((toy_config / "ppo.yaml").read_text() + "gold: rlhf.evaluation.gold:vader\n")
    for stage in ("sft", "reward"):
        shutil.copytree(finished[0] / stage, tmp_path / "registry" / stage)
    chosen = {name: p.get("value", p.get("min", p.get("values", [None])[0])) for name, p in sweep["parameters"].items()}
    words = utils.create_sweep_command_args({"args": {name: {"value": value} for name, value in chosen.items()}})
    command = [part for word in utils.create_sweep_command(sweep["command"]) for part in (
        words["args"] if word == "${args}" else [word]
    )]  # fmt: skip
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    environment = {**os.environ, "WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "run77", "WANDB_MODE": "offline"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    run = OfflineRun(tmp_path / "outputs" / "sweep" / "run77" / "ppo")
    assert run.run.run_id == "run77" and isinstance(run.summary[sweep["metric"]["name"]], float)
    assert {name: run.config[name] for name in chosen} == chosen

"""What a finished toy pipeline left for W&B, value by value against the local record."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from wandb_reader import OfflineRun, same, table_rows
from wandb_server import WandbServer, wandb_server

from rlhf.base.redaction import redact
from rlhf.registry import Registry

STAGES = ("sft", "reward", "ppo")
#: The names that the stages promise each other and their readers.
PROMISED = {
    "sft": "sft/loss sft/token_accuracy",
    "reward": "reward/accuracy reward/loss reward/margin card/accuracy",
    "ppo": "objective/score objective/kl objective/kl_k3 objective/entropy objective/rlhf_reward ppo/policy_loss "
    "ppo/value_loss ppo/clipfrac ppo/approx_kl ppo/ratio_mean ppo/ratio_max ppo/explained_variance ppo/grad_norm ppo/lr "
    "response/length response/stop_rate rollout/tokens_per_second rollout/logprob_gap time/rollout time/score "
    "time/optimise episodes",
}


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def runs(finished: tuple[Path, Path]) -> dict[str, OfflineRun]:
    return {stage: OfflineRun(finished[1] / stage) for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_every_logged_value_is_there(runs: dict[str, OfflineRun], finished: tuple[Path, Path], stage: str) -> None:
    """A metric that is renamed, rounded or left out on its way, or that sits at another update than in the local log."""
    logged: dict[int, dict[str, float | None]] = {}
    for row in rows_of(finished[1] / stage / "metrics.jsonl"):
        logged.setdefault(row["step"], {}).update({k: v for k, v in row.items() if k not in ("step", "time")})
    sent: dict[int, dict[str, Any]] = {}
    for row in runs[stage].history:
        assert row.get("updates", row["_step"]) == row["_step"]
        sent.setdefault(row["_step"], {}).update(row)
    for step, figures in logged.items():
        assert sent[step]["updates"] == step
        wrong = {name: (sent[step].get(name), v) for name, v in figures.items() if not same(sent[step].get(name), v)}
        assert not wrong
    assert set(PROMISED[stage].split()) <= set().union(*logged.values())


@pytest.mark.parametrize("stage", STAGES)
def test_metrics_share_an_axis(runs: dict[str, OfflineRun], stage: str) -> None:
    """A metric drawn over log lines: two runs with other batch sizes or logging steps would not line up."""
    axes, sent = runs[stage].axes, set().union(*runs[stage].history)
    free = {name for name in sent if not name.startswith("_") and name not in ("updates", "episodes")}
    for name in free:
        axis = next((axis for family, axis in axes.items() if fnmatch.fnmatch(name, family)), None)
        if "/" in name and not name.startswith("frontier/"):
            assert axis == ("episodes" if stage == "ppo" else "updates"), name


@pytest.mark.parametrize("stage", STAGES)
def test_runs_of_a_pipeline_belong_together(
    runs: dict[str, OfflineRun], finished: tuple[Path, Path], stage: str
) -> None:
    """Three runs in three groups, or a config from which an option is missing: nothing to filter or group by."""
    artifact, run = Registry(finished[0]).read(f"{stage}/toy"), runs[stage].run
    assert (run.run_id, run.run_group, run.job_type) == (artifact.manifest.wandb_run_id, "toy", stage)
    config = runs[stage].config
    assert {k: config[k] for k in artifact.manifest.config} == redact(artifact.manifest.config)
    assert config["inputs" if stage != "sft" else "data"]
    assert config["data"]["fingerprint"] == artifact.manifest.data["fingerprint"]


def test_samples_append(finished: tuple[Path, Path]) -> None:
    """A table that is frozen after its first rows, that loses them to the later ones, or that lacks a column."""
    logged = rows_of(finished[1] / "ppo" / "samples.jsonl")
    assert {"prompt", "response", "score", "kl"} <= logged[0].keys() and len({row["step"] for row in logged}) == 2
    assert table_rows(finished[1] / "ppo") == logged


def test_the_lineage_is_drawn_from_data_to_policy(runs: dict[str, OfflineRun], finished: tuple[Path, Path]) -> None:
    """A model that enters a run as another version than the one that left: two graphs in place of one."""
    registry = Registry(finished[0])
    made = {name: artifact for run in runs.values() for name, artifact in run.made.items() if name.endswith("-toy")}
    assert set(made) == {"sft-toy", "reward-toy", "ppo-toy"}
    for stage, parents in (("sft", []), ("reward", ["sft"]), ("ppo", ["sft", "reward"])):
        used = runs[stage].used
        models = {name: a for name, a in used.items() if a.type != "data"}
        assert {name: a.digest for name, a in models.items()} == {f"{p}-toy": made[f"{p}-toy"].digest for p in parents}
        inputs = {a.reference: a.hash for a in (registry.read(f"{p}/toy") for p in parents)}
        assert json.loads(made[f"{stage}-toy"].metadata)["inputs"] == inputs
        assert runs[stage].config.get("inputs", {}) == inputs
        (data,) = (a for a in used.values() if a.type == "data")
        described = json.loads(data.metadata)
        assert described["fingerprint"] == registry.read(f"{stage}/toy").manifest.data["fingerprint"]


def test_card_and_frontier_are_panels(runs: dict[str, OfflineRun]) -> None:
    """Figures that are in the local files only."""
    reward, ppo = (set().union(*runs[stage].history) for stage in ("reward", "ppo"))
    assert {"card/accuracy", "card/accuracies/_type", "card/probes/_type", "card/reliability_table/_type"} <= reward
    assert "frontier/score_table/_type" in ppo


@pytest.fixture(scope="module")
def synced(finished: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> WandbServer:
    """What a server got from `wandb sync` of copies of the three offline runs, the last made first."""
    folder = tmp_path_factory.mktemp("synced")
    with wandb_server() as server:
        for stage in reversed(STAGES):
            (run,) = (finished[1] / stage / "wandb").glob("offline-run-*")
            shutil.copytree(run, folder / stage / run.name)
            settings = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "k" * 40, "WANDB_MODE": "online"}
            places = {name: str(folder / name) for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR")}
            command = [sys.executable, "-m", "wandb", "sync", "--yes", str(folder / stage / run.name)]
            environment = {**os.environ, **settings, **places}
            done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return server


@pytest.mark.parametrize("stage", STAGES)
def test_sync_sends_every_value(synced: WandbServer, finished: tuple[Path, Path], stage: str) -> None:
    """An offline run that W&B's own reader cannot read to its end, or that arrives as another run."""
    manifest = Registry(finished[0]).read(f"{stage}/toy").manifest
    sent: dict[int, dict[str, Any]] = {}
    for line in synced.history[str(manifest.wandb_run_id)]:
        sent.setdefault(line["_step"], {}).update(line)
    for row in rows_of(finished[1] / stage / "metrics.jsonl"):
        for name, value in row.items():
            if name not in ("step", "time"):
                assert same(sent[row["step"]].get(name), value), (row["step"], name)
    run = synced.runs[str(manifest.wandb_run_id)]
    assert (run["groupName"], run["jobType"]) == ("toy", stage)
    config = json.loads(run["config"])
    assert {k: config[k]["value"] for k in manifest.config} == redact(manifest.config)


def test_sync_draws_the_lineage(synced: WandbServer, finished: tuple[Path, Path]) -> None:
    """Edges that exist in the offline file only, or that lead to another version than the one that was made."""
    registry = Registry(finished[0])
    ids = {stage: str(registry.read(f"{stage}/toy").manifest.wandb_run_id) for stage in STAGES}
    stage_of = {run: stage for stage, run in ids.items()}
    models = {key: a for key, a in synced.artifacts.items() if a["type"] in STAGES}
    assert sorted(a["name"] for a in models.values()) == ["ppo-toy", "reward-toy", "sft-toy"], (
        "each model is one version"
    )
    edges = {(synced.artifacts[artifact]["name"], stage_of[run]) for artifact, run in synced.edges}
    assert {(name, stage) for name, stage in edges if not name.startswith("data-")} == {
        ("sft-toy", "reward"), ("sft-toy", "ppo"), ("reward-toy", "ppo"),
    }  # fmt: skip
    assert sorted(stage for name, stage in edges if name.startswith("data-")) == sorted(STAGES)

"""Other tools that read logs, on the same runs, each given all of our figures that it has a name for.

They are installed apart: `pip install --target FOLDER rldoctor rlprobe rlwatch zen-rl`. This file is also the script that runs in
a process with that folder on its path: figures of runs in, names of what each tool found out, first ones first.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Figures = Mapping[str, Any]
Table = Mapping[str, tuple[str, ...]]

#: Names by which a tool may say a neutral cause: generously, as what it documents as the cause or the remedy.
NAMES: Mapping[str, Table] = {
    "rldoctor": {
        "learning_rate_high": ("kl_drift", "clip_saturation", "gradient_pathology"),
        "learning_rate_zero": ("gradient_pathology", "plateau"),
        "num_ppo_epochs": ("clip_saturation",), "clip_range": ("clip_saturation",),
        "gradient_clipping": ("gradient_pathology",), "gradient": ("gradient_pathology",),
        "policy_trained": ("gradient_pathology",), "value_warmup_updates": ("gradient_pathology",),
        "kl_coef_zero": ("kl_drift",), "kl_target": ("kl_drift",), "kl_sign": ("kl_drift",), "reference_logprobs": ("kl_drift",),
        "length_rewarded": ("length_pathology",), "reward_likes_short": ("length_pathology",),
        "response_length": ("length_pathology",), "stop_token": ("length_pathology",), "penalties": ("length_pathology",),
        "over_optimisation": ("reward_hacking",), "entropy": ("entropy_collapse",),
        "reward_constant": ("advantage_collapse",), "reward_sparse": ("advantage_collapse",),
        "reward_clip": ("advantage_collapse",),
    },
    "rlprobe": {
        "learning_rate_high": ("KL_BLOWUP", "CLIP_SATURATION", "GRAD_PATHOLOGY"), "learning_rate_zero": ("GRAD_PATHOLOGY",),
        "num_ppo_epochs": ("CLIP_SATURATION",), "clip_range": ("CLIP_SATURATION",),
        "gradient_clipping": ("GRAD_PATHOLOGY",), "gradient": ("GRAD_PATHOLOGY",), "scores_finite": ("GRAD_PATHOLOGY",),
        "kl_coef_zero": ("KL_BLOWUP",), "kl_target": ("KL_BLOWUP",), "kl_sign": ("KL_BLOWUP",),
        "reference_logprobs": ("KL_BLOWUP",),
        "value_trained": ("VALUE_DIVERGENCE",), "value_learning_rate": ("VALUE_DIVERGENCE",), "vf_coef": ("VALUE_DIVERGENCE",),
        "values": ("VALUE_DIVERGENCE",), "returns": ("VALUE_DIVERGENCE",),
        "whitening": ("ADV_COLLAPSE",), "advantages": ("ADV_COLLAPSE",),
        "length_rewarded": ("REWARD_HACK_LENGTH",), "response_length": ("TRUNCATION_STARVE",),
        "stop_token": ("TRUNCATION_STARVE",), "penalties": ("TRUNCATION_STARVE",),
        "repetition": ("REPETITION_SPIRAL",), "over_optimisation": ("FORMAT_GAMING",),
        "entropy": ("ENTROPY_COLLAPSE",), "machine": ("THROUGHPUT_ROT",),
        "reward_constant": ("REWARD_STD_DEATH", "ADV_COLLAPSE"), "reward_sparse": ("REWARD_STD_DEATH", "ADV_COLLAPSE"),
        "reward_clip": ("REWARD_STD_DEATH",),
    },
    "rlwatch": {
        "learning_rate_high": ("kl_explosion", "gradient_norm_spike", "loss_nan"), "kl_coef_zero": ("kl_explosion",),
        "kl_target": ("kl_explosion",), "kl_sign": ("kl_explosion",), "gradient": ("gradient_norm_spike",),
        "gradient_clipping": ("gradient_norm_spike",), "scores_finite": ("loss_nan",), "over_optimisation": ("reward_hacking",),
        "entropy": ("entropy_collapse",), "reward_not_reproducible": ("reward_mean_drift", "reward_hacking"),
        "values": ("advantage_variance",), "advantages": ("advantage_variance",),
    },
    "zen-rl": {
        "learning_rate_high": ("LR_TOO_HIGH",), "entropy": ("POLICY_COLLAPSE",), "whitening": ("ADVANTAGE_NOT_NORMALIZED",),
        "advantages": ("ADVANTAGE_NOT_NORMALIZED",),
    },
}  # fmt: skip


def score(rows: list[dict[str, Any]], runs: Path, tools: Path) -> dict[str, Any]:
    """Return each tool's rates on the PPO runs that left figures, or why it could not be run; and first this doctor's there."""
    from faults.score import judge, summarise

    logs = {row["name"]: _figures(runs / row["name"] / "ppo") for row in rows if row["stage"] == "ppo"}
    logged = [row for row in rows if logs.get(row["name"])]
    work = json.dumps({row["name"]: logs[row["name"]] for row in logged})
    result: dict[str, Any] = {"rlhf doctor": _rates(summarise(logged))}
    for tool, names in NAMES.items():
        environment = {**os.environ, "PYTHONPATH": str(tools.absolute())}
        command = [sys.executable, __file__, tool]
        done = subprocess.run(command, input=work, capture_output=True, text=True, env=environment)
        if done.returncode:
            result[tool] = {"not_run": (done.stderr.strip().splitlines() or ["no words"])[-1]}
            continue
        found = json.loads(done.stdout)
        judged = [
            {**row, "refused": None, "live": [], "findings": [{"name": name} for name in found[row["name"]]]}
            for row in logged
        ]
        rates = _rates(summarise(judged, lambda row, names=names: judge(row, names)))
        result[tool] = {**rates, "found": {name: named for name, named in found.items() if named}}
    return result


def _rates(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: summary[key] for key in ("tuned", "held_out", "false_alarms")}


def _figures(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# ---- in the process of the tools -------------------------------------------------------------------------------------


def common_figures(row: Figures) -> dict[str, Any]:
    """Return the figures of an update by neutral names."""
    stop = row.get("response/stop_rate")
    seconds = [row.get(f"time/{phase}") for phase in ("rollout", "score", "optimise")]
    return {
        "step": row["step"], "reward": row.get("objective/score"), "reward_std": row.get("objective/score_std"),
        "judge": row.get("objective/gold"), "kl": row.get("objective/kl"), "approx_kl": row.get("ppo/approx_kl"),
        "entropy": row.get("objective/entropy"), "clipfrac": row.get("ppo/clipfrac"), "grad_norm": row.get("ppo/grad_norm"),
        "lr": row.get("ppo/lr"), "loss": row.get("ppo/policy_loss"), "value_loss": row.get("ppo/value_loss"),
        "explained_variance": row.get("ppo/explained_variance"), "length": row.get("response/length"),
        "truncated": None if stop is None else 1 - stop, "repetition": row.get("response/repetition"),
        "advantage_std": row.get("ppo/advantage_std"), "advantage_mean": row.get("ppo/advantage_mean"),
        "value_clipfrac": row.get("ppo/value_clipfrac"), "ratio": row.get("ppo/ratio_mean"),
        "seconds": sum(seconds) if None not in seconds else None,
    }  # fmt: skip


def rldoctor(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Run rldoctor on TRL's names of the figures; its remarks below a warning are no findings."""
    from rl_doctor import Severity, diagnose, run_from_records

    trl = {
        "step": "step", "reward": "reward", "reward_std": "reward_std", "judge": "eval_score", "kl": "kl", "entropy": "entropy",
        "clipfrac": "clip_ratio", "grad_norm": "grad_norm", "lr": "learning_rate", "loss": "loss",
        "length": "completions/mean_length", "truncated": "completions/clipped_ratio",
        "explained_variance": "explained_variance", "advantage_std": "advantage/std", "seconds": "step_time",
    }  # fmt: skip
    records = [{trl[key]: value for key, value in row.items() if key in trl and value is not None} for row in rows]
    problems = diagnose(run_from_records(records, config={"algorithm": "ppo"})).problems
    return [finding.detector for finding in problems if finding.severity >= Severity.WARNING]


def rlprobe(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Run rlprobe on its own record of each step."""
    from rlprobe.doctor.engine import diagnose_view
    from rlprobe.doctor.runview import RunView
    from rlprobe.schemas import RunManifest, StepRecord

    own = {
        "step": "step", "reward": "reward_mean", "reward_std": "reward_std", "kl": "kl_mean", "entropy": "entropy_mean",
        "clipfrac": "clip_fraction", "grad_norm": "grad_norm", "lr": "lr", "loss": "loss", "value_loss": "value_loss",
        "explained_variance": "value_explained_variance", "length": "completion_len_mean", "truncated": "truncation_rate",
        "repetition": "repetition_rate", "advantage_std": "adv_std", "advantage_mean": "adv_mean", "ratio": "ratio_mean",
        "value_clipfrac": "value_clip_fraction", "seconds": "step_time_s",
    }  # fmt: skip
    records = [StepRecord(**{own[key]: value for key, value in row.items() if key in own}) for row in rows]
    manifest = RunManifest(run_id="run", created_at="", algorithm="ppo")
    return [f.signature_id for f in diagnose_view(RunView(manifest, records)) if f.severity != "info"]


def rlwatch(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Run rlwatch's detectors step by step, with its default settings, most of which wait for 20 or 50 steps."""
    from rlwatch.config import RLWatchConfig
    from rlwatch.detectors import DetectorSuite

    suite, found = DetectorSuite(RLWatchConfig()), []
    for row in rows:
        alerts = suite.check_step(
            row["step"], entropy=row.get("entropy"), kl_divergence=row.get("kl"), reward_mean=row.get("reward"),
            reward_std=row.get("reward_std"), advantage_std=row.get("advantage_std"), loss=row.get("loss"),
            grad_norm=row.get("grad_norm"),
        )  # fmt: skip
        found += [alert.detector for alert in alerts]
    return list(dict.fromkeys(found))


def zen(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Run zen-rl's rules; two of its five compare rewards with CartPole's and are not asked."""
    from zen.detect.rules import detect
    from zen.vlak import group, rank

    tags = {
        "train/approx_kl": ("approx_kl", 1),
        "train/entropy_loss": ("entropy", -1),
        "train/policy_gradient_loss": ("loss", 1),
    }
    series = {
        tag: [(row["step"], sign * row[key]) for row in rows if row.get(key) is not None]
        for tag, (key, sign) in tags.items()
    }
    return [issue["mode"] for issue in group(rank(detect({tag: values for tag, values in series.items() if values})))]


TOOLS: dict[str, Callable[[Sequence[dict[str, Any]]], list[str]]] = {
    "rldoctor": rldoctor, "rlprobe": rlprobe, "rlwatch": rlwatch, "zen-rl": zen,
}  # fmt: skip


def main() -> None:
    """Read runs from standard input, and write what a tool names in each."""
    tool, found = TOOLS[sys.argv[1]], {}
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch), contextlib.redirect_stdout(sys.stderr):
        for name, lines in json.load(sys.stdin).items():
            by_step: dict[int, dict[str, Any]] = {}
            for row in lines:  # evaluations have lines of their own
                by_step.setdefault(row["step"], {}).update(row)
            rows = [common_figures(row) for step, row in sorted(by_step.items()) if step > 0]
            found[name] = tool(rows) if rows else []
    print(json.dumps(found))


if __name__ == "__main__":
    main()

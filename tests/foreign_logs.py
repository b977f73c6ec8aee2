"""Small logs of other projects' runs, made here with the names that those projects write."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any


def grpo_rows(steps: int = 12, **changes: Sequence[float]) -> list[dict[str, Any]]:
    """Rows of TRL's GRPO as `trainer_state.json` has them: healthy, but for the columns that are given."""
    rows = []
    for step in range(steps):
        row = {
            "step": step + 1,
            "epoch": 0.1 * (step + 1),
            "loss": 0.01,
            "grad_norm": 0.4 + 0.01 * (step % 3),
            "learning_rate": 1e-6,
            "reward": 0.2 + 0.02 * step,
            "reward_std": 0.3,
            "kl": 0.001 * step,
            "entropy": 0.9,
            "clip_ratio/region_mean": 0.01,
            "completions/mean_length": 100.0,
            "completions/clipped_ratio": 0.1,
        }
        rows.append(row | {name: column[step] for name, column in changes.items()})
    return rows


def verl_row(step: int, **changes: float) -> dict[str, float]:
    """A row of verl's PPO."""
    return {
        "step": step,
        "actor/pg_loss": 0.01,
        "actor/entropy": 0.5,
        "actor/ppo_kl": 0.001,
        "actor/pg_clipfrac": 0.01,
        "actor/grad_norm": 0.3,
        "actor/lr": 1e-6,
        "actor/reward_kl_penalty": 0.001,
        "actor/reward_kl_penalty_coeff": 0.001,
        "critic/vf_loss": 0.1,
        "critic/vf_explained_var": 0.5,
        "critic/grad_norm": 2.0,
        "critic/lr": 1e-5,
        "critic/score/mean": 0.4,
        "critic/score/max": 1.0,
        "critic/score/min": 0.0,
        "critic/advantages/mean": 0.0,
        "response_length/mean": 200.0,
        "response_length/clip_ratio": 0.05,
        "timing_s/gen": 20.0,
        "timing_s/old_log_prob": 5.0,
        "timing_s/ref": 4.0,
        "timing_s/update_actor": 10.0,
        "timing_s/update_critic": 8.0,
    } | {name.replace("__", "/"): value for name, value in changes.items()}


def verl_line(row: Mapping[str, float]) -> str:
    """A row as verl prints it, with the mark that Ray puts before it."""
    figures = " - ".join(f"{name}:{value}" for name, value in row.items() if name != "step")
    return f"\x1b[36m(TaskRunner pid=4711)\x1b[0m step:{int(row['step'])} - {figures}"


def write_state(file: Path, rows: Iterable[Mapping[str, Any]], **options: Any) -> Path:
    """Write a `trainer_state.json`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"best_metric": None, "log_history": list(rows), **options}, indent=1))
    return file


def write_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_wandb(file: Path, rows: Iterable[Mapping[str, Any]], config: Mapping[str, Any]) -> Path:
    """Write an offline file of W&B: protobuf records in the log format of LevelDB."""
    wandb_internal_pb2: Any = import_module("wandb.proto.wandb_internal_pb2")
    records = []
    run = wandb_internal_pb2.Record()
    for name, value in config.items():
        run.run.config.update.add(key=name, value_json=json.dumps(value))
    records.append(run.SerializeToString())
    for step, row in enumerate(rows):
        record = wandb_internal_pb2.Record()
        record.history.step.num = step
        for name, value in row.items():
            text = json.dumps(value) if value == value else '"NaN"'
            record.history.item.add(key=name, value_json=text)
        records.append(record.SerializeToString())
    raw = b":W&B\xe1\xbe\x00"
    for payload in records:
        first = True
        while True:
            left = 32768 - len(raw) % 32768
            if left < 7:
                raw += b"\0" * left
                continue
            part, payload = payload[: left - 7], payload[left - 7 :]
            kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[first, not payload]
            raw += struct.pack("<IHB", 0, len(part), kind) + part
            first = False
            if not payload:
                break
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(raw)
    return file

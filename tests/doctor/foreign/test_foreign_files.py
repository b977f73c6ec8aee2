"""Files of other projects: recognised by content, read as far as they go, in the order of their steps."""

from __future__ import annotations

import gzip
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from foreign_logs import grpo_rows, verl_line, verl_row, write_lines, write_state, write_wandb

from rlhf.base.errors import UserError
from rlhf.doctor.foreign.reading import ForeignRun, is_foreign, logs_in, read_runs
from rlhf.doctor.foreign.rows import number, ordered


def only(file: Path, stage: str | None = None) -> ForeignRun:
    """The one run of a file."""
    (run,) = read_runs(file, stage)
    return run


def as_wandb(row: dict[str, Any]) -> dict[str, Any]:
    """A row of transformers' Trainer as W&B gets it."""
    renamed = {f"train/{name}": value for name, value in row.items() if name != "step"}
    return renamed | {"train/global_step": row["step"]}


def test_every_form_of_a_log_gives_the_same_figures(tmp_path: Path) -> None:
    """Catches: a form whose names or steps are read in another way."""
    rows = grpo_rows(5)
    csv = [",".join(rows[0]), *(",".join(str(value) for value in row.values()) for row in rows)]
    lines = [f" {row['step']}/5 [00:1{row['step']}<00:00] " + str({**row, "loss": str(row["loss"])}) for row in rows]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    files = {
        "state": write_state(tmp_path / "state.txt", rows),
        "state in a line": tmp_path / "line",
        "lines": write_lines(tmp_path / "any", rows),
        "nested": write_lines(tmp_path / "nested", [{"step": row["step"], "train": row} for row in rows]),
        "list": tmp_path / "list",
        "columns": tmp_path / "columns",
        "csv": tmp_path / "figures.dat",
        "wandb": write_wandb(tmp_path / "run.bin", map(as_wandb, rows), {"beta": 0.04}),
        "console": tmp_path / "console",
    }
    files["state in a line"].write_text(json.dumps({"best_metric": None, "log_history": rows}))
    files["list"].write_text(json.dumps(rows))
    files["columns"].write_text(json.dumps(columns))
    files["csv"].write_text("\n".join(csv))
    files["console"].write_text("Loading\r 0%|\r".join(line + "\n" for line in lines))
    for form, file in files.items():
        run = only(file)
        assert run.kind.title == "TRL, GRPO, RLOO", form
        assert run.history.steps == [1, 2, 3, 4, 5], form
        assert run.history.values("objective/kl_k3") == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4], abs=1e-9), form
        assert run.history.values("objective/score") == pytest.approx([row["reward"] for row in rows]), form


def test_a_tensorboard_file_is_read(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for row in grpo_rows(4):
            for name, value in row.items():
                writer.add_scalar(f"train/{name}", value, row["step"])
        writer.add_text("train/note", "text", 1)
    (file,) = tmp_path.iterdir()
    run = only(file)
    assert run.log.form == "TensorBoard event file"
    assert run.history.values("response/stop_rate") == pytest.approx([0.9] * 4)
    assert run.history.steps == [1, 2, 3, 4]
    file.write_bytes(file.read_bytes()[:-20])
    assert only(file).history.steps[:3] == [1, 2, 3]


def test_a_long_wandb_file_is_read_over_its_blocks_and_one_that_was_cut_off_as_far_as_it_goes(tmp_path: Path) -> None:
    """Catches: records that go over the 32 KiB of a block, and a run that was killed."""
    rows = [as_wandb(row) | {"train/text": "x" * 5000} for row in grpo_rows(40)]
    file = write_wandb(tmp_path / "run-1.wandb", rows, {"learning_rate": 1e-6, "beta": 0.04, "max_grad_norm": 0.2})
    run = only(file)
    assert run.history.steps == list(range(1, 41))
    assert run.settings == {"learning_rate": 1e-6, "max_grad_norm": 0.2, "beta": 0.04}
    assert run.history.setting("max_grad_norm") == 0.2
    file.write_bytes(file.read_bytes()[:-3000])
    assert only(file).history.steps == list(range(1, 40))
    content = bytearray(file.read_bytes())
    content[100_010] ^= 255
    file.write_bytes(bytes(content))
    assert only(file).history.steps[:10] == list(range(1, 11))  # no crash; what is behind the damage may be lost


def test_wandb_has_nan_as_text(tmp_path: Path) -> None:
    rows = [as_wandb(row) for row in grpo_rows(3)]
    rows[1]["train/loss"] = math.nan
    run = only(write_wandb(tmp_path / "a.wandb", rows, {}))
    assert run.history.broken() == {"ppo/policy_loss": 2}


def test_a_state_that_was_cut_off_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    file = write_state(tmp_path / "trainer_state.json", grpo_rows(5))
    file.write_text(file.read_text()[: file.read_text().index('"step": 4')])
    run = only(file)
    assert run.history.steps == [1, 2, 3]
    assert "cut off" in run.log.notes[0]


def test_nan_is_no_figure_and_null_is_nothing(tmp_path: Path) -> None:
    """Catches: a loss of NaN that looks as if it had not been logged, and the other way round."""
    rows = grpo_rows(3)
    rows[1]["loss"], rows[2]["loss"] = math.nan, None
    run = only(write_state(tmp_path / "a.json", rows))
    assert run.history.broken() == {"ppo/policy_loss": 2}
    assert run.history.count("ppo/policy_loss") == 1


def test_lines_that_are_no_json_are_counted(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", grpo_rows(3))
    file.write_text(file.read_text() + '{"loss": 0.1, "st')
    run = only(file)
    assert run.history.steps == [1, 2, 3]
    assert run.log.notes == ["1 unreadable line left out"]


def test_the_line_of_swift_that_repeats_the_state_is_left_out(tmp_path: Path) -> None:
    rows = [
        {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-4, "token_acc": 0.5, "global_step/max_steps": f"{step}/30"}
        for step in (10, 20, 30)
    ]
    (tmp_path / "args.json").write_text(json.dumps({"learning_rate": 1e-4, "lr_scheduler_type": "cosine"}))
    run = only(write_lines(tmp_path / "logging.jsonl", [*rows, {"log_history": rows, "global_step": 30}]))
    assert run.kind.title == "ms-swift, SFT, or another training with one loss"
    assert run.history.steps == [10, 20, 30]
    assert run.settings["lr_scheduler_type"] == "cosine"


def test_a_csv_of_wandb_holds_several_runs(tmp_path: Path) -> None:
    """Catches: columns of two runs read as one, and the extremes that W&B's export adds read as figures."""
    head = [
        f'"{run} - train/{name}{end}"'
        for run in ("one", "two")
        for name in ("loss", "eval_loss")
        for end in ("", "__MIN", "__MAX")
    ]
    file = tmp_path / "wandb_export.csv"
    rows = [["1", "2.0", "0", "9", "", "", "", "3.0", "0", "9", "3.5", "", ""], ["2", "1.5", "0", "9", "NaN"]]
    file.write_text("\n".join([",".join(["train/global_step", *head]), *map(",".join, rows)]))
    one, two = read_runs(file)
    assert (one.log.name, one.history.values("sft/loss"), one.history.values("sft/eval_loss")) == (
        "one",
        [2.0, 1.5],
        [],
    )
    assert (two.log.name, two.history.values("sft/loss")) == ("two", [3.0])


def test_lines_of_verl(tmp_path: Path) -> None:
    """Catches: Ray's mark, numpy's numbers, and figures that are printed a line each."""
    lines = [verl_line(verl_row(step)) for step in (1, 2)]
    lines.append("step:3 - actor/pg_loss:np.float64(0.25) - critic/vf_loss:np.float32(nan)")
    lines += [" - critic/score/mean:0.5", " - response_length/mean:7.0", "(pid=3) the answer - 12: 3", " - actor/lr:9"]
    file = tmp_path / "train.log"
    file.write_text("\n".join(lines))
    run = only(file)
    assert run.kind.title == "verl, PPO"
    assert run.history.steps == [1, 2, 3]
    assert run.history.at("ppo/policy_loss", 3) == 0.25
    assert run.history.broken() == {"ppo/value_loss": 3}
    assert run.history.values("response/length") == [200.0, 200.0, 7.0]
    assert run.history.values("ppo/lr") == [1e-6, 1e-6]


def test_verls_own_file_logger(tmp_path: Path) -> None:
    rows = [{"step": step, "data": {k: v for k, v in verl_row(step).items() if k != "step"}} for step in (1, 2)]
    run = only(write_lines(tmp_path / "a.jsonl", rows))
    assert run.kind.title == "verl, PPO"
    assert run.history.values("time/score") == [9.0, 9.0]


def test_a_figure_printed_as_zero_with_three_decimals_is_not_zero(tmp_path: Path) -> None:
    """Catches: a step size of 1e-6 that verl once printed as 0.000, and that would stop the run's diagnosis there."""
    lines = [verl_line(verl_row(step)).replace("1e-06", "0.000") for step in range(1, 6)]
    file = tmp_path / "train.log"
    file.write_text("\n".join(lines).replace("clip_ratio:0.05", "clip_ratio:0.000"))
    run = only(file)
    assert run.history.count("ppo/lr") == 0
    assert run.history.values("response/stop_rate") == [1.0] * 5


def test_bars_of_openrlhf_are_averaged_over_a_rollouts_updates(tmp_path: Path) -> None:
    """Catches: every redrawn bar read as an update."""
    text = ""
    for update in (0.1, 0.2):
        for place in (1, 1, 2):
            text += (
                f"(ActorModelRayActor pid=7) Train epoch [1/1]: {place * 50}%|███ | {place}/2 [00:01<00:01, 1.2s/it, "
                f"pg={update * place}, rm=0.4, ret=0.1, glen=100, tlen=200, kl=0.01, act_lr=1e-6]\r"
            )
    file = tmp_path / "train.log"
    file.write_text(text)
    run = only(file)
    assert run.kind.project == "OpenRLHF"
    assert run.history.steps == [1, 2]
    assert run.history.values("ppo/policy_loss") == pytest.approx([0.15, 0.3])
    assert run.history.values("objective/kl") == pytest.approx([1.0, 1.0])


def test_lines_of_openrlhf(tmp_path: Path) -> None:
    figures = {"policy_loss": 0.1, "actor_lr": 1e-6, "response_length": 50.0, "kl": 0.1, "rollout/reward_std": 0.2}
    file = tmp_path / "train.log"
    file.write_text("\n".join(f"INFO ppo_trainer.py:547] ✨ Global step {step}: {figures}" for step in (1, 2, 3)))
    run = only(file)
    assert run.kind.project == "OpenRLHF"
    assert run.history.values("objective/kl") == pytest.approx([5.0] * 3)


def test_bars_of_openrlhfs_reward_model(tmp_path: Path) -> None:
    file = tmp_path / "train.log"
    file.write_text(
        "\n".join(
            f"Train step of epoch 0: {step}%|# | {step}/100 [00:01<00:09, loss=0.7, acc=0.5, chosen_reward=0.2, "
            f"reject_reward=0.1, lr=1e-5, grad_norm=2]"
            for step in (1, 2, 3)
        )
    )
    assert only(file).kind.title == "OpenRLHF, DPO or a reward model"
    run = only(file, "reward")
    assert run.kind.title == "OpenRLHF, reward model"
    assert run.history.values("reward/margin") == pytest.approx([0.1] * 3)


def test_rows_of_a_resumed_run_replace_those_behind_its_checkpoint() -> None:
    rows = [{"step": step, "loss": 1.0} for step in (1, 2, 3, 4)] + [{"step": step, "loss": 2.0} for step in (3, 4, 5)]
    (run,) = ordered(rows)
    assert [(row["step"], row["loss"]) for row in run] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]


def test_steps_that_begin_again_are_another_run() -> None:
    rows = [{"step": step, "loss": 1.0} for step in (1, 2, 3, 1, 2)]
    assert [len(run) for run in ordered(rows)] == [3, 2]


def test_an_evaluation_of_a_step_joins_its_row_and_rows_without_steps_are_counted() -> None:
    (run,) = ordered([{"step": 5.0, "loss": 1.0}, {"step": 5.0, "eval_loss": 2.0}])
    assert run == [{"step": 5.0, "loss": 1.0, "eval_loss": 2.0}]
    (run,) = ordered([{"loss": 1.0}, {"eval_loss": 2.0}, {"loss": 0.5}])
    assert [(row["step"], row.get("loss")) for row in run] == [(1.0, 1.0), (2.0, 0.5)]
    assert run[0]["eval_loss"] == 2.0


def test_steps_that_go_up_and_down_are_no_thousand_runs(tmp_path: Path) -> None:
    runs = read_runs(write_lines(tmp_path / "a", [{"step": step % 2 + 1, "loss": 1.0} for step in range(100)]))
    assert len(runs) == 20
    assert runs[0].log.notes == ["the steps begin again 49 times; the last 20 runs are examined"]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("5" * 200_000 + "%|", id="digits"),
        pytest.param("a: 50%|#| 1/2 [" + "x " * 100_000, id="bar"),
        pytest.param("{'" + "a" * 200_000, id="name"),
        pytest.param("{" + "'a':" * 50_000 + "}", id="names"),
        pytest.param("step:1 " + " - :" * 50_000, id="verl"),
        pytest.param("(" + "pid=1" * 40_000, id="worker"),
        pytest.param("\x1b[" * 100_000, id="colours"),
        pytest.param("{'loss': " + "np." * 60_000 + "}", id="types"),
    ],
)
def test_a_line_that_fits_no_pattern_costs_no_time(tmp_path: Path, text: str) -> None:
    """Catches: a pattern that tries each place of a long line with each length; half a minute here, and days in a large file."""
    file = tmp_path / "file"
    file.write_text(text + "\n")
    start = time.monotonic()
    with pytest.raises(UserError):
        read_runs(file)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("value", "figure"),
    [
        (1, 1.0),
        ("2.5e-06", 2.5e-6),
        ("50%", 0.5),
        ("Infinity", math.inf),
        (True, None),
        ("1/2", None),
        ("", None),
        (10**400, None),
    ],
)
def test_numbers(value: Any, figure: float | None) -> None:
    assert number(value) == figure


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"[1, 2]",
        b"hello\nworld\n",
        b'{"a": 1}\n{"b": 2}\n',
        b"a,b\n1,2\n",
        b":W&B",
        b"\x00" * 100,
        b"{" * 5000,
    ],
    ids=["empty", "object", "list", "numbers", "text", "lines", "csv", "wandb", "zeros", "deep"],
)
def test_a_file_that_is_no_log_gives_one_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_runs(file)
    assert "\n" not in str(error.value)


def test_a_packed_log_is_read_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "train.log.gz"
    file.write_bytes(gzip.compress("\n".join(verl_line(verl_row(step)) for step in (1, 2)).encode()))
    assert only(file).history.steps == [1, 2]


def test_folders_of_other_projects_are_recognised(tmp_path: Path) -> None:
    """Catches: the newest checkpoint chosen by the order of its letters."""
    assert not is_foreign(tmp_path)
    rows = grpo_rows(3)
    write_state(tmp_path / "trl" / "checkpoint-90" / "trainer_state.json", rows)
    newest = write_state(tmp_path / "trl" / "checkpoint-100" / "trainer_state.json", rows)
    assert is_foreign(tmp_path / "trl")
    assert logs_in(tmp_path / "trl") == [newest]
    offline = write_wandb(tmp_path / "w" / "wandb" / "offline-run-1-a" / "run-a.wandb", map(as_wandb, rows), {})
    assert logs_in(tmp_path / "w") == [offline]
    write_lines(tmp_path / "trl" / "metrics.jsonl", [{"step": 1, "sft/loss": 1.0}])
    assert not is_foreign(tmp_path / "trl")  # a run of ours, whatever else lies in it

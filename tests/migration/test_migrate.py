"""`rlhf migrate` on small files of our own with the fields of TRL, LLaMA-Factory and ms-swift."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from toys import Call, build_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf.config import STAGE_CONFIGS, parse_config
from rlhf.migration.reading import read_config
from rlhf.models.templates import TEMPLATES
from rlhf.registry import Registry

OLD_PPO = """
from peft import LoraConfig
from trl import PPOConfig, PPOTrainer

RATE = 2e-5
config = PPOConfig(
    model_name="models/sft", learning_rate=RATE, batch_size=32, mini_batch_size=4, gradient_accumulation_steps=4,
    ppo_epochs=3, init_kl_coef=0.15, adap_kl_ctrl=True, target=4.5, horizon=5000, cliprange=0.1, cliprange_value=0.3,
    vf_coef=0.2, gamma=0.99, lam=0.9, early_stopping=True, target_kl=0.2, steps=1000, score_clip=5.0, seed=7,
    log_with="wandb", use_score_norm=True, max_grad_norm=None, whiten_rewards=True, ratio_threshold=8.0, kl_penalty="kl",
    tracker_project_name=name_of_project(),
)
lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], bias="none", task_type=TASK)
generation_kwargs = {"min_length": -1, "top_k": 0.0, "do_sample": True, "max_new_tokens": 20, "pad_token_id": tok.pad_token_id}
raise SystemExit("this script must not be run")
"""
NEW_PPO = """#!/bin/bash
# python other.py --learning_rate 5
GPUS=2
OUT=runs/new-ppo
export CUDA_VISIBLE_DEVICES=0,1
accelerate launch --num_processes $GPUS scripts/ppo_own.py \\
    --dataset_name own/prompts --output_dir "$OUT" --sft_model_path models/sft --model_name_or_path models/sft-base \\
    --reward_model_path models/rm --per_device_train_batch_size 4 --gradient_accumulation_steps $(expr 8 / $GPUS) \\
    --num_mini_batches 2 --total_episodes 1000 --num_ppo_epochs 2 --kl_coef 0.02 --kl_estimator k3 --cliprange 0.15 \\
    --response_length 40 --temperature 1.0 --missing_eos_penalty 2.0 --stop_token eos --use_peft --lora_r 8 \\
    --lora_target_modules q_proj v_proj --warmup_ratio 0.1 --report_to none --bf16=True --whiten_rewards \\
    --local_rollout_forward_batch_size 8 --push_to_hub False 2>&1 | tee log.txt
"""
LF_PPO: dict[str, Any] = {
    "stage": "ppo", "do_train": True, "model_name_or_path": "org/base", "adapter_name_or_path": "saves/sft",
    "reward_model": "saves/rm", "reward_model_type": "lora", "finetuning_type": "lora", "lora_rank": 16, "lora_target": "all",
    "dataset": "data/prompts.jsonl", "template": "llama3", "cutoff_len": 512, "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4, "ppo_buffer_size": 2, "ppo_epochs": 2, "ppo_target": 3.0, "ppo_score_norm": True,
    "max_steps": 50, "warmup_steps": 5, "max_new_tokens": 64, "top_p": 0.9, "quantization_bit": 4, "learning_rate": "1.0e-5",
    "fp16": True, "plot_loss": True, "output_dir": "saves/ppo",
}  # fmt: skip
LF_RM = {
    "stage": "rm", "model_name_or_path": "org/base", "finetuning_type": "full", "dataset": "data/pairs.jsonl",
    "cutoff_len": 300, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "num_train_epochs": 2,
    "lr_scheduler_type": "cosine", "val_size": 0.1, "eval_steps": 50, "flash_attn": "fa2",
}  # fmt: skip
SWIFT_PPO = """
NPROC_PER_NODE=2 swift rlhf --rlhf_type ppo --model org/base --adapters out/sft --reward_model org/rm --train_type lora \\
  --lora_rank 4 --target_modules all-linear --dataset data/prompts.jsonl --per_device_train_batch_size 4 --num_ppo_epochs 1 \\
  --kl_coef 0.1 --max_completion_length 32 --temperature 0.8 --num_train_epochs 1 --learning_rate 2e-5 --top_k 20 --system hi
"""
SWIFT_RM = {
    "rlhf_type": "rm",
    "model": "org/base",
    "tuner_type": "lora",
    "dataset": ["d.jsonl#500"],
    "num_train_epochs": 1,
}
TRL_REWARD = {
    "model_name_or_path": "models/sft", "dataset_name": "own/pairs", "center_rewards_coefficient": 0.01, "use_peft": True,
    "max_length": 256, "max_steps": 200, "warmup_ratio": 0.1, "lr_scheduler_type": "cosine_with_restarts", "eval_steps": 20,
}  # fmt: skip
TRL_SFT = {
    "model_name_or_path": "org/base", "dataset_name": "own/chats", "packing": True, "use_peft": True, "save_steps": 50,
    "eval_steps": 20, "chat_template_path": "chatml", "completion_only_loss": True,
}  # fmt: skip
FILES = {
    "old.py": OLD_PPO, "new.sh": NEW_PPO, "lf_ppo.yaml": yaml.safe_dump(LF_PPO), "lf_rm.json": json.dumps(LF_RM),
    "swift_ppo.sh": SWIFT_PPO, "swift_rm.yaml": yaml.safe_dump(SWIFT_RM), "reward.yaml": yaml.safe_dump(TRL_REWARD),
    "sft.yaml": yaml.safe_dump(TRL_SFT),
}  # fmt: skip
#: Our stage of each file, and values of the config that is made of it.
EXPECTED: dict[str, tuple[str, dict[str, Any]]] = {
    "old.py": ("ppo", {
        "policy": "sft/sft", "learning_rate": 2e-5, "rollout_batch_size": 32, "minibatch_size": 16, "microbatch_size": 4,
        "num_ppo_epochs": 3, "kl_coef": 0.15, "kl_target": 4.5, "kl_horizon": 5000, "clip_range": 0.1, "clip_range_value": 0.3,
        "vf_coef": 0.2, "gamma": 0.99, "lam": 0.9, "max_approx_kl": 0.3, "total_episodes": 1024, "reward_clip": 5.0, "seed": 7,
        "trackers": ["wandb"], "max_grad_norm": 1e6, "whiten_rewards": True, "lora_r": 8, "lora_alpha": 16, "finetuning": "lora",
        "lora_target_modules": ["q_proj", "v_proj"], "response_length": 20, "missing_eos_penalty": 0.0, "adam_beta2": 0.999,
        "lr_scheduler_type": "constant_with_warmup",
    }),
    "new.sh": ("ppo", {
        "dataset": "own/prompts", "output_dir": "runs/new-ppo", "name": "new-ppo", "policy": "sft/sft", "reward": ["models/rm"],
        "rollout_batch_size": 32, "minibatch_size": 32, "microbatch_size": 4, "total_episodes": 1024, "num_ppo_epochs": 2,
        "kl_coef": 0.02, "clip_range": 0.15, "response_length": 40, "temperature": 1.0, "missing_eos_penalty": 2.0, "lora_r": 8,
        "finetuning": "lora", "lora_target_modules": ["q_proj", "v_proj"], "trackers": ["none"], "dtype": "bfloat16",
        "warmup_steps": 6, "whiten_rewards": True, "vf_coef": 0.1, "learning_rate": 3e-6, "lr_scheduler_type": "linear",
    }),
    "lf_ppo.yaml": ("ppo", {
        "policy": "sft/sft", "reward": ["reward/rm"], "lora_r": 16, "lora_alpha": 32, "max_prompt_length": 512,
        "rollout_batch_size": 16, "minibatch_size": 8, "microbatch_size": 2, "num_ppo_epochs": 2, "kl_target": 3.0,
        "kl_coef": 0.2, "total_episodes": 800, "warmup_steps": 20, "response_length": 64, "quantization": "4bit",
        "learning_rate": 1e-5, "temperature": 0.95, "missing_eos_penalty": 0.0, "dataset": "data/prompts.jsonl",
    }),
    "lf_rm.json": ("reward", {
        "policy": "sft/base", "finetuning": "full", "max_length": 300, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8, "num_train_epochs": 2.0, "lr_scheduler_type": "cosine", "eval_steps": 50,
        "attn_implementation": "flash_attention_2", "learning_rate": 5e-5,
    }),
    "swift_ppo.sh": ("ppo", {
        "policy": "sft/sft", "reward": ["org/rm"], "rollout_batch_size": 16, "minibatch_size": 16, "microbatch_size": 4,
        "kl_coef": 0.1, "response_length": 32, "temperature": 0.8, "learning_rate": 2e-5, "weight_decay": 0.1, "lora_r": 4,
        "missing_eos_penalty": 0.0, "finetuning": "lora",
    }),
    "swift_rm.yaml": ("reward", {
        "policy": "sft/base", "learning_rate": 1e-4, "gradient_accumulation_steps": 16, "per_device_train_batch_size": 1,
        "num_train_epochs": 1.0, "lora_r": 8, "lora_dropout": 0.05,
    }),
    "reward.yaml": ("reward", {
        "policy": "sft/sft", "center_rewards_coefficient": 0.01, "finetuning": "lora", "max_length": 256, "max_steps": 200,
        "warmup_steps": 20, "dataset": "own/pairs", "learning_rate": 1e-4, "eval_steps": 20, "lr_scheduler_type": None,
    }),
    "sft.yaml": ("sft", {
        "model_name_or_path": "org/base", "dataset": "own/chats", "save_steps": 40, "eval_steps": 20, "chat_template": "chatml",
        "num_train_epochs": 3.0, "learning_rate": 2e-5,
    }),
}  # fmt: skip


def migrate(call: Callable[..., Call], tmp_path: Path, name: str, text: str, *words: object) -> tuple[Call, Path]:
    """Write a file and migrate it; the result, and the folder with it."""
    (tmp_path / name).write_text(text)
    done = call("rlhf.migration", tmp_path / name, "--output", tmp_path / "made" / name, *words)
    return done, tmp_path / "made" / name


@pytest.mark.parametrize("name", FILES)
def test_each_form_becomes_a_config_of_ours(name: str, tmp_path: Path, call: Callable[..., Call]) -> None:
    """Catches: a size in another unit, a default of the other project that is lost, a form of file that is misread."""
    stage, expected = EXPECTED[name]
    done, folder = migrate(call, tmp_path, name, FILES[name])
    assert done.code == 0, done.err
    values = yaml.safe_load((folder / f"{stage}.yaml").read_text())
    read = {key: float(values[key]) if isinstance(expected[key], float) else values.get(key) for key in expected}
    assert read == expected
    stand_ins = {"dataset": "d", "policy": "sft/a", "reward": "reward/a", "model_name_or_path": "m"}
    needed = (stand_ins.keys() & STAGE_CONFIGS[stage].__dataclass_fields__.keys()) - values.keys()
    given = [f"--{option}={stand_ins[option]}" for option in needed]
    parse_config(
        STAGE_CONFIGS[stage], ["--config", str(folder / f"{stage}.yaml"), *given]
    )  # raises where it is refused


@pytest.mark.parametrize("name", FILES)
def test_no_option_is_dropped_without_a_word(name: str, tmp_path: Path, call: Callable[..., Call]) -> None:
    """Catches: an option that neither becomes one of ours nor is named with a reason; and lines without their origin."""
    stage = EXPECTED[name][0]
    _, folder = migrate(call, tmp_path, name, FILES[name])
    text = (folder / f"{stage}.yaml").read_text()
    _, _, options = read_config(tmp_path / name)
    assert len(options.values) >= 5
    assert [option for option in options.values if not re.search(rf"\b{option}\b", text)] == []
    settings = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert settings and all("  # " in line for line in settings)


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("old.py", ["use_score_norm: true (a running mean", "tracker_project_name: name_of_project(), task_type: TASK (is",
                    "ratio_threshold: 8.0 (every ratio counts", "min_length: -1", "dataset: prepared data"]),
        ("new.sh", ["kl_estimator: k3 (the reward takes k1", "model_name_or_path: models/sft-base (policy comes from sft_model"]),
        ("lf_ppo.yaml", ["top_p: 0.9, top_k: 50 (responses are drawn from the whole softmax", "fp16: true (half precision",
                         "model_name_or_path: org/base (policy comes from adapter", "ppo_score_norm: true (a"]),
        ("swift_ppo.sh", ["num_train_epochs 1 times the number of prompts", "model: org/base (policy comes from adapters already",
                          "top_k: 20", "system: hi (the tokenizer's own chat template"]),
        ("swift_rm.yaml", ['["d.jsonl#500"] (several data sets, subsets', "dataset: prepared data"]),
        ("reward.yaml", ["lr_scheduler_type: cosine_with_restarts (there are cosine_with_min_lr"]),
        ("sft.yaml", ["packing: true (speed or memory only", "completion_only_loss: true (answers count in the loss"]),
    ],
)  # fmt: skip
def test_reasons_are_printed(name: str, messages: list[str], tmp_path: Path, call: Callable[..., Call]) -> None:
    """Catches: an option whose reason is that of another, and values to be given that are not asked for."""
    done, _ = migrate(call, tmp_path, name, FILES[name])
    assert [message for message in messages if message not in done.out] == [], done.out


@pytest.mark.parametrize(
    ("name", "text", "words", "message"),
    [
        ("a.sh", "ls -l\necho --learning_rate 3\n", (), "holds no commands of TRL, LLaMA-Factory or ms-swift"),
        ("a.sh", f"{SWIFT_PPO}\n{SWIFT_PPO}", (), "holds 2 commands"),
        ("a.yaml", "colour: red\nsize: 3\n", (), "none of their options: colour, size"),
        ("a.yaml", "- 1\n", (), "must hold a mapping"),
        ("a.yaml", "model_name_or_path: a\ndataset_name: b\nlearning_rate: 1\n", (), "give --stage sft or reward"),
        ("a.yaml", "stage: dpo\nmodel_name_or_path: a\n", (), "stage dpo of LLaMA-Factory has no counterpart"),
        ("a.yaml", "rlhf_type: grpo\nmodel: a\n", (), "rlhf_type grpo of ms-swift has no counterpart"),
        ("a.yaml", "stage: ppo\nppo_epoch: 3\n", (), "no option ppo_epoch (did you mean 'ppo_epochs'?)"),
        ("a.yaml", "stage: ppo\nppo_epochs: many\n", (), "is no number"),
        ("a.yaml", "stage: ppo\nppo_epochs: .nan\n", (), "is no finite number"),
        ("a.yaml", "stage: ppo\n1: 2\n", (), "has no option 1"),
        ("a.json", '{"init_kl_coef": 0.1', (), "a.json"),
        ("a.py", "print(1)\n", (), "makes no PPOConfig, RewardConfig or SFTConfig"),
        ("a.py", "PPOConfig(steps=1)\nPPOConfig(steps=2)\n", (), "makes several configs (PPOConfig in line 1, PPOConfig"),
        ("a.py", "def broken(:\n", (), "no Python that can be read"),
        ("a.yaml", "init_kl_coef: 0.1\nppo_epochs: 2\n", ("--stage", "sft"), "a.yaml"),
    ],
)  # fmt: skip
def test_other_files_are_named_in_one_line(
    name: str, text: str, words: tuple[str, ...], message: str, tmp_path: Path, call: Callable[..., Call]
) -> None:
    """Catches: a traceback, or a config that is made of a file of another kind."""
    done, folder = migrate(call, tmp_path, name, text, *words)
    assert message in done.complaint and not folder.exists()


def test_an_ambiguous_file_is_read_as_the_user_says(tmp_path: Path, call: Callable[..., Call]) -> None:
    """Catches: `--stage` that is not used, options of the user's script that stop him, and a config that is overwritten."""
    text = "model_name_or_path: a\ndataset_name: b\nlearning_rate: 1e-4\nmy_flag: 3\n"
    words = ("--stage", "reward", "--own", "my_flag")
    done, folder = migrate(call, tmp_path, "a.yaml", text, *words)
    assert done.code == 0 and "my_flag: 3 (an option of your own script)" in done.out
    assert yaml.safe_load((folder / "reward.yaml").read_text())["policy"] == "sft/a"
    assert "exists; give another --output" in migrate(call, tmp_path, "a.yaml", text, *words)[0].complaint


def test_values_that_are_not_in_the_file_are_asked_for(tmp_path: Path, call: Callable[..., Call]) -> None:
    """Catches: the other project's default in place of a value that the script computes, or that the shell would know."""
    script = "config = PPOConfig(ppo_epochs=2, batch_size=args.size, learning_rate=args.rate, mini_batch_size=2)\n"
    done, folder = migrate(call, tmp_path, "own.py", script)
    values = yaml.safe_load((folder / "ppo.yaml").read_text())
    assert not {"learning_rate", "rollout_batch_size", "minibatch_size", "policy", "reward", "dataset"} & values.keys()
    asked = done.out.partition("to be given:")[2]
    assert (
        "learning_rate: learning_rate: args.rate, which is computed by the script" in asked
        and "policy: sft/NAME" in asked
    )
    done, folder = migrate(call, tmp_path, "own.sh", SWIFT_PPO.replace("2e-5", '"$RATE"'))
    assert "learning_rate: learning_rate: $RATE, which has a variable of the shell" in done.out, done.out
    assert "learning_rate" not in yaml.safe_load((folder / "ppo.yaml").read_text())


def test_a_config_file_on_the_command_line_is_read(tmp_path: Path, call: Callable[..., Call]) -> None:
    """Catches: `llamafactory-cli train FILE option=value`, of which only one half is read."""
    (tmp_path / "lf.yaml").write_text(yaml.safe_dump(LF_PPO))
    done, folder = migrate(call, tmp_path, "run.sh", "llamafactory-cli train lf.yaml learning_rate=3e-5 ppo_epochs=1\n")
    assert done.code == 0, done.err
    values = yaml.safe_load((folder / "ppo.yaml").read_text())
    assert (float(values["learning_rate"]), values["num_ppo_epochs"], values["lora_r"]) == (3e-5, 1, 16)


def test_all_digits_of_a_number_are_kept(tmp_path: Path, call: Callable[..., Call]) -> None:
    """Catches: a step size that is rounded to six digits on its way."""
    _, folder = migrate(call, tmp_path, "lf.yaml", yaml.safe_dump({**LF_PPO, "learning_rate": 1.23456789e-5}))
    assert float(yaml.safe_load((folder / "ppo.yaml").read_text())["learning_rate"]) == 1.23456789e-5


@pytest.mark.parametrize("start", ["torchrun src/swift/cli/sft.py", "python3 -m swift.cli.sft", "swift sft"])
def test_a_project_is_known_by_its_script(start: str, tmp_path: Path) -> None:
    """Catches: a command of ms-swift that is taken for one of TRL, and options that begin at the wrong word."""
    file = tmp_path / "run.sh"
    file.write_text(f"{start} --model org/base --learning_rate 1e-4\n")
    project, stage, options = read_config(file)
    assert (project.name, stage, options.values) == ("ms-swift", "sft", {"model": "org/base", "learning_rate": "1e-4"})


SIZES = ("rollout_batch_size", "minibatch_size", "microbatch_size")
ARRAY = """ARGS=(
  --sft_model_path models/sft   # the policy
  --per_device_train_batch_size 4
)
ARGS+=(--total_episodes 320 --dataset_kwargs '{"a": 1,
  "b": 2}')
torchrun --nproc-per-node 2 --nnodes 2 ppo.py "${ARGS[@]}" --no_bf16 --no-gradient-checkpointing --reward_model_path rm "$@"
"""
LATER = """rate: float = 2e-6
size = 8
size *= 2
def main(steps, debug):
    config = PPOConfig(ppo_epochs=2, learning_rate=rate, batch_size=size, mini_batch_size=4, steps=steps, target=1)
    config.init_kl_coef, other = 0.3, 1
    config.target: float = 4
    if debug:
        config.horizon = 5
if __name__ == "__main__":
    steps = 100
    config.seed = 9
"""


@pytest.mark.parametrize(
    ("name", "text", "values", "messages"),
    [
        ("array.sh", ARRAY, {"policy": "sft/sft", "rollout_batch_size": 16, "gradient_checkpointing": False},
         ("$@ (stands for options", "bf16: false (", "dataset_kwargs: {")),
        ("swift.sh", "export NPROC_PER_NODE=4\n" + SWIFT_PPO.replace("NPROC_PER_NODE=2", ""), dict.fromkeys(SIZES[:2], 16), ()),
        ("swift2.sh", f"NNODES=2 {SWIFT_PPO.strip()}", dict.fromkeys(SIZES[:2], 16), ()),
        ("lf.sh", "CUDA_VISIBLE_DEVICES=0,1 llamafactory-cli train lf.json", dict(zip(SIZES, (32, 16, 2), strict=True)), ()),
        ("one.sh", "CUDA_VISIBLE_DEVICES=1 llamafactory-cli train lf.json", dict(zip(SIZES, (16, 8, 2), strict=True)), ()),
        ("some.sh", "FORCE_TORCHRUN=1 llamafactory-cli train lf.json extra", {"rollout_batch_size": 16},
         ("num_processes (is not in the command", "extra (stands without a name")),
        ("ds.sh", "deepspeed --num_gpus 4 ppo.py --sft_model_path s --kl_coef 0.1 --config own.yaml",
         {"rollout_batch_size": 32, "vf_coef": 0.3}, ()),
        ("later.py", LATER, {"learning_rate": 2e-6, "kl_horizon": None, "kl_coef": 0.3, "seed": 9},
         ("batch_size: size", "steps: steps", "horizon: 5 if debug else ...")),
    ],
)  # fmt: skip
def test_rare_forms_lose_nothing(
    name: str, text: str, values: dict[str, Any], messages: tuple[str, ...], tmp_path: Path, call: Callable[..., Call]
) -> None:
    """Catches: arrays, exported variables, switches that are off, processes, and what a script sets later, without a word."""
    (tmp_path / "lf.json").write_text(json.dumps(LF_PPO))
    (tmp_path / "own.yaml").write_text("vf_coef: 0.3\n")
    done, folder = migrate(call, tmp_path, name, text)
    assert done.code == 0, done.err
    config = yaml.safe_load((folder / "ppo.yaml").read_text())
    read = {option: float(v) if isinstance(v := config.get(option), str) and "e-" in v else v for option in values}
    assert read == values
    assert [message for message in messages if message not in done.out] == [], done.out


@pytest.mark.parametrize(
    ("value", "trackers", "message"),
    [
        ("tensorboard", ["tensorboard"], ""),
        ("wandb mlflow trackio", ["wandb", "mlflow", "trackio"], ""),
        ("none", ["none"], ""),
        ("all", None, "every tracker that is installed"),
        ("tensorboard swanlab", None, "swanlab is none of wandb, tensorboard, mlflow, trackio; for the others: trackers tens"),
    ],
)  # fmt: skip
def test_report_to_becomes_trackers(
    value: str, trackers: list[str] | None, message: str, tmp_path: Path, call: Callable[..., Call]
) -> None:
    """Catches: a tracker that is set there and forgotten here."""
    done, folder = migrate(call, tmp_path, "a.sh", f"{SWIFT_PPO.strip()} --report_to {value}\n")
    config = yaml.safe_load((folder / "ppo.yaml").read_text())
    assert config.get("trackers") == trackers and message in done.out
    assert ("  report_to:" in done.out) == bool(message)


RUN = """accelerate launch ppo.py --dataset_name {data} --output_dir {out} --sft_model_path {sft} --reward_model_path {rm} \\
  --per_device_train_batch_size 2 --gradient_accumulation_steps 4 --num_mini_batches 1 --total_episodes 16 --num_ppo_epochs 2 \\
  --response_length 8 --temperature 1.0 --missing_eos_penalty 1.0 --use_peft --lora_r 4 --learning_rate 1e-3 --report_to none
"""


def test_a_migrated_config_runs_to_its_end(
    tmp_path: Path, toy_base: Callable[[str], Path], toy_data: Path, call: Callable[..., Call]
) -> None:
    """Catches: a config that parses and does not train; models that are imported and cannot be used by PPO and the card."""
    sft, rm, registry = tmp_path / "models" / "sft", tmp_path / "models" / "rm", tmp_path / "registry"
    tokenizer: Any = AutoTokenizer.from_pretrained(toy_base("llama"))
    tokenizer.chat_template = TEMPLATES["chatml"]
    tokenizer.pad_token = "<|endoftext|>"
    build_model("llama", len(tokenizer)).save_pretrained(sft)
    AutoModelForSequenceClassification.from_pretrained(sft, num_labels=1, pad_token_id=0).save_pretrained(rm)
    tokenizer.save_pretrained(sft)
    tokenizer.save_pretrained(rm)
    text = RUN.format(data=toy_data, out=tmp_path / "out", sft=sft, rm=rm)
    done, folder = migrate(call, tmp_path, "run.sh", text)
    assert done.code == 0 and "to be given" not in done.out, done.out + done.err
    take = ("rlhf.sharing", "import")
    assert call(*take, sft, "--as", "sft/sft", "--registry", registry).code == 0
    assert call(*take, rm, "--as", "reward/rm", "--policy", "sft/sft", "--registry", registry).code == 0
    common = ("--registry", registry, "--device", "cpu", "--wandb_mode", "disabled")
    card = (
        "--card_policy_samples",
        4,
        "--card_likelihood_responses",
        4,
        "--card_probe_answers",
        2,
        "--response_length",
        8,
    )
    place = ("--output_dir", tmp_path / "card")
    judged = call(
        "rlhf.evaluation.card.report_card", "--model", "reward/rm", "--dataset", toy_data, *common, *place, *card
    )
    assert judged.code == 0, judged.err[-2000:]
    words = (*common, "--num_eval_samples", 6, "--reward", "reward/rm")
    ran = call("rlhf.stages.ppo", "--config", folder / "ppo.yaml", *words)
    assert ran.code == 0, ran.err[-3000:]
    manifest = Registry(registry).get("ppo/out").manifest
    assert (manifest.metrics["updates"], manifest.config["finetuning"]) == (2, "lora")
    assert [parent.stage for parent in manifest.parents] == ["sft", "reward"]

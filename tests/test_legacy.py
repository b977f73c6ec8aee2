"""What users hold keeps working: artefacts, checkpoints and configs of an earlier version (`tests/legacy`), and the
names that the documentation gives them."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from toys import Call
from transformers import AutoModelForCausalLM

from rlhf import config as options

ROOT = Path(__file__).parents[1]
LEGACY = Path(__file__).parent / "legacy"
STAGES = {"pretrain": "PretrainConfig", "sft": "SFTConfig", "reward": "RewardConfig", "ppo": "PPOConfig"}
#: On the processor that made them, a resumed run ends in the very bytes of the uninterrupted one. Other processors and
#: torch versions round differently: without vector instructions figures moved by 2e-6 of themselves, weights by 1e-7.
CLOSE: dict[str, Any] = {"rel": 1e-4, "abs": 1e-5}
CLOCK = ("seconds", "seconds_per_update", "phases")

REGISTRY_VERBS = (
    *("list", "show", "verify", "delete", "lineage", "diff"),
    *("tag", "prune", "export", "push", "pull", "reproduce"),
)
#: Every documented module that users start with `python -m`, or by a verb of `rlhf`; then words in front of `--help`.
COMMANDS = (
    "rlhf",
    "rlhf.data_prep",
    "rlhf.data_prep show",
    "rlhf.doctor",
    "rlhf.evaluation",
    "rlhf.evaluation.reward",
    "rlhf.generation.chat",
    "rlhf.generation.generate",
    "rlhf.pipeline",
    "rlhf.registry",
    *(f"rlhf.registry {verb}" for verb in REGISTRY_VERBS),
    "rlhf.report",
    "rlhf.stages.pretrain",
    "rlhf.stages.sft",
    "rlhf.stages.reward",
    "rlhf.stages.ppo",
    "rlhf.tracking",
    "rlhf.tracking dashboard",
)
#: The verbs of the `rlhf` command.
VERBS = {
    *("pipeline", "data", "pretrain", "sft", "reward", "ppo", "card", "evaluate", "generate", "chat", "registry"),
    *("doctor", "report", "tracking", "completion", "init", "plan", "migrate"),
}
#: What users import or name in configs; the documentation has no other.
NAMES = (
    "rlhf.config:PretrainConfig",
    "rlhf.config:SFTConfig",
    "rlhf.config:RewardConfig",
    "rlhf.config:PPOConfig",
    "rlhf.config:RewardCardConfig",
    "rlhf.config:EvaluationConfig",
    "rlhf.config:parse_config",
    "rlhf.evaluation.gold:vader",
    "rlhf.base.errors:UserError",
    "rlhf.data_prep:DataConfig",
    "rlhf.data_prep:Source",
    "rlhf.data_prep:prepare",
    "rlhf.evaluation:compare",
    "rlhf.generation.chat_model:open_models",
    "rlhf.generation.config:GenerationConfig",
    "rlhf.models.registered:merged_model",
    "rlhf.ppo.state:Order",
    "rlhf.registry:Registry",
    "rlhf.stages:ppo",
    "rlhf.stages:reward",
    "rlhf.stages:sft",
)

Caller = Callable[..., Call]


@pytest.fixture
def legacy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of tests/legacy as the current folder, on one thread: toy models are many times slower on several."""
    folder, threads = tmp_path / "legacy", torch.get_num_threads()
    shutil.copytree(LEGACY, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield folder
    torch.set_num_threads(threads)


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def manifest(reference: str, version: int = 1) -> dict[str, Any]:
    """A manifest as it stands in the current folder."""
    found: dict[str, Any] = json.loads(Path("registry", reference, f"v{version}", "manifest.json").read_text())
    return found


def assert_close(found: Any, expected: Any, name: str = "") -> None:
    """Compares JSON, numbers up to rounding."""
    if isinstance(expected, Mapping):
        assert found.keys() == expected.keys(), name
        for key in expected:
            assert_close(found[key], expected[key], f"{name}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), name
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_close(one, other, f"{name}/{number}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, **CLOSE), name
    else:
        assert found == expected, name


# Artefacts


def test_artefacts_are_verified(legacy: Path, call: Caller) -> None:
    """Catches: a manifest with another field or another order, which every artefact of a user would fail."""
    done = call("rlhf.registry.__main__", "verify")
    assert done.code == 0, done.err
    references = sorted(line.split()[1] for line in done.out.splitlines() if line.startswith("ok"))
    full, adapters = ["ppo/full@1", "reward/full@1"], ["ppo/toy-ema@1", "ppo/toy@1", "reward/toy@1", "sft/toy@1"]
    assert references == sorted(["pretrain/toy@1", *full, *adapters])
    (legacy / "registry/sft/toy/v1/adapter_config.json").write_text("{}")
    assert call("rlhf.registry.__main__", "verify").code != 0


@pytest.mark.parametrize(
    "kind, models, reward",
    [
        ("lora", ["pretrain/toy", "sft/toy", "ppo/toy", "ppo/toy-ema"], "reward/toy"),
        ("full", ["sft/toy", "ppo/full"], "reward/full"),
    ],
)
def test_policies_answer_and_reward_models_score_as_before(
    legacy: Path, call: Caller, kind: str, models: list[str], reward: str
) -> None:
    """Catches: weights that land in another place, another prompt format, other random numbers, another zero of scores."""
    words = ["--device", "cpu", "--dtype", "float32", "--samples_per_prompt", 2, "--response_length", 8]
    words += ["--compare", *models, "--reward", reward, "--prompt", "The", "This", "Our", "--output", "again.jsonl"]
    done = call("rlhf.generation.generate", *words)
    assert done.code == 0, done.err[-3000:]
    assert_close(rows(legacy / "again.jsonl"), rows(LEGACY / "answers" / f"{kind}.jsonl"))


def test_plain_peft_opens_the_policy(legacy: Path) -> None:
    """Catches: an artefact that no longer opens without this package, as the README has it."""
    base = AutoModelForCausalLM.from_pretrained(legacy / "registry/pretrain/toy/v1")
    ids = torch.tensor([[5, 6, 7]])
    before = base(ids).logits.detach().clone()
    sft = PeftModel.from_pretrained(base, legacy / "registry/sft/toy/v1").merge_and_unload()
    after = PeftModel.from_pretrained(sft, legacy / "registry/ppo/toy/v1")(ids).logits
    assert bool(torch.isfinite(after).all()) and float((after - before).abs().max()) > 0.1


# Configs


@pytest.mark.parametrize("stage", STAGES)
def test_configs_mean_what_they_meant(legacy: Path, stage: str) -> None:
    """Catches: an option that was renamed or dropped, or whose default is another one than the registered runs had."""
    config = options.parse_config(getattr(options, STAGES[stage]), ["--config", f"configs/{stage}.yaml"])
    now, then = json.loads(json.dumps(dataclasses.asdict(config))), manifest(f"{stage}/toy")["config"]
    if stage == "sft":
        then["model_name_or_path"] = then["model_name_or_path"].removesuffix("@1")  # the run resolves the version
        assert now.pop("template_date") is None and "template_date" not in config.recipe()  # newer than these runs
    newer = {
        "trackers",
        "wandb_entity",
        "wandb_tags",
        "wandb_notes",
        "log_texts",
        "log_report",
        "fuse_adapters",
        "audit_steps",
    }
    newer |= {"eval_steps", "num_eval_prompts"} if stage == "ppo" else set()
    assert not newer & config.recipe().keys()
    places = {"output_dir", "snapshot_steps", *newer}  # given on the command line, or newer than these runs
    assert {k: v for k, v in now.items() if k not in places} == {k: v for k, v in then.items() if k not in places}


@pytest.mark.slow  # four processes; SFT's and PPO's recipes are compared below, too
def test_registered_recipes_are_recognised(
    legacy: Path, command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Catches: a recipe hash that changes though no option did, so that every pipeline trains everything again."""
    done = command("rlhf.pipeline", "--config", "configs", "--registry", "registry", "--output_dir", "out")
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in STAGES:
        assert f"{stage}: {stage}/toy@1 has this recipe already, skipped" in done.stdout


# Interrupted runs


@pytest.mark.parametrize("stage, last, names", [("sft", 24, ["toy"]), ("ppo", 8, ["toy", "toy-ema"])])
def test_interrupted_runs_are_resumed(legacy: Path, call: Caller, stage: str, last: int, names: list[str]) -> None:
    """Catches: a checkpoint that is refused or ignored, and one of which a part is forgotten: optimiser state, step size,
    KL coefficient, running mean of the weights, random numbers, position in the data."""
    (before,) = (legacy / "interrupted" / stage / "checkpoints").glob("checkpoint-*")
    assert 0 < int(before.name.split("-")[1]) < last / 2
    words = ["--config", f"configs/{stage}.yaml", "--registry", "registry", "--output_dir", "interrupted"]
    words += ["--snapshot_steps", "4"] if stage == "ppo" else []
    first = rows(legacy / "interrupted" / stage / "metrics.jsonl")
    done = call(f"rlhf.stages.{stage}", *words, "--resume", "true")
    assert done.code == 0, done.err[-3000:]
    logged = rows(legacy / "interrupted" / stage / "metrics.jsonl")
    assert logged[: len(first)] == first and logged[-1]["step"] == last, "it did not go on from the checkpoint"
    for name in names:
        whole, resumed = manifest(f"{stage}/{name}", 1), manifest(f"{stage}/{name}", 2)
        assert resumed["recipe"] == whole["recipe"] and resumed["parents"] == whole["parents"]
        for of in (whole, resumed):
            for key in (*CLOCK, "gold_before", "gold_after"):  # newer than these runs, as the next two
                of["metrics"].pop(key, None)
            for key in ("by", "shared_prompts"):
                of["data"]["overlap"].pop(key, None)
        assert_close(resumed["metrics"], whole["metrics"], name)
        assert_close(resumed["data"], whole["data"], name)
        old, new = (load_file(f"registry/{stage}/{name}/v{v}/adapter_model.safetensors") for v in (1, 2))
        assert old.keys() == new.keys()
        for key, tensor in old.items():
            torch.testing.assert_close(new[key], tensor, rtol=1e-3, atol=1e-5, msg=f"{name}: {key}")


# Names


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_explain_themselves(call: Caller, words: str) -> None:
    """Catches: a module that moved, or whose `main` no longer reads the command line."""
    module, *more = words.split()
    found = importlib.util.find_spec(module)
    assert found is not None
    name = f"{module}.__main__" if found.submodule_search_locations else module
    shown = call(name, *more, "--help")
    assert shown.code == 0, shown.err
    assert "usage" in shown.out.lower()


def test_verbs_of_the_command(call: Caller) -> None:
    """Catches: a verb that went away; more of them are welcome."""
    shown = call("rlhf.__main__", "--help").out
    listed = {line.split()[0] for line in shown.splitlines() if line.startswith("  ")}
    assert listed >= VERBS


@pytest.mark.parametrize("name", NAMES)
def test_names_are_where_they_were(name: str) -> None:
    """Catches: a class or function that moved without leaving its name behind."""
    module, attribute = name.split(":")
    place = importlib.import_module(module)
    is_module = hasattr(place, "__path__") and importlib.util.find_spec(f"{module}.{attribute}") is not None
    assert is_module or callable(getattr(place, attribute))


def test_judges_and_rewards_of_users(legacy: Path, call: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a user's reward function that is called with other arguments, and a judge that answers otherwise.
    Resumed runs load the judge by its name in their configs."""
    from rlhf.evaluation.gold import vader

    assert vader(["a great film", "an awful film"]) == pytest.approx([0.6249, -0.4588])
    lines = ("def brevity(prompts, responses, **columns):", "    return [-1.0 - len(text) for text in responses]")
    (legacy / "my_rewards.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(legacy))
    words = ["--model", "sft/toy", "--prompt", "The", "--response_length", 4, "--device", "cpu"]
    done = call("rlhf.generation.generate", *words, "--reward", "my_rewards:brevity", "--output", "scored.jsonl")
    assert done.code == 0, done.err[-3000:]
    (row,) = rows(legacy / "scored.jsonl")
    assert row["score"] == -1 - len(row["response"])


def test_everything_documented_is_in_the_lists_above() -> None:
    """Catches: a command or a name that is added to the documentation and not to these lists."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").rglob("*.*")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    modules = {name for name in re.findall(r"-m (rlhf(?:\.\w+)*)\b", text) if name.islower()}
    modules -= {"rlhf.stages"}  # of `python -m rlhf.stages.sft`, with an upper-case placeholder
    assert modules <= {words.split()[0] for words in COMMANDS}
    names = set(re.findall(r"\brlhf(?:\.\w+)+:\w+", text))
    names |= {
        f"{module}:{name}"
        for module, imported in re.findall(r"from (rlhf[\w.]*) import ([\w, ]+)", text)
        for name in re.split(r",\s*", imported)
    }
    assert names and names <= set(NAMES)
    verbs = set(re.findall(r"^rlhf ([a-z]+)", text, flags=re.MULTILINE)) | set(re.findall(r"`rlhf ([a-z]+)", text))
    assert verbs and verbs <= VERBS

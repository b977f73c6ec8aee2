"""What a user gets wrong, stage by stage: one line that says what and how to mend it, exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from reward.test_sources import save_classifier
from test_models import ppo_config
from toys import Call
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.base.errors import UserError
from rlhf.data_prep.load import Loaded
from rlhf.models.base import context_length
from rlhf.models.tokenization import load_tokenizer
from rlhf.registry import Registry
from rlhf.run import checkpoint
from rlhf.stages.ppo import encode_texts

Caller = Callable[..., Call]


class Place:
    """A registry and an output folder of one test's own, with the means to run a stage there."""

    def __init__(self, call: Caller, config: Path, registry: Path, output: Path) -> None:
        self.call, self.config, self.registry, self.output = call, config, registry, output

    def run(self, stage: str, *words: object, **options: object) -> Call:
        """Runs a stage on the toy config of that stage, with `options` put into its YAML (None takes a key out)."""
        values = yaml.safe_load((self.config / f"{stage}.yaml").read_text())
        values = {k: v for k, v in {**values, "wandb_mode": "disabled", **options}.items() if v is not None}
        file = self.output.parent / f"{stage}.yaml"
        file.write_text(yaml.safe_dump(values))
        return self.call(
            f"rlhf.stages.{stage}", "--config", file, "--registry", self.registry, "--output_dir", self.output, *words
        )

    def refused(self, stage: str, *words: object, **options: object) -> str:
        """The complaint of a run that must fail and must leave the registry as it was."""
        before = tree(self.registry)
        complaint = self.run(stage, *words, **options).complaint
        assert tree(self.registry) == before
        return complaint


def tree(folder: Path) -> dict[str, int]:
    """Every file and folder below a folder, hidden ones included; the lock file of a name may appear."""
    return {
        str(p.relative_to(folder)): p.stat().st_mtime_ns if p.is_file() else 0
        for p in folder.rglob("*")
        if p.name != ".lock"
    }


@pytest.fixture
def place(tmp_path: Path, call: Caller, toy_config: Path) -> Place:
    """An empty registry."""
    return Place(call, toy_config, tmp_path / "registry", tmp_path / "out")


@pytest.fixture
def full(place: Place, finished: tuple[Path, Path]) -> Place:
    """A copy of the registry of the finished toy pipeline, to be spoiled."""
    shutil.copytree(finished[0], place.registry)
    return place


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Inside, the system refuses to write beyond `size` bytes of a file: what a full disk does, for real."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Options


@pytest.mark.parametrize("stage, key", [("sft", "model_name_or_path"), ("reward", "dataset"), ("ppo", "dataset")])
def test_missing_key(place: Place, stage: str, key: str) -> None:
    """argparse's own error would print the usage, forty lines, before it says which option is missing."""
    assert f"--{key}" in place.refused(stage, **{key: None})


@pytest.mark.parametrize(
    "stage, wrong, right",
    [("sft", "learning_rte", "learning_rate"), ("reward", "eval_step", "eval_steps"), ("ppo", "kl_coeff", "kl_coef")],
)
def test_misspelt_key(place: Place, stage: str, wrong: str, right: str) -> None:
    """An ignored key trains with the default: hours on the wrong KL coefficient, without a word."""
    in_file = place.refused(stage, **{wrong: 1})
    assert f"{stage}.yaml" in in_file and f"'{wrong}'" in in_file and f"did you mean '{right}'" in in_file
    for words in ((f"--{wrong}", "1"), (f"--{wrong}=1",)):
        on_line = place.refused(stage, *words)
        assert f"--{wrong}" in on_line and f"did you mean '{right}'" in on_line


@pytest.mark.parametrize(
    "stage, options, word",
    [
        ("sft", {"learning_rate": "fast"}, "learning_rate"),
        ("sft", {"max_steps": 2.5}, "max_steps"),
        ("reward", {"normalize_std": "perhaps"}, "normalize_std"),
        ("ppo", {"dtype": "float8"}, "dtype"),
        ("ppo", {"kl_coef": float("nan")}, "kl_coef"),
    ],
)
def test_wrong_type(place: Place, stage: str, options: dict[str, Any], word: str) -> None:
    """A value of another type must not reach the trainer: '1e-4' as text, a rounded number of steps, a bool that is a word."""
    assert word in place.refused(stage, **options)


@pytest.mark.parametrize(
    "options, numbers",
    [
        ({"total_episodes": 20}, ("20", "8")),
        ({"minibatch_size": 3}, ("8", "3")),
        ({"microbatch_size": 3}, ("4", "3")),
        ({"rollout_batch_size": 0}, ("0",)),
    ],
)
def test_sizes_that_do_not_divide(place: Place, options: dict[str, int], numbers: tuple[str, ...]) -> None:
    """Floor division would drop the rest of every batch; the message has to hold both numbers."""
    complaint = place.refused("ppo", **options)
    assert all(number in complaint for number in numbers) and next(iter(options)) in complaint


def test_missing_config_file(tmp_path: Path, call: Caller, toy_config: Path) -> None:
    """`FileNotFoundError` with a traceback, and no hint at the file that was meant."""
    complaint = call("rlhf.stages.sft", "--config", toy_config / "stf.yaml").complaint
    assert "stf.yaml" in complaint and f"did you mean '{toy_config / 'sft.yaml'}'" in complaint


def test_config_file_that_is_no_mapping(tmp_path: Path, call: Caller) -> None:
    """A YAML list, or a syntax error, ends in a traceback out of the parser."""
    file = tmp_path / "x.yaml"
    for text in ("- a\n- b\n", "a: [1\n", ""):
        file.write_text(text)
        assert str(file) in call("rlhf.stages.sft", "--config", file).complaint


# Data


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_missing_data(full: Place, tmp_path: Path, stage: str) -> None:
    """The path that was given has to be in the message, not the one of some inner file."""
    assert str(tmp_path / "nowhere") in full.refused(stage, dataset=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "stage, kind, row, needed",
    [
        ("sft", "demonstrations", {"prompt": "a", "answer": "b"}, "completion"),
        ("reward", "comparisons", {"prompt": "a", "chosen": "b"}, "rejected"),
        ("ppo", "prompts", {"question": "a"}, "prompt"),
    ],
)
def test_data_without_the_needed_column(
    full: Place, tmp_path: Path, stage: str, kind: str, row: dict[str, str], needed: str
) -> None:
    """A `KeyError: 'completion'` says neither which file nor what columns it has."""
    write_data(tmp_path / "data", kind, [row] * 4)
    complaint = full.refused(stage, dataset=str(tmp_path / "data"))
    assert str(tmp_path / "data" / kind) in complaint and f"'{needed}'" in complaint
    assert all(column in complaint for column in row)


@pytest.mark.parametrize("stage, kind", [("sft", "demonstrations"), ("reward", "comparisons"), ("ppo", "prompts")])
def test_empty_data(full: Place, tmp_path: Path, stage: str, kind: str) -> None:
    """A stage that 'trains' on nothing and registers the untrained model."""
    write_data(tmp_path / "data", kind, [])
    assert "empty" in full.refused(stage, dataset=str(tmp_path / "data"))


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_nothing_fits_into_max_length(full: Place, stage: str) -> None:
    """Dropping every row and training on the empty rest."""
    assert "max_length=3" in full.refused(stage, max_length=3)


def test_prompt_longer_than_allowed(full: Place) -> None:
    """A prompt that is cut silently asks something else; the message gives both lengths."""
    complaint = full.refused("ppo", max_prompt_length=5)
    assert "max_prompt_length=5" in complaint and "prompt 1" in complaint


def test_prompt_longer_than_the_context(full: Place) -> None:
    """The toy has positions for 256 tokens: beyond them learned ones end in an IndexError, rotary ones in noise."""
    complaint = full.refused("ppo", response_length=250)
    assert "response_length=250" in complaint and "context of 256 tokens" in complaint


def test_texts_of_ptx_longer_than_the_context(toy_base: Callable[[str], Path], tmp_path: Path) -> None:
    """A text that fits into max_prompt_length + response_length, but not into the context, must not reach the model."""
    tokenizer = load_tokenizer(str(toy_base("gpt2")), chat_template="chatml")
    context = context_length(AutoModelForCausalLM.from_pretrained(toy_base("gpt2")))
    rows = [
        {
            "prompt": [{"role": "user", "content": "a"}],
            "completion": [{"role": "assistant", "content": "z" * length}],
        }
        for length in (200, 300)
    ]

    def kept(rows: list[dict[str, Any]], **options: Any) -> list[int]:
        data = Loaded(rows=Dataset.from_list(rows), dropped={}, fingerprint="", numbers=[3, 7])
        texts, dropped = encode_texts(data, tokenizer, ppo_config(max_prompt_length=512, **options), context, tmp_path)
        assert dropped == ({} if options else {"prompt and answer of more than 256 tokens": [7]})
        return [len(answer) for _, answer in texts]

    assert kept(rows) == [201]
    assert kept([{"text": "z" * 300}, {"text": "z" * 9}], ptx_coef=1.0, ptx_text="t") == [255, 56], (
        "plain text is packed, not left out"
    )
    with pytest.raises(UserError, match="at most 256 tokens"):
        kept([rows[1], rows[1]])


def test_demonstrations_longer_than_max_length_are_counted(place: Place, toy_data: Path, tmp_path: Path) -> None:
    """The manifest said that they were trained on, and nothing that they were not."""
    shutil.copytree(toy_data, tmp_path / "data")
    file = tmp_path / "data" / "demonstrations" / "train.jsonl"
    row = json.loads(file.read_text().splitlines()[0])
    long = {**row, "completion": [{"role": "assistant", "content": "good " * 400}]}
    file.write_text(json.dumps(row) + "\n" + json.dumps(long) + "\n" + json.dumps(row) + "\n")
    options = {"dataset": str(tmp_path / "data"), "max_steps": 1, "save_steps": 1, "eval_steps": 1, "preflight": False}
    assert place.run("sft", **options).code == 0
    data = Registry(place.registry).get("sft/toy").manifest.data
    reason = "prompt and answer of more than 256 tokens"  # the model's context, not max_length
    assert data["rows"]["train"] == 2 and data["dropped"] == {"train": {reason: 1}}
    assert data["dropped_rows"] == {"train": {reason: [2]}}


def write_data(folder: Path, kind: str, rows: list[dict[str, str]]) -> None:
    (folder / kind).mkdir(parents=True)
    for split in ("train", "validation"):
        (folder / kind / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# Artefacts and models


@pytest.mark.parametrize(
    "stage, options, maker",
    [
        ("reward", {}, "rlhf sft --name toy"),
        ("ppo", {}, "rlhf sft --name toy"),
    ],
)
def test_missing_parent_in_an_empty_registry(place: Place, stage: str, options: dict[str, str], maker: str) -> None:
    """'No such file' leaves the user to guess which of the three stages was forgotten."""
    assert maker in place.refused(stage, **options)
    assert not place.registry.exists()


@pytest.mark.parametrize(
    "options, maker",
    [
        ({"reward": "reward/tox"}, "rlhf reward --name tox"),
        ({"policy": "sft/toy@7"}, "rlhf sft --name toy"),
    ],
)
def test_missing_parent_beside_others(full: Place, options: dict[str, str], maker: str) -> None:
    """A near name or another version exists: both the mend and what is there have to be named."""
    complaint = full.refused("ppo", **options)
    assert maker in complaint
    assert "did you mean 'reward/toy'" in complaint or "there is @1" in complaint


def test_parent_of_another_stage(full: Place) -> None:
    """A reward model given as policy: its weights would load, and the run would be nonsense."""
    assert "give sft/NAME" in full.refused("ppo", policy="reward/toy")


def test_reward_model_of_another_policy(full: Place) -> None:
    """A reward adapter on other base weights gives plausible, wrong scores. The shapes are the same: only the lineage knows."""
    assert full.run("sft", name="other", seed=1, max_steps=2).code == 0
    complaint = full.refused("ppo", policy="sft/other")
    assert "--policy sft/toy@1" in complaint
    assert "rlhf reward --policy sft/other@1" in complaint


def test_policy_trained_again_after_the_reward_model(full: Place) -> None:
    """sft/toy now means version 2, and the reward model sits on version 1: the everyday way into a mismatched pair."""
    assert full.run("sft", seed=1, max_steps=2).code == 0
    assert "--policy sft/toy@1" in full.refused("ppo")


@pytest.mark.parametrize(
    "stage, spoiled, file",
    [
        ("reward", "sft", "adapter_model.safetensors"),
        ("ppo", "reward", "adapter_model.safetensors"),
        ("ppo", "sft", "tokenizer.json"),
    ],
)
def test_corrupt_parent(full: Place, stage: str, spoiled: str, file: str) -> None:
    """One flipped bit of a weight loads without complaint and trains on."""
    path = full.registry / spoiled / "toy" / "v1" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    complaint = full.refused(stage)
    assert f"{file} is corrupt" in complaint and f"rlhf {spoiled} --name toy" in complaint


def test_parent_without_its_manifest(full: Place) -> None:
    """A half-written artefact, manifest not there yet, must not be taken for a whole one."""
    (full.registry / "reward" / "toy" / "v1" / "manifest.json").unlink()
    assert "rlhf reward --name toy" in full.refused("ppo")


def test_model_folder_that_does_not_exist(place: Place, tmp_path: Path) -> None:
    """transformers takes a wrong path for a hub name and tells the user to log in."""
    assert str(tmp_path / "no-model") in place.refused("sft", model_name_or_path=str(tmp_path / "no-model"))


def test_model_folder_without_weights(place: Place, tmp_path: Path, toy_base: Callable[[str], Path]) -> None:
    """A half-copied model folder: tokenizer and config are there, weights are not."""
    shutil.copytree(toy_base("llama"), tmp_path / "half")
    (tmp_path / "half" / "model.safetensors").unlink()
    assert str(tmp_path / "half") in place.refused("sft", model_name_or_path=str(tmp_path / "half"))


def test_model_without_a_chat_template(place: Place) -> None:
    """A base model brings no template; the message has to name those that can be given."""
    complaint = place.refused("sft", chat_template=None)
    assert "--chat_template" in complaint and "chatml" in complaint and "plain" in complaint


def test_lora_targets_that_are_not_in_the_model(place: Place) -> None:
    """peft's ValueError about target modules, as a traceback."""
    assert "lora_target_modules" in place.refused("sft", lora_target_modules=["no_such_layer"])


@pytest.mark.parametrize("function", ["no_module:f", "rlhf.evaluation.gold:no_function", "nothing"])
def test_gold_function_that_does_not_exist(full: Place, function: str) -> None:
    """A misspelt scorer found after the training is a lost run: it has to be found before."""
    for stage in ("reward", "ppo"):
        assert f"'{function}'" in full.refused(stage, gold=function)


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        ("[0.0] * (len(responses) + 1)", "one for each response; got"),
        ("[float('nan')] * len(responses)", "gave nan for response 1"),
        ("['high'] * len(responses)", "gave 'high' for response 1"),
        ("'high'", "one for each response"),
    ],
)
def test_reward_function_without_usable_scores(
    full: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scores: str, told: str
) -> None:
    """NaN spreads to all weights within an update; a wrong count broadcasts; the user's slip must not look like ours."""
    monkeypatch.syspath_prepend(tmp_path)
    module = f"reward_{tmp_path.name}"
    (tmp_path / f"{module}.py").write_text(f"def score(prompts, responses):\n    return {scores}\n")
    complaint = full.refused("ppo", reward=[f"{module}:score"])
    assert f"{module}:score" in complaint and told in complaint
    assert checkpoint.latest(full.output / "ppo" / "checkpoints") is None


def test_reward_model_whose_tokenizer_has_no_pad(full: Place, tmp_path: Path, toy_base: Callable[[str], Path]) -> None:
    """transformers would score one row and refuse two, in the middle of the first rollout."""
    save_classifier(tmp_path / "padless", AutoTokenizer.from_pretrained(toy_base("gpt2")), padless=True)
    complaint = full.refused("ppo", reward=[str(tmp_path / "padless")])
    assert str(tmp_path / "padless") in complaint and "pad token" in complaint


# The disk


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_no_space_for_a_checkpoint(full: Place, stage: str) -> None:
    """A disk that fills up in the middle of a checkpoint: a traceback out of safetensors or torch.save, and half a file."""
    before = tree(full.registry)
    with largest_file(8_000):
        failed = full.run(stage, preflight=False)
    assert "cannot write checkpoint" in failed.complaint and "GB free" in failed.complaint
    assert tree(full.registry) == before
    assert full.run(stage, resume=True).code == 0, "what the failure left must not stop the run that follows it"
    Registry(full.registry).get(f"{stage}/toy@2")


@pytest.mark.parametrize("kind", ["read-only", "a file"])
def test_a_registry_that_takes_nothing_is_found_before_the_training(place: Place, tmp_path: Path, kind: str) -> None:
    """Catches: hours of training whose result has no place."""
    (tmp_path / "file").touch()
    registry = Path("/sys") if kind == "read-only" else tmp_path / "file"
    complaint = place.refused("sft", "--registry", registry)
    assert "sft/toy could not be registered" in complaint and "--registry" in complaint
    assert not (place.output / "sft" / "metrics.jsonl").exists()


def test_no_space_in_the_registry(full: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint fits and the artefact does not: nothing may be registered."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rlhf.models.adapters.save_file", refuse)
    before = tree(full.registry)
    failed = full.run("ppo", preflight=False)
    assert "cannot register ppo/toy" in failed.complaint and "No space left" in failed.complaint
    assert tree(full.registry) == before
    assert checkpoint.latest(full.output / "ppo" / "checkpoints") is not None


# The same through a process of its own


@pytest.mark.parametrize(
    "words",
    [
        ["rlhf", "sft", "--no_such_option", "1"],
        ["rlhf.stages.reward", "--name", "nothing", "--dataset", "DATA", "--registry", "REGISTRY"],
        ["rlhf.stages.ppo", "--name", "nothing", "--dataset", "DATA", "--registry", "REGISTRY"],
    ],
    ids=["rlhf-sft", "reward", "ppo"],
)
def test_in_a_process(
    tmp_path: Path, toy_data: Path, command: Callable[..., subprocess.CompletedProcess[str]], words: list[str]
) -> None:
    """What an import prints to stderr, or an exit code that the shell does not see, shows only in a real process."""
    places = {"DATA": str(toy_data), "REGISTRY": str(tmp_path / "registry")}
    done = command(*[places.get(word, word) for word in words])
    complaint = Call(done.returncode, done.stdout, done.stderr).complaint
    assert done.stderr == complaint + "\n"
    assert not (tmp_path / "registry").exists()

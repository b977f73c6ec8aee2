"""What lies outside the registry is part of the recipe: a base, template or function that was swapped is noticed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import Call

from rlhf.base import assets
from rlhf.base.storage import sha256_file
from rlhf.config import SFTConfig, parse_config
from rlhf.models import inputs
from rlhf.models.inputs import function_inputs, model_inputs
from rlhf.registry import Artifact, Registry
from rlhf.stages import sft

Caller = Callable[..., Call]
SHORT = ["--max_steps", "2", "--eval_steps", "2", "--save_steps", "2", "--wandb_mode", "disabled"]


class Shelf:
    """A base model and a chat template of the test's own, and an SFT policy that was trained on them."""

    def __init__(self, call: Caller, folder: Path, base: Path, config: Path) -> None:
        self.call, self.config = call, config
        self.registry, self.output, self.base = folder / "registry", folder / "out", folder / "base"
        self.template = folder / "template.jinja"
        shutil.copytree(base, self.base)
        self.weights = next(self.base.glob("*.safetensors"))
        self.template.write_text(CHATML)

    def words(self, stage: str, *more: object) -> list[object]:
        places = ["--registry", self.registry, "--output_dir", self.output]
        own = ["--model_name_or_path", self.base, "--chat_template", self.template, *SHORT] if stage == "sft" else []
        return ["--config", self.config / f"{stage}.yaml", *own, *places, *more]

    def run(self, stage: str, *more: object) -> Call:
        return self.call(f"rlhf.stages.{stage}", *self.words(stage, *more))

    def swap(self) -> None:
        """Change a single number of the base's weights."""
        state = load_file(self.weights)
        name = next(name for name, tensor in state.items() if tensor.dim() == 2)
        state[name].view(-1)[0] += 0.5
        save_file(state, self.weights, metadata={"format": "pt"})


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def shelf(call: Caller, tmp_path: Path, toy_base: Callable[[str], Path], toy_config: Path) -> Shelf:
    return Shelf(call, tmp_path, toy_base("llama"), toy_config)


def test_a_base_that_was_swapped_is_noticed_by_all_that_comes_later(shelf: Shelf, tmp_path: Path) -> None:
    """An adapter put on other weights than those it was trained on, without a word: `verify` said ok."""
    assert shelf.run("sft").code == 0
    registry = ["--registry", shelf.registry]
    assert shelf.call("rlhf.sharing", "verify", *registry).code == 0
    shelf.swap()
    verified = shelf.call("rlhf.sharing", "verify", *registry)
    assert verified.code == 2 and "BAD  sft/toy@1: base model changed since it was made" in verified.out
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the"}\n')
    later = {
        "reward": shelf.run("reward"),
        "generate": shelf.call(
            *("rlhf.generation.generate", "--model", "sft/toy", "--dataset", prompts),
            *("--output", tmp_path / "answers.jsonl", *registry),
        ),
        "merged": shelf.call("rlhf.sharing", "export", "sft/toy", tmp_path / "merged", *registry),
        "adapter": shelf.call("rlhf.sharing", "export", "sft/toy", tmp_path / "a", "--form", "adapter", *registry),
    }
    for name, done in later.items():
        assert done.code == 2 and "sft/toy@1 was trained on another" in done.err, (name, done.err)


def test_a_recipe_counts_as_done_with_its_inputs_only(shelf: Shelf, capfd: pytest.CaptureFixture[str]) -> None:
    """The pipeline's `has this recipe already` for a policy of other weights or another template."""
    words = [str(word) for word in shelf.words("sft")]
    config = parse_config(SFTConfig, words)

    def version() -> tuple[int, str]:
        artifact = sft.run(config, reuse=True)
        assert artifact is not None
        return artifact.version, capfd.readouterr().out

    assert version()[0] == 1
    number, printed = version()
    assert number == 1 and "has this recipe already" in printed
    original = shelf.weights.read_bytes()
    shelf.swap()
    number, printed = version()
    assert number == 2 and "has this recipe, but base model changed since; it is made again" in printed
    shelf.template.write_text(CHATML.replace("<|im_end|>\n", "<|im_end|>\n\n"))
    assert version()[0] == 3
    shelf.template.write_text(CHATML)
    shelf.weights.write_bytes(original)
    assert version()[0] == 1, "an older version is of these very inputs"


@pytest.mark.parametrize("what", ["base model", "chat template"])
def test_a_run_does_not_go_on_with_other_inputs(what: str, shelf: Shelf) -> None:
    """Half a run on one base, and half on another: resumed, it went on and registered the result."""
    assert shelf.run("sft").code == 0
    if what == "base model":
        shelf.swap()
    else:
        shelf.template.write_text(CHATML.replace("<|im_end|>\n", "<|im_end|>\n\n"))
    again = shelf.run("sft", "--resume", "true")
    assert again.code == 2 and f"other options or inputs ({what})" in again.err


def test_a_reward_function_that_was_edited_is_noticed(
    finished: tuple[Path, Path], call: Caller, toy_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two halves of a run with different rewards, and a policy that nobody can make again."""
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / "my_reward_for_inputs.py"
    module.write_text("def score(prompts, responses, **_):\n    return [float(len(r)) for r in responses]\n")
    shutil.copytree(finished[0], tmp_path / "registry")
    places = ["--registry", tmp_path / "registry", "--output_dir", tmp_path / "out", "--wandb_mode", "disabled"]
    words = ["--config", toy_config / "ppo.yaml", *places, "--name", "own", "--reward", "my_reward_for_inputs:score"]
    assert call("rlhf.stages.ppo", *words).code == 0
    artifact = Registry(tmp_path / "registry").get("ppo/own")
    assert list(artifact.manifest.inputs) == ["reward my_reward_for_inputs:score"]
    module.write_text(module.read_text().replace("float(len(r))", "-float(len(r))"))
    again = call("rlhf.stages.ppo", *words, "--resume", "true")
    assert again.code == 2 and "other options or inputs (reward my_reward_for_inputs:score)" in again.err
    verified = call("rlhf.sharing", "verify", "ppo/own", "--registry", tmp_path / "registry")
    assert verified.code == 2 and "reward my_reward_for_inputs:score changed since it was made" in verified.out
    module.unlink()
    assert call("rlhf.sharing", "verify", "ppo/own", "--registry", tmp_path / "registry").code == 0, "not here: unknown"


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("model.safetensors", {"base model"}),
        ("config.json", {"base model"}),
        ("modeling_own.py", {"base model"}),
        ("tokenizer.json", {"tokenizer"}),
        ("tokenizer_config.json", {"tokenizer"}),
        ("chat_template.jinja", {"tokenizer"}),
        ("README.md", set()),
    ],
)
def test_each_file_belongs_to_an_input(
    file: str, changed: set[str], toy_base: Callable[[str], Path], tmp_path: Path
) -> None:
    """A file that decides what a model computes and that no hash covers; and a model called changed for its README."""
    folder = shutil.copytree(toy_base("llama"), tmp_path / "base")
    (folder / file).touch()
    before = model_inputs(str(folder), tmp_path)
    (folder / file).write_bytes((folder / file).read_bytes() + b" ")
    after = model_inputs(str(folder), tmp_path)
    assert before.keys() == after.keys() == {"base model", "tokenizer"}
    assert {name for name in before if before[name] != after[name]} == changed


def test_a_large_base_is_hashed_once(
    toy_base: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minutes of hashing before each stage; and an old hash returned for a file that was replaced by one of equal size."""
    folder = shutil.copytree(toy_base("llama"), tmp_path / "base")
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    first = model_inputs(str(folder), tmp_path)
    read: list[str] = []
    hash_file = assets.sha256_file
    monkeypatch.setattr(assets, "sha256_file", lambda path: (read.append(path.name), hash_file(path))[1])
    assert model_inputs(str(folder), tmp_path) == first and read == []
    weights = folder / "model.safetensors"
    state = {name: torch.zeros_like(tensor) for name, tensor in load_file(weights).items()}
    save_file(state, weights, metadata={"format": "pt"})
    assert model_inputs(str(folder), tmp_path)["base model"] != first["base model"] and read == ["model.safetensors"]


def test_a_model_that_is_not_there_has_no_inputs(tmp_path: Path) -> None:
    """A traceback before the message of the loader, which names the mistake."""
    assert model_inputs(str(tmp_path / "nothing"), tmp_path) == {}
    assert model_inputs("owner/not-downloaded", tmp_path) == {}


def test_a_folder_of_snapshots_is_no_commit_of_the_hub(tmp_path: Path, toy_base: Callable[[str], Path]) -> None:
    """A base at `snapshots/best` was known by its name alone: it could be swapped without a word."""
    base = shutil.copytree(toy_base("llama"), tmp_path / "snapshots" / "best")
    before = model_inputs(str(base), tmp_path)
    (base / "config.json").write_text((base / "config.json").read_text() + " ")
    assert model_inputs(str(base), tmp_path)["base model"] != before["base model"]


def test_an_altered_file_of_the_hubs_cache_is_noticed(
    tmp_path: Path, toy_base: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights edited in the cache of the hub kept the name of their commit."""
    repository, commit = tmp_path / "models--own--toy", "c" * 40
    for part in ("blobs", "refs", f"snapshots/{commit}"):
        (repository / part).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for file in toy_base("llama").iterdir():
        blob = repository / "blobs" / sha256_file(file)
        shutil.copy(file, blob)
        (repository / "snapshots" / commit / file.name).symlink_to(blob)
    monkeypatch.setattr(inputs, "cached_file", lambda *_, **__: str(repository / "snapshots" / commit / "config.json"))
    assert model_inputs("own/toy", tmp_path)["base model"] == f"commit {commit}"
    weights = repository / "snapshots" / commit / "model.safetensors"
    weights.resolve().write_bytes(weights.read_bytes()[:-1] + b"\xff")
    altered = model_inputs("own/toy", tmp_path)
    assert altered["base model"].startswith(f"commit {commit}, altered ")
    assert altered["tokenizer"] == f"commit {commit}"


def test_a_function_is_known_by_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function's file hashed alone: the module of its package that computes the score could change."""
    package = tmp_path / "own_judge_package"
    package.mkdir()
    (package / "__init__.py").write_text("from own_judge_package.inner import score\n")
    (package / "inner.py").write_text("def score(texts): return [0.0] * len(texts)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = function_inputs("gold", ["own_judge_package:score"])
    (package / "inner.py").write_text("def score(texts): return [1.0] * len(texts)\n")
    assert function_inputs("gold", ["own_judge_package:score"]).keys() == before.keys()
    assert function_inputs("gold", ["own_judge_package:score"]) != before


def test_verify_compares_templates_and_classifiers(
    tmp_path: Path, toy_base: Callable[[str], Path], stored: Callable[..., Artifact]
) -> None:
    """An edited template, or other weights of a classifier that scored: `verify` said ok."""
    template, classifier = tmp_path / "own.jinja", shutil.copytree(toy_base("llama"), tmp_path / "classifier")
    template.write_text(CHATML)
    made_from = inputs.template_inputs(str(template)) | inputs.reward_model_inputs(str(classifier), tmp_path)
    artifact = stored(config={"chat_template": str(template)}, inputs=made_from)
    registry = Registry(tmp_path / "registry")
    assert inputs.problem(artifact, registry) == ""
    template.write_text(CHATML + " ")
    assert inputs.problem(artifact, registry) == "chat template changed since it was made"
    template.write_text(CHATML)
    (classifier / "config.json").write_text("{}")
    assert inputs.problem(artifact, registry) == f"base model of reward {classifier} changed since it was made"


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., Artifact]:
    """Makes a registered artefact with these fields in its manifest."""

    def make(**fields: Any) -> Artifact:
        return Registry(tmp_path / "registry").publish(
            *("ppo", "toy", lambda folder: (folder / "card.json").write_text("{}")),
            **{**BLANK, **fields},
        )

    return make


BLANK: dict[str, Any] = {
    "kind": "full", "base_model": "none", "tokenizer_hash": None, "chat_template_hash": None, "pad_token_id": None,
    "stop_token_ids": [], "data": {}, "config": {}, "recipe": "r", "metrics": {},
}  # fmt: skip

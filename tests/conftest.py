"""A toy tokenizer, toy models on disk, toy data, and one finished toy pipeline that all stage tests share."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["WANDB_MODE"] = "offline"

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from toys import WORDS, Call, build_model
from transformers import PreTrainedTokenizerFast

#: The options of each stage at toy size; what they have in common is added by `toy_config`.
TOY = {
    "sft": "max_steps: 4\nper_device_train_batch_size: 4\ngradient_accumulation_steps: 2\neval_steps: 2\nsave_steps: 2\n",
    "reward": "policy: sft/toy\nmax_steps: 4\nper_device_train_batch_size: 4\ngradient_accumulation_steps: 1\n"
    "eval_steps: 2\nsave_steps: 2\nresponse_length: 8\ncard_policy_samples: 6\ncard_likelihood_responses: 12\n"
    "card_probe_answers: 3\n",
    "ppo": "policy: sft/toy\nreward: reward/toy\ntotal_episodes: 16\nrollout_batch_size: 8\nminibatch_size: 4\n"
    "microbatch_size: 2\nresponse_length: 8\nnum_eval_samples: 6\nsave_steps: 1\n"
    "eval_steps: 1\nnum_eval_prompts: 4\nlog_texts: true\n",
}


@pytest.fixture(scope="session")
def toy_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of a few hundred tokens, with ChatML's special tokens; padding set as base models often have it: to stop."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [" ".join(WORDS), "user assistant system", 'Write one sentence of a movie review that starts with "The"']
    raw.train_from_iterator(text * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
    )


@pytest.fixture(scope="session")
def toy_base(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Path]:
    """Folder of a toy base model of a family, as a user would have it on disk."""
    made: dict[str, Path] = {}

    def make(family: str = "llama") -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(f"base_{family}")
            build_model(family, len(toy_tokenizer)).save_pretrained(made[family])
            toy_tokenizer.save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder in the layout that the stages read: 'good' and 'great' sentences are rated up, 'bad' and 'awful' down."""
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)

    def pick(words: list[str]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    def sentence(first: str) -> tuple[str, float]:
        quality = pick(["good", "great", "bad", "awful"])
        rating = {"good": 1.0, "great": 2.0, "bad": -1.0, "awful": -2.0}[quality]
        return f"{first} {pick(['film', 'movie', 'plot'])} is {pick(['very', 'not a', 'a'])} {quality}", rating

    def prompt(first: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": f'Write one sentence of a movie review that starts with "{first}"'}]

    def write(name: str, rows: list[dict]) -> None:
        file = folder / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    firsts = {"train": ["The", "A", "It"], "validation": ["This"]}
    for split, count in (("train", 24), ("validation", 8)):
        demonstrations, comparisons = [], []
        for i in range(count):
            first = firsts[split][i % len(firsts[split])]
            text, rating = sentence(first)
            answer = [{"role": "assistant", "content": text}]
            demonstrations.append({"prompt": prompt(first), "completion": answer, "rating": rating})
            answers = dict(sentence(first) for _ in range(4))
            if len(set(answers.values())) > 1:
                comparisons.append(
                    {
                        "prompt": prompt(first),
                        "responses": [[{"role": "assistant", "content": text}] for text in answers],
                        "ratings": list(answers.values()),
                        "ratings_held_out": [r + 0.1 for r in answers.values()],
                        "ratings_all": list(answers.values()),
                    }
                )
        write(f"demonstrations/{split}", demonstrations)
        write(f"comparisons/{split}", comparisons)
        write(f"prompts/{split}", [{"prompt": prompt(first)} for first in firsts[split]])
    return folder


@pytest.fixture(scope="session")
def toy_config(tmp_path_factory: pytest.TempPathFactory, toy_base: Callable[[str], Path], toy_data: Path) -> Path:
    """A config folder for `rlhf.pipeline` on the toy model and data."""
    folder = tmp_path_factory.mktemp("config")
    for stage, text in TOY.items():
        common = f"name: toy\ndataset: {toy_data}\nlora_r: 4\nlora_alpha: 8\nlearning_rate: 1e-2\n"
        model = f"model_name_or_path: {toy_base('llama')}\nchat_template: chatml\n" if stage == "sft" else ""
        (folder / f"{stage}.yaml").write_text(common + model + text)
    return folder


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`command("rlhf.pipeline", "--config", folder)` runs `python -m ...` in a process of its own."""

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", *map(str, words)], capture_output=True, text=True, timeout=600)

    return run


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, toy_config: Path, command: Callable[..., subprocess.CompletedProcess[str]]
) -> tuple[Path, Path]:
    """Registry and output folder of a finished toy pipeline. Read only: a test that writes copies them first."""
    folder = tmp_path_factory.mktemp("pipeline")
    done = command(
        "rlhf.pipeline", "--config", toy_config, "--registry", folder / "registry", "--output_dir", folder / "out"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "registry", folder / "out"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Call]:
    """`call("rlhf.stages.sft", "--config", file)` is `python -m rlhf.stages.sft ...` in this process: six seconds less."""
    from rlhf.base.errors import run_command

    def run(module: str, *words: object) -> Call:
        runner = importlib.import_module(module)
        if not hasattr(runner, "main"):  # a package, run by its __main__
            runner = importlib.import_module(f"{module}.__main__")
        main = runner.main
        monkeypatch.setattr(sys, "argv", [module, *map(str, words)])
        before = signal.getsignal(signal.SIGTERM)
        capfd.readouterr()
        code: object = 0
        try:
            run_command(main)
        except SystemExit as stop:
            code = stop.code
        finally:
            signal.signal(signal.SIGTERM, before)
        out, err = capfd.readouterr()
        return Call(code, out, err)

    return run

"""Nothing executes from data or models, and no secret gets out of a run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.dynamic_module_utils
from reward.test_sources import endpoint, save_classifier  # noqa: F401
from toys import Call

from rlhf.base import http
from rlhf.base.errors import UserError
from rlhf.config import SFTConfig
from rlhf.models.base import load_base
from rlhf.models.compute import Compute
from rlhf.registry import PICKLE_SUFFIXES
from rlhf.report.card_page import write_card_page
from rlhf.report.run_page import write_report
from rlhf.reward.sources import ClassifierReward

CPU = Compute(torch.device("cpu"), torch.float32)
ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def files(*folders: Path) -> Iterator[Path]:
    return (path for folder in folders for path in folder.rglob("*") if path.is_file())


# ---- pickles --------------------------------------------------------------------------------------------------------


def looks_like_a_pickle(file: Path) -> bool:
    """By its name, as torch.save writes it (a zip archive), or as pickle does (protocol 2 and up)."""
    start = file.read_bytes()[:2]
    return (
        file.suffix in PICKLE_SUFFIXES or zipfile.is_zipfile(file) or (start[:1] == b"\x80" and start[1] in range(2, 6))
    )


def test_pickles_are_recognised(tmp_path: Path) -> None:
    """Catches: the next test finding nothing because it cannot see."""
    torch.save({"a": 1}, tmp_path / "a.json")
    (tmp_path / "b.json").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "c.json").write_text("{}")
    assert [looks_like_a_pickle(tmp_path / f"{name}.json") for name in "abc"] == [True, True, False]


def test_no_stage_leaves_a_pickle(finished: tuple[Path, Path]) -> None:
    """Catches: optimiser states, random states or arguments of transformers' trainer in its own checkpoints."""
    left = [file for file in files(*finished) if "wandb" not in file.parts]
    assert any("checkpoints" in file.parts and file.name == "optimizer.safetensors" for file in left)
    assert [file for file in left if looks_like_a_pickle(file)] == []


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_checkpoint_is_written_and_read_without_pickle(
    stage: str,
    finished: tuple[Path, Path],
    toy_config: Path,
    tmp_path: Path,
    call: Callable[..., Call],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches: a way of transformers' trainer round this project's checkpoints."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle")

    if stage == "reward":
        shutil.copytree(finished[0] / "sft", tmp_path / "registry" / "sft")
    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, refuse)
    places = ["--registry", tmp_path / "registry", "--output_dir", tmp_path / "out", "--wandb_mode", "disabled"]
    words = [f"rlhf.stages.{stage}", "--config", toy_config / f"{stage}.yaml", *places]
    assert call(*words).code == 0
    shutil.rmtree(tmp_path / "out" / stage / "checkpoints" / "checkpoint-4")
    done = call(*words, "--resume", "true")
    assert done.code == 0, done.err[-3000:]


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("kind", ["base", "classifier"])
def test_models_of_pickles_are_refused(
    kind: str, toy_base: Callable[[str], Path], tmp_path: Path, toy_tokenizer: Any
) -> None:
    """Catches: weights in a pytorch_model.bin, which are a pickle, loaded where there are no safetensors."""
    model = tmp_path / "model"
    if kind == "base":
        shutil.copytree(toy_base("llama"), model)
    else:
        save_classifier(model, toy_tokenizer)
    (model / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb(tmp_path / "bang")}, model / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"safetensors"):
        if kind == "base":
            load_base(str(model), SFTConfig(name="n", dataset="", model_name_or_path=""), CPU)
        else:
            ClassifierReward(str(model), CPU, 2)
    assert not (tmp_path / "bang").exists()
    with pytest.raises(Exception, match=r".*"):  # the bomb is one
        torch.load(model / "pytorch_model.bin", weights_only=False)["lm_head.weight"].shape  # noqa: B018
    assert (tmp_path / "bang").exists()


# ---- code -----------------------------------------------------------------------------------------------------------


def with_code(model: Path, bang: Path) -> Path:
    """The model, with code of its own that makes a folder when it is imported."""
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "bomb", "auto_map": {"AutoConfig": "bomb.BombConfig", "AutoModelForCausalLM": "bomb.Bomb"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "bomb.py").write_text(
        "import os\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        f"os.makedirs({str(bang)!r}, exist_ok=True)\n"
        "class BombConfig(LlamaConfig):\n    model_type = 'bomb'\n"
        "class Bomb(LlamaForCausalLM):\n    config_class = BombConfig\n"
    )
    return model


def test_code_of_a_model_runs_only_when_allowed(
    toy_base: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: `trust_remote_code` that is on by default, or asked for on the terminal, where a y is quickly typed."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    bang = tmp_path / "bang"
    model = str(with_code(Path(shutil.copytree(toy_base("llama"), tmp_path / "model")), bang))
    config = SFTConfig(name="n", dataset="", model_name_or_path=model)
    with pytest.raises(UserError, match="trust_remote_code"):
        load_base(model, config, CPU)
    with pytest.raises(UserError):
        ClassifierReward(model, CPU, 2)
    assert not bang.exists()
    load_base(model, config, CPU, trust_remote_code=True)
    assert bang.exists()


# ---- reports --------------------------------------------------------------------------------------------------------


def poisoned(value: Any) -> Any:
    """The same data with the attack at the end of every text in it."""
    if isinstance(value, dict):
        return {k: poisoned(v) for k, v in value.items()}
    if isinstance(value, list):
        return [poisoned(entry) for entry in value]
    return value + ATTACK if isinstance(value, str) else value


def test_reports_escape_whatever_they_show(finished: tuple[Path, Path], tmp_path: Path) -> None:
    """Catches: an answer, prompt, name of a column or option whose text runs as a script in the reader's browser."""
    output = tmp_path / "out"
    shutil.copytree(finished[1], output, ignore=shutil.ignore_patterns("checkpoints*", "wandb"))
    for file in (output / "results.json", output / "reward" / "card.json"):
        file.write_text(json.dumps(poisoned(json.loads(file.read_text()))))
    for file in output.rglob("*.jsonl"):
        rows = [poisoned(json.loads(line)) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = json.loads((output / "reward" / "card.json").read_text())
    for page in (write_report(output), write_card_page(card, tmp_path / "card.html")):
        text = page.read_text()
        assert "alert(1)" in text, "the attack is not shown, so that it is not known whether it would run"
        assert "<script>alert" not in text and "<img" not in text


# ---- secrets --------------------------------------------------------------------------------------------------------

SECRETS = {
    "WANDB_API_KEY": "5ecre7" + "0123456789abcdef" * 2 + "ab",
    "HF_TOKEN": "hf_5ecre7" + "AbCdEfGh" * 4,
    "SCORER_PASSWORD": "5ecre7-sesame-open",
}


def told(*texts: str | bytes) -> list[str]:
    """The secrets that these texts hold, the beginning of a key included. All of them contain one word."""
    return [text[-300:] for one in texts for text in [one.decode(errors="replace") if isinstance(one, bytes) else one]
            if "5ecre7" in text]  # fmt: skip


def test_secrets_stay_in_the_process(
    finished: tuple[Path, Path],
    toy_config: Path,
    tmp_path: Path,
    call: Callable[..., Call],
    endpoint: Callable[[list[Any]], tuple[str, list[Any]]],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches: a key in a manifest, a log, a report, a W&B run or an error, from where it goes wherever those are shown."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(http, "WAITS", ())
    url, asked = endpoint([{"scores": [0.5, 1.0]}])
    url = url.replace("://", "://me:5ecre7-word@") + "?token=5ecre7-query"
    shutil.copytree(finished[0], tmp_path / "registry")
    shutil.copytree(finished[1], tmp_path / "out", ignore=shutil.ignore_patterns("ppo"))
    words = ["rlhf.stages.ppo", "--config", toy_config / "ppo.yaml", "--registry", tmp_path / "registry"]
    words += ["--eval_steps", 0]  # of one answer each, where the endpoint gives two scores
    words += ["--output_dir", tmp_path / "out", "--wandb_group", f"team-{SECRETS['SCORER_PASSWORD']}", "--reward"]
    done = call(*words, "reward/toy", url)
    assert done.code == 0 and asked, done.err[-3000:]
    write_report(tmp_path / "out")
    left = {file: told(file.read_bytes()) for file in files(tmp_path / "registry", tmp_path / "out")}
    assert any("wandb" in file.parts and file.suffix == ".wandb" for file in left)
    assert {file: found for file, found in left.items() if found} == {}
    assert told(done.out, done.err) == []
    assert "***@127.0.0.1" in (tmp_path / "registry" / "ppo" / "toy" / "v2" / "manifest.json").read_text()
    refused = call(*words, "http://me:5ecre7-word@127.0.0.1:9/score?token=5ecre7-query")
    assert "http://***@127.0.0.1:9/score?token=***" in refused.complaint and told(refused.out, refused.err) == []

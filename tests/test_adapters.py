"""Adapter folders: read as data, whole or not at all, and nothing in them is imported, matched or copied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_models import fill_adapters, ppo_config, wide_model
from toys import build_model
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from rlhf.base.errors import UserError
from rlhf.models.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    attach_adapter,
    lora_config,
    read_adapter_config,
    save_adapter,
    with_adapter,
)
from rlhf.models.base import load_base
from rlhf.models.compute import Compute


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter as the stages write it."""
    adapted = with_adapter(wide_model(), lora_config(ppo_config(dtype="float32"), "CAUSAL_LM"))
    fill_adapters(adapted, 1)
    save_adapter(adapted, tmp_path, adapter="default", base_model="toy")
    return tmp_path


def edit(folder: Path, **fields: Any) -> None:
    file = folder / ADAPTER_CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def base() -> PreTrainedModel:
    return wide_model()


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}, {"lora_target_modules": ["q_proj"]}])
def test_what_was_saved_is_read(options: dict[str, Any], task: str, tmp_path: Path) -> None:
    """Catches: a field left out on reading, so that an adapter computes with another rank, scale or kind."""
    written = lora_config(ppo_config(dtype="float32", **options), task)
    written.inference_mode = True
    written.save_pretrained(str(tmp_path))
    read = read_adapter_config(tmp_path)
    for name in ("r", "lora_alpha", "use_dora", "use_rslora", "modules_to_save", "task_type", "lora_dropout"):
        assert getattr(read, name) == getattr(written, name), name
    assert read.target_modules == written.target_modules


#: Patterns that are no name of a layer, with and without the beginning that peft writes.
PATTERNS = ["(a+)+$", r".*\.(a+)+$", r".*\..*\.q_proj", ".*", "q_proj|.*", "q_proj\n", "", r".*\."]
HOSTILE: list[dict[str, Any]] = [
    {"megatron_config": {"a": 1}, "megatron_core": "evil"},
    {"megatron_core": "evil"},
    {"auto_mapping": {"base_model_class": "x", "parent_library": "evil"}, "peft_type": "EVIL"},
    {"peft_type": "IA3"},
    {"peft_type": "PROMPT_TUNING"},
    {"peft_type": None},
    {"task_type": "SEQ_2_SEQ_LM"},
    {"target_modules": ".*"},
    {"target_modules": "(a+)+$"},
    {"target_modules": ["(a+)+$"]},
    {"target_modules": []},
    {"target_modules": {"a": 1}},
    {"layer_replication": [[0, 1_000_000]]},
    {"layers_to_transform": [0]},
    *({field: {pattern: 4}} for field in ("rank_pattern", "alpha_pattern") for pattern in PATTERNS),
    *(
        {field: [pattern]}
        for field in ("exclude_modules", "target_parameters", "modules_to_save")
        for pattern in PATTERNS
    ),
    *({field: "q_proj"} for field in ("exclude_modules", "target_parameters")),  # peft matches a text as a pattern
    {"rank_pattern": {"q_proj": 0}},
    {"rank_pattern": {"q_proj": 1.5}},
    {"rank_pattern": {"q_proj": 10**9}},
    {"rank_pattern": ["q_proj"]},
    {"alpha_pattern": {"q_proj": float("inf")}},
    {"r": 0},
    {"r": -1},
    {"r": "4"},
    {"r": True},
    {"r": 10**9},
    {"r": None},
    {"lora_alpha": "8"},
    {"lora_alpha": [8]},
    {"lora_dropout": 1.0},
    {"lora_dropout": -0.1},
    {"use_dora": "yes"},
    {"modules_to_save": "score"},
    {"modules_to_save": [["score"]]},
    {"trainable_token_indices": [-1]},
    {"trainable_token_indices": {"embed": "all"}},
    {"init_lora_weights": "eva"},
    {"corda_config": {"cache_file": "x"}},
    {"something_new": "x"},
]


@pytest.mark.parametrize("fields", HOSTILE, ids=str)
def test_fields_that_this_package_does_not_write_are_refused(fields: dict[str, Any], folder: Path) -> None:
    """Catches: a module that a config names and peft imports (from the working directory, too), a pattern that matches for
    ever, a layer copied a million times, another kind of adapter, and a traceback for a value of another type."""
    edit(folder, **fields)
    with pytest.raises(UserError, match=rf"{ADAPTER_CONFIG}.* (is|has no) .*no LoRA adapter|holds no adapter"):
        attach_adapter(base(), folder)


def test_fields_of_other_versions_of_peft_pass_while_they_mean_nothing(folder: Path) -> None:
    """Catches: an adapter of the next version of peft refused for a field that is not set."""
    edit(folder, something_new=None, another=False, third=[], peft_version="99.0")
    attach_adapter(base(), folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"r": ' + "1" * 400 + "}", "[" * 5000, '{"peft_type": "LORA"}']
)
def test_a_config_that_is_none_is_one_line(text: str, folder: Path) -> None:
    """Catches: a traceback for a file that was cut, or is something else."""
    (folder / ADAPTER_CONFIG).write_text(text)
    with pytest.raises(UserError, match=ADAPTER_CONFIG):
        read_adapter_config(folder)


def test_an_adapter_that_lacks_tensors_is_refused(folder: Path) -> None:
    """Catches: a layer whose adapter stays at its fresh zeros, with a warning of peft's at most."""
    state = load_file(folder / ADAPTER_FILE)
    name = next(name for name in state if "lora_B" in name)
    save_file({key: tensor for key, tensor in state.items() if key != name}, folder / ADAPTER_FILE)
    with pytest.raises(UserError, match="on one side only"):
        attach_adapter(base(), folder)
    save_file({**state, name.replace("layers.0", "layers.7"): state[name].clone()}, folder / ADAPTER_FILE)
    with pytest.raises(UserError, match="on one side only"):
        attach_adapter(base(), folder)
    (folder / ADAPTER_FILE).write_bytes(b"cut")
    with pytest.raises(UserError, match="holds no adapter"):
        attach_adapter(base(), folder)


def test_loading_shows_no_progress_of_the_library(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Bug: `Loading weights: 0%|` between the results of evaluate, export and generate, which are no stages."""
    build_model("llama", 48).save_pretrained(tmp_path)
    transformers_logging.enable_progress_bar()
    capfd.readouterr()
    load_base(str(tmp_path), ppo_config(), Compute(torch.device("cpu"), torch.float32))
    assert "Loading" not in capfd.readouterr().err

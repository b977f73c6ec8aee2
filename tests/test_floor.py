"""benchmarks/floor.py at toy size: what is counted, by hand, and what is reported."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from rlhf.config import PPOConfig, build

ROOT = Path(__file__).parents[1]
WORK = {"episodes": 8, "microbatch": 4, "prompt": 6, "response": 5}
ROWS = 8 * (6 + 5)
"""Tokens of all episodes."""


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a script of benchmarks/."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def floor(load: Callable[[str], Any], tmp_path: Path) -> Callable[..., Any]:
    """The floor of a stage for a model of a shape, of which only the config is there."""

    def make(shape: dict[str, Any], stage: str = "ppo", **options: Any) -> Any:
        AutoConfig.for_model(**shape).save_pretrained(tmp_path)
        roles = {"name": "toy", "dataset": "none", "policy": "sft/toy", "reward": ["reward/toy"]}
        own = {**roles, "device": "cpu", "dtype": "bfloat16", "lora_r": 2, **options}
        return load("products").Floor(stage, str(tmp_path), build(PPOConfig, own, "toy"), **WORK)

    return make


LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 8,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 96,
    "n_embd": 8,
    "n_inner": 24,
    "n_layer": 3,
    "n_head": 2,
    "n_positions": 32,
}
PHI = {**LLAMA, "model_type": "phi", "num_key_value_heads": 2}
#: (inputs, outputs) of the layers of a block.
SHAPES: dict[str, list[tuple[int, int]]] = {
    "llama": [(8, 8), (8, 4), (8, 4), (8, 8), (8, 20), (8, 20), (20, 8)],
    "gpt2": [(8, 24), (8, 8), (8, 24), (24, 8)],
    "phi": [(8, 8)] * 4 + [(8, 20), (20, 8)],
}


@pytest.mark.parametrize("shape", [LLAMA, GPT2, PHI], ids=lambda shape: shape["model_type"])
def test_flop_of_an_update_by_hand(floor: Callable[..., Any], shape: dict[str, Any]) -> None:
    """Catches: a layer that is not found, a pass too many, logits of prompts, a prompt's pass in each step."""
    sizes = SHAPES[shape["model_type"]]
    trunk = 2 * 3 * sum(inputs * outputs for inputs, outputs in sizes)  # a token's
    head, adapters = 2 * 8 * 96, 2 * 3 * 2 * sum(inputs + outputs for inputs, outputs in sizes)
    pieces = {name: piece.flops() for name, piece in floor(shape).pieces.items()}
    prefill, steps = trunk * 8 * 6 + head * 8, 4 * 8 * (trunk + head)
    assert pieces["rollout"] == {"base": prefill + steps, "adapters": 0}
    # policy, reference, values, reward; logits of the first two
    assert pieces["score"] == {"base": 4 * trunk * ROWS + 2 * head * 8 * 5, "adapters": 3 * adapters * ROWS}
    # policy and values, each with the gradient of its inputs; adapters also with those of their weights
    assert pieces["optimise"] == {"base": 4 * trunk * ROWS + 2 * head * 8 * 5, "adapters": 6 * adapters * ROWS}
    assert pieces["update"] == {
        kind: sum(pieces[name][kind] for name in ("rollout", "score", "optimise")) for kind in ("base", "adapters")
    }


def test_flop_follows_the_options_that_change_the_work(floor: Callable[..., Any]) -> None:
    """Catches: a value model counted that is not there, epochs left out, full training without its weights' gradients."""
    usual = floor(LLAMA).pieces
    shared = floor(LLAMA, value_model="shared_trunk").pieces
    twice = floor(LLAMA, num_ppo_epochs=2).pieces
    full = floor(LLAMA, finetuning="full").pieces
    pass_ = 2 * 3 * sum(inputs * outputs for inputs, outputs in SHAPES["llama"]) * ROWS
    assert usual["score"].flops()["base"] - shared["score"].flops()["base"] == pass_
    assert usual["optimise"].flops()["base"] - shared["optimise"].flops()["base"] == 2 * pass_
    assert twice["optimise"].flops()["base"] == 2 * usual["optimise"].flops()["base"]
    assert twice["rollout"].flops() == usual["rollout"].flops()
    weights = full["optimise"].flops()["base"] - usual["optimise"].flops()["base"]
    assert weights == 2 * pass_ + 2 * 8 * 96 * 8 * 5 and full["update"].flops()["adapters"] == 0


def test_flop_of_supervised_steps(floor: Callable[..., Any]) -> None:
    """Catches: SFT's head on prompts, and a pair's prompt counted twice."""
    a_token = 2 * 3 * sum(inputs * outputs for inputs, outputs in SHAPES["llama"])
    (step,) = floor(LLAMA, "sft").pieces.values()
    assert step.flops()["base"] == 2 * (a_token * ROWS + 2 * 8 * 96 * 8 * 5)
    (step,) = floor(LLAMA, "reward").pieces.values()
    assert step.flops()["base"] == 2 * a_token * 2 * (6 + 2 * 5)


def test_experts_count_for_the_tokens_that_they_see(floor: Callable[..., Any]) -> None:
    """Catches: all experts computed for each token, and a router that is left out."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4}
    made = floor({**LLAMA, **experts, "model_type": "mixtral"})
    block = 8 * 8 * 2 + 8 * 4 * 2 + 8 * 4 + 2 * (8 * 20 * 3)  # attention, router, two experts
    whole = made.pieces["score"].flops()["base"]
    assert whole == pytest.approx(4 * 2 * 3 * block * ROWS + 2 * 2 * 8 * 96 * 8 * 5)


def test_a_floor_is_the_time_of_its_products_or_of_what_it_reads(floor: Callable[..., Any]) -> None:
    """Catches: sums without their numbers, decoding by the shorter of its two times, bytes without the cache."""
    made = floor(LLAMA)
    rollout = made.pieces["rollout"]
    weights = 2 * (3 * sum(inputs * outputs for inputs, outputs in SHAPES["llama"]) + 8 * 96)
    cached = 8 * (6 + 2) * 2 * 3 * 1 * 4 * 2  # rows, tokens at the middle, keys and values, layers, heads, width, bytes
    assert rollout.step_bytes == weights + cached and rollout.steps == 4
    products = {
        one for piece in made.pieces.values() for part in (piece.base, piece.adapters, piece.step) for one in part
    }
    times = {one: one.flops * 1e-9 for one in products}
    flops = rollout.flops()["base"]
    assert rollout.seconds({**times, None: 0.0})["base"] == pytest.approx(flops * 1e-9)
    prefill = flops - 4 * sum(one.flops * number for one, number in rollout.step.items())
    slow = rollout.seconds({**times, None: 1.0})["base"]
    assert slow == pytest.approx(prefill * 1e-9 + 4 * rollout.step_bytes)
    ours = made.over({"score": 3.0}, {**times, None: 0.0}, {**{one: 3 * of for one, of in times.items()}, None: 0.0})
    counted, floor_of = made.pieces["score"].flops(), ours["score"]["floor"]
    assert floor_of["base"] == pytest.approx(2e-9 * counted["base"])
    assert floor_of["with adapters"] == pytest.approx(2e-9 * (counted["base"] + counted["adapters"]))
    assert ours["score"]["ratio"]["base"] == pytest.approx(3.0 / floor_of["base"])


@pytest.mark.parametrize("shape", [LLAMA, GPT2], ids=lambda shape: shape["model_type"])
def test_products_are_those_of_the_layers(load: Callable[[str], Any], floor: Callable[..., Any], shape: Any) -> None:
    """Catches: shapes or strides that are not those of torch's own products, forward or backward."""
    made, seen = floor(shape), set[tuple[Any, ...]]()
    layer = next(layer for layer in made.layers if layer.inputs != layer.outputs)
    weight = torch.randn((layer.inputs, layer.outputs) if layer.across else (layer.outputs, layer.inputs))

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten.mm.default:
                seen.add(tuple((tuple(x.shape), x.stride()) for x in args))
            return function(*args, **(kwargs or {}))

    x = torch.randn(7, layer.inputs, requires_grad=True)
    with Record():
        (x @ weight if layer.across else torch.nn.functional.linear(x, weight)).sum().backward()
    ours = {tuple((s.shape, s.strides) for s in made.forward(layer, 7).arguments)}
    assert ours <= seen
    shapes = {tuple(shape for shape, _ in sides) for sides in seen}
    assert tuple(s.shape for s in made.backward(layer, 7).arguments) in shapes


def test_floor(
    load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches: a stage that cannot be timed any more, a warm-up or a profiled step among the timed ones, a missing piece."""
    script, common = load("floor"), load("common")
    monkeypatch.setattr(
        common, "measure", lambda _, subject, work: getattr(script, subject)(**json.loads(json.dumps(work)))
    )
    out = tmp_path / "out.json"
    words = [word for name, value in WORK.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(
        sys, "argv", ["floor", "--model", "tiny", *words, "--runs", "1", "--updates", "2", "--out", str(out)]
    )
    script.main()
    result, text = json.loads(out.read_text()), capsys.readouterr().out
    assert list(result["summary"]) == ["rollout", "score", "optimise", "update", "SFT step", "reward step"]
    for runs in result["runs"].values():
        (run,) = runs
        assert len(run["timed"]) == 2
        top = run["operators"]["top"]
        assert top == sorted(top, key=lambda one: -one["seconds"]) and 0 < len(top) <= 12
        assert all(one["name"] not in ("mm", "mkldnn::_linear_pointwise") for one in top)
        assert run["operators"]["base products"] > 0 and run["gb_per_second"] > 0
    for name, figures in result["summary"].items():
        assert figures["ratio, with adapters"]["median"] <= figures["ratio, base"]["median"], name
    ppo = result["runs"]["ppo"][0]
    for step in ppo["timed"]:
        phases = [step[name] for name in ("rollout", "score", "optimise")]
        assert sum(phase["seconds"] for phase in phases) <= step["update"]["seconds"] * 1.001
        floors = sum(phase["floor"]["base"] for phase in phases)
        assert step["update"]["floor"]["base"] == pytest.approx(floors, rel=1e-3)
    head = ppo["modules"][-1]
    assert (head["name"], head["inputs"], head["outputs"], head["rows"]) == ("head", 64, 512, 20)
    assert "| SFT step |" in text and "layers.*.mlp.down_proj | 128 x 64 | 44 |" in text

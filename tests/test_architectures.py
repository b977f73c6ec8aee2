"""Architectures: what a probe finds out about a model, what is refused, and whole chains of stages on tiny models."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlhf.base.errors import UserError
from rlhf.config import RunConfig
from rlhf.models import sampling
from rlhf.models.adapters import fitted, fused_experts, lora_layers, matrices_without_adapter, with_adapter
from rlhf.models.anatomy import anatomy, backbone, head, hidden_states, left_justified
from rlhf.models.base import load_base, load_policy
from rlhf.models.classifiers import GENERIC, open_classifier
from rlhf.models.compute import Compute
from rlhf.models.reward_model import sequence_classifier
from rlhf.registry import Registry
from rlhf.sharing.export import check_adapter, export


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script benchmarks/architectures.py."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("architectures")


@pytest.fixture
def tiny(script: Any) -> Callable[..., PreTrainedModel]:
    """`tiny("opt")` is a random model of a type, `tiny("opt", option=value)` one with other options."""

    def make(name: str, **options: Any) -> PreTrainedModel:
        config = script.tiny_config(name)
        for option, value in options.items():
            setattr(config, option, value)
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()

    return make


@pytest.mark.parametrize("name", ["bert", "roberta", "cpmant"])
@pytest.mark.parametrize("spread", [0.02, 0.2])
def test_models_that_look_ahead_are_refused(name: str, spread: float, tiny: Callable[..., PreTrainedModel]) -> None:
    """Catches: a model that learns to copy the next token, however little a later token changes at first."""
    with pytest.raises(UserError, match="see those that come after them"):
        anatomy(tiny(name, initializer_range=spread))


def test_a_bidirectional_model_is_causal_with_is_decoder(tiny: Callable[..., PreTrainedModel]) -> None:
    assert anatomy(tiny("bert", is_decoder=True)).trunk == "bert"


@pytest.mark.parametrize("name", ["bart", "trocr"])
def test_the_decoder_of_an_encoder_decoder_is_refused(name: str, tiny: Callable[..., PreTrainedModel]) -> None:
    with pytest.raises(UserError, match="decoder of an encoder-decoder"):
        anatomy(tiny(name))


@pytest.mark.parametrize(
    ("name", "trunk", "plain"),
    [
        ("llama", "model", True),
        ("opt", "model.decoder", True),
        ("granite", "model", False),
        ("cohere", "model", False),
        ("gemma2", "model", False),
        ("mamba", "backbone", True),
        ("rwkv", "rwkv", True),
        ("bert (is_decoder)", "bert", False),
    ],
)
def test_backbone_and_head_compute_the_models_logits(
    name: str, trunk: str, plain: bool, tiny: Callable[..., PreTrainedModel]
) -> None:
    """Catches: heads that are called as no model calls them, and scales or soft caps that are left out."""
    model = tiny(name)
    ids = torch.randint(10, 200, (3, 7), generator=torch.Generator().manual_seed(1))
    found = anatomy(model)
    assert (found.trunk, found.plain_head) == (trunk, plain)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        states = hidden_states(model, ids, torch.ones_like(ids))
        assert states.shape == (3, 7, found.width)
        torch.testing.assert_close(head(model)(states), expected, rtol=0, atol=1e-5)
    assert "forward" not in vars(backbone(model))  # the head leaves the backbone as it was


@pytest.mark.parametrize("name", ["llama", "opt", "bloom", "mpt", "mamba", "rwkv", "roberta (is_decoder)", "ctrl"])
def test_padding_on_either_side_changes_nothing(name: str, tiny: Callable[..., PreTrainedModel]) -> None:
    """Catches: padding that is read, or counted as positions. The oracle is each row alone, without padding."""
    model = tiny(name)
    rows = [torch.arange(20, 27), torch.arange(50, 54), torch.arange(90, 91)]
    for left, right in ((0, 0), (3, 0), (0, 3), (2, 2)):
        width = left + right + 7
        ids, mask = torch.full((3, width), 1), torch.zeros(3, width, dtype=torch.long)
        for number, row in enumerate(rows):
            start = width - right - len(row) if left else 0
            ids[number, start : start + len(row)], mask[number, start : start + len(row)] = row, 1
        with torch.no_grad():
            states = hidden_states(model, ids, mask)
            for number, row in enumerate(rows):
                alone = model.get_submodule(anatomy(model).trunk)(input_ids=row[None])[0][0]
                torch.testing.assert_close(states[number][mask[number].bool()], alone, rtol=0, atol=1e-4)


def test_rows_are_justified_to_the_left() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0]])
    assert left_justified(mask).tolist() == [[2, 3, 0, 1], [0, 1, 2, 3], [1, 2, 0, 3]]


@pytest.mark.parametrize("name", ["mamba", "rwkv", "granite", "opt", "mpt", "bloom"])
def test_sampled_log_probabilities_are_those_of_a_plain_pass(name: str, tiny: Callable[..., PreTrainedModel]) -> None:
    """Catches: a cache whose logits are others, and prompts of several lengths in a model that reads padding. The oracle is
    transformers' own pass over each prompt and response, alone."""
    model = tiny(name)
    prompts = [[5, 6, 7], [5, 6, 9, 10, 11, 12], [20]]
    ids, mask = torch.full((3, 6), 1), torch.zeros(3, 6, dtype=torch.bool)
    for number, prompt in enumerate(prompts):
        ids[number, 6 - len(prompt) :], mask[number, 6 - len(prompt) :] = torch.tensor(prompt), True
    result = sampling.sample(
        model, ids, mask, max_new_tokens=5, temperature=1.0, stop_token_ids=[0], pad_token_id=1,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    for number, prompt in enumerate(prompts):
        tokens = result.responses[number][result.mask[number]]
        whole = torch.cat([torch.tensor(prompt), tokens])
        with torch.no_grad():
            logprobs = model(input_ids=whole[None], use_cache=False).logits[0].log_softmax(-1)
        expected = logprobs[len(prompt) - 1 : -1].gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(result.logprobs[number][result.mask[number]], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "granitemoe", "qwen3_moe"])
def test_fused_experts_get_adapters(name: str, tiny: Callable[..., PreTrainedModel]) -> None:
    """Catches: `all-linear` that leaves the experts, most of the weights, without an adapter."""
    model = tiny(name)
    experts = fused_experts(model)
    assert len(experts) == 4 and {word.rpartition(".")[2] for word in experts} == {"gate_up_proj", "down_proj"}
    config = fitted(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted = with_adapter(model, config)
    assert sum(".experts" in layer for layer in lora_layers(adapted)) == 4
    assert not any("gate_up_proj" in matrix and "bias" not in matrix for matrix in matrices_without_adapter(adapted))


@pytest.mark.parametrize("option", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_what_peft_cannot_give_experts_is_refused(option: dict[str, Any], tiny: Callable[..., PreTrainedModel]) -> None:
    with pytest.raises(UserError, match=f"fused, and peft adapts those without {next(iter(option))}"):
        fitted(tiny("mixtral"), LoraConfig(r=2, target_modules="all-linear", **option))


def test_layers_that_are_not_called_get_no_adapter(tiny: Callable[..., PreTrainedModel]) -> None:
    """Jamba's and Mamba's mixers read some weights without calling the layer, so an adapter there would never be trained."""
    config = fitted(tiny("mamba"), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert "mixer.out_proj" in config.exclude_modules
    assert fitted(tiny("llama"), LoraConfig(target_modules="all-linear")).exclude_modules is None


@pytest.mark.parametrize(("name", "generic"), [("llama", False), ("opt", False), ("granite", True), ("rwkv", True)])
def test_a_reward_model_is_saved_and_opened(
    name: str, generic: bool, tiny: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    """Catches: a score read at padding, a backbone that is not saved, and transformers' own class left out where there is one."""
    model = sequence_classifier(tiny(name, rescale_every=0), 1, seed=0).eval()  # as `load_base` has RWKV
    assert type(model).__name__.endswith(GENERIC) == generic
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 1, 1]])
    mask = (ids != 1).long()
    with torch.no_grad():
        scores = model(input_ids=ids, attention_mask=mask).logits
        alone = model(input_ids=ids[1:, :3]).logits
        model.save_pretrained(tmp_path)
        opened = open_classifier(tmp_path).eval()(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(scores[1:], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(opened, scores, rtol=0, atol=1e-6)
    assert AutoConfig.from_pretrained(tmp_path).num_labels == 1


@pytest.mark.parametrize(
    ("name", "rightly"),
    [("rwkv", [False, False]), ("git", [True, False]), ("roberta (is_decoder)", [False, False])],
)
@pytest.mark.parametrize("rows", [1, 3])
def test_generate_is_asked_for_what_it_does_rightly(
    name: str, rightly: list[bool], rows: int, tiny: Callable[..., PreTrainedModel]
) -> None:
    """Catches: a cache that holds the state of one row, and padding on the left that is counted as positions."""
    model = tiny(name)
    assert [sampling._generates_rightly(model, padding=padding) for padding in (0, 2)] == rightly
    mask = torch.ones(rows, 4, dtype=torch.bool)
    mask[1:, :2] = False
    prompts = torch.arange(20, 20 + 4 * rows).view(rows, 4)
    result = sampling.sample(
        model, prompts, mask, max_new_tokens=4, temperature=1.0, stop_token_ids=[], pad_token_id=1,
        generator=torch.Generator().manual_seed(3), sampler="generate",
    )  # fmt: skip
    for number in range(rows):
        whole = torch.cat([prompts[number][mask[number]], result.responses[number]])
        with torch.no_grad():
            logprobs = model(input_ids=whole[None], use_cache=False).logits[0].log_softmax(-1)[-5:-1]
        expected = logprobs.gather(1, result.responses[number][:, None])[:, 0]
        torch.testing.assert_close(result.logprobs[number], expected, rtol=0, atol=1e-4)


def test_parts_that_texts_do_not_pass_get_no_adapter(tiny: Callable[..., PreTrainedModel]) -> None:
    """Catches: adapters in an encoder of images, which no text reaches, and layers of the same name left out with them."""
    model = tiny("gemma3")
    assert {n.split(".")[1] for n in anatomy(model).cut_off} == {"vision_tower", "multi_modal_projector"}
    adapted = with_adapter(model, fitted(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")))
    names = set(lora_layers(adapted))
    assert len(names) == 2 * 7 and all(".language_model." in name for name in names)


def test_grouped_layers_get_no_adapter(tiny: Callable[..., PreTrainedModel]) -> None:
    """Catches: a linear layer that multiplies by groups, whose output an adapter does not fit."""
    model = tiny("deepseek_v4")
    assert any(name.endswith(".o_a_proj") for name in anatomy(model).unused)
    adapted = with_adapter(model, fitted(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")))
    assert torch.isfinite(adapted(input_ids=torch.arange(5, 13)[None]).logits).all()


def test_training_changes_no_weights_of_rwkv(tiny: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    """Catches: weights halved on leaving training, which adapters and saved files would not be."""
    tiny("rwkv").save_pretrained(tmp_path)
    config = RunConfig(device="cpu", dtype="float32")
    model = load_base(str(tmp_path), config, Compute.choose(config)).eval()
    ids, before = torch.arange(5, 12)[None], model.rwkv.blocks[1].attention.output.weight.clone()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        expected = AutoModelForCausalLM.from_pretrained(tmp_path).train()(input_ids=ids, use_cache=False).logits
    assert torch.equal(model.rwkv.blocks[1].attention.output.weight, before)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_buffers_that_no_file_holds_are_computed_on_loading(
    tiny: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    """Catches: a generic classifier whose buffers hold whatever was in memory."""
    model = sequence_classifier(tiny("falcon_h1", ssm_multipliers=[0.5, 0.6, 0.7, 0.8, 0.9]), 1, seed=0)
    model.save_pretrained(tmp_path)
    buffers = dict(open_classifier(tmp_path).named_buffers())
    assert any("mup_vector" in name for name in buffers)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=0, atol=0)


def test_the_card_of_a_generic_reward_model_opens_it(script: Any, tmp_path: Path) -> None:
    """Catches: a folder that nobody without this package can use. What the card says is run as it stands."""
    script.write_data(tmp_path / "data")
    script.make_model("granite", tmp_path / "base")
    script.run_stage("sft", tmp_path, model_name_or_path=str(tmp_path / "base"))
    script.run_stage("reward", tmp_path)
    registry = Registry(tmp_path / "registry")
    artifact = registry.get("reward/tiny")
    with pytest.raises(UserError, match="no classifier for; export it with --form merged"):
        check_adapter(registry, artifact)
    folder = export(registry, artifact, tmp_path / "it")
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    values: dict[str, Any] = {"FOLDER": str(folder)}
    exec(code, values)
    with torch.no_grad():
        expected = open_classifier(folder).eval()(input_ids=values["ids"]).logits.item()
    assert values["raw"] == pytest.approx(expected, abs=1e-5)
    assert values["score"] == pytest.approx(
        (expected - artifact.manifest.reward_mean) / artifact.manifest.reward_std, abs=1e-4
    )


def test_a_base_given_by_a_relative_path_is_found_from_anywhere(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a base that only the working directory of its training has; and an old manifest with such a path refused."""
    (tmp_path / "elsewhere").mkdir()
    script.write_data(tmp_path / "data")
    script.make_model("llama", tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    artifact = script.run_stage("sft", tmp_path, model_name_or_path="base")
    assert artifact.manifest.base_model == str(tmp_path / "base")
    config = RunConfig(device="cpu", dtype="float32", registry=str(tmp_path / "registry"))
    compute = Compute.choose(config)
    expected = load_policy(artifact, config, compute).state_dict()
    old = dataclasses.replace(artifact, manifest=dataclasses.replace(artifact.manifest, base_model="base"))
    for directory, opened in ((tmp_path, old), (tmp_path / "elsewhere", artifact)):
        monkeypatch.chdir(directory)
        state = load_policy(opened, config, compute).state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    script.make_model("gpt2", tmp_path / "elsewhere" / "base")  # of the same name, but another
    with pytest.raises(UserError, match="trained on another 'base'"):
        load_policy(old, config, compute)


@pytest.mark.parametrize("name", ["granite", "mamba"])
def test_an_architecture_passes_all_stages(name: str, script: Any) -> None:
    outcome = script.examine(name)
    assert (outcome.state, outcome.note) == ("works", "")


@pytest.mark.slow
def test_architectures_do_what_the_table_says(script: Any) -> None:
    """Every type of model in the docs' table does what the table says."""
    outcomes = {outcome.architecture: outcome for outcome in map(script.examine, script.TABLE)}
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    written = {row[1]: row[2] for row in re.finditer(r"^\| ([^|]+) \| (\w+) \|", page, re.MULTILINE)}
    assert {name: outcome.state for name, outcome in outcomes.items()} == written
    assert sum(outcome.state == "works" for outcome in outcomes.values()) >= 35

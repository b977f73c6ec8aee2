"""One base, many adapters: who answers, what is frozen, what can be loaded and saved."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from toys import BENT, FAMILIES, build_bent, build_model
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rlhf.base.errors import UserError
from rlhf.config import PPOConfig
from rlhf.models.adapters import ADAPTER_FILE, lora_config, save_adapter, with_adapter
from rlhf.models.base import load_base, load_policy
from rlhf.models.compute import Compute, rehearsed_on
from rlhf.models.heads import ScalarHead
from rlhf.models.packing import pack_rows
from rlhf.models.reward_model import sequence_classifier
from rlhf.models.roles import RoleModels, SharedModels
from rlhf.models.separate import SeparateModels
from rlhf.models.sequences import Sequences, pad
from rlhf.ppo import forward
from rlhf.reward import sources

VOCAB = 48
PAD = 0
REWARD_MEAN, REWARD_STD = 0.3, 1.7
#: Options of each way in which PPO can hold its models.
MODES: dict[str, dict[str, str]] = {
    "lora": {},
    "shared_trunk": {"value_model": "shared_trunk"},
    "full": {"finetuning": "full"},
    "full_shared_trunk": {"finetuning": "full", "value_model": "shared_trunk"},
}
#: The same, and frozen bases that bitsandbytes holds: in float32, its kernels know no float64.
ALL_MODES: dict[str, dict[str, str]] = {
    **MODES,
    "8bit": {"quantization": "8bit", "dtype": "float32"},
    "4bit": {"quantization": "4bit", "dtype": "float32"},
}


def float64_norm(self: LlamaRMSNorm, hidden_states: torch.Tensor) -> torch.Tensor:
    """In place of `LlamaRMSNorm.forward`, which works in fp32 and would hide all differences below 1e-5."""
    scale = (hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
    return self.weight * hidden_states * scale


def ppo_config(**options: object) -> PPOConfig:
    """Small sizes, and float64 so that tolerances can be tight."""
    settings: dict[str, object] = {
        "name": "toy",
        "dataset": "none",
        "policy": "sft/toy",
        "reward": ["reward/toy"],
        "device": "cpu",
        "dtype": "float64",
        "optim": "adamw_torch",
        "wandb_mode": "disabled",
        "lora_r": 4,
        "lora_alpha": 8,
        "total_episodes": 32,
        "rollout_batch_size": 8,
        "minibatch_size": 8,
        "microbatch_size": 2,
        "response_length": 6,
    }
    return PPOConfig(**{**settings, **options})  # type: ignore[arg-type]


def fill_adapters(model: torch.nn.Module, seed: int, *, scale: float = 0.1) -> None:
    """Fresh B matrices are zero, which would hide every mix-up of adapters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name and ".reward." not in name and ".value." not in name:
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))


def reward_model(
    family: str, folder: Path, config: PPOConfig, *, seed: int = 11, base: PreTrainedModel | None = None
) -> PeftModel:
    """A reward model as the reward stage makes one, saved in `folder`."""
    base = base if base is not None else build_model(family, VOCAB, dtype=getattr(torch, config.dtype))
    torch.manual_seed(seed)
    classifier = with_adapter(sequence_classifier(base, PAD, seed=seed), lora_config(config, "SEQ_CLS"))
    fill_adapters(classifier, seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_adapter(classifier, folder, adapter="default", base_model="toy")
    return classifier.eval()


def shared_models(family: str, folder: Path, config: PPOConfig, *, seed: int = 21, fresh: bool = False) -> SharedModels:
    """The models of PPO with a reward adapter made in `folder`; the policy has moved from its start unless `fresh`."""
    compute = Compute(torch.device("cpu"), getattr(torch, config.dtype), config.fuse_adapters)
    if config.quantization == "none":
        base = build_model(family, VOCAB, dtype=compute.dtype)
        reward_model(family, folder, config)
        assert pack_rows(base)  # as load_base does
    else:
        wide_model().save_pretrained(folder / "base")
        base = load_base(str(folder / "base"), config, compute)
        reward_model(family, folder, config, base=wide_model())
    torch.manual_seed(seed)
    models = SharedModels(
        base, lora_config(config, "CAUSAL_LM"), compute, shared_trunk=config.value_model == "shared_trunk"
    )
    models.load_reward(folder, REWARD_MEAN, REWARD_STD)
    if not fresh:
        fill_adapters(models, seed)
        _fill_shared_head(models)
    return models


def separate_models(
    family: str, folder: Path, config: PPOConfig, *, seed: int = 21, fresh: bool = False
) -> SeparateModels:
    """The same with a model for each role (`finetuning: full`)."""
    reward_model(family, folder, config)
    compute = Compute(torch.device("cpu"), getattr(torch, config.dtype), config.fuse_adapters)
    base = build_model(family, VOCAB, dtype=compute.dtype)
    assert pack_rows(base)
    models = SeparateModels(base, compute, shared_trunk=config.value_model == "shared_trunk")
    models.load_reward(folder, REWARD_MEAN, REWARD_STD)
    if not fresh:
        generator = torch.Generator().manual_seed(seed)
        for parameter in models.trainable("policy").values():
            parameter.data += 0.03 * torch.randn(parameter.shape, generator=generator)
        _fill_shared_head(models)
    return models


def _fill_shared_head(models: RoleModels) -> None:
    """A head on the policy's trunk starts at zero, which would hide whose values it reads."""
    if models.shared_trunk:
        models.value_head.weight.data.copy_(torch.linspace(-0.3, 0.3, models.value_head.in_features)[None])


def role_models(family: str, folder: Path, config: PPOConfig, *, seed: int = 21, fresh: bool = False) -> RoleModels:
    """The models of any mode."""
    make = separate_models if config.finetuning == "full" else shared_models
    return make(family, folder, config, seed=seed, fresh=fresh)


def sequences() -> Sequences:
    prompts, prompt_mask = pad([[5, 6, 7, 8, 9], [5, 6, 7, 10], [11]], PAD, side="left")
    responses, mask = pad([[20, 2], [21, 22, 23, 24], [25, 26, 2]], PAD, side="right")
    return Sequences(prompts=prompts, prompt_mask=prompt_mask, responses=responses, mask=mask)


@torch.no_grad()
def answers(models: RoleModels) -> dict[str, torch.Tensor]:
    """What each role says about the same rows."""
    batch = sequences()
    return {
        "policy": forward.token_logprobs(models, "policy", batch, 1.0),
        "reference": forward.token_logprobs(models, "reference", batch, 1.0),
        "value": forward.token_values(models, batch),
        "reward": sources.sequence_scores(models, batch),
    }


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


# ---- roles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("role", ["policy", "value", "reward", "reference"])
def test_role_leaves_requires_grad_as_found(role: Any, fails: bool, tmp_path: Path) -> None:
    """Catches: peft's `set_adapter`, which makes the chosen adapter trainable (a frozen reward model would train) and freezes
    the others (a policy would stop learning), and a switch that an error inside leaves behind."""
    models = shared_models("gpt2", tmp_path, ppo_config())
    trained = {n for n, p in models.peft.named_parameters() if p.requires_grad}
    assert trained == set(models.trainable("policy")) | {
        n for n in models.trainable("value") if not n.startswith("value_head.")
    }
    next(iter(models.trainable("policy").values())).requires_grad_(False)  # as someone else may have left it
    found = {n: p.requires_grad for n, p in models.named_parameters()}
    before = answers(models)

    def use() -> None:
        with models.role(role):
            assert {n: p.requires_grad for n, p in models.named_parameters()} == found
            if fails:
                raise ZeroDivisionError

    if fails:
        with pytest.raises(ZeroDivisionError):
            use()
    else:
        use()
    assert {n: p.requires_grad for n, p in models.named_parameters()} == found
    assert_same(answers(models), before)
    # Outside any role the policy answers.
    with torch.no_grad():
        outside = models.causal(input_ids=torch.tensor([[5, 6, 7]])).logits
        with models.role("policy"):
            assert torch.equal(models.causal(input_ids=torch.tensor([[5, 6, 7]])).logits, outside)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_role_has_its_own_answer(family: str, tmp_path: Path) -> None:
    """Catches: a role that answers with another one's adapter; with fresh (zero) adapters that could not be seen."""
    models = shared_models(family, tmp_path, ppo_config())
    before = answers(models)
    assert float((before["policy"] - before["reference"]).abs().max()) > 1e-2
    for role, own in (("policy", "policy"), ("value", "value"), ("reward", "reward")):
        saved = {n: p.detach().clone() for n, p in models.peft.named_parameters() if f".{role}." in n}
        with torch.no_grad():
            for n, p in models.peft.named_parameters():
                if n in saved:
                    p.add_(0.05)
            after = answers(models)
            assert {name for name in before if not torch.equal(before[name], after[name])} == {own}
            for n, p in models.peft.named_parameters():
                if n in saved:
                    p.copy_(saved[n])


def test_dropout_is_off_for_good(tmp_path: Path) -> None:
    """Catches: dropout of the base or of an adapter that comes back when something calls `train()`."""
    models = shared_models("gpt2", tmp_path, ppo_config(lora_dropout=0.5))
    before = answers(models)
    models.train()
    assert_same(answers(models), before)


def test_attention_dropout_that_is_a_number_is_off_too(tmp_path: Path) -> None:
    """Catches: Llama's attention dropout, which is no module but a number that each attention layer reads."""
    models = shared_models("llama", tmp_path, ppo_config())
    layers = [m for m in models.modules() if hasattr(m, "attention_dropout")]
    for layer in layers:
        layer.attention_dropout = 0.5
    again = SharedModels(models.causal, lora_config(ppo_config(), "CAUSAL_LM"), models.compute)
    assert layers and {layer.attention_dropout for layer in layers} == {0.0}
    assert again.causal is models.causal


def test_fresh_reward_head_has_the_spread_of_its_width() -> None:
    """Catches: a head of zeros, or the library's default spread, with which rankings start far from even."""
    base = build_model("llama", VOCAB)
    heads = torch.cat([sequence_classifier(base, PAD, seed=seed).score.weight.detach() for seed in range(40)])
    assert heads.shape == (40, 32)
    assert float(heads.std()) == pytest.approx(33**-0.5, rel=0.06)  # 1,280 numbers: three standard errors
    assert abs(float(heads.mean())) < 3 * 33**-0.5 / 1280**0.5
    assert torch.equal(heads[3:4], sequence_classifier(base, PAD, seed=3).score.weight)


def test_adapters_and_heads_are_fp32_on_a_bf16_base(tmp_path: Path) -> None:
    """Catches: weights trained in bf16, where a step of 1e-4 is rounded away, and scores in bf16."""
    models = shared_models("llama", tmp_path, ppo_config(dtype="bfloat16"))
    trained = {**models.trainable("policy"), **models.trainable("value")}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for n, p in models.peft.named_parameters() if "lora" not in n} == {torch.bfloat16}
    got = answers(models)
    assert {x.dtype for x in got.values()} == {torch.float32}
    exact = answers(shared_models("llama", tmp_path / "exact", ppo_config(dtype="float32")))
    for name, figures in exact.items():
        scale = float(figures.abs().max())
        torch.testing.assert_close(got[name], figures, rtol=0, atol=0.05 * scale, msg=name)


@pytest.mark.parametrize("kind", ["use_dora", "use_rslora"])
def test_other_adapters_of_peft_start_as_the_reference_and_train(kind: str, tmp_path: Path) -> None:
    """Catches: an adapter whose start is not the SFT model, parameters that the optimiser does not know, a wrong merge."""
    config = ppo_config(**{kind: True})
    models = shared_models("llama", tmp_path, config, fresh=True)
    before = answers(models)
    torch.testing.assert_close(
        before["policy"], before["reference"], rtol=0, atol=1e-12 if kind == "use_rslora" else 1e-5
    )
    trained = models.trainable("policy")
    assert any("magnitude" in name for name in trained) == (kind == "use_dora")
    forward.token_logprobs(models, "policy", sequences(), 1.0).sum().backward()
    with torch.no_grad():
        for parameter in trained.values():
            assert parameter.grad is not None
            parameter.sub_(0.05 * parameter.grad / (parameter.grad.norm() + 1e-9))
    after = answers(models)
    assert torch.equal(after["reference"], before["reference"]) and torch.equal(after["reward"], before["reward"])
    assert float((after["policy"] - before["policy"]).abs().max()) > 1e-3
    ids = torch.tensor([[5, 6, 7, 20, 21]])
    with torch.no_grad():
        with models.merged_policy() as sampler:
            sampled = sampler(input_ids=ids).logits
        with models.role("policy"):
            torch.testing.assert_close(sampled, models.causal(input_ids=ids).logits, rtol=0, atol=1e-5)


# ---- merging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_policy_answers_alike_and_leaves_the_same_tensors(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a merge of the wrong adapter, layout or scale, a merge on top of the adapter (counted twice), and base weights
    that are only almost those from before (the reference would drift with every rollout)."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", float64_norm)
    models = shared_models(family, tmp_path, ppo_config())
    before = answers(models)
    ids = torch.tensor([[5, 6, 7, 20, 21]])
    base = [(p, p.data_ptr(), p.detach().clone()) for n, p in models.peft.named_parameters() if "lora" not in n]
    found = {n: p.requires_grad for n, p in models.named_parameters()}
    with torch.no_grad():
        expected = models.causal(input_ids=ids).logits
        with models.merged_policy() as merged:
            got = merged(input_ids=ids).logits
        with pytest.raises(ZeroDivisionError), models.merged_policy():
            raise ZeroDivisionError
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    assert not torch.equal(got, expected), "the adapter was on, not merged"
    for parameter, pointer, value in base:
        assert parameter.data_ptr() == pointer and torch.equal(parameter, value)
    assert {n: p.requires_grad for n, p in models.named_parameters()} == found
    assert_same(answers(models), before)


# ---- loading and saving ---------------------------------------------------------------------------------------------


def test_value_starts_as_the_normalised_score(tmp_path: Path) -> None:
    """Catches: a value function that starts elsewhere than its returns, because mean or standard deviation were left out."""
    models = shared_models("gpt2", tmp_path, ppo_config())
    row, mask = torch.tensor([[5, 6, 7, 20, 2]]), torch.ones(1, 5, dtype=torch.bool)
    with torch.no_grad():
        with models.role("value"):
            values = models.values(models.hidden(row, mask)[0])
        with models.role("reward"):
            scores = models.scores(models.hidden(row, mask)[0])
    torch.testing.assert_close(values, scores, rtol=0, atol=1e-12)
    assert float(scores.std()) > 0.01


def test_a_reward_model_without_its_head_is_refused(tmp_path: Path) -> None:
    """Catches: a score head that was not saved and is made up at random, so that PPO optimises noise."""
    config = ppo_config()
    models = shared_models("llama", tmp_path / "good", config)
    folder = tmp_path / "headless"
    folder.mkdir()
    save_adapter(models.peft, folder, adapter="policy", base_model="toy")
    other = SharedModels(
        build_model("llama", VOCAB, dtype=torch.float64), lora_config(config, "CAUSAL_LM"), models.compute
    )
    with pytest.raises(UserError, match="no score head"):
        other.load_reward(folder, 0.0, 1.0)


@pytest.mark.parametrize(("made_for", "loaded_on"), [("llama", "gpt2"), ("gpt2", "llama"), ("gpt_neox", "llama")])
def test_a_reward_model_of_another_architecture_is_refused(made_for: str, loaded_on: str, tmp_path: Path) -> None:
    """Catches: adapter weights that fit nowhere and are dropped without a word, and a traceback instead of one line."""
    config = ppo_config()
    reward_model(made_for, tmp_path, config)
    models = SharedModels(
        build_model(loaded_on, VOCAB, dtype=torch.float64),
        lora_config(config, "CAUSAL_LM"),
        Compute(torch.device("cpu"), torch.float64),
    )
    with pytest.raises(UserError, match="another model"):
        models.load_reward(tmp_path, 0.0, 1.0)


def test_a_reward_model_of_another_depth_is_refused(tmp_path: Path) -> None:
    """Catches: adapters of layers that the policy does not have, dropped without a word."""
    config = ppo_config()
    reward_model("llama", tmp_path, config)  # two layers
    shape = build_model("llama", VOCAB).config.to_dict() | {"num_hidden_layers": 1, "layer_types": None}
    base = AutoModelForCausalLM.from_config(LlamaConfig(**shape), attn_implementation="sdpa").to(torch.float64)
    models = SharedModels(base, lora_config(config, "CAUSAL_LM"), Compute(torch.device("cpu"), torch.float64))
    with pytest.raises(UserError, match="another model"):
        models.load_reward(tmp_path, 0.0, 1.0)


def test_a_reward_adapter_with_a_layer_missing_is_refused(tmp_path: Path) -> None:
    """Catches: a layer whose adapter stays at its fresh zeros, so that the score is not that of the trained model."""
    config = ppo_config()
    reward_model("gpt2", tmp_path, config)
    state = load_file(tmp_path / ADAPTER_FILE)
    del state[next(key for key in state if "h.1" in key and "lora_B" in key)]
    save_file(state, tmp_path / ADAPTER_FILE)
    base = build_model("gpt2", VOCAB, dtype=torch.float64)
    models = SharedModels(base, lora_config(config, "CAUSAL_LM"), Compute(torch.device("cpu"), torch.float64))
    with pytest.raises(UserError, match="another model"):
        models.load_reward(tmp_path, 0.0, 1.0)


def test_a_reward_model_of_another_width_is_refused(tmp_path: Path) -> None:
    """Catches: a torch traceback where one line is due."""
    config = ppo_config()
    reward_model("llama", tmp_path, config)
    models = SharedModels(
        wide_model().double(), lora_config(config, "CAUSAL_LM"), Compute(torch.device("cpu"), torch.float64)
    )
    with pytest.raises(UserError, match="another model"):
        models.load_reward(tmp_path, 0.0, 1.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_policy_opens_with_plain_peft(family: str, tmp_path: Path) -> None:
    """Catches: an adapter that only this package can open: keys with the adapter's name in them, a config that lacks the
    base, or weights of another role."""
    models = shared_models(family, tmp_path / "reward", ppo_config())
    folder = tmp_path / "policy"
    folder.mkdir()
    save_adapter(models.peft, folder, adapter="policy", base_model="some/base")
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "some/base" and saved["inference_mode"] is True
    assert models.peft.peft_config["policy"].inference_mode is False
    assert not [key for key in load_file(folder / ADAPTER_FILE) if ".policy." in key]
    plain = PeftModel.from_pretrained(build_model(family, VOCAB, dtype=torch.float64), str(folder))
    ids = torch.tensor([[5, 6, 7, 20, 21]])
    with torch.no_grad(), models.role("policy"):
        torch.testing.assert_close(
            plain(input_ids=ids).logits,
            models.causal(input_ids=ids).logits,
            rtol=0,
            atol=1e-6 if family == "llama" else 1e-12,
        )


# ---- heads, devices, refusals ---------------------------------------------------------------------------------------


def test_scalar_head_is_not_rounded_under_autocast() -> None:
    """Catches: scores in bf16, of which there are 128 between 1 and 2, so that most rankings become ties."""
    torch.manual_seed(0)
    head = ScalarHead(64, bias=True, dtype=torch.float32)
    assert float(head.weight.abs().max()) == 0.0
    torch.nn.init.normal_(head.weight)
    hidden = torch.randn(32, 64).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = head(hidden)
        rounded = torch.nn.functional.linear(hidden, head.weight, head.bias)
    expected = (hidden.double() @ head.weight.double().T + head.bias.double()).float()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert float((rounded.float() - expected).abs().max()) > 1e-3, "autocast did not round: the test shows nothing"


def test_compute_is_chosen_for_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: emulated bf16 on a CPU without its instructions (far slower than fp32), and options that are overruled."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for capabilities, dtype in (
        ({}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False, "avx2": True}, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda capabilities=capabilities: capabilities)
        for device in ("auto", "cpu"):
            assert Compute.choose(ppo_config(device=device, dtype="auto")) == Compute(torch.device("cpu"), dtype)
    assert Compute.choose(ppo_config(device="auto", dtype="float64")).dtype == torch.float64


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a traceback from deep inside torch after minutes of loading."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device auto"):
        Compute.choose(ppo_config(device="cuda"))


@pytest.mark.parametrize("family", BENT)
def test_logits_of_hidden_states_are_those_of_the_model(family: str) -> None:
    """Catches: log-probabilities of a distribution that the model does not sample from (Granite divides its logits)."""
    compute = Compute(torch.device("cpu"), torch.float32)
    model = build_bent(family, VOCAB)
    ids = torch.arange(5, 21).view(2, 8)
    expected = model(input_ids=ids).logits
    models = SharedModels(model, lora_config(ppo_config(), "CAUSAL_LM"), compute)
    states = models.hidden(ids, torch.ones_like(ids))
    torch.testing.assert_close(
        models.logits(states[:, 3:].flatten(0, 1)), expected[:, 3:].flatten(0, 1), rtol=0, atol=1e-5
    )
    (gradient,) = torch.autograd.grad(models.logits(states[0]).square().sum(), states)
    assert bool(gradient[0].any()) and not bool(gradient[1].any())


# ---- quantised bases ------------------------------------------------------------------------------------------------


def wide_model() -> PreTrainedModel:
    """64 wide: the block size of 4-bit weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.fixture
def sft_artifact(tmp_path: Path) -> Any:
    """What `load_policy` needs of an `sft` artefact: a base on disk, and an adapter that changes it a lot."""
    wide_model().save_pretrained(tmp_path / "base")
    config = ppo_config(dtype="float32")
    torch.manual_seed(1)
    adapted = with_adapter(wide_model(), lora_config(config, "CAUSAL_LM"))
    fill_adapters(adapted, 1, scale=0.3)
    (tmp_path / "sft").mkdir()
    save_adapter(adapted, tmp_path / "sft", adapter="default", base_model=str(tmp_path / "base"))
    manifest = SimpleNamespace(base_model=str(tmp_path / "base"), base_model_revision=None, inputs={})
    return SimpleNamespace(path=tmp_path / "sft", manifest=manifest, adapted=adapted.eval())


def test_load_policy_merges_the_adapter(sft_artifact: Any) -> None:
    """Catches: a reference that is the base model, not the SFT policy, and a base that could train."""
    config = ppo_config(dtype="float32", attn_implementation="sdpa")
    policy = load_policy(sft_artifact, config, Compute.choose(config))
    ids = torch.tensor([[5, 6, 7, 20, 21]])
    with torch.no_grad():
        got, expected = policy(input_ids=ids).logits, sft_artifact.adapted(input_ids=ids).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert not [n for n, p in policy.named_parameters() if p.requires_grad or "lora" in n]


def test_a_4bit_base_is_that_of_the_merged_policy_and_its_adapters_train(sft_artifact: Any, tmp_path: Path) -> None:
    """Catches: an adapter merged into 4-bit weights (rounded away) or lost, and a quantised base without a gradient."""
    config = ppo_config(dtype="float32", attn_implementation="sdpa", quantization="4bit")
    compute = Compute.choose(config)
    base = load_policy(sft_artifact, config, compute)
    full = load_policy(sft_artifact, ppo_config(dtype="float32", attn_implementation="sdpa"), compute)
    quantised = base.model.layers[0].mlp.up_proj
    merged = full.model.layers[0].mlp.up_proj.weight.T
    plain = wide_model().model.layers[0].mlp.up_proj.weight.T
    assert type(quantised).__name__ == "Linear4bit"
    with torch.no_grad():
        held = quantised(torch.eye(64))
    assert float((held - merged).norm() / merged.norm()) < 0.15 < float((plain - merged).norm() / merged.norm())
    ids = torch.tensor([[5, 6, 7, 20, 21]])
    with torch.no_grad():
        got = base(input_ids=ids).logits

    folder = tmp_path / "reward"
    reward_model("llama", folder, config, base=full)
    torch.manual_seed(3)
    models = SharedModels(base, lora_config(config, "CAUSAL_LM"), compute)
    models.load_reward(folder, REWARD_MEAN, REWARD_STD)
    before = answers(models)
    assert torch.equal(before["policy"], before["reference"])
    assert all(bool(figures.isfinite().all()) for figures in before.values())
    with torch.no_grad(), models.merged_policy() as sampler:  # cannot be merged: the adapter stays on
        torch.testing.assert_close(sampler(input_ids=ids).logits, got, rtol=0, atol=1e-4)

    batch = sequences()
    trained = {**models.trainable("policy"), **models.trainable("value")}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    logprobs = forward.token_logprobs(models, "policy", batch, 1.0)
    torch.testing.assert_close(logprobs.detach(), before["policy"], rtol=0, atol=1e-4)
    (-logprobs.sum() / batch.mask.sum()).backward()
    (forward.token_values(models, batch) - 1)[batch.mask].square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained.values())
    optimizer.step()
    after = answers(models)
    assert float(after["policy"].sum()) > float(before["policy"].sum())
    assert torch.equal(after["reference"], before["reference"]) and torch.equal(after["reward"], before["reward"])


def test_an_8bit_base_is_quiet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches: a warning of bitsandbytes for every layer of every forward pass, thousands of lines a rollout."""
    answers(shared_models("llama", tmp_path, ppo_config(**ALL_MODES["8bit"])))
    assert [record.name for record in caplog.records if record.name.startswith("bitsandbytes")] == []


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_gradients_go_through_a_quantised_base(quantization: Any, sft_artifact: Any) -> None:
    """Catches: the 4-bit CPU kernel of bitsandbytes 0.50, which has no backward pass: after any forward pass without
    gradients, adapters below the last layer got 2% to 15% of theirs, and no error. 8-bit is rounded, but points the same way."""
    gradients = []
    for kind in ("none", quantization):
        config = ppo_config(dtype="float32", attn_implementation="sdpa", quantization=kind)
        compute = Compute.choose(config)
        base = load_policy(sft_artifact, config, compute)
        if kind == "none" and quantization == "4bit":  # the oracle: plain layers that hold the same, rounded weights
            settings = ppo_config(dtype="float32", attn_implementation="sdpa", quantization="4bit")
            rounded = load_policy(sft_artifact, settings, compute)
            for path, module in rounded.named_modules():
                if type(module).__name__ == "Linear4bit":
                    plain = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                    base.get_submodule(path).weight.data.copy_(plain)
        torch.manual_seed(3)
        models = SharedModels(base, lora_config(config, "CAUSAL_LM"), compute)
        fill_adapters(models, 3)
        with torch.no_grad():  # as in a rollout
            old = forward.token_logprobs(models, "policy", sequences(), 1.0)
        new = forward.token_logprobs(models, "policy", sequences(), 1.0)
        torch.testing.assert_close(new.detach(), old, rtol=0, atol=1e-4)
        new.sum().backward()
        gradients.append({n: p.grad for n, p in models.trainable("policy").items()})
    atol, floor = (1e-3, 0.99999) if quantization == "4bit" else (torch.inf, 0.98)
    for name, expected in gradients[0].items():
        got = gradients[1][name]
        assert float(torch.cosine_similarity(got.flatten(), expected.flatten(), dim=0)) > floor, name
        assert float((got - expected).abs().max()) <= atol, name


def test_a_scalar_head_on_a_gpu_makes_no_matrix_product() -> None:
    """Catches: scores and values that TF32 rounds to 10 bits, forwards or backwards, and another sum than a CPU's."""
    head, states = ScalarHead(24, bias=True, dtype=torch.float32), torch.randn(3, 5, 24, requires_grad=True)
    with torch.no_grad():
        head.weight.normal_(), head.bias.fill_(0.5)
    expected = head(states)
    gradients = torch.autograd.grad(expected.square().sum(), [states, *head.parameters()])
    called = set[str]()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.add(function.__name__.split(".")[0])
            return function(*args, **(kwargs or {}))

    with rehearsed_on("cuda"), Names():
        scores = head(states)
        summed = torch.autograd.grad(scores.square().sum(), [states, *head.parameters()])
    assert "mul" in called and not called & {"mm", "addmm", "bmm", "mv", "addmv", "linear"}
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(summed, gradients, rtol=0, atol=1e-4)

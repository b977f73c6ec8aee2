"""A saved reward model that is not the trained one is refused, whatever is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_models import PAD, VOCAB, ppo_config, reward_model
from torch import nn
from toys import FAMILIES, build_model
from transformers import PreTrainedTokenizerBase

from rlhf.base.errors import UserError
from rlhf.models.adapters import ADAPTER_FILE
from rlhf.models.compute import Compute
from rlhf.models.packing import pack_rows
from rlhf.models.reward_model import read_reward_adapter
from rlhf.models.tokenization import load_tokenizer
from rlhf.reward.parity import BY_BATCH, REORDERED, deviation, digests, require_parity, require_same_tensors
from rlhf.reward.scorer import Scorer

COMPUTE = Compute(torch.device("cpu"), torch.float64)


def token_rows(count: int = 12) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(1, VOCAB, (3 + i % 7,), generator=generator).tolist() for i in range(count)]


@pytest.fixture
def tokenizer(toy_base: Callable[[str], Path]) -> PreTrainedTokenizerBase:
    made = load_tokenizer(str(toy_base("llama")), chat_template="chatml")
    made.pad_token = made.convert_ids_to_tokens(PAD)
    return made


def scorer(model: nn.Module, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Scorer:
    return Scorer(model, tokenizer, COMPUTE, 5, **options)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sound_model_passes(family: str, packed: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A check that fails good models: positions that start at the padding, or a score read before it."""
    base = build_model(family, VOCAB, dtype=torch.float64)
    assert not packed or pack_rows(base)
    model = scorer(reward_model(family, tmp_path, ppo_config(), base=base), tokenizer)
    worst = require_parity(model.raw(token_rows()), model, token_rows())
    assert 0 <= worst < 1e-5


class _Faulty(nn.Module):
    """A model whose scores are spoiled in a way that training never shows."""

    def __init__(self, model: nn.Module, fault: str) -> None:
        super().__init__()
        self.model, self.fault = model, fault

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> Any:
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if self.fault == "padding":  # a score that is read at the last column
            output.logits = output.logits + 0.3 * (1 - attention_mask[:, -1:])
        if self.fault == "neighbours":
            output.logits = output.logits + 0.3 * (len(input_ids) > 1)
        if self.fault == "head":
            output.logits = -output.logits
        if self.fault == "nan":
            output.logits = output.logits * torch.nan
        return output


@pytest.mark.parametrize(
    "fault, told",
    [("padding", "padding tokens"), ("neighbours", "scored alone"), ("head", "scored together"), ("nan", "together")],
)
def test_each_fault_is_found_and_told(
    fault: str, told: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A comparison that is made of one batch only, or of the sorted scores, or that NaN passes."""
    sound = reward_model("llama", tmp_path, ppo_config())
    rows = sorted(token_rows(), key=len)[-5:]
    rows = [row[: len(rows[0])] for row in rows]  # of one length: no padding but what the check adds
    expected = scorer(sound if fault != "neighbours" else _Faulty(sound, fault), tokenizer).raw(rows)
    with pytest.raises(UserError, match=told) as error:
        require_parity(expected, scorer(_Faulty(sound, fault), tokenizer), rows)
    assert "nothing was registered" in str(error.value)


def test_rounding_has_outliers() -> None:
    """A sound model refused after its training because one of 64 texts was rounded badly (PandaLM in bf16: .058, and .017 at
    the root mean square); a single score that is wrong, which the mean hides among enough others; NaN."""
    expected = torch.linspace(-1.5, 1.5, 64)
    scale = float(expected.square().mean().sqrt())
    noise = 0.017 * scale * torch.tensor([1.0, -1.0]).repeat(32)
    noise[7] = 0.058 * scale
    limit = REORDERED[torch.bfloat16]
    assert 0.017 < deviation(expected + noise, expected, scale) < limit
    assert deviation(expected + 3.5 * noise, expected, scale) > limit
    noise[7] = 0.3 * scale
    assert deviation(expected + noise, expected, scale) > limit
    noise[7] = torch.nan
    assert deviation(expected + noise, expected, scale) == torch.inf


def test_scores_in_memory_that_are_not_finite(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A diverged model, all of whose scores are NaN, is equal to nothing and would be called badly saved."""
    sound = scorer(reward_model("llama", tmp_path, ppo_config()), tokenizer)
    with pytest.raises(UserError, match="not finite; try a smaller learning_rate"):
        require_parity(torch.full((12,), torch.nan), sound, token_rows())


def test_an_adapter_without_its_head_is_refused(tmp_path: Path) -> None:
    """peft gives such an adapter a fresh head at random, with a warning that nobody reads."""
    reward_model("gpt2", tmp_path, ppo_config())
    state = load_file(tmp_path / ADAPTER_FILE)
    save_file({name: tensor for name, tensor in state.items() if "score" not in name}, tmp_path / ADAPTER_FILE)
    with pytest.raises(UserError, match="holds no score head"):
        read_reward_adapter(tmp_path)


def test_scores_are_normalised_once(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """The bias added instead of taken off, or applied to the raw scores that probabilities come from."""
    model = reward_model("llama", tmp_path, ppo_config())
    raw = scorer(model, tokenizer).raw(token_rows())
    normalised = scorer(model, tokenizer, mean=0.5, std=2.0)
    torch.testing.assert_close(normalised(token_rows()), (raw - 0.5) / 2.0)
    torch.testing.assert_close(normalised.raw(token_rows()), raw)
    assert raw.std() > 0.01, "scores that are all alike would hide a wrong scale"


class _Rounded(nn.Module):
    """A sound model whose scores move with the shape of the batch, as bf16 does to scores that nearly cancel."""

    def __init__(self, model: nn.Module, noise: float) -> None:
        super().__init__()
        self.model, self.noise = model, noise

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> Any:
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if len(input_ids) == 1 or input_ids.shape[1] > 9:
            output.logits = output.logits + self.noise
        return output


def test_rounding_by_batch_warns_in_bf16_and_stops_in_fp32(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sound reward model accused after a few updates, or a fault of batches that float32 shows let pass."""
    model = reward_model("llama", tmp_path, ppo_config())
    rows = token_rows()
    for dtype in (torch.bfloat16, torch.float32):
        compute = Compute(torch.device("cpu"), dtype)
        rounded = Scorer(_Rounded(model, 1.0), tokenizer, compute, 5)
        trained = rounded.raw(rows)
        if dtype == torch.bfloat16:
            size = float(trained.square().mean().sqrt())
            for share, stops in ((0.99, False), (1.01, True)):
                rounded = Scorer(_Rounded(model, share * BY_BATCH * size), tokenizer, compute, 5)
                if stops:
                    with pytest.raises(UserError, match="scored alone"):
                        require_parity(trained, rounded, rows)
                else:
                    assert require_parity(trained, rounded, rows) > REORDERED[dtype]
                    assert "so coarse is bf16" in capsys.readouterr().err
            with pytest.raises(UserError, match="scored together"):
                require_parity(trained + 0.1 * trained.abs().max(), rounded, rows)
        else:
            with pytest.raises(UserError, match="scored alone"):
                require_parity(trained, rounded, rows)


@pytest.mark.parametrize("lost", ["score", "lora_B", "one bit"])
def test_a_lost_tensor_stops(lost: str, tmp_path: Path) -> None:
    """A head made anew, an adapter of zeros or one changed value, in a model that hardly learned: no score shows it."""
    model = reward_model("gpt2", tmp_path, ppo_config())
    trained = digests(model)
    require_same_tensors(trained, model)
    part = "score" if lost == "score" else "lora_B"
    tensor = next(p for n, p in model.named_parameters() if part in n and "original_module" not in n)
    with torch.no_grad():
        if lost == "one bit":
            tensor.view(-1)[0] = torch.nextafter(tensor.view(-1)[0], tensor.new_tensor(9.0))
        else:
            tensor.copy_(torch.randn_like(tensor))
    with pytest.raises(UserError, match=f"1 of {len(trained)} tensors differ") as error:
        require_same_tensors(trained, model)
    assert part in str(error.value)
    with pytest.raises(UserError, match="tensors differ"):
        require_same_tensors({**trained, "base_model.model.gone": ""}, model)


def test_a_wrong_base_under_the_adapter_stops(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Catches: an adapter and a head that are the trained ones, on another SFT policy: also in bf16 no matter of rounding."""
    model = reward_model("llama", tmp_path, ppo_config())
    trained, rows = digests(model), token_rows()
    compute = Compute(torch.device("cpu"), torch.bfloat16)
    scores = Scorer(model, tokenizer, compute, 5).raw(rows)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora" not in name and "score" not in name and tensor.dim() > 1:
                tensor.copy_(torch.randn_like(tensor) * tensor.std())
    require_same_tensors(trained, model)
    with pytest.raises(UserError, match="scored together"):
        require_parity(scores, Scorer(model, tokenizer, compute, 5), rows)

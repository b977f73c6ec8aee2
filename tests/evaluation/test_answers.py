"""Answers and their KL against a walk over the tokens; finished policies on a base that stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_models import PAD, VOCAB, answers, fill_adapters, float64_norm, ppo_config, shared_models
from toys import build_model
from transformers import PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rlhf.base.errors import UserError
from rlhf.evaluation.answers import sample_answers, score_answers
from rlhf.models.base import merge_adapter
from rlhf.models.compute import Compute
from rlhf.models.packing import pack_rows
from rlhf.models.responses import Answers
from rlhf.models.roles import SharedModels
from rlhf.models.separate import FinishedPair
from rlhf.models.tokenization import load_tokenizer
from rlhf.ppo.rollout import SamplingOptions
from rlhf.reward.sources import Responses

CPU = Compute(torch.device("cpu"), torch.float64)
PROMPTS = [[5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 10, 11, 12]]
STOPS = list(range(2, VOCAB, 4))


@pytest.fixture(autouse=True)
def _true_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaRMSNorm, "forward", float64_norm)


@pytest.fixture
def tokenizer(toy_base: Callable[[str], Path]) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(toy_base("llama")), chat_template="chatml")


def base_model() -> torch.nn.Module:
    base = build_model("llama", VOCAB, dtype=torch.float64)
    assert pack_rows(base)
    return base


def saved_policy(folder: Path, seed: int = 21) -> SharedModels:
    """A policy that has moved, saved in `folder/policy`."""
    models = shared_models("llama", folder / "reward", ppo_config(lora_r=3), seed=seed)
    (folder / "policy").mkdir()
    models.save_policy(folder / "policy", base_model="toy")
    return models


def options(temperature: float) -> SamplingOptions:
    return SamplingOptions(max_new_tokens=6, temperature=temperature, stop_token_ids=STOPS, pad_token_id=PAD)


def test_sums_are_those_of_a_walk_over_the_tokens(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """KL the wrong way round, without the temperature, of the tokens one to the left, or in the order of the batches, which
    are sorted by length. The oracle sees one answer at a time, through whole logits."""
    models = saved_policy(tmp_path)
    found = sample_answers(models, tokenizer, PROMPTS, 4, options(0.7), batch_size=3, seed=0)
    assert found.prompt.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2] and len(set(map(len, found.tokens))) > 1
    assert found.stopped == [row[-1] in STOPS for row in found.tokens]
    for i, row in enumerate(found.tokens):
        prompt = PROMPTS[i // 4]
        ids = torch.tensor([[*prompt, *row]])
        with torch.no_grad(), models.role("policy"):
            new = (models.causal(ids).logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
        with torch.no_grad(), models.role("reference"):
            old = (models.causal(ids).logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
        at = torch.arange(len(row)), torch.tensor(row)
        ratio = new[at] - old[at]
        expected = {
            "kl": ratio.sum(),
            "kl_k3": (ratio.neg().exp() - 1 + ratio).sum(),
            "kl_full": (new.exp() * (new - old)).sum(),
            "entropy": -(new.exp() * new).sum(),
        }
        for name, value in expected.items():
            assert found.sums[name][i] == pytest.approx(float(value), abs=1e-6), (name, i)
    assert max(found.sums["kl_full"]) > 0.1, "policies that do not differ would hide everything"


def test_a_finished_policy_is_what_was_saved_and_leaves_no_trace(tmp_path: Path) -> None:
    """An adapter that is loaded into the wrong place, or that is still there, or merged, when the next policy is measured."""
    saved = answers(saved_policy(tmp_path))
    base = base_model()
    untouched = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for _ in range(2):
        models = SharedModels.finished(base, tmp_path / "policy", CPU)  # type: ignore[arg-type]
        found = answers(models)
        assert torch.equal(found["policy"], saved["policy"]) and torch.equal(found["reference"], saved["reference"])
        assert models.release() is base
    fresh = SharedModels.finished(base, None, CPU)  # type: ignore[arg-type]
    found = answers(fresh)
    assert torch.equal(found["policy"], found["reference"]) and torch.equal(found["reference"], saved["reference"])
    fresh.release()
    assert base.state_dict().keys() == untouched.keys()
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in base.state_dict().items())


def test_a_policy_beside_another_model_is_measured_alike(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A whole model, or an adapter on another SFT policy, measured with roles swapped, or with other random numbers: the same
    policy merged beside the same reference gives the same answers and the same KL."""
    saved_policy(tmp_path)
    shared = SharedModels.finished(base_model(), tmp_path / "policy", CPU)  # type: ignore[arg-type]
    merged = merge_adapter(base_model(), tmp_path / "policy")  # type: ignore[arg-type]
    pair = FinishedPair(merged, base_model(), CPU)  # type: ignore[arg-type]
    one, other = (
        sample_answers(models, tokenizer, PROMPTS, 3, options(1.0), batch_size=4, seed=5) for models in (shared, pair)
    )
    assert one.tokens == other.tokens
    for name, values in one.sums.items():
        assert values == pytest.approx(other.sums[name], abs=1e-6), name
    assert not any(parameter.requires_grad for parameter in pair.models.parameters())


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    """A traceback out of peft, and a base that keeps half of the adapter."""
    saved_policy(tmp_path)
    wide = build_model("gpt2", VOCAB, dtype=torch.float64)
    with pytest.raises(UserError, match="policy"):
        SharedModels.finished(wide, tmp_path / "policy", CPU)
    base = base_model()
    (tmp_path / "policy" / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="holds no adapter"):
        SharedModels.finished(base, tmp_path / "policy", CPU)  # type: ignore[arg-type]
    fill_adapters(base, 0)  # nothing to fill
    assert not [name for name, _ in base.named_parameters() if "lora" in name]


def test_scorers_see_prompts_and_answers_side_by_side() -> None:
    """Rows of prompts that are not repeated as the answers are, or padding that a scorer takes for text."""
    kept: list[Responses] = []

    def source(responses: Responses) -> torch.Tensor:
        kept.append(responses)
        return responses.sequences.mask.sum(dim=1).float()

    given = Answers(
        samples=2,
        texts=["a", "b", "c", "d"],
        tokens=[[20], [21, 22, 2], [23, 2], [24]],
        stopped=[False, True, True, False],
        sums={},
    )
    rows = [{"prompt": "first"}, {"prompt": "second"}]
    scores = score_answers(source, given, PROMPTS, rows, pad_token_id=PAD, batch_size=2, device=torch.device("cpu"))
    assert scores.tolist() == [1, 3, 2, 1] and scores.dtype == np.float64
    (seen,) = kept
    assert [row["prompt"] for row in seen.rows] == ["first", "first", "second", "second"]
    ids = [
        row[real].tolist() for row, real in zip(seen.sequences.input_ids, seen.sequences.attention_mask, strict=True)
    ]
    assert ids == [[*PROMPTS[0], 20], [*PROMPTS[0], 21, 22, 2], [*PROMPTS[1], 23, 2], [*PROMPTS[1], 24]]
    assert sorted(int(i) for rows in seen.batches for i in rows) == [0, 1, 2, 3]

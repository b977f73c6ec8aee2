"""What passes launch, and that they never wait: what a CPU can know of their speed on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toys import PROMPTS, build_model

from rlhf.config import PPOConfig, build
from rlhf.models import decoding, graphs, packing
from rlhf.models.compute import Compute
from rlhf.models.drawing import DrawOptions, ResponseBuffer
from rlhf.models.roles import SharedModels
from rlhf.models.sequences import Sequences, pad
from rlhf.ppo import forward, functional, gradients
from rlhf.ppo.metrics import LossStatistics, Totals
from rlhf.ppo.types import Rollout

ANSWERS = [[3, 4], [5, 6, 7, 8], [9], [11, 12, 13], [4, 4], [6], [7, 8, 9, 10, 11], [12, 3]]


class Launches(TorchDispatchMode):
    """Counts operators that compute or copy; views and allocations launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = [r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns]
        self.count += not any(views) and "empty" not in str(func)
        return func(*args, **(kwargs or {}))


def launches(run: Callable[[], Any]) -> int:
    with graphs.no_host_waits(), Launches() as counter:
        run()
    return counter.count


def tokens() -> Sequences:
    prompts, prompt_mask = pad(PROMPTS, 0, side="left")
    responses, mask = pad(ANSWERS, 0, side="right")
    return Sequences(prompts=prompts, prompt_mask=prompt_mask, responses=responses, mask=mask)


def rollout(models: SharedModels) -> Rollout:
    sequences, count = tokens(), len(ANSWERS)
    policy, reference, entropy, kl = forward.compared_logprobs(models, sequences, 1.0)
    fields = {name: getattr(sequences, name) for name in ("prompts", "prompt_mask", "responses", "mask")}
    zeros = torch.zeros(count)
    return Rollout(
        **fields, prompt=torch.arange(count), stopped=torch.ones(count, dtype=torch.bool), sampler_logprobs=policy,
        logprobs=policy, ref_logprobs=reference, entropy=entropy, full_kl=kl, values=torch.zeros_like(policy),
        raw_scores=zeros, scores=zeros,
    )  # fmt: skip


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> SharedModels:
    """The roles on a packed Llama of two layers."""
    # A CPU looks whether the faster sum is a number; a GPU never takes it.
    monkeypatch.setattr(functional, "_expectation", lambda pi, x: (pi * x.masked_fill(pi == 0, 0.0)).sum(-1))
    base = build_model("llama", 40)
    assert packing.pack_rows(base)
    models = SharedModels(
        base, LoraConfig(r=4, target_modules="all-linear"), Compute(torch.device("cpu"), torch.float32)
    )
    models.fresh_value(LoraConfig(r=4, target_modules="all-linear"))
    return models


def config(**options: Any) -> PPOConfig:
    sizes = {"total_episodes": 8, "rollout_batch_size": 8, "minibatch_size": 8, "microbatch_size": 8}
    return build(PPOConfig, {"name": "toy", "dataset": "none", "reward": ["reward/toy"], **sizes, **options}, "test")


@torch.no_grad()
def test_a_decode_step(models: SharedModels) -> None:
    """Catches: masks, positions or cache places that each layer makes anew, and keys that are repeated."""
    model = models.causal
    prompts, mask = pad(PROMPTS, 0, side="left")
    options = DrawOptions(temperature=1.0, top_p=1.0, stop_token_ids=(2,), pad_token_id=0)
    cache = decoding.DynamicCache(config=model.config)
    with models.merged_policy():
        _, attention = decoding.prefill(model, prompts, mask, cache, share=True)
        decoder = graphs.Decoder(cache, 8, 64, 4, options)
        with decoder.computing(model, decoding.last_logits):
            decoder.start(cache, attention, mask.sum(dim=1, keepdim=True), ResponseBuffer(torch.rand(4, 8, 1), options))
            assert launches(lambda: decoder._advance(8)) <= 145


def test_scoring_passes(models: SharedModels) -> None:
    """Catches: a number that is asked of the device within a pass, and passes that compute something twice."""
    batch = tokens()
    forward.prepare(models, batch)
    with torch.no_grad():
        assert launches(lambda: forward.compared_logprobs(models, batch, 1.0)) <= 390
        assert launches(lambda: forward.token_values(models, batch)) <= 170


def test_a_training_pass(models: SharedModels) -> None:
    """Catches: statistics that are read while the pass is under way; they are read once an update."""
    batch, zeros = rollout(models), torch.zeros(len(ANSWERS), max(map(len, ANSWERS)))
    forward.prepare(models, batch)
    statistics = LossStatistics(tokens=int(batch.mask.sum()))
    count = launches(lambda: gradients._train(models, config(), batch, zeros + 1, zeros, statistics, train_policy=True))
    assert count <= 1050
    assert all(bool(p.grad is not None) for role in ("policy", "value") for p in models.trainable(role).values())
    totals = Totals()
    totals.add(statistics)
    metrics = totals.metrics()
    assert metrics["ppo/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["ppo/ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["ppo/policy_loss"] == pytest.approx(-1.0, abs=1e-5)


def test_a_layout_made_before_the_pass_is_the_passes_own(models: SharedModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: the layout of another batch (a probe of the model within the pass has ids of its own), and one made twice."""
    batch, made = tokens(), list[Tensor]()
    ids, own = batch.input_ids, packing.Layout.of
    expected = models.hidden(ids, batch.attention_mask)

    def make(ids: Tensor, mask: Tensor) -> packing.Layout:
        made.append(ids)
        return own(ids, mask)

    monkeypatch.setattr(packing.Layout, "of", make)
    packing.LAYOUTS[ids] = batch.layout
    made.clear()
    assert torch.equal(models.hidden(ids, batch.attention_mask), expected) and not made
    models.hidden(ids[:2], batch.attention_mask[:2])
    models.hidden(ids.clone(), batch.attention_mask)
    assert len(made) == 2
    del ids, made[:]
    assert not packing.LAYOUTS

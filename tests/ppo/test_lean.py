"""Options that trade time for memory: results stay what they were, up to rounding."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from ppo.conftest import Make
from ppo.test_trainer import weights
from test_models import ppo_config
from toys import FAMILIES, build_model

from rlhf.base.errors import UserError
from rlhf.models import logprobs
from rlhf.models.fused import FusedLinear
from rlhf.models.roles import RoleModels
from rlhf.models.sequences import length_sorted_batches
from rlhf.ppo import forward
from rlhf.ppo.trainer import PPOTrainer
from rlhf.stages.ppo import check_sampler


def count_attention(models: RoleModels) -> list[int]:
    """A list that grows by one with every pass through the first layer's attention, recomputed ones included."""
    calls: list[int] = []
    first = next(m for m in models.causal.modules() if type(m).__name__.endswith("Attention"))
    first.register_forward_pre_hook(lambda module, args: calls.append(1))
    return calls


def recomputing(trainer: PPOTrainer) -> PPOTrainer:
    """As the stage does before the adapters are put on."""
    trainer.models.causal.gradient_checkpointing_enable({"use_reentrant": False})
    return trainer


def assert_close(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_adapters_give_the_same_update(family: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: an adapter of another role, one without its scaling, a gradient that is lost, and a switch that nobody reads."""
    options: dict[str, Any] = {"ptx_coef": 0.0, "adam_epsilon": 1e-3}
    fused, usual = (make(family, folder=name, fuse_adapters=name == "fused", **options) for name in ("fused", "usual"))
    calls: list[int] = []
    product = FusedLinear.forward
    monkeypatch.setattr(FusedLinear, "forward", lambda layer, x: calls.append(1) or product(layer, x))
    usual.step()
    assert not calls
    fused.step()
    assert calls
    tolerance = 1e-4 if family == "llama" else 1e-9
    for name, weight in weights(usual.models).items():
        torch.testing.assert_close(weights(fused.models)[name], weight, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("value_model", ["adapter", "shared_trunk"])
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_activations_give_the_same_update(family: str, value_model: str, make: Make) -> None:
    """Catches: activations recomputed with the adapter of another role, which gives other gradients without a word, a cache
    that training mode takes away from the sampler, and an option that recomputes nothing."""
    # Llama's norm is fp32, and what Adam makes of a gradient's rounding is as large as a step: compare one of SGD's kind.
    options: dict[str, Any] = {"value_model": value_model, "ptx_coef": 0.0, "adam_epsilon": 1e-3}
    plain = make(family, folder="plain", **options)
    lean = recomputing(make(family, folder="lean", gradient_checkpointing=True, **options))
    calls = count_attention(plain.models), count_attention(lean.models)
    one, two = plain.step(), lean.step()
    assert two["rollout/logprob_gap"] == pytest.approx(one["rollout/logprob_gap"], abs=1e-9)
    assert two["ppo/first_ratio_error"] < 1e-9
    tolerance = 1e-4 if family == "llama" else 1e-9
    for name, weight in weights(plain.models).items():
        torch.testing.assert_close(weights(lean.models)[name], weight, rtol=0, atol=tolerance, msg=name)
    passes = 4 * (1 if value_model == "shared_trunk" else 2)  # microbatches of two, policy and value
    assert len(calls[1]) == len(calls[0]) + passes
    assert not lean.models.training


def test_a_base_in_main_memory_gives_the_same_run(make: Make) -> None:
    """Catches: weights that trained are moved out as well, a reference or reward read while its weights are away, sampling
    from weights that cannot be merged. Here the device is the CPU too; what is moved in and out is the same."""
    plain = make("gpt2", folder="plain")
    lean = recomputing(make("gpt2", folder="lean", gradient_checkpointing=True, offload_base=True))
    lean.models.offload = True  # type: ignore[attr-defined]
    lean.models._ready()  # type: ignore[attr-defined]
    away = {name for name, p in lean.models.named_parameters() if p.is_meta}
    trained = {id(p) for role in ("policy", "value") for p in lean.models.trainable(role).values()}  # type: ignore[arg-type]
    assert away == {name for name, p in lean.models.named_parameters() if id(p) not in trained}
    for _ in range(2):
        one, two = plain.step(), lean.step()
        assert two["objective/score"] == pytest.approx(one["objective/score"], abs=1e-9)
        assert two["objective/kl"] == pytest.approx(one["objective/kl"], abs=1e-9)
    assert_close(
        {n: p.detach() for n, p in plain.models.trainable("policy").items()},
        {n: p.detach() for n, p in lean.models.trainable("policy").items()},
    )


def test_a_budget_of_tokens_forms_the_microbatches(make: Make) -> None:
    """Catches: a batch over its budget, rows lost or twice, a row longer than the budget left out."""
    lengths = torch.tensor([5, 30, 7, 9, 12, 5, 8])
    batches = [batch.tolist() for batch in length_sorted_batches(lengths, 4, 24)]
    assert batches == [[1], [4, 3], [6, 2, 0], [5]]
    assert [len(b) for b in length_sorted_batches(lengths, 2, 10_000)] == [2, 2, 2, 1]
    plain, lean = make("gpt2", folder="plain"), make("gpt2", folder="lean", microbatch_size=8, microbatch_tokens=40)
    plain.step(), lean.step()
    assert_close(weights(plain.models), weights(lean.models))


@pytest.mark.parametrize("finetuning", ["lora", "full"])
def test_no_logits_wait_for_the_backward_pass(finetuning: str, make: Make) -> None:
    """Catches: a softmax over the vocabulary kept for each token until its gradient is asked for: (responses, tokens, V)
    after all, if a microbatch is the rollout. A head that is trained needs it."""

    class Kept:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

    trainer = make("llama", finetuning=finetuning)
    rollout, _ = trainer.collect()
    kept: list[weakref.ref[Kept]] = []

    def pack(tensor: torch.Tensor) -> Kept:
        kept.append(weakref.ref(held := Kept(tensor)))
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor), trainer.models.training_as("policy"):
        result = forward.token_logprobs(trainer.models, "policy", rollout, 1.0)
    vocabulary = trainer.models.causal.config.get_text_config().vocab_size
    alive = [held.tensor.shape for ref in kept if (held := ref()) is not None]
    assert result.requires_grad and alive
    assert (vocabulary in {shape[-1] for shape in alive if len(shape) > 1}) == (finetuning == "full")


def test_distributions_are_made_few_at_a_time_and_are_the_same(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: parts that lose, repeat or mix positions, and a whole batch of distributions held at once."""
    trainer, sizes = make("llama"), []
    log_distribution = logprobs.log_distribution

    def watched(logits: torch.Tensor, *, temperature: float) -> torch.Tensor:
        sizes.append(len(logits))
        return log_distribution(logits, temperature=temperature)

    monkeypatch.setattr(logprobs, "log_distribution", watched)
    monkeypatch.setattr(forward, "log_distribution", watched)
    few, _ = trainer.collect()
    assert max(sizes) == 8 < int(few.mask.sum())
    sizes.clear()
    trained = forward.token_logprobs(trainer.models, "policy", few, 1.0)  # what is trained goes another way
    assert max(sizes) == 8
    monkeypatch.setattr(logprobs, "_POSITIONS_AT_ONCE", 1024)
    sizes.clear()
    whole, _ = trainer.collect()
    assert max(sizes) > 8
    assert torch.equal(trained, forward.token_logprobs(trainer.models, "policy", few, 1.0))
    for name in ("logprobs", "ref_logprobs", "entropy", "full_kl"):
        assert torch.equal(getattr(few, name), getattr(whole, name)), name


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"microbatch_tokens": 0}, "microbatch_tokens must be at least 1"),
        ({"offload_base": True}, "needs finetuning lora and gradient_checkpointing"),
        ({"offload_base": True, "gradient_checkpointing": True, "finetuning": "full"}, "finetuning lora"),
        ({"offload_base": True, "gradient_checkpointing": True, "quantization": "8bit"}, "plain weights only"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], complaint: str) -> None:
    """An option that would do nothing, or break far into the run."""
    with pytest.raises(UserError, match=complaint):
        ppo_config(**options)


def test_a_compiled_sampler_is_refused_with_weights_that_come_and_go() -> None:
    """Catches: a graph for each layer's arrival: such a toy run took minutes, not seconds."""
    config = ppo_config(offload_base=True, gradient_checkpointing=True, sampler="compiled")
    with pytest.raises(UserError, match="leave out offload_base"):
        check_sampler(config, build_model("llama", 32))

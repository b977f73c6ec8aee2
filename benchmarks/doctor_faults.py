"""Known faults for `benchmarks/doctor.py`, each put in from outside: other options, other data, or a patch of the product."""

from __future__ import annotations

import contextlib
import dataclasses
import pkgutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

Patch = Callable[["Place"], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Place:
    """What a patch may need to know."""

    base: Path
    """Folder of the base model."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing put wrong, and the checks that name it."""

    name: str
    what: str
    stage: str
    causes: tuple[str, ...]
    """Names of the checks whose cause is this fault."""
    says: str = ""
    """Words by which a guard of the product names it, for a fault that may never reach the log."""
    preflight: tuple[str, ...] = ()
    """Names of the preflight's checks that stand for it."""
    options: dict[str, Any] = field(default_factory=dict)
    data: dict[str, bool] = field(default_factory=dict)
    """How the data is spoilt: arguments of `write_data`."""
    patch: Patch = lambda place: contextlib.nullcontext()
    own_sft: bool = False
    """The patch is active in an SFT stage before PPO, too."""


# ---- patches ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def around(target: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Replaces a function or method `package.module.name` by what `make` makes of it."""
    place, _, name = target.rpartition(".")
    owner = pkgutil.resolve_name(place)
    with mock.patch.object(owner, name, make(getattr(owner, name))):
        yield


def after(target: str, change: Callable[[Any], Any]) -> Patch:
    """A patch that changes what a function returns."""
    return lambda place: around(target, lambda original: lambda *args, **kwargs: change(original(*args, **kwargs)))


def instead(target: str, make: Callable[[Any], Any]) -> Patch:
    """A patch that puts `make(original)` in a function's place."""
    return lambda place: around(target, make)


def after_build(change: Callable[[Any], None]) -> Patch:
    """A patch of PPO's models once they are built."""

    def both(built: tuple[Any, Any]) -> tuple[Any, Any]:
        with torch.no_grad():
            change(built[0])
        return built

    return after("rlhf.stages.ppo.build_models", both)


def fill(parameters: Any, scale: float) -> None:
    """Random numbers in place of weights."""
    generator = torch.Generator().manual_seed(7)
    for parameter in parameters:
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def _move_policy(models: Any) -> None:
    fill((p for n, p in models.trainable("policy").items() if ".lora_B." in n), 0.05)


def _double_reward(models: Any) -> None:
    for name, parameter in models.named_parameters():
        if ".lora_B.reward." in name:
            parameter.mul_(2)


@contextlib.contextmanager
def reference_before_sft(place: Place) -> Iterator[None]:
    """The reference answers with the base model's weights."""
    from transformers import AutoModelForCausalLM

    raw = dict(AutoModelForCausalLM.from_pretrained(place.base).named_parameters())
    scoring: list[bool] = []

    def make_role(original: Any) -> Any:
        @contextlib.contextmanager
        def role(models: Any, name: str) -> Iterator[None]:
            with original(models, name):
                named = models.causal.named_parameters() if name == "reference" and scoring else ()
                kept = [(p, p.data, n.replace(".base_layer", "")) for n, p in named if ".lora_" not in n]
                for parameter, _, plain in kept:
                    parameter.data = raw[plain].data
                try:
                    yield
                finally:
                    for parameter, data, _ in kept:
                        parameter.data = data

        return role

    def make_scoring(original: Any) -> Any:
        def compared(*args: Any) -> Tensor:
            scoring.append(True)
            try:
                return original(*args)
            finally:
                scoring.pop()

        return compared

    with (
        around("rlhf.models.roles.SharedModels.role", make_role),
        around("rlhf.ppo.forward.compared_logprobs", make_scoring),
    ):
        yield


def _merged_twice(original: Any) -> Any:
    @contextlib.contextmanager
    def merged(models: Any) -> Iterator[Any]:
        with original(models) as causal:
            for layer in models._layers:
                layer._disable_adapters, layer._active_adapter = False, ["policy"]
            yield causal

    return merged


def _not_merged(original: Any) -> Any:
    @contextlib.contextmanager
    def merged(models: Any) -> Iterator[Any]:
        with models.role("reference"):
            yield models.causal

    return merged


def _policy_merged_twice(place: Place) -> contextlib.AbstractContextManager[Any]:
    from transformers import AutoModelForCausalLM

    raw = dict(AutoModelForCausalLM.from_pretrained(place.base).named_parameters())

    def again(model: Any) -> Any:
        for name, parameter in model.named_parameters():
            parameter.data = 2 * parameter.data - raw[name].data
        return model

    return after("rlhf.stages.ppo.load_policy", again)(place)


def _pad_with_stop(tokenizer: Any) -> Any:
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _pad_right(original: Any) -> Any:
    def pad(rows: Any, pad_id: int, *, side: str) -> tuple[Tensor, Tensor]:
        ids, mask = original(rows, pad_id, side="right")
        return ids, torch.ones_like(mask)

    return pad


def _render_twice(original: Any) -> Any:
    def encode(tokenizer: Any, prompt: Any) -> list[int]:
        messages = [dict(message) for message in prompt]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return original(tokenizer, [{"role": "user", "content": text}])

    return encode


def _colder(original: Any) -> Any:
    return lambda *args, **kwargs: original(*args, **{**kwargs, "temperature": 0.6})


def _top_k(original: Any) -> Any:
    def draw(logits: Tensor, *given: Any, **named: Any) -> tuple[Tensor, Tensor]:
        limit = logits.topk(3, dim=-1).values[:, -1:]
        return original(logits.masked_fill(logits < limit, -torch.inf), *given, **named)

    return draw


def _mean_kept(original: Any) -> Any:
    def whiten(x: Tensor, mask: Tensor) -> Tensor:
        real = x[mask]
        return original(x, mask) + mask * real.mean() / real.std().clamp_min(1e-6)

    return whiten


def _copies_of(role: str) -> Callable[[Any], Any]:
    """The optimiser gets copies of a role's weights, not the weights."""

    def make(original: Any) -> Any:
        def trainable(models: Any, asked: str) -> dict[str, Tensor]:
            named = original(models, asked)
            return named if asked != role else {n: torch.nn.Parameter(p.detach().clone()) for n, p in named.items()}

        return trainable

    return make


def _head_not_saved(original: Any) -> Any:
    def save(model: Any, folder: Path, **kwargs: Any) -> None:
        heads = [p for n, p in model.named_parameters() if "score" in n]
        kept = [p.detach().clone() for p in heads]
        with torch.no_grad():
            fill(heads, 0.1)
            original(model, folder, **kwargs)
            for head, trained in zip(heads, kept, strict=True):
                head.copy_(trained)

    return save


def _slower(original: Any) -> Any:
    starts: list[float] = []

    def respond(*args: Any, **kwargs: Any) -> Any:
        starts.append(time.process_time())
        while len(starts) > 14 and time.process_time() < starts[-1] + 4 * (starts[13] - starts[1]) / 12:
            pass
        return original(*args, **kwargs)

    return respond


def _without_stop(dataset: Any) -> Any:
    """What a loss mask `token != pad` does to labels when the pad token is the stop token."""
    return dataset.map(lambda row: {"labels": [*row["labels"][:-1], -100]})


# ---- the faults ------------------------------------------------------------------------------------------------------

PPO_FAULTS = (
    Fault(
        name="reference_before_sft", stage="ppo", what="the reference is the base model before SFT",
        causes=("wrong_reference",), preflight=("policy is the reference at step 0", "sft model loads as it was trained"),
        patch=reference_before_sft,
    ),
    Fault(
        name="other_start", stage="ppo", what="the policy starts from another adapter than the reference",
        causes=("wrong_reference",), preflight=("policy is the reference at step 0",),
        patch=after_build(_move_policy),
    ),
    Fault(
        name="pad_is_stop", stage="ppo", what="pad token = stop token",
        causes=("pad_is_stop",), preflight=("tokenizer, template, pad and stop tokens",),
        patch=after("rlhf.stages.ppo.load_tokenizer", _pad_with_stop),
    ),
    Fault(
        name="right_padded_prompts", stage="ppo", what="prompts padded on the right, padding not masked",
        causes=("padding_counted",), preflight=("policy is the reference at step 0", "score independent of batch and padding"),
        patch=instead("rlhf.ppo.rollout.pad", _pad_right),
    ),
    Fault(
        name="template_twice", stage="ppo", what="chat template applied twice",
        causes=("template_twice",), preflight=("template applied once",),
        patch=instead("rlhf.stages.ppo.encode_prompt", _render_twice),
    ),
    Fault(
        name="adapter_merged_twice", stage="ppo", what="the sampler's weights hold the policy's adapter twice",
        causes=("sampler_drift",), preflight=("merged equals unmerged",),
        patch=instead("rlhf.models.roles.SharedModels.merged_policy", _merged_twice),
    ),
    Fault(
        name="adapter_not_merged", stage="ppo", what="the sampler's weights do not hold the policy's adapter",
        causes=("sampler_drift",), preflight=("merged equals unmerged",),
        patch=instead("rlhf.models.roles.SharedModels.merged_policy", _not_merged),
    ),
    Fault(
        name="sft_merged_twice", stage="ppo", what="the SFT adapter is merged into the base twice",
        causes=("reward_scale",), preflight=("sft model loads as it was trained",),
        patch=_policy_merged_twice,
    ),
    Fault(
        name="temperature", stage="ppo", what="sampled at temperature 0.6, scored at 1",
        causes=("sampler_mismatch",), preflight=("the sampler's distribution is the scored one",),
        patch=instead("rlhf.ppo.rollout.sample", _colder),
    ),
    Fault(
        name="top_k", stage="ppo", what="sampled with top-k 3",
        causes=("sampler_mismatch",), preflight=("the sampler's distribution is the scored one",),
        patch=instead("rlhf.models.drawing.draw_tokens", _top_k),
    ),
    Fault(
        name="stale_logprobs", stage="ppo", what="old log-probabilities are those of the reference",
        causes=("stale_logprobs",), preflight=("first ratio is 1",), says="old log-probabilities",
        patch=after("rlhf.ppo.rollout.evaluate_sequences", lambda r: dataclasses.replace(r, logprobs=r.ref_logprobs)),
    ),
    Fault(
        name="mask_inverted", stage="ppo", what="response mask turned round",
        causes=("padding_counted",), says="mask",
        patch=after("rlhf.ppo.rollout.evaluate_sequences", lambda r: dataclasses.replace(r, mask=~r.mask)),
    ),
    Fault(
        name="whitening_mean", stage="ppo", what="advantages whitened, their mean added back",
        causes=("advantages_not_centred",),
        patch=instead("rlhf.ppo.functional.whiten", _mean_kept),
    ),
    Fault(
        name="advantage_sign", stage="ppo", what="advantages with the wrong sign",
        causes=("reward_falling",), options={"kl_coef": 0.02},
        patch=instead("rlhf.ppo.functional.whiten", lambda original: lambda x, mask: -original(x, mask)),
    ),
    Fault(
        name="policy_copied", stage="ppo", what="the optimiser holds copies of the policy's weights",
        causes=("gradient_zero", "policy_unmoved"), preflight=("trainable parameters", "gradients"),
        patch=instead("rlhf.models.roles.SharedModels.trainable", _copies_of("policy")),
    ),
    Fault(
        name="value_copied", stage="ppo", what="the optimiser holds copies of the value's weights",
        causes=("value_untrained",), preflight=("trainable parameters", "gradients"),
        patch=instead("rlhf.models.roles.SharedModels.trainable", _copies_of("value")),
    ),
    Fault(
        name="value_fresh_and_frozen", stage="ppo", what="value head fresh, and not trained",
        causes=("value_untrained", "value_dead"), options={"value_learning_rate": 0.0},
        patch=after_build(lambda models: fill(models.value_head.parameters(), 1.0)),
    ),
    Fault(
        name="value_loss_off", stage="ppo", what="weight of the value loss 0",
        causes=("value_untrained",), preflight=("gradients",), options={"vf_coef": 0.0},
    ),
    Fault(
        name="learning_rate_x100", stage="ppo", what="learning rate x 100",
        causes=("steps_too_large", "kl_jump"), options={"learning_rate": 0.2},
    ),
    Fault(
        name="learning_rate_0", stage="ppo", what="learning rate 0",
        causes=("learning_rate_zero",), options={"learning_rate": 0.0},
    ),
    Fault(
        name="adam_epsilon", stage="ppo", what="Adam's epsilon 1e4: nothing moves",
        causes=("policy_unmoved",), options={"adam_epsilon": 1e4},
    ),
    Fault(
        name="kl_coef_0", stage="ppo", what="KL coefficient 0",
        causes=("no_kl_penalty",), options={"kl_coef": 0.0, "learning_rate": 4e-3},
    ),
    Fault(
        name="kl_controller", stage="ppo", what="KL target far below what the step size makes, horizon far too long",
        causes=("controller_saturated",), options={"kl_target": 0.1, "kl_horizon": 10_000_000, "kl_coef": 0.02},
    ),
    Fault(
        name="reward_sign", stage="ppo", what="reward sign flipped",
        causes=("reward_opposes_judge",), preflight=("reward model loads as it was trained",),
        patch=after("rlhf.reward.sources.AdapterReward.__call__", lambda scores: -scores),
    ),
    Fault(
        name="reward_constant", stage="ppo", what="reward constant",
        causes=("reward_constant",), options={"reward": ["doctor_world:constant"]},
    ),
    Fault(
        name="reward_nan", stage="ppo", what="reward gives NaN",
        causes=("not_finite",), says="finite number", options={"reward": ["doctor_world:broken"]},
    ),
    Fault(
        name="reward_random_head", stage="ppo", what="reward model with a random score head",
        causes=("reward_scale", "reward_ignores_judge"), preflight=("reward model loads as it was trained",),
        patch=after_build(lambda models: fill(models.reward_head.parameters(), 1.0)),
    ),
    Fault(
        name="reward_merged_twice", stage="ppo", what="reward adapter twice as strong",
        causes=("reward_scale",), preflight=("reward model loads as it was trained",),
        patch=after_build(_double_reward),
    ),
    Fault(
        name="truncated", stage="ppo", what="responses cut off after five tokens and scored unfinished",
        causes=("cut_off",), options={"response_length": 5, "missing_eos_penalty": 0.0},
    ),
    Fault(
        name="stop_masked", stage="ppo", what="stop token masked out of the SFT loss",
        causes=("cut_off",), preflight=("loss mask",), options={"reward": ["doctor_world:mood"]}, own_sft=True,
        patch=after("rlhf.stages.sft.tokenize", _without_stop),
    ),
    Fault(
        name="reward_length", stage="ppo", what="reward pays for length",
        causes=("length_rewarded",),
        options={"reward": ["doctor_world:length"], "kl_coef": 0.01, "missing_eos_penalty": 0.0, "learning_rate": 1e-2},
    ),
    Fault(
        name="reward_hacked", stage="ppo", what="reward counts good words, the judge minds repetition; weak KL penalty",
        causes=("over_optimised", "repeated_text", "responses_alike"),
        options={
            "reward": ["doctor_world:praise"], "gold": "doctor_world:strict_judge", "kl_coef": 0.005,
            "learning_rate": 1e-2, "missing_eos_penalty": 0.0,
        },
    ),
    Fault(
        name="slowing", stage="ppo", what="the machine slows down to a fifth",
        causes=("slowing_down",),
        patch=instead("rlhf.ppo.rollout.respond", _slower),
    ),
)  # fmt: skip
SUPERVISED_FAULTS = (
    Fault(
        name="sft_learning_rate_0", stage="sft", what="SFT: learning rate 0",
        causes=("learning_rate_zero",), options={"learning_rate": 0.0},
    ),
    Fault(
        name="sft_learning_rate_x100", stage="sft", what="SFT: learning rate x 100",
        causes=("loss_rising",), options={"learning_rate": 0.5},
    ),
    Fault(
        name="reward_learning_rate_0", stage="reward", what="reward model: learning rate 0",
        causes=("learning_rate_zero",), options={"learning_rate": 0.0},
    ),
    Fault(
        name="reward_learning_rate_x100", stage="reward", what="reward model: learning rate x 100",
        causes=("loss_rising",), options={"learning_rate": 0.4},
    ),
    Fault(
        name="labels_shuffled", stage="reward", what="preference labels shuffled",
        causes=("accuracy_at_chance",), data={"shuffled": True},
    ),
    Fault(
        name="labels_swapped", stage="reward", what="training labels swapped, held-out ones not",
        causes=("accuracy_below_chance",), data={"swapped": True},
    ),
    Fault(
        name="head_not_saved", stage="reward", what="reward model saved without its trained head",
        causes=(), preflight=("adapter and head reload",), says="saved reward model is not the trained one",
        patch=instead("rlhf.stages.reward.save_reward_model", _head_not_saved),
    ),
)  # fmt: skip
FAULTS = (*SUPERVISED_FAULTS, *PPO_FAULTS)

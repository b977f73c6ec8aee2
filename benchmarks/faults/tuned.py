"""The faults that the doctor was tuned on, each put in from outside: other options, other data, or a patch of the product."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from faults.patching import Fault, Place, Row, after, after_build, around, fill, instead, rewrite

# ---- patches ---------------------------------------------------------------------------------------------------------


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


def _without_stop(result: Any) -> Any:
    """What a loss mask `token != pad` does to labels when the pad token is the stop token."""
    rows, dropped = result
    return rows.map(lambda row: {"labels": [*row["labels"][:-1], -100]}), dropped


def _shuffled(rows: list[Row]) -> list[Row]:
    draw = random.Random(0)
    return [{**row, "ratings": draw.sample(row["ratings"], len(row["ratings"]))} for row in rows]


def _turned_round(rows: list[Row]) -> list[Row]:
    return [{**row, "ratings": [-rating for rating in row["ratings"]]} for row in rows]


# ---- the faults ------------------------------------------------------------------------------------------------------

PPO = (
    Fault(
        name="reference_before_sft", kind="computation", stage="ppo", what="the reference is the base model before SFT",
        causes=("reference_logprobs", "policy_start"),
        words=("policy is the reference at step 0", "sft model loads as it was trained"),
        patch=reference_before_sft,
    ),
    Fault(
        name="other_start", kind="computation", stage="ppo", what="the policy starts from another adapter than the reference",
        causes=("policy_start", "reference_logprobs"), words=("policy is the reference at step 0",),
        patch=after_build(_move_policy),
    ),
    Fault(
        name="pad_is_stop", kind="computation", stage="ppo", what="pad token = stop token",
        causes=("pad_token",), words=("tokenizer, template, pad and stop tokens",),
        patch=after("rlhf.stages.ppo.load_tokenizer", _pad_with_stop),
    ),
    Fault(
        name="right_padded_prompts", kind="computation", stage="ppo", what="prompts padded on the right, padding not masked",
        causes=("padding",), words=("policy is the reference at step 0", "score independent of batch and padding"),
        patch=instead("rlhf.ppo.rollout.pad", _pad_right),
    ),
    Fault(
        name="template_twice", kind="computation", stage="ppo", what="chat template applied twice",
        causes=("prompt_tokens",), words=("template applied once",),
        patch=instead("rlhf.stages.ppo.encode_prompt", _render_twice),
    ),
    Fault(
        name="adapter_merged_twice", kind="computation", stage="ppo",
        what="the sampler's weights hold the policy's adapter twice",
        causes=("sampler_weights",), words=("merged equals unmerged",),
        patch=instead("rlhf.models.roles.SharedModels.merged_policy", _merged_twice),
    ),
    Fault(
        name="adapter_not_merged", kind="computation", stage="ppo", what="the sampler's weights do not hold the policy's adapter",
        causes=("sampler_weights",), words=("merged equals unmerged",),
        patch=instead("rlhf.models.roles.SharedModels.merged_policy", _not_merged),
    ),
    Fault(
        name="sft_merged_twice", kind="computation", stage="ppo", what="the SFT adapter is merged into the base twice",
        causes=("loaded_weights",), words=("sft model loads as it was trained",),
        patch=_policy_merged_twice,
    ),
    Fault(
        name="temperature", kind="computation", stage="ppo", what="sampled at temperature 0.6, scored at 1",
        causes=("sampling_distribution",), words=("the sampler's distribution is the scored one",),
        patch=instead("rlhf.ppo.rollout.sample", _colder),
    ),
    Fault(
        name="top_k", kind="computation", stage="ppo", what="sampled with top-k 3",
        causes=("sampling_distribution",), words=("the sampler's distribution is the scored one",),
        patch=instead("rlhf.models.drawing.draw_tokens", _top_k),
    ),
    Fault(
        name="stale_logprobs", kind="computation", stage="ppo", what="old log-probabilities are those of the reference",
        causes=("old_logprobs",), words=("old log-probabilities", "first ratio is 1"),
        patch=after("rlhf.ppo.rollout.evaluate_sequences", lambda r: dataclasses.replace(r, logprobs=r.ref_logprobs)),
    ),
    Fault(
        name="mask_inverted", kind="computation", stage="ppo", what="response mask turned round",
        causes=("mask", "padding"), words=("mask",),
        patch=after("rlhf.ppo.rollout.evaluate_sequences", lambda r: dataclasses.replace(r, mask=~r.mask)),
    ),
    Fault(
        name="whitening_mean", kind="computation", stage="ppo", what="advantages whitened, their mean added back",
        causes=("whitening", "advantages"),
        patch=instead("rlhf.ppo.functional.whiten", _mean_kept),
    ),
    Fault(
        name="advantage_sign", kind="computation", stage="ppo", what="advantages with the wrong sign",
        causes=("whitening", "advantages"), options={"kl_coef": 0.02},
        patch=instead("rlhf.ppo.functional.whiten", lambda original: lambda x, mask: -original(x, mask)),
    ),
    Fault(
        name="policy_copied", kind="computation", stage="ppo", what="the optimiser holds copies of the policy's weights",
        causes=("policy_trained",), words=("trainable parameters", "gradients"),
        patch=instead("rlhf.models.roles.SharedModels.trainable", _copies_of("policy")),
    ),
    Fault(
        name="value_copied", kind="computation", stage="ppo", what="the optimiser holds copies of the value's weights",
        causes=("value_trained",), words=("trainable parameters", "gradients"),
        patch=instead("rlhf.models.roles.SharedModels.trainable", _copies_of("value")),
    ),
    Fault(
        name="value_fresh_and_frozen", kind="input", stage="ppo", what="value head fresh, and not trained",
        causes=("value_learning_rate", "value_trained"), options={"value_learning_rate": 0.0},
        patch=after_build(lambda models: fill(models.value_head.parameters(), 1.0)),
    ),
    Fault(
        name="value_loss_off", kind="input", stage="ppo", what="weight of the value loss 0",
        causes=("vf_coef", "value_trained"), words=("gradients",), options={"vf_coef": 0.0},
    ),
    Fault(
        name="learning_rate_x100", kind="input", stage="ppo", what="learning rate x 100",
        causes=("learning_rate_high",), options={"learning_rate": 0.2},
    ),
    Fault(
        name="learning_rate_0", kind="input", stage="ppo", what="learning rate 0",
        causes=("learning_rate_zero",), options={"learning_rate": 0.0},
    ),
    Fault(
        name="adam_epsilon", kind="input", stage="ppo", what="Adam's epsilon 1e4: nothing moves",
        causes=("adam_epsilon", "policy_trained"), options={"adam_epsilon": 1e4},
    ),
    Fault(
        name="kl_coef_0", kind="input", stage="ppo", what="KL coefficient 0",
        causes=("kl_coef_zero",), options={"kl_coef": 0.0, "learning_rate": 4e-3},
    ),
    Fault(
        name="kl_controller", kind="input", stage="ppo",
        what="KL target far below what the step size makes, horizon far too long",
        causes=("kl_target",), options={"kl_target": 0.1, "kl_horizon": 10_000_000, "kl_coef": 0.02},
    ),
    Fault(
        name="reward_sign", kind="computation", stage="ppo", what="reward sign flipped",
        causes=("reward_sign", "scores"), words=("reward model loads as it was trained",),
        patch=after("rlhf.reward.sources.AdapterReward.__call__", lambda scores: -scores),
    ),
    Fault(
        name="reward_constant", kind="input", stage="ppo", what="reward constant",
        causes=("reward_constant",), options={"reward": ["faults.world:constant"]},
    ),
    Fault(
        name="reward_nan", kind="input", stage="ppo", what="reward gives NaN",
        causes=("scores_finite",), words=("finite number",), options={"reward": ["faults.world:broken"]},
    ),
    Fault(
        name="reward_random_head", kind="computation", stage="ppo", what="reward model with a random score head",
        causes=("loaded_weights", "reward_scale"), words=("reward model loads as it was trained",),
        patch=after_build(lambda models: fill(models.reward_head.parameters(), 1.0)),
    ),
    Fault(
        name="reward_merged_twice", kind="computation", stage="ppo", what="reward adapter twice as strong",
        causes=("loaded_weights", "reward_scale"), words=("reward model loads as it was trained",),
        patch=after_build(_double_reward),
    ),
    Fault(
        name="truncated", kind="input", stage="ppo", what="responses cut off after five tokens and scored unfinished",
        causes=("response_length",), options={"response_length": 5, "missing_eos_penalty": 0.0},
    ),
    Fault(
        name="stop_masked", kind="computation", stage="ppo", what="stop token masked out of the SFT loss",
        causes=("stop_token",), words=("loss mask",), options={"reward": ["faults.world:mood"]}, own_sft=True,
        patch=after("rlhf.stages.sft.tokenize", _without_stop),
    ),
    Fault(
        name="reward_length", kind="outcome", stage="ppo", what="reward pays for length",
        causes=("length_rewarded",),
        options={"reward": ["faults.world:length"], "kl_coef": 0.01, "missing_eos_penalty": 0.0, "learning_rate": 1e-2},
    ),
    Fault(
        name="reward_hacked", kind="outcome", stage="ppo",
        what="reward counts good words, the judge minds repetition; weak KL penalty",
        causes=("over_optimisation", "repetition"),
        options={
            "reward": ["faults.world:praise"], "gold": "faults.world:strict_judge", "kl_coef": 0.005,
            "learning_rate": 1e-2, "missing_eos_penalty": 0.0,
        },
    ),
    Fault(
        name="slowing", kind="outcome", stage="ppo", what="the machine slows down to a fifth",
        causes=("machine",),
        patch=instead("rlhf.ppo.rollout.respond", _slower),
    ),
)  # fmt: skip
SUPERVISED = (
    Fault(
        name="sft_learning_rate_0", kind="input", stage="sft", what="SFT: learning rate 0",
        causes=("learning_rate_zero",), options={"learning_rate": 0.0},
    ),
    Fault(
        name="sft_learning_rate_x100", kind="input", stage="sft", what="SFT: learning rate x 100",
        causes=("learning_rate_high",), options={"learning_rate": 0.5},
    ),
    Fault(
        name="reward_learning_rate_0", kind="input", stage="reward", what="reward model: learning rate 0",
        causes=("learning_rate_zero",), options={"learning_rate": 0.0},
    ),
    Fault(
        name="reward_learning_rate_x100", kind="input", stage="reward", what="reward model: learning rate x 100",
        causes=("learning_rate_high",), options={"learning_rate": 0.4},
    ),
    Fault(
        name="labels_shuffled", kind="input", stage="reward", what="preference labels shuffled",
        causes=("label_noise",), data=rewrite("comparisons/train", "comparisons/validation", change=_shuffled),
    ),
    Fault(
        name="labels_swapped", kind="input", stage="reward", what="training labels swapped, held-out ones not",
        causes=("label_sign",), data=rewrite("comparisons/train", change=_turned_round),
    ),
    Fault(
        name="head_not_saved", kind="computation", stage="reward", what="reward model saved without its trained head",
        causes=("saved_weights",), words=("saved reward model is not the trained one", "adapter and head reload"),
        patch=instead("rlhf.stages.reward.save_reward_model", _head_not_saved),
    ),
)  # fmt: skip
#: The demo driven too far is read from a folder.
OVEROPTIMISED = Fault(
    name="overoptimised_demo", stage="ppo", kind="outcome",
    what="the demo without clipped rewards, with a large constant step size",
    causes=("over_optimisation", "repetition", "entropy"),
)  # fmt: skip
TUNED = (*SUPERVISED, *PPO)

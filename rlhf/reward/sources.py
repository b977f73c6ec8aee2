"""Rewards: what scores responses, in PPO and in evaluations.

A source is called with `Responses` and returns one finite number for each; anything else, or no answer, is a `RewardError`,
which stops a run with a checkpoint. Several sources are added up with weights (`Reward`). Each kind of source is a class
with `matches` and `open`; to add one, write its class and put it into `KINDS`.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import cached_file

from rlhf.base import distributed
from rlhf.base.errors import UserError, require
from rlhf.base.functions import load_function
from rlhf.base.http import HttpError, post_json
from rlhf.base.json_files import read_object
from rlhf.config import REGISTERED_REWARD, ComputeConfig, PPOConfig
from rlhf.models.base import context_length
from rlhf.models.classifiers import open_classifier
from rlhf.models.compute import Compute
from rlhf.models.inputs import function_inputs, reward_model_inputs
from rlhf.models.registered import MANIFESTS
from rlhf.models.roles import RoleModels
from rlhf.models.sequences import Sequences
from rlhf.models.template_trial import try_templates
from rlhf.models.tokenization import Message, encode_prompt, encode_response, last_user_text
from rlhf.registry import Manifest, Registry
from rlhf.reward.functions import RewardError, ScoringFunction, checked_scores
from rlhf.reward.scorer import Scorer, open_scorer


@dataclass(frozen=True, kw_only=True)
class Responses:
    """B responses to be scored."""

    sequences: Sequences
    """Token ids of prompts and responses."""
    batches: Sequence[Tensor]
    """Row numbers of each forward pass."""
    texts: list[str]
    """(B) the responses' texts, without special tokens."""
    rows: Sequence[Mapping[str, Any]]
    """(B) the data rows that the prompts came from: `prompt` (messages), and whatever other columns the data has."""


Source = Callable[[Responses], Tensor]


class Reward:
    """The weighted sum of sources."""

    def __init__(self, sources: Mapping[str, Source], weights: Sequence[float] = ()) -> None:
        self.sources = dict(sources)
        self.weights = list(weights) or [1.0] * len(self.sources)

    def __call__(self, responses: Responses) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum (B,), and each source's own scores by name, unweighted."""
        device = responses.sequences.mask.device
        # All processes ask, so that all fail together; the answers of process 0 count, should they differ.
        parts = {name: distributed.from_main(source(responses).to(device)) for name, source in self.sources.items()}
        total = sum(weight * part for weight, part in zip(self.weights, parts.values(), strict=True))
        assert isinstance(total, Tensor)
        return total, parts


# Kinds


@dataclass(frozen=True, kw_only=True)
class Opening:
    """Settings with which sources are opened."""

    config: ComputeConfig
    compute: Compute
    batch_size: int
    """Responses a forward pass or request."""
    timeout: float
    """Seconds that an endpoint may take for a request."""
    gold: bool = False
    """Open functions as independent judges, which get the texts of responses alone."""
    policy: Manifest | None = None
    """The policy that wrote the responses; reward models with its tokenizer and chat template read token ids, others texts."""


class Kind(abc.ABC):
    """A kind of source, recognised by the form of its names."""

    NAMES: ClassVar[str]
    """Regular expression of the names, as users write them."""

    @classmethod
    def matches(cls, name: str) -> bool:
        """Return whether a name is of this kind."""
        return re.fullmatch(cls.NAMES, name, re.DOTALL) is not None

    @classmethod
    @abc.abstractmethod
    def open(cls, name: str, opening: Opening) -> Source:
        """Return the source of a name of this kind; raise `UserError` where there is none."""

    @classmethod  # noqa: B027 a kind may have nothing cheap to check
    def check(cls, name: str, registry: Registry) -> None:
        """Raise `UserError` for a name that cannot be opened, as far as that is cheap to know."""

    @classmethod
    def inputs(cls, name: str, registry: str) -> dict[str, str]:
        """Return the hashes of what a name of this kind is read from outside the registry, by name."""
        return {}

    @classmethod
    def label(cls, name: str) -> str:
        """Return the source's name in logs."""
        return name.rsplit("/", 1)[-1].split("@")[0]


class ModelSource:
    """Base of sources that run a model; the preflight compares their scores of rows alone and among padding."""


class AdapterReward(ModelSource):
    """The reward adapter and head on a PPO run's shared base; scores are normalised by the reward model's mean and spread."""

    def __init__(self, models: RoleModels) -> None:
        self.models = models

    @torch.no_grad()
    def __call__(self, responses: Responses) -> Tensor:
        sequences = responses.sequences
        dtype = self.models.reward_head.weight.dtype
        scores = torch.zeros(len(sequences), dtype=dtype, device=sequences.mask.device)
        for rows in distributed.share(responses.batches):
            scores[rows] = sequence_scores(self.models, sequences.select(rows)).to(dtype)
        return distributed.total(scores)


def sequence_scores(models: RoleModels, batch: Sequences) -> Tensor:
    """Return the reward adapter's normalised scores (B,), read at the last real response token."""
    with models.role("reward"):
        hidden = models.hidden(batch.input_ids, batch.attention_mask)
        last = batch.prompts.shape[1] + batch.mask.sum(dim=1) - 1
        return models.scores(hidden[torch.arange(len(batch), device=last.device), last])


class ModelReward(Kind, ModelSource):
    """A registered reward model beside the policy, its scores normalised.

    Args:
        reads_texts: encode the texts of responses by the reward model's own tokenizer and chat template, in place of
            reading token ids; needed where those of the policy are different.
    """

    NAMES = REGISTERED_REWARD

    def __init__(self, scorer: Scorer, *, reads_texts: bool = False) -> None:
        self.scorer, self.reads_texts = scorer, reads_texts

    @classmethod
    def check(cls, name: str, registry: Registry) -> None:
        registry.get(name)

    @classmethod
    def open(cls, name: str, opening: Opening) -> Source:
        registry = Registry(opening.config.registry)
        artifact = registry.get(name, expect_stage="reward")
        scorer = open_scorer(artifact, registry, opening.config, opening.compute, opening.batch_size)
        return cls(scorer, reads_texts=opening.policy is None or not same_tokens(artifact.manifest, opening.policy))

    def __call__(self, responses: Responses) -> Tensor:
        if self.reads_texts:
            return scores_of_texts(self.scorer, [row["prompt"] for row in responses.rows], responses.texts)
        ids, mask = responses.sequences.input_ids, responses.sequences.attention_mask
        return self.scorer([row[real].tolist() for row, real in zip(ids, mask, strict=True)])


def same_tokens(one: Manifest, other: Manifest) -> bool:
    """Return whether two models have one tokenizer and one chat template, so that token ids mean the same to both."""
    return (one.tokenizer_hash, one.chat_template_hash) == (other.tokenizer_hash, other.chat_template_hash)


def scores_of_texts(scorer: Scorer, prompts: Sequence[Sequence[Message]], answers: Sequence[str]) -> Tensor:
    """Return normalised scores (M,) of texts, encoded by the reward model's own tokenizer.

    Raises:
        RewardError: a conversation is longer than the model's context.
    """
    rows = [scorer.encode(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    _require_room(rows, context_length(cast(Any, scorer.model)))
    return scorer(rows)


def _require_room(rows: Sequence[Sequence[int]], context: int) -> None:
    if (longest := max(map(len, rows))) > context:
        raise RewardError(
            f"a conversation has {longest} tokens in the reward model's own tokenizer, and its context is {context}: "
            "shorten prompts or answers, or take a reward model of a longer context"
        )


class FunctionReward(Kind):
    """`package.module:function(prompts, responses, **columns) -> list[float]`.

    prompts: the conversations that were answered (lists of messages); responses: texts; columns: the other columns of the
    data that the function takes, one value for each response; a column of the name `prompts` or `responses` gets an
    underscore at its end. All are lists of the same length.
    """

    NAMES = r"[\w.]+:\w+"

    def __init__(self, reference: str) -> None:
        self.function = ScoringFunction(reference)

    @classmethod
    def check(cls, name: str, registry: Registry) -> None:
        load_function(name)

    @classmethod
    def open(cls, name: str, opening: Opening) -> Source:
        return GoldSource(name) if opening.gold else cls(name)

    @classmethod
    def inputs(cls, name: str, registry: str) -> dict[str, str]:
        return function_inputs("reward", [name])

    @classmethod
    def label(cls, name: str) -> str:
        return name.rsplit(":", 1)[-1]

    def __call__(self, responses: Responses) -> Tensor:
        names = {name for row in responses.rows for name in row} - {"prompt"}
        columns = {
            f"{name}_" if name in ("prompts", "responses") else name: [row.get(name) for row in responses.rows]
            for name in sorted(names)
        }
        prompts = [row["prompt"] for row in responses.rows]
        return self.function(len(responses.texts), prompts, list(responses.texts), **columns)


class GoldSource(FunctionReward):
    """`package.module:function(responses) -> list[float]`: an independent judge, which gets the texts alone."""

    def __call__(self, responses: Responses) -> Tensor:
        return self.function(len(responses.texts), list(responses.texts))


class ClassifierReward(Kind, ModelSource):
    """A sequence classifier with one output, of any family, with its own tokenizer and chat template.

    A tokenizer without a template encodes the last question and the answer as a pair of texts. A reward model that was
    exported from a registry is read at the stop token, and its scores are normalised, as in the registry.
    """

    NAMES = r".*"

    def __init__(self, name_or_path: str, compute: Compute, batch_size: int) -> None:
        self.batch_size = batch_size
        try:
            # Without this argument transformers asks at the terminal whether to run a model's code.
            self.tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
            if isinstance(self.tokenizer.chat_template, str):
                try_templates([self.tokenizer.chat_template], name_or_path)
            model = open_classifier(name_or_path, dtype=compute.dtype)
        except (OSError, ValueError) as error:
            raise UserError(
                f"no reward source '{name_or_path}': it is no reward/NAME, no URL, no package.module:function, and no "
                f"classifier could be loaded: {str(error).splitlines()[0]}"
            ) from error
        outputs = int(model.config.num_labels)
        require(outputs == 1, f"{name_or_path} has {outputs} outputs; a reward model has one")
        require(
            self.tokenizer.pad_token is not None,
            f"the tokenizer of {name_or_path} has no pad token, so responses cannot be scored in batches; "
            "set pad_token in its tokenizer_config.json",
        )
        model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model = model.to(compute.device).eval().requires_grad_(False)
        self.context = context_length(model)
        self.exported = _exported(name_or_path)
        self.mean, self.std = self.exported or (0.0, 1.0)

    @classmethod
    def open(cls, name: str, opening: Opening) -> Source:
        return cls(name, opening.compute, opening.batch_size)

    @classmethod
    def inputs(cls, name: str, registry: str) -> dict[str, str]:
        return reward_model_inputs(name, registry)

    @torch.no_grad()
    def __call__(self, responses: Responses) -> Tensor:
        conversations = [(row["prompt"], text) for row, text in zip(responses.rows, responses.texts, strict=True)]
        encoded = [self._encode(prompt, text) for prompt, text in conversations]
        _require_room(encoded, self.context)
        scores = []
        for first in range(0, len(encoded), self.batch_size):
            batch = self.tokenizer.pad({"input_ids": encoded[first : first + self.batch_size]}, return_tensors="pt")
            scores.append(self.model(**batch.to(self.model.device)).logits[:, 0].float())
        return (torch.cat(scores) - self.mean) / self.std

    def _encode(self, prompt: list[dict[str, str]], text: str) -> list[int]:
        answer = [{"role": "assistant", "content": text}]
        if self.exported is not None:
            return encode_prompt(self.tokenizer, prompt) + encode_response(self.tokenizer, prompt, answer)
        if self.tokenizer.chat_template is None:
            return list(self.tokenizer(last_user_text(prompt), text, truncation=True).input_ids)
        encoded: Any = self.tokenizer.apply_chat_template([*prompt, *answer], tokenize=True, return_dict=True)
        return list(encoded["input_ids"])


def _exported(name_or_path: str) -> tuple[float, float] | None:
    """Return mean and spread of an exported reward model's scores, from the manifests in its folder; None: not an export."""
    try:
        file = cached_file(name_or_path, MANIFESTS)
    except OSError:  # what transformers raises where there is none
        return None
    try:
        *_, manifest = read_object(Path(str(file))).values()  # parents come before children
        return float(manifest["reward_mean"] or 0.0), float(manifest["reward_std"] or 1.0)
    except (UserError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{MANIFESTS} in {name_or_path} is no manifest of a reward model; export it again") from error


class EndpointReward(Kind):
    """An HTTP endpoint: POST {"prompts": [...], "responses": [...]} as JSON, answered by {"scores": [...]}.

    Requests that fail to connect or answer 429 or 5xx are repeated a few times, within the one time limit.
    """

    NAMES = r"https?://.*"

    def __init__(self, url: str, batch_size: int, timeout: float) -> None:
        self.url, self.batch_size, self.timeout = url, batch_size, timeout

    @classmethod
    def open(cls, name: str, opening: Opening) -> Source:
        return cls(name, opening.batch_size, opening.timeout)

    @classmethod
    def label(cls, name: str) -> str:
        return "endpoint"

    def __call__(self, responses: Responses) -> Tensor:
        prompts = [row["prompt"] for row in responses.rows]
        parts = []
        for first in range(0, len(prompts), self.batch_size):
            last = min(first + self.batch_size, len(prompts))
            payload = {"prompts": prompts[first:last], "responses": responses.texts[first:last]}
            try:
                scores = post_json(self.url, payload, timeout=self.timeout)["scores"]
            except (HttpError, KeyError, TypeError) as error:
                raise RewardError(f"reward endpoint {self.url} gave no scores: {error}") from error
            parts.append(checked_scores(scores, last - first, self.url))
        return torch.cat(parts)


# The table of kinds

#: All kinds of sources; a name belongs to the first that matches.
KINDS: tuple[type[Kind], ...] = (EndpointReward, ModelReward, FunctionReward, ClassifierReward)


def kind_of(name: str) -> type[Kind]:
    """Return the kind of source that a name belongs to."""
    return next(kind for kind in KINDS if kind.matches(name))


def source_inputs(config: PPOConfig) -> dict[str, str]:
    """Return the hashes of all that a PPO run's rewards are read from outside the registry, by name."""
    return {
        key: digest for name in config.reward for key, digest in kind_of(name).inputs(name, config.registry).items()
    }


def open_sources(config: PPOConfig, compute: Compute) -> dict[str, Source]:
    """Return the sources of a PPO run that need none of its models, by label."""
    opening = Opening(config=config, compute=compute, batch_size=config.microbatch, timeout=config.reward_timeout)
    kinds = [(name, kind_of(name)) for name in config.reward]
    return {kind.label(name): kind.open(name, opening) for name, kind in kinds if kind is not ModelReward}

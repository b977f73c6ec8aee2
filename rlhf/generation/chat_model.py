"""Chat models, opened by the name of an artefact, a folder or a hub name, and the reward that scores their answers."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StopStringCriteria

from rlhf.base.errors import UserError
from rlhf.base.json_files import read_object
from rlhf.base.text_files import HALF_PAIR
from rlhf.evaluation.answers import score_answers
from rlhf.evaluation.candidates import trained_on
from rlhf.generation.config import GenerationConfig
from rlhf.models.adapters import ADAPTER_FILE
from rlhf.models.base import context_length, load_base, load_merged
from rlhf.models.catalogue import resolve_model
from rlhf.models.compute import Compute
from rlhf.models.registered import causal_model
from rlhf.models.responses import Answer, Answers, sample_batch, single_answers
from rlhf.models.sampling import Sampled
from rlhf.models.tokenization import Message, encode_prompt, load_tokenizer, stop_token_ids
from rlhf.registry import MANIFEST, STAGES, Artifact, Registry, read_manifest
from rlhf.reward.sources import Opening, Source, kind_of

#: Longest answer by default, tokens.
DEFAULT_LENGTH = 256
_ARTIFACT = re.compile(rf"({'|'.join(STAGES)})/[^/]+")


class ChatModel:
    """A model with its tokenizer, ready to answer.

    Args:
        name: label of its answers: `ppo/demo@2`, a folder, or a hub name.
        stops: token ids that end an answer.
        artifact: None outside the registry.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: GenerationConfig,
        *,
        stops: Sequence[int],
        artifact: Artifact | None = None,
    ) -> None:
        self.name, self.model, self.tokenizer, self.artifact = name, model.eval(), tokenizer, artifact
        self.config, self.stops = config, list(stops)
        self.context = context_length(model)
        self.length = config.response_length or min(DEFAULT_LENGTH, self.context // 2)
        strings = config.stop_strings
        self.stop_strings = StopStringCriteria(tokenizer, strings) if strings else None

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a prompt.

        Raises:
            UserError: it is empty, not text, or leaves no room for the answer in the model's context.
        """
        if not messages or not messages[-1]["content"].strip():
            raise UserError("the prompt is empty")
        check_text(messages)
        ids = encode_prompt(self.tokenizer, messages)
        if len(ids) + self.length > self.context:
            raise UserError(
                f"the prompt has {len(ids)} tokens; with response_length={self.length} it does not fit into the context of "
                f"{self.context} tokens of {self.name}; shorten it or lower --response_length"
            )
        return ids

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seed: int,
        batch_slice: tuple[int, Sequence[int]] | None = None,
        on_tokens: Callable[[Tensor], None] | None = None,
    ) -> Sampled:
        """Sample one response to each prompt (token ids), all in one batch.

        Args:
            batch_slice: the number of answers that the seed draws random numbers for, and the numbers of these among
                them, so that an answer does not depend on the others in its batch; all of them if not given.
            on_tokens: called with the tokens of each step.
        """
        total, numbers = batch_slice or (len(prompts), range(len(prompts)))
        return sample_batch(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens=self.length,
            temperature=self.config.temperature,
            top_p=self.config.top_p,
            stop_token_ids=self.stops,
            generator=torch.Generator().manual_seed(seed),
            stop_strings=self.stop_strings,
            batch_slice=(total, torch.tensor(list(numbers))),
            on_tokens=on_tokens,
        )

    def answer(self, prompt: str | Sequence[Message], *, seed: int = 0) -> Answer:
        """Sample one answer to a question, or to a conversation; the system prompt of the options comes first.

        Raises:
            UserError: as `encode`.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if self.config.system and messages and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.config.system}, *messages]
        (answer,) = single_answers(self.tokenizer, self.draw([self.encode(messages)], seed=seed))
        return answer


def check_text(messages: Sequence[Message]) -> None:
    """Raise `UserError` for a conversation with characters that tokenizers refuse."""
    for message in messages:
        if bad := HALF_PAIR.search(message["content"]):
            raise UserError(
                f"the {message['role']} message is not text: character {bad.start() + 1} is a byte that is not UTF-8, or half of "
                "a surrogate pair"
            )


# Opening


def open_models(config: GenerationConfig, compute: Compute | None = None) -> list[ChatModel]:
    """Open all models of the options, on the device of the options if no other is given.

    Raises:
        UserError: a name that does not exist, a model that does not write text, or one without a chat template.
    """
    registry = Registry(config.registry)
    with redirect_stdout(sys.stderr):  # standard output is for answers, not for remarks on models
        return [open_model(name, config, registry, compute or Compute.choose(config)) for name in config.names]


def open_model(name: str, config: GenerationConfig, registry: Registry, compute: Compute) -> ChatModel:
    """Open a model by the name of an artefact (unless a folder has this name), a folder or a hub name.

    A folder in a registry is opened as its artefact: its adapter may sit on more than the base model that it names.
    """
    if (in_registry := _registered(Path(name))) is not None:
        name, root = in_registry
        registry, config = Registry(root), replace(config, registry=str(root))
    if in_registry is not None or (not Path(name).exists() and _ARTIFACT.fullmatch(name)):
        artifact = registry.get(name)
        if artifact.stage not in ("pretrain", "sft", "ppo"):
            raise UserError(f"{artifact.reference} writes no text; give pretrain/NAME, sft/NAME or ppo/NAME")
        tokenizer = load_tokenizer(str(artifact.path), chat_template=config.chat_template)
        model = causal_model(registry, artifact, config, compute)
        return ChatModel(
            artifact.reference, model, tokenizer, config, stops=stop_token_ids(tokenizer), artifact=artifact
        )
    tokenizer = load_tokenizer(
        resolve_model(name, config.registry),
        chat_template=config.chat_template,
        trust_remote_code=config.trust_remote_code,
    )
    model = _outside_model(name, config, compute)
    own = getattr(
        model.generation_config, "eos_token_id", None
    )  # a chat model's answers often end in another token than its texts
    others = own if isinstance(own, list) else [] if own is None else [own]
    stops = dict.fromkeys([*stop_token_ids(tokenizer), *others])
    stops.pop(int(tokenizer.pad_token_id), None)
    return ChatModel(name, model, tokenizer, config, stops=list(stops))


def _registered(folder: Path) -> tuple[str, Path] | None:
    """Return the artefact's name of a folder in a registry, and the registry's root; None for any other folder.

    Raises:
        UserError: a copy of an adapter that needs other artefacts of its registry.
    """
    if not (folder / MANIFEST).is_file() or not (folder / ADAPTER_FILE).is_file():
        return None
    manifest, place = read_manifest(folder), folder.resolve()
    reference = f"{manifest.stage}/{manifest.name}@{manifest.version}"
    if place.parts[-3:] == (manifest.stage, manifest.name, f"v{manifest.version}"):
        return reference, place.parents[2]
    if manifest.stage == "ppo":
        raise UserError(
            f"{folder} is a copy of {reference}, whose adapter sits on its SFT policy and not on the base model; open it in its "
            f"registry (--registry FOLDER --model {reference}), or export it with --form merged"
        )
    return None


def _outside_model(name: str, config: GenerationConfig, compute: Compute) -> PreTrainedModel:
    """Load a model from outside the registry: a whole one, or a folder with an adapter for one."""
    folder = Path(name)
    if not (folder / ADAPTER_FILE).is_file():
        return load_base(name, config, compute, trust_remote_code=config.trust_remote_code)
    try:
        settings = read_object(folder / "adapter_config.json")
        base = str(settings["base_model_name_or_path"])
    except (OSError, UserError, KeyError) as error:
        raise UserError(f"{folder} holds an adapter, but adapter_config.json does not name its model") from error
    return load_merged(base, [folder], config, compute, trust_remote_code=config.trust_remote_code)


# Scores


def open_reward(
    config: GenerationConfig, models: Sequence[ChatModel], compute: Compute, *, batch_size: int = 1
) -> Source | None:
    """Open `--reward`, or in a comparison the reward of the first PPO policy; return None without either."""
    policies = (m.artifact for m in models if m.artifact is not None and m.artifact.stage == "ppo")
    name = config.reward
    if name is None and config.compare and (policy := next(policies, None)) is not None:
        name, config = trained_on(policy), replace(config, registry=str(policy.path.parents[2]))
    if name is None:
        return None
    opening = Opening(config=config, compute=compute, batch_size=batch_size, timeout=config.reward_timeout)
    with redirect_stdout(sys.stderr):
        return kind_of(name).open(name, opening)


def scores(
    source: Source, rows: Sequence[Mapping[str, Any]], prompts: Sequence[Sequence[int]], answers: Answers
) -> list[float]:
    """Return the score of each answer.

    Args:
        rows, prompts: for each answer the data row of its prompt (`prompt`: messages), and the prompt's token ids.
    """
    size, cpu = len(answers.texts), torch.device("cpu")
    return score_answers(source, answers, prompts, rows, pad_token_id=0, batch_size=size, device=cpu).tolist()

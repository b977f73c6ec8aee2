"""A model that answers: opened by the name of an artefact, a folder or a hub name, and sampled as everywhere else."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StopStringCriteria, TextStreamer

from rlhf.base.errors import UserError
from rlhf.base.json_files import read_object
from rlhf.evaluation.answers import Answers, score_answers
from rlhf.evaluation.candidates import trained_on
from rlhf.generation.config import SpeakConfig
from rlhf.models.adapters import ADAPTER_FILE
from rlhf.models.base import context_length, load_base, load_merged
from rlhf.models.catalogue import resolve_model
from rlhf.models.compute import Compute
from rlhf.models.registered import causal_model
from rlhf.models.sampling import sample
from rlhf.models.sequences import pad
from rlhf.models.tokenization import Message, decode_response, encode_prompt, load_tokenizer, stop_token_ids
from rlhf.registry import MANIFEST, STAGES, Artifact, Registry, read_manifest
from rlhf.reward.sources import Source, open_source

#: Longest answer where nobody says how long, tokens.
DEFAULT_LENGTH = 256
#: Half of a surrogate pair: what Python makes of a byte that is not UTF-8, and JSON may spell out.
_HALF_PAIR = re.compile(r"[\ud800-\udfff]")
_ARTIFACT = re.compile(rf"({'|'.join(STAGES)})/[^/]+")


@dataclass(frozen=True)
class Answer:
    """What was said."""

    text: str
    """Without special tokens."""
    tokens: list[int]
    """The stop token included."""
    stopped: bool
    """It ended in a stop token or stop string, not at the length limit."""


class Speaker:
    """A model with its tokenizer, ready to answer.

    Args:
        name: how it is shown: `ppo/demo@2`, a folder, or a hub name.
        artifact: None outside the registry.
        stops: token ids that end an answer.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: SpeakConfig,
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
        """Token ids of a prompt.

        Raises:
            UserError: it is empty, is no text, or leaves no room for the answer in the model's context.
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

    def say(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seed: int,
        drawn: tuple[int, Sequence[int]] | None = None,
        heard: Callable[[Tensor], None] | None = None,
    ) -> list[Answer]:
        """One answer to each prompt, all in one batch.

        Args:
            prompts: token ids.
            drawn: how many answers the seed draws random numbers for, and the numbers of these among them: an answer
                does not depend on which others are in its batch.
            heard: is called with the tokens of each step.
        """
        device, pad_id = self.model.device, int(self.tokenizer.pad_token_id)
        total, numbers = drawn or (len(prompts), range(len(prompts)))
        ids, mask = pad(prompts, pad_id, side="left")
        sampled = sample(
            self.model,
            ids.to(device),
            mask.to(device),
            max_new_tokens=self.length,
            temperature=self.config.temperature,
            top_p=self.config.top_p,
            stop_token_ids=self.stops,
            pad_token_id=pad_id,
            generator=torch.Generator().manual_seed(seed),
            stop_strings=self.stop_strings,
            batch_slice=(total, torch.tensor(list(numbers))),
            on_tokens=heard,
        )
        rows = [row[real].tolist() for row, real in zip(sampled.responses, sampled.mask, strict=True)]
        ends = sampled.stopped.tolist()
        return [Answer(decode_response(self.tokenizer, row), row, end) for row, end in zip(rows, ends, strict=True)]


class Stream(TextStreamer):
    """Shows a text while its tokens come, whole words at a time, and keeps the tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.show, self.tokens = show, list[int]()

    def put(self, value: Tensor) -> None:
        """Takes the tokens of one step, (1,), or (0,) once the answer has ended."""
        self.tokens += value.tolist()
        super().put(value.cpu())

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Shows what cannot change any more."""
        if text:
            self.show(text)


def read_input(read: Callable[[], str]) -> str:
    """What `read` gets from standard input. Raises `UserError` for bytes that are no text."""
    try:
        return read()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not {error.encoding.upper()} (byte {error.start + 1})") from error


def check_text(messages: Sequence[Message]) -> None:
    """Raises `UserError` for a conversation that no tokenizer takes."""
    for message in messages:
        if bad := _HALF_PAIR.search(message["content"]):
            raise UserError(
                f"the {message['role']} message is no text: character {bad.start() + 1} is a byte that is not UTF-8, or half of "
                "a surrogate pair"
            )


# Opening


def open_speakers(config: SpeakConfig, compute: Compute) -> list[Speaker]:
    """All who answer.

    Raises:
        UserError: a name that is nothing, or no model that writes text; no chat template.
    """
    registry = Registry(config.registry)
    with redirect_stdout(sys.stderr):  # what is remarked on a model is no answer
        return [open_speaker(name, config, registry, compute) for name in config.names]


def open_speaker(name: str, config: SpeakConfig, registry: Registry, compute: Compute) -> Speaker:
    """A model by the name of an artefact (if it looks like one and is no folder), a folder or a hub name.

    The folder of an artefact is that artefact: its adapter may sit on more than the base model that it names.
    """
    if (found := _registered(Path(name))) is not None:
        name, root = found
        registry, config = Registry(root), replace(config, registry=str(root))
    if found is not None or (not Path(name).exists() and _ARTIFACT.fullmatch(name)):
        artifact = registry.get(name)
        if artifact.stage not in ("pretrain", "sft", "ppo"):
            raise UserError(f"{artifact.reference} writes no text; give pretrain/NAME, sft/NAME or ppo/NAME")
        tokenizer = load_tokenizer(str(artifact.path), chat_template=config.chat_template)
        model = causal_model(registry, artifact, config, compute)
        return Speaker(artifact.reference, model, tokenizer, config, stops=stop_token_ids(tokenizer), artifact=artifact)
    tokenizer = load_tokenizer(
        resolve_model(name, config.registry),
        chat_template=config.chat_template,
        trust_remote_code=config.trust_remote_code,
    )
    model = _outside_model(name, config, compute)
    own = getattr(model.generation_config, "eos_token_id", None)  # chat models often end in another token than texts
    others = own if isinstance(own, list) else [] if own is None else [own]
    stops = dict.fromkeys([*stop_token_ids(tokenizer), *others])
    stops.pop(int(tokenizer.pad_token_id), None)
    return Speaker(name, model, tokenizer, config, stops=list(stops))


def _registered(folder: Path) -> tuple[str, Path] | None:
    """What the registry calls a folder that lies in one, and the registry's root; None for any other folder.

    Raises:
        UserError: a copy of an adapter that needs others of its registry below it.
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


def _outside_model(name: str, config: SpeakConfig, compute: Compute) -> PreTrainedModel:
    """A model that is not in the registry: a whole one, or a folder with an adapter for one."""
    folder = Path(name)
    if not (folder / ADAPTER_FILE).is_file():
        return load_base(name, config, compute, trust_remote_code=config.trust_remote_code)
    try:
        settings = read_object(folder / "adapter_config.json")
        base = str(settings["base_model_name_or_path"])
    except (OSError, UserError, KeyError) as error:
        raise UserError(f"{folder} holds an adapter, but adapter_config.json does not say for which model") from error
    return load_merged(base, [folder], config, compute, trust_remote_code=config.trust_remote_code)


# Scores


def open_reward(
    config: SpeakConfig, speakers: Sequence[Speaker], compute: Compute, *, batch_size: int = 1
) -> Source | None:
    """What scores the answers: `--reward`, or in a comparison what the first PPO policy was trained on; else nothing."""
    trained = (s.artifact for s in speakers if s.artifact is not None and s.artifact.stage == "ppo")
    reference = config.reward
    if reference is None and config.compare and (policy := next(trained, None)) is not None:
        reference, config = trained_on(policy), replace(config, registry=str(policy.path.parents[2]))
    if reference is None:
        return None
    registry = Registry(config.registry)
    with redirect_stdout(sys.stderr):
        return open_source(reference, registry, config, compute, batch_size=batch_size, timeout=config.reward_timeout)


def scores(
    source: Source, rows: Sequence[Mapping[str, Any]], prompts: Sequence[Sequence[int]], said: Sequence[Answer]
) -> list[float]:
    """The score of each answer.

    Args:
        rows, prompts: for each answer the row of data that it answers (`prompt`: messages), and its token ids.
    """
    answers = Answers(
        samples=1,
        texts=[one.text for one in said],
        tokens=[one.tokens for one in said],
        stopped=[one.stopped for one in said],
        sums={},
    )
    found = score_answers(
        source, answers, prompts, rows, pad_token_id=0, batch_size=len(said), device=torch.device("cpu")
    )
    return [float(score) for score in found]

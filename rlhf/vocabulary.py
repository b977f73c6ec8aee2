"""Vocabulary extension: new tokens for what a tokenizer spends many on, and embeddings that start from their old pieces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import UserError

#: Uses in the training text that a learned token needs at least: an embedding of fewer is noise.
MIN_USES = 4
#: Longest learned token, characters.
LONGEST = 8


def learn_tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, count: int) -> list[str]:
    """The `count` character sequences that would save most tokens in texts whose script the tokenizer does not know.

    Candidates are those of a BPE over characters, within a script; of them the ones whose every character costs the tokenizer
    a token or more. (Words of a script that it knows are left alone: a new token would cut them off their leading space.)
    They are ranked by uses times tokens saved a use.

    Raises:
        UserError: there are fewer.
    """
    learner: Any = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), pre_tokenizers.UnicodeScripts()]
    )
    alphabet = len({character for text in texts for character in text})
    learner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=alphabet + 4 * count, min_frequency=MIN_USES, max_token_length=LONGEST, show_progress=False
        ),
    )
    uses = Counter(token for found in learner.encode_batch(list(texts)) for token in found.tokens)
    common = sorted(token for token, n in uses.items() if n >= MIN_USES)
    pieces = tokenizer(common, add_special_tokens=False)["input_ids"] if common else []
    gains = {
        token: uses[token] * (len(old) - 1)
        for token, old in zip(common, pieces, strict=True)
        if len(old) > 1 and len(old) >= len(token)
    }
    if len(gains) < count:
        raise UserError(
            f"the training text supports {len(gains)} new tokens, not learn_tokens={count}: so many character sequences occur "
            f"{MIN_USES} times and cost the tokenizer a token or more for each character; lower it"
        )
    return sorted(gains, key=lambda token: (-gains[token], token))[:count]


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> dict[int, list[int]]:
    """Adds tokens to a tokenizer.

    Returns:
        New token id -> the ids that the text had before.

    Raises:
        UserError: a token is in the vocabulary already, or does not decode to itself.
    """
    pieces = tokenizer(list(tokens), add_special_tokens=False)["input_ids"]
    known = [token for token, old in zip(tokens, pieces, strict=True) if len(old) < 2]
    if known:
        raise UserError(f"'{known[0]}' is one token of the vocabulary already; leave it out of the new tokens")
    first = len(tokenizer)
    tokenizer.add_tokens(list(tokens))
    for number, token in enumerate(tokens):
        got = tokenizer(token, add_special_tokens=False)["input_ids"]
        if got != [first + number] or tokenizer.decode(got) != token:
            raise UserError(
                f"the tokenizer cannot write the new token '{token}': it reads {tokenizer.decode(got)!r}; leave it out "
                "(byte-level tokenizers mistake accented Latin letters in added tokens for bytes)"
            )
    return {first + number: old for number, old in enumerate(pieces)}


def grow_embeddings(model: PreTrainedModel, pieces: Mapping[int, Sequence[int]]) -> None:
    """Gives new tokens rows in the embeddings, input and output: the mean of the rows of their old pieces."""
    fit_embeddings(model, max(pieces) + 1)
    for weight in _embeddings(model):
        for token, old in pieces.items():
            weight[token] = weight[list(old)].float().mean(dim=0).to(weight.dtype)


def fit_embeddings(model: PreTrainedModel, rows: int) -> None:
    """Makes room for that many tokens; a model may have more rows than its tokenizer has tokens. New rows are the mean row."""
    before = len(_embeddings(model)[0])
    if rows > before:
        model.resize_token_embeddings(rows, mean_resizing=False)
        for weight in _embeddings(model):
            weight[before:] = weight[:before].float().mean(dim=0).to(weight.dtype)


def _embeddings(model: PreTrainedModel) -> list[Tensor]:
    """The weights of the input embedding and of the output layer; one where they are tied."""
    layers: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    return list({id(layer.weight): layer.weight.detach() for layer in layers if layer is not None}.values())

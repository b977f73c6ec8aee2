"""Vocabularies from text: new tokenizers, new tokens for existing ones, and embeddings for these.

New tokens spare a tokenizer many tokens in scripts that it does not know; their embeddings start from their old pieces.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf.base.errors import UserError
from rlhf.models.templates import template_text
from rlhf.models.tokenization import END_OF_TEXT

#: Least number of uses of a learned token in the training text: with fewer, its embedding is noise.
MIN_USES = 4
#: Longest learned token, characters.
LONGEST = 8
#: Letters that stand for other bytes than their own in the vocabularies of byte-level tokenizers.
_BYTES = frozenset(letter for letter in pre_tokenizers.ByteLevel.alphabet() if not letter.isascii())


def learn_tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, count: int) -> list[str]:
    """Return `count` new tokens for texts in a script that the tokenizer does not know.

    Characters of several tokens come first, those that save most tokens in front: one that keeps byte tokens, which the
    model then seldom sees, would be put together wrongly. Sequences of characters follow, in the order in which a BPE within
    each script merges them. They must cost a token or more for each character (new tokens in a script that the tokenizer
    knows would cut words off their leading space), and the text must use them where longer tokens are taken first.

    Raises:
        UserError: the texts support fewer.
    """
    uses = Counter(itertools.chain.from_iterable(texts))
    common = [character for character, n in uses.items() if n >= MIN_USES and _is_writable(character)]
    costs = _costs(common, tokenizer)
    alone = [character for character in common if costs[character] > 1]
    alone.sort(key=lambda character: (-uses[character] * (costs[character] - 1), character))
    merged = _merged(texts, len(uses) + 4 * count)
    costs = _costs(merged, tokenizer)
    learned = [*alone, *(token for token in merged if costs[token] >= len(token) and _is_writable(token))]
    while rare := _rare(learned[:count], texts):
        learned = [token for token in learned if token not in rare]
    if len(learned) < count:
        raise UserError(
            f"the training text supports {len(learned)} new tokens, not learn_tokens={count}: that is the number of characters "
            f"and sequences that occur {MIN_USES} times and cost the tokenizer a token or more a character; lower it"
        )
    return learned[:count]


def _is_writable(token: str) -> bool:
    """Return True if tokenizers write an added token as it is: byte-level ones mistake letters that stand for bytes."""
    return not any(character.isspace() or character in _BYTES for character in token)


def _rare(tokens: Sequence[str], texts: Sequence[str]) -> set[str]:
    """Return the sequences among the tokens that the texts use too seldom where longer tokens are taken first."""
    # It knows nothing but these tokens, and splits texts by them as any tokenizer does.
    reader: Any = Tokenizer(models.WordLevel({"": 0}, unk_token=""))
    reader.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    uses = Counter(token for encoded in reader.encode_batch(list(texts)) for token in encoded.tokens)
    return {token for token in tokens if len(token) > 1 and uses[token] < MIN_USES}


def _costs(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the number of tokens of each text."""
    pieces = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    return dict(zip(texts, map(len, pieces), strict=True))


def _merged(texts: Sequence[str], size: int) -> list[str]:
    """Return the sequences of characters in a BPE vocabulary of a size, in order of merging; none crosses scripts."""
    learner: Any = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), pre_tokenizers.UnicodeScripts()]
    )
    learner.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=size, min_frequency=MIN_USES, max_token_length=LONGEST, show_progress=False),
    )
    vocabulary: dict[str, int] = learner.get_vocab()
    return [token for token in sorted(vocabulary, key=vocabulary.__getitem__) if len(token) > 1]


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> dict[int, list[int]]:
    """Add tokens to a tokenizer.

    Returns:
        New token id -> the ids that its text had until now.

    Raises:
        UserError: a token is in the vocabulary already, or does not decode to itself.
    """
    pieces = tokenizer(list(tokens), add_special_tokens=False)["input_ids"]
    single = [token for token, old in zip(tokens, pieces, strict=True) if len(old) < 2]
    if single:
        raise UserError(f"'{single[0]}' is one token of the vocabulary already; leave it out of the new tokens")
    first = len(tokenizer)
    tokenizer.add_tokens(list(tokens))
    for number, token in enumerate(tokens):
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        if ids != [first + number] or tokenizer.decode(ids) != token:
            raise UserError(
                f"the tokenizer cannot write the new token '{token}': it reads {tokenizer.decode(ids)!r}; leave it out "
                "(byte-level tokenizers mistake accented Latin letters in added tokens for bytes)"
            )
    return {first + number: old for number, old in enumerate(pieces)}


def grow_embeddings(model: PreTrainedModel, pieces: Mapping[int, Sequence[int]]) -> None:
    """Add rows for new tokens to the embeddings, input and output: the mean of the rows of their old pieces."""
    fit_embeddings(model, max(pieces) + 1)
    for weight in _embeddings(model):
        for token, old in pieces.items():
            weight[token] = weight[list(old)].float().mean(dim=0).to(weight.dtype)


def fit_embeddings(model: PreTrainedModel, rows: int) -> None:
    """Grow the embeddings to at least this many rows; new ones are the mean row. They may outnumber the tokens."""
    size = len(_embeddings(model)[0])
    if rows > size:
        model.resize_token_embeddings(rows, mean_resizing=False)
        for weight in _embeddings(model):
            weight[size:] = weight[:size].float().mean(dim=0).to(weight.dtype)


def _embeddings(model: PreTrainedModel) -> list[Tensor]:
    """Return the weights of the input embedding and of the output layer: one tensor where they are tied."""
    layers: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    return list({id(layer.weight): layer.weight.detach() for layer in layers if layer is not None}.values())


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, chat_template: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (Radford et al. 2019) with a token that ends documents and one for padding.

    Args:
        vocab_size: number of tokens: two special ones, 256 bytes, and merges of pairs that occur at least twice.
        chat_template: as in `load_tokenizer`.

    Raises:
        UserError: the text has too few pairs to merge, or the vocabulary no room for the bytes.
    """
    special, alphabet = [END_OF_TEXT, "<|pad|>"], pre_tokenizers.ByteLevel.alphabet()
    smallest = len(special) + len(alphabet)
    if vocab_size < smallest:
        raise UserError(f"vocab_size must be at least {smallest} (256 bytes and special tokens), got {vocab_size}")
    raw: Any = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    if raw.get_vocab_size() < vocab_size:
        raise UserError(
            f"the text supports a tokenizer of {raw.get_vocab_size()} tokens only, not of vocab_size={vocab_size}; "
            "lower it, or give more text"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token=END_OF_TEXT,
        pad_token=special[1],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=template_text(chat_template),
    )

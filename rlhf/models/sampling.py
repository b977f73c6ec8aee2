"""Sampling responses from a causal model: nothing is inherited from its generation config.

By default tokens come from exactly the distribution that PPO scores: softmax(logits / T) over the whole vocabulary, no
top-k, no top-p, no penalties. A plain loop over the library's own cache draws them; a model whose cache or head does not
fit the loop is sampled through transformers' `generate`, with the same random numbers.

Legend: B responses, P padded prompt, R response, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.cache_utils import DynamicLayer

from rlhf.models.anatomy import anatomy, head, hidden_states, probe_ids, same_numbers
from rlhf.models.decoding import (
    cache_is_sound,
    cache_layers,
    last_logits,
    ordered_weights,
    parts,
    prefill,
    with_room,
)
from rlhf.models.drawing import DrawOptions, ResponseBuffer, Sampled
from rlhf.models.graphs import NotRecordable, decode, has_room, is_sound, records
from rlhf.run.memory import rollout_bytes, total_bytes

#: How responses are computed: `loop`, with a growing cache; `compiled`, with a static cache and recorded steps (CUDA
#: graphs on a GPU, torch.compile on a CPU); transformers' `generate`. `auto` is `compiled` on a GPU and `loop` elsewhere,
#: where these fit the model, and otherwise `generate`.
Sampler = Literal["auto", "loop", "compiled", "generate"]
#: Caches with which a model's logits are right: one with free columns, the library's own, or none.
_Cache = Literal["roomy", "growing", "none"]
#: Responses that evaluations sample together: their keys and values are in memory at once.
SAMPLED_AT_ONCE = 64
#: Most responses that an evaluation samples together, and the share of the memory that these may take.
_MOST_AT_ONCE, _SHARE_AT_ONCE = 256, 0.02
#: The batch is cut down to its unfinished rows once they are fewer than this share of it.
_COMPACT_BELOW = 0.75
#: Models for which the notice of `generate` was printed.
_NOTIFIED: WeakSet[PreTrainedModel] = WeakSet()
#: Results of `cache_is_sound` and of `_generates_rightly`.
_SOUND_CACHE: WeakKeyDictionary[PreTrainedModel, dict[bool, _Cache]] = WeakKeyDictionary()
_SOUND_STEP: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
_SOUND_GENERATE: WeakKeyDictionary[PreTrainedModel, dict[int, bool]] = WeakKeyDictionary()


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Tensor,
    prompt_mask: Tensor,
    *,
    max_new_tokens: int,
    temperature: float,
    stop_token_ids: list[int],
    pad_token_id: int,
    generator: torch.Generator | Sequence[torch.Generator],
    stop_strings: StopStringCriteria | None = None,
    batch_slice: tuple[int, Tensor] | None = None,
    sampler: Sampler = "auto",
    top_p: float = 1.0,
    on_tokens: Callable[[Tensor], None] | None = None,
) -> Sampled:
    """Sample one response to each left-padded prompt (B, P).

    Each step takes one uniform number for every row of the *whole* batch, finished or not, so a row's tokens do not
    depend on when its neighbours finish.

    Args:
        generator: of the random numbers; several are for `SAMPLED_AT_ONCE` rows each.
        temperature: divides the logits; 0 takes the likeliest token.
        stop_strings: the token that completes one is the response's last.
        batch_slice: size of the whole batch and the numbers of these rows in it, where they are a part of it.
        top_p: below 1, tokens come from the likeliest ones that together have this much of the probability.
        on_tokens: is called with each step's tokens of the unfinished rows.
    """
    total, numbers = batch_slice or (len(prompts), torch.arange(len(prompts)))
    generators = [generator] if isinstance(generator, torch.Generator) else generator
    steps = [_random_numbers(total, generators) for _ in range(max_new_tokens)]
    options = DrawOptions(
        temperature=temperature, top_p=top_p, stop_token_ids=tuple(stop_token_ids), pad_token_id=pad_token_id
    )
    uniform = torch.stack(steps).to(prompts.device)[:, numbers.to(prompts.device)]
    buffer = ResponseBuffer(uniform, options, stop_strings, on_tokens)
    best = sampler
    if sampler == "auto":
        best = _best_sampler(model, len(prompts), prompts.shape[1] + max_new_tokens)
    if best == "compiled":
        try:
            _static(model, prompts, prompt_mask, buffer)
            return buffer.finished()
        except NotRecordable as error:
            if sampler == "compiled":
                raise
            _SOUND_STEP[model] = False
            print(f"{type(model).__name__} is sampled without CUDA graphs: {error}", file=sys.stderr, flush=True)
    if best == "generate":
        _generate(model, prompts, prompt_mask, buffer)
    else:
        with ordered_weights(model):
            _loop(model, prompts, prompt_mask, buffer)
    return buffer.finished()


def _random_numbers(rows: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Return a number (rows, 1) from 0 to below 1 for each row."""
    each = rows if len(generators) == 1 else SAMPLED_AT_ONCE
    counts = [min(each, rows - first) for first in range(0, rows, each)]
    return torch.cat([torch.rand(n, 1, generator=g, device=g.device) for n, g in zip(counts, generators, strict=True)])


def sampled_together(model: PreTrainedModel, prompt: int, response: int) -> int:
    """Return how many responses an evaluation samples together: more take less time, as far as little memory holds them.

    Args:
        prompt, response: tokens of the longest.
    """
    need = partial(rollout_bytes, model, prompt=prompt, response=response, recorded=False)
    room, rows = _SHARE_AT_ONCE * total_bytes(model.device), _MOST_AT_ONCE
    while rows > SAMPLED_AT_ONCE and need(responses=rows) > room:
        rows //= 2
    return rows


def _prefilled(
    model: PreTrainedModel, prompts: Tensor, mask: Tensor, length: int
) -> tuple[DynamicCache, Tensor, Tensor]:
    """Return a cache that holds the prompts, its mask (B, columns), and the logits (B, V) of the first tokens."""
    cache = DynamicCache(config=model.config)
    share = _shares_prefix(model, cache, prompts.shape[1] + length)
    logits, attention = prefill(model, prompts, mask, cache, share=share)
    return cache, attention, logits


def _loop(model: PreTrainedModel, prompts: Tensor, prompt_mask: Tensor, buffer: ResponseBuffer) -> None:
    """Sample token by token over a growing cache; finished rows leave the batch."""
    cache, attention, logits = _prefilled(model, prompts, prompt_mask, buffer.length)
    if any(_sound_cache(model, share=share) == "roomy" for share in (True, False)):
        with_room(cache, buffer.length - 1)
    column, whole = attention.shape[1], parts(model)  # of the next token in the cache
    attention = nn.functional.pad(attention, (0, buffer.length))
    position = prompt_mask.sum(dim=1, keepdim=True)  # of the next token, per row
    rows = torch.arange(len(prompts), device=prompts.device)  # those that are still in the model's batch
    for t in range(buffer.length):
        tokens = buffer.draw(t, logits, rows)
        if t + 1 == buffer.length:
            break
        if (t + 1) % buffer.look_every == 0:
            keep = _rows_to_keep(buffer.stopped[rows])
            if len(keep) == 0:
                break
            if len(keep) < len(rows):
                rows, tokens, attention, position = rows[keep], tokens[keep], attention[keep], position[keep]
                cache.reorder_cache(cast(Any, keep))
        attention[:, column] = 1
        column += 1
        logits = last_logits(whole, tokens[:, None], attention[:, :column], position, cache)
        position = position + 1


def _rows_to_keep(stopped: Tensor) -> Tensor:
    """Return the numbers of the rows that stay in the batch: its live ones where many have finished, otherwise all."""
    size, live = len(stopped), int((~stopped).sum())
    count = 0 if live == 0 else size if live >= _COMPACT_BELOW * size else live
    return torch.argsort(stopped.int(), stable=True)[:count].sort().values


def _static(model: PreTrainedModel, prompts: Tensor, prompt_mask: Tensor, buffer: ResponseBuffer) -> None:
    """Sample token by token over a cache of fixed size, by recorded or compiled steps."""
    cache, attention, logits = _prefilled(model, prompts, prompt_mask, buffer.length)
    decode(model, cache, attention, prompt_mask.sum(dim=1, keepdim=True), logits, buffer)


def _best_sampler(model: PreTrainedModel, rows: int, tokens: int) -> Sampler:
    """Return `loop` if it fits the model, on a GPU `compiled`; otherwise print a notice, once a model, and return `generate`."""
    if fits_loop(model):
        recorded = records(model.device) and fits_loop(model, compiled=True, tokens=tokens)
        return "compiled" if recorded and has_room(model, rows, tokens) else "loop"
    if model not in _NOTIFIED:
        _NOTIFIED.add(model)
        print(
            f"{type(model).__name__} keeps more than keys and values of its tokens: it is sampled through transformers' "
            "generate, which is slower",
            file=sys.stderr,  # standard output is for answers
            flush=True,
        )
    return "generate"


def fits_loop(model: PreTrainedModel, *, compiled: bool = False, tokens: int | None = None) -> bool:
    """Return True if the loop can sample from the model.

    It needs a cache of plain keys and values, one entry a token, with which logits are those of a plain pass. Over a cache
    of fixed size (`compiled`), rows of `tokens` tokens must not reach beyond a sliding window.
    """
    if model._is_stateful:
        return False
    layers = DynamicCache(config=model.config).layers
    if not all(isinstance(layer, DynamicLayer) for layer in layers):
        return False
    windows = [layer.sliding_window for layer in cast(Any, layers) if layer.is_sliding]
    if all(_sound_cache(model, share=share) == "none" for share in (True, False)):
        return False
    return not compiled or (all((tokens or 1 << 62) <= window for window in windows) and _sound_step(model))


def _sound_step(model: PreTrainedModel) -> bool:
    if not records(model.device) and not anatomy(model).plain_head:
        return False  # torch.compile cannot follow a head that is more than a product
    if model not in _SOUND_STEP:
        _SOUND_STEP[model] = is_sound(model)
    return _SOUND_STEP[model]


def _sound_cache(model: PreTrainedModel, *, share: bool) -> _Cache:
    verdicts = _SOUND_CACHE.setdefault(model, {})
    if share not in verdicts:
        kinds: tuple[_Cache, ...] = ("roomy", "growing") if anatomy(model).reads_padding else ()
        sound = (kind for kind in kinds if cache_is_sound(model, share=share, room=kind == "roomy"))
        verdicts[share] = next(sound, "none")
    return verdicts[share]


def _shares_prefix(model: PreTrainedModel, cache: DynamicCache, width: int) -> bool:
    """Return True if a shared prefix may be computed once: windows, too, are counted in columns of the cache."""
    windows = [layer.sliding_window for layer in cache_layers(cache) if layer.is_sliding]
    return _sound_cache(model, share=True) != "none" and all(width <= window for window in windows)


def _generate(model: PreTrainedModel, prompts: Tensor, prompt_mask: Tensor, buffer: ResponseBuffer) -> None:
    """Sample through transformers' `generate`, or without a cache where that is wrong for the model; both are slower.

    Only prompts of one length are sampled together where padding would change something.
    """
    own, lengths = model.generation_config, prompt_mask.sum(dim=1)
    # Whatever a call leaves open comes from the model's own generation config, which may cut or bend the distribution.
    model.generation_config = GenerationConfig()
    try:
        if not _generates_rightly(model, padding=0):
            return _pass_by_pass(model, prompts, prompt_mask, buffer)
        together = _generates_rightly(model, padding=2)
        for length in [None] if together else lengths.unique().tolist():
            rows = (
                torch.arange(len(prompts), device=prompts.device)
                if length is None
                else (lengths == length).nonzero()[:, 0]
            )
            ids = prompts[rows, prompts.shape[1] - length :] if length else prompts
            cast(Any, model).generate(
                inputs=ids,
                attention_mask=torch.ones_like(ids) if length else prompt_mask.long(),
                generation_config=GenerationConfig(
                    max_new_tokens=buffer.length, do_sample=False, pad_token_id=buffer.options.pad_token_id
                ),
                logits_processor=LogitsProcessorList([_BufferTokens(buffer, rows, ids.shape[1])]),
                stopping_criteria=StoppingCriteriaList([_AllStopped(buffer, rows)]),
            )
    finally:
        model.generation_config = own


def _generates_rightly(model: PreTrainedModel, *, padding: int) -> bool:
    """Return True if `generate`'s logits are those of a plain pass, for two rows, one with padding on the left.

    Some caches hold the state of one row only, and some models count positions otherwise than `generate` does.
    """
    known = _SOUND_GENERATE.setdefault(model, {})
    if padding not in known:
        ids = probe_ids(model, 2, 5)
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        settings = GenerationConfig(
            max_new_tokens=3, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
        )
        try:
            output = cast(Any, model).generate(inputs=ids, attention_mask=mask, generation_config=settings)
            whole = nn.functional.pad(mask, (0, 2), value=1)
            expected = head(model)(hidden_states(model, output.sequences[:, :-1], whole)[:, -3:])
            known[padding] = same_numbers(model, torch.stack(output.logits, dim=1), expected)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
            known[padding] = False
    return known[padding]


def _pass_by_pass(model: PreTrainedModel, prompts: Tensor, prompt_mask: Tensor, buffer: ResponseBuffer) -> None:
    """Sample with a plain pass over the whole rows for each token, as they are scored: right for any model, and slowest."""
    ids, mask, rows = prompts, prompt_mask.long(), torch.arange(len(prompts), device=prompts.device)
    for t in range(buffer.length):
        tokens = buffer.draw(t, head(model)(hidden_states(model, ids, mask)[:, -1]), rows)
        if bool(buffer.stopped.all()):
            break
        ids, mask = torch.cat([ids, tokens[:, None]], dim=1), nn.functional.pad(mask, (0, 1), value=1)


class _BufferTokens(LogitsProcessor):
    """Leaves `generate`'s greedy search one token to choose: the one that the buffer draws."""

    def __init__(self, buffer: ResponseBuffer, rows: Tensor, prompt_length: int) -> None:
        self.buffer, self.rows, self.prompt_length = buffer, rows, prompt_length

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        tokens = self.buffer.draw(input_ids.shape[1] - self.prompt_length, scores, self.rows)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


class _AllStopped(StoppingCriteria):
    """Ends `generate` once all responses have ended."""

    def __init__(self, buffer: ResponseBuffer, rows: Tensor) -> None:
        self.buffer, self.rows = buffer, rows

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return self.buffer.stopped[self.rows]

"""Sampling responses from a causal model: nothing is inherited from its generation config.

By default tokens come from exactly the distribution that PPO scores: softmax(logits / T) over the whole vocabulary, no
top-k, no top-p, no penalties. A plain loop over the library's own cache draws them; a model whose cache or head does not
fit the loop is sampled through transformers' `generate`, with the same random numbers.

Legend: B responses, P padded prompt, R response, V vocabulary.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
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
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer

from rlhf.models.anatomy import anatomy, head, hidden_states, probe_ids, same_numbers
from rlhf.models.decoding import (
    cache_is_sound,
    cache_layers,
    compiled_step,
    last_logits,
    ordered_weights,
    parts,
    prefill,
    static_cache,
)

#: How responses are computed: `loop`, with a growing cache; `compiled`, with a static cache and torch.compile (CUDA
#: graphs on a GPU); transformers' `generate`; `auto` is `loop`, or `generate` where the loop does not fit the model.
Sampler = Literal["auto", "loop", "compiled", "generate"]
#: Responses that evaluations sample together: their keys and values are in memory at once.
SAMPLED_AT_ONCE = 64
#: The batch is cut down to its unfinished rows once they are fewer than this share of it.
_COMPACT_BELOW = 0.75
#: Steps between checks for finished rows: a check makes the host wait for a GPU.
_CHECK_EVERY = {"cpu": 1, "cuda": 8}
#: A compiled batch is halved down to this part of it, and no further: a GPU takes as long for few rows as for fewer, and
#: each size has to be compiled.
_SMALLEST_SHARE = 8
#: Models for which the notice of `generate` was printed.
_NOTIFIED: WeakSet[PreTrainedModel] = WeakSet()
#: Results of `cache_is_sound` and of `_generates_rightly`.
_SOUND_CACHE: WeakKeyDictionary[PreTrainedModel, dict[bool, bool]] = WeakKeyDictionary()
_SOUND_GENERATE: WeakKeyDictionary[PreTrainedModel, dict[int, bool]] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Responses to a batch of prompts."""

    responses: Tensor
    """(B, R) int64: sampled tokens, the stop token included, then padding."""
    mask: Tensor
    """(B, R) bool: True at sampled tokens; always a prefix of at least one token."""
    logprobs: Tensor
    """(B, R) fp32: log-probability of each token under the model that sampled it, nats; 0 where masked."""
    stopped: Tensor
    """(B,) bool: True where the response ended in a stop token within the length limit."""


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
    generator: torch.Generator,
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
        temperature: divides the logits; 0 takes the likeliest token.
        stop_strings: the token that completes one is the response's last.
        batch_slice: size of the whole batch and the numbers of these rows in it, where they are a part of it.
        top_p: below 1, tokens come from the likeliest ones that together have this much of the probability.
        on_tokens: is called with each step's tokens of the unfinished rows.
    """
    total, numbers = batch_slice or (len(prompts), torch.arange(len(prompts)))
    steps = [torch.rand(total, 1, generator=generator, device=generator.device) for _ in range(max_new_tokens)]
    buffer = ResponseBuffer(
        torch.stack(steps).to(prompts.device)[:, numbers.to(prompts.device)],
        functools.partial(draw_tokens, temperature=temperature, top_p=top_p),
        torch.tensor(stop_token_ids, device=prompts.device),
        pad_token_id,
        stop_strings,
        on_tokens,
    )
    if sampler == "auto":
        sampler = _best_sampler(model)
    if sampler == "generate":
        _generate(model, prompts, prompt_mask, buffer)
    elif sampler == "compiled":
        _loop(model, prompts, prompt_mask, buffer, compiled=True)
    else:
        with ordered_weights(model):
            _loop(model, prompts, prompt_mask, buffer, compiled=False)
    return buffer.finished()


class ResponseBuffer:
    """Unfinished responses (B, R): draws their tokens and records where they end."""

    def __init__(
        self,
        uniform: Tensor,
        choose: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        stops: Tensor,
        pad_token_id: int,
        stop_strings: StopStringCriteria | None,
        on_tokens: Callable[[Tensor], None] | None,
    ) -> None:
        """`uniform` (R, B, 1) holds each token's random number, by which `choose` picks it from the logits."""
        length, size = uniform.shape[:2]
        self.uniform, self.choose, self.stops, self.stop_strings = uniform, choose, stops, stop_strings
        self.on_tokens, self.pad_token_id, self.length = on_tokens, pad_token_id, length
        device = uniform.device
        self.responses = torch.full((size, length), pad_token_id, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(size, length, dtype=torch.float32, device=device)
        self.mask = torch.zeros(size, length, dtype=torch.bool, device=device)
        self.stopped = torch.zeros(size, dtype=torch.bool, device=device)

    def draw(self, t: int, logits: Tensor, rows: Tensor) -> Tensor:
        """Draw token t of some rows from their logits (rows, V); tokens of finished rows are not stored."""
        tokens, token_logprobs = self.choose(logits, self.uniform[t, rows])
        live = ~self.stopped[rows]
        if self.on_tokens is not None:
            self.on_tokens(tokens[live])
        self.responses[rows, t] = torch.where(live, tokens, self.pad_token_id)
        self.logprobs[rows, t] = torch.where(live, token_logprobs, 0.0)
        self.mask[rows, t] = live
        ended = torch.isin(tokens, self.stops)
        if self.stop_strings is not None:
            ended |= self.stop_strings(self.responses[rows, : t + 1], cast(Any, None))
        self.stopped[rows] |= live & ended
        return tokens

    def finished(self) -> Sampled:
        """Return the responses, cut to the longest."""
        width = int(self.mask.sum(dim=1).max())
        return Sampled(
            responses=self.responses[:, :width],
            mask=self.mask[:, :width],
            logprobs=self.logprobs[:, :width],
            stopped=self.stopped,
        )


def draw_tokens(logits: Tensor, uniform: Tensor, temperature: float, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return one token a row of (B, V) logits by inverse CDF, and its log-probability in fp32.

    `torch.multinomial` draws a random number for every entry of the vocabulary, on one thread; this takes one a row.
    """
    if temperature == 0:  # the limit: all of the probability is on one token
        return logits.argmax(dim=-1), logits.new_zeros(len(logits), dtype=torch.float32)
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    if top_p < 1:
        warp: Any = TopPLogitsWarper(top_p)
        logits = warp(None, logits)
    probabilities = torch.softmax(logits, dim=-1)
    cdf = probabilities.cumsum(dim=-1)
    # right=True: the first index whose cdf exceeds u, so a token of probability 0 is never drawn, not even at u = 0.
    tokens = torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True).clamp_max(logits.shape[-1] - 1)
    return tokens.squeeze(1), probabilities.gather(1, tokens).log().squeeze(1)


def _loop(
    model: PreTrainedModel, prompts: Tensor, prompt_mask: Tensor, buffer: ResponseBuffer, *, compiled: bool
) -> None:
    """Sample token by token over the model's cache; finished rows leave the batch."""
    device, check_every = prompts.device, _CHECK_EVERY.get(prompts.device.type, 8)
    cache: Any = DynamicCache(config=model.config)
    share = _shares_prefix(model, cache, prompts.shape[1] + buffer.length)
    # Not compiled: each batch has a width of its own.
    logits, attention = prefill(model, prompts, prompt_mask, cache, share=share)
    column = attention.shape[1]  # of the next token in the cache
    whole, step = parts(model), cast(Callable[..., Tensor], last_logits)
    width, static, smallest = column + buffer.length, None, None
    if compiled:
        step, smallest = compiled_step(), max(len(prompts) // _SMALLEST_SHARE, 1)
        static = static_cache(model, cache, width)
        width, cache = static.width, static.filled(cache)
    attention = nn.functional.pad(attention, (0, width - column))
    position = prompt_mask.sum(dim=1, keepdim=True)  # of the next token, per row
    rows = torch.arange(len(prompts), device=device)  # those that are still in the model's batch
    for t in range(buffer.length):
        tokens = buffer.draw(t, logits, rows)
        if t + 1 == buffer.length:
            break
        if (t + 1) % check_every == 0:
            keep = _rows_to_keep(buffer.stopped[rows], smallest)
            if len(keep) == 0:
                break
            if len(keep) < len(rows):
                rows, tokens, attention, position = rows[keep], tokens[keep], attention[keep], position[keep]
                if static:
                    cache = static.select(cache, keep)
                else:
                    cache.reorder_cache(keep)
        attention[:, column] = 1
        column += 1
        seen = attention if compiled else attention[:, :column]
        logits = step(whole, tokens[:, None], seen, position, cache)
        position = position + 1


def _rows_to_keep(stopped: Tensor, smallest: int | None) -> Tensor:
    """Return the numbers of the rows that stay in the batch, in order; none once all have stopped.

    A batch is cut to its live rows where many have finished. A compiled batch, which has a `smallest` size, is only
    ever halved and never below that, because each size is compiled anew.
    """
    size, live = len(stopped), int((~stopped).sum())
    if live == 0:
        count = 0
    elif smallest is not None:
        count = size if live > size // 2 or size // 2 < smallest else size // 2
    else:
        count = size if live >= _COMPACT_BELOW * size else live
    return torch.argsort(stopped.int(), stable=True)[:count].sort().values


def _best_sampler(model: PreTrainedModel) -> Literal["loop", "generate"]:
    """Return `loop` if it fits the model; otherwise print a notice, once a model, and return `generate`."""
    if fits_loop(model):
        return "loop"
    if model not in _NOTIFIED:
        _NOTIFIED.add(model)
        print(
            f"{type(model).__name__} keeps more than keys and values of its tokens: it is sampled through transformers' "
            "generate, which is slower",
            file=sys.stderr,  # standard output is for answers
            flush=True,
        )
    return "generate"


def fits_loop(model: PreTrainedModel, *, compiled: bool = False) -> bool:
    """Return True if the loop can sample from the model.

    It needs a cache of plain keys and values, one entry a token, with which logits are those of a plain pass. Compiled, the
    head has to be a plain product, and keys and values have to keep their places: no sliding window.
    """
    if model._is_stateful or (compiled and not anatomy(model).plain_head):
        return False
    layers = DynamicCache(config=model.config).layers
    plain = all(isinstance(layer, DynamicLayer) and not (compiled and layer.is_sliding) for layer in layers)
    return plain and (_sound_cache(model, share=True) or _sound_cache(model, share=False))


def _sound_cache(model: PreTrainedModel, *, share: bool) -> bool:
    verdicts = _SOUND_CACHE.setdefault(model, {})
    if share not in verdicts:
        verdicts[share] = anatomy(model).reads_padding and cache_is_sound(model, share=share)
    return verdicts[share]


def _shares_prefix(model: PreTrainedModel, cache: DynamicCache, width: int) -> bool:
    """Return True if a shared prefix may be computed once: windows, too, are counted in columns of the cache."""
    windows = [layer.sliding_window for layer in cache_layers(cache) if layer.is_sliding]
    return _sound_cache(model, share=True) and all(width <= window for window in windows)


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
                    max_new_tokens=buffer.length, do_sample=False, pad_token_id=buffer.pad_token_id
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

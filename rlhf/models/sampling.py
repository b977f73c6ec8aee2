"""Sampling responses from a causal model: nothing is inherited from its generation config.

A plain loop over the library's own cache. Unless told otherwise it samples from exactly the distribution that PPO scores:
softmax(logits / T) over the whole vocabulary, no top-k, no top-p, no penalties. A model whose cache or head does not fit the
loop is sampled through transformers' `generate`, with the same random numbers.

Legend: B responses, P padded prompt, R response, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer

from rlhf.models.heads import has_plain_head
from rlhf.models.packing import common_prefix

#: How responses are computed: `loop`, with a growing cache; `compiled`, the same with a fixed cache and torch.compile (CUDA
#: graphs on a GPU); `generate` of transformers; `auto` is `loop`, or `generate` where that does not fit the model.
Sampler = Literal["auto", "loop", "compiled", "generate"]
#: The batch is cut down to its unfinished rows once fewer than this share of it is still being written.
_COMPACT_BELOW = 0.75
#: Steps between looks at which rows are finished: a look makes the host wait for a GPU.
_LOOK_EVERY = {"cpu": 1, "cuda": 8}
#: Responses that evaluations sample together: their keys and values are in memory at once.
SAMPLED_AT_ONCE = 64
#: A compiled batch is halved down to this part of it, and no further: a GPU takes as long for few rows as for fewer, and each
#: size has to be compiled.
_SMALLEST_SHARE = 8
#: The width of a fixed cache is a multiple of so many tokens.
_FIXED_STEP = 64
#: Bytes of weights that are held a second time, in the order of a CPU's products.
_ORDERED_AT_MOST = 2_000_000_000
#: Models of which it was said that `generate` samples from them.
_SAID: WeakSet[PreTrainedModel] = WeakSet()
#: The keys and values of each model that is sampled compiled.
_FIXED: WeakKeyDictionary[PreTrainedModel, _Fixed] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Responses of a batch of prompts."""

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
    drawn: tuple[int, Tensor] | None = None,
    sampler: Sampler = "auto",
    top_p: float = 1.0,
    heard: Callable[[Tensor], None] | None = None,
) -> Sampled:
    """Samples one response for each left-padded prompt (B, P). The token that completes a stop string is its last.

    A temperature of 0 takes the likeliest token. Below 1, `top_p` leaves each token's choice to the likeliest ones that together
    have this much of the probability. `heard` is called with each step's tokens of the rows that are still written.

    Each step takes one uniform number for every row of the *whole* batch, finished or not, so a row's tokens do not depend on
    when its neighbours finish. Where the rows are a part of a larger batch, `drawn` is its size and their numbers in it.
    """
    total, numbers = drawn or (len(prompts), torch.arange(len(prompts)))
    steps = [torch.rand(total, 1, generator=generator, device=generator.device) for _ in range(max_new_tokens)]
    draft = _Draft(
        torch.stack(steps).to(prompts.device)[:, numbers.to(prompts.device)],
        functools.partial(_draw, temperature=temperature, top_p=top_p),
        torch.tensor(stop_token_ids, device=prompts.device),
        pad_token_id,
        stop_strings,
        heard,
    )
    if sampler == "auto":
        sampler = _best(model)
    if sampler == "generate":
        _generate(model, prompts, prompt_mask, draft)
    elif sampler == "compiled":
        _loop(model, prompts, prompt_mask, draft, compiled=True)
    else:
        with _ordered_weights(model):
            _loop(model, prompts, prompt_mask, draft, compiled=False)
    return draft.finished()


class _Draft:
    """Responses (B, R) while they are written: draws their tokens, and notes where they end."""

    def __init__(
        self,
        uniform: Tensor,
        choose: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        stops: Tensor,
        pad_token_id: int,
        stop_strings: StopStringCriteria | None,
        heard: Callable[[Tensor], None] | None,
    ) -> None:
        """`uniform` (R, B, 1): the random number of each token, by which `choose` picks it."""
        length, size = uniform.shape[:2]
        self.uniform, self.choose, self.stops, self.stop_strings = uniform, choose, stops, stop_strings
        self.heard = heard
        self.pad_token_id, self.length = pad_token_id, length
        device = uniform.device
        self.responses = torch.full((size, length), pad_token_id, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(size, length, dtype=torch.float32, device=device)
        self.mask = torch.zeros(size, length, dtype=torch.bool, device=device)
        self.stopped = torch.zeros(size, dtype=torch.bool, device=device)

    def draw(self, t: int, logits: Tensor, rows: Tensor) -> Tensor:
        """Draws token t of the given rows from their logits (rows, V); what finished rows draw is not kept."""
        tokens, token_logprobs = self.choose(logits, self.uniform[t, rows])
        live = ~self.stopped[rows]
        if self.heard is not None:
            self.heard(tokens[live])
        self.responses[rows, t] = torch.where(live, tokens, self.pad_token_id)
        self.logprobs[rows, t] = torch.where(live, token_logprobs, 0.0)
        self.mask[rows, t] = live
        ended = torch.isin(tokens, self.stops)
        if self.stop_strings is not None:
            ended |= self.stop_strings(self.responses[rows, : t + 1], cast(Any, None))
        self.stopped[rows] |= live & ended
        return tokens

    def finished(self) -> Sampled:
        """The responses, cut to the longest."""
        width = int(self.mask.sum(dim=1).max())
        return Sampled(
            responses=self.responses[:, :width],
            mask=self.mask[:, :width],
            logprobs=self.logprobs[:, :width],
            stopped=self.stopped,
        )


def _loop(model: PreTrainedModel, prompts: Tensor, prompt_mask: Tensor, draft: _Draft, *, compiled: bool) -> None:
    """Token by token over the model's own cache; finished rows leave the batch."""
    device, look_every = prompts.device, _LOOK_EVERY.get(prompts.device.type, 8)
    cache: Any = DynamicCache(config=model.config)
    logits, attention = _prefill(model, prompts, prompt_mask, cache)  # not compiled: each batch has a width of its own
    column = attention.shape[1]  # of the next token in the cache
    decode: Callable[..., Tensor] = _last_logits
    width, fixed, least = column + draft.length, None, None
    if compiled:
        decode, fixed, least = _compiled(), _fixed(model, cache, width), max(len(prompts) // _SMALLEST_SHARE, 1)
        width, cache = fixed.width, fixed.filled(cache)
    attention = nn.functional.pad(attention, (0, width - column))
    position = prompt_mask.sum(dim=1, keepdim=True)  # of the next token, per row
    rows = torch.arange(len(prompts), device=device)  # which rows of the batch are still in the model's batch
    for t in range(draft.length):
        tokens = draft.draw(t, logits, rows)
        if t + 1 == draft.length:
            break
        if (t + 1) % look_every == 0:
            keep = _kept(draft.stopped[rows], least)
            if len(keep) == 0:
                break
            if len(keep) < len(rows):
                rows, tokens, attention, position = rows[keep], tokens[keep], attention[keep], position[keep]
                cache = fixed.cut(cache, keep) if fixed else _cut(cache, keep)
        attention[:, column] = 1
        column += 1
        seen = attention if compiled else attention[:, :column]
        logits = decode(model, tokens[:, None], seen, position, cache)
        position = position + 1


@contextlib.contextmanager
def _ordered_weights(model: PreTrainedModel) -> Iterator[None]:
    """Meanwhile the linear layers' weights lie in the order in which a CPU's bf16 products read them.

    Otherwise they are put into that order again at each step, which takes longer than the product of a few rows with them.
    """
    layers = [layer for layer in model.modules() if _can_be_ordered(layer)] if _has_ordered_products() else []
    if sum(layer.weight.nbytes for layer in layers) > _ORDERED_AT_MOST:
        layers = []
    try:
        for layer in layers:
            weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
            layer.forward = functools.partial(_product, weight, layer.bias)  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _has_ordered_products() -> bool:
    """Whether this build of torch, on this CPU, multiplies bf16 with weights of an order of its own."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _can_be_ordered(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Plain layers only: quantised ones are of other types, and those of an offloaded model have a forward of their own."""
    return (
        type(layer) is nn.Linear
        and (layer.weight.device.type, layer.weight.dtype) == ("cpu", torch.bfloat16)
        and "forward" not in vars(layer)
    )


def _product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """What a linear layer computes, with an ordered weight; autocast does not know this product, hence the type."""
    return torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), weight, bias, "none", [], "")


def _kept(stopped: Tensor, least: int | None) -> Tensor:
    """Which rows of the batch stay in it: not many finished ones. A compiled batch, which has a `least` size, is only ever
    halved, and never below that, because each size is compiled anew."""
    size, live = len(stopped), int((~stopped).sum())
    if live == 0:
        wanted = 0
    elif least is not None:
        wanted = size if live > size // 2 or size // 2 < least else size // 2
    else:
        wanted = size if live >= _COMPACT_BELOW * size else live
    return torch.argsort(stopped.int(), stable=True)[:wanted].sort().values


def _cut(cache: DynamicCache, keep: Tensor) -> DynamicCache:
    """The cache with these rows left."""
    cache.reorder_cache(cast(torch.LongTensor, keep))
    return cache


def _layers(cache: DynamicCache | StaticCache) -> list[Any]:
    """A cache's layers; keys and values are (rows, heads, tokens, width)."""
    return cast(list[Any], cache.layers)


def _best(model: PreTrainedModel) -> Literal["loop", "generate"]:
    """`loop` if it fits the model. That it does not is said once a model, on standard error: answers go to standard output."""
    if fits_loop(model):
        return "loop"
    if model not in _SAID:
        _SAID.add(model)
        print(
            f"{type(model).__name__} keeps more than keys and values of its tokens, or changes its logits after the output "
            "embedding: sampled through transformers' generate, slower",
            file=sys.stderr,
            flush=True,
        )
    return "generate"


def fits_loop(model: PreTrainedModel, *, compiled: bool = False) -> bool:
    """Whether the model keeps plain keys and values, one entry a token, which `_loop` can copy, repeat and cut, and its
    logits are just its head on the last hidden states.

    Compiled, keys and values also have to stay in their places: no sliding window.
    """
    if model._is_stateful or not hasattr(model, model.base_model_prefix):
        return False
    layers = DynamicCache(config=model.config).layers
    plain = all(isinstance(layer, DynamicLayer) and not (compiled and layer.is_sliding) for layer in layers)
    return plain and has_plain_head(model)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """The decoding step through torch.compile; on a GPU it is replayed as one CUDA graph instead of launched op by op."""
    # Past its limit of 8 torch.compile goes on uncompiled: each batch has four sizes, and others before its cache grew.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    return torch.compile(_last_logits, mode="reduce-overhead", dynamic=False)


class _Fixed:
    """Keys and values of fixed size that stay where they are in memory, from one rollout to the next: what is compiled, or
    recorded as a CUDA graph, for one serves the others. A batch of fewer rows has their beginning."""

    def __init__(self, model: PreTrainedModel, like: DynamicCache, rows: int, width: int) -> None:
        """`width` in tokens; heads and type as in the cache `like`."""
        self.rows, self.width = rows, width
        self._whole = StaticCache(model.config, max_cache_len=width)
        for layer, other in zip(_layers(self._whole), _layers(like), strict=True):
            layer.lazy_initialization(*(x[:1].expand(rows, -1, -1, -1) for x in (other.keys, other.values)))
        self._sizes: dict[int, StaticCache] = {}

    def holds(self, keys: Tensor, width: int) -> bool:
        """Whether there is room for a batch with such keys, up to this width."""
        own = _layers(self._whole)[0].keys
        return (own.dtype, own.device) == (keys.dtype, keys.device) and len(keys) <= self.rows and width <= self.width

    def filled(self, cache: DynamicCache) -> StaticCache:
        """With the prompts' keys and values, and nothing of the rollout before."""
        fixed = self._first(len(_layers(cache)[0].keys))
        fixed.reset()
        for number, layer in enumerate(_layers(cache)):
            fixed.update(layer.keys, layer.values, number)
        return fixed

    def cut(self, cache: StaticCache, keep: Tensor) -> StaticCache:
        """With these rows of the cache left."""
        fixed = self._first(len(keep))
        for layer, other in zip(_layers(fixed), _layers(cache), strict=True):
            layer.keys.copy_(other.keys[keep])
            layer.values.copy_(other.values[keep])
        return fixed

    def _first(self, rows: int) -> StaticCache:
        if rows not in self._sizes:
            self._sizes[rows] = part = copy.copy(self._whole)
            part.layers = [copy.copy(layer) for layer in self._whole.layers]  # of one length, a tensor in each layer
            for layer in _layers(part):
                layer.batch_size, layer.keys, layer.values = rows, layer.keys[:rows], layer.values[:rows]
                torch._dynamo.mark_static_address(layer.keys)
                torch._dynamo.mark_static_address(layer.values)
        return self._sizes[rows]


def _fixed(model: PreTrainedModel, cache: DynamicCache, width: int) -> _Fixed:
    """The model's fixed keys and values, made anew only where those there are cannot hold the batch."""
    keys, there = _layers(cache)[0].keys, _FIXED.get(model)
    rows, width = len(keys), -(-width // _FIXED_STEP) * _FIXED_STEP
    if there is not None:
        if there.holds(keys, width):
            return there
        rows, width = max(rows, there.rows), max(width, there.width)
        del _FIXED[model], there  # its memory goes before the larger one's is taken
    _FIXED[model] = _Fixed(model, cache, rows, width)
    return _FIXED[model]


def _prefill(model: PreTrainedModel, prompts: Tensor, mask: Tensor, cache: DynamicCache) -> tuple[Tensor, Tensor]:
    """Fills the cache with the prompts; logits (B, V), and the mask (B, columns) of the cache.

    What all prompts begin with is computed once, and so is a prompt that gets several responses.
    """
    first, copy_of = _distinct(prompts, mask)
    prompts, mask = prompts[first], mask[first]
    shared, positions = common_prefix(prompts, mask), mask.long().cumsum(dim=1) - 1
    rest = mask & (positions >= shared)
    if shared:
        opening = prompts[0][mask[0]][:shared][None]
        _last_logits(model, opening, torch.ones_like(opening), torch.arange(shared, device=mask.device)[None], cache)
        cache.batch_repeat_interleave(len(prompts))
        # Prompts end in the last column, so what is left of them does too.
        width = int(rest.sum(dim=1).max())
        prompts, rest, positions = prompts[:, -width:], rest[:, -width:], positions[:, -width:]
    attention = torch.cat([rest.new_ones(len(prompts), shared), rest], dim=1).long()
    logits = _last_logits(model, prompts, attention, positions.clamp_min(0), cache)
    if len(first) < len(copy_of):
        cache.batch_select_indices(copy_of)
    return logits[copy_of], attention[copy_of]


def _distinct(prompts: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of prompts (B, P) without repetitions, (D,), and which of them each row equals, (B,)."""
    rows = torch.arange(len(prompts), device=prompts.device)
    _, number = torch.unique(torch.cat([prompts * mask, mask.long()], dim=1), dim=0, return_inverse=True)
    first = torch.full_like(rows, len(rows)).scatter_reduce(0, number, rows, "amin")[number]  # of each row's equals
    is_first = first == rows
    return is_first.nonzero().squeeze(1), (is_first.cumsum(dim=0) - 1)[first]


def _last_logits(
    model: PreTrainedModel, input_ids: Tensor, attention: Tensor, position_ids: Tensor, cache: Any
) -> Tensor:
    """Next-token logits (B, V) after the last column; the cache takes up all of them."""
    backbone = getattr(model, model.base_model_prefix)
    hidden = backbone(
        input_ids=input_ids, attention_mask=attention, position_ids=position_ids, past_key_values=cache, use_cache=True
    ).last_hidden_state
    # Flat: from a strided slice the head's product would copy the embedding matrix for every row.
    return model.get_output_embeddings()(hidden[:, -1].contiguous())


def _draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """One token per row of (B, V) logits by inverse CDF, and its log-probability in fp32.

    `torch.multinomial` draws a random number for every entry of the vocabulary, on one thread; this draws one a row.
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


def _generate(model: PreTrainedModel, prompts: Tensor, prompt_mask: Tensor, draft: _Draft) -> None:
    """The same through transformers' `generate`: it works for any causal model, and is slower."""
    own = model.generation_config
    # What a call leaves open is filled in from the model's own generation config, which may cut or bend the distribution.
    model.generation_config = GenerationConfig()
    try:
        cast(Any, model).generate(
            inputs=prompts,
            attention_mask=prompt_mask.long(),
            generation_config=GenerationConfig(
                max_new_tokens=draft.length, do_sample=False, pad_token_id=draft.pad_token_id
            ),
            logits_processor=LogitsProcessorList([_DrawnToken(draft, prompts.shape[1])]),
            stopping_criteria=StoppingCriteriaList([_Stopped(draft)]),
        )
    finally:
        model.generation_config = own


class _DrawnToken(LogitsProcessor):
    """Leaves `generate`'s greedy search one token to choose: the one that is drawn here."""

    def __init__(self, draft: _Draft, prompt_length: int) -> None:
        self.draft, self.prompt_length = draft, prompt_length

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        rows = torch.arange(len(input_ids), device=input_ids.device)
        tokens = self.draft.draw(input_ids.shape[1] - self.prompt_length, scores, rows)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


class _Stopped(StoppingCriteria):
    """Ends `generate` once all responses have ended."""

    def __init__(self, draft: _Draft) -> None:
        self.draft = draft

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return self.draft.stopped

"""Decoding over tensors that stay in their places: a token step is recorded once and replayed for every token.

A step of a small model is a thousand operators, each of which costs the host more time than the GPU. Recorded as a CUDA
graph, all of them are one launch: the layers over a cache of fixed size, the logits, and the draw of the next token. The
step is the library's own, run as it is; nothing is compiled. A graph holds addresses, so whatever it reads or writes stays
where it is, and steps whose weights have moved are recorded anew.

A CPU has no graphs: there the layers are compiled instead (`sampler: compiled`), over the same tensors.

Legend: B responses, S rows that a step computes, W columns of the cache, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import StaticLayer

from rlhf.models.anatomy import head, hidden_states, probe_ids, same_numbers
from rlhf.models.decoding import cache_layers, last_logits, parts, prefill
from rlhf.models.drawing import DrawOptions, ResponseBuffer
from rlhf.run.memory import cache_bytes, total_bytes

#: The width of a static cache is a multiple of this many columns.
_WIDTH_STEP = 64
#: A batch is halved down to this part of its size, and no further: few rows take a GPU as long as fewer.
_SMALLEST_SHARE = 8
#: Largest share of a device's memory that a static cache, or a plain copy of the weights, may take. It is not that of what is
#: free just now: a run that was stopped must go on in the same way.
_SHARE = 0.25
#: Largest share that may stay taken between rollouts; what is larger is made anew for each.
_KEPT_SHARE = 0.1


def size_class(rows: int) -> int:
    """Return the smallest number of rows, `rows` or more, that steps are made for: 1, 2, 3, 4, 6, 8, 12, 16, 24, ..."""
    size = 1 << (rows - 1).bit_length()
    return size * 3 // 4 if size >= 4 and rows <= size * 3 // 4 else size


def width_class(tokens: int) -> int:
    """Return the columns of the cache for rows of `tokens` tokens."""
    return -(-tokens // _WIDTH_STEP) * _WIDTH_STEP


class Decoder:
    """The tensors of a model's decoding, which keep their places, and its token step for a few numbers of rows."""

    def __init__(self, like: DynamicCache, rows: int, width: int, length: int, options: DrawOptions) -> None:
        """Allocate `rows` of `width` columns, with the heads and the type of the cache `like`, and `length` tokens."""
        device = cache_layers(like)[0].keys.device
        self.rows, self.width = rows, width
        self.buffer = ResponseBuffer(torch.full((length, rows, 1), 0.5, device=device), options)
        self._t, self._column = _zeros(1, device=device), _zeros(1, device=device)
        self._tokens, self._position = _zeros(rows, 1, device=device), _zeros(rows, 1, device=device)
        self._numbers = _zeros(rows, device=device)  # the buffer's row of each row of the cache
        self._seen = torch.zeros(rows, 1, 1, width, dtype=torch.bool, device=device)
        self._layers = [_Layer(layer, rows, width, self._column) for layer in cache_layers(like)]
        self._caches: dict[int, Cache] = {}
        self._model: PreTrainedModel | None = None
        self._last_logits: Callable[..., Tensor] | None = None
        self._steps: dict[int, Callable[[], None] | None] = {}
        self._recorded_with: Hashable = None
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._layers)

    def fits(self, like: DynamicCache, rows: int, width: int, length: int) -> bool:
        """Return True if there is room for a batch with such keys, of this size, and for its responses."""
        own, keys = self._layers[0].keys, cache_layers(like)[0].keys
        room = rows <= self.rows and width <= self.width and length <= self.buffer.length
        return room and (own.dtype, own.device) == (keys.dtype, keys.device)

    @contextlib.contextmanager
    def computing(self, model: PreTrainedModel, layers: Callable[..., Tensor]) -> Iterator[None]:
        """Context in which the steps are a model's, by `last_logits` or what it was compiled to.

        The model is not held longer, or it would never be freed.
        """
        self._model, self._last_logits = model, functools.partial(layers, parts(model))
        try:
            yield
        finally:
            self._model = self._last_logits = None

    def start(self, cache: DynamicCache, attention: Tensor, lengths: Tensor, buffer: ResponseBuffer) -> int:
        """Take over a batch of prompts that are in the cache; return the rows to compute, of which some may be idle.

        Args:
            attention: (B, columns), 1 at the columns of the cache that hold a prompt's tokens.
            lengths: (B, 1), tokens of each prompt.
        """
        assert self._model is not None
        count, columns = attention.shape
        if (key := (_places(self._model), buffer.options)) != self._recorded_with:
            self._steps.clear()
            self._recorded_with = key
            self.buffer.options, self.buffer.stops = buffer.options, buffer.stops
        self.buffer.restart(buffer)
        for layer, other in zip(self._layers, cache_layers(cache), strict=True):
            layer.fill(other.keys, other.values)
        self._t.zero_()
        self._column.fill_(columns)
        self._tokens.fill_(buffer.options.pad_token_id)
        self._position.zero_()[:count] = lengths
        self._numbers.copy_(torch.arange(self.rows))
        self._seen.zero_()[:count, 0, 0, :columns] = attention.bool()
        return min(size_class(count), self.rows)

    def run(self, size: int, logits: Tensor, length: int) -> None:
        """Draw up to `length` tokens a row, the first ones from the prompts' logits (B, V)."""
        buffer, smallest, looked = self.buffer, max(size // _SMALLEST_SHARE, 1), 1
        self._tokens[: len(logits), 0] = buffer.draw(0, logits, self._numbers[: len(logits)])
        for t in range(1, length + 1):
            if t % buffer.look_every == 0 or t == length:
                for drawn in range(looked, t):
                    buffer.look(drawn, self._numbers[:size])
                looked, size = t, self._halve(size, smallest)
                if size == 0 or t == length:
                    break
            self._step(size)

    def next_logits(self, size: int) -> Tensor:
        """Return logits (S, V) after the tokens of the first rows, which take their places in the cache."""
        assert self._model is not None and self._last_logits is not None
        if size not in self._caches:
            self._caches[size] = Cache(layers=[layer.first(size) for layer in self._layers])
        seen = self._seen[:size].index_fill_(3, self._column, True)
        if self._model.config._attn_implementation == "eager":  # which adds its mask to the scores
            floor = torch.finfo(self._model.dtype).min
            seen = torch.zeros_like(seen, dtype=self._model.dtype).masked_fill_(~seen, floor)
        # The library passes a mask of four dimensions on as it is.
        return self._last_logits(self._tokens[:size], seen, self._position[:size], self._caches[size])

    def _advance(self, size: int) -> None:
        """Make one token step of the first rows, with tensors only."""
        logits = self.next_logits(size)
        for counter in (self._t, self._column, self._position):
            counter.add_(1)
        self._tokens[:size, 0] = self.buffer.take(self._t, logits, self._numbers[:size])

    def _step(self, size: int) -> None:
        """Make one token step: the first as it is, which loads what a recording must not load, the others recorded."""
        if size not in self._steps:
            self._steps[size] = None
            return self._advance(size)
        if self._steps[size] is None:
            self._steps[size] = record(functools.partial(self._advance, size), self._tokens.device, self._pool)
        return cast(Callable[[], None], self._steps[size])()

    def _halve(self, size: int, smallest: int) -> int:
        """Move unfinished rows to the front where half of the rows hold them; return the rows to compute, 0 if none."""
        stopped = self.buffer.stopped[self._numbers[:size]]
        live, smaller = int((~stopped).sum()), size
        while smaller % 2 == 0 and smaller // 2 >= max(live, smallest):
            smaller //= 2
        if live and smaller < size:
            keep = torch.argsort(stopped.int(), stable=True)[:smaller].sort().values
            own = [self._tokens, self._position, self._numbers, self._seen]
            for tensor in (*own, *(x for layer in self._layers for x in (layer.keys, layer.values))):
                tensor[:smaller] = tensor[keep]
        return smaller if live else 0


class _Layer(StaticLayer):
    """Keys and values (S, heads, W, width) of a layer; a step writes one column, which all layers share."""

    keys: Tensor  # type: ignore[assignment]
    values: Tensor  # type: ignore[assignment]

    def __init__(self, like: Any, rows: int, width: int, column: Tensor) -> None:
        super().__init__(width)
        self.keys, self.values = (x.new_zeros(rows, x.shape[1], width, x.shape[3]) for x in (like.keys, like.values))
        self.dtype, self.device, self.is_initialized = like.keys.dtype, like.keys.device, True
        self.cumulative_length = column

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Hold the prompts' keys and values, and nothing of an earlier rollout."""
        for own, new in ((self.keys, keys), (self.values, values)):
            own.zero_()[: len(new), :, : new.shape[2]] = new

    def first(self, rows: int) -> _Layer:
        """Return the layer of the first rows, in the same memory."""
        part = _Layer.__new__(_Layer)
        vars(part).update(vars(self), keys=self.keys[:rows], values=self.values[:rows])
        return part

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the keys and values of one token a row; return all columns."""
        self.keys.index_copy_(2, self.cumulative_length, key_states)
        self.values.index_copy_(2, self.cumulative_length, value_states)
        return self.keys, self.values


def _zeros(*shape: int, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=torch.long, device=device)


def _places(model: nn.Module) -> Hashable:
    """Return what a recorded step depends on beside its tensors: where weights lie, and how each adapter is set."""
    tensors = (*model.parameters(), *model.buffers())
    adapters = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return (
        tuple((tensor.data_ptr(), tensor.dtype) for tensor in tensors),
        tuple((type(layer), tuple(layer.active_adapters), layer.disable_adapters) for layer in adapters),
        tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")),
    )


@functools.cache
def layers_for(device: str) -> Callable[..., Tensor]:
    """Return `last_logits` as a token step computes it on a kind of device: compiled on a CPU, which has no graphs."""
    if device != "cpu":
        return last_logits
    # Past its limit of 8 torch.compile goes on uncompiled: each batch has four sizes, and others before its cache grew.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    return torch.compile(last_logits, dynamic=False)


class NotRecordable(RuntimeError):
    """A step does what cannot be recorded: it looks at numbers on the host, or needs memory that is not there."""


def record(step: Callable[[], None], device: torch.device, pool: Any) -> Callable[[], None]:
    """Return a function that repeats a step of tensors in their places: on a GPU one launch. It is not run yet.

    Raises:
        NotRecordable: CUDA refuses to record the step.
    """
    if device.type != "cuda":
        return step
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    # A weight's cast that autocast keeps from one product to the next would lie outside of the graph.
    caching = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.cuda.graph(graph, pool=pool):
            step()
    except RuntimeError as error:
        torch.cuda.set_stream(stream)  # a failed capture leaves its own stream behind
        raise NotRecordable(str(error)) from error
    finally:
        torch.set_autocast_cache_enabled(caching)
    return graph.replay


#: The decoder of each model, whose tensors stay between rollouts.
_DECODERS: WeakKeyDictionary[PreTrainedModel, Decoder] = WeakKeyDictionary()


def decode(
    model: PreTrainedModel,
    cache: DynamicCache,
    attention: Tensor,
    lengths: Tensor,
    logits: Tensor,
    buffer: ResponseBuffer,
) -> None:
    """Draw the responses of prompts that are in the cache; arguments as in `Decoder.start` and `Decoder.run`.

    Raises:
        NotRecordable: the model's step cannot be recorded; the buffer is as it was.
    """
    decoder = _decoder(model, cache, attention, buffer)
    try:
        with decoder.computing(model, layers_for(attention.device.type)):
            size = decoder.start(cache, attention, lengths, buffer)
            for layer in cache_layers(cache):  # their memory is free for the steps
                layer.keys = layer.values = None
            decoder.run(size, logits, buffer.length)
        decoder.buffer.copy_to(buffer)
    except NotRecordable:
        _DECODERS.pop(model, None)
        raise
    if not stays(decoder.nbytes, attention.device):
        _DECODERS.pop(model, None)


def _decoder(model: PreTrainedModel, cache: DynamicCache, attention: Tensor, buffer: ResponseBuffer) -> Decoder:
    """Return the model's decoder, made anew only where it cannot hold the batch."""
    current, length = _DECODERS.get(model), buffer.length
    rows, width = size_class(len(attention)), width_class(attention.shape[1] + length)
    if current is not None:
        if current.fits(cache, rows, width, length):
            return current
        rows, width, length = max(rows, current.rows), max(width, current.width), max(length, current.buffer.length)
        del _DECODERS[model], current  # its memory goes before the larger one's is taken
    _DECODERS[model] = Decoder(cache, rows, width, length, buffer.options)
    return _DECODERS[model]


def records(device: torch.device) -> bool:
    """Return True if steps on this device are recorded as graphs."""
    return device.type == "cuda"


def fits(nbytes: int, device: torch.device) -> bool:
    """Return True if the device's memory may take so many bytes for sampling alone."""
    return nbytes <= _SHARE * total_bytes(device)


def stays(nbytes: int, device: torch.device) -> bool:
    """Return True if so many bytes may stay taken between rollouts, for graphs that hold their addresses."""
    return nbytes <= _KEPT_SHARE * total_bytes(device)


def has_room(model: PreTrainedModel, rows: int, tokens: int) -> bool:
    """Return True if a device's memory may take a static cache for `rows` rows of `tokens` tokens."""
    return fits(cache_bytes(model, size_class(rows) * width_class(tokens)), model.device)


@torch.no_grad()
def is_sound(model: PreTrainedModel) -> bool:
    """Return True if a token step over static tensors gives the logits of a plain pass, and never waits for the device.

    Weights that come and go between main memory and a GPU have no places that a graph could hold.
    """
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return False
    ids, cache = probe_ids(model, 2, 8), DynamicCache(config=model.config)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :3] = False
    expected = head(model)(hidden_states(model, ids, mask)[:, -1])
    options = DrawOptions(temperature=1.0, top_p=1.0, stop_token_ids=(0,), pad_token_id=0)
    try:
        _, attention = prefill(model, ids[:, :-1], mask[:, :-1], cache, share=False)
        decoder = Decoder(cache, 2, _WIDTH_STEP, 1, options)
        buffer = ResponseBuffer(torch.zeros(1, 2, 1, device=ids.device), options)
        with decoder.computing(model, last_logits):
            decoder.start(cache, attention, mask[:, :-1].sum(dim=1, keepdim=True), buffer)
            decoder._tokens.copy_(ids[:, -1:])
            with no_host_waits():
                logits = decoder.next_logits(2)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False
    return same_numbers(model, logits, expected)


class HostWait(RuntimeError):
    """The host asked for numbers that a device had yet to compute."""


@contextlib.contextmanager
def no_host_waits() -> Iterator[None]:
    """Context in which an operation that makes the host wait for a GPU raises `HostWait`, on a CPU, too."""
    with _NoReads(), _NoWaits():
        yield


class _NoWaits(TorchDispatchMode):
    """Refuses operators whose result, or whose size, the host must know."""

    _WAIT = (
        *("_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount"),
        *("_unique", "_unique2", "unique_dim", "unique_consecutive"),
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        waits = name in self._WAIT
        if name.startswith(("index", "_index_put")) and len(args) > 1 and isinstance(args[1], (list, tuple)):
            waits = any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if name == "_to_copy" and kwargs.get("device") is not None:
            waits = torch.device(kwargs["device"]).type == "cpu" and args[0].device.type != "cpu"
        if name == "repeat_interleave" and isinstance(args[-1], Tensor) and kwargs.get("output_size") is None:
            waits = True
        if waits:
            raise HostWait(f"{func} waits for the device")
        return func(*args, **kwargs)


class _NoReads(TorchFunctionMode):
    """Refuses methods that read a tensor's numbers without an operator, as `tolist` does on a CPU."""

    _READ = frozenset({Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.item})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._READ:
            raise HostWait(f"Tensor.{func.__name__} waits for the device")
        return func(*args, **(kwargs or {}))

"""Passes without numbers: the run's own code on tensors that have only shapes, with memory and operators counted.

The model is built from its config on no device at all, so nothing is downloaded and nothing large is allocated. Token ids
and masks are real, because packing and batching read them; everything that a model computes has a shape, a type and a device
only. What a pass holds at its peak, and every operator it calls, is then known for any architecture.
"""

from __future__ import annotations

import contextlib
import math
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from rlhf.models.logprobs import positions_at_once

_ATEN = torch.ops.aten
_ALIASES = {_ATEN._unsafe_view.default, _ATEN.detach.default, _ATEN.alias.default}
_HOST = torch.device("cpu")
#: Positions whose distributions are made together: in the few that a run makes at a time, their calls would be most of all.
_POSITIONS = 128


@dataclass(frozen=True)
class Operator:
    """One call of an operator: its function, and the shapes and types of what it reads and writes."""

    function: Any
    arguments: tuple[Any, ...]
    """Tensors as their `Shape`, anything else as it is."""
    options: tuple[tuple[str, Any], ...]
    ordered: bool = False
    """A product with a weight in the order that a CPU's products read (`rlhf.models.decoding.ordered_weights`)."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that it reads, and as much as the largest of them that it writes."""
        sizes = [leaf.nbytes for leaf in tree_leaves(self.arguments) if isinstance(leaf, Shape)]
        return sum(sizes) + max(sizes, default=0)

    @property
    def flops(self) -> int:
        """Multiplications and additions of matrix products; 0 of anything else."""
        shapes = [argument.shape for argument in self.arguments if isinstance(argument, Shape)]
        name = self.function.overloadpacket
        if name in (_ATEN.mm, _ATEN.bmm) and len(shapes) == 2:
            return 2 * math.prod(shapes[0]) * shapes[1][-1]
        if name in (_ATEN.addmm, _ATEN.baddbmm) and len(shapes) == 3:
            return 2 * math.prod(shapes[1]) * shapes[2][-1]
        if "scaled_dot_product" in str(name):
            products = 2 if "backward" not in str(name) else 5
            query, key = [shape for shape in shapes if len(shape) == 4][-3:][:2] if products == 2 else shapes[1:3]
            return products * 2 * math.prod(query) * key[-2]
        return 0


@dataclass(frozen=True)
class Shape:
    """Shape, strides and type of a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the elements that it really has: an expanded dimension counts once."""
        return self.dtype.itemsize * math.prod(n for n, s in zip(self.shape, self.strides, strict=True) if s or n == 0)


@dataclass
class Count:
    """Bytes that a phase held, and operators that it called."""

    peak: int = 0
    """Most bytes alive at once, weights included."""
    lasting: int = 0
    """Bytes of gradients and optimiser states among them."""
    operators: Counter[Operator] = field(default_factory=Counter)


class Rehearsal(TorchDispatchMode):
    """Counts the live bytes and the operators of passes over models whose tensors are `placeholders`."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.live: dict[int, int] = {}
        self.now = 0
        self.count = Count()
        self.results: dict[Operator, Any] = {}
        self.ordered = False
        """Linear layers in bf16 have their weights ordered."""

    @contextlib.contextmanager
    def phase(self) -> Iterator[Count]:
        """Yield the count of the passes inside."""
        outer, self.count = self.count, Count(peak=self.now)
        try:
            with warnings.catch_warnings(), positions_at_once(_POSITIONS), self:
                warnings.simplefilter("ignore")
                yield self.count
        finally:
            outer.peak = max(outer.peak, self.count.peak)
            self.count = outer

    def placeholders(self, model: nn.Module) -> nn.Module:
        """Replace a model's tensors by ones that have a shape, a type and a device only; tied ones stay tied."""
        replaced: dict[int, tuple[Any, Tensor]] = {}
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None or isinstance(tensor, FakeTensor):
                        continue
                    if id(tensor) not in replaced:
                        replaced[id(tensor)] = (tensor, self._placeholder(tensor))  # kept, so that no id comes again
                    cast(Any, tensors)[name] = replaced[id(tensor)][1]
        return model

    def _placeholder(self, tensor: Tensor) -> Tensor:
        fake = FakeTensor(self.fake, tensor.detach().to("meta"), _HOST)
        self._hold(fake)
        return nn.Parameter(fake, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.live:
            size = storage.nbytes()
            self.live[storage._cdata] = size
            self.now += size
            self.count.peak = max(self.count.peak, self.now)
            weakref.finalize(storage, self._release, storage._cdata)

    def _release(self, key: int) -> None:
        self.now -= self.live.pop(key)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if function.namespace == "prim" or not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return function(*args, **kwargs)  # token ids and masks
        if function is _ATEN._local_scalar_dense.default:
            return 1.0 if tensors[0].dtype.is_floating_point else 1  # no number of a rehearsal means anything
        if function is _ATEN.index.Tensor:
            args = (args[0], _numbers(args[1]), *args[2:])
        if function is _ATEN.masked_select.default and not isinstance(args[1], FakeTensor):
            function, args = _ATEN.index.Tensor, (args[0], _numbers([args[1]]))
        if function.is_view or function in _ALIASES:
            with self.fake:
                return function(*args, **kwargs)
        operator = Operator(
            function, _freeze(args), _freeze(tuple(kwargs.items())), self.ordered and _is_linear(function, args)
        )
        self.count.operators[operator] += 1
        if function._schema.is_mutable and function.__name__.split(".")[0].endswith("_"):
            return args[0]
        results = self.results.get(operator)
        if results is None:
            args, kwargs = tree_map(self._on_device, (args, kwargs))
            with self.fake:
                output = function(*args, **kwargs)
            fresh = tuple(x for x in tree_leaves(output) if isinstance(x, FakeTensor))
            if fresh == (output,) and all(output is not x for x in args):
                self.results[operator] = (_freeze(output), output.device)
        else:
            shape, device = results
            meta = torch.empty_strided(shape.shape, shape.strides, dtype=shape.dtype, device="meta")
            output = FakeTensor(self.fake, meta, device)
            fresh = (output,)
        for tensor in fresh:
            self._hold(tensor)
        return output

    def _on_device(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor):
            return FakeTensor(self.fake, leaf.detach().to("meta"), leaf.device)
        return leaf


def _is_linear(function: Any, args: Any) -> bool:
    """Return True for the product of a linear layer in bf16."""
    if function not in (_ATEN.mm.default, _ATEN.bmm.default) or args[1].dtype != torch.bfloat16:
        return False
    return bool(args[1].stride(-2) == 1 and (function is _ATEN.mm.default or args[1].stride(0) == 0))


def _numbers(indices: Any) -> list[Any]:
    """Return indices with real masks replaced by the numbers of their elements, whose count is known."""
    numbers: list[Any] = []
    for index in indices:
        mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        numbers += index.nonzero(as_tuple=True) if mask else [index]
    return numbers


def _freeze(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Shape(tuple(value.shape), value.stride(), value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(part) for part in value)
    return value

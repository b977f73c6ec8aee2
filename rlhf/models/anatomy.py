"""The parts of a causal model, found by a short probe rather than by its name.

All of the package computes with two parts of a model: its backbone (token ids to last hidden states) and what follows it,
up to the logits. The probe shows which module is the backbone, whether the head is a plain product, which arguments the
backbone takes, and whether it reads padding rightly. What would train wrongly is refused.

Legend: B rows, T tokens, N tokens of a batch, d width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from rlhf.base.errors import UserError

#: Largest share of a result that may be rounding, by the kind of products; larger ones are other numbers.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.05, "quantized": 0.2}
#: Largest share of a changed token's effect that may appear at the tokens before it: they are of one batch.
_LEAK = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 0.02, "quantized": 0.1}


@dataclass(frozen=True)
class Anatomy:
    """Result of the probe of a model."""

    trunk: str
    """Name of the backbone within the causal model."""
    width: int
    """d, of the last hidden states."""
    plain_head: bool
    """True if logits are just the output embedding's product with the last hidden states: no scale, no soft cap."""
    reads_padding: bool
    """True if the mask, with positions that count real tokens, makes left-padded rows equal to plain ones."""
    unused: frozenset[str]
    """Linear layers to which an adapter would do nothing: their weights are read without calling the layer, or no gradient
    reaches them."""
    cut_off: frozenset[str]
    """Parameters that take part in a pass and that no gradient reaches."""


#: Results of `anatomy`.
_ANATOMIES: WeakKeyDictionary[nn.Module, Anatomy] = WeakKeyDictionary()


def anatomy(model: PreTrainedModel) -> Anatomy:
    """Return the model's anatomy; a probe of a few short passes finds it, once for each model.

    Raises:
        UserError: the model is not causal, or its logits are made of more than its last hidden states.
    """
    if model not in _ANATOMIES:
        modes = {module: module.training for module in model.modules()}
        try:
            model.eval()
            with torch.no_grad():
                _ANATOMIES[model] = _probe(model)
        finally:
            for module, training in modes.items():
                module.training = training
    return _ANATOMIES[model]


def assume_usual(model: PreTrainedModel) -> None:
    """Take the usual anatomy for a model without weights, which no pass can show: a plain head after its decoder."""
    trunk = getattr(model, model.base_model_prefix, None) or model.get_decoder()
    name = next(name for name, module in model.named_modules() if module is trunk)
    embedding: Any = model.get_output_embeddings() or model.get_input_embeddings()
    _ANATOMIES[model] = Anatomy(name, int(embedding.weight.shape[1]), True, True, frozenset(), frozenset())


def backbone(model: PreTrainedModel) -> nn.Module:
    """Return the transformer below the language-model head or score head, ending in its last norm."""
    made_of = _ANATOMIES.get(model)
    return model.get_submodule(getattr(model, "trunk", model.base_model_prefix) if made_of is None else made_of.trunk)


def probe_ids(model: PreTrainedModel, rows: int, length: int) -> Tensor:
    """Return token ids (rows, length) from the middle of the vocabulary.

    Special tokens at its ends have embeddings of zeros, or activations that bf16 rounds badly.
    """
    size = model.config.get_text_config().vocab_size
    return torch.linspace(0.25, 0.75, rows * length, device=_device(model)).mul(size).long().view(rows, length)


def _device(model: PreTrainedModel) -> torch.device:
    """Return the device that a model computes on; accelerate keeps the weights of one that is offloaded elsewhere."""
    hook: Any = getattr(model.get_input_embeddings(), "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])  # it may be several
    device = next((one.execution_device for one in hooks if getattr(one, "execution_device", None) is not None), None)
    return model.device if device is None else torch.device(device)


def _probe(model: PreTrainedModel) -> Anatomy:
    _require_no_encoder(model)
    ids, name = probe_ids(model, 1, 8), type(model).__name__
    calls: list[tuple[nn.Module, Any, Any]] = []
    hooks = [module.register_forward_hook(lambda *call: calls.append(call)) for module in model.modules()]
    try:
        logits, unreached = _pass_with_gradients(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    called = {module for module, _, _ in calls}
    idle = _idle_parts(model, called, unreached)
    cut_off = {n for n in unreached if n.startswith(idle) or model.get_submodule(n.rpartition(".")[0]) in called}
    trunk = _trunk_name(model, called)
    if trunk is None or logits.shape[:2] != ids.shape:
        raise UserError(f"{name} cannot be trained here: it has no backbone whose last hidden states give its logits")
    states = next(output for module, _, output in reversed(calls) if module is model.get_submodule(trunk))[0]
    plain = _has_plain_head(model, trunk, ids)
    names = {module: name for name, module in model.named_modules()}
    unused = _unused_layers(model, called) | {name.removesuffix(".weight") for name in cut_off}
    # Some routers and grouped layers are linear layers that return something else, which an adapter cannot be added to.
    unused |= {names[m] for m, args, output in calls if isinstance(m, nn.Linear) and not _is_product(m, args, output)}
    draft = Anatomy(trunk, states.shape[-1], plain, True, frozenset(unused), frozenset(cut_off))
    _ANATOMIES[model] = draft
    try:
        if not plain and not same_numbers(model, head(model)(states[0]), logits[0]):
            raise UserError(f"{name} cannot be trained here: its logits are made of more than its last hidden states")
        _check_causal(model, ids)
        return dataclasses.replace(draft, reads_padding=_reads_padding(model))
    finally:
        del _ANATOMIES[model]


def _idle_parts(model: PreTrainedModel, called: set[nn.Module], unreached: set[str]) -> tuple[str, ...]:
    """Return the beginnings of names of the parts that texts do not pass through, such as encoders of images."""
    active = {name for name, module in model.named_modules() if module in called}
    active |= {name for name, _ in model.named_parameters() if name not in unreached}
    return tuple(
        f"{prefix}.{child}."
        for prefix, parent in model.named_modules()
        for child, part in parent.named_children()
        # An expert that no token of the probe chose is in a list, which nothing calls.
        if parent in called and part not in called and not any(f"{n}.".startswith(f"{prefix}.{child}.") for n in active)
    )


def _is_product(layer: nn.Linear, args: Sequence[Any], output: Any) -> bool:
    """Return True if a call of a linear layer gave a tensor of its width for each row of its input."""
    return isinstance(output, Tensor) and (not args or output.shape == (*args[0].shape[:-1], layer.out_features))


def _pass_with_gradients(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, set[str]]:
    """Return logits of a pass, and the names of the parameters that a gradient of them would not reach; none is computed."""
    parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    trained = {name: p.requires_grad for name, p in parameters.items()}
    try:
        with torch.enable_grad():
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            logits = model(input_ids=ids, use_cache=False).logits
        reached, nodes = set[int](), [logits.grad_fn]
        seen = set(nodes)
        while nodes:
            node: Any = nodes.pop()
            if hasattr(node, "variable"):
                reached.add(id(node.variable))
            following = {following for following, _ in getattr(node, "next_functions", ()) if following} - seen
            seen |= following
            nodes += following
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(trained[name])
    return logits.detach().float(), {name for name, p in parameters.items() if id(p) not in reached}


def _require_no_encoder(model: PreTrainedModel) -> None:
    reads_encoder = any(name.endswith((".encoder_attn", ".crossattention")) for name, _ in model.named_modules())
    if reads_encoder or getattr(type(model.config), "is_encoder_decoder", False):
        raise UserError(
            f"{type(model).__name__} is the decoder of an encoder-decoder, which answers to its encoder; take a causal model"
        )


def _trunk_name(model: PreTrainedModel, called: set[nn.Module]) -> str | None:
    """Return the name of the backbone: the outermost module that the model calls and that returns hidden states."""
    names = {module: name for name, module in model.named_modules()}
    for candidate in (
        getattr(model, model.base_model_prefix, None),
        getattr(model, "model", None),
        model.get_decoder(),
    ):
        if isinstance(candidate, nn.Module) and candidate in called and candidate is not model:
            return names[candidate]
    return None


def _has_plain_head(model: PreTrainedModel, trunk: str, ids: Tensor) -> bool:
    """Return True if logits are the output embedding's product, for hidden states of any size."""
    states: list[Tensor] = []

    def enlarge(module: nn.Module, args: Any, output: Any) -> Any:
        larger = 100 * output[0]  # a soft cap leaves small logits as they are
        states.append(larger)
        if hasattr(output, "last_hidden_state"):
            output.last_hidden_state = larger
            return output
        return (larger, *output[1:])

    hook = model.get_submodule(trunk).register_forward_hook(enlarge)
    try:
        logits = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        hook.remove()
    embedding = model.get_output_embeddings()
    if embedding is None:
        return False
    try:
        plain = embedding(states[0]).float()
    except RuntimeError:  # of another width: something lies between
        return False
    return plain.shape == logits.shape and _difference(plain, logits) <= 1e-3


def _unused_layers(model: PreTrainedModel, called: set[nn.Module]) -> set[str]:
    """Return the linear layers that a pass did not call though their parent was called, by name.

    The fused kernels of state-space mixers also read `out_proj` themselves, on a GPU.
    """
    names = set()
    for prefix, parent in model.named_modules():
        for child, module in parent.named_children():
            if type(module) is nn.Linear and parent in called:
                fused = child == "out_proj" and hasattr(parent, "conv1d") and hasattr(parent, "A_log")
                if fused or module not in called:
                    names.add(f"{prefix}.{child}")
    return names


def _check_causal(model: PreTrainedModel, ids: Tensor) -> None:
    """Raise `UserError` unless changing the later half of a row leaves its earlier half as it was."""
    half = ids.shape[1] // 2
    other = torch.cat([ids[:, :half], ids[:, half:].flip(1)], dim=1)
    difference = (run_backbone(model, ids) - run_backbone(model, other)).float().norm(dim=-1)[0]
    if float(difference[:half].max()) > _limit(model, _LEAK) * float(difference[half:].max()):
        raise UserError(
            f"{type(model).__name__} cannot be trained here: its tokens see those that come after them, so it would learn to "
            "copy; take a causal model (models of BERT's kind are causal if is_decoder is true in their config.json)"
        )


def _reads_padding(model: PreTrainedModel) -> bool:
    """Return True if a short row gives the same states alone and padded on the left, beside a longer one."""
    rows, padding = probe_ids(model, 2, 8), 3
    mask = torch.ones_like(rows)
    mask[0, :padding] = 0
    try:
        padded = run_backbone(model, rows, mask, _positions(mask))
        alone = [run_backbone(model, rows[:1, padding:])[0], run_backbone(model, rows[1:])[0]]
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    return same_numbers(model, padded[mask.bool()], torch.cat(alone))


def _positions(mask: Tensor) -> Tensor:
    return (mask.long().cumsum(dim=1) - 1).clamp_min(0)


def _difference(result: Tensor, expected: Tensor) -> float:
    """Return the size of the difference as a share of what is expected; infinity if there is a NaN."""
    share = (result.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-12)
    return float(share.nan_to_num(nan=torch.inf))


def same_numbers(model: PreTrainedModel, result: Tensor, expected: Tensor) -> bool:
    """Return True if two results of a model differ by rounding only."""
    return _difference(result, expected) <= _limit(model, _ROUNDING)


def _limit(model: PreTrainedModel, limits: Mapping[Any, float]) -> float:
    if getattr(model, "is_quantized", False):
        return limits["quantized"]
    return (
        limits[torch.bfloat16]
        if torch.is_autocast_enabled(_device(model).type)
        else limits.get(model.dtype, limits[torch.bfloat16])
    )


def run_backbone(
    model: PreTrainedModel,
    input_ids: Tensor,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Return the last hidden states (B, T, d) of one pass of the backbone, without those arguments that it does not take."""
    kwargs = {"attention_mask": mask, "position_ids": position_ids, "use_cache": False, **kwargs}
    trunk = backbone(model)
    kwargs = {name: value for name, value in kwargs.items() if value is not None and takes(trunk, name)}
    return trunk(input_ids=input_ids, **kwargs)[0]


def takes(module: nn.Module, argument: str) -> bool:
    """Return True if a module's `forward` has such an argument."""
    return argument in inspect.signature(type(module).forward).parameters


def hidden_states(model: PreTrainedModel, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Return the last hidden states (B, T, d) of rows with padding on either side; positions count real tokens only.

    Models that do not read padding rightly get rows that begin in the first column: no token sees what follows it.
    """
    if anatomy(model).reads_padding:
        return run_backbone(model, input_ids, mask.long(), _positions(mask))
    order = left_justified(mask)
    states = run_backbone(model, input_ids.gather(1, order), mask.gather(1, order).long())
    return states.gather(1, order.argsort(dim=1)[..., None].expand_as(states))


def left_justified(mask: Tensor) -> Tensor:
    """Return the order of columns (B, T) in which each row begins with its real tokens."""
    return (~mask.bool()).int().argsort(dim=1, stable=True)


def head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Return the function that maps last hidden states (..., d) to logits (..., V)."""
    if anatomy(model).plain_head:
        return model.get_output_embeddings()

    def logits(states: Tensor) -> Tensor:
        rows = states.reshape(1, -1, states.shape[-1])
        with _backbone_replaced(model, rows):
            # The tokens do not matter, only their number.
            result = model(input_ids=torch.zeros(rows.shape[:2], dtype=torch.long, device=rows.device), use_cache=False)
        return result.logits.view(*states.shape[:-1], -1)

    return logits


def train_all(model: PreTrainedModel, made_of: Anatomy) -> PreTrainedModel:
    """Let all of a model's weights train but those that no gradient reaches; return the model."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in made_of.cut_off)
    return model


def head_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the parameters of what follows the backbone, tied embeddings included."""
    inside = {id(parameter) for parameter in backbone(model).parameters()}
    embedding = model.get_output_embeddings()
    own = [] if embedding is None else list(embedding.parameters())
    return own + [p for p in model.parameters() if id(p) not in inside and all(p is not q for q in own)]


def head_is_frozen(model: PreTrainedModel) -> bool:
    """Return True if nothing that logits are computed with trains, single rows of tied embeddings included."""
    parameters = [*head_parameters(model), *model.get_input_embeddings().parameters()]
    return not any(parameter.requires_grad for parameter in parameters)


class _States(BaseModelOutputWithPast):
    """Output of a backbone that has only hidden states; anything else that a head looks for is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def as_output(states: Tensor) -> BaseModelOutputWithPast:
    """Return hidden states in the form in which a backbone returns them."""
    return _States(last_hidden_state=states)


@contextlib.contextmanager
def _backbone_replaced(model: PreTrainedModel, states: Tensor) -> Iterator[None]:
    """Context in which the backbone returns these states, so that the model's own code computes logits from them."""
    trunk: Any = backbone(model)
    own = vars(trunk).get("forward")
    trunk.forward = lambda *args, **kwargs: as_output(states)
    try:
        yield
    finally:
        if own is None:
            del trunk.forward
        else:
            trunk.forward = own

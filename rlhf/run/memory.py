"""Running out of memory: refused before the first forward pass where that is certain, explained where it happens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import cast

import psutil
import torch
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from rlhf.base.errors import UserError
from rlhf.run.timing import PhaseTimer

_REMEDIES = {  # by phase; loading the models is in none
    "start": "set dtype bfloat16, quantization 4bit or, for PPO, offload_base; or take a smaller model",
    "train": "lower per_device_train_batch_size (and raise gradient_accumulation_steps as much), or set gradient_checkpointing",
    "preflight": "lower microbatch_size in PPO, per_device_train_batch_size elsewhere, or set gradient_checkpointing",
    "rollout": "lower rollout_batch_size or response_length",
    "score": "lower microbatch_size, or set microbatch_tokens",
    "optimise": "lower microbatch_size, or set microbatch_tokens or gradient_checkpointing",
    "evaluate": "lower microbatch_size in PPO, per_device_eval_batch_size elsewhere, or response_length",
}
# Allocators that raise a mere RuntimeError: main memory's, CUDA's own outside of torch's, and cuBLAS's.
_MESSAGES = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@contextlib.contextmanager
def explained(timer: PhaseTimer) -> Iterator[None]:
    """Turn running out of memory into one line that names the phase and the option to lower.

    Raises:
        UserError: in place of the allocator's error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        phase = timer.failed or "start"
        raise UserError(
            f"out of memory in the phase '{phase}': {_REMEDIES.get(phase, 'lower the batch sizes')}; checkpoints made before are "
            "intact, so --resume goes on from the last one"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for the errors of allocators that ran out of memory, on a GPU or in main memory."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in str(error) for text in _MESSAGES)


def cache_bytes(causal: PreTrainedModel, tokens: int) -> int:
    """Return the bytes of the keys and values of `tokens` tokens, in all layers."""
    config = causal.config.get_text_config()
    sizes = {name: value for name, value in config.to_dict().items() if type(value) is int}
    if not (query_heads := getattr(config, "num_attention_heads", None)):  # no attention
        return 0
    heads = sizes.get("num_key_value_heads") or query_heads
    width = sizes.get("head_dim") or config.hidden_size // query_heads
    return 2 * config.num_hidden_layers * heads * width * causal.dtype.itemsize * tokens


def free_bytes(device: torch.device) -> int:
    """Return the bytes that this process can still take on the device, those that torch holds in reserve included."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve


def total_bytes(device: torch.device) -> int:
    """Return the bytes of the device's memory."""
    if device.type != "cuda":
        return psutil.virtual_memory().total
    return torch.cuda.get_device_properties(device).total_memory


def rollout_bytes(causal: PreTrainedModel, *, responses: int, prompt: int, response: int, recorded: bool) -> int:
    """Return the bytes that a rollout holds for certain beside weights: keys and values, and the logits of a step in fp32.

    Recorded steps have a fixed cache, so the prompts' keys and values are there twice for a moment.
    """
    tokens = prompt + response + (prompt if recorded else 0)
    return cache_bytes(causal, responses * tokens) + 4 * responses * causal.config.get_text_config().vocab_size


def merged_bytes(causal: PreTrainedModel) -> int:
    """Return the bytes of the copies of those weights that adapters are merged into for a rollout."""
    layers = (layer.get_base_layer() for layer in causal.modules() if isinstance(layer, LoraLayer))
    weights = [cast(torch.Tensor, layer.weight) for layer in layers]
    return sum(weight.nbytes for weight in weights if not weight.is_meta)


def check_rollout_fits(
    models: torch.nn.Module,
    causal: PreTrainedModel,
    device: torch.device,
    *,
    responses: int,
    prompt: int,
    response: int,
    merged: bool,
    recorded: bool,
) -> None:
    """Refuse a rollout that does not fit beside the weights.

    Offloaded weights (on `meta`) do not count. Other work needs room as well, so passing proves nothing.

    Args:
        responses: of at most `response` tokens, to prompts of at most `prompt`.
        merged: the policy's adapter is merged into copies of its weights.
        recorded: steps are recorded as graphs.

    Raises:
        UserError: rollout and weights are larger than the device's whole memory.
    """
    rollout = rollout_bytes(causal, responses=responses, prompt=prompt, response=response, recorded=recorded)
    weights = sum(p.numel() * p.element_size() for p in models.parameters() if not p.is_meta)
    weights += merged_bytes(causal) if merged else 0
    total = total_bytes(device)
    if rollout + weights > total:
        raise UserError(
            f"{responses} responses of up to {prompt + response} tokens (prompts included) have {rollout / 1e9:.1f} GB of keys "
            f"and values and logits, beside {weights / 1e9:.1f} GB of weights{' and merged copies' if merged else ''}, and "
            f"there are {total / 1e9:.1f} GB: lower rollout_batch_size or response_length"
        )

"""The shared base and its adapters: policy, value, reward, and the reference (adapters off). The only peft import.

The frozen base of reward modelling and RL is the SFT policy itself: base model + SFT adapter, merged in memory. On that one
base sit small adapters, so the reference costs nothing and is exact: it is the base with its adapters switched off.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import torch
from accelerate import cpu_offload
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from rlhf.config import ComputeConfig, RewardConfig, StageConfig
from rlhf.data_prep.assets import resolve_model
from rlhf.errors import UserError
from rlhf.packing import pack_rows
from rlhf.registry import Artifact
from rlhf.tokenization import load_tokenizer
from rlhf.vocabulary import fit_embeddings

Role = Literal["policy", "value", "reward", "reference"]
ADAPTER_FILE = "adapter_model.safetensors"
#: What `has_plain_head` found.
_PLAIN_HEAD: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_SCORE_KEY = "base_model.model.score.weight"


@dataclass(frozen=True)
class Compute:
    """Where and in which type a run computes."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def choose(cls, config: ComputeConfig) -> Compute:
        """CUDA bf16 if there is a GPU; on a CPU bf16 where it has bf16 instructions (AMX or AVX512), else fp32."""
        device = (
            torch.device("cuda" if torch.cuda.is_available() else "cpu")
            if config.device == "auto"
            else torch.device(config.device)
        )
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError("device: cuda was asked for, but torch sees no CUDA device; use --device auto")
        if config.dtype != "auto":
            dtype = getattr(torch, config.dtype)
        elif device.type == "cuda":
            dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
        else:
            fast = torch.cpu.get_capabilities()
            dtype = torch.bfloat16 if fast.get("amx_bf16") or fast.get("avx512_bf16") else torch.float32
        # TF32 for what a bf16 run leaves in fp32; a run in float32 means all of its 24 bits.
        torch.backends.cuda.matmul.allow_tf32 = dtype == torch.bfloat16
        return cls(device, dtype)

    @property
    def bf16(self) -> bool:
        return self.dtype == torch.bfloat16

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision: the frozen base is held in bf16, adapters in fp32, products are computed in bf16."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    def __str__(self) -> str:
        name = (
            torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else f"{torch.get_num_threads()} threads"
        )
        return f"{self.device.type} ({name}), {str(self.dtype).removeprefix('torch.')}"


def load_base(
    name_or_path: str,
    config: ComputeConfig,
    compute: Compute,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal language model by hub name, folder, `pypi:` or `pretrain/` name, in the run's type, quantised if asked for."""
    try:
        model = AutoModelForCausalLM.from_pretrained(
            resolve_model(name_or_path, config.registry),
            revision=revision,
            dtype=compute.dtype,
            attn_implementation="sdpa" if config.attn_implementation == "auto" else config.attn_implementation,
            quantization_config=_quantization(config, compute),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,  # nothing else: a pickle can run code
        )
    except (OSError, ValueError) as error:
        allow = "; if you have read it and trust it: --trust_remote_code true" if "custom code" in str(error) else ""
        raise UserError(f"cannot load the model '{name_or_path}': {str(error).splitlines()[0]}{allow}") from error
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack 4-bit weights for a CPU kernel that has no backward pass: gradients silently wrong.
            cast(Any, module).support_avx512bf16_for_cpu = False
    model.config.use_cache = True
    if config.quantization == "none":
        cast(nn.Module, model).to(compute.device)
    if config.attn_implementation == "auto" and not pack_rows(model):
        print(f"{type(model).__name__} cannot be packed: padding and shared openings of prompts cost time")
    return model


def _quantization(config: ComputeConfig, compute: Compute) -> BitsAndBytesConfig | None:
    if config.quantization == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute.dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if config.quantization == "8bit" else None


def load_policy(
    artifact: Artifact, config: ComputeConfig, compute: Compute, adapter: Path | None = None
) -> PreTrainedModel:
    """The policy of an `sft` artefact as a plain causal model: its base with the adapter merged in memory.

    Args:
        adapter: folder of a finished PPO policy on it, which is merged in, too.
    """
    folders = [artifact.path] if adapter is None else [artifact.path, adapter]
    m = artifact.manifest
    return load_merged(m.base_model, folders, config, compute, revision=m.base_model_revision)


def load_merged(
    name_or_path: str,
    adapters: Sequence[Path],
    config: ComputeConfig,
    compute: Compute,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A model with the adapters of several folders merged in, one on the other, frozen.

    What is to be quantised is merged in full precision first and quantised afterwards: merging into 4-bit weights would round
    the adapters away.
    """
    plain = _without_quantization(config)
    merged = load_base(name_or_path, plain, compute, revision=revision, trust_remote_code=trust_remote_code)
    for folder in adapters:
        merged = merge_adapter(merged, folder)
    if config.quantization == "none":
        return merged
    with tempfile.TemporaryDirectory() as saved:
        merged.save_pretrained(saved)
        return load_base(saved, config, compute, trust_remote_code=trust_remote_code).requires_grad_(False)


def merge_adapter(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with a finished adapter merged in, for good: the base is used up."""
    fit_vocabulary(base, folder)
    try:
        adapted = PeftModel.from_pretrained(base, str(folder))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} holds no adapter for this model: {str(error).splitlines()[-1].strip()}") from error
    return cast(Any, adapted).merge_and_unload().requires_grad_(False)


def fit_vocabulary(base: PreTrainedModel, folder: Path) -> None:
    """Makes room for the tokens that the adapter in a folder has added; what is in the new rows comes with it.

    Raises:
        UserError: the tokenizer beside it does not have the tokens that it has rows for, or has more.
    """
    try:
        added = getattr(PeftConfig.from_pretrained(str(folder)), "trainable_token_indices", None)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} holds no adapter: {str(error).splitlines()[0]}") from error
    if not added:
        return
    largest = max(max(rows) for rows in (added.values() if isinstance(added, dict) else [added]))
    tokens = len(load_tokenizer(str(folder), chat_template="plain"))  # a template is not looked for: tokens are counted
    if largest != tokens - 1:
        raise UserError(
            f"the tokenizer of {folder} has {tokens} tokens, and its adapter was trained with {largest + 1}: "
            "two vocabularies; train it again"
        )
    fit_embeddings(base, tokens)


def _without_quantization(config: ComputeConfig) -> ComputeConfig:
    plain = copy.copy(config)
    plain.quantization = "none"
    return plain


def lora_config(
    config: StageConfig,
    task_type: str,
    *,
    dropout: float | None = None,
    new_tokens: dict[str, list[int]] | None = None,
) -> LoraConfig:
    """The adapter's shape. A reward model trains and saves its score head with it.

    Args:
        new_tokens: rows of embedding layers that it trains and saves, too: what `token_rows` returns.
    """
    targets = config.lora_target_modules
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout if dropout is None else dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        modules_to_save=["score"] if task_type == "SEQ_CLS" else None,
        trainable_token_indices=new_tokens,
        task_type=task_type,
    )


def token_rows(model: PreTrainedModel, tokens: Sequence[int]) -> dict[str, list[int]]:
    """Names of the embedding layers, the output's only where its weights are its own, -> the tokens' rows in them.

    Raises:
        UserError: the output layer has a bias, which peft's trained rows leave out.
    """
    layers = [model.get_input_embeddings()]
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UserError(
            f"the output layer of {type(model).__name__} has a bias, which rows that are trained alone would lose; "
            "leave out new_tokens and learn_tokens, or take another base model"
        )
    if not model.config.get_text_config().tie_word_embeddings:
        layers.append(model.get_output_embeddings())
    return {name: list(tokens) for name, module in model.named_modules() if any(module is layer for layer in layers)}


def with_adapter(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """The model with one fresh trainable adapter, in fp32 whatever the base is held in.

    Raises:
        UserError: the model has no such layers.
    """
    try:
        adapted = get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if "trainable_tokens_delta" in name:  # peft keeps these, and these only, in the base's type
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        return cast(PeftModel, adapted)
    except ValueError as error:
        raise UserError(
            f"lora_target_modules {config.target_modules} are not in {type(model).__name__}; use all-linear, or its layer names"
        ) from error


@contextlib.contextmanager
def direct_casting(model: nn.Module, compute: Compute) -> Iterator[None]:
    """Context for adapters under bf16 autocast: leaves out PEFT's cast of each layer's input to the adapter's fp32.

    Autocast would cast it straight back to bf16, so the products are the same, and two casts a layer cheaper. (PEFT's own
    `disable_input_dtype_casting` breaks at the layers of added tokens.)
    """
    layers = list(lora_layers(model).values()) if compute.bf16 else []
    was = [layer.cast_input_dtype_enabled for layer in layers]
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, was, strict=True):
            layer.cast_input_dtype_enabled = enabled


def sequence_classifier(causal: PreTrainedModel, pad_token_id: int, *, seed: int) -> PreTrainedModel:
    """A reward model around the same backbone: a score head in place of the language-model head.

    The fresh head is N(0, 1/sqrt(d+1)) (N+ implementation details, arXiv:2403.17031); weights are shared, not copied.
    """
    settings = {
        k: v for k, v in causal.config.to_dict().items() if k not in ("quantization_config", "id2label", "label2id")
    }
    config = type(causal.config).from_dict({**settings, "num_labels": 1, "pad_token_id": pad_token_id})
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config)
    setattr(classifier, classifier.base_model_prefix, backbone(causal))
    width = classifier.score.in_features
    head = ScalarHead(width, bias=False, dtype=torch.promote_types(causal.dtype, torch.float32))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(torch.randn(1, width, generator=generator) / (width + 1) ** 0.5)
    classifier.score = head.to(causal.device)
    classifier.config.dtype = causal.dtype
    return classifier


def backbone(causal: PreTrainedModel) -> nn.Module:
    """The transformer below the language-model head, ending in its last norm."""
    return getattr(causal, causal.base_model_prefix)


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether a causal model's logits are just its output embedding of the last hidden states: no scale, no soft cap.

    Tried with one short pass, once for each model.
    """
    if model not in _PLAIN_HEAD:
        # From the middle of the vocabulary: the embedding of a padding token may be all zeros.
        ids = torch.linspace(0.25, 0.75, 8, device=model.device).mul(model.config.get_text_config().vocab_size).long()
        states: list[Tensor] = []

        def enlarge(module: nn.Module, args: Any, output: Any) -> None:
            output.last_hidden_state = 100 * output.last_hidden_state  # a soft cap leaves small logits as they are
            states.append(output.last_hidden_state)

        hook = backbone(model).register_forward_hook(enlarge)
        try:
            logits = model(input_ids=ids[None], use_cache=False).logits.float()
        finally:
            hook.remove()
        plain = model.get_output_embeddings()(states[0]).float()
        _PLAIN_HEAD[model] = bool((plain - logits).norm() <= 1e-3 * plain.norm())
    return _PLAIN_HEAD[model]


def before_head(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """States (B, T, ...), and what makes logits (..., V) of any of them: of a plain head, which need not see all tokens, the
    last hidden states and the head; of others the logits, which stay as they are."""
    if has_plain_head(model):
        output = backbone(model)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return output.last_hidden_state, model.get_output_embeddings()
    return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits, nn.Identity()


def context_length(model: PreTrainedModel) -> int:
    """Tokens that the model has positions for; as good as endless where its config names no limit (ALiBi)."""
    return _positions(model.config)


def base_context_length(artifact: Artifact, registry: str) -> int:
    """The same of the model that an artefact is an adapter on, by its config alone.

    Raises:
        UserError: the base model is not there.
    """
    m = artifact.manifest
    place = resolve_model(m.base_model, registry)
    try:
        return _positions(AutoConfig.from_pretrained(place, revision=m.base_model_revision, trust_remote_code=False))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the model '{m.base_model}': {str(error).splitlines()[0]}") from error


def _positions(config: Any) -> int:
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize)


def save_adapter(model: PeftModel, folder: Path, *, adapter: str, base_model: str) -> None:
    """A peft adapter folder (`adapter_config.json`, `adapter_model.safetensors`) that plain peft opens.

    The same adapter gives the same bytes.
    """
    # Left to itself, peft brings both whole embeddings along wherever the vocabulary is not the base model's.
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / ADAPTER_FILE)
    config: Any = model.peft_config[adapter]
    changed = {"inference_mode": True, "base_model_name_or_path": base_model}
    if isinstance(config.target_modules, set):  # whose order is another one in every process
        changed["target_modules"] = sorted(config.target_modules)
    was = {name: getattr(config, name) for name in changed}
    try:
        vars(config).update(changed)
        config.save_pretrained(str(folder))
    finally:
        vars(config).update(was)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The layers that adapters sit on, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def read_adapter(model: PeftModel, folder: Path, *, adapter: str) -> None:
    """Puts what `save_adapter` wrote in place of an adapter's tensors; those that the file lacks stay as they are."""
    set_peft_model_state_dict(model, load_file(folder / ADAPTER_FILE), adapter_name=adapter)


@contextlib.contextmanager
def added_to_base(layers: Sequence[LoraLayer], adapter: str) -> Iterator[None]:
    """Inside, the adapter is added to *copies* of the base weights; whoever calls this switches the adapter itself off.

    Leaving puts the very same base tensors back, so that they stay bit-identical: subtracting the adapter again would not.
    """
    kept: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for layer in layers:
            weight = cast(nn.Parameter, layer.get_base_layer().weight)
            delta = cast(Any, layer).get_delta_weight(adapter)
            kept.append((weight, weight.data))
            weight.data = (weight.data + delta).to(weight.dtype)
        yield
    finally:
        for weight, data in kept:
            weight.data = data


@contextlib.contextmanager
def merged_adapter(model: PeftModel, adapter: str) -> Iterator[None]:
    """Inside, a model with one adapter computes with it merged in, as whoever loads it will."""
    layers = list(lora_layers(model).values())
    try:
        for layer in layers:
            layer._disable_adapters = True
        with torch.no_grad(), added_to_base(layers, adapter):
            yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def trainable_reward_model(
    base: PreTrainedModel, config: RewardConfig, pad_token_id: int
) -> PreTrainedModel | PeftModel:
    """The SFT policy as a reward model to be trained: an adapter and a head on it, or all of its weights, in fp32.

    The policy is used up: its weights are shared, and change in full fine-tuning.
    """
    if config.finetuning == "lora":
        classifier = sequence_classifier(base, pad_token_id, seed=config.seed)
        return with_adapter(classifier, lora_config(config, "SEQ_CLS"))
    whole: Any = nn.Module.to(base, torch.promote_types(base.dtype, torch.float32))
    return sequence_classifier(whole, pad_token_id, seed=config.seed).requires_grad_(True)


def save_reward_model(model: PreTrainedModel | PeftModel, folder: Path, *, base_model: str) -> None:
    """The adapter with its head as plain peft opens it, or the whole model as plain transformers opens it."""
    if isinstance(model, PeftModel):
        save_adapter(model, folder, adapter="default", base_model=base_model)
    else:
        model.save_pretrained(folder)


def load_reward_model(
    folder: Path, policy: Artifact, config: ComputeConfig, compute: Compute, pad_token_id: int
) -> PreTrainedModel | PeftModel:
    """A saved reward model, frozen: the adapter and head of the folder on the SFT policy, or the whole model in it.

    Raises:
        UserError: the folder holds no score head, or no model.
    """
    if not (folder / ADAPTER_FILE).is_file():
        return _load_whole_reward_model(folder, config, compute)
    read_score_head(folder)
    classifier = sequence_classifier(load_policy(policy, config, compute), pad_token_id, seed=0)
    return PeftModel.from_pretrained(classifier, str(folder)).to(compute.device).eval().requires_grad_(False)


def _load_whole_reward_model(folder: Path, config: ComputeConfig, compute: Compute) -> PreTrainedModel:
    dtype = torch.promote_types(compute.dtype, torch.float32)
    attention = "sdpa" if config.attn_implementation == "auto" else config.attn_implementation
    try:
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the reward model in {folder}: {str(error).splitlines()[0]}") from error
    head = ScalarHead(model.score.in_features, bias=False, dtype=dtype)
    head.load_state_dict(model.score.state_dict())
    model.score = head
    model.to(compute.device)
    if config.attn_implementation == "auto":
        pack_rows(model)
    return model.eval().requires_grad_(False)


def read_score_head(folder: Path) -> Tensor:
    """The score head (1, d) that was saved with a reward adapter.

    Raises:
        UserError: there is none (a reward model saved without it scores at random).
    """
    state = load_file(folder / ADAPTER_FILE)
    if _SCORE_KEY not in state:
        raise UserError(f"{folder} holds no score head ({_SCORE_KEY}); train the reward model again")
    return state[_SCORE_KEY]


class ScalarHead(nn.Linear):
    """A linear head to one number that computes in its own type, outside autocast: a score must not be rounded to bf16."""

    def __init__(self, width: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(width, 1, bias=bias, dtype=dtype)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))


class RoleModels(nn.Module, abc.ABC):
    """Who answers in PPO: `policy`, `value`, `reward` and `reference`, one of them at a time (`role`).

    Subclasses say where the weights are: adapters on one frozen base (`SharedModels`), or a model for each
    (`rlhf.full.SeparateModels`). Heads and what is read off the hidden states are the same.
    """

    def __init__(self, width: int, compute: Compute, *, shared_trunk: bool) -> None:
        super().__init__()
        self.compute, self.shared_trunk = compute, shared_trunk
        head_dtype = torch.promote_types(compute.dtype, torch.float32)
        self.reward_head = ScalarHead(width, bias=False, dtype=head_dtype).requires_grad_(False)
        self.value_head = ScalarHead(width, bias=True, dtype=head_dtype)
        self.reward_mean, self.reward_std = 0.0, 1.0

    @property
    @abc.abstractmethod
    def causal(self) -> PreTrainedModel:
        """The causal model that answers now."""

    @abc.abstractmethod
    def role(self, role: Role) -> contextlib.AbstractContextManager[None]:
        """Inside, the models answer as `role`."""

    @abc.abstractmethod
    def merged_policy(self) -> contextlib.AbstractContextManager[PreTrainedModel]:
        """Inside, the policy as a plain model for fast sampling."""

    @abc.abstractmethod
    def trainable(self, role: Literal["policy", "value"]) -> dict[str, nn.Parameter]:
        """The parameters that the role's loss changes, by name."""

    @abc.abstractmethod
    def load_reward(self, folder: Path, mean: float, std: float) -> None:
        """A trained reward model; the value model starts from it."""

    @abc.abstractmethod
    def fresh_value(self, config: LoraConfig) -> None:
        """A value model that knows nothing, where no reward model is there to start from: all values are 0."""

    @abc.abstractmethod
    def save_policy(self, folder: Path, *, base_model: str) -> None:
        """What is registered of the policy."""

    @contextlib.contextmanager
    def training_as(self, role: Role) -> Iterator[None]:
        """As `role`, for a forward pass *and its backward*: activations that are computed again need the same adapter."""
        with self.role(role), direct_casting(self, self.compute):
            yield

    def _no_dropout(self) -> None:
        """For good, so that `train()` cannot bring it back."""
        self.eval()
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(
                getattr(module, "attention_dropout", None), float
            ):  # a number, not a module, in Llama and others
                cast(Any, module).attention_dropout = 0.0

    def _start_value_head(self, head: Tensor, mean: float, std: float) -> None:
        """The *normalised* score, which is what the returns are made of."""
        with torch.no_grad():
            self.value_head.weight.copy_(head / std)
            self.value_head.bias.fill_(-mean / std)

    def hidden(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Last hidden states (B, T, d) of whoever has the role; positions count real tokens, whatever the padding."""
        position_ids = (mask.long().cumsum(dim=1) - 1).clamp_min(0)
        with self.compute.autocast(), direct_casting(self, self.compute):
            output = backbone(self.causal)(
                input_ids=input_ids, attention_mask=mask.long(), position_ids=position_ids, use_cache=False
            )
        return output.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (N, V) of flat hidden states (N, d): flat, so the head is one product and copies nothing."""
        with self.compute.autocast():
            return self.causal.get_output_embeddings()(hidden)

    def values(self, hidden: Tensor) -> Tensor:
        """Values of flat hidden states (N, d), fp32 or better."""
        return self.value_head(hidden).squeeze(-1)

    def scores(self, hidden: Tensor) -> Tensor:
        """Normalised scores of the last real token's hidden states (B, d): 0 is the mean of the demonstrations."""
        return (self.reward_head(hidden).squeeze(-1) - self.reward_mean) / self.reward_std


class SharedModels(RoleModels):
    """One frozen base, three adapters: `policy` (fresh, so it starts as the SFT model), `reward` (frozen) and `value`.

    `policy` and `value` train, with the value head; everything else is frozen. `role` chooses who answers; the reference is
    the base with all adapters off. With `shared_trunk` there is no value adapter: the value head sits on the policy's.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        policy: LoraConfig,
        compute: Compute,
        *,
        shared_trunk: bool = False,
        offload: bool = False,
    ) -> None:
        """With `offload` the frozen weights stay in main memory; each layer's are brought in while it computes."""
        super().__init__(base.config.hidden_size, compute, shared_trunk=shared_trunk)
        self.offload = offload
        base.requires_grad_(False)
        self.peft = get_peft_model(base, policy, adapter_name="policy")
        if not offload:
            self.to(compute.device)
        self._no_dropout()
        self._role: Role = "policy"
        self._layers = list(lora_layers(self.peft).values())
        check_plain_head(base)

    @property
    def causal(self) -> PreTrainedModel:
        """The causal model with its adapters in place."""
        return cast(PreTrainedModel, self.peft.get_base_model())

    def load_reward(self, folder: Path, mean: float, std: float) -> None:
        """Puts a trained reward adapter and its head on the base, and starts the value adapter and head from them.

        A head on the policy's trunk starts at 0: the reward's head reads another trunk.

        Raises:
            UserError: the folder holds no score head (a reward model saved without it scores at random).
        """
        head = read_score_head(folder)
        state = {key: tensor for key, tensor in load_file(folder / ADAPTER_FILE).items() if key != _SCORE_KEY}
        saved = LoraConfig.from_pretrained(str(folder))
        for name in ("reward",) if self.shared_trunk else ("reward", "value"):
            config = LoraConfig(
                r=saved.r,
                lora_alpha=saved.lora_alpha,
                target_modules=saved.target_modules,
                use_rslora=saved.use_rslora,
                use_dora=saved.use_dora,
                task_type="CAUSAL_LM",
            )
            try:
                self.peft.add_adapter(name, config)
                result: Any = set_peft_model_state_dict(self.peft, dict(state), adapter_name=name)
            except (ValueError, RuntimeError) as error:  # no such layers, or layers of another size
                raise UserError(
                    f"{folder} was made for another model: {str(error).splitlines()[-1].strip()}"
                ) from error
            wrong = [*result.unexpected_keys, *(key for key in result.missing_keys if f".{name}." in key)]
            if wrong:
                raise UserError(f"{folder} was made for another model: {wrong[0]} is on one side only")
        with torch.no_grad():
            self.reward_head.weight.copy_(head)
        if not self.shared_trunk:
            self._start_value_head(head, mean, std)
        self.reward_mean, self.reward_std = mean, std
        self._adapters_added()

    def fresh_value(self, config: LoraConfig) -> None:
        """A value adapter and head that know nothing, where no reward adapter is there to start from: all values are 0."""
        if not self.shared_trunk:
            self.peft.add_adapter("value", copy.deepcopy(config))
        self._adapters_added()

    def save_policy(self, folder: Path, *, base_model: str) -> None:
        """The policy's adapter, as plain peft opens it."""
        save_adapter(self.peft, folder, adapter="policy", base_model=base_model)

    @classmethod
    def finished(cls, base: PreTrainedModel, folder: Path | None, compute: Compute) -> SharedModels:
        """The base with a finished policy's adapter, as `save_policy` left it, or (None) with one that changes nothing.

        `release` gives the base back.

        Raises:
            UserError: the folder holds no adapter for this base.
        """
        if folder is None:
            return cls(base, LoraConfig(r=1, target_modules="all-linear"), compute)
        try:
            config = cast(LoraConfig, LoraConfig.from_pretrained(str(folder)))
            config.inference_mode, config.base_model_name_or_path = (
                False,
                None,
            )  # peft would warn of the base's other name
            state = load_file(folder / ADAPTER_FILE)
            models = cls(base, config, compute)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(
                f"{folder} holds no adapter for this model: {str(error).splitlines()[-1].strip()}"
            ) from error
        try:
            result: Any = set_peft_model_state_dict(models.peft, state, adapter_name="policy")
            wrong = [*result.unexpected_keys, *(key for key in result.missing_keys if ".policy." in key)]
        except RuntimeError as error:  # layers of another size
            wrong = [str(error).splitlines()[-1].strip()]
        if wrong:
            models.release()
            raise UserError(f"{folder} was made for another model: {wrong[0]} is on one side only")
        return models

    def release(self) -> PreTrainedModel:
        """The base as it was, without adapters: these models are used up."""
        return cast(Any, self.peft).unload()

    def merged_reward(self) -> PreTrainedModel:
        """The base with the reward adapter merged in, for good: these models are used up."""
        return cast(Any, self.peft).merge_and_unload(adapter_names=["reward"])

    def _adapters_added(self) -> None:
        self._layers = list(lora_layers(self.peft).values())
        for layer in self._layers:
            layer.set_adapter("policy")
        for name, parameter in self.peft.named_parameters():
            parameter.requires_grad_(_is_adapter(name, "policy") or _is_adapter(name, "value"))
        if self.offload:
            _offload_frozen(self, self.compute.device)
        else:
            self.to(self.compute.device)

    def trainable(self, role: Literal["policy", "value"]) -> dict[str, nn.Parameter]:
        """The parameters that the role's loss changes, by name."""
        named = {n: p for n, p in self.peft.named_parameters() if _is_adapter(n, role)}
        if role == "value":
            named |= {f"value_head.{n}": p for n, p in self.value_head.named_parameters()}
        return named

    @contextlib.contextmanager
    def role(self, role: Role) -> Iterator[None]:
        """Inside, the base answers as `role`; outside, as before. `requires_grad` stays as it was found."""
        before = self._role
        try:
            self._answer_as(role)
            yield
        finally:
            self._answer_as(before)

    def _answer_as(self, role: Role) -> None:
        """Sets what peft's `set_adapter` and `enable_adapters` set. These also turn `requires_grad` of every weight off and
        on, 25 ms for 210 layers, and which weights train does not depend on who answers."""
        adapter = "policy" if role == "value" and self.shared_trunk else role
        for layer in self._layers:
            layer._disable_adapters = role == "reference"
            if role != "reference":
                layer._active_adapter = [adapter]
        self._role = role

    @contextlib.contextmanager
    def merged_policy(self) -> Iterator[PreTrainedModel]:
        """Inside, the policy as a plain model for fast sampling: the adapter is added to the base weights.

        A quantised or offloaded base cannot be merged; it samples with the adapter on.
        """
        mergeable = all(
            type(layer.get_base_layer()).__module__.startswith(("torch.", "transformers.")) for layer in self._layers
        )
        if self.offload or not mergeable or cast(LoraConfig, self.peft.peft_config["policy"]).use_dora:
            with self.role("policy"):
                yield self.causal
            return
        with self.role("reference"), added_to_base(self._layers, "policy"):
            yield self.causal


def _offload_frozen(models: nn.Module, device: torch.device) -> None:
    """Moves what trains, and the buffers, to the device; accelerate's hooks bring the rest in, a layer at a time."""
    for module in models.modules():
        own = list(module.parameters(recurse=False))
        if own and not any(p.requires_grad for p in own):
            cpu_offload(module, execution_device=device)
        else:
            for tensor in (*own, *module.buffers(recurse=False)):
                tensor.data = tensor.data.to(device)


def _is_adapter(name: str, role: str) -> bool:
    """Whether a parameter belongs to a role's adapter: a layer of the base may itself be called `value`."""
    return re.search(rf"\.lora_\w+\.{role}(\.|$)", name) is not None


def check_plain_head(model: PreTrainedModel) -> None:
    """Refuses a model whose logits are more than its output embedding of the last hidden state (soft caps, scales)."""
    if not has_plain_head(model):
        raise UserError(
            f"{type(model).__name__} changes its logits after the output embedding, which PPO does not support"
        )

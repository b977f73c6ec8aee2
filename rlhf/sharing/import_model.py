"""Models that were trained elsewhere enter the registry: `rlhf registry import FOLDER --as STAGE/NAME`.

An SFT policy stays in its folder (or an adapter is copied); a reward model becomes an adapter with a score head on the
policy where it is one on the very same weights, else a whole model. Its scores are those that it gave before, in their unit:
a head's bias is matrices as the mean that is subtracted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.base.errors import UserError, require
from rlhf.base.json_files import read_object
from rlhf.config import ComputeConfig
from rlhf.doctor.probe import Probe
from rlhf.models.adapters import ADAPTER_CONFIG, ADAPTER_FILE, attach_adapter, fitted, save_adapter, with_adapter
from rlhf.models.base import load_base, load_policy
from rlhf.models.catalogue import MODEL_PREFIX, recorded_name, resolve_model
from rlhf.models.classifiers import GENERIC, open_classifier
from rlhf.models.compute import Compute
from rlhf.models.inputs import model_inputs
from rlhf.models.reward_model import load_reward_model, sequence_classifier
from rlhf.models.templates import template_text
from rlhf.models.tokenization import (
    encode_prompt,
    encode_response,
    freeze_date,
    load_tokenizer,
    stop_token_ids,
    tokenizer_hashes,
)
from rlhf.registry import IMPORTED, Artifact, Reference, Registry, parse_reference, recipe_hash
from rlhf.reward.parity import require_parity
from rlhf.reward.scorer import Scorer

_CPU = Compute(torch.device("cpu"), torch.float32)
_VALUE_HEADS = ("value_head.safetensors", "v_head.safetensors")
_SCORE, _HEAD = "base_model.model.score.weight", "v_head.summary.weight"
_TEXTS = (
    ("What is a tide?", "The rise and fall of the sea, twice a day."),
    ("Name a colour.", "Blue"),
    ("Write one line about snow.", "It fell all night and the town was quiet in the morning."),
    ("2 + 2?", "4"),
)


class Foreign(NamedTuple):
    """A reward model as it was found, in the form of the registry."""

    score: Callable[[list[int]], Tensor]
    """Raw score of one token row, without the head's bias."""
    bias: float
    save_adapter: Callable[[Path], object] | None
    """Writes its adapter and head, to be put on `base`; None: it is a whole model."""
    save_whole: Callable[[Path], object]
    base: PreTrainedModel | None
    """The model that the adapter was trained on."""


def command(registry: Registry, arguments: argparse.Namespace, console: Console) -> None:
    """Import a model: the verb `import`."""
    target, folder = parse_reference(arguments.target), _local(arguments.folder)
    require(target.version is None, f"versions are counted by the registry; give {target.stage}/{target.name}")
    registry.require_writable(target.stage, target.name)
    try:
        artifact = _import(registry, folder, target, arguments)
    except SafetensorError as error:
        raise UserError(f"{arguments.folder} holds weights that cannot be read: {error}") from error
    kind = "an adapter" if artifact.manifest.kind == "adapter" else "a whole model"
    console.print(f"registered {artifact.reference}, {kind}, from {arguments.folder}", soft_wrap=True)


def _import(registry: Registry, folder: Path, target: Reference, arguments: argparse.Namespace) -> Artifact:
    if target.stage == "sft":
        require(arguments.policy is None, "--policy is for reward models; an SFT policy has no parent")
        return import_policy(registry, folder, target.name, arguments.folder, arguments.base, arguments.chat_template)
    if target.stage == "reward":
        require(
            arguments.policy is not None,
            "a reward model needs --policy sft/NAME, the policy that PPO starts from; one that was trained elsewhere, too, "
            "is imported first: rlhf registry import FOLDER --as sft/NAME",
        )
        policy = registry.get(arguments.policy, expect_stage="sft")
        return import_reward(registry, folder, target.name, policy, arguments.base, arguments.chat_template)
    raise UserError(f"only sft/NAME and reward/NAME can be imported, not {target}")


def _local(name: str) -> Path:
    """Return the folder of a model: the one that is named, or that of a hub name in the cache, without pickles."""
    if Path(name).is_dir():
        return Path(name)
    try:
        if name.startswith(MODEL_PREFIX):
            return Path(resolve_model(name))
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except (OSError, ValueError) as error:
        raise UserError(f"no folder {name}, and no model of this name: {str(error).splitlines()[0]}") from error


def import_policy(
    registry: Registry, folder: Path, name: str, model_name: str, base: str | None, chat_template: str | None
) -> Artifact:
    """Register an SFT policy: a whole model, which stays in its folder, or an adapter, which is copied.

    Args:
        model_name: the user's name of the model in the folder: the folder itself, or a hub name.
    """
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    base_model = _base_of(folder, base) if is_adapter else recorded_name(model_name)
    tokenizer = load_tokenizer(_tokenizer_place(folder, base_model), chat_template=chat_template)
    freeze_date(tokenizer, date.today())
    model = load_base(base_model, _config(registry), _CPU)
    if is_adapter:
        with tempfile.TemporaryDirectory() as scratch:
            _registry_form(folder, Path(scratch), head=None)
            adapted = attach_adapter(model, Path(scratch))
    else:
        adapted = with_adapter(
            model, fitted(model, LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM"))
        )
        for parameter in (p for n, p in adapted.named_parameters() if ".lora_" in n):
            torch.nn.init.zeros_(parameter)  # an adapter of no effect

    def write(target: Path) -> None:
        save_adapter(adapted, target, adapter="default", base_model=base_model)

    return _publish(registry, "sft", name, folder, write, [], tokenizer, base_model, kind="adapter")


def import_reward(
    registry: Registry, folder: Path, name: str, policy: Artifact, base: str | None, chat_template: str | None
) -> Artifact:
    """Register a reward model whose scores are those that it gave before.

    Raises:
        UserError: the folder holds no reward model that can be read, or one whose scores change.
    """
    with tempfile.TemporaryDirectory() as scratch:
        form, saved = Path(scratch, "form"), Path(scratch, "saved")
        for empty in (form, saved):
            empty.mkdir()
        base_model = _base_of(folder, base) if (folder / ADAPTER_CONFIG).is_file() else recorded_name(str(folder))
        tokenizer = _reward_tokenizer(_tokenizer_place(folder, base_model), policy, chat_template)
        pad, config = int(tokenizer.pad_token_id), _config(registry)
        model = _open(folder, form, base_model, pad, config)
        rows = [_encode(tokenizer, *texts) for texts in _TEXTS]
        with torch.no_grad():
            scores = torch.stack([model.score(row) for row in rows])
        save_adapter = model.save_adapter if _on_policy(model.base, policy, tokenizer, config) else None
        (save_adapter or model.save_whole)(saved)
        loaded = load_reward_model(saved, policy, config, _CPU, pad)
        scorer = Scorer(loaded, tokenizer, _CPU, len(rows), mean=-model.bias, std=1.0)
        difference = require_parity(scores, scorer, rows)

        def write(target: Path) -> None:
            for file in saved.iterdir():
                shutil.move(file, target)  # the registry may be on another disk than temporary files
            Probe.of(rows, scores, torch.float32).save(target)

        return _publish(
            registry, "reward", name, folder, write, [policy], tokenizer,
            policy.manifest.base_model if save_adapter else base_model,
            kind="adapter" if save_adapter else "full",
            reward_mean=-model.bias, reward_std=1.0, metrics={"reload_difference": difference},
        )  # fmt: skip


# Reading what others wrote


def _open(folder: Path, form: Path, base_model: str, pad: int, config: ComputeConfig) -> Foreign:
    """Open a reward model, in float32; `form` is an empty folder for its adapter."""
    _refuse_pickles(folder)
    weight, bias = _value_head(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        _registry_form(folder, form, weight)
        base = load_base(base_model, config, _CPU)
        try:
            adapted = attach_adapter(sequence_classifier(base, pad, seed=0), form).eval()
        except UserError as error:
            raise UserError(f"{folder} does not fit on {base_model}: {str(error).partition(': ')[2]}") from error

        def merge(target: Path) -> None:
            cast(Any, adapted).merge_and_unload().save_pretrained(target)

        return Foreign(partial(_score, adapted), bias, partial(shutil.copytree, form, dirs_exist_ok=True), merge, base)
    try:
        own = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no model: {str(error).splitlines()[0]}") from error
    if weight is not None:
        classifier: Any = sequence_classifier(load_base(str(folder), config, _CPU), pad, seed=0)
        shape = tuple(classifier.score.weight.shape)
        require(
            weight.shape == shape, f"the value head in {folder} is {tuple(weight.shape)}, and the model has {shape}"
        )
        classifier.score.weight.data = weight
    elif any(name.endswith(("ForSequenceClassification", GENERIC)) for name in own.architectures or []):
        classifier = _classifier(folder)
        classifier.config.pad_token_id = pad
    else:
        raise UserError(
            f"{folder} holds no reward model: neither a sequence classifier, nor an adapter with a score head, nor a value head "
            f"({_VALUE_HEADS[0]}, or {_HEAD} among the weights)"
        )

    def save(target: Path) -> None:
        """Write the weights in the type that they were stored in; a value head is always in float32."""
        head = classifier.score.weight.detach().clone()
        classifier.to(own.dtype or torch.float32)
        if weight is not None:
            classifier.score.weight.data = head
        classifier.save_pretrained(target)

    return Foreign(partial(_score, classifier.eval()), bias, None, save, None)


def _classifier(folder: Path) -> Any:
    try:
        classifier = open_classifier(folder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the reward model in {folder}: {str(error).splitlines()[0]}") from error
    outputs = int(classifier.config.num_labels)
    require(outputs == 1, f"{folder} has {outputs} outputs; a reward model has one")
    score = getattr(classifier, "score", None)
    require(
        isinstance(score, torch.nn.Linear) and score.bias is None,
        f"{type(classifier).__name__} has no score of the last token; give the folder to PPO as it is: --reward {folder}",
    )
    return classifier


def _score(model: Any, row: list[int]) -> Tensor:
    """Return the score of one row alone, so without padding."""
    return cast(Tensor, model(input_ids=torch.tensor([row]), use_cache=False).logits[0, 0])


def _refuse_pickles(folder: Path) -> None:
    """Raise `UserError` where needed weights exist only as a pickle, which can run code when it is loaded."""
    wanted = {"value_head.bin": "value_head.safetensors"}
    if not (folder / ADAPTER_CONFIG).is_file():
        wanted["pytorch_model.bin"] = "model.safetensors"
    else:
        wanted["adapter_model.bin"] = ADAPTER_FILE
        if read_object(folder / ADAPTER_CONFIG).get("task_type") != "SEQ_CLS":
            wanted["pytorch_model.bin"] = "v_head.safetensors"  # TRL's, beside its adapter
    for pickle, safe in wanted.items():
        others = list(folder.glob(safe.replace(".safetensors", "*.safetensors").replace("v_head", "v*_head")))
        if (folder / pickle).is_file() and not others:
            raise UserError(
                f"{folder / pickle} is a pickle, which can run code when it is loaded. Where you trust it, convert it in its "
                f'folder: python -c "import torch; from safetensors.torch import save_file; save_file({{k: v.contiguous() for '
                f"k, v in torch.load('{pickle}', weights_only=True).items()}}, '{safe}')\""
            )


def _value_head(folder: Path) -> tuple[Tensor | None, float]:
    """Return weight (1, d) and bias of TRL's or LLaMA-Factory's value head; None where there is none."""
    files = [folder / name for name in _VALUE_HEADS if (folder / name).is_file()]
    files += [] if files else [file for file in sorted(folder.glob("model*.safetensors")) if _holds(file, _HEAD)]
    if not files:
        return None, 0.0
    with safe_open(files[0], "pt") as head:
        parts = {key.rpartition("summary.")[2]: key for key in head.keys() if "summary." in key}  # noqa: SIM118
        require("weight" in parts, f"{files[0]} holds no {_HEAD}")
        bias = float(head.get_tensor(parts["bias"])) if "bias" in parts else 0.0
        return head.get_tensor(parts["weight"]).float(), bias


def _holds(file: Path, name: str) -> bool:
    with safe_open(file, "pt") as weights:
        return name in weights.keys()  # noqa: SIM118


def _registry_form(folder: Path, form: Path, head: Tensor | None) -> None:
    """Write an adapter as this package does; with a head (of its own, or given), as a reward model.

    Raises:
        UserError: it is no LoRA adapter that can be read, or a reward model without a head.
    """
    require((folder / ADAPTER_FILE).is_file(), f"{folder} holds no {ADAPTER_FILE}")
    settings, state = read_object(folder / ADAPTER_CONFIG), load_file(folder / ADAPTER_FILE)
    is_reward = head is not None or settings.get("task_type") == "SEQ_CLS"
    heads = [key for key in state if ".score." in key and ".lora_" not in key]
    if is_reward and head is None:
        require(
            len(heads) == 1,
            f"{folder} holds no score head ({_SCORE}), so its scores would be random: it was trained without "
            'modules_to_save=["score"]',
        )
        head = state[heads[0]]
        require(len(head) == 1, f"{folder} has {len(head)} outputs; a reward model has one")
    matrices = {key.replace(".default.", "."): tensor for key, tensor in state.items() if ".lora_" in key}
    other = sorted(set(state) - set(heads) - {key for key in state if ".lora_" in key})
    require(
        not other,
        f"{folder} holds {other[:1]} beside LoRA matrices; merge it into its base first, with its own project",
    )
    if isinstance(settings.get("target_modules"), str):  # a pattern: the layers themselves are in the file
        settings["target_modules"] = sorted(
            {key.partition(".lora_")[0].removeprefix("base_model.model.") for key in matrices}
        )
    if settings.get("init_lora_weights") == "gaussian":  # where training began
        del settings["init_lora_weights"]
    settings |= {
        "task_type": "SEQ_CLS" if is_reward else "CAUSAL_LM",
        "modules_to_save": ["score"] if is_reward else None,
    }
    (form / ADAPTER_CONFIG).write_text(json.dumps(settings), encoding="utf-8")
    if is_reward and head is not None:
        matrices[_SCORE] = head.float()
    save_file({key: tensor.contiguous() for key, tensor in matrices.items()}, form / ADAPTER_FILE)


def _base_of(folder: Path, base: str | None) -> str:
    """Return the name of the model that an adapter is for: the user's, or that in its config."""
    name = base or str(read_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    require(bool(name), f"{folder / ADAPTER_CONFIG} names no base model; give it: --base FOLDER")
    if name.startswith(("/", ".")) and not Path(name).is_dir():
        raise UserError(f"the base model of {folder} was in {name}, which is not here; give its folder: --base FOLDER")
    return recorded_name(name)


def _on_policy(
    base: PreTrainedModel | None, policy: Artifact, tokenizer: PreTrainedTokenizerBase, config: ComputeConfig
) -> bool:
    """Return whether an adapter's base has the very weights of the policy, and reads its tokens."""
    m = policy.manifest
    if base is None or tokenizer_hashes(tokenizer) != {
        "tokenizer_hash": m.tokenizer_hash,
        "chat_template_hash": m.chat_template_hash,
    }:
        return False
    own, other = base.state_dict(), load_policy(policy, config, _CPU).state_dict()
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in own.items() if ".lora_" not in name}
    return plain.keys() == other.keys() and all(torch.equal(plain[name], other[name]) for name in other)


# Tokens


def _tokenizer_place(folder: Path, base_model: str) -> str:
    return str(folder) if _has_tokenizer(folder) else base_model


def _has_tokenizer(folder: Path) -> bool:
    return any(folder.glob("tokenizer*")) or any(folder.glob("vocab.*"))


def _reward_tokenizer(place: str, policy: Artifact, chat_template: str | None) -> PreTrainedTokenizerBase:
    """Return the policy's tokenizer where it has the same tokens and template, else the reward model's own."""
    theirs = load_tokenizer(str(policy.path))
    if Path(place).is_dir() and not _has_tokenizer(Path(place)):
        return theirs
    try:
        own: Any = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError):  # none was saved with it
        return theirs
    template = template_text(chat_template) if chat_template else own.chat_template
    # At the policy's import or training a date may have been settled in front of the template.
    same = template is None or str(theirs.chat_template).endswith(str(template))
    if own.get_vocab() == theirs.get_vocab() and same:
        return theirs
    tokenizer = load_tokenizer(place, chat_template=chat_template)
    freeze_date(tokenizer, date.today())
    return tokenizer


def _encode(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> list[int]:
    prompt = [{"role": "user", "content": question}]
    return encode_prompt(tokenizer, prompt) + encode_response(
        tokenizer, prompt, [{"role": "assistant", "content": answer}]
    )


# Registering


def _config(registry: Registry) -> ComputeConfig:
    return ComputeConfig(registry=str(registry.root), device="cpu", dtype="float32", attn_implementation="sdpa")


def _publish(
    registry: Registry,
    stage: str,
    name: str,
    folder: Path,
    write: Callable[[Path], None],
    parents: list[Artifact],
    tokenizer: PreTrainedTokenizerBase,
    base_model: str,
    **fields: Any,
) -> Artifact:
    def write_all(target: Path) -> None:
        write(target)
        tokenizer.save_pretrained(target)

    options = {IMPORTED: recorded_name(str(folder)), "quantization": "none"}
    inputs = model_inputs(base_model, registry.root) if fields["kind"] == "adapter" else {}
    return registry.publish(
        stage,
        name,
        write_all,
        parents=parents,
        base_model=base_model,
        **tokenizer_hashes(tokenizer),
        pad_token_id=int(tokenizer.pad_token_id),
        stop_token_ids=stop_token_ids(tokenizer),
        data={"fingerprint": None, "rows": {}},
        config=options,
        inputs=inputs,
        recipe=recipe_hash(options, [p.hash for p in parents], None),
        **{"metrics": {}, **fields},
    )

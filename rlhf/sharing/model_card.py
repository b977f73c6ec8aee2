"""Model cards of exported artefacts, made from the manifests of the artefact and its ancestors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, model_info, try_to_load_from_cache

from rlhf.models.catalogue import MODEL_PREFIX, MODELS
from rlhf.registry import IMPORTED, Artifact, Registry
from rlhf.registry.lineage import ancestors, data_lines
from rlhf.registry.outcome import overlap_lines

SUMMARIES = {
    "pretrain": "A language model trained from scratch on plain text, with a byte-level BPE tokenizer of its own.",
    "sft": "A language model fine-tuned on demonstrations, with the loss on the answers only.",
    "reward": "A reward model that scores an answer to a prompt, trained on people's rankings of answers.",
    "ppo": "A language model trained by PPO against a reward model, with a KL penalty to its SFT model.",
}

GENERATE = """import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
{load}
prompt = [{{"role": "user", "content": "..."}}]
inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0, inputs["input_ids"].shape[1]:]))"""

SCORE = """import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
{load}
chat = [{{"role": "user", "content": "..."}}, {{"role": "assistant", "content": "..."}}]
text = tokenizer.apply_chat_template(chat, tokenize=False)
text = text[: text.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)]  # the score is read at the stop token
raw = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, 0]
score = (raw - {mean}) / {std}  # 0 is the mean of the demonstrations"""

SCORE_GENERIC = """from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

# transformers has no sequence classifier of this architecture: the backbone is opened in a causal model, whose own head is not
# used (it warns of that), and the score head is read from the file. `rlhf` opens the folder as it is, as in --reward FOLDER.
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
backbone = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval().get_submodule({trunk!r})
weights = [load_file(file) for file in Path(FOLDER).glob("*.safetensors")]
head = next(part["score.weight"] for part in weights if "score.weight" in part).float()
chat = [{{"role": "user", "content": "..."}}, {{"role": "assistant", "content": "..."}}]
text = tokenizer.apply_chat_template(chat, tokenize=False)
text = text[: text.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)]  # the score is read at the stop token
ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
raw = (backbone(input_ids=ids)[0][0, -1] @ head[0]).item()
score = (raw - {mean}) / {std}  # 0 is the mean of the demonstrations"""


def model_card(registry: Registry, artifact: Artifact, form: str, dtype: str, trunk: str | None = None) -> str:
    """Return the card as Markdown, with the metadata that the Hugging Face hub reads.

    Args:
        trunk: the backbone's name, for a reward model that transformers has no class for.
    """
    m = artifact.manifest
    parts = [
        _front_matter(artifact, form),
        f"# {artifact.reference}\n\n{SUMMARIES[artifact.stage]}",
        _facts(artifact, form, dtype),
        f"## Use\n\n```python\n{_usage(artifact, form, trunk)}\n```",
        "## Lineage\n\n" + "\n".join(_lineage(registry, artifact)),
        "## Figures\n\n" + _table(m.metrics, skip=("phases",)),
        "## Options\n\n" + _table(m.config, skip=("registry", "output_dir")),
        "## Data\n\n" + _table(m.data),
        f"Made by rlhf at code {m.code_commit or 'unknown'}; manifest sha256 `{artifact.hash}`"
        + (f", W&B run `{m.wandb_run_id}`." if m.wandb_run_id else "."),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(artifact: Artifact, form: str) -> str:
    base, licence = public_base(artifact.manifest.base_model)
    data = ModelCardData(
        library_name="peft" if form == "adapter" else "transformers",
        pipeline_tag="text-classification" if artifact.stage == "reward" else "text-generation",
        base_model=base,
        license=licence,
        tags=["rlhf", artifact.stage],
    )
    return f"---\n{data.to_yaml()}\n---"


def public_base(name: str) -> tuple[str | None, str | None]:
    """Return a base model's name on the hub and its licence; None for what is not there or not stated."""
    if name.startswith(MODEL_PREFIX):
        model = MODELS[name.removeprefix(MODEL_PREFIX)]
        return model.hub, model.asset.licence.lower()
    if Path(name).is_dir():
        return None, _licence(Path(name) / "README.md")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("pretrain/"):
        return None, None
    card = try_to_load_from_cache(name, "README.md")
    return name, _licence(Path(card)) if isinstance(card, str) else _licence_on_the_hub(name)


def _licence(card: Path) -> str | None:
    try:
        return ModelCard.load(card).data.license
    except (OSError, ValueError, UnicodeError, yaml.YAMLError):
        return None


def _licence_on_the_hub(name: str) -> str | None:
    try:
        facts = model_info(name, timeout=5).card_data
    except (
        Exception
    ):  # offline, or the hub's client fails in one of its many ways: a card without it is better than none
        return None
    return facts.license if facts else None


def _facts(artifact: Artifact, form: str, dtype: str) -> str:
    m = artifact.manifest
    base = m.base_model + (f" at {m.base_model_revision}" if m.base_model_revision else "")
    if m.base_model.startswith(MODEL_PREFIX):
        base += f", a 4-bit copy of {public_base(m.base_model)[0]} whose weights differ from it by rounding"
    content = "one adapter on the base model" if form == "adapter" else f"the whole model, adapters merged in, {dtype}"
    lines = [f"- base model: {base}", f"- this folder: {content}", f"- registered: {m.created}"]
    lines.append(f"- pad token {m.pad_token_id}, stop tokens {', '.join(map(str, m.stop_token_ids))}")
    lines += [f"- {line}: the figures are too good" for line in overlap_lines(artifact.stage, m.data)]
    return "\n".join(lines)


def _usage(artifact: Artifact, form: str, trunk: str | None) -> str:
    code = _code(artifact, form, trunk)
    if IMPORTED in artifact.manifest.config:
        code = code.replace(
            "# 0 is the mean of the demonstrations", "# in the unit that it was trained with, elsewhere"
        )
    return code


def _code(artifact: Artifact, form: str, trunk: str | None) -> str:
    m, reward = artifact.manifest, artifact.stage == "reward"
    if trunk is not None:
        return SCORE_GENERIC.format(trunk=trunk, mean=m.reward_mean, std=m.reward_std)
    kind = "AutoModelForSequenceClassification" if reward else "AutoModelForCausalLM"
    labels = ", num_labels=1" if reward else ""
    load = f"model = {kind}.from_pretrained(FOLDER, dtype=torch.float32)"
    if form == "adapter":
        load = (
            f"base = {kind}.from_pretrained({m.base_model!r}{labels}, dtype=torch.float32)\n"
            + ("base.config.pad_token_id = tokenizer.pad_token_id\n" if reward else "")
            + "model = PeftModel.from_pretrained(base, FOLDER).eval()"
        )
    text = (SCORE if reward else GENERATE).format(load=load, mean=m.reward_mean, std=m.reward_std)
    return text.replace("import torch\n", "import torch\nfrom peft import PeftModel\n") if form == "adapter" else text


def _lineage(registry: Registry, artifact: Artifact) -> list[str]:
    """Return a line for each ancestor and the artefact, parents first, with data and parents."""
    lines = []
    for line in ancestors(registry.lineage(artifact)):
        if line.artifact is None:
            lines.append(f"- {line.reference}: {line.problem}")
            continue
        inputs = [*data_lines(line.artifact), *(str(parent.reference) for parent in line.artifact.manifest.parents)]
        lines.append(f"- `{line.reference}` ({line.artifact.hash[:12]}), from " + "; ".join(inputs))
    return lines


def _table(values: Mapping[str, Any], skip: tuple[str, ...] = ()) -> str:
    rows = [f"| {name} | {_cell(value)} |" for name, value in values.items() if name not in skip]
    return "\n".join(["| | |", "|---|---|", *rows])


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")

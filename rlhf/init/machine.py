"""The machine and the base model: what the sizes of a run depend on, beside the data."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import AutoConfig

from rlhf.config import ComputeConfig
from rlhf.models.catalogue import local_folder
from rlhf.models.compute import Compute

SMALL_MODEL = "pypi:smollm2-135m-instruct"
#: Hub models (Apache-2.0) by the GB of GPU memory that they need at least; the last that fits is the default.
GPU_MODELS = {0: "Qwen/Qwen2.5-0.5B-Instruct", 16: "Qwen/Qwen2.5-1.5B-Instruct"}
#: Assumed where neither the model nor its name tells its size.
USUAL_PARAMETERS, USUAL_CONTEXT = 1.5e9, 2048


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Processor or GPU, memory and cores of this machine."""

    gpu: str
    """Its name; empty on a CPU."""
    memory: float
    """GB of the GPU, or else of the machine."""
    cores: int
    bf16: bool

    @classmethod
    def look(cls) -> Machine:
        """Return the machine that this runs on."""
        compute = Compute.choose(ComputeConfig())
        gpu = torch.cuda.get_device_properties(compute.device) if compute.device.type == "cuda" else None
        memory = gpu.total_memory if gpu else psutil.virtual_memory().total
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return cls(gpu=gpu.name if gpu else "", memory=memory / 1e9, cores=cores, bf16=compute.bf16)

    @property
    def default_model(self) -> str:
        """The base model where the user names none."""
        return [name for least, name in GPU_MODELS.items() if least <= self.memory][-1] if self.gpu else SMALL_MODEL

    def __str__(self) -> str:
        units = "bf16" if self.bf16 else "no bf16 units: float32"
        return f"{self.gpu or f'CPU, {self.cores} cores'}, {self.memory:.0f} GB, {units}"


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A base model, as far as it is known before it is loaded."""

    name: str
    folder: Path | None
    """Where it is on this machine, or None."""
    parameters: float
    measured: bool
    """True if its files or its name tell the number of parameters."""
    context: int
    """Tokens that it has positions for."""

    @classmethod
    def look(cls, name: str) -> BaseModel:
        """Return a model by its name, without downloading it."""
        folder = local_folder(name)
        context, size = USUAL_CONTEXT, 0.0
        if folder:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            context = getattr(config.get_text_config(), "max_position_embeddings", None) or USUAL_CONTEXT
            width = 2 if config.dtype in (torch.bfloat16, torch.float16) else 4
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / width
        written = re.search(r"(\d+(?:\.\d+)?)\s*([bm])\b", name, re.IGNORECASE)
        if not size and written:
            size = float(written[1]) * {"b": 1e9, "m": 1e6}[written[2].lower()]
        return cls(
            name=name, folder=folder, parameters=size or USUAL_PARAMETERS, measured=size > 0, context=int(context)
        )

    def __str__(self) -> str:
        size = f"{self.parameters / 1e6:,.0f}M parameters"
        return f"{self.name}, about {size}" if self.measured else f"{self.name}, not on this machine; assumed: {size}"

    @property
    def small(self) -> bool:
        """True if it takes the demo's step sizes; larger models take those published for LoRA."""
        return self.parameters <= 3e8

"""The folder of configs, each line with its reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf.base import storage
from rlhf.config import yaml_value
from rlhf.data_prep import Source
from rlhf.init.sizes import FILES, Entry, Sizes
from rlhf.init.survey import Survey

#: Column at which comments begin.
COMMENTS = 44
TITLES = {
    "sft": "Stage 1: the model learns to answer as the demonstrations do.",
    "reward": "Stage 2: which of two answers do people prefer?",
    "ppo": "Stage 3: PPO towards answers that score well, held near the SFT model by the KL penalty.",
    "evaluate": "The policy beside the SFT model, on held-out prompts; rlhf pipeline does it at the end.",
}


def texts(sizes: Sizes, data: Survey, stages: Iterable[str]) -> dict[str, str]:
    """Return the files of a folder by name: `data.yaml` and those of the stages."""
    files = {
        "data.yaml": _render(
            "Data: the files, and how the rows become three sets. Paths begin in the folder where the commands run.",
            _data(sizes, data),
        )
    }
    for stage in stages:
        files[f"{stage}.yaml"] = _render(TITLES[stage], FILES[stage](sizes, data))
    return files


def write_folder(folder: Path, files: dict[str, str]) -> None:
    """Write the files into a new or empty folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        storage.write_text(folder / name, text)


def _data(sizes: Sizes, data: Survey) -> list[Entry]:
    recipe = data.recipe
    shares = "no stage trains on them"
    stages = {
        "shared": "every prompt serves all stages: the data are too few to share them out (disjoint)",
        "disjoint": "a prompt serves one stage only, so that none is judged on what another learnt; or: shared",
    }
    cut = recipe.long_prompts != "drop"
    longer = (
        "of longer ones the end is kept"
        if cut
        else "longer prompts are left out; long_prompts: truncate_left cuts them"
    )
    similar = "texts at least so similar count as copies; 1 because the prompts share a template"
    return [
        ("output_dir", f"outputs/{sizes.name}/data", "made once, and again when this file changes"),
        ("sources", None, ""),
        *(entry for pair in zip(recipe.sources, data.sources, strict=True) for entry in _source(*pair)),
        ("tokenizer", recipe.tokenizer, "lengths are counted with it"),
        *([("chat_template", recipe.chat_template, "as in sft.yaml")] if recipe.chat_template else []),
        ("max_prompt_length", recipe.max_prompt_length, f"tokens; {longer}"),
        *([("long_prompts", recipe.long_prompts, "or: drop, which leaves too few")] if cut else []),
        ("validation_share", recipe.validation_share, f"share of the prompts held out for evaluation: {shares}"),
        ("test_share", recipe.test_share, "share of the prompts set aside for one last look"),
        ("stages", recipe.stages, stages[recipe.stages]),
        *([("similarity", recipe.similarity, similar)] if recipe.similarity == 1 else []),
    ]


def _source(source: Source, report: dict[str, Any]) -> list[Entry]:
    """Return the entries of a source: what the user gave, what was chosen, and the licence, which is the user's to state."""
    plain = {f.name: f.default for f in dataclasses.fields(Source) if f.default is not dataclasses.MISSING}
    others = {
        k: v for k, v in vars(source).items() if k in plain and v != plain[k] and k not in ("name", "licence", "reader")
    }
    columns = {"columns": source.column_map} if source.columns else {}
    return [
        ("  - path", source.path, f"{report['rows']:,} rows"),
        ("    reader", report["reader"], report["evidence"]),
        *((f"    {name}", value, "") for name, value in {**columns, **others}.items()),
        ("    licence", source.licence, "write it here: it goes on the data card"),
    ]


def _render(title: str, entries: Iterable[Entry]) -> str:
    lines = [f"# {title}"]
    for option, value, reason in entries:
        line = f"{option}:" if value is None else f"{option}: {yaml_value(value)}"
        lines.append(f"{line:{COMMENTS}}  # {reason}" if reason else line)
    return "\n".join(lines) + "\n"

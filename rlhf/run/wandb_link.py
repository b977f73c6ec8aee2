"""What the tracker asks of Weights & Biases."""

from __future__ import annotations

import logging
import netrc
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rlhf.base.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)


WANDB_MODES = ("auto", "online", "offline", "disabled")


INIT_TIMEOUT_SECONDS = 30.0
"""How long a start waits for the W&B server before the run is kept offline instead."""


FINISH_TIMEOUT_SECONDS = 300.0
"""How long the end of a run waits for its last uploads."""


def resolve_wandb_mode(mode: str) -> str:
    """`online`, `offline` or `disabled`, for any of `WANDB_MODES`. Under `auto`, WANDB_MODE decides first."""
    if mode not in WANDB_MODES:
        raise UserError(
            f"wandb_mode is '{mode}'; it must be one of {', '.join(WANDB_MODES)}{did_you_mean(mode, WANDB_MODES)}"
        )
    if mode != "auto":
        return mode
    from_environment = os.environ.get("WANDB_MODE", "").lower()
    from_environment = {"dryrun": "offline", "run": "online", "shared": "online"}.get(
        from_environment, from_environment
    )
    if from_environment in WANDB_MODES[1:]:
        return from_environment
    if from_environment:
        raise UserError(f"WANDB_MODE is '{from_environment}'; it must be one of {', '.join(WANDB_MODES[1:])}")
    return "online" if has_wandb_key() else "offline"


def has_wandb_key() -> bool:
    """Whether there is a key for W&B, in the environment or in netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = os.environ.get("WANDB_BASE_URL")
    hosts = (
        [urlsplit(server).netloc] if server else ["api.wandb.ai", "api.forge.coreweave.com"]
    )  # `wandb login` writes these
    files = [Path(os.environ["NETRC"])] if "NETRC" in os.environ else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for file in files:
        try:
            entries = netrc.netrc(file.expanduser())
        except (OSError, netrc.NetrcParseError):
            continue
        if any(entries.authenticators(host) for host in hosts):
            return True
    return False


def _knock() -> None:
    """Raises when nobody answers at the W&B server: wandb's own attempts at one that is silent have no common end."""
    import requests

    # An answer of any kind will do, a broken certificate too: what to make of it is wandb's to say.
    with suppress(requests.exceptions.SSLError):
        requests.head(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai", timeout=INIT_TIMEOUT_SECONDS)


def split_reference(reference: str) -> tuple[str, str, str]:
    """`sft/demo@2` -> (`sft`, `sft-demo`, `2`): type, name and alias of a W&B artifact, in the characters it allows."""
    path, _, version = reference.partition("@")
    return path.split("/")[0], re.sub(r"[^A-Za-z0-9_.-]+", "-", path), re.sub(r"[^A-Za-z0-9_.-]+", "-", version)


def _model_artifact(reference: str, path: str | Path, metadata: Mapping[str, Any]) -> Any:
    """A W&B artifact for a folder of the registry, by reference: its digest is that of the files, wherever they are."""
    import wandb

    artifact_type, name, _ = split_reference(reference)
    artifact = wandb.Artifact(name, type=artifact_type, metadata={"reference": reference, **metadata})
    artifact.add_reference(Path(path).absolute().as_uri())
    return artifact

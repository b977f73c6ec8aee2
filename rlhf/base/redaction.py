"""Removal of secrets from anything stored or printed: by name, in URLs, from the environment, and by format."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

# Names of entries with a secret: `token` alone, but not `pad_token` or `num_tokens`.
_SECRET_NAME = re.compile(
    r"(^|[_.-])(api_?key|secret|password|passwd|authorization|credentials?|(access|auth|api|hf|bearer)_token)$|^token$",
    re.I,
)
_SECRET_VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$")
# Secrets in a text, and their replacements.
_SECRET_TEXTS = [
    (re.compile(r"://[^/\s@]+@"), "://***@"),
    (re.compile(r"([?&][\w-]*(?:key|token|secret|password|passwd|signature|sig|auth)=)[^&\s#'\",;)]+", re.I), r"\1***"),
    (re.compile(r"((?:api_?key|(?:access|auth|hf)_token|secret|password|passwd)=)[^&\s'\",;)]+", re.I), r"\1***"),
    (re.compile(r"\b(bearer +)[\w.~+/=-]{12,}", re.I), r"\1***"),
    (re.compile(r"\b(hf_|wandb_v\d_|sk-|gh[a-z]_|github_pat_)[\w-]{16,}"), r"\1***"),
]


def redact(value: Any) -> Any:
    """Return a copy of `value`, in plain JSON types, with secrets replaced by `***`.

    Secrets are entries with names such as `api_key`; user names, passwords and tokens in URLs; keys in the formats of known
    services; and the values of environment variables such as WANDB_API_KEY, wherever they appear.
    """
    hidden = [v for k, v in os.environ.items() if _SECRET_VARIABLE.search(k.upper()) and len(v) >= 8]
    return _redact(value, hidden)


def _redact(value: Any, hidden: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {
            str(name): "***" if entry and _SECRET_NAME.search(str(name)) else _redact(entry, hidden)
            for name, entry in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [_redact(entry, hidden) for entry in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    text = str(value)
    for pattern, replacement in _SECRET_TEXTS:
        text = pattern.sub(replacement, text)
    for secret in hidden:
        text = text.replace(secret, "***")
    return text

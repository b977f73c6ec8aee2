"""Removal of secrets from anything stored or printed: by name, in URLs, from the environment, and by format."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

_SECRET_VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$")
_WORDS = (
    r"(?:api[_-]?keys?|(?:access|account|private|shared[_-]?access|signing|encryption)[_-]?key(?:[_-]id)?"
    r"|(?:client[_-]?)?secrets?(?:[_-]access)?(?:[_-]key)?|passw(?:or)?ds?|passphrase|pwd|authorization|(?:set-)?cookie"
    r"|credentials?|jwt|(?:access|auth|api|hf|bearer|refresh|session|id)[_-]?tokens?)"
)
# Names of entries with a secret: `token` alone, but not `pad_token` or `num_tokens`.
_SECRET_NAME = re.compile(rf"(^|[^A-Za-z0-9]){_WORDS}$|^(token|auth|bearer)s?$", re.I)
_NAME = rf"(?:[\w.-]{{0,60}}[_.-])?{_WORDS}"
_OPTION = re.compile(rf"--?(?:{_NAME}|token)", re.I)
_PARAMETER = (
    r"x-amz-[\w-]+|[\w.-]{0,60}(?:key|token|secret|password|passwd|pwd|signature|sig|auth|access|code|credential|jwt|session)"
    r"[\w-]{0,60}"
)
_QUOTED = r"'[^'\n]*'|\"[^\"\n]*\""
# Secrets in a text, and their replacements.
_SECRET_TEXTS = [
    # user:password@host, with a scheme and without
    (re.compile(r"://[^/\s?#]+@"), "://***@"),
    (re.compile(r"\b(?!mailto:)[\w.-]{1,100}:[^\s/:@]+(?:@[^\s/@]+)*@(?=[\w-]+(?:\.|(?::\d+)?(?:/|$|\s)))"), "***@"),
    # ?token=...
    (re.compile(rf"([?&;](?:{_PARAMETER})=)[^&\s#'\",;)]+", re.I), r"\1***"),
    # Authorization: Bearer ...
    (re.compile(r"(?i:\b(bearer|basic)) +(?=[\w.~+/=-]*(?:[0-9=]|[a-z][A-Z]))[\w.~+/=-]{8,}"), r"\1 ***"),
    # api_key: ..., 'api_key': '...', API_KEY=..., --api_key ..., and as YAML and JSON in texts write them
    (
        re.compile(
            rf"(?<![\w-])((?:\\*['\"])?{_NAME}(?:\\*['\"])?\s*[:=]\s*|--?{_NAME}\s+)(?!['\"]?(?:bearer|basic)\b)"
            rf"(?:!\S*\s+|[>|][+-]?(?:\\n|\s)\s*|(?:token|digest|negotiate)\s+)?"
            rf"(?:{_QUOTED}|(?:\\*['\"])?[^\s'\",;)}}\]&\\]+)",
            re.I,
        ),
        r"\1***",
    ),
    (re.compile(rf"(?<![\w-])(['\"]token['\"]\s*:\s*)(?:{_QUOTED})", re.I), r"\1***"),
    # token=..., --token ..., MY_TOKEN=..., netrc's password ..., unless they are words or numbers
    (
        re.compile(
            r"(?<![\w-])((?:--?token[ =]|token['\"]?\s*[:=]\s*|(?-i:[A-Z_]+TOKEN)=|password\s+)['\"]?)"
            r"(?=[\w.~+/-]*\d)(?=[\w.~+/-]*[a-z])[\w.~+/-]{8,}",
            re.I,
        ),
        r"\1***",
    ),
    # formats of known services
    (
        re.compile(
            r"\b(hf_|wandb_v\d_|sk-|[sr]k_(?:live|test)_|gh[a-z]_|github_pat_|glpat-|xox[a-z]-|npm_|pypi-)[\w-]{16,}"
        ),
        r"\1***",
    ),
    (re.compile(r"\b(hooks\.slack\.com/services/)[\w/-]+"), r"\1***"),
    (re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bAIza[\w-]{35}"), "***"),
    (re.compile(r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*"), "***"),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S), "***"),
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
        entries = list(value)
        named = [isinstance(name, str) and bool(_OPTION.fullmatch(name)) for name in ["", *entries]]  # --api_key VALUE
        return ["***" if secret else _redact(entry, hidden) for entry, secret in zip(entries, named, strict=False)]
    if value is None or isinstance(value, bool | int | float):
        return value
    text = str(value)
    for pattern, replacement in _SECRET_TEXTS:
        text = pattern.sub(replacement, text)
    for secret in hidden:
        text = text.replace(secret, "***")
    return text

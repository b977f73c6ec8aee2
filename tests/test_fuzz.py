"""Files that are not what they should be: one clear line, or a page without them, never a traceback.

Each try spoils a valid file at a place and in a way that its number decides, and reads it as a command would.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from registry.test_registry import FIELDS, publish
from report.test_comparison import made_up_evaluation, made_up_run

from rlhf.base.errors import UserError
from rlhf.doctor import diagnosis
from rlhf.models.adapters import read_adapter_config
from rlhf.registry import MANIFEST, Registry
from rlhf.report.__main__ import main as report
from rlhf.sharing.__main__ import main as registry_command

JUNK: tuple[Any, ...] = (
    None, True, 0, -1, -5, 3.5, 10**30, 10**400, float("nan"), float("inf"), -1e308, "", "x", "1", "\ud800", "\x1b[31m", "../..",
    "x" * 5000, [], {}, [None], [[]], ["x"], {"": None}, {"value": []}, {"a": {"b": [1]}}, [1, 2, 3], [{}], [{"name": 1}],
)  # fmt: skip
TRIES = (pytest.param(100, id="100"), pytest.param(1000, id="1000", marks=pytest.mark.slow))


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a value with each of its keys."""
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from places(part)


def junk(rng: random.Random) -> Any:
    if rng.random() < 0.05:
        return json.loads("[" * 300 + "]" * 300)
    return copy.deepcopy(rng.choice(JUNK))


def spoil_value(value: Any, rng: random.Random) -> Any:
    """The value with a few parts dropped, replaced or added."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 8))):
        if not (spots := list(places(value))):
            return junk(rng)
        container, key = rng.choice(spots)
        action = rng.random()
        if action < 0.2:
            del container[key]
        elif action < 0.8:
            container[key] = junk(rng)
        elif isinstance(container, dict):
            container[rng.choice(("x", "", "step", "name", "__class__", "\ud800"))] = junk(rng)
        else:
            container.insert(key, junk(rng))
    return value


def spoil_bytes(raw: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(raw) + 1)
    action = rng.randrange(4)
    if action == 0:
        return raw[:at]
    if action == 1:
        return raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]
    added = (b"\x00", b"\xff\xfe", b"{", b"]", b"[" * 100_000, b"9" * 5000, b"\r", b"\xef\xbb\xbf", b"\n\n", b'"')
    return raw[:at] + rng.choice(added) + raw[at:] if action == 2 else rng.choice((b"", b"null", b"[]", b"0", b'"x"'))


def spoil(raw: bytes, rng: random.Random) -> bytes:
    """A file's bytes, or the values in it, spoilt; a `.jsonl` file in one line or in the same way in all."""
    if rng.random() < 0.25:
        return spoil_bytes(raw, rng)
    lines = raw.splitlines()
    try:
        rows = [json.loads(line) for line in lines]
    except ValueError:
        return json.dumps(spoil_value(json.loads(raw), rng), indent=2).encode() + b"\n"
    seed = rng.random()
    chosen = range(len(rows)) if rng.random() < 0.5 else [rng.randrange(len(rows))]
    for number in chosen:
        rows[number] = spoil_value(rows[number], random.Random(seed))
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def attempt(action: Callable[[], object]) -> str:
    """Run an action with standard output as a pipe has it; return its complaint, which must be one that users see."""
    output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    try:
        with contextlib.redirect_stdout(output):
            action()
            output.flush()
    except UserError as error:
        assert str(error).strip()
        return str(error)
    return ""


def command(main: Callable[[], object], monkeypatch: pytest.MonkeyPatch, *words: object) -> str:
    monkeypatch.setattr(sys, "argv", ["rlhf", *map(str, words)])
    return attempt(main)


def explained(try_number: int, spoilt: bytes, action: Callable[[], object]) -> None:
    """Run an action on a spoilt file; whatever else it raises is shown with the file."""
    try:
        action()
    except Exception as error:
        raise AssertionError(f"try {try_number}: {type(error).__name__} of {spoilt[:3000]!r}") from error


@pytest.mark.parametrize("tries", TRIES)
def test_manifests(tmp_path: Path, tries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of them with their checksum made again, as an attacker would."""
    registry = Registry(tmp_path / "registry")
    fields = {**FIELDS, "base_model": str(tmp_path / "no base"), "inputs": {"base model": "ab", "reward a.b:c": "cd"}}
    figures = {"sft/loss": 1.25, "phases": [{"phase": "train", "seconds": 2.5, "peak_rss_gb": 1.0}]}
    config = {**FIELDS["config"], "dataset": "outputs/data", "output_dir": str(tmp_path)}
    first = publish(registry, **{**fields, "metrics": figures, "config": config})
    publish(registry, "reward", [first], **fields, reward_mean=0.5, reward_std=2.0)
    publish(registry, "ppo", [first], **fields)
    lines = ("list", "verify", "prune", "show sft/demo", "show reward/demo", "lineage ppo/demo", "lineage sft/demo --json",
             "diff sft/demo reward/demo", "diff ppo/demo sft/demo --json")  # fmt: skip
    complaints = 0
    for number in range(tries):
        rng = random.Random(number)
        file = registry.root / rng.choice(("sft", "reward", "ppo")) / "demo" / "v1" / MANIFEST
        whole = file.read_bytes()
        spoilt = spoil(whole, rng)
        with contextlib.suppress(ValueError, AttributeError):
            if rng.random() < 0.5:
                content = {k: v for k, v in json.loads(spoilt).items() if k != "checksum"}
                checksum = hashlib.sha256(json.dumps(content).encode()).hexdigest()
                spoilt = (json.dumps({**content, "checksum": checksum}, indent=2) + "\n").encode()
        file.write_bytes(spoilt)
        words = rng.choice(lines).split()

        def run(words: list[str] = words) -> None:
            nonlocal complaints
            complaint = attempt(lambda: registry_command(["--registry", str(registry.root), *words]))
            complaints += bool(complaint)
            attempt(lambda: Registry(registry.root).get("ppo/demo"))

        explained(number, spoilt, run)
        file.write_bytes(whole)
    assert complaints > tries / 10
    assert attempt(lambda: registry_command(["--registry", str(registry.root), "verify"])).count("BAD") == 0


@pytest.mark.parametrize("tries", [1000])
def test_adapter_configs(tmp_path: Path, tries: int) -> None:
    """peft reads these with whatever types they have, and imports modules that they name."""
    whole = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "use_dora": False,
        "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["score"], "trainable_token_indices": {"embed": [1, 2]},
        "base_model_name_or_path": "base", "fan_in_fan_out": False, "use_rslora": False, "layer_replication": None,
        "rank_pattern": {}, "megatron_core": "megatron.core", "inference_mode": True, "bias": "none",
    }  # fmt: skip
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(whole))
    attempt(lambda: read_adapter_config(tmp_path))
    complaints = 0
    for number in range(tries):
        spoilt = spoil(json.dumps(whole).encode(), random.Random(number))
        file.write_bytes(spoilt)

        def run() -> None:
            nonlocal complaints
            complaints += bool(attempt(lambda: read_adapter_config(tmp_path)))

        explained(number, spoilt, run)
    assert tries / 2 < complaints


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run with every file that the doctor and the pages read."""
    registry = Registry(tmp_path / "registry")
    sft = publish(registry)
    run = made_up_run(tmp_path / "run", registry, (sft, publish(registry, "reward", [sft])))
    shutil.copy(made_up_evaluation(tmp_path / "evaluation") / "evaluation.json", run)
    (run / "ppo" / "checkpoints").mkdir()
    settings = {"reward": ["reward/demo@1"], "kl_target": 0.1, "value_warmup_updates": 2, "rollout_batch_size": 8}
    (run / "ppo" / "checkpoints" / "made_of.json").write_text(json.dumps(settings))
    samples = [{"step": s, "prompt": f"p{s}", "response": f"r{s}", "score": 0.5} for s in range(1, 9)]
    (run / "ppo" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    (run / "data").mkdir()
    card = {"rows": {"comparisons/train": 90}, "splits": {"seed": 1}, "sources": [{"name": "a"}], "fingerprint": "ef"}
    (run / "data" / "card.json").write_text(json.dumps(card))
    return run


LOGS = ("ppo/metrics.jsonl", "ppo/samples.jsonl", "ppo/comparison.jsonl", "ppo/checkpoints/made_of.json")
CARDS = (
    "results.json",
    "reward/card.json",
    "data/card.json",
    "evaluation.json",
    "ppo/tracking.json",
    "ppo/manifest.json",
)


@pytest.mark.parametrize("tries", TRIES)
@pytest.mark.parametrize("names", [LOGS, CARDS], ids=["logs", "cards"])
def test_run_folders(run_folder: Path, names: tuple[str, ...], tries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor, the run's page, and the page that compares it with another run."""
    monkeypatch.setattr("rlhf.report.page._plotly_gzip_base64", lambda: "")  # 2 MB that no file decides
    other = shutil.copytree(run_folder, run_folder.with_name("other"))
    page = run_folder.parent / "page.html"
    evaluation = run_folder.with_name("evaluation")
    for number in range(tries):
        rng = random.Random(number)
        name = rng.choice(names)
        file = run_folder / name
        whole = file.read_bytes()
        spoilt = spoil(whole, rng)
        file.write_bytes(spoilt)
        if name == "evaluation.json":
            shutil.copy(file, evaluation)

        def run() -> None:
            attempt(lambda: diagnosis.main([str(run_folder)]))
            command(report, monkeypatch, run_folder)
            command(report, monkeypatch, run_folder, other, evaluation, "-o", page, "--force")

        explained(number, spoilt, run)
        file.write_bytes(whole)

"""The data sheets hold what they say, and the tests look."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import shapes
import torch
from test_models import ppo_config, sequences, shared_models

from rlhf.models.sampling import Sampled
from rlhf.models.sequences import Sequences
from rlhf.ppo import forward
from rlhf.ppo.types import Rollout


@pytest.mark.parametrize("sheet", [Sequences, Rollout, Sampled])
def test_the_shape_of_every_field_is_checked(sheet: type) -> None:
    """Catches: a field that was added without a shape."""
    assert shapes.SHEETS[sheet].keys() == {field.name for field in dataclasses.fields(sheet)}


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("responses", torch.ones(3, 5, dtype=torch.long)),  # one column more than the mask
        ("prompts", torch.ones(2, 5, dtype=torch.long)),  # one row less
        ("mask", torch.ones(3, 4)),  # no booleans
    ],
)
def test_a_wrong_shape_is_found_where_it_is_made(field: str, wrong: torch.Tensor) -> None:
    """Catches: checks that are not switched on, or that look at each field alone."""
    with pytest.raises(TypeError, match=r"Sequences\.\w+ is torch\.\w+ \("):
        dataclasses.replace(sequences(), **{field: wrong})


def test_a_forward_pass_of_another_shape_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: values with a column of their own, which would broadcast against log-probabilities (B, R)."""
    models = shared_models("gpt2", tmp_path, ppo_config())
    monkeypatch.setattr(forward, "_scatter", lambda flat, mask: flat[:, None])
    with pytest.raises(TypeError, match="the result of token_values"):
        forward.token_values(models, sequences())


def test_all_public_passes_are_checked() -> None:
    """Catches: a forward pass that was added without its shape."""
    public = {name for name, made in vars(forward).items() if callable(made) and made.__module__ == forward.__name__}
    assert shapes.RESULTS.keys() | {"prepare"} == {
        name for name in public if not name.startswith("_")
    }  # which returns nothing

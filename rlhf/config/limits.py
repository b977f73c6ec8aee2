"""Checks of option values; each raises a `UserError` that names the option and the value given."""

from __future__ import annotations

from rlhf.base.errors import require


def require_at_least(smallest: int, config: object, *names: str) -> None:
    """Raises `UserError` for the first of the options that is set and is less."""
    for name, value in _given(config, names):
        require(value >= smallest, f"{name} must be at least {smallest}, got {value}")


def require_above_zero(config: object, *names: str) -> None:
    """Raises `UserError` for the first of the options that is set and is 0 or less."""
    for name, value in _given(config, names):
        require(value > 0, f"{name} must be above 0, got {value}")


def require_below_one(config: object, *names: str) -> None:
    """Raises `UserError` for the first of the options that is no share: 0 or more, and less than 1."""
    for name, value in _given(config, names):
        require(0 <= value < 1, f"{name} must be from 0 to below 1, got {value}")


def _given(config: object, names: tuple[str, ...]) -> list[tuple[str, float]]:
    return [(name, value) for name in names if (value := getattr(config, name)) is not None]


def divides(small_name: str, small: int, large_name: str, large: int) -> None:
    """Raises `UserError`, with both numbers, unless `small` divides `large` without rest."""
    require(small >= 1, f"{small_name} must be at least 1, got {small}")
    nearest = max(small, round(large / small) * small)
    require(
        large >= small and large % small == 0,
        f"{large_name} ({large}) must be a multiple of {small_name} ({small}); nearest: {nearest}",
    )

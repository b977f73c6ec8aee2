"""Checks of option values; each raises a `UserError` with the option's name and value."""

from __future__ import annotations

from rlhf.base.errors import require


def require_at_least(smallest: int, config: object, *names: str) -> None:
    """Raise `UserError` for the first option below `smallest`; options that are None pass."""
    for name, value in _values(config, names):
        require(value >= smallest, f"{name} must be at least {smallest}, got {value}")


def require_above_zero(config: object, *names: str) -> None:
    """Raise `UserError` for the first option that is 0 or less; options that are None pass."""
    for name, value in _values(config, names):
        require(value > 0, f"{name} must be above 0, got {value}")


def require_below_one(config: object, *names: str) -> None:
    """Raise `UserError` for the first option outside [0, 1); options that are None pass."""
    for name, value in _values(config, names):
        require(0 <= value < 1, f"{name} must be from 0 to below 1, got {value}")


def _values(config: object, names: tuple[str, ...]) -> list[tuple[str, float]]:
    return [(name, value) for name in names if (value := getattr(config, name)) is not None]


def divides(small_name: str, small: int, large_name: str, large: int) -> None:
    """Raise `UserError` with both numbers unless `small` divides `large` without remainder."""
    require(small >= 1, f"{small_name} must be at least 1, got {small}")
    nearest = max(small, round(large / small) * small)
    require(
        large >= small and large % small == 0,
        f"{large_name} ({large}) must be a multiple of {small_name} ({small}); nearest: {nearest}",
    )

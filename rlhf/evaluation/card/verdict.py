"""The verdict of a report card: the limits that raise a flag, the flags, and the first line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LENGTH_BIAS = 0.15
"""Share of pairs by which scores may prefer longer (or shorter) responses more often than people do."""
POOR_CALIBRATION = 0.1
"""Highest expected calibration error without a flag."""
CEILING_SHARE = 0.5
"""Least share of the way from a coin to the human ceiling that agreement with held-out raters has to reach. InstructGPT's
reward model went 72% of it (69.6% with held-out labellers, who agree with each other in 77.3%); below a half, most of the
raters' agreement is missing from the scores, however surely they are better than a coin."""
RIVAL_GAIN = 0.1
"""Where a gain over a rival is not clearly above 0: it is a fault if its interval ends below this; if it reaches further, there
are too few pairs."""
OUTSIDE = 0.1
"""Largest share of the policy's samples outside the central 98% of training scores without a flag; 2% would be even."""
#: Flags for which a model falls short, whatever else it is.
SHORTFALLS = ("no pairs", "coin", "ceiling", "rival")


def flags(card: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the model's faults, worst first, each with `name` and `message`; those in `SHORTFALLS` decide the verdict."""
    faults: list[dict[str, str]] = []

    def flag(name: str, message: str) -> None:
        faults.append({"name": name, "message": message})

    overall, length, samples = card["accuracy"], card["length"], card["samples"]
    if overall is None:
        flag("no pairs", "no held-out pair differs by eval_rating_difference, so accuracy cannot be measured")
    elif overall["low"] is None or overall["low"] <= 0.5:
        flag("coin", f"its accuracy of {overall['value']:.1%} is not clearly above a coin's")
    own, ceiling = card["accuracy_held_out_raters"], card["human_ceiling"]
    halfway = 0.5 + CEILING_SHARE * (ceiling["value"] - 0.5) if ceiling else 0.5
    if halfway > 0.5 and own["high"] is not None and own["high"] < halfway:
        flag(
            "ceiling",
            f"it is far below what people reach: it agrees with raters it never saw in {own['value']:.1%}, less than halfway "
            f"from a coin to people's {ceiling['value']:.1%}",
        )
    for line in card["rivals"]:
        if not line["beaten"]:
            flag(*_unbeaten(line))
    if length["prefers_longer"] is not None:
        bias = length["prefers_longer"] - length["people_prefer_longer"]
        if abs(bias) > LENGTH_BIAS:
            word = "longer" if bias > 0 else "shorter"
            flag("length", f"it prefers the {word} response {abs(bias):.0%} more often than people do")
    for probe in card["probes"]:
        if probe["flagged"]:
            flag("probe", f"{probe['name']}: {probe['finding']}")
    if samples and samples["outside"] > OUTSIDE:
        flag("samples", f"{samples['outside']:.0%} of the policy's own responses score outside what it was trained on")
    if card["calibration"] and card["calibration"]["ece"] > POOR_CALIBRATION:
        flag("calibration", f"its probabilities are off by {card['calibration']['ece']:.0%} on average")
    return faults


def _unbeaten(line: Mapping[str, Any]) -> tuple[str, str]:
    """Return name and message of the flag of a rival that the model does not clearly beat."""
    theirs, gain = line["accuracy"]["value"], line["gain"]
    low, high = gain["low"], gain["high"]
    few = f"{gain['pairs']:,} pairs of {gain['prompts']:,} prompt{'s' if gain['prompts'] > 1 else ''}"
    measured = f"{line['name']}: {theirs + gain['value']:.1%} against {theirs:.1%} of the same {few}"
    if high is not None and high < 0:
        return "rival", f"it is beaten by {measured}"
    if gain["value"] > 0 and (low is None or high > RIVAL_GAIN):
        return "rival unclear", f"too few pairs tell whether it beats {measured}"
    return "rival", f"it does not clearly beat {measured}"


def verdict(card: Mapping[str, Any]) -> str:
    """Return the card's first line: the model's accuracy beside people and rivals, and its shortfalls."""
    overall = card["accuracy"]
    worst = [flag["message"] for flag in card["flags"] if flag["name"] in SHORTFALLS]
    if overall is None:
        return f"{card['model']} NOT JUDGED: {worst[0]}."
    text = f"right in {overall['value']:.1%} of {overall['pairs']:,} held-out pairs"
    if overall["low"] is not None:
        text += f" (95% interval {overall['low']:.1%} to {overall['high']:.1%})"
    if card["human_ceiling"]:
        own, ceiling = card["accuracy_held_out_raters"]["value"], card["human_ceiling"]["value"]
        text += f"; with raters it never saw it agrees in {own:.1%}, where people agree in {ceiling:.1%}"
    if worst:
        return f"{card['model']} FALLS SHORT: {'; '.join(worst)}. It is {text}."
    others = len(card["flags"])
    rest = f" {others} warning{'s' if others > 1 else ''} below." if others else " Nothing flagged."
    beaten = ", ".join(line["name"] for line in card["rivals"] if line["beaten"])
    return f"{card['model']} is {text}; it beats {beaten}.{rest}" if beaten else f"{card['model']} is {text}.{rest}"

"""What the doctor finds in a run, for its page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.base.errors import UserError
from rlhf.doctor.diagnosis import diagnose


def health(output_dir: Path) -> list[dict[str, Any]]:
    """What the doctor finds in the stages' logs; nothing of a stage without any."""

    try:
        diagnoses = diagnose(output_dir)
    except UserError:
        return []  # what is missing is said at the top of the page
    return [
        {
            "stage": one.stage,
            "checks": one.checks,
            "updates": one.updates,
            "findings": [
                {
                    "name": finding.check.name.replace("_", " "),
                    "severity": finding.check.severity,
                    "updates": f"{finding.first}"
                    if finding.first == finding.last
                    else f"{finding.first} to {finding.last}",
                    "evidence": finding.evidence,
                    "cause": finding.check.cause,
                    "action": finding.check.action,
                }
                for finding in one.findings
            ],
        }
        for one in diagnoses
    ]

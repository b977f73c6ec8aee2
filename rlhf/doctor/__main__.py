"""`python -m rlhf.doctor preflight --config FILE`: one word for each thing that the doctor looks at."""

from __future__ import annotations

import importlib
import sys

from rlhf.errors import UserError, did_you_mean, run_command

VERBS = {"preflight": ("rlhf.doctor.preflight", "check a stage's config, parents and data before a long run")}


def usage() -> str:
    """The help text."""
    lines = [f"  {verb:10s} {what}" for verb, (_, what) in VERBS.items()]
    return "\n".join(["usage: python -m rlhf.doctor preflight --config FILE [--option value ...]", "", *lines])


def main() -> None:
    """Command line."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return
    verb = words[0]
    if verb not in VERBS:
        raise UserError(f"no verb '{verb}'{did_you_mean(verb, VERBS)}; python -m rlhf.doctor --help lists them")
    sys.argv = [f"{sys.argv[0]} {verb}", *words[1:]]
    importlib.import_module(VERBS[verb][0]).main()


if __name__ == "__main__":
    run_command(main)

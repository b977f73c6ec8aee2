"""Memory, time and disk of stages before they run: `rlhf plan --config FOLDER|FILE [--gpu NAME]`

FOLDER holds `sft.yaml`, `reward.yaml` and `ppo.yaml`, as for a pipeline; FILE is one of them. A model's `config.json`
suffices: no weights are loaded. Times on this machine come from a calibration of a few seconds at the model's own shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf.base.cli import Parser
from rlhf.base.errors import run_command


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = Parser(
        description=__doc__.split("\n")[0], epilog="Other options are those of the stages, as --option value."
    )
    parser.add_argument("--config", required=True, type=Path, help="folder of a pipeline, or the file of a stage")
    parser.add_argument("--gpu", help="a GPU that need not be here, e.g. h100")
    parser.add_argument("--model", help="base model; default: that of sft.yaml, or of the registered policy")
    parser.add_argument("--rows", type=int, default=1000, help="prompts of data that is not here")
    parser.add_argument("--prompt_tokens", type=int, default=128, help="tokens of its prompts")
    parser.add_argument("--answer_tokens", type=int, default=128, help="tokens of its answers")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments, rest = parser.parse_known_args(argv)
    from rlhf.doctor.plan import command  # slow to import

    command.run(arguments, rest)


if __name__ == "__main__":
    run_command(main)

"""`python -m rlhf.data_prep --config FILE` or `--output_dir DIR`: makes the demo's data."""

from __future__ import annotations

from rlhf.config import parse_config
from rlhf.data_prep.build import DataConfig, prepare
from rlhf.errors import run_command


def main() -> None:
    """Command line; prints the folder."""
    print(prepare(parse_config(DataConfig)))


if __name__ == "__main__":
    run_command(main)

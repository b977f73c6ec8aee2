"""`rlhf data --config FILE`: prepares data; without a file the demo's, with `--output_dir DIR`.

`rlhf data show --config FILE --n 5`: rows as the model will see them.
"""

from __future__ import annotations

import sys

from rlhf.base.errors import run_command
from rlhf.data_prep import prepare
from rlhf.data_prep.prepare.recipe import parse_recipe


def main() -> None:
    """Run the command line; prints the folder, or the rows."""
    words = sys.argv[1:]
    if words[:1] == ["show"]:
        from rlhf.data_prep.show import main as show  # it needs a tokenizer's libraries

        show(words[1:])
    else:
        print(prepare(parse_recipe(words)))


if __name__ == "__main__":
    run_command(main)

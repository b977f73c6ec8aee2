"""Makes rlhf_tour.ipynb from rlhf_tour.py, which is its one source, and runs it: `python notebooks/make.py`.

The script is in the percent format of Jupytext and Visual Studio Code: `# %%` begins a cell of code, `# %% [markdown]` one of
text.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

SCRIPT = Path(__file__).with_name("rlhf_tour.py")
NOTEBOOK = SCRIPT.with_suffix(".ipynb")


def notebook(script: str) -> nbformat.NotebookNode:
    """Return the notebook of a script, without outputs."""
    cells = []
    for part in re.split(r"^# %%", script, flags=re.MULTILINE)[1:]:
        kind, _, body = part.partition("\n")
        number = {"id": f"cell-{len(cells)}"}
        if kind.strip() == "[markdown]":
            cells.append(new_markdown_cell(re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE), **number))
        else:
            cells.append(new_code_cell(body.strip(), **number))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Run all cells in order, in a folder; their outputs become part of the notebook."""
    one_thread = {"OMP_NUM_THREADS": "1"}  # more would wait for one another in so small a model
    quiet = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "PYTHONWARNINGS": "ignore"}
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    with client.setup_kernel(env={**os.environ, **one_thread, **quiet}):
        for number, cell in enumerate(notebook.cells):
            client.execute_cell(cell, number)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of the day, which differ from run to run


def main() -> None:
    """Make the notebook with its outputs."""
    made = notebook(SCRIPT.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        execute(made, Path(folder))
    nbformat.write(made, NOTEBOOK)


if __name__ == "__main__":
    main()

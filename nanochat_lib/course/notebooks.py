"""Texts to notebooks: paired by jupytext, run once, stored with their outputs and without anything that changes by itself."""

import os
import re
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from nanochat_lib.course.export import CourseError

SECONDS_PER_CELL = 300
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def sources(notebook: NotebookNode) -> list[list[str]]:
    """[[cell type, source], …]: what is compared between a text and its notebook."""
    return [[cell.cell_type, cell.source] for cell in notebook.cells]


def write_notebook(notebook: NotebookNode, path: Path) -> None:
    """Write cells and outputs with stable ids and without times, so that the same content gives the same bytes."""
    clean = nbformat.v4.new_notebook(metadata=METADATA)
    for number, cell in enumerate(notebook.cells):
        new = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}[cell.cell_type]
        clean.cells.append(new(cell.source, id=f"{path.stem.replace('_', '-')}-{number:03d}"))
        if cell.cell_type == "code":
            clean.cells[-1].outputs = [tidy(output) for output in cell.get("outputs", [])]
            clean.cells[-1].execution_count = cell.get("execution_count")
    nbformat.write(clean, path)


def tidy(output: NotebookNode) -> NotebookNode:
    """An output without addresses in memory."""
    if "text" in output:
        output.text = ADDRESS.sub("", output.text)
    for kind, data in output.get("data", {}).items():
        if kind.startswith("text/") and isinstance(data, str):
            output.data[kind] = ADDRESS.sub("", data)
    return output


def execute(notebook: NotebookNode, folder: Path, name: str) -> None:
    """Run all cells in place in a fresh kernel. Raises CourseError with the cell and its traceback."""
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # or a frozen-modules warning lands in the outputs
    client = NotebookClient(notebook, timeout=SECONDS_PER_CELL, kernel_name="python3", record_timing=False,
                            store_widget_state=True,  # Output widgets look for it; write_notebook leaves it out
                            resources={"metadata": {"path": str(folder)}})
    try:
        client.execute()
    except CellExecutionError as error:
        raise CourseError(f"{name}: a cell failed\n{error}") from None


def is_current(path: Path, text: NotebookNode) -> bool:
    """Whether the stored notebook has these very cells, and has been run."""
    if not path.exists():
        return False
    stored = nbformat.read(path, 4)
    return sources(stored) == sources(text) and any(cell.get("execution_count") for cell in stored.cells)


def build_notebook(source: Path, force: bool = False) -> bool:
    """Run a lesson or solution and store it beside its text; one whose text has not changed is left alone.

    `force` runs it all the same (the library under it may have changed). Returns whether it was run.
    """
    path, text = source.with_suffix(".ipynb"), jupytext.read(source)
    if is_current(path, text) and not force:
        return False
    execute(text, source.parent, f"{source.parent.name}/{source.name}")
    write_notebook(text, path)
    return True

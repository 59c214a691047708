"""Solutions to exercises: the same cells, with what stands between BEGIN SOLUTION and END SOLUTION taken out."""

import hashlib
import json
import re
from pathlib import Path

import jupytext

from nanochat_lib.course.export import ROOT, CourseError
from nanochat_lib.course.notebooks import sources, write_notebook

MARKER = re.compile(r"(\s*)# (BEGIN|END) SOLUTION\s*")
MANIFEST = ".generated.json"  # exercises/ file → hash of what was written there, to tell a learner's edits from ours


def without_solutions(text: str, name: str) -> str:
    """The text of an exercise. A block inside a function becomes `raise NotImplementedError`, one at the margin goes.

    Raises CourseError with the line number of a marker that is unclosed, nested, stray, or encloses nothing.
    """
    kept, begun, indent, enclosed = [], 0, "", False
    for number, line in enumerate(text.splitlines(), 1):
        marker = MARKER.fullmatch(line)
        if marker and marker[2] == "BEGIN":
            if begun:
                raise CourseError(f"{name}:{number}: BEGIN SOLUTION inside the solution begun at line {begun}")
            begun, indent, enclosed = number, marker[1], False
        elif marker:
            if not begun:
                raise CourseError(f"{name}:{number}: END SOLUTION without a BEGIN SOLUTION above it")
            if not enclosed:
                raise CourseError(f"{name}:{begun}: the solution between these markers is empty")
            kept.append(f"{indent}raise NotImplementedError  # your code here" if indent else "# your code here")
            begun = 0
        elif begun:
            if line.startswith("# %%"):
                raise CourseError(f"{name}:{begun}: BEGIN SOLUTION is not closed before its cell ends (line {number})")
            enclosed = enclosed or bool(line.strip())
        else:
            kept.append(line)
    if begun:
        raise CourseError(f"{name}:{begun}: BEGIN SOLUTION is never closed: add END SOLUTION")
    return "\n".join(kept) + "\n"


def exercise_text(solution: Path) -> str:
    return without_solutions(solution.read_text(), f"solutions/{solution.name}")


def digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def fingerprint(path: Path) -> str:
    """Hash of what an author or a learner writes: the text, or the sources of a notebook's cells (not its outputs)."""
    return digest(json.dumps(sources(jupytext.read(path))) if path.suffix == ".ipynb" else path.read_text())


def make_exercise(solution: Path, root: Path = ROOT, force: bool = False) -> list[Path]:
    """Write exercises/NAME.py and .ipynb of one solution; returns the paths left alone because a learner edited them."""
    folder = root / "exercises"
    folder.mkdir(exist_ok=True)
    manifest = folder / MANIFEST
    written = json.loads(manifest.read_text()) if manifest.exists() else {}
    text, kept = exercise_text(solution), []
    notebook = jupytext.reads(text, fmt="py:percent")
    wanted = {folder / solution.name: text, folder / f"{solution.stem}.ipynb": json.dumps(sources(notebook))}
    for path, content in wanted.items():
        if path.exists() and not force and fingerprint(path) not in (written.get(path.name), digest(content)):
            kept.append(path)
            continue
        if path.suffix == ".py":
            path.write_text(text)
        else:
            write_notebook(notebook, path)
        written[path.name] = digest(content)
    manifest.write_text(json.dumps(dict(sorted(written.items())), indent=1) + "\n")
    return kept

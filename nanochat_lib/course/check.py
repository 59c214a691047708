"""Do lessons, modules, notebooks, solutions and exercises agree? Every problem is one line: the file and what mends it."""

import ast
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jupytext
import nbformat
from pyflakes import checker as pyflakes
from pyflakes.messages import UndefinedName, UnusedImport

from nanochat_lib.course.exercises import exercise_text
from nanochat_lib.course.export import NOTICE, ROOT, CourseError, Module, modules_of
from nanochat_lib.course.notebooks import sources

MEND = "run `make lessons`"
HERE = [re.escape(f"{folder}/") for folder in (Path.home(), ROOT, Path(tempfile.gettempdir())) if folder != Path("/")]
OWN_PATH = re.compile("|".join([r"/home/\w", r"/Users/\w", r"[A-Z]:\\\w", *HERE]))  # what only one machine has


def problems(root: Path = ROOT) -> list[str]:
    """All disagreements under `root`; an empty list when the course is whole."""
    try:
        lessons = {lesson.name: modules_of(lesson) for lesson in sorted((root / "lessons").glob("*.py"))}
    except CourseError as error:
        return [str(error)]
    return [*check_modules(root, lessons), *check_names(lessons), *check_order(lessons), *check_exercises(root),
            *check_notebooks(root)]


def check_modules(root: Path, lessons: dict[str, dict[str, Module]]) -> Iterator[str]:
    """Generated modules are what their lessons say, and no lesson has lost one."""
    exported = set()
    for lesson, modules in lessons.items():
        for module in modules.values():
            path = root / "nanochat_lib" / f"{module.name}.py"
            exported.add(path)
            if not path.exists():
                yield f"{path.relative_to(root)}: missing, exported by lessons/{lesson}: {MEND}"
            elif path.read_text() != module.text(f"lessons/{lesson}"):
                yield f"{path.relative_to(root)}: differs from lessons/{lesson}: put the edit into the lesson, then {MEND}"
    for path in sorted((root / "nanochat_lib").rglob("*.py")):
        if path.read_text().startswith(NOTICE) and path not in exported:
            yield f"{path.relative_to(root)}: no lesson exports it any more: delete it"


def check_names(lessons: dict[str, dict[str, Module]]) -> Iterator[str]:
    """Exported cells use only names that their module defines, and import nothing in vain."""
    for lesson, modules in lessons.items():
        for module in modules.values():
            text = module.text(f"lessons/{lesson}")
            try:
                found = pyflakes.Checker(ast.parse(text)).messages
            except SyntaxError as error:
                yield f"lessons/{lesson}: {module.name} does not parse ({error.msg}): {error.text and error.text.strip()}"
                continue
            for message in found:
                if isinstance(message, UndefinedName):
                    yield (f"lessons/{lesson}: `{message.message_args[0]}` is used in {module.name} (line {message.lineno}) but "
                           f"not defined there: export the cell that defines it, then {MEND}")
                elif isinstance(message, UnusedImport) and "noqa" not in text.splitlines()[message.lineno - 1]:
                    yield f"lessons/{lesson}: {module.name} imports {message.message_args[0]} in vain: remove it, then {MEND}"


def check_order(lessons: dict[str, dict[str, Module]]) -> Iterator[str]:
    """A module imports, at its top, only modules of its own and earlier lessons, and nothing of the course's tools."""
    home = {module.replace("/", "."): lesson for lesson, modules in lessons.items() for module in modules}
    for lesson, modules in lessons.items():
        for module in modules.values():
            for name in re.findall(r"^(?:from|import) nanochat_lib\.([\w.]+)", "\n".join(module.cells), re.M):
                if name.startswith("course"):
                    yield f"lessons/{lesson}: {module.name} imports nanochat_lib.{name}, a tool of the course: do without"
                elif name in home and home[name] > lesson:
                    yield f"lessons/{lesson}: {module.name} imports nanochat_lib.{name} of the later lesson {home[name]}"


def check_exercises(root: Path) -> Iterator[str]:
    """Exercises are their solutions with the answers taken out."""
    for solution in sorted((root / "solutions").glob("*.py")):
        try:
            text = exercise_text(solution)
        except CourseError as error:
            yield str(error)
            continue
        path = root / "exercises" / solution.name
        if not path.exists() or path.read_text() != text:
            yield (f"exercises/{path.name}: differs from solutions/{path.name}: {MEND} (an exercise you have worked on is "
                   f"kept; `python -m nanochat_lib.course build --force` resets it)")


def check_notebooks(root: Path) -> Iterator[str]:
    """Texts and notebooks have the same cells; lessons and solutions have been run; no output names a machine's paths."""
    for folder in ("lessons", "solutions", "exercises"):
        for text in sorted((root / folder).glob("*.py")):
            path, name = text.with_suffix(".ipynb"), f"{folder}/{text.stem}.ipynb"
            if not path.exists():
                yield f"{name}: missing: {MEND}"
                continue
            notebook = nbformat.read(path, 4)
            if sources(notebook) != sources(jupytext.read(text)):
                yield f"{name}: its cells differ from {folder}/{text.name}: put the edit into the text, then {MEND}"
            code = [cell for cell in notebook.cells if cell.cell_type == "code"]
            if folder != "exercises" and not any(cell.outputs for cell in code):
                yield f"{name}: has not been run: {MEND}"
            if found := OWN_PATH.search(printed(code)):
                yield f"{name}: an output holds a path of one machine ({found[0]}…): print something else, then {MEND}"


def printed(cells: list) -> str:
    """All text that cells put out (pictures left aside)."""
    outputs = [output for cell in cells for output in cell.outputs]
    texts = [data for output in outputs for kind, data in output.get("data", {}).items() if not kind.startswith("image/")]
    return "\n".join(map(str, [*texts, *(output.get("text", "") for output in outputs)]))

"""Every exercise runs to its end unwritten, every solution passes its checks, and both say what the checks know of them."""

import importlib
import re
from pathlib import Path

import jupytext
import matplotlib
import pytest

from nanochat_lib.course.grading import EXERCISES, ROOT, Verdict

matplotlib.use("Agg")
SOLUTIONS = sorted((ROOT / "solutions").glob("*.py"))
CHECKS = {path.stem: importlib.import_module(f"nanochat_lib.course.checks.{path.stem}")
          for path in sorted((ROOT / "nanochat_lib" / "course" / "checks").glob("[a-z]*.py"))}


def run(path: Path) -> dict[str, Verdict]:
    """Run the cells as a notebook does, in the folder of the text; returns the verdicts by exercise."""
    space, verdicts = {"__name__": "__main__"}, {}
    for cell in jupytext.read(path).cells:
        if cell.cell_type == "code" and (check := re.match(r"check\.(\w+)\(", cell.source)):
            verdicts[check[1]] = eval(compile(cell.source, path.name, "eval"), space)
        elif cell.cell_type == "code":
            exec(compile(cell.source, path.name, "exec"), space)
    return verdicts


def test_lessons_02_to_10_and_12_have_exercises():
    assert [path.name[:2] for path in SOLUTIONS] == [f"{number:02}" for number in (*range(2, 11), 12)]
    for word in CHECKS:
        assert word == "tour" or sum(lesson == word for lesson, _ in EXERCISES) >= 2, word


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_solution_passes_and_exercise_waits(path, base_dir, monkeypatch):
    monkeypatch.chdir(path.parent)
    solved = run(path)
    assert len(solved) >= 2 and {verdict.state for verdict in solved.values()} == {"right"}, solved
    waiting = run(ROOT / "exercises" / path.name)
    assert waiting.keys() == solved.keys()
    assert {verdict.state for verdict in waiting.values()} == {"not done yet"}, waiting


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_statements_say_what_the_checks_know(path):
    text = path.read_text()
    word = re.search(r"from nanochat_lib\.course\.checks import (\w+) as check", text)[1]
    stated = re.findall(r"difficulty (\d)/5 · importance (\d)/5 · (\d+) minutes", text)
    known = {name: tuple(map(str, (e.difficulty, e.importance, e.minutes))) for (lesson, name), e in EXERCISES.items()
             if lesson == word}
    assert [known[name] for name in re.findall(r"^check\.(\w+)\(", text, re.M)] == stated
    assert all(0 < len(e.hints) <= 3 for (lesson, _), e in EXERCISES.items() if lesson == word)
    assert (path.parent.parent / "lessons" / path.name).read_text().count(f"../exercises/{path.stem}.ipynb") >= 1

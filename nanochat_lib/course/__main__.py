"""The course's own commands: `python -m nanochat_lib.course build | check | export LESSON… | progress | ready`."""

import argparse
import sys
from pathlib import Path

from nanochat_lib.course.exercises import make_exercise
from nanochat_lib.course.export import ROOT, CourseError, export_lesson
from nanochat_lib.course.notebooks import build_notebook


def export(paths: list[str]) -> None:
    """Write the modules of these lessons (all, if none is named)."""
    for lesson in [Path(path).resolve() for path in paths] or sorted((ROOT / "lessons").glob("*.py")):
        export_lesson(lesson)


def build(paths: list[str], force: bool) -> None:
    """Modules, exercises, notebooks: all that is generated, made anew where its source changed."""
    export([])
    chosen = [Path(path).resolve() for path in paths]
    for solution in sorted((ROOT / "solutions").glob("*.py")):
        for path in make_exercise(solution, force=force):
            print(f"{path.relative_to(ROOT)}: holds your own work and is left as it is (--force resets it)")
    for source in chosen or [*sorted((ROOT / "lessons").glob("*.py")), *sorted((ROOT / "solutions").glob("*.py"))]:
        if build_notebook(source, force):
            print(f"{source.relative_to(ROOT)}: run and stored", flush=True)


def check() -> int:
    """Print every disagreement; 1 if there is one."""
    from nanochat_lib.course.check import problems  # needs pyflakes, which only the dev extra brings

    found = problems()
    print("\n".join(found) or "lessons, modules, notebooks, solutions and exercises agree")
    return bool(found)


def show_progress() -> None:
    """Which exercises have been solved here."""
    import importlib
    import pkgutil

    from nanochat_lib.course import checks
    from nanochat_lib.course.grading import EXERCISES, progress

    for module in pkgutil.iter_modules(checks.__path__):
        importlib.import_module(f"nanochat_lib.course.checks.{module.name}")
    done = progress()
    for (lesson, name), exercise in EXERCISES.items():
        mark = {True: "solved", False: "tried"}.get(done.get(lesson, {}).get(name), "")
        print(f"{lesson:12} {name:32} difficulty {exercise.difficulty}/5  {exercise.minutes:3} min  {mark}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m nanochat_lib.course", description=__doc__)
    parser.add_argument("command", choices=["build", "check", "export", "progress", "ready"])
    parser.add_argument("paths", nargs="*", help="lessons or solutions (default: all)")
    parser.add_argument("--force", action="store_true", help="run unchanged notebooks too; reset exercises worked on")
    arguments = parser.parse_args()
    try:
        if arguments.command == "build":
            build(arguments.paths, arguments.force)
        elif arguments.command == "check":
            return check()
        elif arguments.command == "export":
            export(arguments.paths)
        elif arguments.command == "progress":
            show_progress()
        else:
            from nanochat_lib.course.models import ready

            ready()
    except CourseError as error:
        sys.exit(f"error: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

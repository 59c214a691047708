"""A trained model for the lessons that need one: whatever the base directory holds, else that of the shortest run."""

import subprocess
import sys

from nanochat_lib.checkpoint import find_checkpoint
from nanochat_lib.common import NanochatError


def ready(stage: str = "rl") -> None:
    """Make sure that a model of `stage` ("base", "sft", "rl") exists under $NANOCHAT_BASE_DIR.

    If there is none, runs the pipeline's `tour` preset, a minute and a half on two cores; `make run` gives a better one.
    """
    try:
        find_checkpoint(stage)
        return
    except NanochatError:
        print("no model here yet: making a very small one")
    run = subprocess.run([sys.executable, "-m", "nanochat_lib.pipeline", "--preset=tour"], capture_output=True, text=True)
    if run.returncode:
        raise NanochatError(f"the tour's run failed: {run.stderr.strip().splitlines()[-1]}")

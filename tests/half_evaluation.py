"""base_train in which only process 1 cannot read the evaluation bundle; launched by test_base_train."""

import os

from nanochat_lib import evaluation
from nanochat_lib.common import run_cli
from nanochat_lib.scripts.base_train import base_train


def read_bundle(folder):
    if os.environ["RANK"] == "1":
        raise OSError("the disk of rank 1")
    return []


if __name__ == "__main__":
    evaluation.find_bundle, evaluation.read_bundle = lambda path: path, read_bundle
    run_cli(base_train)

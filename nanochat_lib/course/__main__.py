"""`python -m nanochat_lib.course export lessons/04_gpt.py`"""

import sys
from pathlib import Path

from nanochat_lib.course.export import export_lesson

if __name__ == "__main__":
    for name in sys.argv[2:]:
        for path in export_lesson(Path(name).resolve()):
            print(path)

"""What the commands of this folder have in common: where they may write, and how Ctrl-C ends them."""

import os
import sys
from pathlib import Path

from train.exit_codes import INTERRUPTED, leave


def check_out(path):
    """ValueError, in one line, where the file `path` cannot be written: before what it holds is worked out."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder; give the name of a file, such as {path}/scores.json")
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not above.is_dir() or not os.access(above, os.W_OK):
        wrong = "may not be written to" if above.is_dir() else "is not a folder"
        raise ValueError(f"cannot write {path}: {above} {wrong}; give another place")


def run_command(main, after="run the same command to start again"):
    """End the process with main's exit code; `after` says what an interrupted command does when it is given again."""
    try:
        code = main()
    except KeyboardInterrupt:
        code = INTERRUPTED
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"interrupted; {after}", file=sys.stderr)
    leave(code)

"""What the commands of this folder have in common: where they may write."""

import os
from pathlib import Path


def check_out(path):
    """ValueError, in one line, where the file `path` cannot be written: before what it holds is worked out."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder; give the name of a file, such as {path}/scores.json")
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not above.is_dir() or not os.access(above, os.W_OK):
        wrong = "may not be written to" if above.is_dir() else "is not a folder"
        raise ValueError(f"cannot write {path}: {above} {wrong}; give another place")

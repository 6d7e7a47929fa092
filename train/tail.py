"""A file of JSON lines, read while another process writes it."""

import json
import os


class Tail:
    """Reads on from where it was. The file stays open: what it reads is one file, even if another takes its name."""

    def __init__(self, path, offset=0):
        """offset: where a line begins. Raises FileNotFoundError."""
        self.path = path
        self.file = open(path, "rb")  # noqa: SIM115 - for as long as this lives
        self.offset = offset

    def rows(self):
        """Yield the objects of the lines that are there since the last call; an unfinished last line waits."""
        self.file.seek(self.offset)
        for line in self.file:
            if not line.endswith(b"\n"):
                return
            self.offset += len(line)
            row = parse(line)
            if row is not None:
                yield row

    @property
    def replaced(self):
        """Whether the path is another file by now, or none: a run that goes on cuts its files by writing new ones."""
        try:
            now = os.stat(self.path)
        except FileNotFoundError:
            return True
        mine = os.fstat(self.file.fileno())
        return (now.st_ino, now.st_dev) != (mine.st_ino, mine.st_dev) or now.st_size < self.offset

    def close(self):
        self.file.close()


def parse(line):
    """The JSON object of a line, or None: a crash may leave half a line."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def flat_row(row, separator):
    """{"loss": 2.0, "by": {"a": 1}} -> {"loss": 2.0, "by.a": 1}, with "." as the separator."""
    flat = {}
    for key, value in row.items():
        inner = flat_row(value, separator) if isinstance(value, dict) else None
        flat |= {key: value} if inner is None else {f"{key}{separator}{k}": v for k, v in inner.items()}
    return flat

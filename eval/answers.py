"""What a model has answered, kept as it goes, so that a run that is killed goes on where it was.

out/answers/<key>/<task>-00000.jsonl has a line for each finished job; the key is of the model's own hash and of all
else that its answers depend on, so another model never finds them.
"""

import hashlib
import json
import os
import time
from pathlib import Path

from train.run_dir import write_json

FORMAT = 1
SYNC_S = 5.0  # what a power cut may cost


def answers_folder(out, model, device, rank=0):
    """out/answers/<key> for an OwnModel or HFModel on this kind of device; model.json in it says what it is of."""
    identity = {
        "format": FORMAT, "sha256": model.sha256, "kind": model.kind, "dtype": model.dtype,
        "seq_len": model.seq_len, "device": str(device).partition(":")[0],
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    folder = Path(out) / "answers" / key
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        write_json(folder / "model.json", {**identity, "name": model.name})
    return folder


class AnswerFile:
    """The finished jobs of one task, {sha256 of the job: its result}: what any process wrote, and a file to add to."""

    def __init__(self, folder, task, rank=0):
        self.known = {}
        for path in sorted(folder.glob(f"{task}-*.jsonl")):
            self.known |= read_lines(path)
        self.n_found = 0
        path = folder / f"{task}-{rank:05d}.jsonl"
        torn = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")  # killed while it wrote
        self.file = path.open("a", encoding="utf-8")
        if torn:
            self.file.write("\n")
        self.synced = time.monotonic()

    def get(self, key):
        self.n_found += key in self.known
        return self.known.get(key)

    def add(self, key, result):
        self.known[key] = result
        self.file.write(json.dumps([key, result]) + "\n")
        self.file.flush()
        if time.monotonic() - self.synced > SYNC_S:
            os.fsync(self.file.fileno())
            self.synced = time.monotonic()

    def close(self):
        self.file.close()


def read_lines(path):
    """{key: result} of the whole lines; what a kill tore is left out, and so asked again."""
    found = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            key, result = json.loads(line)
        except ValueError:
            continue
        found[key] = result
    return found

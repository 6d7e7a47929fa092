"""The benchmarks' own questions: lm-eval's task definitions as they stand, over the Hub's data or over local files.

    python -m eval.task_data data/evals                                  fetch from the Hub, and pin
    python -m eval.task_data data/evals --source ../shared/data/evals    copy from a folder that has them, and pin
    python -m eval.task_data data/evals --check                          compare all files with their pins

benchmarks.json says which of lm-eval's definitions make a benchmark, how many shots it has, and where its files are in
such a folder. pins.json in the folder has the size and sha256 of every file; one that differs is refused.
"""

import argparse
import json
import sys
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import datasets
import lm_eval.tasks
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from curation.shards import file_problem, file_sha256, new_file
from eval.command import check_out, run_command
from train.run_dir import read_json, write_json

BENCHMARKS = json.loads((Path(__file__).parent / "benchmarks.json").read_text(encoding="utf-8"))
DEFINITIONS = Path(lm_eval.tasks.__file__).parent
PINS = "pins.json"
FORMAT = 1


def check_names(names):
    """The names in the order given; ValueError for one that is no benchmark. None: all of them."""
    names = list(BENCHMARKS if names is None else names)
    if unknown := [name for name in names if name not in BENCHMARKS]:
        raise ValueError(f"there is no task {unknown[0]!r}; tasks: {', '.join(BENCHMARKS)}")
    if not names:
        raise ValueError(f"no task is named; tasks: {', '.join(BENCHMARKS)}")
    return names


def definitions(name):
    """lm-eval's definitions of a benchmark, as they stand: a list of dicts, one a subject."""
    paths = sorted(DEFINITIONS.glob(BENCHMARKS[name]["definitions"]))
    # HumanEval's functions would run code, and ask the Hub for it on import: only its prompts are taken
    return [load_yaml(path, resolve_func=name != "humaneval") for path in paths]


def load_tasks(name, data=None):
    """[(subject or None, lm-eval task)] of a benchmark, over the files of folder `data`; None: over the Hub's.

    FileNotFoundError, in one line, for a file that is not there, or a Hub that cannot be reached.
    """
    tasks = []
    for definition in definitions(name):
        config = {key: value for key, value in definition.items() if key not in ("tag", "group", "task_alias")}
        config["num_fewshot"] = BENCHMARKS[name]["shots"]
        if data is not None:
            config["custom_dataset"] = partial(local_splits, Path(data), name, definition)
        try:
            [task] = TaskManager(include_defaults=False).load([config])["tasks"].values()
        except Exception as error:
            raise where_data_is_missing(name, definition, data, error) from None
        tasks.append((subject(name, definition), task))
    return tasks


def load_prompts(name, data=None):
    """(definition, rows) of a benchmark whose answers are written."""
    [definition] = definitions(name)
    try:
        splits = hub_splits(definition) if data is None else local_splits(Path(data), name, definition)
        return definition, list(splits[definition["test_split"]])
    except Exception as error:
        raise where_data_is_missing(name, definition, data, error) from None


def where_data_is_missing(name, definition, data, error):
    if data is not None and isinstance(error, FileNotFoundError | ValueError):
        return error
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return FileNotFoundError(
        f"{name}: {definition['dataset_path']} is not to be had from the Hub ({reason}); with a network, "
        "`make eval-data DATA=data/evals` fetches all of it; without one, SOURCE=FOLDER copies it from where it is; "
        "DATA=data/evals then uses it"
    )


def subject(name, definition):
    return definition["dataset_name"] if "{subject}" in BENCHMARKS[name]["file"] else None


def file_name(name, definition, split):
    return BENCHMARKS[name]["file"].format(split=split, subject=definition.get("dataset_name"))


def local_splits(folder, name, definition, **_):
    """{split: Dataset} as load_dataset gives it; a split that is not needed, such as a training set, is empty."""
    splits = {}
    for split in BENCHMARKS[name]["splits"]:
        path = folder / file_name(name, definition, split)
        if not path.is_file():
            raise FileNotFoundError(f"{name} needs {path}, which is not there; `make eval-data` makes such a folder")
        splits[split] = datasets.Dataset.from_list(read_rows(path, BENCHMARKS[name].get("made_from", {})))
    empty = next(iter(splits.values())).select([])
    named = [definition.get(f"{kind}_split") for kind in ("training", "validation", "test", "fewshot")]
    return {split: splits.get(split, empty) for split in [*splits, *filter(None, named)]}


def read_rows(path, made_from):
    """made_from: {column that the file may lack: the column of whole numbers or truth values that says the same}."""
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError:
                raise ValueError(f"{path} line {number} is not JSON; take the file again") from None
            rows.append({**{name: int(row[source]) for name, source in made_from.items() if source in row}, **row})
    if not rows:
        raise ValueError(f"{path} is empty; take the file again")
    return rows


def hub_splits(definition):
    return datasets.load_dataset(definition["dataset_path"], definition.get("dataset_name"))


# ---- pins


def check_pins(folder, names=None):
    """{file: sha256} of the benchmarks' files in `folder`, which are what its pins.json says, if it has one.

    Raises ValueError that names a file that was altered, cut short or is not pinned.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"data folder {folder} does not exist; `make eval-data DATA={folder}` makes it")
    pins = read_json(folder / PINS)["files"] if (folder / PINS).is_file() else None
    found = {}
    for name in names or BENCHMARKS:
        for definition in definitions(name):
            for split in BENCHMARKS[name]["splits"]:
                file = file_name(name, definition, split)
                if not (folder / file).is_file():
                    raise FileNotFoundError(
                        f"{name} needs {folder / file}, which is not there; `make eval-data` makes such a folder"
                    )
                if pins is not None and file not in pins:
                    raise ValueError(f"{folder / file} is not pinned in {folder / PINS}; fetch the folder again")
                if pins is not None and (problem := file_problem(folder, file, pins[file])):
                    raise ValueError(f"{problem}; fetch the folder again")
                found[file] = pins[file]["sha256"] if pins is not None else file_sha256(folder / file)
    return found


def fetch(folder, names, source=None):
    """Write the benchmarks' files into `folder`, from the Hub or from folder `source`, and pin them.

    A file that is pinned already and whole is left; one that comes out otherwise than it is pinned is an error.
    """
    folder = Path(folder)
    content = read_json(folder / PINS) if (folder / PINS).is_file() else {"format": FORMAT, "files": {}}
    pins = content["files"]
    for name in names:
        for definition in definitions(name):
            files = {split: file_name(name, definition, split) for split in BENCHMARKS[name]["splits"]}
            if all(file in pins and not file_problem(folder, file, pins[file]) for file in files.values()):
                continue
            if source is None:
                try:
                    splits = hub_splits(definition)
                except Exception as error:
                    raise where_data_is_missing(name, definition, None, error) from None
            for split, file in files.items():
                if source is None:
                    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in splits[split])
                    data = "".join(lines).encode()
                    origin = f"hub:{definition['dataset_path']}"
                elif (Path(source) / file).is_file():
                    data, origin = (Path(source) / file).read_bytes(), str(source)
                else:
                    raise FileNotFoundError(f"{name} needs {Path(source) / file}, which is not there")
                with new_file(folder / file) as written:
                    written.write(data)
                sha256 = file_sha256(folder / file)
                if file in pins and pins[file]["sha256"] != sha256:
                    raise ValueError(
                        f"{origin} gives another {file} (sha256 {sha256[:12]}) than is pinned in {folder / PINS} "
                        f"({pins[file]['sha256'][:12]}), and scores on the two cannot be compared; to take it, "
                        "delete the pins"
                    )
                pins[file] = {"bytes": len(data), "sha256": sha256, "from": origin}
        content |= {"versions": {"lm-eval": version("lm-eval"), "datasets": version("datasets")}}
        content |= {"created_utc": datetime.now(UTC).isoformat(timespec="seconds")}
        write_json(folder / PINS, content)
        print(f"{name}: {sum(entry['bytes'] for file, entry in pins.items()) / 1e6:.1f} MB pinned so far", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m eval.task_data", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", help="where the files and pins.json are written")
    parser.add_argument("--source", help="a folder with the same files; default: the Hub")
    parser.add_argument("--tasks", nargs="+", help="benchmarks; default: all")
    parser.add_argument("--check", action="store_true", help="only compare the files with their pins")
    flags = parser.parse_args(argv)
    try:
        names = check_names(flags.tasks)
        if flags.check:
            print(f"{flags.folder}: {len(check_pins(flags.folder, names))} files are what {PINS} says")
        else:
            check_out(Path(flags.folder) / PINS)
            fetch(flags.folder, names, flags.source)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_command(main, "run the same command to go on")

"""HumanEval: is a program that a model completed right? Each runs with its tests in a sandbox of its own.

    python -m eval.humaneval HumanEval.jsonl

does so for the canonical solutions, which must all pass: a check of this machine. lm-eval's task cannot be used as it
is: it fetches its scoring code when it is loaded, and runs what the model wrote without any protection.
"""

import argparse
import gzip
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from eval.command import run_command
from eval.sandbox import PASSED, check_sandbox, run_program

SECONDS = 10.0  # by the clock for one program; the slowest canonical solution takes a fraction of it


def program(problem, completion):
    """The completed function, its tests, and their call, as HumanEval puts them together."""
    return f"{problem['prompt']}{completion}\n{problem['test']}\ncheck({problem['entry_point']})"


def run_completions(problems, completions, *, seconds=SECONDS, processes=None):
    """[Outcome] of each problem's completion; problems: HumanEval's rows (prompt, test, entry_point)."""
    return run_programs([program(*pair) for pair in zip(problems, completions, strict=True)], seconds, processes)


def run_programs(programs, seconds, processes=None):
    """[Outcome] of each program, `processes` (default: one a core) at a time.

    Raises SandboxError before anything is run where this machine has no sandbox.
    """
    check_sandbox()
    with ThreadPoolExecutor(processes or len(os.sched_getaffinity(0))) as pool:  # threads that wait for a child each
        return list(pool.map(lambda source: run_program(source, seconds=seconds), programs))


def judge(items, *, seconds=SECONDS, processes=None):
    """Give each sample of HumanEval its metric, pass@1, and `outcome`: how its program ended. Changes the samples."""
    programs = [f"{item['context']}{item['generation']}\n{item['gold']}" for item in items]
    for item, outcome in zip(items, run_programs(programs, seconds, processes), strict=True):
        item["metrics"] = {"pass@1": float(outcome.status == PASSED)}
        item["outcome"] = f"{outcome.status}: {outcome.detail}" if outcome.detail else outcome.status


def read_problems(path):
    """HumanEval's rows from its .jsonl or .jsonl.gz. ValueError where columns are missing, FileNotFoundError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"humaneval needs {path}, which is not there; `make eval-data` makes such a folder")
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        problems = [json.loads(line) for line in lines]
    for number, row in enumerate(problems):
        if missing := {"task_id", "prompt", "canonical_solution", "test", "entry_point"} - row.keys():
            raise ValueError(f"{path}, row {number}: no column {', '.join(sorted(missing))}; is it HumanEval's file?")
    return problems


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m eval.humaneval", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("problems", type=Path, help="HumanEval.jsonl, or .jsonl.gz")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each program (default %(default)s)")
    flags = parser.parse_args(argv)
    try:
        problems = read_problems(flags.problems)
        solutions = [problem["canonical_solution"] for problem in problems]
        outcomes = run_completions(problems, solutions, seconds=flags.seconds)
    except (OSError, ValueError) as error:  # SandboxError is a ValueError
        print(f"error: {error}", file=sys.stderr)
        return 2
    for problem, outcome in zip(problems, outcomes, strict=True):
        if outcome.status != PASSED:
            print(f"{problem['task_id']}: {outcome.status}: {outcome.detail}")
    n_passed = sum(outcome.status == PASSED for outcome in outcomes)
    print(f"{n_passed} of {len(problems)} canonical solutions pass")
    return 0 if n_passed == len(problems) else 1


if __name__ == "__main__":
    run_command(main)

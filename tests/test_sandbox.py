"""What a model wrote cannot harm the machine: every kind of mischief is really tried, in the sandbox."""

import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT

from eval import humaneval, sandbox
from eval.sandbox import FAILED, PASSED, TIMED_OUT, Outcome, SandboxError, run_program

try:
    sandbox.check_sandbox()
except SandboxError as error:
    pytestmark = pytest.mark.skip(reason=str(error))

SYSTEM_PYTHON = Path("/usr/bin/python3")


def tell(expression):
    """What an expression is inside the sandbox."""
    outcome = run_program(f"import os\nraise ValueError(repr({expression}))")
    return eval(eval(outcome.detail.removeprefix("raised ValueError: ")))


def survivors():
    """Processes that run the sandbox's file."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        found += [path for word in words if word == str(Path(sandbox.__file__).resolve()).encode()]
    return found


def test_right_program_passes_and_a_wrong_one_says_why():
    assert run_program("import math, re, collections\nassert math.gcd(4, 6) == 2") == Outcome(status=PASSED, detail="")
    assert run_program("assert 1 == 2, 'not so'").detail == "raised AssertionError: 'not so'"
    assert run_program("def f(:").status == FAILED
    assert "a line\\nand another" in run_program("raise ValueError('a line\\nand another')").detail


@pytest.mark.parametrize("exit_early", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"])
def test_program_that_leaves_before_its_end_has_not_passed(exit_early):
    assert run_program(exit_early).status == FAILED


def test_program_cannot_say_itself_that_it_passed():
    shout = "import os\nfor fd in range(3, 64):\n  try: os.write(fd, b'done\\n')\n  except OSError: pass"
    assert run_program(f"{shout}\nos._exit(0)").status == FAILED


def test_endless_loop_ends_at_the_clock():
    started = time.monotonic()
    assert run_program("while True: pass", seconds=1).status == TIMED_OUT
    assert run_program("import time; time.sleep(60)", seconds=1).status == TIMED_OUT
    ignoring = "import signal\nfor s in (1, 2, 14, 15, 24): signal.signal(s, signal.SIG_IGN)\nwhile True: pass"
    assert run_program(ignoring, seconds=1).status == TIMED_OUT
    assert time.monotonic() - started < 15


def test_fork_bomb_is_held_down_and_leaves_no_process():
    bomb = "import os, time\nn = 0\nwhile True:\n  try: n += os.fork() > 0\n  except OSError: time.sleep(0.01)"
    assert run_program(bomb, seconds=1).status == TIMED_OUT
    assert "BlockingIOError" in run_program("import os\nwhile True: os.fork()", seconds=5).detail
    orphan = "import os, time\nif os.fork() == 0:\n  os.setsid()\n  time.sleep(60)"
    assert run_program(orphan).status == PASSED
    count = "import os\nn = 0\ntry:\n  while True:\n    if os.fork() == 0:\n      while True: pass\n    n += 1\n"
    detail = run_program(f"{count}except OSError: raise ValueError(n)", processes=8, seconds=5).detail
    assert 1 <= int(detail.removeprefix("raised ValueError: '")[:-1]) <= 8
    time.sleep(0.2)
    assert survivors() == []


def test_files_of_this_machine_are_not_there_to_be_read_or_deleted(tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("kept")
    assert "FileNotFoundError" in run_program(f"import os; os.remove({str(mine)!r})").detail
    assert "FileNotFoundError" in run_program("open('/etc/passwd')").detail
    library = json.__file__
    for act in (f"os.remove({library!r})", f"open({library!r}, 'a')", f"os.chmod({library!r}, 0o777)"):
        assert (
            "OSError" in run_program(f"import os; {act}").detail
            or "PermissionError" in run_program(f"import os; {act}").detail
        )
    erase = "import os, shutil\nshutil.rmtree('/', ignore_errors=True)"
    run_program(erase)
    assert mine.read_text() == "kept" and Path(library).is_file()
    assert tell("os.path.exists('/proc') or os.path.exists('/dev') or os.path.exists('/home')") is False
    assert tell("os.listdir('/tmp')") == []


def test_there_is_no_network_not_even_to_this_machine():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        address = server.getsockname()
        outcome = run_program(f"import socket; socket.create_connection({address!r}, 2)")
        assert outcome.status == FAILED and "unreachable" in outcome.detail
        with pytest.raises(TimeoutError):
            server.accept()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0braid-sandbox-test")
        server.listen()
        connect = "import socket; socket.socket(socket.AF_UNIX).connect('\\0braid-sandbox-test')"
        assert "ConnectionRefusedError" in run_program(connect).detail


def test_memory_and_files_have_a_limit():
    assert "MemoryError" in run_program("x = bytearray(1 << 30)", memory_mib=512).detail
    assert "File too large" in run_program("open('x', 'wb').write(bytes(20 << 20))").detail
    fill = "for i in range(9):\n  open(str(i), 'wb').write(bytes(4 << 20))"
    assert "No space left" in run_program(fill).detail
    assert run_program("while True: print('x' * 100000)", seconds=1).status == TIMED_OUT


def test_program_has_no_privilege_no_environment_and_no_other_program(monkeypatch):
    monkeypatch.setenv("TOKEN", "secret")
    assert "TOKEN" not in tell("dict(os.environ)")
    assert "FileNotFoundError" in run_program("import subprocess; subprocess.run(['/bin/sh', '-c', 'ls'])").detail
    assert "ProcessLookupError" in run_program(f"import os; os.kill({os.getpid()}, 9)").detail
    assert "PermissionError" in run_program("import os; os.kill(1, 9)").detail or os.geteuid() != 0
    for call in ("unshare(0x10000000)", "mount(b'x', b'/tmp', b'tmpfs', 0, None)", "sethostname(b'x', 1)"):
        outcome = run_program(f"import ctypes\nassert ctypes.CDLL(None).{call} == 0")
        assert "AssertionError" in outcome.detail, call


def test_sandbox_needs_no_root(tmp_path):
    if os.geteuid() != 0 or not SYSTEM_PYTHON.exists():
        pytest.skip("the tests do not run as root, or there is no Python that everybody may run")
    folder = Path("/tmp") / f"braid-sandbox-{os.getpid()}"
    (folder / "eval").mkdir(parents=True)
    try:
        shutil.copy(ROOT / "eval/sandbox.py", folder / "eval/sandbox.py")
        for path in (folder, folder / "eval"):
            path.chmod(0o755)
        code = (
            "from eval.sandbox import run_program as run\nimport os\nassert os.geteuid() == 65534\n"
            "print(run('x = 1').status, run('import os\\nwhile True: os.fork()').status)\n"
            'print(run(\'open("/usr/lib/x", "w")\').detail)'
        )
        result = subprocess.run(
            [SYSTEM_PYTHON, "-c", code], cwd=folder, user=65534, group=65534, extra_groups=[], env={},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    finally:
        shutil.rmtree(folder)
    assert result.stdout.startswith("passed failed\nraised OSError"), result.stderr


def test_nothing_is_run_where_namespaces_are_forbidden(tmp_path):
    mark = tmp_path / "ran"
    problems = tmp_path / "problems.jsonl"
    row = {"task_id": "x/0", "prompt": f"open({str(mark)!r}, 'w')\n", "canonical_solution": "", "entry_point": "f"}
    problems.write_text(json.dumps(row | {"test": "def check(f): pass\ndef f(): pass"}) + "\n")
    forbid = f"echo 0 > /proc/sys/user/max_user_namespaces && exec {sys.executable} -m eval.humaneval {problems}"
    result = subprocess.run(
        ["unshare", "--user", "--map-root-user", "sh", "-c", forbid],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 2 and result.stdout == ""
    [error] = result.stderr.splitlines()
    assert error.startswith("error: no sandbox can be made on this machine, so nothing is run: the kernel")
    assert "forbids user namespaces" in error
    assert not mark.exists()


PROBLEM = {
    "task_id": "own/0",
    "prompt": 'def double(n):\n    """Twice n."""\n',
    "canonical_solution": "    return 2 * n\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
    "entry_point": "double",
}


def test_completions_are_judged_by_the_problems_own_tests():
    completions = [PROBLEM["canonical_solution"], "    return n * n\n", "    while True: n += 1\n", "    return ("]
    outcomes = humaneval.run_completions([PROBLEM] * 4, completions, seconds=2, processes=2)
    assert [outcome.status for outcome in outcomes] == [PASSED, FAILED, TIMED_OUT, FAILED]


def test_file_that_is_not_there_is_refused_with_the_way_to_it(tmp_path, capsys):
    assert humaneval.main([str(tmp_path / "test.jsonl")]) == 2
    said = f"error: humaneval needs {tmp_path}/test.jsonl, which is not there; `make eval-data` makes such a folder\n"
    assert capsys.readouterr().err == said


def test_canonical_solutions_are_checked_from_the_command_line(tmp_path, capsys):
    path = tmp_path / "problems.jsonl.gz"
    wrong = {**PROBLEM, "task_id": "own/1", "canonical_solution": "    return 3\n"}
    with gzip.open(path, "wt") as file:
        file.write(json.dumps(PROBLEM) + "\n")
    assert humaneval.main([str(path)]) == 0
    assert capsys.readouterr().out == "1 of 1 canonical solutions pass\n"
    with gzip.open(path, "at") as file:
        file.write(json.dumps(wrong) + "\n")
    assert humaneval.main([str(path)]) == 1
    out = capsys.readouterr().out
    assert "own/1: failed: raised AssertionError" in out and "1 of 2 canonical" in out
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    assert humaneval.main([str(tmp_path / "other.jsonl")]) == 2
    assert "is it HumanEval's file?" in capsys.readouterr().err


def test_samples_are_judged_by_the_tests_that_they_carry():
    gold = f"{PROBLEM['test']}\ncheck({PROBLEM['entry_point']})"
    items = [
        {"context": PROBLEM["prompt"], "generation": text, "gold": gold, "metrics": {}}
        for text in ("    return n + n", "    return 5")
    ]
    humaneval.judge(items)
    assert [item["metrics"] for item in items] == [{"pass@1": 1.0}, {"pass@1": 0.0}]
    assert items[0]["outcome"] == "passed" and items[1]["outcome"] == "failed: raised AssertionError"

"""The planner as a program: from any folder, without torch, in a blink, in tables and in one JSON object."""

import json
import resource
import subprocess
import sys

import pytest
from launching import ROOT

from launch.estimate import main
from model.config import PRESETS

PROMISED = {
    "parameters", "flops_per_token", "memory_gib_per_gpu", "fits", "tokens_per_s", "days", "gpu_hours", "dollars",
}  # fmt: skip


def test_estimate_prints_json_from_another_folder(tmp_path):
    command = [sys.executable, str(ROOT / "launch/estimate.py"), "--size", "nano", "--json"]
    result = json.loads(subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout)
    assert result["parameters"] == PRESETS["nano"].n_parameters
    assert result["parameters"] == sum(result["parameters_by_part"].values())
    assert set(result) >= PROMISED


def test_an_estimate_takes_under_two_seconds_without_torch():
    flags = ["--size", "6.7B", "--gpus", "16", "--gpu", "h100", "--tokens", "100B", "--json"]
    code = f"import sys; sys.modules['torch'] = None; from launch.estimate import main; sys.exit(main({flags}))"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # the process's own seconds: other work does not count
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert set(json.loads(ran.stdout)) >= PROMISED


def test_table_shows_every_part(capsys):
    assert main(["--size", "6.7B"]) == 0
    printed = capsys.readouterr().out
    for part in (*PRESETS["6.7B"].parameters_by_part, "optimizer states", "activations", "dollars", "kWh", "storage"):
        assert part in printed
    assert "deepspeed --num_gpus=8 train/launch.py --size 6.7B" in printed


def test_tables_of_a_search_of_scaling_and_of_what_does_not_fit(capsys):
    assert main(["--size", "1.3B", "--tokens", "20B", "--days", "2", "--scaling"]) == 0
    printed = capsys.readouterr().out
    assert "the cheapest that keeps to it:" in printed and "the fastest that keeps to it:" in printed
    assert " 1024 " in printed and "the fastest: zero1 from 1" in printed
    assert main(["--size", "13B", "--gpus", "1", "--gpu", "rtx4060"]) == 0
    printed = capsys.readouterr().out
    assert "does not fit: " in printed and "what would have to give:" in printed
    assert "start it with" not in printed and "deepspeed" not in printed
    assert main(["--size", "13B", "--tokens", "1T", "--days", "1", "--gpu", "a100-40"]) == 0
    assert "nothing keeps to it; the nearest:" in capsys.readouterr().out


def test_rows_much_longer_than_documents_show_what_whole_rows_take(capsys):
    """The MFU counts attention over the row, the time within documents: so it may pass the peak."""
    asked = ["--size", "6.7B", "--gpus", "64", "--seq-len", "1000000", "--ds-config", "zero3", "--recompute", "layer"]
    assert main(asked) == 0
    printed = capsys.readouterr().out
    assert " s, on documents of 1,024 tokens on average (--document-tokens)\n" in printed
    (line,) = (line for line in printed.splitlines() if "documents as long as a row: " in line)
    assert main([*asked, "--json"]) == 0
    packed = json.loads(capsys.readouterr().out)
    assert main([*asked, "--document-tokens", "1000000", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert packed["mfu"] > 1 > whole["mfu"]
    assert packed["whole_rows"] == {name: whole[name] for name in ("tokens_per_s", "mfu", "days")}
    assert f"{whole['tokens_per_s']:,.0f} tokens/s, {whole['mfu']:.0%}" in line
    assert main(["--size", "6.7B"]) == 0
    assert "documents as long as a row" not in capsys.readouterr().out


def test_unknown_size_gets_one_line_and_exit_code_2(capsys):
    assert main(["--size", "7B"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown size '7B'; choose one of ")


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--gpu", "h300"], "unknown GPU 'h300'; choose one of a100-40, "),
        (["--tokens", "many"], "argument --tokens: 'many' is not a number above 0; write it as 100B, 300M, 20K or "),
        (["--tokens", "nan"], "argument --tokens: "),
        (["--gpus", "0"], "argument --gpus: '0' is not a whole number; allowed: 1 or more"),
        (["--gpus", "-8"], "argument --gpus: '-8' is not a whole number; "),
        (["--budget", "0"], "argument --budget: "),
        (["--provider", "nobody"], "unknown provider 'nobody'; launch/prices.json has "),
        (["--provider", "nobody"], "'RunPod', 'largest clouds, middle of the market', 'own machine, "),
        (["--provider", "packet.ai"], "has no on-demand price of h100 from packet.ai; add it there, or "),
        (
            ["--gpu", "a100-40", "--spot"],
            "has no spot price of a100-40 from anybody; add it there, or take one of: AWS capacity blocks (",
        ),
        (["--batch-tokens", "1000"], "--batch-tokens 1,000 is not a multiple of 65,536 (8 GPUs x 1 "),
        (["--tokens", "5"], "--tokens 5 do not fill one step of 1,048,576 tokens; "),
        (
            ["--ds-config", "zero3_hpz", "--gpus", "12"],
            "--ds-config zero3_hpz: its groups of 8 are for several whole ",
        ),
        (
            ["--ds-config", "zero2_offload", "--optimizer", "adamw8bit"],
            "--ds-config zero2_offload: the optimizer steps ",
        ),
        (["--fp8", "--gpu", "a100-80"], "--fp8: A100 SXM 80 GB has no 8-bit products; these have: h100, "),
        (["--layer-pattern", "MAX"], "layer pattern 'MAX' is not a string of M "),
        (["--plot", "x.png"], "--plot x.png: the pictures are a page; "),
        (["--plot", "no/folder/x.html"], "--plot no/folder/x.html cannot be written: No such file or directory; "),
        (["--ds-config", "zero9"], "argument --ds-config: "),
        (["--budget", "100", "--size", "13B", "--gpu", "rtx4060"], "13B fits into no set-up of rtx4060; "),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(flags, said, capsys):
    try:
        code = main(["--size", "1.3B", *flags])
    except SystemExit as stopped:  # argparse's own
        code = stopped.code
    printed = capsys.readouterr().err
    assert code == 2
    assert printed.startswith("error: ") and said in printed
    assert printed.count("\n") == 1


def test_pictures_without_plotly_get_one_line_that_says_how_to_have_it(monkeypatch, tmp_path, capsys):
    monkeypatch.delitem(sys.modules, "launch.picture", raising=False)
    monkeypatch.setitem(sys.modules, "plotly", None)
    assert main(["--size", "1.3B", "--plot", str(tmp_path / "plan.html")]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: --plot needs plotly, ") and "pip install plotly" in printed.err
    assert printed.err.count("\n") == 1 and not printed.out

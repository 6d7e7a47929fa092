"""The table of GPUs: every figure has its source, and a device's name finds its row."""

import pytest

from launch import estimate
from train import launch as train_launch
from train.hardware import TABLE, get_gpu, gpu_of, load_gpus

FIGURES = {"dense_tflops", "memory_gib", "bandwidth_gb_s", "link_gb_s", "pcie_gb_s", "network_gb_s", "watts"}


@pytest.mark.parametrize("gpu", load_gpus().values(), ids=load_gpus())
def test_every_figure_is_positive_and_has_a_source(gpu):
    assert set(gpu.sources) == FIGURES
    for name in FIGURES - {"dense_tflops"}:
        assert getattr(gpu, name) > 0, name
    assert gpu.dense_tflops["bf16"] >= gpu.dense_tflops["tf32"] >= gpu.dense_tflops["fp32"] / 1.01


@pytest.mark.parametrize(
    "device_name, name",
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("A100-SXM4-40GB", "a100-40"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", "rtx4060-laptop"),
    ],
)
def test_device_name_finds_its_row(device_name, name):
    assert gpu_of(device_name).name == name


@pytest.mark.parametrize("device_name", ["NVIDIA GeForce RTX 4060 Ti", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "cpu"])
def test_device_that_is_not_in_the_table_is_not_taken_for_its_neighbour(device_name):
    assert gpu_of(device_name) is None


def test_dense_peak_is_not_the_sparse_one():
    assert get_gpu("h200").dense_tflops["bf16"] == 989  # 1,979 is with sparsity
    assert get_gpu("a100-80").dense_tflops["bf16"] == 312  # 624 is with sparsity


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown GPU 'h300'; choose one of a100-40, "):
        get_gpu("h300")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"memory_gib": 39.4,', '"memory_gib": 39.4', "of GPUs: Expecting ',' delimiter: line 7 column 5"),
        ("bandwidth_gb_s", "bandwith_gb_s", ", at 'a100-40': missing or unknown: bandwidth_gb_s, bandwith_gb_s; its"),
        ("39.4", '"39.4"', ", at 'a100-40': memory_gib '39.4' is not a number above 0"),
        ('"gpus_per_node": 8', '"gpus_per_node": 8.5', "gpus_per_node 8.5 is not a whole number above 0"),
        ('"watts": 400', '"watts": 0', "watts 0 is not a number above 0"),
        ('"bf16": 312, ', "", "dense_tflops bf16 None is not a number above 0"),
        ('["A100-SXM4-40GB"]', '"A100-SXM4-40GB"', "device_names 'A100-SXM4-40GB' is not a list"),
        ('"a100-40": {', '"x": 3, "a100-40": {', ", at 'x': "),
    ],
)
def test_table_that_is_edited_wrongly_is_refused_by_its_path(tmp_path, old, new, words):
    path = tmp_path / "gpus.json"
    path.write_text(TABLE.read_text().replace(old, new, 1))
    with pytest.raises(ValueError) as caught:
        load_gpus(path)
    assert str(caught.value).startswith(f"{path} is not a table of GPUs") and words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("program", [estimate, train_launch])
def test_programs_say_in_one_line_what_is_wrong_with_the_table(tmp_path, monkeypatch, capsys, program):
    path = tmp_path / "gpus.json"
    path.write_text("{]")
    monkeypatch.setattr(program, "load_gpus", lambda: load_gpus(path))
    assert program.main(["--size", "nano", "--data", "data/x"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path} is not a table of GPUs: ")

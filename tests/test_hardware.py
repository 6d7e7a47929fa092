"""The table of GPUs: every figure has its source, and a device's name finds its row."""

import pytest

from train.hardware import GPUS, get_gpu, gpu_of, load_gpus

FIGURES = {"dense_tflops", "memory_gib", "bandwidth_gb_s", "link_gb_s", "pcie_gb_s", "network_gb_s", "watts"}


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
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
    assert GPUS["h200"].dense_tflops["bf16"] == 989  # 1,979 is with sparsity
    assert GPUS["a100-80"].dense_tflops["bf16"] == 312  # 624 is with sparsity


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown GPU 'h300'; choose one of a100-40, "):
        get_gpu("h300")


def test_table_with_a_wrong_field_is_refused_by_its_path(tmp_path):
    path = tmp_path / "gpus.json"
    path.write_text('{"x": {"device_names": [], "memory": 3}}')
    with pytest.raises(ValueError, match=r"gpus\.json is not a table of GPUs"):
        load_gpus(path)

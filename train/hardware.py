"""GPUs: peaks, memory, bandwidth and links, read from gpus.json, which a user may edit. Needs no torch.

GPUS["h200"].dense_tflops["bf16"] == 989;  gpu_of("NVIDIA H200").name == "h200"
"""

import json
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("gpus.json")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU. Peaks are dense, never with sparsity; links count one direction, where datasheets add both."""

    # fmt: off
    name: str             # as in GPUS: h200
    title: str            # as people say it: H200 SXM 141 GB
    device_names: tuple   # what torch.cuda.get_device_name() says, without "NVIDIA "
    dense_tflops: dict    # {"bf16": 989, "fp8": ..., "tf32": ..., "fp32": ...}, TFLOP/s; "fp8" only where there is any
    memory_gib: float     # what CUDA says the card has in all
    bandwidth_gb_s: float # of its memory
    gpus_per_node: int    # in the usual machine
    link: str             # between the GPUs of a machine: NVLink 4, PCIe 4
    link_gb_s: float      # of that link, a GPU and direction
    pcie_gb_s: float      # between GPU and CPU, a direction
    network_gb_s: float   # between machines, a GPU and direction
    watts: float          # board power
    sources: dict         # {field: where its figure is from}
    # fmt: on


def load_gpus(path=TABLE):
    """{name: Gpu} of a JSON file like gpus.json. Raises ValueError, in one line, for a file or field that is wrong."""
    try:
        entries = json.loads(Path(path).read_text())
        return {
            name: Gpu(name=name, **(fields | {"device_names": tuple(fields["device_names"])}))
            for name, fields in entries.items()
        }
    except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a table of GPUs: {error}") from None


GPUS = load_gpus()


def get_gpu(name):
    """GPUS[name]. Raises ValueError, in one line, for a name that is not there."""
    if name not in GPUS:
        raise ValueError(f"unknown GPU {name!r}; choose one of {', '.join(GPUS)}, or add it to train/{TABLE.name}")
    return GPUS[name]


def gpu_of(device_name):
    """The Gpu of a name as torch.cuda.get_device_name() gives it; None for one that is not in the table."""
    wanted = device_name.removeprefix("NVIDIA ").lower()
    return next((gpu for gpu in GPUS.values() if wanted in (n.lower() for n in gpu.device_names)), None)

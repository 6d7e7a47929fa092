"""GPUs: peaks, memory, bandwidth and links, read from gpus.json, which a user may edit. Needs no torch.

load_gpus()["h200"].dense_tflops["bf16"] == 989;  gpu_of("NVIDIA H200").name == "h200"
"""

import json
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("gpus.json")
KINDS = {
    str: "a string", int: "a whole number above 0", float: "a number above 0", list: "a list", dict: "an object",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU. Peaks are dense, never with sparsity; links count one direction, where datasheets add both."""

    # fmt: off
    name: str             # as in gpus.json: h200
    title: str            # as people say it: H200 SXM 141 GB
    device_names: list    # what torch.cuda.get_device_name() says, without "NVIDIA "
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

    def __post_init__(self):
        for name, value, kind in self._values():
            right = isinstance(value, int | float if kind is float else kind) and not isinstance(value, bool)
            if not right or (kind in (int, float) and not value > 0):
                raise ValueError(f"{name} {value!r} is not {KINDS[kind]}")

    def _values(self):
        """Yield (name, value, what it must be), fields first."""
        for f in fields(self):
            yield f.name, getattr(self, f.name), f.type
        for name in self.device_names:
            yield "device_names", name, str
        for key in {"bf16"} | self.dense_tflops.keys():
            yield f"dense_tflops {key}", self.dense_tflops.get(key), float


@cache
def load_gpus(path=TABLE):
    """{name: Gpu} of a JSON file like gpus.json. Raises ValueError, in one line, for a file or field that is wrong."""
    known, at, gpus = [f.name for f in fields(Gpu) if f.name != "name"], "", {}
    try:
        for name, given in json.loads(Path(path).read_text()).items():
            at = f", at {name!r}"
            if wrong := given.keys() ^ known:
                raise ValueError(f"missing or unknown: {', '.join(sorted(wrong))}; its fields are {', '.join(known)}")
            gpus[name] = Gpu(name=name, **given)
    except (ValueError, AttributeError) as error:  # AttributeError: no object where there must be one
        raise ValueError(f"{path} is not a table of GPUs{at}: {error}") from None
    return gpus


def get_gpu(name):
    """The Gpu of a name in the table. Raises ValueError, in one line, for a name that is not there."""
    gpus = load_gpus()
    if name not in gpus:
        raise ValueError(f"unknown GPU {name!r}; choose one of {', '.join(gpus)}, or add it to train/{TABLE.name}")
    return gpus[name]


def gpu_of(device_name):
    """The Gpu of a name as torch.cuda.get_device_name() gives it; None for one that is not in the table."""
    wanted = device_name.removeprefix("NVIDIA ").lower()
    return next((gpu for gpu in load_gpus().values() if wanted in (n.lower() for n in gpu.device_names)), None)

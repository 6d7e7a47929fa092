"""Which kernels run: the one place that picks between model/reference.py and model/fused.py.

Both have the same functions with the same signatures. The choice belongs to the run, not to the model's shape.
"""

import copyreg
import os
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

# A network keeps the module that load_ops gave it; by name, so that it can still be copied and pickled.
copyreg.pickle(ModuleType, lambda module: (import_module, (module.__name__,)))

KERNELS = ("auto", "torch", "fused")
# what model/fused.py imports -> what pip calls it
PACKAGES = {"triton": "triton"}
NO_GPU = "no CUDA GPU is visible"


def load_ops(name):
    """The module that runs the scan, the convolution, the norms, attention and the loss.

    name: "torch", "fused", or "auto" (fused where its packages and a GPU are present, else torch). Says which on
    stderr, once a process; where a launcher gave ranks, rank 0 alone. Raises ValueError for another name, ImportError,
    naming the package and the pip line, if "fused" was asked for and cannot load.
    """
    if name not in KERNELS:
        raise ValueError(f"--kernels {name!r} is unknown; choose one of {', '.join(KERNELS)}")
    missing = None
    if name == "fused" or (name == "auto" and torch.cuda.is_available()):
        missing = why_not_fused()
    elif name == "auto":
        missing = NO_GPU
    if name == "fused" and missing:
        raise ImportError(f"--kernels fused cannot run: {missing}; or choose --kernels torch")
    if name == "torch" or missing:
        announce("torch" + (f" ({missing})" if missing else ""))
        return import_module("model.reference")
    fused = import_module("model.fused")
    announce(f"fused ({fused.ABOUT})")
    return fused


def why_not_fused():
    """What the fused kernels lack here, in one line with what to do about it; None if nothing."""
    for package, name in PACKAGES.items():
        if find_spec(package) is None:
            return f"{name} is not installed: pip install triton, which PyTorch for GPUs brings along"
    if not torch.cuda.is_available():
        return NO_GPU
    try:
        import_module("model.fused")
    except ImportError as error:  # a package that is there, but was built for another torch
        line = str(error).splitlines()[0]
        return f"{line}: reinstall it for this PyTorch"
    return None


@cache  # once a process for each choice
def announce(choice):
    if os.environ.get("RANK", "0") == "0":
        print(f"kernels: {choice}", file=sys.stderr, flush=True)

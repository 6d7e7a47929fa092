"""Import before any kernel: Triton runs them on the CPU (conftest.py sees to it). Skips where that cannot be."""

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("with a GPU, tests/test_gpu.py runs the kernels", allow_module_level=True)
interpreter = pytest.importorskip("triton.runtime.interpreter")
patch_lang_tensor = interpreter._patch_lang_tensor


def patch_and_read_scalars(tensor, scope):
    """Triton 3.6 takes int() of an array of one number, which NumPy 2.4 refuses."""
    patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = patch_and_read_scalars

"""Import before any kernel: Triton then runs them on the CPU, one program after another. Skips where it is missing."""

import os

import pytest

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

interpreter = pytest.importorskip("triton.runtime.interpreter")
patch_lang_tensor = interpreter._patch_lang_tensor


def patch_and_read_scalars(tensor, scope):
    """Triton 3.6 takes int() of an array of one number, which NumPy 2.4 refuses."""
    patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = patch_and_read_scalars

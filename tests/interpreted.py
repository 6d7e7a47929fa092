"""Import before any kernel: Triton runs them on the CPU (conftest.py sees to it). Skips where that cannot be."""

import numpy as np
import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("with a GPU, tests/test_gpu.py runs the kernels", allow_module_level=True)
interpreter = pytest.importorskip("triton.runtime.interpreter")
patch_lang_tensor, create_dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot


def patch_and_read_scalars(tensor, scope):
    """numpy 2.4 reads no number from an array of one dimension, as Triton's range() asks it to."""
    patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def dot_of_bfloat16(self, a, b, *rest):
    """Triton 3.6 would multiply bfloat16 numbers' bits, as integers."""

    def in_float32(handle):
        if handle.dtype.scalar != interpreter.tl.bfloat16:
            return handle
        data = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, interpreter.tl.float32)

    return create_dot(self, in_float32(a), in_float32(b), *rest)


interpreter._patch_lang_tensor = patch_and_read_scalars
interpreter.InterpreterBuilder.create_dot = dot_of_bfloat16

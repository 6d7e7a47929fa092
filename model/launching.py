"""Operations whose Python runs once: what they allocate and launch is taped, and played from then on.

Between the kernels of an operation lies Python: views, strides, grids, descriptors, Triton's search for the kernel
that was compiled for such arguments. It takes longer than a small kernel does, and comes to the same for all tensors
of the same kinds. A function that is `remembered` tapes what it does and, given other tensors of those kinds, plays
the tape: the same kernels and operations of PyTorch at the new addresses. A tape holds neither tensors nor addresses.

Such a function may make views, allocate, call PyTorch's operations and `launch` kernels. It may not depend on a
global that changes, on whether gradients are wanted or on the stream, nor keep a tensor or anything else for later.
One that reads what tensors hold, uses a tensor from elsewhere, or is given tensors that overlap, is not taped and runs
as it is written; so does function.__wrapped__ always.
"""

import functools
import threading
from typing import Any, NamedTuple

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

MOST_TAPES = 256  # of a function: evaluation has ever other lengths
ALIGNMENT = 512  # bytes, as PyTorch's own allocations
OPTIONS = ("num_warps", "num_stages")  # what a launch takes that is no argument of the kernel
EMPTY = {getattr(torch.ops.aten, name) for name in ("empty", "empty_like", "empty_strided", "new_empty")}
NEVER_ALIKE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INTERPRETED = triton.knobs.runtime.interpret  # on the CPU, for tests


class Recording(threading.local):
    events = None  # what this thread's function has done so far; None where none is being taped


recording = Recording()


def remembered(function):
    """For a function of tensors (the first argument is one) and what can be hashed, that returns tensors and None."""
    tapes = {}

    @functools.wraps(function)
    def call(*args):
        if recording.events is not None:
            return function(*args)  # a part of what is being taped
        kinds = tuple([kind(arg) if isinstance(arg, torch.Tensor) else arg for arg in args])
        tape = tapes.get(kinds)
        if tape is None:
            if len(tapes) >= MOST_TAPES:
                tapes.clear()
            tapes[kinds], result = record(function, args)
            return result
        return tape.play(args) if tape.alike else function(*args)

    call.tapes = tapes
    return call


def kind(tensor):
    """All of a tensor that decides what is done with it; 16 bytes is the alignment that Triton looks at."""
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % 16 == 0, tensor.device


def launch(kernel, grid, *args, **constants):
    """kernel[grid](*args, **constants), on tape if there is one."""
    if recording.events is None:
        kernel[grid](*args, **constants)
        return
    with torch._C._DisableTorchDispatch():  # the interpreter's own operations are not ours
        compiled = kernel[grid](*args, **constants)
    recording.events.append((kernel, grid, args, constants, compiled))


def record(function, args):
    """The Tape of function(*args), and what that returns."""
    recording.events = []
    try:
        with Recorder():
            result = function(*args)
        return Tape(args, recording.events, result), result
    finally:
        recording.events = None


class Recorder(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if not operation.is_view:
            recording.events.append((operation, args, kwargs or {}, result))
        return result


class NotAlike(Exception):
    """What would be done next time may be something else."""


class Tape:
    """What a function did. alike: it will do the same for other tensors.

    In play, tensors are those given, the room for all that is no result, and those that the steps make, in this order.
    """

    def __init__(self, args, events, result):
        self.given = [i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor)]
        self.known = [(args[i], place, 0) for place, i in enumerate(self.given)]  # place, and bytes behind its start
        self.made, self.room, self.steps = len(self.given) + 1, 0, []
        self.many = isinstance(result, tuple)
        results = result if self.many else (result,)
        kept = [storage(part) for part in results if part is not None]
        try:
            for function, *event in events:
                if isinstance(function, torch._ops.OpOverload):
                    self.note(kept, function, *event)
                else:
                    self.steps.append(self.launch(function, *event))
            self.results, self.alike = self.places(results), True
        except NotAlike:
            self.alike = False
        del self.known  # or they would live as long as the tape

    def play(self, args):
        tensors = [args[i] for i in self.given]
        with torch.cuda.device_of(tensors[0]):
            stream = None if INTERPRETED else driver.active.get_current_stream(tensors[0].device.index)
            room = torch.empty(self.room, dtype=torch.uint8, device=tensors[0].device) if self.room else None
            tensors.append(room)
            for step in self.steps:
                step(tensors, stream)
        results = put_back(self.results, tensors)
        return tuple(results) if self.many else results[0]

    def note(self, kept, operation, args, kwargs, result):
        """An operation of PyTorch's."""
        if not isinstance(result, torch.Tensor) or NEVER_ALIKE.intersection(operation.tags):
            raise NotAlike
        makes = not any(storage(tensor) == storage(result) for tensor, *_ in self.known)
        if operation.overloadpacket not in EMPTY:
            self.steps.append(Operation(operation, self.places([*args, *kwargs.values()]), tuple(kwargs), makes))
        elif storage(result) in kept:
            self.steps.append(Allocation(result))
        else:
            makes = False
            self.known.append((result, len(self.given), self.room))
            self.room += -(-extent(result) * result.element_size() // ALIGNMENT) * ALIGNMENT
        if makes:
            self.known.append((result, self.made, 0))
            self.made += 1

    def launch(self, kernel, grid, args, constants, compiled):
        values = [*args, *(constants[name] for name in kernel.arg_names[len(args) :])]
        if INTERPRETED:
            options = {name: value for name, value in constants.items() if name in OPTIONS}
            return Launch(functools.partial(kernel[grid], **options), self.places(values))
        return Launch(compiled[(*grid, 1, 1)[:3]], self.places(values))

    def places(self, values):
        """The values, with a Place for each tensor and a Tile for each descriptor."""
        return [self.place(value) for value in values]

    def place(self, value):
        if isinstance(value, torch.Tensor):
            return self.place_of(value)
        if isinstance(value, TensorDescriptor):
            return Tile(self.place_of(value.base), {**vars(value), "base": None})
        if isinstance(value, tuple) and any(isinstance(part, torch.Tensor) for part in value):
            raise NotAlike
        return self.places(value) if isinstance(value, list) else value

    def place_of(self, tensor):
        """In the only tensor known in whose memory it begins."""
        found = []
        for known, index, behind in self.known:
            offset = (tensor.storage_offset() - known.storage_offset()) * known.element_size()
            if storage(known) == storage(tensor) and 0 <= offset < extent(known) * known.element_size():
                found.append((known, index, behind + offset))
        if len(found) != 1 or found[0][0].dtype != tensor.dtype:
            raise NotAlike
        ((known, index, behind),) = found
        whole = index != len(self.given) and (tensor.shape, tensor.stride()) == (known.shape, known.stride())
        return Place(index, behind, tensor.dtype, None if whole else tuple(tensor.shape), tensor.stride())


def storage(tensor):
    return tensor.untyped_storage()._cdata


def extent(tensor):
    """How far a tensor reaches in memory, in elements."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return reach + 1 if tensor.numel() else 0


class Place(NamedTuple):
    """Of a tensor: the one it lies in, how far behind its start, and its kind. shape None: it is all of that one."""

    index: int
    bytes: int
    dtype: torch.dtype
    shape: tuple | None
    strides: tuple

    def of(self, tensors):
        tensor = tensors[self.index]
        if self.shape is None:
            return tensor
        if tensor.dtype != self.dtype:  # the room for what is no result
            tensor = tensor.view(self.dtype)
        behind = tensor.storage_offset() + self.bytes // self.dtype.itemsize
        return tensor.as_strided(self.shape, self.strides, behind)


class Tile(NamedTuple):
    """A TensorDescriptor: the place of its tensor, and the rest of it."""

    place: Place
    rest: dict

    def at(self, base):
        tile = object.__new__(TensorDescriptor)  # without its checks, which it passed when it was taped
        tile.__dict__.update(self.rest, base=base)
        return tile


class Address:
    """What Triton asks of a descriptor's tensor."""

    def __init__(self, pointer):
        self.pointer = pointer

    def data_ptr(self):
        return self.pointer


def put_back(value, tensors):
    if isinstance(value, Place):
        return value.of(tensors)
    return [put_back(part, tensors) for part in value] if isinstance(value, list) else value


class Allocation:
    def __init__(self, like):
        self.make = functools.partial(
            torch.empty_strided, like.shape, like.stride(), dtype=like.dtype, device=like.device
        )

    def __call__(self, tensors, stream):
        tensors.append(self.make())


class Operation(NamedTuple):
    """One of PyTorch's. names: of the last values. makes: a tensor, where others write into one that is there."""

    function: Any
    values: list
    names: tuple
    makes: bool

    def __call__(self, tensors, stream):
        values = put_back(self.values, tensors)
        plain = len(values) - len(self.names)
        result = self.function(*values[:plain], **dict(zip(self.names, values[plain:], strict=True)))
        if self.makes:
            tensors.append(result)


class Launch:
    """Of a compiled kernel, whose pointers may be plain numbers; or in Triton's interpreter, which wants tensors."""

    def __init__(self, start, values):
        self.start, self.values = start, values
        self.tensors = [(i, v, v.index, v.bytes) for i, v in enumerate(values) if isinstance(v, Place)]
        self.tiles = [(i, v, v.place.index, v.place.bytes) for i, v in enumerate(values) if isinstance(v, Tile)]

    def __call__(self, tensors, stream):
        values = self.values.copy()
        if INTERPRETED:
            for i, place, *_ in self.tensors:
                values[i] = place.of(tensors)
            for i, tile, *_ in self.tiles:
                values[i] = tile.at(tile.place.of(tensors))
            self.start(*values)
            return
        for i, _, index, behind in self.tensors:
            values[i] = tensors[index].data_ptr() + behind
        for i, tile, index, behind in self.tiles:
            values[i] = tile.at(Address(tensors[index].data_ptr() + behind))
        self.start(*values, stream=stream)

"""Operations whose Python runs once: what they allocate and launch is taped, and played from then on.

Between the kernels of an operation lies Python: views, strides, grids, descriptors, Triton's search for the kernel
that was compiled for such arguments. It takes longer than a small kernel does, and comes to the same for all tensors
of the same kinds. A function that is `remembered` tapes what it does and, given other tensors of those kinds, plays
the tape: the same kernels and operations of PyTorch at the new addresses, and one allocation for all that is only
needed on the way.

A tape holds neither addresses nor tensors. What depends on more than its arguments' kinds cannot be taped: a function
that reads a tensor's numbers, or is given tensors that overlap, runs as it is written each time.
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
recording = threading.local()  # .tape: this thread's


def remembered(function):
    """For a function of tensors (the first argument is one) and what can be hashed, that returns tensors and None.

    What it does other than through `launch` and PyTorch's operations is done once for all tensors of the same kinds.
    """
    tapes = {}

    @functools.wraps(function)
    def call(*args):
        if getattr(recording, "tape", None):
            return function(*args)  # a part of what is being taped
        kinds = tuple([kind(arg) if isinstance(arg, torch.Tensor) else arg for arg in args])
        tape = tapes.get(kinds)
        if tape is None:
            tape, result = record(function, args)
            if len(tapes) >= MOST_TAPES:
                tapes.clear()
            tapes[kinds] = tape
            return result
        return tape.play(args) if tape.steps else function(*args)

    call.tapes = tapes
    return call


def kind(tensor):
    """All of a tensor that decides what is done with it; 16 bytes is the alignment that Triton looks at."""
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() & 15, tensor.device


def launch(kernel, grid, *args, **constants):
    """kernel[grid](*args, **constants), on tape if there is one."""
    tape = getattr(recording, "tape", None)
    if tape:
        tape.launch(kernel, grid, args, constants)
    else:
        kernel[grid](*args, **constants)


class Place(NamedTuple):
    """Of a tensor: the one it lies in, how far behind its start, and what it is like; None if it is all of that."""

    index: int
    offset: int  # in elements
    dtype: torch.dtype
    shape: tuple | None
    strides: tuple | None

    def of(self, tensors):
        tensor = tensors[self.index]
        if self.shape is None:
            return tensor
        if tensor.dtype != self.dtype:  # it lies in the memory of what is only needed on the way
            tensor = tensor.view(self.dtype)
        return tensor.as_strided(self.shape, self.strides, tensor.storage_offset() + self.offset)

    @property
    def bytes(self):
        return self.offset * self.dtype.itemsize


class Tile(NamedTuple):
    """A TensorDescriptor: where its tensor is, and the rest of it."""

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


class Allocation(NamedTuple):
    shape: tuple
    strides: tuple
    dtype: torch.dtype
    device: torch.device
    makes = True

    def moved(self, move):
        return self

    def __call__(self, tensors, stream):
        tensors.append(torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device))


class Operation(NamedTuple):
    """One of PyTorch's. makes: a tensor, where others write into one that is there."""

    function: Any
    args: list
    names: list  # of those given by name
    values: list
    makes: bool

    def moved(self, move):
        return self._replace(args=move(self.args), values=move(self.values))

    def __call__(self, tensors, stream):
        named = dict(zip(self.names, put_back(self.values, tensors), strict=True))
        result = self.function(*put_back(self.args, tensors), **named)
        if self.makes:
            tensors.append(result)


def put_back(arg, tensors):
    if isinstance(arg, Place):
        return arg.of(tensors)
    return [put_back(part, tensors) for part in arg] if isinstance(arg, list) else arg


class Launch(NamedTuple):
    """A compiled kernel's, whose pointers may be plain numbers. pointers, tiles: where they stand among the values."""

    start: Any
    values: list
    pointers: tuple = ()
    tiles: tuple = ()

    def moved(self, move):
        values = move(self.values)
        pointers = [(i, v.index, v.bytes) for i, v in enumerate(values) if isinstance(v, Place)]
        tiles = [(i, v.place.index, v.place.bytes, v) for i, v in enumerate(values) if isinstance(v, Tile)]
        return self._replace(values=values, pointers=pointers, tiles=tiles)

    def __call__(self, tensors, stream):
        values = self.values.copy()
        for i, index, behind in self.pointers:
            values[i] = tensors[index].data_ptr() + behind
        for i, index, behind, tile in self.tiles:
            values[i] = tile.at(Address(tensors[index].data_ptr() + behind))
        self.start(*values, stream=stream)


class Interpretation(NamedTuple):
    """A launch in Triton's interpreter, which takes tensors."""

    start: Any
    values: list
    options: dict

    def moved(self, move):
        return self._replace(values=move(self.values))

    def __call__(self, tensors, stream):
        values = [
            v.of(tensors) if isinstance(v, Place) else v.at(v.place.of(tensors)) if isinstance(v, Tile) else v
            for v in self.values
        ]
        self.start(*values, **self.options)


class Tape(NamedTuple):
    """tensors: their places in the arguments. many: results are a tuple. Without steps, it cannot be played."""

    tensors: list
    steps: list
    results: list
    many: bool

    def play(self, args):
        tensors = [args[i] for i in self.tensors]
        with torch.cuda.device_of(tensors[0]):
            stream = None if INTERPRETED else driver.active.get_current_stream(tensors[0].device.index)
            for step in self.steps:
                step(tensors, stream)
        results = [put_back(result, tensors) for result in self.results]
        return tuple(results) if self.many else results[0]


def record(function, args):
    """The Tape of function(*args), and what that returns."""
    places = [i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor)]
    recorder = recording.tape = Recorder([args[i] for i in places])
    try:
        with recorder:
            result = function(*args)
    finally:
        recording.tape = None
    many = isinstance(result, tuple)
    try:
        results = [recorder.places_in(part) for part in (result if many else (result,))]
        if recorder.alike:
            steps, results = with_room(recorder, len(places), results)
            return Tape(places, steps, results, many), result
    except NotAlike:
        pass
    return Tape(places, [], [], many), result


class NotAlike(Exception):
    """What is done next time may be something else."""


class Recorder(TorchDispatchMode):
    """Sees every operation of PyTorch. tensors: those that the tape is given and those it makes, in this order."""

    def __init__(self, tensors):
        super().__init__()
        self.tensors, self.steps, self.made, self.alike = tensors, [], {}, True

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        try:
            self.note(operation, args, kwargs or {}, result)
        except NotAlike:
            self.alike = False
        return result

    def note(self, operation, args, kwargs, result):
        if operation.is_view:
            return
        if not isinstance(result, torch.Tensor) or NEVER_ALIKE.intersection(operation.tags):
            raise NotAlike
        if operation.overloadpacket in EMPTY:
            step = Allocation(tuple(result.shape), result.stride(), result.dtype, result.device)
        else:
            makes = not any(same_storage(known, result) for known in self.tensors)
            names, values = list(kwargs), self.places_in(list(kwargs.values()))
            step = Operation(operation, self.places_in(args), names, values, makes)
        self.steps.append(step)
        if step.makes:
            self.made[len(self.tensors)] = step
            self.tensors.append(result)

    def places_in(self, arg):
        if isinstance(arg, list | tuple):
            return [self.places_in(part) for part in arg]
        return self.place(arg) if isinstance(arg, torch.Tensor) else arg

    def place(self, tensor):
        """Where a tensor is: in the only one of those known in whose memory it begins."""
        found = []
        for i, known in enumerate(self.tensors):
            offset = tensor.storage_offset() - known.storage_offset()
            if same_storage(known, tensor) and 0 <= offset < extent(known):
                found.append((i, offset, known))
        if len(found) != 1 or found[0][2].dtype != tensor.dtype:
            raise NotAlike
        ((i, offset, known),) = found
        like = tuple(tensor.shape), tensor.stride()
        return Place(
            i, offset, tensor.dtype, *((None, None) if like == (tuple(known.shape), known.stride()) else like)
        )

    def launch(self, kernel, grid, args, constants):
        with torch._C._DisableTorchDispatch():  # the interpreter's own operations are no steps
            compiled = kernel[grid](*args, **constants)
        values = [*args, *(constants[name] for name in kernel.arg_names[len(args) :])]
        try:
            for i, value in enumerate(values):
                if isinstance(value, TensorDescriptor):
                    values[i] = Tile(self.place(value.base), {**vars(value), "base": None})
                elif isinstance(value, tuple) and any(isinstance(part, torch.Tensor) for part in value):
                    raise NotAlike
                elif isinstance(value, torch.Tensor):
                    values[i] = self.place(value)
        except NotAlike:
            self.alike = False
        if INTERPRETED:
            options = {name: value for name, value in constants.items() if name in OPTIONS}
            self.steps.append(Interpretation(kernel[grid], values, options))
        else:
            self.steps.append(Launch(compiled[(*grid, 1, 1)[:3]], values))


def same_storage(a, b):
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def extent(tensor):
    """How far a tensor reaches in memory, in elements."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return reach + 1 if tensor.numel() else 0


def with_room(recorder, n_given, results):
    """The steps and results of a recording, but what is no result lies in one allocation, behind what was given."""
    kept = {place.index for place in results if isinstance(place, Place)}
    room = [i for i, step in recorder.made.items() if isinstance(step, Allocation) and i not in kept]
    where, size = {}, 0
    for i in room:
        where[i] = n_given, size
        size += -(-extent(recorder.tensors[i]) * recorder.tensors[i].element_size() // ALIGNMENT) * ALIGNMENT
    for new, i in enumerate(i for i in range(len(recorder.tensors)) if i not in where):
        where[i] = new + (new >= n_given and size > 0), 0

    def moved(value):
        if isinstance(value, list):
            return [moved(part) for part in value]
        if isinstance(value, Tile):
            return value._replace(place=moved(value.place))
        if not isinstance(value, Place):
            return value
        (index, behind), known = where[value.index], recorder.tensors[value.index]
        if value.index in room and value.shape is None:
            value = value._replace(shape=tuple(known.shape), strides=known.stride())
        return value._replace(index=index, offset=value.offset + behind // value.dtype.itemsize)

    left_out = [recorder.made[i] for i in room]
    steps = [step.moved(moved) for step in recorder.steps if not any(step is out for out in left_out)]
    if size:
        steps.insert(0, Allocation((size,), (1,), torch.uint8, recorder.tensors[0].device))
    return steps, moved(results)

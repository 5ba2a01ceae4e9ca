"""Operators that move values or name them anew; where possible the result is a view of the input."""

from __future__ import annotations

from typing import Any

import numpy as np

from fluxonnx.openblas.call import Call, Unsupported, operator, whole
from fluxonnx.openblas.weights import Wide


@operator("Identity")
def identity(call: Call) -> np.ndarray:
    """Return the input."""
    return call.inputs[0][...]


@operator("Constant")
def constant(call: Call) -> np.ndarray:
    """Return the value of an attribute."""
    for name, dtype in (("value_float", np.float32), ("value_floats", np.float32), ("value_int", np.int64),
                        ("value_ints", np.int64), ("value", None)):  # fmt: skip
        if (value := call.attribute(name)) is not None:
            return np.asarray(value, dtype)
    raise Unsupported("constants of strings and sparse tensors are not supported")


@operator("Shape")
def shape(call: Call) -> np.ndarray:
    """Return the sizes from `start` to `end`."""
    sizes = call.inputs[0].shape
    return np.array(sizes[slice(call.attribute("start", 0), call.attribute("end"))], np.int64)


@operator("Reshape")
def reshape(call: Call) -> np.ndarray:
    """Give an array another shape; 0 keeps a size unless `allowzero` is set, -1 takes what is left."""
    x, wanted = call.inputs[0], [int(n) for n in call.inputs[1]]
    if not call.attribute("allowzero", 0):
        wanted = [x.shape[i] if n == 0 else n for i, n in enumerate(wanted)]
    return moved(call, x, tuple(wanted))


def moved(call: Call, x: np.ndarray, wanted: tuple[int, ...]) -> np.ndarray:
    """Return `x` with another shape: a view, or where the strides do not allow one a copy made by all threads."""
    if x.flags.c_contiguous or x.size < 1 << 16:
        return x.reshape(wanted)
    view = x.view()
    try:
        view.shape = tuple(x.size // -int(np.prod(wanted)) if n == -1 else n for n in wanted)
        return view
    except AttributeError:
        return contiguous(call, x).reshape(wanted)


def contiguous(call: Call, x: np.ndarray) -> np.ndarray:
    """Return an array that lies in memory without gaps."""
    if x.flags.c_contiguous:
        return x
    out = call.empty(x.shape, x.dtype)

    def piece(index: tuple[slice, ...]) -> None:
        out[index] = x[index]

    call.workers.each(piece, call.workers.pieces(x.shape))
    return out


@operator("Flatten")
def flatten(call: Call) -> np.ndarray:
    """Make a matrix of an array."""
    x, axis = call.inputs[0], call.attribute("axis", 1)
    rows = int(np.prod(x.shape[: axis if axis >= 0 else axis + x.ndim], dtype=np.int64))
    return moved(call, x, (rows, x.size // rows if rows else 0))


@operator("Transpose", wide=True)
def transpose(call: Call) -> Any:
    """Permute the axes."""
    x = call.inputs[0]
    perm = call.attribute("perm") or list(range(x.ndim))[::-1]
    if isinstance(x, Wide):
        return x.transpose() if perm == [1, 0] else whole(x).transpose(perm)
    return x.transpose(perm)


@operator("Unsqueeze")
def unsqueeze(call: Call) -> np.ndarray:
    """Insert axes of size 1."""
    x, axes = call.inputs[0], call.numbers(1, "axes") or []
    ndim = x.ndim + len(axes)
    places = {axis % ndim for axis in axes}
    return x[tuple(None if i in places else slice(None) for i in range(ndim))]


@operator("Squeeze")
def squeeze(call: Call) -> np.ndarray:
    """Remove axes of size 1."""
    x, axes = call.inputs[0], call.numbers(1, "axes")
    return x.squeeze(axis=None if axes is None else tuple(axes))


@operator("Expand")
def expand(call: Call) -> np.ndarray:
    """Broadcast to a shape."""
    x, wanted = call.inputs[0], tuple(int(n) for n in call.inputs[1])
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, wanted))


@operator("Concat")
def concat(call: Call) -> np.ndarray:
    """Join arrays along an axis."""
    arrays = call.inputs
    axis = call.attribute("axis") % arrays[0].ndim
    sizes = list(arrays[0].shape)
    sizes[axis] = sum(array.shape[axis] for array in arrays)
    if int(np.prod(sizes)) < 1 << 16:
        return np.concatenate(arrays, axis=axis)
    out, start = call.empty(tuple(sizes), arrays[0].dtype), 0
    tasks = []
    for array in arrays:
        place = [slice(None)] * out.ndim
        place[axis] = slice(start, start + array.shape[axis])
        start += array.shape[axis]
        target = out[tuple(place)]
        if target.shape != array.shape:
            raise ValueError(f"arrays of {array.shape} and {arrays[0].shape} can't be joined along axis {axis}")
        tasks += [(target[index], array[index]) for index in call.workers.pieces(array.shape)]

    def copy(pair: tuple[np.ndarray, np.ndarray]) -> None:
        pair[0][...] = pair[1]

    call.workers.each(copy, tasks)
    return out


@operator("Split")
def split(call: Call) -> Any:
    """Cut an array into parts of given sizes, or of sizes that are as equal as possible."""
    x = call.inputs[0]
    axis, sizes = call.attribute("axis", 0) % x.ndim, call.numbers(1, "split")
    if sizes is None:
        count = len(call.node.outputs)
        each = -(-x.shape[axis] // count)
        sizes = [max(0, min(each, x.shape[axis] - i * each)) for i in range(count)]
    if sum(sizes) != x.shape[axis] or len(sizes) != len(call.node.outputs):
        raise ValueError(f"{x.shape[axis]} values can't be split into {sizes}")
    ends = np.cumsum(sizes)
    before = (slice(None),) * axis
    parts = tuple(x[(*before, slice(end - size, end))] for size, end in zip(sizes, ends, strict=True))
    return parts if len(parts) > 1 else parts[0]


@operator("Slice")
def slices(call: Call) -> np.ndarray:
    """Cut out a part; bounds beyond the array are its ends."""
    x, starts, ends = call.inputs[:3]
    axes, steps = call.input(3), call.input(4)
    index = [slice(None)] * x.ndim
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = int(axes[i]) if axes is not None else i
        step = int(steps[i]) if steps is not None else 1
        # numpy reads an end of -1 as the last place; ONNX means the same, and a bound below -size as "from the start"
        stop: int | None = int(end)
        if step < 0 and end < -x.shape[axis]:
            stop = None
        index[axis] = slice(int(start), stop, step)
    return x[tuple(index)]


@operator("Gather")
def gather(call: Call) -> np.ndarray:
    """Look entries up along an axis."""
    x, indices = call.inputs
    axis = call.attribute("axis", 0) % x.ndim
    size = x.shape[axis]
    if indices.size and (int(indices.min()) < -size or int(indices.max()) >= size):
        raise ValueError(f"an index is not from {-size} to {size - 1}")
    if indices.ndim == 0:
        return x[(*(slice(None),) * axis, int(indices))]
    return np.take(x, indices, axis=axis)


@operator("Pad")
def pad(call: Call) -> np.ndarray:
    """Put a constant around an array."""
    x, pads, value = call.inputs[0], call.inputs[1], call.input(2)
    if _text(call.attribute("mode", "constant")) != "constant":
        raise Unsupported("Pad only puts constants around an array")
    axes = [int(axis) % x.ndim for axis in call.input(3)] if call.input(3) is not None else list(range(x.ndim))
    widths = dict(zip(axes, zip(pads[: len(axes)], pads[len(axes) :], strict=True), strict=True))
    around = [tuple(int(n) for n in widths.get(i, (0, 0))) for i in range(x.ndim)]
    x = x[tuple(slice(max(0, -a), n - max(0, -b)) for (a, b), n in zip(around, x.shape, strict=True))]
    out = call.empty(tuple(n + max(0, a) + max(0, b) for (a, b), n in zip(around, x.shape, strict=True)), x.dtype)
    out[...] = 0 if value is None else np.asarray(value).reshape(())
    out[tuple(slice(max(0, a), max(0, a) + n) for (a, _), n in zip(around, x.shape, strict=True))] = x
    return out


@operator("DepthToSpace")
def depth_to_space(call: Call) -> np.ndarray:
    """Lay channels out as squares of pixels."""
    x, size = call.inputs[0], call.attribute("blocksize")
    batch, channels, height, width = x.shape
    if _text(call.attribute("mode", "DCR")) == "DCR":
        split = x.reshape(batch, size, size, -1, height, width).transpose(0, 3, 4, 1, 5, 2)
    else:
        split = x.reshape(batch, -1, size, size, height, width).transpose(0, 1, 4, 2, 5, 3)
    return moved(call, split, (batch, channels // size**2, height * size, width * size))


@operator("SpaceToDepth")
def space_to_depth(call: Call) -> np.ndarray:
    """Lay squares of pixels out as channels."""
    x, size = call.inputs[0], call.attribute("blocksize")
    batch, channels, height, width = x.shape
    order = (0, 3, 5, 1, 2, 4) if _text(call.attribute("mode", "DCR")) == "DCR" else (0, 1, 3, 5, 2, 4)
    split = x.reshape(batch, channels, height // size, size, width // size, size).transpose(order)
    return moved(call, split, (batch, channels * size**2, height // size, width // size))


@operator("Resize")
def resize(call: Call) -> np.ndarray:
    """Repeat or leave out values; only the nearest to the left, at multiples of the scale."""
    x = call.inputs[0]
    modes = {name: _text(call.attribute(name, default)) for name, default in (
        ("mode", "nearest"), ("coordinate_transformation_mode", "half_pixel"), ("nearest_mode", "round_prefer_floor"),
    )}  # fmt: skip
    if tuple(modes.values()) != ("nearest", "asymmetric", "floor") or call.attribute("axes") is not None:
        raise Unsupported("Resize only takes the nearest value, with asymmetric coordinates that are rounded down")
    scales, sizes = call.input(2), call.input(3)
    if sizes is not None and sizes.size:
        factors = [int(size) / n for size, n in zip(sizes, x.shape, strict=True)]
    else:
        factors = [float(scale) for scale in scales]
    for axis, factor in enumerate(factors):
        if factor != 1:
            size = int(np.floor(x.shape[axis] * factor))
            places = np.minimum(np.floor(np.arange(size) / factor).astype(np.int64), x.shape[axis] - 1)
            x = np.take(x, places, axis=axis)
    return x


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)

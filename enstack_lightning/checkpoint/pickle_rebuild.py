"""What torch's pickles call, mostly names that `torch.load(weights_only=True)` allows, and the values that come of it.

Each function here takes the arguments that the pickle gives to torch's function of that name, checks their number and
types, and returns a descriptor, a plain value or an inert `Call`; what torch would not write is a defect. Nothing that
it is given is called.

The arguments: torch/_utils.py, torch/_tensor.py; the persistent id of a storage: torch/serialization.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from enstack_lightning.checkpoint.facts import OddityKind
from enstack_lightning.checkpoint.pickle_values import (
    DTYPE_BYTES,
    STORAGE_DTYPES,
    Call,
    Global,
    PickleDefectError,
    StorageDescriptor,
    TensorDescriptor,
    Work,
)

MAX_DIMENSIONS = 256
_INT64_LIMIT = 2**63


def storage_of(pid: object, legacy: bool) -> StorageDescriptor:
    if not isinstance(pid, tuple) or len(pid) != (6 if legacy else 5) or pid[0] != "storage":
        raise PickleDefectError("a persistent id does not name a torch storage")
    storage_type, key, location, numel = pid[1:5]
    dtype = _STORAGES.get((storage_type.module, storage_type.name)) if storage_type.__class__ is Global else None
    if dtype is None:
        raise PickleDefectError(f"storage type {_said(storage_type)} is not known")
    if key.__class__ is not str or location.__class__ is not str or numel.__class__ is not int:
        raise PickleDefectError("a storage's persistent id has a field of the wrong type")
    if not 0 <= numel * DTYPE_BYTES[dtype] < _INT64_LIMIT:
        raise PickleDefectError(f"storage {key!r:.40} has {_said(numel)} elements")
    if location == "meta":
        raise PickleDefectError(
            f"storage {key!r:.40} is on the meta device, where torch.load would leave its bytes out"
        )
    return StorageDescriptor(key, dtype, numel, location, _view(pid[5]) if legacy else None)


def _view(value: object) -> tuple[str, int, int] | None:
    """The part of a storage that the metadata `(key, offset, length)` of a view means."""
    if value is None:
        return None
    if not isinstance(value, tuple) or len(value) != 3 or not isinstance(value[0], str):
        raise PickleDefectError("the view of a storage is described by something other than key, offset and length")
    key, offset, length = value
    if type(offset) is not int or type(length) is not int or offset < 0 or length < 0:
        raise PickleDefectError(f"the view of a storage has offset {_said(offset)} and length {_said(length)}")
    return key, offset, length


def _tensor(storage: object, dtype: str | None, shape: object, stride: object, offset: object) -> TensorDescriptor:
    if not isinstance(storage, StorageDescriptor):
        raise PickleDefectError(f"a tensor is built from {_said(storage)}, which is no storage")
    sizes, strides = sizes_of(shape), sizes_of(stride)
    if len(sizes) != len(strides) or type(offset) is not int or not 0 <= offset < _INT64_LIMIT:
        raise PickleDefectError(f"a tensor has {len(sizes)} sizes, {len(strides)} strides and offset {_said(offset)}")
    return TensorDescriptor(storage, dtype or storage.dtype, sizes, strides, offset)


def sizes_of(value: object) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or len(value) > MAX_DIMENSIONS:
        raise PickleDefectError(f"a tensor's shape or stride is {_said(value)}, not a list of whole numbers")
    for size in value:
        if type(size) is not int or not 0 <= size < _INT64_LIMIT:
            raise PickleDefectError(f"a tensor's shape or stride holds {_said(size)}, not a whole number from 0 up")
    return tuple(value)


def _dtype(value: object) -> str:
    if not isinstance(value, Global) or value.module != "torch" or value.name not in DTYPE_BYTES:
        raise PickleDefectError(f"a tensor's dtype is {_said(value)}")
    return value.name


def _layout(value: object) -> str:
    """The name in the call by which torch pickles a layout: `_get_layout("torch.sparse_coo")`."""
    if isinstance(value, Call) and value.function == _GET_LAYOUT and len(value.args) == 1:
        name = value.args[0]
        if isinstance(name, str) and name.removeprefix("torch.") in _LAYOUTS:
            return name.removeprefix("torch.")
    raise PickleDefectError(f"a tensor's layout is {_said(value)}")


def _said(value: object) -> str:
    """A value in a message, short whatever it is."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= _INT64_LIMIT:
        return f"an integer of {value.bit_length():,} bits"
    if isinstance(value, int | float | str | None):
        return f"{value!r:.60}"
    return f"{value!s:.60}" if isinstance(value, Global) else f"a {type(value).__name__}"


def odd_tensors(tensors: Sequence[TensorDescriptor]) -> Iterator[tuple[OddityKind, str]]:
    sparse = [t for t in tensors if t.layout != "strided"]
    if sparse:
        yield (
            OddityKind.SPARSE_TENSOR,
            f"{len(sparse):,} of its tensors are sparse, the first {sparse[0].layout} of shape {sparse[0].shape}: "
            "loading does not check that their indices lie within their shape",
        )


# What torch's pickles call: the function's arguments, checked, become a value


def _arguments(args: tuple[Any, ...], counts: tuple[int, ...], function: str) -> tuple[Any, ...]:
    if len(args) not in counts:
        raise PickleDefectError(f"{function} is given {len(args)} arguments instead of {' or '.join(map(str, counts))}")
    return args


def _flags(work: Work, requires_grad: object, hooks: object, function: str) -> None:
    if not isinstance(requires_grad, bool) or not (hooks is None or isinstance(hooks, dict)):
        raise PickleDefectError(f"{function} is given {_said(requires_grad)} and {_said(hooks)} as its flags")
    if hooks is not None:
        work.hooks.append(hooks)  # functions that a backward pass would call: torch always writes an empty dict


def _rebuild_tensor(work: Work, args: tuple[Any, ...]) -> TensorDescriptor:
    storage, offset, shape, stride = _arguments(args, (4,), "_rebuild_tensor")
    return _tensor(storage, None, shape, stride, offset)


def _rebuild_tensor_v2(work: Work, args: tuple[Any, ...]) -> TensorDescriptor:
    _arguments(args, (6, 7), "_rebuild_tensor_v2")
    _flags(work, args[4], args[5], "_rebuild_tensor_v2")
    return _with_metadata(_tensor(args[0], None, args[2], args[3], args[1]), args[6:])


def _rebuild_tensor_v3(work: Work, args: tuple[Any, ...]) -> TensorDescriptor:
    _arguments(args, (7, 8), "_rebuild_tensor_v3")
    _flags(work, args[4], args[5], "_rebuild_tensor_v3")
    if isinstance(args[0], StorageDescriptor) and args[0].view is not None:
        raise PickleDefectError(
            "a tensor with a dtype of its own lies in a view of a storage, as torch before 0.4 wrote"
        )
    return _with_metadata(_tensor(args[0], _dtype(args[6]), args[2], args[3], args[1]), args[7:])


def _with_metadata(tensor: TensorDescriptor, values: tuple[Any, ...]) -> TensorDescriptor:
    """The tensor, whose metadata says at most that it is lazily conjugated or negated: `{"conj": True}`."""
    metadata = values[0] if values else None
    if metadata is None:
        return tensor
    if not isinstance(metadata, dict) or not all(
        isinstance(key, str) and isinstance(flag, bool) for key, flag in metadata.items()
    ):
        raise PickleDefectError(f"a tensor's metadata is {_said(metadata)} with more in it than flags")
    if "conj" in metadata and not tensor.dtype.startswith("complex"):
        raise PickleDefectError(f"a tensor of {tensor.dtype} is said to be conjugated")
    tensor.negated = metadata.get("neg", False)
    return tensor


def _rebuild_qtensor(work: Work, args: tuple[Any, ...]) -> TensorDescriptor:
    # (storage, offset, size, stride, quantizer_params, requires_grad, backward_hooks)
    _arguments(args, (7,), "_rebuild_qtensor")
    _flags(work, args[5], args[6], "_rebuild_qtensor")
    if not isinstance(args[4], tuple) or len(args[4]) not in (3, 4):
        raise PickleDefectError(f"a quantized tensor's parameters are {_said(args[4])}")
    tensor = _tensor(args[0], None, args[2], args[3], args[1])
    if not tensor.dtype.startswith("q"):
        raise PickleDefectError(f"a quantized tensor is of dtype {tensor.dtype}")
    return tensor


def _rebuild_sparse_tensor(work: Work, args: tuple[Any, ...]) -> TensorDescriptor:
    # (layout, (indices, values, size[, is_coalesced])) or (layout, (compressed indices, plain indices, values, size))
    layout, data = _layout(_arguments(args, (2,), "_rebuild_sparse_tensor")[0]), args[1]
    compressed = layout != "sparse_coo"
    if not isinstance(data, tuple) or len(data) not in ((4,) if compressed else (3, 4)) or layout == "strided":
        raise PickleDefectError(f"a tensor of layout {layout} is built from {_said(data)}")
    parts, shape = data[: 2 + compressed], sizes_of(data[2 + compressed])
    if not all(isinstance(part, TensorDescriptor) and not part.parts for part in parts):
        raise PickleDefectError(f"a tensor of layout {layout} is built from something that is no dense tensor")
    if not compressed and not _are_of_one_shape(parts[0].shape, parts[1].shape, shape):
        raise PickleDefectError(f"a {layout} tensor of {len(shape)} dimensions has indices and values of other sizes")
    return TensorDescriptor(None, parts[-1].dtype, shape, (), 0, layout, parts)


def _are_of_one_shape(indices: tuple[int, ...], values: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a column of `indices` for each of `values`, a number for each sparse dimension, make up `shape`."""
    if len(indices) != 2 or not values or indices[1] != values[0]:
        return False
    return indices[0] + len(values) - 1 == len(shape) and values[1:] == shape[indices[0] :]


def _rebuild_nested_tensor(work: Work, args: tuple[Any, ...]) -> Call:
    # (buffer, sizes, strides, storage offsets): its shape is among the values of a tensor, which are not read here
    if not all(isinstance(part, TensorDescriptor) for part in _arguments(args, (4,), "_rebuild_nested_tensor")):
        raise PickleDefectError("a nested tensor is built from something that is no tensor")
    return Call(_NESTED, args)


def _rebuild_parameter(work: Work, args: tuple[Any, ...]) -> Any:
    # (data, requires_grad, backward_hooks[, state]); the tensors in the state are found all the same
    _flags(work, args[1], args[2], "_rebuild_parameter")
    for state in args[3:]:
        _attributes(state)
    return _one_tensor(args[0])


def _rebuild_parameter_3(work: Work, args: tuple[Any, ...]) -> Any:
    return _rebuild_parameter(work, _arguments(args, (3,), "_rebuild_parameter"))


def _rebuild_parameter_with_state(work: Work, args: tuple[Any, ...]) -> Any:
    return _rebuild_parameter(work, _arguments(args, (4,), "_rebuild_parameter_with_state"))


def _attributes(state: object) -> None:
    """Refuses the state of a tensor that sets more than attributes of a user's own, such as `data`: another tensor."""
    for part in state if isinstance(state, tuple) and len(state) == 2 else (state,):
        if part is None:
            continue
        if not isinstance(part, dict) or not all(isinstance(name, str) for name in part):
            raise PickleDefectError(f"the state of a tensor is {_said(part)}, not a dict of attributes")
        taken = sorted(TENSOR_ATTRIBUTES.intersection(part))
        if taken:
            raise PickleDefectError(
                f"the state of a tensor sets its {taken[0]}, so that another tensor would be loaded"
            )


def _one_tensor(value: object) -> Any:
    # A Call: a tensor class of the user's own, or a nested tensor.
    if not isinstance(value, TensorDescriptor | Call):
        raise PickleDefectError(f"a parameter is built from {_said(value)}, which is no tensor")
    return value


def _parameter(work: Work, args: tuple[Any, ...]) -> Any:
    if len(_arguments(args, (1, 2), "Parameter")) == 2:
        _flags(work, args[1], None, "Parameter")
    return _one_tensor(args[0])


def _rebuild_meta_tensor(work: Work, args: tuple[Any, ...]) -> TensorDescriptor:
    dtype, shape, stride, requires_grad = _arguments(args, (4,), "_rebuild_meta_tensor_no_storage")
    _flags(work, requires_grad, None, "_rebuild_meta_tensor_no_storage")
    return _without_storage(dtype, shape, stride)


def _rebuild_wrapper_subclass(work: Work, args: tuple[Any, ...]) -> TensorDescriptor:
    # (class, dtype, size, stride, offset, layout, device, requires_grad)
    _arguments(args, (8,), "_rebuild_wrapper_subclass")
    _flags(work, args[7], None, "_rebuild_wrapper_subclass")
    return _without_storage(args[1], args[2], args[3])


def _without_storage(dtype: object, shape: object, stride: object) -> TensorDescriptor:
    sizes, strides = sizes_of(shape), sizes_of(stride)
    if len(sizes) != len(strides):
        raise PickleDefectError(f"a tensor has {len(sizes)} sizes and {len(strides)} strides")
    return TensorDescriptor(None, _dtype(dtype), sizes, strides, 0)


def _rebuild_device_tensor(work: Work, args: tuple[Any, ...]) -> Any:
    # (data, dtype, device, requires_grad): the bytes are those of `data`, a tensor or an array of NumPy
    data, dtype, device, requires_grad = _arguments(args, (4,), "_rebuild_device_tensor")
    _flags(work, requires_grad, None, "_rebuild_device_tensor")
    _dtype(dtype)
    if not isinstance(device, str | Call):
        raise PickleDefectError(f"a tensor's device is {_said(device)}")
    return _one_tensor(data)


def _rebuild_from_type(work: Work, args: tuple[Any, ...]) -> Any:
    # (function, type, its arguments, state): a tensor with attributes, or of a class of the user's own
    function, kind, inner, state = _arguments(args, (4,), "_rebuild_from_type_v2")
    if not isinstance(function, Global) or not isinstance(kind, Global) or not isinstance(inner, tuple):
        raise PickleDefectError("a tensor with attributes is built from something else")
    if function == _FROM_TYPE:
        raise PickleDefectError(f"{function} is called by itself")
    if kind in (_TENSOR, _PARAMETER):
        _attributes(state)
    rebuild = REBUILD.get(function)
    return Call(_FROM_TYPE, args) if rebuild is None else rebuild(work, inner)


def _size(work: Work, args: tuple[Any, ...]) -> tuple[int, ...]:
    return sizes_of(_arguments(args, (1,), "torch.Size")[0]) if args else ()


def _device(work: Work, args: tuple[Any, ...]) -> Call:
    if not (args and isinstance(args[0], str) and (len(args) == 1 or (len(args) == 2 and type(args[1]) is int))):
        raise PickleDefectError("torch.device is given something other than a name and an index")
    return Call(_DEVICE, args)


def _ordered_dict(work: Work, args: tuple[Any, ...]) -> dict[Any, Any]:
    # Without arguments by Python 3; with a list of pairs by Python 2.
    if not args:
        return {}
    (pairs,) = _arguments(args, (0, 1), "OrderedDict")
    if not isinstance(pairs, list) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise PickleDefectError(f"an OrderedDict is made of {_said(pairs)}")
    work.spend(2 * len(pairs) + 1)
    entries: dict[Any, Any] = {}
    work.set_items(entries, [inner for pair in pairs for inner in pair])
    return entries


def _counter(work: Work, args: tuple[Any, ...]) -> dict[Any, Any]:
    (counts,) = _arguments(args, (1,), "Counter")
    if not isinstance(counts, dict):
        raise PickleDefectError(f"a Counter is made of {_said(counts)}")
    work.spend(len(counts) + 3)
    return dict(counts)  # what is set on the dict later does not change the Counter


def _set(work: Work, args: tuple[Any, ...]) -> set[Any]:
    (values,) = _arguments(args, (1,), "set")
    if not isinstance(values, list):
        raise PickleDefectError(f"a set is made of {_said(values)}")
    work.spend(len(values) + 3)
    return set(work.keys(values))


def _frozen_set(work: Work, args: tuple[Any, ...]) -> frozenset[Any]:
    return frozenset(_set(work, args))


def _bytes(work: Work, args: tuple[Any, ...]) -> bytes:
    _arguments(args, (0,), "bytes")  # how protocol 2 writes empty ones
    return b""


def _numpy_scalar(work: Work, args: tuple[Any, ...]) -> Any:
    # (dtype, bytes): a metric that NumPy computed
    dtype, raw = _arguments(args, (2,), "numpy's scalar")
    if isinstance(dtype, Call) and dtype.function == _NUMPY_DTYPE and dtype.args and isinstance(raw, bytes):
        form = _NUMPY_FORMS.get(dtype.args[0]) if isinstance(dtype.args[0], str) else None
        order = dtype.state[1] if isinstance(dtype.state, tuple) and len(dtype.state) > 1 else None
        if form is not None and order in ("<", ">", "|") and len(raw) == struct.calcsize(form):
            return struct.unpack(order.replace("|", "<") + form, raw)[0]
    return Call(_NUMPY_SCALAR, args)


def _complex(work: Work, args: tuple[Any, ...]) -> complex:
    real, imaginary = _arguments(args, (2,), "complex")
    if type(real) is not float or type(imaginary) is not float:
        raise PickleDefectError(f"a complex number is made of {_said(real)} and {_said(imaginary)}")
    return complex(real, imaginary)


def _encoded(work: Work, args: tuple[Any, ...]) -> bytes:
    # How protocol 2 writes bytes: as text, a character a byte.
    text, encoding = _arguments(args, (2,), "_codecs.encode")
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise PickleDefectError(f"{_said(text)} is encoded as {_said(encoding)}, not bytes as Latin-1")
    work.spend(len(text) // 64)
    return text.encode("latin-1")


def _byte_array(work: Work, args: tuple[Any, ...]) -> bytearray:
    if len(args) == 2:
        return bytearray(_encoded(work, args))
    if args and not isinstance(args[0], bytes | bytearray):
        raise PickleDefectError(f"a bytearray is made of {_said(args[0])}")  # a number: that many bytes
    content = b"".join(_arguments(args, (0, 1), "bytearray"))
    work.spend(len(content) // 64)
    return bytearray(content)


def _layout_value(work: Work, args: tuple[Any, ...]) -> Call:
    call = Call(_GET_LAYOUT, args)
    _layout(call)
    return call


ORDERED_DICT = Global("collections", "OrderedDict")
_GET_LAYOUT = Global("torch.serialization", "_get_layout")
_NESTED = Global("torch._utils", "_rebuild_nested_tensor")
_FROM_TYPE = Global("torch._tensor", "_rebuild_from_type_v2")
_DEVICE = Global("torch", "device")
_TENSOR = Global("torch", "Tensor")
_PARAMETER = Global("torch.nn.parameter", "Parameter")
_NUMPY_DTYPE = Global("numpy", "dtype")
_NUMPY_SCALAR = Global("numpy._core.multiarray", "scalar")
_NUMPY_FORMS = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "u8": "Q", "b1": "?"}
_LAYOUTS = frozenset({"strided", "sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc", "jagged"})
SEALED = frozenset({_DEVICE, _GET_LAYOUT, _NESTED})
"""What is complete once it is made: nothing can be set on it or added to it."""

_ATTRIBUTES = (
    "H T __class__ __cuda_array_interface__ __dict__ __weakref__ _backward_hooks _base _cdata _grad _grad_fn "
    "_has_symbolic_sizes_strides _post_accumulate_grad_hooks _python_dispatch _version data device dtype grad "
    "grad_dtype grad_fn imag is_cpu is_cuda is_ipu is_leaf is_maia is_meta is_mkldnn is_mps is_mtia is_nested "
    "is_quantized is_sparse is_sparse_csr is_vulkan is_xla is_xpu itemsize layout mH mT name names nbytes ndim "
    "output_nr real requires_grad retains_grad shape volatile"
)
TENSOR_ATTRIBUTES = frozenset(_ATTRIBUTES.split())
"""The attributes of `torch.Tensor` that are more than an entry in its `__dict__`, which a pickler writes."""

TENSOR_MODULES = frozenset({"torch", "torch.cuda", "torch.sparse", "torch.cuda.sparse", "torch.storage"})
_STORAGES = {(m, name): dtype for name, dtype in STORAGE_DTYPES.items() for m in ("torch", "torch.cuda")} | {
    ("torch.storage", "UntypedStorage"): "uint8"
}
"""The dtype of a storage's class, by its module and name: a tuple's hash is several times as fast as a `Global`'s."""

REBUILD: dict[Any, Callable[[Work, tuple[Any, ...]], Any]] = {
    ORDERED_DICT: _ordered_dict,
    _FROM_TYPE: _rebuild_from_type,
    _DEVICE: _device,
    Global("torch", "Size"): _size,
    _PARAMETER: _parameter,
    _GET_LAYOUT: _layout_value,
    Global("collections", "Counter"): _counter,
    Global("builtins", "set"): _set,
    Global("builtins", "frozenset"): _frozen_set,
    Global("builtins", "bytes"): _bytes,
    Global("builtins", "complex"): _complex,
    Global("numpy.core.multiarray", "scalar"): _numpy_scalar,
    _NUMPY_SCALAR: _numpy_scalar,
    Global("builtins", "bytearray"): _byte_array,
    Global("_codecs", "encode"): _encoded,
    **{
        Global("torch._utils", name): rebuild
        for name, rebuild in {
            "_rebuild_tensor": _rebuild_tensor,
            "_rebuild_tensor_v2": _rebuild_tensor_v2,
            "_rebuild_tensor_v3": _rebuild_tensor_v3,
            "_rebuild_qtensor": _rebuild_qtensor,
            "_rebuild_sparse_tensor": _rebuild_sparse_tensor,
            "_rebuild_nested_tensor": _rebuild_nested_tensor,
            "_rebuild_parameter": _rebuild_parameter_3,
            "_rebuild_parameter_with_state": _rebuild_parameter_with_state,
            "_rebuild_meta_tensor_no_storage": _rebuild_meta_tensor,
            "_rebuild_wrapper_subclass": _rebuild_wrapper_subclass,
            "_rebuild_device_tensor_from_numpy": _rebuild_device_tensor,
            "_rebuild_device_tensor_from_cpu_tensor": _rebuild_device_tensor,
        }.items()
    },
}

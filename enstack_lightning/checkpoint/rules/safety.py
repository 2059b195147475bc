"""CK7xx: what loading the checkpoint would execute."""

from __future__ import annotations

from collections.abc import Iterator

from enstack_lightning.checkpoint.facts import Facts
from enstack_lightning.checkpoint.rules.rule import Options, Outcome, error, passed, rule

# torch/_weights_only_unpickler.py, `_get_allowed_globals()` of torch 2.13; a test compares the two.
_ALLOWED = {
    "_codecs": "encode",
    "builtins": "bytearray complex set",
    "collections": "Counter OrderedDict",
    "torch": (
        "BFloat16Storage BFloat16Tensor BoolStorage BoolTensor ByteStorage ByteTensor CharStorage CharTensor "
        "ComplexDoubleStorage ComplexFloatStorage DoubleStorage DoubleTensor FloatStorage FloatTensor "
        "HalfStorage HalfTensor IntStorage IntTensor LongStorage LongTensor QInt32Storage QInt8Storage "
        "QUInt2x4Storage QUInt4x2Storage QUInt8Storage ShortStorage ShortTensor Size Tensor bfloat16 bits16 "
        "bits1x8 bits2x4 bits4x2 bits8 bool complex128 complex32 complex64 device float16 float32 "
        "float4_e2m1fn_x2 float64 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu "
        "int1 int16 int2 int3 int32 int4 int5 int6 int64 int7 int8 per_channel_affine "
        "per_channel_affine_float_qparams per_channel_symmetric per_tensor_affine per_tensor_symmetric qint32 "
        "qint8 quint2x4 quint4x2 quint8 uint1 uint16 uint2 uint3 uint32 uint4 uint5 uint6 uint64 uint7 uint8"
    ),
    "torch._tensor": "_rebuild_from_type_v2",
    "torch._utils": (
        "_rebuild_device_tensor_from_cpu_tensor _rebuild_device_tensor_from_numpy "
        "_rebuild_meta_tensor_no_storage _rebuild_nested_tensor _rebuild_parameter "
        "_rebuild_parameter_with_state _rebuild_qtensor _rebuild_sparse_tensor _rebuild_tensor "
        "_rebuild_tensor_v2 _rebuild_tensor_v3 _rebuild_wrapper_subclass"
    ),
    "torch.cuda": (
        "BFloat16Storage BFloat16Tensor BoolStorage BoolTensor ByteStorage ByteTensor CharStorage CharTensor "
        "ComplexDoubleStorage ComplexFloatStorage DoubleStorage DoubleTensor FloatStorage FloatTensor "
        "HalfStorage HalfTensor IntStorage IntTensor LongStorage LongTensor ShortStorage ShortTensor"
    ),
    "torch.cuda.sparse": (
        "BFloat16Tensor ByteTensor CharTensor DoubleTensor FloatTensor HalfTensor IntTensor LongTensor ShortTensor"
    ),
    "torch.nn.parameter": "Parameter",
    "torch.serialization": "_get_layout",
    "torch.sparse": (
        "BFloat16Tensor ByteTensor CharTensor DoubleTensor FloatTensor HalfTensor IntTensor LongTensor ShortTensor"
    ),
    "torch.storage": "TypedStorage UntypedStorage",
}

ALLOWED_GLOBALS = frozenset(f"{module}.{name}" for module, names in _ALLOWED.items() for name in names.split())
"""The 144 names that `torch.load(weights_only=True)` accepts without being told to."""

_RUN_CODE = {"os", "posix", "nt", "subprocess", "sys", "builtins", "__builtin__", "runpy", "importlib", "pty", "socket"}


@rule("CK701", "unsafe-global")
def unsafe_global(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The pickle names something that `torch.load(weights_only=True)` does not allow.

    Since torch 2.6 that is the default, and a Trainer's resume fails on such a file. Loading it with
    `weights_only=False` imports and calls what it names, which for a file from elsewhere means running its author's
    code. The list is an allow-list: every name that is not exactly on it is reported.
    """
    if not facts.globals:
        return
    names = sorted({str(g) for g in facts.globals})
    refused = [name for name in names if name not in ALLOWED_GLOBALS]
    for name in refused:
        danger = " and can run any command" if name.partition(".")[0] in _RUN_CODE else ""
        yield error(
            f"the pickle names {name}, which is not among what torch.load(weights_only=True) allows{danger}: "
            "a resume will refuse it",
            "data.pkl",
            "Do not load a file from elsewhere with weights_only=False; in your own runs keep hyper-parameters and "
            "callback states to numbers, text, lists, dicts and tensors.",
        )
    if not refused:
        yield passed(f"safe to load: all {len(names)} names in its pickle are allowed by weights_only=True")

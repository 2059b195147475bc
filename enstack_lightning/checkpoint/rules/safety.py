"""CK7xx: what loading the checkpoint would execute.

Names are judged by the way in which the framework reads the pickle that holds them. Each way has a list of exact
(module, name) pairs that it is meant to meet, and every other name is an error: a list of bad names would always lack
some. The names known to run code, further down, make messages plainer; alone they decide only in `training_args.bin`,
which no resume reads, and whether vouching for a name deserves a warning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from enstack_lightning.checkpoint.facts import Facts, GlobalFacts, OddityKind
from enstack_lightning.checkpoint.rules.rule import Options, Outcome, Severity, error, info, passed, rule, warning
from enstack_lightning.checkpoint.wording import many

MAX_LISTED = 20

# torch/_weights_only_unpickler.py, `_get_allowed_globals()` of torch 2.13; a test compares the two.
_WEIGHTS_ONLY = {
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

# transformers/trainer_pt_utils.py, `safe_globals()`; under NumPy 1 the first module was called numpy.core.
_NUMPY_ARRAYS = {
    "numpy._core.multiarray": "_reconstruct",
    "numpy.core.multiarray": "_reconstruct",
    "numpy": "dtype ndarray",
    "numpy.dtypes": "UInt32DType",
}

# torch/distributed/checkpoint/metadata.py and filesystem.py; torch.distributed._shard: the same before torch 2.3.
_METADATA = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties "
        "TensorStorageMetadata _MEM_FORMAT_ENCODING"
    ),
    "torch.distributed._shard.sharded_tensor.metadata": "MEM_FORMAT_ENCODING TensorProperties",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.serialization": "_get_layout",
    "collections": "OrderedDict",
    "pathlib": "Path PosixPath PurePosixPath PureWindowsPath WindowsPath",
    "pathlib._local": "Path PosixPath PurePosixPath PureWindowsPath WindowsPath",
}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _pairs(table: Mapping[str, str]) -> frozenset[tuple[str, str]]:
    return frozenset((module, name) for module, names in table.items() for name in _words(names))


WEIGHTS_ONLY_GLOBALS = _pairs(_WEIGHTS_ONLY)
"""The 144 (module, name) pairs that `torch.load(weights_only=True)` accepts without being told to."""

TRANSFORMERS_GLOBALS = WEIGHTS_ONLY_GLOBALS | _pairs(_NUMPY_ARRAYS)
"""Those, and what the Hugging Face Trainer adds when it loads `rng_state*.pth`."""

METADATA_GLOBALS = _pairs(_METADATA) | {
    (module, name)
    for module, name in WEIGHTS_ONLY_GLOBALS
    if module == "torch" and not name.endswith(("Storage", "Tensor", "affine", "symmetric", "qparams", "device"))
}
"""What `torch.distributed.checkpoint` itself writes into `.metadata`: its own classes, `torch.Size` and dtypes."""

_ALLOWED = {
    "weights_only": WEIGHTS_ONLY_GLOBALS,
    "transformers": TRANSFORMERS_GLOBALS,
    "torch": WEIGHTS_ONLY_GLOBALS,
    "pickle": METADATA_GLOBALS,
}

# Python 3 writes the names of builtins so, in the pickle protocol that torch.save uses; torch reads it back.
_PYTHON_2_BUILTINS = "__builtin__"

# Modules, and functions of builtins, by which pickles have been made to run code. Not complete, and need not be.
_MODULES_THAT_RUN_CODE = _words(
    "_posixsubprocess _winapi aiohttp asyncio bdb cffi code codeop commands cProfile ctypes distutils dill doctest "
    "ensurepip functools ftplib http httplib idlelib imaplib importlib inspect joblib lib2to3 linecache marshal "
    "multiprocessing nt numpy.testing operator os pdb pickle pip pkgutil platform posix posixpath pprint profile pty "
    "pydoc requests runpy setuptools shelve shutil signal site smtplib socket sqlite3 ssl subprocess sys tempfile "
    "threading timeit trace types urllib urllib2 uuid venv webbrowser zipimport _pickle _pyrepl _thread"
)
_BUILTINS_THAT_RUN_CODE = _words(
    "__import__ apply breakpoint compile delattr dir eval exec execfile exit getattr globals input locals open quit "
    "setattr vars"
)
_FUNCTIONS_THAT_RUN_CODE = frozenset(
    {
        ("torch", "load"),
        ("torch.hub", "load"),
        ("torch.jit", "load"),
        ("torch.serialization", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("torch.utils.collect_env", "run"),
        ("numpy", "load"),
        ("copyreg", "_reconstructor"),
        ("pandas", "read_pickle"),
    }
)
# How an enum's member was pickled by some versions of Python: harmless among the names of training_args.bin.
_OF_ENUMS = (("builtins", "getattr"), ("__builtin__", "getattr"))

_KEEP_PLAIN = (
    "Do not load a file from elsewhere with weights_only=False; in your own runs keep hyper-parameters and callback "
    "states to numbers, text, lists, dicts and tensors, or vouch for a class of your own, by --allow-global "
    "or CheckpointGuard(allow_globals=[...])."
)


def runs_code(module: str, name: str) -> bool:
    """Whether it is known that calling this name can run code of the caller's choice; False proves nothing."""
    top = module.partition(".")[0]
    if module in ("builtins", _PYTHON_2_BUILTINS):
        return name.partition(".")[0] in _BUILTINS_THAT_RUN_CODE
    return bool({top, module} & _MODULES_THAT_RUN_CODE) or (module, name) in _FUNCTIONS_THAT_RUN_CODE


def _refused(g: GlobalFacts) -> bool:
    """Whether the name is not exactly one that the pickle's loader is meant to meet."""
    if g.loader == "never":
        return runs_code(g.module, g.name) and (g.module, g.name) not in _OF_ENUMS
    module = "builtins" if g.module == _PYTHON_2_BUILTINS else g.module
    return (module, g.name) not in _ALLOWED[g.loader]


def _vouched(g: GlobalFacts, options: Options) -> bool:
    return str(g) in options.allow_globals


@rule(
    "CK701",
    "unsafe-global",
    compares="every name in every pickle with what its loader allows, by exact module and name",
    source="torch/_weights_only_unpickler.py, _get_allowed_globals; transformers: trainer_pt_utils.py, safe_globals; "
    "torch/distributed/checkpoint/metadata.py",
)
def unsafe_global(facts: Facts, options: Options) -> Iterator[Outcome]:
    """A pickle names something that its loader does not allow, or should not.

    Since torch 2.6 `torch.load(weights_only=True)` is the default: it allows 144 names, and a Trainer's resume fails on
    a file with any other. Loading such a file with `weights_only=False` imports and calls what it names, which for
    a file from elsewhere means running its author's code. The Hugging Face Trainer allows a few names of NumPy more, in
    `rng_state*.pth`. The `.metadata` of a sharded checkpoint is read by a bare `pickle.load`, without any list: there,
    every name that is not of `torch.distributed.checkpoint` itself would run. So would one in the entries beside it
    that are no tensors, which it reads with `torch.load(weights_only=False)`: there the 144 names are the measure.
    `training_args.bin` is read by no resume: only names known to run code count there (see CK703).

    The comparison is exact: of a module that is allowed no other name is, of a name no attribute.
    A class of your own that is meant to be there can be vouched for with `--allow-global MODULE.NAME` (see CK702).
    """
    if not facts.globals:
        return
    refused = _distinct([g for g in facts.globals if _refused(g) and not _vouched(g, options)])
    for g in refused[:MAX_LISTED]:
        yield error(_sentence(g), g.where, _KEEP_PLAIN if g.loader != "never" else "Delete it, and ask who wrote it.")
    if len(refused) > MAX_LISTED:
        yield error(f"{len(refused) - MAX_LISTED:,} further names are not allowed either", refused[MAX_LISTED].where)
    for g in facts.globals:
        if g.module == "numpy.core.multiarray" and g.loader == "transformers":
            yield info(
                f"{g.where}: saved with NumPy 1; with NumPy 2 or newer the Trainer refuses to load it",
                g.where,
                "Resume with NumPy 1, or remove the file: training goes on with another random state.",
            )
            break
    judged = {str(g) for g in facts.globals if g.loader in ("weights_only", "transformers", "torch")}
    if judged and not refused and not any(_refused(g) for g in facts.globals):
        safe = "" if facts.defects else "safe to load: "
        names = "the only name" if len(judged) == 1 else f"all {len(judged):,} names"
        verb = "is" if len(judged) == 1 else "are"
        yield passed(f"{safe}{names} in its pickle {verb} allowed by weights_only=True")


def _sentence(g: GlobalFacts) -> str:
    danger = "; it can run any command" if runs_code(g.module, g.name) else ""
    if g.loader == "never":
        return f"{g.where} names {g}, which has no business there{danger}: loading that file would run it"
    if g.loader == "pickle":
        return (
            f"{g.where} names {g}, which is no part of torch.distributed.checkpoint{danger}: a resume reads the file "
            "with pickle.load and would import and call it"
        )
    if g.loader == "torch":
        return (
            f"{g.where} names {g}, which is no plain value or tensor{danger}: a resume reads this entry with "
            "torch.load(weights_only=False) and would import and call it"
        )
    more = " with the Trainer's additions" if g.loader == "transformers" else ""
    path = " (a path of attributes, not a name)" if "." in g.name else ""
    return (
        f"{g.where or 'the pickle'} names {g}{path}, which is not among what torch.load(weights_only=True){more} "
        f"allows{danger}: a resume will refuse it, and one with weights_only=False would import and call it"
    )


def _distinct(names: list[GlobalFacts]) -> list[GlobalFacts]:
    """One of each name and loader, sorted by name."""
    first = {(str(g), g.loader, g.name): g for g in reversed(names)}
    return [first[key] for key in sorted(first)]


@rule(
    "CK702",
    "vouched-global",
    Severity.WARNING,
    compares="names that are not allowed with those that the user vouches for",
    source="--allow-global, and `allow_globals` of the guard",
)
def vouched_global(facts: Facts, options: Options) -> Iterator[Outcome]:
    """A name that its loader does not allow is one that you vouch for.

    Vouching stops the error and nothing else: a resume still refuses the file until
    `torch.serialization.add_safe_globals([...])` is called with the class. The option is for classes of your own.
    Where it names something known to run code, such as `os.system`, you are taken at your word, with a warning.
    """
    for g in _distinct([g for g in facts.globals if _refused(g) and _vouched(g, options)]):
        if runs_code(g.module, g.name):
            yield warning(
                f"{g.where or 'the pickle'} names {g}, which you vouch for and which can run any command",
                g.where,
                "Do not load this file, unless you wrote it yourself and know why the name is in it.",
            )
        else:
            needs = (
                ""
                if g.loader in ("pickle", "torch")
                else f"; a resume needs torch.serialization.add_safe_globals([{g}])"
            )
            yield info(f"{g.where or 'the pickle'} names {g}, which you vouch for{needs}", g.where)


@rule(
    "CK703",
    "unjudged-pickle",
    Severity.INFO,
    compares="pickles that no resume reads with what is in the checkpoint",
    source="transformers: trainer.py, _save (TRAINING_ARGS_NAME)",
)
def unjudged_pickle(facts: Facts, options: Options) -> Iterator[Outcome]:
    """A pickle in the folder holds objects of many classes, and no resume reads it: `training_args.bin`.

    It can only be loaded with `weights_only=False`, which runs whatever it names. Its names are listed, not judged;
    only those known to run code are an error (CK701). Never load one that is not your own.
    """
    unread: dict[str, set[str]] = {}
    for g in facts.globals:
        if g.loader == "never" and not _refused(g):
            unread.setdefault(g.where.partition(":")[0], set()).add(str(g))
    for where, names in unread.items():
        shown = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
        yield info(
            f"{where} is a pickle of {many(len(names), 'class', 'classes')} that no resume reads ({shown})",
            where,
            "Do not load it, unless it is your own.",
        )


@rule(
    "CK705",
    "refused-opcode",
    compares="the opcodes of every pickle with those that torch.load(weights_only=True) knows",
    source="torch/_weights_only_unpickler.py, Unpickler.load",
)
def refused_opcode(facts: Facts, options: Options) -> Iterator[Outcome]:
    """A pickle has opcodes at which `torch.load(weights_only=True)`, the default, ends with an exception.

    It knows those of pickle protocol 2, which `torch.save` writes, and few others. A file saved with
    `pickle_protocol=4` or 5, or by another library, can only be loaded with `weights_only=False`.
    """
    for oddity in facts.oddities:
        if oddity.kind is OddityKind.REFUSED_OPCODE:
            yield error(
                f"{oddity.where}: {oddity.message}: a resume will refuse it",
                oddity.where,
                "Save it again without pickle_protocol; to load it takes weights_only=False, so only if you wrote it.",
            )


@rule(
    "CK704",
    "pickle-loader",
    Severity.PASS,
    compares="names in .metadata with the classes of torch.distributed.checkpoint",
    source="torch/distributed/checkpoint/filesystem.py, FileSystemReader.read_metadata",
)
def pickle_loader(facts: Facts, options: Options) -> Iterator[Outcome]:
    """Everything that the `.metadata` of a sharded checkpoint names belongs to it.

    `torch.distributed.checkpoint` reads that file with a bare `pickle.load`, which runs whatever it names, before
    anything else is looked at. A name from elsewhere is an error of CK701.
    """
    names = {str(g) for g in facts.globals if g.loader == "pickle"}
    if names and not any(_refused(g) for g in facts.globals if g.loader == "pickle"):
        yield passed(f"read by pickle.load: all {many(len(names), 'name')} in .metadata are those of its own classes")

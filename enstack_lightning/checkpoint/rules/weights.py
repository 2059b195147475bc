"""CK6xx: the weights are those of the model that the checkpoint names, all there, and sane.

Shapes and names are judged only for the architectures that are known here: BERT, RoBERTa and their like, to which
CodeBERT, GraphCodeBERT and UniXcoder belong. Of every other one only the number of labels is judged. What is compared:
`transformers/models/roberta/modeling_roberta.py` and `configuration_roberta.py`, and those of `bert`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from enstack_lightning.checkpoint.facts import DefectKind, Facts, Format, OddityKind, ValueFacts
from enstack_lightning.checkpoint.mappings import is_mapping
from enstack_lightning.checkpoint.rules.rule import Options, Outcome, Severity, error, info, passed, rule, warning
from enstack_lightning.checkpoint.wording import many

MAX_LISTED = 10

Shape = tuple[int, ...]

_MODEL_TYPES = {"bert", "camembert", "roberta", "xlm-roberta"}
_EMBEDDINGS = "embeddings.word_embeddings.weight"
_BASE_PREFIXES = ("", "bert.", "roberta.")
_NUMBERED = re.compile(r"([0-9]{1,6})\.(.+)")
_WRAPPERS = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_ADAPTED = ("lora_", "base_layer.", "modules_to_save.", "adapter", "parametrizations.")
"""Parts of names that adapters (PEFT) and parametrizations put in: what is missing there stands elsewhere."""
_RESHAPED = ("quantization_config", "pruned_heads")
"""Entries of config.json after which the weights have other shapes and names than the model's own."""

_CLASSIFIES = re.compile(r"\w+For(Sequence|Token|Image|Audio)Classification")
_CLASSIFIERS = ("classifier.weight", "classifier.out_proj.weight", "score.weight")

# Of one layer: name -> shape in sizes of the configuration.
_HIDDEN, _INNER = "hidden_size", "intermediate_size"
_OF_A_LAYER: dict[str, tuple[str, ...]] = {
    **{f"attention.self.{part}.weight": (_HIDDEN, _HIDDEN) for part in ("query", "key", "value")},
    **{f"attention.self.{part}.bias": (_HIDDEN,) for part in ("query", "key", "value")},
    "attention.output.dense.weight": (_HIDDEN, _HIDDEN),
    "attention.output.dense.bias": (_HIDDEN,),
    "attention.output.LayerNorm.weight": (_HIDDEN,),
    "attention.output.LayerNorm.bias": (_HIDDEN,),
    "intermediate.dense.weight": (_INNER, _HIDDEN),
    "intermediate.dense.bias": (_INNER,),
    "output.dense.weight": (_HIDDEN, _INNER),
    "output.dense.bias": (_HIDDEN,),
    "output.LayerNorm.weight": (_HIDDEN,),
    "output.LayerNorm.bias": (_HIDDEN,),
}
_OF_THE_EMBEDDINGS: dict[str, tuple[str, ...]] = {
    _EMBEDDINGS: ("vocab_size", _HIDDEN),
    "embeddings.position_embeddings.weight": ("max_position_embeddings", _HIDDEN),
    "embeddings.token_type_embeddings.weight": ("type_vocab_size", _HIDDEN),
    "embeddings.LayerNorm.weight": (_HIDDEN,),
    "embeddings.LayerNorm.bias": (_HIDDEN,),
}
# Of a head, by the class that config.json names; weights that are tied to others or may be left out are not in it.
_ROBERTA_CLASSIFIER = {
    "classifier.dense.weight": (_HIDDEN, _HIDDEN),
    "classifier.dense.bias": (_HIDDEN,),
    "classifier.out_proj.weight": ("num_labels", _HIDDEN),
    "classifier.out_proj.bias": ("num_labels",),
}
_LINEAR_CLASSIFIER = {"classifier.weight": ("num_labels", _HIDDEN), "classifier.bias": ("num_labels",)}
_ROBERTA_LANGUAGE_HEAD = {
    "lm_head.dense.weight": (_HIDDEN, _HIDDEN),
    "lm_head.dense.bias": (_HIDDEN,),
    "lm_head.layer_norm.weight": (_HIDDEN,),
    "lm_head.layer_norm.bias": (_HIDDEN,),
}
_BERT_LANGUAGE_HEAD = {
    "cls.predictions.transform.dense.weight": (_HIDDEN, _HIDDEN),
    "cls.predictions.transform.dense.bias": (_HIDDEN,),
    "cls.predictions.transform.LayerNorm.weight": (_HIDDEN,),
    "cls.predictions.transform.LayerNorm.bias": (_HIDDEN,),
}
_HEADS: dict[str, dict[str, tuple[str, ...]]] = {
    "BertModel": {},
    "BertForSequenceClassification": _LINEAR_CLASSIFIER,
    "BertForTokenClassification": _LINEAR_CLASSIFIER,
    "BertForMaskedLM": _BERT_LANGUAGE_HEAD,
    **{
        f"{family}{task}": head
        for family in ("Roberta", "XLMRoberta", "Camembert")
        for task, head in {
            "Model": {},
            "ForSequenceClassification": _ROBERTA_CLASSIFIER,
            "ForTokenClassification": _LINEAR_CLASSIFIER,
            "ForMaskedLM": _ROBERTA_LANGUAGE_HEAD,
        }.items()
    },
}


@dataclass(frozen=True)
class _Encoder:
    """The tensors of the one BERT-like encoder in a checkpoint.

    Attributes:
        prefix: what stands before the encoder's own names (`roberta.`, `network.roberta.`, nothing).
        outer: what stands before the names of its head (`network.`, nothing).
        layers: shape of each tensor of each numbered layer, by the name below it.
        shapes: shape of every tensor of the checkpoint, by its whole name.
    """

    prefix: str
    outer: str
    layers: Mapping[int, Mapping[str, Shape]]
    shapes: Mapping[str, Shape]


def _encoder(facts: Facts) -> _Encoder | None:
    """The checkpoint's encoder, where there is exactly one and no adapter has changed its names."""
    if not any(t.name.endswith(_EMBEDDINGS) for t in facts.tensors) or _is_reshaped(facts):
        return None
    shapes = _modern({t.name: t.shape for t in facts.tensors})
    prefixes = [name.removesuffix(_EMBEDDINGS) for name in shapes if name.endswith(_EMBEDDINGS)]
    if len(prefixes) != 1:
        return None
    (prefix,) = prefixes
    if f"{prefix}encoder.layer.0.attention.self.query.weight" not in shapes and not _is_known(facts):
        return None
    layers: dict[int, dict[str, Shape]] = {}
    below = f"{prefix}encoder.layer."
    for name, shape in shapes.items():
        if name.startswith(below) and (match := _NUMBERED.fullmatch(name, len(below))):
            layers.setdefault(int(match[1]), {})[match[2]] = shape
    return _Encoder(prefix, prefix[: prefix.rstrip(".").rfind(".") + 1], layers, shapes)


def _modern(shapes: Mapping[str, Shape]) -> Mapping[str, Shape]:
    """The names as the model gives them today: without wrappers, and without TensorFlow's gamma and beta."""
    names = "\n".join(shapes)
    if "_orig_mod." in names or "_wrapped_module." in names:
        shapes = {_WRAPPERS.sub("", name): shape for name, shape in shapes.items()}
    if "LayerNorm.gamma" in names:
        shapes = {
            name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): shape
            for name, shape in shapes.items()
        }
    return shapes


def _is_reshaped(facts: Facts) -> bool:
    """Whether an adapter, quantization or pruning gave the weights other names or shapes."""
    names = "\n".join(t.name for t in facts.tensors)
    return any(facts.model_config.get(name) for name in _RESHAPED) or any(part in names for part in _ADAPTED)


def _is_known(facts: Facts) -> bool:
    kind = facts.model_config.get("model_type")
    return isinstance(kind, str) and kind in _MODEL_TYPES


def _architecture(config: Mapping[str, Any]) -> str | None:
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and len(named) == 1 else None
    return name if isinstance(name, str) and name in _HEADS else None


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """The sizes that the configuration states; one that it leaves at its default is not there, but for the labels."""
    names = ("vocab_size", "max_position_embeddings", "type_vocab_size", _HIDDEN, _INNER)
    sizes = {name: config[name] for name in names if type(config.get(name)) is int}
    labels = config.get("id2label")
    if is_mapping(labels):
        return {**sizes, "num_labels": len(labels)}
    count = config.get("num_labels", 2)  # what transformers leaves out when it is 2
    return {**sizes, "num_labels": count} if type(count) is int else sizes


def _head(encoder: _Encoder, config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The names and sizes of the head of the architecture that is named, in full."""
    architecture = _architecture(config)
    return {encoder.outer + name: sizes for name, sizes in _HEADS[architecture].items()} if architecture else {}


@rule(
    "CK601",
    "config-shape",
    compares="sizes in config.json with the shapes of the weights",
    source="transformers: models/roberta/modeling_roberta.py, models/bert/modeling_bert.py",
)
def config_shape(facts: Facts, options: Options) -> Iterator[Outcome]:
    """`config.json` and the weights describe models of different size: they come from two runs or two models.

    Compared for BERT, RoBERTa and their like: vocabulary, positions, token types, hidden and intermediate size, number
    of layers, and the number of labels (`id2label`, or 2 where it is left out) with the classifier's rows. For other
    classifiers of transformers: the number of labels, where `id2label` is there. Such a checkpoint does not load, or
    loads with a part of its weights made anew at random. Adapters, quantized and pruned models are left in peace.
    """
    if not _is_known(facts):
        yield from _wrong_labels(facts)
        return
    encoder, config = _encoder(facts), facts.model_config
    if encoder is None:
        return
    sizes = _sizes(config)
    wrong = [*_wrong_shapes(encoder, config, sizes), *_wrong_depth(encoder, config)]
    hint = "Put the config.json and the weights of one save together."
    for where, message in wrong[:MAX_LISTED]:
        yield error(message, where, hint)
    if len(wrong) > MAX_LISTED:
        yield error(f"{len(wrong) - MAX_LISTED:,} further weights do not have the shape that config.json says")
    if not wrong:
        judged = any("num_labels" in named for named in _head(encoder, config).values()) and "num_labels" in sizes
        labels = f", {sizes['num_labels']:,} labels" if judged else ""
        yield passed(f"config.json agrees with the weights: {many(len(encoder.layers), 'layer')}{labels}")


def _wrong_labels(facts: Facts) -> Iterator[Outcome]:
    """The classifier of a model of any architecture, by the names that transformers gives it."""
    named, labels = facts.model_config.get("architectures"), facts.model_config.get("id2label")
    classifies = isinstance(named, list) and named and _CLASSIFIES.fullmatch(str(named[0]))
    if not classifies or not is_mapping(labels) or _is_reshaped(facts):
        return
    for tensor in facts.tensors:
        if tensor.name in _CLASSIFIERS and len(tensor.shape) == 2 and tensor.shape[0] != len(labels):
            yield error(
                f"{tensor.name} has {tensor.shape[0]:,} rows, and config.json names {len(labels):,} labels (id2label)",
                tensor.name,
                "Put the config.json and the weights of one save together.",
            )


def _wrong_shapes(encoder: _Encoder, config: Mapping[str, Any], sizes: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    for number, layer in encoder.layers.items():
        for part, shape in layer.items():
            yield from _misfit(f"{encoder.prefix}encoder.layer.{number}.{part}", shape, _OF_A_LAYER.get(part), sizes)
    named = {encoder.prefix + name: wanted for name, wanted in _OF_THE_EMBEDDINGS.items()}
    for name, wanted in (*named.items(), *_head(encoder, config).items()):
        if name in encoder.shapes:
            yield from _misfit(name, encoder.shapes[name], wanted, sizes)


def _misfit(
    name: str, shape: Shape, named: tuple[str, ...] | None, sizes: Mapping[str, int]
) -> Iterator[tuple[str, str]]:
    """What is wrong with a shape, where the configuration states every size of it."""
    if named is None or not all(size in sizes for size in named):
        return
    wanted = tuple(sizes[size] for size in named)
    if shape != wanted:
        axis = next((i for i, pair in enumerate(zip(shape, wanted, strict=False)) if pair[0] != pair[1]), None)
        which = "" if axis is None else f" ({named[axis]} {wanted[axis]:,})"
        yield name, f"{name} has shape {list(shape)}, and config.json says {list(wanted)}{which}"


def _wrong_depth(encoder: _Encoder, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    depth, layers = config.get("num_hidden_layers"), encoder.layers
    if type(depth) is int and layers and len(layers) > depth:
        yield (
            f"{encoder.prefix}encoder.layer",
            f"the weights have {len(layers):,} layers, and config.json says {depth:,} (num_hidden_layers): "
            "the others would be left out",
        )


@rule(
    "CK602",
    "missing-weight",
    compares="the names of the weights with those of the architecture, and of each layer with the others'",
    source="transformers: models/roberta/modeling_roberta.py, models/bert/modeling_bert.py",
)
def missing_weight(facts: Facts, options: Options) -> Iterator[Outcome]:
    """A weight that the architecture needs is not in the checkpoint: loading makes it anew, at random.

    With a `config.json` of BERT, RoBERTa or their like every layer must be there with all its weights, and so must the
    head of the class that it names. Without one (in a Lightning checkpoint) a layer that lacks what the others have is
    a warning, since a module may save a part of its weights on purpose. Not missed: poolers, weights that are tied to
    others, buffers of positions, and anything in a checkpoint of an adapter (PEFT). In a model's folder names that
    begin with what a wrapper put there (`module.` of DataParallel) are a warning: `from_pretrained` finds none of them.
    """
    if any(d.kind is not DefectKind.MISSHAPEN for d in facts.defects):
        return  # a file that is missing or damaged is said by CK1xx, and what it holds is missed here too
    encoder, config = _encoder(facts), facts.model_config
    if encoder is None:
        if _is_known(facts) and facts.tensors and _names_no_encoder(facts):
            yield error(
                f"none of the {len(facts.tensors):,} weights is of the {_architecture(config)} that config.json names",
                "config.json",
                "Put the config.json and the weights of one save together.",
            )
        return
    known = _is_known(facts)
    if facts.format is Format.HUGGINGFACE and _architecture(config) and (wrapper := _wrapper(facts)):
        yield warning(
            f"the weights' names begin with {wrapper}, which {_architecture(config)} does not know: from_pretrained "
            "would make them all anew, at random",
            f"{wrapper}{_EMBEDDINGS}",
            "Save the model that the wrapper holds (model.module.save_pretrained), or load them with code of your own.",
        )
    missing = [*_missing_in_encoder(encoder, config if known else {}), *_missing_in_head(encoder, config, known)]
    say = error if known else warning
    for name in missing[:MAX_LISTED]:
        yield say(
            f"{name} is not in the checkpoint: loading would make it anew, at random"
            if known
            else f"{name} is not in the checkpoint, though it has what the other layers need",
            name,
            "Use another checkpoint of this run.",
        )
    if len(missing) > MAX_LISTED:
        yield say(f"{len(missing) - MAX_LISTED:,} further weights are missing")
    if not missing:
        layers = len(encoder.layers)
        alike = "its layer has all parts" if layers == 1 else f"all {layers:,} layers have the same parts"
        yield passed(f"weights complete: {alike}")


def _wrapper(facts: Facts) -> str:
    """What stands before the encoder's names that is not the model's own."""
    prefixes = (t.name.removesuffix(_EMBEDDINGS) for t in facts.tensors if t.name.endswith(_EMBEDDINGS))
    return next((prefix for prefix in prefixes if prefix not in _BASE_PREFIXES), "")


def _names_no_encoder(facts: Facts) -> bool:
    """Whether config.json names a class known here and no weight's name ends as one of its encoder does."""
    if _architecture(facts.model_config) is None or _is_reshaped(facts):
        return False
    return not any(t.name.endswith(_EMBEDDINGS) for t in facts.tensors)


def _missing_in_encoder(encoder: _Encoder, config: Mapping[str, Any]) -> Iterator[str]:
    layers = encoder.layers
    depth = config.get("num_hidden_layers")
    count = depth if type(depth) is int and 0 <= depth <= 10_000 else max(layers, default=-1) + 1
    parts: Collection[str] = _OF_A_LAYER if config else set().union(*layers.values()) & _OF_A_LAYER.keys()
    for number in range(min(count, 10_000)):
        if number not in layers:
            yield f"{encoder.prefix}encoder.layer.{number}"
            continue
        for part in _OF_A_LAYER:
            if part in parts and part not in layers[number]:
                yield f"{encoder.prefix}encoder.layer.{number}.{part}"
    for name in _OF_THE_EMBEDDINGS if config else ():
        if encoder.prefix + name not in encoder.shapes:
            yield encoder.prefix + name


def _missing_in_head(encoder: _Encoder, config: Mapping[str, Any], known: bool) -> Iterator[str]:
    for name in _head(encoder, config) if known else ():
        if name not in encoder.shapes:
            yield name


@rule(
    "CK603",
    "non-finite",
    compares="every value of weights and moments with NaN and infinity (with --deep)",
    source="IEEE 754; Open Compute: OFP8 for float8",
)
def non_finite(facts: Facts, options: Options) -> Iterator[Outcome]:
    """A weight or an optimizer's moment holds NaN or infinity: training has diverged, or bytes have changed.

    Found by `--deep` only, which reads every value. From such a checkpoint every further step gives NaN. Infinity on
    purpose is left in peace: in a mask, and in a single number that a module keeps as a buffer (the best loss so far).
    A mask may also be called `attn_bias`. In an entry that is called neither weight nor bias infinity is a warning,
    since it may be such a buffer as well.
    """
    if facts.values is None:
        return
    bad = [v for v in facts.values if v.nonfinite and (v.role == "weight" or options.purpose == "resume")]
    outcomes = sorted(map(_not_finite, bad), key=lambda o: _WORST_FIRST.index(o.severity))
    yield from outcomes[:MAX_LISTED]
    if len(outcomes) > MAX_LISTED:
        rest = outcomes[MAX_LISTED:]
        yield dataclasses.replace(
            rest[0], message=f"{len(rest):,} further tensors hold values that are not finite", where=""
        )
    if not bad and not facts.defects:
        yield passed("all values are finite")


# A layer's own, those of torch's recurrent layers (`bias_hh_l0`) and of parametrizations (`weight.original0`).
_TRAINED = re.compile(r"(weight|bias)$|^(weight|bias)_([gvk]|orig|(ih|hh)_l[0-9]+(_reverse)?)$|^original[0-9]*$")
_MASK = re.compile(r"(attn|attention|causal)_bias")
_WORST_FIRST = (Severity.ERROR, Severity.WARNING, Severity.INFO)


def _not_finite(v: ValueFacts) -> Outcome:
    hint = (
        "Use a checkpoint from before the run diverged; a lower learning rate or gradient clipping may keep it whole."
    )
    name = v.name.rpartition(".")[2].lower()
    masks = "mask" in name or (v.first_value == "-inf" and _MASK.fullmatch(name))
    if v.first_value == "nan" or v.role == "optimizer" or (_TRAINED.search(name) and not masks):
        return error(_values(v), v.name, hint)
    if v.first_nonfinite == () or masks:
        return info(_values(v), v.name)
    return warning(_values(v), v.name, hint)


def _values(v: ValueFacts) -> str:
    count = many(v.nonfinite, "value that is", "values that are")
    where = f", the first at {list(v.first_nonfinite)}" if v.first_nonfinite else ""
    return f"{v.name} holds {count} not finite ({v.first_value}{where})"


@rule(
    "CK604",
    "all-zero",
    Severity.WARNING,
    compares="every value of a weight, and of Adam's second moments, with 0 (with --deep)",
    source="IEEE 754",
)
def all_zero(facts: Facts, options: Options) -> Iterator[Outcome]:
    """Every value of a weight is 0, as in a bias that was not trained, or where a block of zeros lies in the file.

    Found by `--deep` only. Worth knowing: most such tensors are meant to be. Second moments of Adam (`exp_avg_sq`) that
    are 0 for every parameter of an optimizer that has stepped are a warning: they were lost, or no gradient ever was
    other than 0.
    """
    zeros = {v.name for v in facts.values or () if v.all_zero and v.role == "optimizer"}
    for number, optimizer in enumerate(facts.optimizers or ()) if zeros and options.purpose == "resume" else ():
        squares = [p for p, entries in optimizer.moments.items() if "exp_avg_sq" in entries]
        if squares and optimizer.most_steps and all(_second_moment(number, p) in zeros for p in squares):
            yield warning(
                f"optimizer {number}: every exp_avg_sq is 0 after {many(optimizer.most_steps, 'step')}",
                "optimizer",
                "Its state was lost, or it never had a gradient: use another checkpoint of this run.",
            )
    names = [v.name for v in facts.values or () if v.all_zero and v.role == "weight"]
    if names:
        shown = ", ".join(names[:MAX_LISTED]) + (", ..." if len(names) > MAX_LISTED else "")
        yield info(f"{many(len(names), 'weight holds', 'weights hold')} nothing but zeros: {shown}")


def _second_moment(optimizer: int, parameter: int | str) -> str:
    return f"optimizer {optimizer}, parameter {parameter}, exp_avg_sq"


@rule(
    "CK605",
    "odd-tensor",
    Severity.WARNING,
    compares="a tensor's shape and layout with the bytes that it has",
    source="torch/_utils.py, _rebuild_tensor_v2 and _rebuild_sparse_tensor",
)
def odd_tensor(facts: Facts, options: Options) -> Iterator[Outcome]:
    """A tensor is far larger than the bytes it is made of, or sparse.

    A stride of 0 repeats one value as often as the shape says: it loads, and the first copy of it may need terabytes.
    Indices of a sparse tensor are not checked by `torch.load`, and bad ones read memory that is not the tensor's.
    """
    odd = [o for o in facts.oddities if o.kind in (OddityKind.LOGICAL_SIZE, OddityKind.SPARSE_TENSOR)]
    for oddity in odd[:MAX_LISTED]:
        yield warning(
            f"{oddity.where}: {oddity.message}" if oddity.where else oddity.message,
            oddity.where,
            "Do not load it, unless you know what wrote it.",
        )
    if len(odd) > MAX_LISTED:
        yield warning(f"{len(odd) - MAX_LISTED:,} further tensors of this kind")

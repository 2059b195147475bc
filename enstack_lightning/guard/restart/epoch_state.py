"""What an epoch has gathered so far: values logged for its end, metric states, and what callbacks see of them.

Lightning saves none of this, so that after a resume inside an epoch its figures would be those of the part trained
since. States are kept as tensors and numbers under the names that the module gives them.
"""

from __future__ import annotations

import builtins
import dis
import sys
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from enstack_lightning.guard.parts import Parts
from enstack_lightning.guard.restart.held_values import plain

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection, _ResultMetric
    from torchmetrics import Metric

_SEEN = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
_PLAIN_META = (
    "fx",
    "name",
    "prog_bar",
    "logger",
    "on_step",
    "on_epoch",
    "enable_graph",
    "add_dataloader_idx",
    "dataloader_idx",
    "metric_attribute",
)
_FEW = 1_000
"""Elements of a tensor that a metric may hold beside its states."""


def capture_epoch_state(trainer: Trainer, parts: Parts) -> dict[str, Any]:
    """The state of a part-done training epoch, as tensors, numbers and strings.

    Args:
        trainer: the Trainer whose checkpoint is made.
        parts: of its module.

    Returns:
        `seen`: what callbacks, loggers and the progress bar see; `results`: what `self.log` has gathered, by key;
        `metrics`: states of the module's torchmetrics, by name; those of validation are left out, they begin anew.
    """
    connector = trainer._logger_connector
    results = trainer.fit_loop.epoch_loop._results
    return {
        "seen": {name: _plain(getattr(connector, name)) for name in _SEEN},
        "results": {key: _result_state(result) for key, result in results.items() if not result.has_reset},
        "metrics": {name: _metric_state(metric) for name, metric in _metrics_of_training(trainer, parts)},
    }


def restore_epoch_state(trainer: Trainer, parts: Parts, state: dict[str, Any]) -> None:
    """Puts back what `capture_epoch_state` returned; names that the module no longer has are left out.

    Args:
        trainer: a Trainer that is about to train, whose loops are restored.
        parts: of its module.
    """
    module, connector = trainer.lightning_module, trainer._logger_connector
    for name in _SEEN:
        getattr(connector, name).update(_on(module.device, state["seen"].get(name, {})))
    metrics = _metrics_by_name(parts)
    for name, saved in state["metrics"].items():
        if name in metrics:
            _restore_metric(metrics[name], saved)
    if state["results"]:
        _ResumedResults(trainer, metrics, state["results"])


# What `self.log` has gathered


class _ResumedResults:
    """Fills the training epoch's results, and lets the first `self.log` of each key go on from what is saved.

    What that call says of the key holds: it may ask for another progress bar or logger than the run that saved.
    """

    def __init__(self, trainer: Trainer, metrics: dict[str, Metric], saved: dict[str, dict[str, Any]]) -> None:
        self.results: _ResultCollection = trainer.fit_loop.epoch_loop._results
        self.waiting = dict(saved)
        self.names = sys.modules[type(self.results).__module__]
        for key, state in saved.items():
            result = self._result(trainer, metrics, state["meta"])
            if result is None:
                del self.waiting[key]
                continue
            self.results[key] = result
            _fill(result, state, trainer.lightning_module.device)
        self.results.log = self.log

    def log(self, fx: str, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        kind, results = type(self.results), self.results
        key = f"{fx}.{name}"
        if kwargs.get("add_dataloader_idx", True) and results.dataloader_idx is not None:
            key += f".{results.dataloader_idx}"
        saved = self.waiting.pop(key, None)
        if saved is not None and not results.pop(key).has_reset:

            def filled_first(key: str, value: Any, batch_size: int) -> None:
                if results[key].is_tensor == saved["is_tensor"]:
                    _fill(results[key], saved, value.device)
                kind.update_metrics(results, key, value, batch_size)

            results.update_metrics = filled_first
        try:
            kind.log(results, fx, name, value, *args, **kwargs)
        finally:
            vars(results).pop("update_metrics", None)
            if not self.waiting:
                vars(results).pop("log", None)

    def _result(self, trainer: Trainer, metrics: dict[str, Metric], meta: dict[str, Any]) -> _ResultMetric | None:
        """A new result as the saved call of `self.log` would make it; None where its metric is not there any more."""
        reduce_fx = getattr(builtins if meta["builtin"] else torch, meta["reduce_fx"])
        described = self.names._Metadata(reduce_fx=reduce_fx, **{name: meta[name] for name in _PLAIN_META})
        described.sync = self.names._Sync(
            _should=meta["sync"], fn=trainer.strategy.reduce, rank_zero_only=meta["rank_zero_only"]
        )
        attribute = meta["metric_attribute"]
        result: _ResultMetric = self.names._ResultMetric(described, attribute is None)
        if attribute is not None:
            metric = metrics.get(attribute)
            if metric is None:
                return None
            result.value = metric
        return result


def _result_state(result: _ResultMetric) -> dict[str, Any]:
    meta = result.meta
    name = meta.reduce_fx.__name__
    return {
        "is_tensor": result.is_tensor,
        "value": result.value.detach() if result.is_tensor else None,
        "batch_size": result.cumulated_batch_size if result.is_tensor and meta.is_mean_reduction else None,
        "step_value": result._forward_cache.detach() if isinstance(result._forward_cache, Tensor) else None,
        "updates": result._update_count,
        "meta": {
            **{name: getattr(meta, name) for name in _PLAIN_META},
            "reduce_fx": name,
            "builtin": meta.reduce_fx is getattr(builtins, name, None),
            "sync": meta.sync.should,
            "rank_zero_only": meta.sync.rank_zero_only,
        },
    }


def _fill(result: _ResultMetric, saved: dict[str, Any], device: torch.device) -> None:
    if result.is_tensor:
        result.value = saved["value"].to(device)
        if saved["batch_size"] is not None:
            result.cumulated_batch_size = saved["batch_size"].to(device)
    if saved["step_value"] is not None:
        result._forward_cache = saved["step_value"].to(device)
    result._update_count = saved["updates"]
    result._computed = None


# Metric states


def _metrics_of_training(trainer: Trainer, parts: Parts) -> Iterator[tuple[str, Metric]]:
    validated = {id(r.value) for r in trainer.fit_loop.epoch_loop.val_loop._results.values() if not r.is_tensor}
    for name, metric in _metrics_by_name(parts).items():
        if _has_begun(metric) and id(metric) not in validated and _is_of_tensors(metric):
            yield name, metric


def _has_begun(metric: Metric) -> bool:
    """Wrappers count no updates; a running one counts its values, and one of extremes has tensors."""
    return metric._update_count > 0 or any(isinstance(v, Tensor) or v for v in _beside_the_states(metric).values())


def _is_of_tensors(metric: Metric) -> bool:
    """Whether a metric's states are tensors and lists of tensors; those of encoded masks are tuples of bytes."""
    states = (getattr(metric, name) for name in metric._defaults)
    return all(isinstance(part, Tensor) for s in states for part in (s if isinstance(s, list) else [s]))


def _metrics_by_name(parts: Parts) -> dict[str, Metric]:
    from torchmetrics import Metric, MetricCollection

    for _, layer in parts.layers:
        if isinstance(layer, MetricCollection):
            layer.values(copy_state=False)  # the states of a compute group are brought to all of its metrics
    # Not `isinstance`: Metric is an abstract class with hundreds of others below it, and each is asked for each kind of
    # layer whether it is one of them, which takes 20 ms.
    metrics: Any = ((name, layer) for name, layer in parts.layers if Metric in type(layer).__mro__)
    return dict(metrics)


def _metric_state(metric: Metric) -> dict[str, Any]:
    states = {name: getattr(metric, name) for name in metric._defaults}
    cache = metric._forward_cache
    return {
        "updates": metric._update_count,
        "step_value": cache.detach() if isinstance(cache, Tensor) else None,
        "beside": _beside_the_states(metric),
        "states": {
            name: s.detach() if isinstance(s, Tensor) else [t.detach() for t in s] for name, s in states.items()
        },
    }


def _beside_the_states(metric: Metric) -> dict[str, Any]:
    held = {n: vars(metric)[n] for n in _set_by_methods(type(metric)) - metric._defaults.keys() if n in vars(metric)}
    small = {n: v.detach() for n, v in held.items() if isinstance(v, Tensor) and v.numel() <= _FEW}
    return small | {n: plain(v) for n, v in held.items() if isinstance(v, bool | int | float)}


@cache
def _set_by_methods(kind: type[Metric]) -> frozenset[str]:
    """Attributes beside the states that a metric's own methods set, such as how many values a running one has seen.

    What only its constructor sets is how it is configured, and may be another thing in the run that resumes.
    """
    from torchmetrics import Metric

    own = kind.__mro__[: kind.__mro__.index(Metric)]
    methods = [f.__code__ for k in own for n, f in vars(k).items() if n != "__init__" and hasattr(f, "__code__")]
    stored = {i.argval for code in methods for i in dis.get_instructions(code) if i.opname == "STORE_ATTR"}
    return frozenset(stored - {"_computed", "_forward_cache", "_update_count"})


def _restore_metric(metric: Metric, saved: dict[str, Any]) -> None:
    for name, value in saved.get("beside", {}).items():
        setattr(metric, name, _on(metric.device, value))
    for name, state in saved["states"].items():
        if name in metric._defaults:
            setattr(metric, name, _on(metric.device, state))
    metric._update_count = saved["updates"]
    metric._forward_cache = _on(metric.device, saved["step_value"])
    metric._computed = None


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: v.detach() if isinstance(v, Tensor) else v
        for name, v in values.items()
        if isinstance(v, Tensor | float | int)
    }


def _on(device: torch.device, value: Any) -> Any:
    """A tensor, or the tensors in a list or dict, on a device; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list):
        return [_on(device, v) for v in value]
    if isinstance(value, dict):
        return {k: _on(device, v) for k, v in value.items()}
    return value

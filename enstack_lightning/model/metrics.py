"""What a run is judged by: metric collections for training and evaluation, and the confusion matrix as text.

Class probabilities and labels come in; figures equal to scikit-learn's go out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities import dim_zero_cat


class PresentClassAUROC(MulticlassAUROC):
    """One-versus-rest AUROC, averaged over the classes that have both positive and negative rows.

    torchmetrics counts a class without rows as 0 and warns each time; here it does not count. The result is NaN where
    no class can be judged.
    """

    def compute(self) -> Tensor:  # type: ignore[override]
        """Mean AUROC, a float32 scalar in [0, 1] or NaN."""
        probabilities = dim_zero_cat(self.preds)
        labels = dim_zero_cat(self.target)
        areas = [
            binary_auroc(probabilities[:, label], is_label.long(), validate_args=False)
            for label in range(self.num_classes)
            if (is_label := labels == label).any() and not is_label.all()
        ]
        return torch.stack(areas).mean() if areas else probabilities.new_tensor(float("nan"))


def training_metrics(num_labels: int) -> MetricCollection:
    """`train/accuracy` and `train/f1` (weighted), from predicted labels [B] and labels [B], both int64."""
    return MetricCollection(
        {
            # Weighted by class size, the accuracy of the classes is the share of correct rows, and so the two
            # metrics can keep the same counts.
            "accuracy": MulticlassAccuracy(num_labels, average="weighted", validate_args=False),
            "f1": MulticlassF1Score(num_labels, average="weighted", validate_args=False),
        },
        prefix="train/",
        compute_groups=[["accuracy", "f1"]],
    )


def evaluation_metrics(num_labels: int, stage: str) -> MetricCollection:
    """The figures of a validation or a test, from probabilities [B, num_labels] float32 and labels [B] int64.

    Args:
        num_labels: Number of classes.
        stage: Prefix of the names, `val` or `test`: `val/accuracy`, `val/f1`, `val/precision` and `val/recall`
            (weighted by class size), `val/macro_f1`, `val/auroc` (macro, one versus rest).
    """
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(num_labels, average="weighted", validate_args=False),
            "f1": MulticlassF1Score(num_labels, average="weighted", validate_args=False),
            "precision": MulticlassPrecision(num_labels, average="weighted", validate_args=False),
            "recall": MulticlassRecall(num_labels, average="weighted", validate_args=False),
            "macro_f1": MulticlassF1Score(num_labels, average="macro", validate_args=False),
            "auroc": PresentClassAUROC(num_labels, validate_args=False),
        },
        prefix=f"{stage}/",
        compute_groups=[["accuracy", "f1", "precision", "recall", "macro_f1"], ["auroc"]],
    )


def confusion_table(matrix: Tensor, label_names: Sequence[str]) -> str:
    """Confusion matrix [C, C] as aligned text: one row a true class, one column a predicted class.

    Example:
        >>> print(confusion_table(torch.tensor([[1200, 3], [0, 45]]), ["CWE-119", "other"]))
        true \\ predicted  CWE-119  other
        CWE-119             1,200      3
        other                   0     45
    """
    header = ["true \\ predicted", *label_names]
    rows = [
        [name, *(f"{int(count):,}" for count in counts)]
        for name, counts in zip(label_names, matrix.tolist(), strict=True)
    ]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in [header, *rows]
    ]
    return "\n".join(lines)

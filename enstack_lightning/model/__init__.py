"""The classifier: a RoBERTa-shaped encoder with a classification head, as a LightningModule."""

from __future__ import annotations

from enstack_lightning.model.classifier import VulnerabilityClassifier
from enstack_lightning.model.network import CWE_NAMES

__all__ = ["CWE_NAMES", "VulnerabilityClassifier"]

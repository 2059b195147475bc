"""CK6xx: the weights are those of the model that the checkpoint names."""

from __future__ import annotations

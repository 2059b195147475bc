"""CK8xx: the files are those that the manifest beside the checkpoint lists."""

from __future__ import annotations

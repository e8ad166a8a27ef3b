"""Loads what runs the embedding model, with its own telemetry switched off."""

from __future__ import annotations

import os
from typing import Any


def onnx_runtime() -> Any:
    """The module `onnxruntime`, which has no types worth the name.

    It reports its use to its makers, and keeps a file for that among the user's, unless this variable is set
    when it is loaded.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime

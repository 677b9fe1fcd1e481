"""Where to compute."""

from __future__ import annotations

import torch


def pick_device(device: str = "auto") -> str:
    """The device of this name; "auto" is the first CUDA device where there is one, else the CPU."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"

"""Small cases of what people train: each must be right against autograd, or refused in plain words.

`CASES` has them by name; the modules in `zoo` define them, one for each kind.
"""

from __future__ import annotations

from importlib import import_module

from zoo.case import CASES, Case, Refusal, ZooTask, agreement, trained_model

KINDS = (
    "vision", "attention", "recurrent", "routing",
    "layouts", "parameters", "reparametrised", "adapters", "huggingface",
    "losses",
    "labels", "wrappers", "mixing", "refusals",
)  # fmt: skip

for kind in KINDS:
    import_module(f"zoo.{kind}")

__all__ = ["CASES", "KINDS", "Case", "Refusal", "ZooTask", "agreement", "trained_model"]

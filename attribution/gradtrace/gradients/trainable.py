"""Which parameters of a model are attributed: those that require a gradient and that the task's patterns choose."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import nn

from gradtrace.errors import TaskError, UnsupportedLayerError


def trainable_names(model: nn.Module, patterns: Sequence[str] | None = None) -> list[str]:
    """Names of the parameters that require a gradient and that the patterns choose.

    patterns: see `Task.layers`; None: all

    Raises:
        TaskError: there is no such parameter, or a pattern fits no parameter.
        UnsupportedLayerError: the model or one of its modules is TorchScript or compiled.
    """
    scripted = [name or "the model" for name, module in model.named_modules() if _is_script(module)]
    if scripted:
        raise UnsupportedLayerError(
            f"{scripted[0]} is TorchScript (torch.jit.script or torch.jit.trace), whose layers cannot be watched: "
            "return the Python module from Task.model; the weights of checkpoints fit both"
        )
    compiled = [name for name, module in model.named_modules() if hasattr(module, "_orig_mod")]
    if compiled:
        raise UnsupportedLayerError(
            f"{compiled[0]} is compiled (torch.compile), so that its layers cannot be watched: return the eager module "
            "from Task.model; the weights of checkpoints fit both"
        )
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not names:
        raise TaskError("no parameter of the model requires a gradient: nothing can be attributed")
    return names if patterns is None else _chosen_names(names, patterns)


def _chosen_names(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    if isinstance(patterns, str) or not patterns:
        raise TaskError(f'layers must be a list of patterns such as ["encoder.*", "!*.bias"], not {patterns!r}')
    for pattern in patterns:
        if not fnmatch.filter(names, pattern.removeprefix("!")):
            raise TaskError(
                f"layers: {pattern!r} fits no parameter that requires a gradient; they are {', '.join(names[:8])}"
                + " ..." * (len(names) > 8)
            )
    included = [pattern for pattern in patterns if not pattern.startswith("!")] or ["*"]
    excluded = [pattern.removeprefix("!") for pattern in patterns if pattern.startswith("!")]
    chosen = [name for name in names if _fits(name, included) and not _fits(name, excluded)]
    if not chosen:
        raise TaskError(f"layers: the patterns {list(patterns)} leave no parameter")
    return chosen


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _is_script(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.jit")

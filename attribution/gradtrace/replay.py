"""Use a forward pass twice: once for the loss, and again for the prediction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Replay(nn.Module):
    """Stands in for a model: answers the recorded call from memory, and anything else through the model itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_model", model)  # not a submodule: the model is left as it is
        self._call: tuple[tuple[Any, ...], dict[str, Any], Tensor, int] | None = None

    def record(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(output, Tensor):
            self._call = (args, kwargs, output.detach(), output._version)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._call is not None:
            old_args, old_kwargs, output, version = self._call
            same = len(args) == len(old_args) and all(a is b for a, b in zip(args, old_args, strict=True))
            same = same and kwargs.keys() == old_kwargs.keys() and all(kwargs[k] is old_kwargs[k] for k in kwargs)
            if same and output._version == version:  # not changed in place since
                return output
        return self._model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_model"), name)


@contextmanager
def recorded_call(model: nn.Module) -> Iterator[Replay]:
    """While open, the last call of the model is recorded into the yielded stand-in."""
    replay = Replay(model)
    handle = model.register_forward_hook(
        lambda _, args, kwargs, out: replay.record(args, kwargs, out), with_kwargs=True
    )
    try:
        yield replay
    finally:
        handle.remove()

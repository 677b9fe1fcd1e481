"""Any module: its per-example gradients by torch.func, of this module alone, from its inputs and output gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from gradtrace.layers.base import _SLICE, IDENTITY, Bases, Layer, real_values


@dataclass(frozen=True, eq=False)
class ModuleInputs:
    """The arguments of one call of a module.

    leaves: of (args, kwargs), as a flat list; tensors that have one entry for each instance, the first dimension of the
        output, are `batched`.
    output: which of the leaves of the module's output the gradient is at.
    count: entries of the first dimension of batched leaves.
    grouped: whether batched leaves are [batch, instances, ...] instead of [batch, ...].
    """

    leaves: list[Any]
    batched: list[bool]
    structure: TreeSpec
    output: int
    count: int
    grouped: bool = False

    @staticmethod
    def noted(
        args: Any,
        kwargs: Any,
        output: Any,
        note: Callable[[ModuleInputs, Tensor], Tensor],
        known: Sequence[bool] | None = None,
    ) -> Any:
        """Call `note` for every floating-point tensor of a module's output; returns the output with its results.

        known: which leaves are batched, where that was seen in batches of several sizes: something that all examples
            share may be as long as a batch by chance.
        """
        leaves, structure = tree_flatten((args, kwargs))
        leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]  # also those of no batch
        outputs, output_structure = tree_flatten(output)
        for number, tensor in enumerate(outputs):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dim():
                count = tensor.shape[0]
                batched = [isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == count for leaf in leaves]
                if known is not None and len(known) == len(batched):
                    batched = [fits and wanted for fits, wanted in zip(batched, known, strict=True)]
                outputs[number] = note(ModuleInputs(leaves, batched, structure, number, count), tensor)
        return tree_unflatten(outputs, output_structure)

    def changed(self, change: Callable[[Tensor], Tensor], count: int) -> ModuleInputs:
        """With other batched leaves, of `count` entries."""
        pairs = zip(self.leaves, self.batched, strict=True)
        return replace(self, count=count, leaves=[change(leaf) if batched else leaf for leaf, batched in pairs])

    def flat(self) -> ModuleInputs:
        """All instances of all examples in one dimension."""
        if not self.grouped:
            return self
        return replace(self.changed(lambda values: values.flatten(0, 1), -1), grouped=False)

    def call(self, function: Callable[..., Any], leaves: Sequence[Any]) -> Tensor:
        """The output tensor of a function of (*args, **kwargs)."""
        args, kwargs = tree_unflatten(list(leaves), self.structure)
        chosen: Tensor = tree_leaves(function(*args, **kwargs))[self.output]
        return chosen

    # What layers ask of their inputs as if they were a tensor [batch, ...].

    def __getitem__(self, part: slice) -> ModuleInputs:
        return self.changed(lambda values: values[part], len(range(self.count)[part]))

    def is_floating_point(self) -> bool:
        return False  # stays in its own precision where others are made wider

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32


class ModuleLayer(Layer):
    """All parameters of a module that are its own, one after the other."""

    rotates = False

    def __init__(self, module: nn.Module, names: Sequence[str], local_names: Sequence[str]) -> None:
        self.local_names = tuple(local_names)
        self._values = [real_values(module.get_parameter(name).detach()) for name in local_names]
        super().__init__(module, names, (1, 1, sum(values.numel() for values in self._values)))

    @property
    def has_bias(self) -> bool:
        return False

    def leading_dimensions(self, output: Tensor) -> tuple[int, ...]:
        return tuple(output.shape[:1])

    def input_factors(self, x: Tensor, basis: Tensor | None) -> Tensor:
        raise NotImplementedError("a module has no factors, only its whole gradient")

    def output_factors(self, d: Tensor, basis: Tensor | None) -> Tensor:
        raise NotImplementedError("a module has no factors, only its whole gradient")

    def gradient(self, x: Any, d: Tensor, bases: Bases = IDENTITY) -> Tensor:
        """[batch, 1, 1, size], float32, or float64 where d is."""
        inputs: ModuleInputs = x
        examples, instances = d.shape[0], d.shape[1] if inputs.grouped else 1
        sums = d.new_zeros(examples, self.size, dtype=d.dtype if d.dtype == torch.float64 else torch.float32)
        owner = torch.arange(examples, device=d.device).repeat_interleave(instances)
        inputs, d = inputs.flat(), d.flatten(0, 1) if inputs.grouped else d
        step = max(1, _SLICE // self.size)
        for start in range(0, len(d), step):
            part = slice(start, start + step)
            sums.index_add_(0, owner[part], self._instance_gradients(inputs[part], d[part]).to(sums.dtype))
        return sums[:, None, None]

    def _instance_gradients(self, inputs: ModuleInputs, d: Tensor) -> Tensor:
        """[instances, size]"""
        parameters = {name: self.module.get_parameter(name).detach() for name in self.local_names}

        def alone(leaves: list[Any], d: Tensor) -> dict[str, Tensor]:
            pairs = zip(leaves, inputs.batched, strict=True)
            whole = [leaf.unsqueeze(0) if batched else leaf for leaf, batched in pairs]

            def output(parameters: dict[str, Tensor]) -> Tensor:
                return inputs.call(
                    lambda *args, **kwargs: functional_call(self.module, parameters, args, kwargs), whole
                )

            value, pull = vjp(output, parameters)[:2]
            gradients: dict[str, Tensor] = pull(d.unsqueeze(0).to(value.dtype))[0]
            return gradients

        axes = [0 if batched else None for batched in inputs.batched]
        gradients = vmap(alone, in_dims=(axes, 0), randomness="error")(inputs.leaves, d)
        return torch.cat([real_values(gradients[name]).flatten(1) for name in self.local_names], dim=1)

    def _output(self, parameters: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.module, parameters, args, kwargs)

    def slices(self, x: Any) -> Iterator[slice]:
        step = max(1, _SLICE // self.size)
        for start in range(0, x.count, step):
            yield slice(start, start + step)

    def parameter_gradients(self, gradient: Tensor) -> dict[str, Tensor]:
        parts = gradient.flatten(1).split([values.numel() for values in self._values], dim=1)
        named = zip(self.names, parts, self._values, strict=True)
        return {name: part.view(len(part), *values.shape) for name, part, values in named}

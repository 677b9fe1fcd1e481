"""Modules of any type: per-example gradients by torch.func over the module, from its inputs and output gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from gradtrace.layers.base import IDENTITY, SLICE_VALUES, Bases, Layer, real_values


@dataclass(frozen=True, eq=False)
class ModuleInputs:
    """The arguments of a call of a module.

    leaves: of (args, kwargs), as a flat list
    batched: for each leaf, whether it is a tensor with one entry for each instance (entry of the output)
    structure: of (args, kwargs)
    output: number of the leaf of the module's output at which the gradient is taken
    count: number of entries of the batched leaves
    grouped: batched leaves are [batch, instances, ...] instead of [batch, ...]
    """

    leaves: list[Any]
    batched: list[bool]
    structure: TreeSpec
    output: int
    count: int
    grouped: bool = False

    @staticmethod
    def map_outputs(
        args: Any,
        kwargs: Any,
        output: Any,
        function: Callable[[ModuleInputs, Tensor], Tensor],
        known: Sequence[bool] | None = None,
    ) -> Any:
        """The module's output with every floating-point tensor replaced by `function(inputs, tensor)`.

        known: which leaves are batched, as observed in batches of several sizes: a tensor that all examples share may
            be as long as one batch by chance
        """
        leaves, structure = tree_flatten((args, kwargs))
        leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        outputs, output_structure = tree_flatten(output)
        for number, tensor in enumerate(outputs):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dim():
                count = tensor.shape[0]
                batched = [isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == count for leaf in leaves]
                if known is not None and len(known) == len(batched):
                    batched = [fits and observed for fits, observed in zip(batched, known, strict=True)]
                outputs[number] = function(ModuleInputs(leaves, batched, structure, number, count), tensor)
        return tree_unflatten(outputs, output_structure)

    def changed(self, change: Callable[[Tensor], Tensor], count: int) -> ModuleInputs:
        """The inputs with `change` applied to the batched leaves, which then have `count` entries."""
        pairs = zip(self.leaves, self.batched, strict=True)
        return replace(self, count=count, leaves=[change(leaf) if batched else leaf for leaf, batched in pairs])

    # The part of Tensor's interface that is used of a layer's inputs.

    def __getitem__(self, examples: slice) -> ModuleInputs:
        return self.changed(lambda values: values[examples], len(range(self.count)[examples]))

    def is_floating_point(self) -> bool:
        return False  # so that callers do not convert it to another precision

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32


class ModuleLayer(Layer):
    """The named parameters of a module, flattened and concatenated: one group [1, size]."""

    pointwise = False
    rotates = False

    def __init__(self, module: nn.Module, names: Sequence[str], local_names: Sequence[str]) -> None:
        self.local_names = tuple(local_names)
        self._values = [real_values(module.get_parameter(name).detach()) for name in local_names]
        super().__init__(module, names, (1, 1, sum(values.numel() for values in self._values)))

    def leading_dimensions(self, output: Tensor) -> tuple[int, ...]:
        return tuple(output.shape[:1])

    def position_sizes(self, x: Any, d: Tensor) -> tuple[int, ...]:
        """Instances are positions, or else all dimensions but the last."""
        return tuple(d.shape[:2] if x.grouped else d.shape[:-1])

    def gradient(self, x: Any, d: Tensor, bases: Bases = IDENTITY) -> Tensor:
        """[batch, 1, 1, size], float32, or float64 where d is."""
        inputs: ModuleInputs = x
        examples, instances = d.shape[0], d.shape[1] if inputs.grouped else 1
        sums = d.new_zeros(examples, self.size, dtype=d.dtype if d.dtype == torch.float64 else torch.float32)
        example = torch.arange(examples, device=d.device).repeat_interleave(instances)  # of each instance
        if inputs.grouped:
            inputs = replace(inputs.changed(lambda values: values.flatten(0, 1), -1), grouped=False)
            d = d.flatten(0, 1)
        step = max(1, SLICE_VALUES // self.size)
        for start in range(0, len(d), step):
            piece = slice(start, start + step)
            sums.index_add_(0, example[piece], self._instance_gradients(inputs[piece], d[piece]).to(sums.dtype))
        return sums[:, None, None]

    def _instance_gradients(self, inputs: ModuleInputs, d: Tensor) -> Tensor:
        """The vector-Jacobian product of each instance with its output gradient. [instances, size]"""
        parameters = {name: self.module.get_parameter(name).detach() for name in self.local_names}

        def of_instance(leaves: list[Any], d: Tensor) -> dict[str, Tensor]:
            pairs = zip(leaves, inputs.batched, strict=True)
            batch_of_one = [leaf.unsqueeze(0) if batched else leaf for leaf, batched in pairs]

            def output(parameters: dict[str, Tensor]) -> Tensor:
                args, kwargs = tree_unflatten(batch_of_one, inputs.structure)
                tensor: Tensor = tree_leaves(functional_call(self.module, parameters, args, kwargs))[inputs.output]
                return tensor

            value, pull_back = vjp(output, parameters)[:2]
            gradients: dict[str, Tensor] = pull_back(d.unsqueeze(0).to(value.dtype))[0]
            return gradients

        axes = [0 if batched else None for batched in inputs.batched]
        gradients = vmap(of_instance, in_dims=(axes, 0), randomness="error")(inputs.leaves, d)
        return torch.cat([real_values(gradients[name]).flatten(1) for name in self.local_names], dim=1)

    def slices(self, x: Any, in_cache: bool = False) -> Iterator[slice]:
        step = max(1, SLICE_VALUES // self.size)
        for start in range(0, x.count, step):
            yield slice(start, start + step)

    def parameter_gradients(self, gradient: Tensor) -> dict[str, Tensor]:
        pieces = gradient.flatten(1).split([values.numel() for values in self._values], dim=1)
        by_name = zip(self.names, pieces, self._values, strict=True)
        return {name: piece.view(len(piece), *values.shape) for name, piece, values in by_name}

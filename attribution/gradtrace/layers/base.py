"""What every layer type has in common: its per-example gradient is a sum over positions of d aT."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

_SLICE = 1 << 24  # elements of per-example gradients or patches that are held at a time

Uses = list[tuple[Tensor, Tensor]]  # (input, gradient at the output) of each use of a layer in one batch


@dataclass(frozen=True, slots=True)
class Bases:
    """A rotation or projection of either side of a layer's gradient; None stands for the identity.

    inputs: [groups, in, r]; outputs: [groups, out, s]; float32.
    """

    inputs: Tensor | None = None
    outputs: Tensor | None = None

    def rotated(self, gradient: Tensor) -> Tensor:
        """A whole gradient [batch, groups, out, in] in these bases. [batch, groups, s, r]."""
        gradient = gradient if self.outputs is None else self.outputs.mT @ gradient
        return gradient if self.inputs is None else gradient @ self.inputs


IDENTITY = Bases()


class Layer(ABC):
    """The parameters of one module, or of several that share them, seen as `groups` matrices [out, in].

    A bias is the last column of its matrix (its input is the constant 1), as in K-FAC (Martens and Grosse 2015).
    `names` are the full names of the parameters, weight first.
    """

    rotates = True  # False: its coordinates are kept as they are, never rotated (norms, stray parameters)
    rotates_inputs = True  # False: only the output side rotates (embeddings)
    rotates_outputs = True  # False: only the input side rotates (tables that are also an output layer)
    takes_instances = True  # False: inputs must be [batch, ...] as the module takes them, without further positions
    patches_per_input = 1  # how many times each input element stands in the input factors, at most

    def __init__(self, module: nn.Module, names: Sequence[str], shape: tuple[int, int, int]) -> None:
        self.module = module
        self.names = tuple(names)
        self.groups, self.outputs, self.inputs = shape

    @property
    def name(self) -> str:
        return self.names[0].rpartition(".")[0] or self.names[0]

    @property
    def size(self) -> int:
        """Number of coordinates, which is the number of parameters."""
        return self.groups * self.outputs * self.inputs

    @property
    def has_bias(self) -> bool:
        """Whether a bias is part of it; the module may have one that does not count."""
        return len(self.names) > 1

    def leading_dimensions(self, output: Tensor) -> tuple[int, ...]:
        """The dimensions of an output before those of a single instance: [batch], or [batch, time] ..."""
        return tuple(output.shape[:-1])

    def factors(self, inputs: Any, d: Tensor) -> tuple[Any, Tensor]:
        """The two sides of the gradient from what a use was given and the gradient at its output, [batch, ...] both."""
        return inputs, d

    def merged(self, uses: Uses) -> Uses:
        """The same gradients from fewer uses, where several can be taken as one with more positions."""
        return uses

    @abstractmethod
    def input_factors(self, x: Tensor, basis: Tensor | None) -> Tensor:
        """Inputs times their basis. Shape [batch, groups, positions, in or r], float32."""

    @abstractmethod
    def output_factors(self, d: Tensor, basis: Tensor | None) -> Tensor:
        """Gradients at the output times their basis. Shape [batch, groups, positions, out or s], float32."""

    def gradient(self, x: Tensor, d: Tensor, bases: Bases = IDENTITY) -> Tensor:
        """Per-example gradient in the coordinates of `bases`. Shape [batch, groups, out or s, in or r]."""
        a = self.input_factors(x, bases.inputs)  # [batch, groups, positions, r]
        positions, r = a.shape[2:]
        if bases.outputs is not None and self._rotates_last(positions, r, bases.outputs.shape[2]):
            return rotate(_sum_over_positions(a, self.output_factors(d, None)), bases.outputs).transpose(2, 3)
        return _sum_over_positions(a, self.output_factors(d, bases.outputs)).transpose(2, 3)

    def _rotates_last(self, positions: int, r: int, s: int) -> bool:
        """Whether rotating the sum over positions takes fewer products than rotating the output gradients first."""
        return (positions + s) * self.outputs * r < positions * s * (self.outputs + r)

    def coordinates(self, x: Tensor, d: Tensor, bases: Bases, kept: Tensor) -> Tensor:
        """Chosen coordinates of the per-example gradient.

        kept: int64 [k], positions in the flattened [groups, s, r]. Shape [batch, k].
        """
        if self.groups > 1 or self.positions(d) > 1:
            return self.gradient(x, d, bases).flatten(1).index_select(1, kept)
        a = self.input_factors(x, bases.inputs).flatten(1)  # [batch, r]
        s = self.output_factors(d, bases.outputs).flatten(1)  # [batch, s]
        rows = kept.div(a.shape[1], rounding_mode="floor")  # one position: pick, then multiply; no outer product
        return s.index_select(1, rows) * a.index_select(1, kept % a.shape[1])

    def squared_sum(self, uses: Uses, bases: Bases) -> Tensor:
        """Sum over the batch of all squared coordinates; uses are summed before squaring. [groups, s, r]."""
        x, d = uses[0]
        if len(uses) == 1 and self.rotates and self.groups == 1 and self.positions(d) == 1:
            a, s = self.input_factors(x, bases.inputs)[:, 0, 0], self.output_factors(d, bases.outputs)[:, 0, 0]
            return (s.square().T @ a.square())[None]  # (d_i a_j)^2 = d_i^2 a_j^2
        sums = (
            reduce(torch.add, (self._rotated_gradient(x[part], d[part], bases) for x, d in uses))
            for part in self.slices(x)
        )
        return reduce(Tensor.add_, (gradient.square().sum(0) for gradient in sums))

    def inner_products(self, left: Uses, right: Uses) -> Tensor:
        """The inner product of every two examples' gradients, uses summed. [batch of left, batch of right] float32."""
        if self.rotates and self._factors_are_cheaper(left, right):
            return self._products_of_factors(left, right)
        rows = []
        for part in self.slices(left[0][0]):
            some = self.summed(left, part)
            others = (self.summed(right, part) for part in self.slices(right[0][0]))
            rows.append(torch.cat([some @ other.T for other in others], dim=1))
        return torch.cat(rows)

    def _factors_are_cheaper(self, left: Uses, right: Uses) -> bool:
        """Whether comparing positions two by two takes fewer products than summing over positions first."""
        own, others = (sum(d.numel() for _, d in uses) // (self.groups * self.outputs) for uses in (left, right))
        pairs = left[0][1].shape[0] * right[0][1].shape[0]
        return own * others * (self.outputs + self.inputs) <= (own + others + pairs) * self.outputs * self.inputs

    def _products_of_factors(self, left: Uses, right: Uses) -> Tensor:
        """(sum_p d_p a_pT) . (sum_q e_q b_qT) = sum_pq (a_p . b_q) (d_p . e_q)."""
        a, d = self._factors(left)  # [groups, batch, positions, in], [groups, batch, positions, out]
        b, e = self._factors(right)
        groups, batch, positions = e.shape[:3]
        step = max(1, _SLICE // (e.shape[:3].numel() * a.shape[2]))
        products = []
        for start in range(0, a.shape[1], step):
            part = slice(start, start + step)
            both = a[:, part].flatten(1, 2) @ b.flatten(1, 2).mT  # [groups, examples x positions, batch x positions]
            both *= d[:, part].flatten(1, 2) @ e.flatten(1, 2).mT
            products.append(both.view(groups, -1, a.shape[2], batch, positions).sum((0, 2, 4)))
        return torch.cat(products)

    def _factors(self, uses: Uses) -> tuple[Tensor, Tensor]:
        """Inputs [groups, batch, positions, in] and output gradients [.., out]; every use adds its positions."""
        sides = zip(*((self.input_factors(x, None), self.output_factors(d, None)) for x, d in uses), strict=True)
        inputs, outputs = (torch.cat(side, dim=2).transpose(0, 1) for side in sides)
        return inputs, outputs

    def summed(self, uses: Uses, part: slice) -> Tensor:
        """Whole gradients of some examples, uses summed. [examples, size]."""
        return reduce(torch.add, (self.gradient(x[part], d[part]) for x, d in uses)).flatten(1)

    def slices(self, x: Tensor) -> Iterator[slice]:
        """Parts of the batch small enough to hold their patches and whole gradients."""
        step = max(1, _SLICE // max(self.size, x[0].numel() * self.patches_per_input))
        for start in range(0, x.shape[0], step):
            yield slice(start, start + step)

    def _rotated_gradient(self, x: Tensor, d: Tensor, bases: Bases) -> Tensor:
        """As `gradient`, for whole rotations: rotated after the sum over positions, which is cheaper then."""
        if bases.inputs is None or bases.inputs.shape[2] < self.inputs:  # of a wide side, few directions are kept
            return self.gradient(x, d, bases)
        return self.gradient(x, d, Bases(None, bases.outputs)) @ bases.inputs

    def positions(self, d: Tensor) -> int:
        """Over how many positions an example's gradient is summed."""
        return d.numel() // (d.shape[0] * self.groups * self.outputs)

    def parameter_gradients(self, gradient: Tensor) -> dict[str, Tensor]:
        """Per-example gradients by parameter name, from the identity-basis `gradient` [batch, groups, out, in]."""
        batch = gradient.shape[0]
        if not self.has_bias:
            return {self.names[0]: self.weight_gradient(gradient)}
        weight, bias = gradient[..., :-1], gradient[..., -1]
        return {self.names[0]: self.weight_gradient(weight), self.names[1]: bias.reshape(batch, -1)}

    def from_parameters(self, values: Mapping[str, Tensor]) -> Tensor:
        """Values in the shapes of the parameters as they stand in the gradient, zero for parameters without any.
        [groups, out, in]"""
        device = next(iter(values.values())).device if values else None
        flat = torch.zeros(self.size, device=device)  # float32
        places = torch.arange(self.size, device=device).view(1, self.groups, self.outputs, self.inputs)
        for name, place in self.parameter_gradients(places).items():
            if name in values:
                flat[place.flatten()] = values[name].flatten()
        return flat.view(self.groups, self.outputs, self.inputs)

    def weight_gradient(self, weight: Tensor) -> Tensor:
        """[batch, groups, out, in] as [batch, *weight.shape]."""
        return weight.reshape(weight.shape[0], *self.module.get_parameter("weight").shape)


def real_values(values: Tensor) -> Tensor:
    """Complex numbers as pairs of their parts, in one dimension more; real ones as they are."""
    return torch.view_as_real(values.resolve_conj()) if values.is_complex() else values


def with_ones(a: Tensor) -> Tensor:
    """Append the bias's constant input 1 to the last dimension."""
    return torch.cat([a, a.new_ones(*a.shape[:-1], 1)], dim=-1)


def rotate(factors: Tensor, basis: Tensor | None) -> Tensor:
    """[batch, groups, positions, n] @ [groups, n, r] -> [batch, groups, positions, r]."""
    if basis is None:
        return factors
    return factors @ (basis[0] if len(basis) == 1 else basis)  # one group: one product, not a batch of small ones


def _sum_over_positions(a: Tensor, s: Tensor) -> Tensor:
    """[batch, groups, positions, r], [batch, groups, positions, s] -> [batch, groups, r, s].

    r, mostly the smaller, comes first: the product's rows are then long, which is twice as fast.
    """
    product: Tensor = torch.bmm(a.flatten(0, 1).transpose(1, 2), s.flatten(0, 1))
    return product.reshape(*a.shape[:2], *product.shape[1:])


LayerType = Callable[[nn.Module, Sequence[str]], Layer]
_REGISTRY: dict[type[nn.Module] | str, LayerType] = {}


def register(*module_types: type[nn.Module] | str) -> Callable[[LayerType], LayerType]:
    """Class decorator: this Layer handles these module types and their subclasses.

    A type of an optional library is given by its full name, so that nothing is imported for it.
    """

    def add(layer_type: LayerType) -> LayerType:
        _REGISTRY.update(dict.fromkeys(module_types, layer_type))
        return layer_type

    return add


def layer_type_of(module: nn.Module) -> LayerType | None:
    """The registered layer type of a module, by its closest ancestor; None where there is none."""
    for cls in type(module).__mro__:
        found = _REGISTRY.get(cls) or _REGISTRY.get(f"{cls.__module__}.{cls.__qualname__}")
        if found is not None:
            return found
    return None

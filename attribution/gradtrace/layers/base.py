"""The base class of layer types, and their registry.

The gradient of an example's loss by a layer's weights is G = sum over positions p of d_p a_pT [out, in], with the input
a_p and the gradient d_p at the output (positions: pixels, tokens, time steps).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

SLICE_VALUES = 1 << 24  # elements of per-example gradients or patches that are held at a time
_VALUES_IN_CACHE = 1 << 20  # of those that a processor goes through several times

Uses = list[tuple[Tensor, Tensor]]  # (input, gradient at the output) of each use of a layer in a batch


@dataclass(frozen=True, slots=True)
class Bases:
    """Bases U of a layer's inputs and outputs, orthogonal or random: G becomes U_outputs^T G U_inputs. None: identity.

    inputs: float32 [groups, in, r];  outputs: float32 [groups, out, s]
    """

    inputs: Tensor | None = None
    outputs: Tensor | None = None

    def rotated(self, gradient: Tensor) -> Tensor:
        """U_outputs^T G U_inputs. [batch, groups, out, in] -> [batch, groups, s, r]."""
        gradient = gradient if self.outputs is None else self.outputs.mT @ gradient
        return gradient if self.inputs is None else gradient @ self.inputs


IDENTITY = Bases()


class Layer:
    """The parameters of one module, or of several that share them, seen as `groups` matrices [out, in].

    A bias is the last column of the matrix, with the constant input 1, as in K-FAC (Martens and Grosse 2015).
    `names` are the full names of the parameters, weight first.
    """

    rotates = True  # False: no basis on either side, and no factors (normalisation layers, stray parameters)
    rotates_inputs = True  # False: a basis on the output side only (embeddings)
    rotates_outputs = True  # False: a basis on the input side only (tables that are also an output layer)
    pointwise = True  # False: the output at a position may depend on the inputs at others
    takes_instances = True  # False: inputs must be [batch, ...] as the module takes them, not [batch, instances, ...]
    patches_per_input = 1  # how often an input element occurs in the input factors, at most

    def __init__(self, module: nn.Module, names: Sequence[str], shape: tuple[int, int, int]) -> None:
        self.module = module
        self.names = tuple(names)
        self.groups, self.outputs, self.inputs = shape

    @property
    def name(self) -> str:
        return self.names[0].rpartition(".")[0] or self.names[0]

    @property
    def size(self) -> int:
        """Number of parameters, and so of coordinates in the identity basis."""
        return self.groups * self.outputs * self.inputs

    @property
    def has_bias(self) -> bool:
        """Whether the layer includes a bias. The module may have one that is not attributed."""
        return len(self.names) > 1

    def leading_dimensions(self, output: Tensor) -> tuple[int, ...]:
        """The output's dimensions before those of a single instance: [batch], [batch, time] ..."""
        return tuple(output.shape[:-1])

    def position_sizes(self, x: Any, d: Tensor) -> tuple[int, ...]:
        """The sizes of a use's leading dimensions, of which all but the first, the batch, are positions.

        0 for a dimension of something else.
        """
        return self.leading_dimensions(d)

    def factors(self, inputs: Any, d: Tensor) -> tuple[Any, Tensor]:
        """The arguments (x, d) of this class's methods, from the inputs of a use and the gradient at its output.

        All are [batch, ...].
        """
        return inputs, d

    def merged(self, uses: Uses) -> Uses:
        """Fewer uses with the same gradients: several uses may be merged into one with more positions."""
        return uses

    def input_factors(self, x: Tensor, basis: Tensor | None) -> Tensor:
        """U_inputs^T a_p. float32 [batch, groups, positions, in or r]."""
        raise NotImplementedError(f"{type(self).__name__} has no factors, only a whole gradient")

    def output_factors(self, d: Tensor, basis: Tensor | None) -> Tensor:
        """U_outputs^T d_p. float32 [batch, groups, positions, out or s]."""
        raise NotImplementedError(f"{type(self).__name__} has no factors, only a whole gradient")

    def gradient(self, x: Tensor, d: Tensor, bases: Bases = IDENTITY) -> Tensor:
        """Per-example gradient, sum_p (U_outputs^T d_p) (U_inputs^T a_p)^T. [batch, groups, out or s, in or r]."""
        a = self.input_factors(x, bases.inputs)  # [batch, groups, positions, r]
        positions, r = a.shape[2:]
        s = self.outputs if bases.outputs is None else bases.outputs.shape[2]
        # where it takes fewer multiplications to rotate the sum over positions than to rotate the d_p first
        if bases.outputs is not None and (positions + s) * self.outputs * r < positions * s * (self.outputs + r):
            return rotate(_sum_over_positions(a, self.output_factors(d, None)), bases.outputs).transpose(2, 3)
        return _sum_over_positions(a, self.output_factors(d, bases.outputs)).transpose(2, 3)

    def coordinates(self, x: Tensor, d: Tensor, bases: Bases, kept: Tensor) -> Tensor:
        """The kept coordinates of the per-example gradient. [batch, k].

        kept: int64 [k], positions in the flattened [groups, s, r]
        """
        if not self.rotates or self.groups > 1 or self.positions(d) > 1:
            return self.gradient(x, d, bases).flatten(1).index_select(1, kept)
        a = self.input_factors(x, bases.inputs).flatten(1)  # [batch, r]
        s = self.output_factors(d, bases.outputs).flatten(1)  # [batch, s]
        rows = kept.div(a.shape[1], rounding_mode="floor")  # one position: select, then multiply; no outer product
        return s.index_select(1, rows) * a.index_select(1, kept % a.shape[1])

    def squared_sum(self, uses: Uses, bases: Bases) -> Tensor:
        """Squared coordinates, summed over the batch; an example's uses are summed before squaring. [groups, s, r]."""
        x, d = uses[0]
        if len(uses) == 1 and self.rotates and self.groups == 1 and self.positions(d) == 1:
            a, s = self.input_factors(x, bases.inputs)[:, 0, 0], self.output_factors(d, bases.outputs)[:, 0, 0]
            return (s.square().T @ a.square())[None]  # (d_i a_j)^2 = d_i^2 a_j^2
        sums = (
            reduce(torch.add, (self._rotated_gradient(x[examples], d[examples], bases) for x, d in uses))
            for examples in self.slices(x, in_cache=True)
        )
        return reduce(Tensor.add_, (gradient.square().sum(0) for gradient in sums))

    def inner_products(self, left: Uses, right: Uses) -> Tensor:
        """<G_i, G_j> for every example i of `left` and j of `right`, uses summed. float32 [batch, batch of right]."""
        if self.rotates and self._factors_are_cheaper(left, right):
            return self._products_of_factors(left, right)
        rows = []
        for examples in self.slices(left[0][0]):
            gradients = self.summed(left, examples)
            others = (self.summed(right, examples) for examples in self.slices(right[0][0]))
            rows.append(torch.cat([gradients @ other.T for other in others], dim=1))
        return torch.cat(rows)

    def _factors_are_cheaper(self, left: Uses, right: Uses) -> bool:
        """Whether `_products_of_factors` takes fewer multiplications than products of whole gradients."""
        n, m = (sum(d.numel() for _, d in uses) // (self.groups * self.outputs) for uses in (left, right))  # positions
        pairs = left[0][1].shape[0] * right[0][1].shape[0]
        return n * m * (self.outputs + self.inputs) <= (n + m + pairs) * self.outputs * self.inputs

    def _products_of_factors(self, left: Uses, right: Uses) -> Tensor:
        """<sum_p d_p a_pT, sum_q e_q b_qT> = sum_pq (a_p . b_q) (d_p . e_q)."""
        a, d = self._factors(left)  # [groups, batch, positions, in], [groups, batch, positions, out]
        b, e = self._factors(right)
        groups, batch, positions = e.shape[:3]
        step = max(1, SLICE_VALUES // (e.shape[:3].numel() * a.shape[2]))
        rows = []
        for start in range(0, a.shape[1], step):
            examples = slice(start, start + step)
            # [groups, step x positions, batch x positions]
            products = a[:, examples].flatten(1, 2) @ b.flatten(1, 2).mT
            products *= d[:, examples].flatten(1, 2) @ e.flatten(1, 2).mT
            rows.append(products.view(groups, -1, a.shape[2], batch, positions).sum((0, 2, 4)))
        return torch.cat(rows)

    def _factors(self, uses: Uses) -> tuple[Tensor, Tensor]:
        """Inputs [groups, batch, positions, in] and output gradients [.., out], the positions of all uses together."""
        sides = zip(*((self.input_factors(x, None), self.output_factors(d, None)) for x, d in uses), strict=True)
        inputs, outputs = (torch.cat(side, dim=2).transpose(0, 1) for side in sides)
        return inputs, outputs

    def summed(self, uses: Uses, examples: slice) -> Tensor:
        """Whole gradients of a slice of the batch, uses summed. [examples, size]."""
        return reduce(torch.add, (self.gradient(x[examples], d[examples]) for x, d in uses)).flatten(1)

    def support(self, uses: Uses) -> Tensor | None:
        """Where the gradient of an example may differ from zero: int64 [n], positions in the flattened
        [groups, out, in], ascending; None: everywhere."""
        return None

    def slices(self, x: Tensor, in_cache: bool = False) -> Iterator[slice]:
        """Slices of the batch whose patches and whole gradients fit into `SLICE_VALUES` elements; if wanted, into a
        processor's cache."""
        values = min(SLICE_VALUES, _VALUES_IN_CACHE) if in_cache and x.device.type == "cpu" else SLICE_VALUES
        step = max(1, values // max(self.size, x[0].numel() * self.patches_per_input))
        for start in range(0, x.shape[0], step):
            yield slice(start, start + step)

    def _rotated_gradient(self, x: Tensor, d: Tensor, bases: Bases) -> Tensor:
        """As `gradient`. A square basis of the inputs is applied after the sum over positions, which is cheaper."""
        if bases.inputs is None or bases.inputs.shape[2] < self.inputs:
            return self.gradient(x, d, bases)
        return self.gradient(x, d, Bases(None, bases.outputs)) @ bases.inputs

    def positions(self, d: Tensor) -> int:
        """Number of positions of each example."""
        return d.numel() // (d.shape[0] * self.groups * self.outputs)

    def parameter_gradients(self, gradient: Tensor) -> dict[str, Tensor]:
        """Per-example gradients [batch, *shape] by parameter name, from `gradient` [batch, groups, out, in]."""
        if not self.has_bias:
            return {self.names[0]: self.weight_gradient(gradient)}
        weight, bias = gradient[..., :-1], gradient[..., -1]
        return {self.names[0]: self.weight_gradient(weight), self.names[1]: bias.flatten(1)}

    def from_parameters(self, values: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `parameter_gradients`, of values [*shape] by parameter name. float32 [groups, out, in].

        Parameters without values get zeros.
        """
        device = next(iter(values.values())).device if values else None
        flat = torch.zeros(self.size, device=device)
        positions = torch.arange(self.size, device=device).view(1, self.groups, self.outputs, self.inputs)
        for name, of_parameter in self.parameter_gradients(positions).items():
            if name in values:
                flat[of_parameter.flatten()] = values[name].flatten()
        return flat.view(self.groups, self.outputs, self.inputs)

    def weight_gradient(self, weight: Tensor) -> Tensor:
        """[batch, groups, out, in] -> [batch, *weight.shape]."""
        return weight.reshape(weight.shape[0], *self.module.get_parameter("weight").shape)


def real_values(values: Tensor) -> Tensor:
    """Complex values as (real, imaginary) in an extra last dimension; real values unchanged."""
    return torch.view_as_real(values.resolve_conj()) if values.is_complex() else values


def wide(values: Tensor) -> Tensor:
    """In float32 or wider."""
    return values.float() if values.dtype.itemsize < 4 else values


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

    r comes first since it is usually the smaller: a product with long rows is twice as fast.
    """
    product: Tensor = torch.bmm(a.flatten(0, 1).transpose(1, 2), s.flatten(0, 1))
    return product.reshape(*a.shape[:2], *product.shape[1:])


LayerType = Callable[[nn.Module, Sequence[str]], Layer]
_REGISTRY: dict[type[nn.Module] | str, LayerType] = {}


def register(*module_types: type[nn.Module] | str) -> Callable[[LayerType], LayerType]:
    """Class decorator: the Layer handles these module types and their subclasses.

    A type of an optional library is given by its full name, so that the library is not imported.
    """

    def add(layer_type: LayerType) -> LayerType:
        _REGISTRY.update(dict.fromkeys(module_types, layer_type))
        return layer_type

    return add


def layer_type_of(module: nn.Module) -> LayerType | None:
    """The layer type that is registered for the module's class or its closest ancestor; None if there is none."""
    for cls in type(module).__mro__:
        layer_type = _REGISTRY.get(cls) or _REGISTRY.get(f"{cls.__module__}.{cls.__qualname__}")
        if layer_type is not None:
            return layer_type
    return None

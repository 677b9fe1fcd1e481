"""The coordinates of one example's gradient, position by position of the sequences that the layers run over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor

from gradtrace.basis import Basis, DenseProjection
from gradtrace.data.batches import ExampleBatch, Measure
from gradtrace.data.guards import check_finite
from gradtrace.errors import QueryError
from gradtrace.layers import Layer, by_position, position_axis
from gradtrace.models.gradient_model import GradientModel
from gradtrace.models.queries import Query
from gradtrace.task import Example

# From (layer, input factors, output factors) of one use by n examples: coordinates of the gradients, float32 [n, k], as
# many for each use of a layer; None: it has none. Linear in the gradients.
CoordinatesOfUse = Callable[[Layer, Any, Tensor], Tensor | None]


def position_coordinates(
    model: GradientModel,
    example: ExampleBatch,
    lengths: Sequence[int],
    coordinates_of_use: CoordinatesOfUse,
    measure: Measure | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """By layer name, float32 [positions, k], and the value of the measure, float32 [1].

    The gradient by a layer's weights is a sum over the positions t of outer(d_t, a_t), with the layer's input a_t and
    the gradient d_t at its output. So position t of a layer is the token that the layer reads there; d_t comes from the
    losses at all positions that t acts on, in a causal model t and the later ones.

    Left out is what no position is known for: parameters whose gradients come from the whole model (`LayerPlan.strays`)
    and uses that do not run over one of the sequences, such as a classifier's head on the last token.

    Args:
        example: a batch of one.
        lengths: of the sequences, of which a model has one usually. The positions follow in this order.
        measure: default: the task's loss.

    Raises:
        QueryError: no layer runs over a sequence of one of these lengths.
        LossError: the loss is NaN or infinite, or not one number.
    """
    positions, starts = sum(lengths), [0, *accumulate(lengths)]
    coordinates: dict[str, Tensor] = {}
    uses, fitting_uses = 0, 0

    def add(layer: Layer, x: Any, d: Tensor) -> None:
        nonlocal uses, fitting_uses
        axes = [position_axis(layer, x, d, length) for length in lengths]
        fitting = [number for number, axis in enumerate(axes) if axis is not None]
        uses += 1
        if len(fitting) != 1:
            return
        fitting_uses += 1
        (number,) = fitting
        start, axis = starts[number], cast(int, axes[number])
        for part, x_part, d_part in by_position(layer, x, d, axis):
            values = coordinates_of_use(layer, x_part, d_part)
            if values is None:
                return
            if layer.name not in coordinates:
                coordinates[layer.name] = values.new_zeros(positions, values.shape[1])
            coordinates[layer.name][start + part.start : start + part.stop] += values

    value = model.backpropagate(example, add, measure, merge=False)
    if uses and not fitting_uses:
        raise QueryError(
            f"no layer of the model runs over {' or '.join(map(str, lengths))} positions, as many as the task gives "
            f"tokens: let tokens(self, example) of {type(model.task).__name__} return a text for each, without padding"
        )
    return coordinates, value


def check_measured(model: GradientModel, query: Query) -> None:
    """Raises QueryError where the measurement could not be tried, so that no layers are known for it."""
    if query.measure == "measurement" and not model.examination.measurement:
        raise QueryError(
            "the measurement could not be tried on training examples, nor on task.query, so that its gradient has no "
            'positions: ask for target "loss", or give the task a query data set that has what it needs'
        )


def encode_positions(
    model: GradientModel, basis: Basis, example: Example, lengths: Sequence[int], measure: Measure | None = None
) -> tuple[Tensor, Tensor]:
    """As `GradientModel.encode`, of one example by position: rows [positions, dimensions] and the value [1].

    Raises as `position_coordinates`; LossError also where a gradient is not finite.
    """

    def of_use(layer: Layer, x: Any, d: Tensor) -> Tensor | None:
        if not isinstance(basis.layers.get(layer.name), DenseProjection):
            return basis.of_use(layer, x, d)
        projected = (basis.of_use(layer, x[part], d[part]) for part in layer.slices(x))  # from whole gradients
        return torch.cat([rows for rows in projected if rows is not None])

    coordinates, value = position_coordinates(model, model.batch([example]), lengths, of_use, measure)
    rows = basis.assemble(coordinates, sum(lengths))
    check_finite(rows, "gradient")
    return rows, value

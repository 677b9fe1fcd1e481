"""Influence functions without approximation of the curvature: the slow reference, for small models and last layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap
from torch.utils._pytree import tree_map

from gradtrace import random_numbers
from gradtrace.checkpoints import Checkpoint
from gradtrace.data.batches import Measure
from gradtrace.data.dataset import fetch
from gradtrace.data.guards import check_dataset
from gradtrace.errors import CurvatureError, TaskError
from gradtrace.gradients.reference import Measured, attention_by_matrices, in_float64, vmapped_gradients
from gradtrace.models.gradient_model import GradientModel
from gradtrace.task import Batch, Example, Task

_ROWS = 256  # training rows of one batch, at most
_ELEMENTS = 1 << 24  # of the gradients of one batch
_VECTORS = 64  # vectors that one pass over the rows is multiplied with
_LARGEST = 20_000  # parameters whose Hessian is formed: 3 GB


class ExactInfluence:
    """Influence functions (Koh and Liang 2017, Equation 2) at one checkpoint, all in float64.

    The score of row z on query z' is grad(z')^T (H + (damping + weight_decay) I)^-1 grad(z), with H the Hessian of the
    mean training loss. Positive is a proponent: removing the row raises the query's measurement, to first order by
    score / rows. Row gradients are streamed; no row is held beyond its batch.

    Args:
        task: every row of its training set counts.
        checkpoint: where the gradients and the Hessian are taken, best at a minimum.
        modules: names of the modules whose parameters count, as the last layer's; default: all trainable parameters.
        gauss_newton: take the generalised Gauss-Newton matrix, mean J^T (d2 loss / d output2) J, which is never
            indefinite. The task's loss must then use its model only by calling it.
        damping: added to every eigenvalue.
        weight_decay: that of the training, where its penalty (weight_decay / 2) |parameters|^2 is not in the loss.

    Raises:
        TaskError: a module's name is unknown, or it has no trainable parameter; and whatever else a build refuses.
        CheckpointError: the checkpoint does not fit the model.
    """

    def __init__(
        self,
        task: Task,
        checkpoint: Checkpoint,
        modules: Sequence[str] | None = None,
        *,
        gauss_newton: bool = False,
        damping: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        self.task, self.rows, self.shift = task, check_dataset(task), damping + weight_decay
        probe = fetch(task.train, range(min(2, self.rows)))
        checked = GradientModel(task, checkpoint, torch.device("cpu"), probe)  # with all the checks of a build
        trainable = [name for layer in checked.plan.layers for name in layer.names]
        self.model = copy.deepcopy(checked.model).double()
        self.names = trainable if modules is None else _within(modules, trainable)
        self._parameters = {name: self.model.get_parameter(name).detach() for name in self.names}
        self._losses = self._linearised_losses if gauss_newton else self._exact_losses

    @property
    def size(self) -> int:
        """The number of parameters that count, p."""
        return sum(parameter.numel() for parameter in self._parameters.values())

    def explicit(self, examples: Sequence[Example]) -> NDArray[np.float64]:
        """Scores [queries, rows] by factorising the damped Hessian [p, p].

        Raises:
            CurvatureError: it is not positive definite (the text gives its smallest eigenvalue), or too large to form.
        """
        if self.size > _LARGEST:
            raise CurvatureError(
                f"the Hessian of {self.size:,} parameters is not formed, only up to {_LARGEST:,}: call iterative(), or "
                "name fewer modules"
            )
        hessian = self.products(torch.eye(self.size, dtype=torch.float64))
        factor, failed = torch.linalg.cholesky_ex((hessian + hessian.T) / 2)
        if failed:
            lowest = float(torch.linalg.eigvalsh(hessian)[0])
            raise CurvatureError(
                f"the damped Hessian is not positive definite, its smallest eigenvalue is {lowest:.2e}: the weights "
                "are at no minimum of the mean loss. Train on, add more damping than that, or take gauss_newton=True"
            )
        return self._scores(torch.cholesky_solve(self._queries(examples).T, factor).T)

    def iterative(
        self, examples: Sequence[Example], tolerance: float = 1e-8, iterations: int = 1000
    ) -> NDArray[np.float64]:
        """Scores [queries, rows] by conjugate gradients on Hessian-vector products; no [p, p] matrix is formed.

        Args:
            tolerance: largest |b - H x| / |b| of any query's gradient b.
            iterations: the most passes over the training rows.

        Raises:
            CurvatureError: the damped Hessian is not positive definite, or `iterations` are not enough.
        """
        return self._scores(conjugate_gradients(self.products, self._queries(examples), tolerance, iterations))

    def sketched(
        self,
        examples: Sequence[Example],
        size: int,
        seed: int = 0,
        tolerance: float = 1e-8,
        iterations: int = 1000,
    ) -> NDArray[np.float64]:
        """Scores [queries, rows] from a randomised sketch of the inverse Hessian (Pruthi et al. 2020, Appendix A.1).

        With random signs R [p, size], E[R R^T] / size = I; so with S = H^-1 R, solved for by conjugate gradients,
        (1 / size) (S^T grad(z')) . (R^T grad(z)) is an unbiased estimate of grad(z')^T H^-1 grad(z), whose variance
        falls as 1 / size. S serves all queries; of a row the `size` numbers R^T grad(z) are enough.

        Raises:
            CurvatureError: as `iterative`.
        """
        signs = random_numbers.rademacher(seed, 0, 0, size * self.size).double().view(size, self.size)
        sketch = conjugate_gradients(self.products, signs, tolerance, iterations)
        return self._scores(self._queries(examples) @ sketch.T / size, signs)

    def products(self, vectors: Tensor) -> Tensor:
        """The damped Hessian times each row of `vectors`. float64 [k, p] -> [k, p]."""
        total = torch.zeros_like(vectors)
        for batch in self._batches():
            for chunk, sums in zip(vectors.split(_VECTORS), total.split(_VECTORS), strict=True):
                sums += self._batch_products(batch, chunk)
        return total / self.rows + self.shift * vectors

    def _batch_products(self, batch: Batch, vectors: Tensor) -> Tensor:
        """Hessian of the batch's summed loss times each row of `vectors`. Backward over backward: more of PyTorch's
        operations have that than forward derivatives."""

        def total(parameters: Mapping[str, Tensor]) -> Tensor:
            return self._losses(parameters, batch).sum()

        def product(vector: Tensor) -> Tensor:
            (along,) = pull(self._unflattened(vector))
            return torch.cat([along[name].flatten() for name in self.names])

        with attention_by_matrices():
            pull = vjp(grad(total), self._parameters)[1]
            products: Tensor = vmap(product)(vectors)
        return products

    def _exact_losses(self, parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
        measured = Measured(self.model, self.task.loss)
        named = {f"model.{name}": values for name, values in parameters.items()}
        losses: Tensor = functional_call(measured, named, (batch,))
        return losses

    def _linearised_losses(self, parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return self.task.loss(_Linearised(self.model, self._parameters, parameters), batch)

    def _unflattened(self, vector: Tensor) -> dict[str, Tensor]:
        chunks = vector.split([parameter.numel() for parameter in self._parameters.values()])
        named = zip(self._parameters.items(), chunks, strict=True)
        return {name: chunk.view(parameter.shape) for (name, parameter), chunk in named}

    def _gradients(self, measure: Measure, batch: Batch) -> Tensor:
        """[batch, p]."""
        gradients = vmapped_gradients(self.model, measure, batch, self.names)
        return torch.cat([gradients[name].flatten(1) for name in self.names], dim=1)

    def _queries(self, examples: Sequence[Example]) -> Tensor:
        return self._gradients(self.task.measurement, in_float64(self.task.collate(list(examples))))

    def _scores(self, vectors: Tensor, projection: Tensor | None = None) -> NDArray[np.float64]:
        """Query vectors [queries, p] times row gradients; or [queries, k], and these projected by [k, p]."""
        scores = []
        for batch in self._batches():
            rows = self._gradients(self.task.loss, batch)
            scores.append(vectors @ (rows if projection is None else rows @ projection.T).T)
        return torch.cat(scores, dim=1).numpy()

    def _batches(self) -> Iterator[Batch]:
        step = max(1, min(_ROWS, _ELEMENTS // self.size))
        for start in range(0, self.rows, step):
            yield in_float64(self.task.collate(fetch(self.task.train, range(start, min(start + step, self.rows)))))


class _Linearised(nn.Module):
    """A model's output to first order in its parameters around `at`: the Hessian of its loss there is the generalised
    Gauss-Newton matrix (Schraudolph 2002)."""

    def __init__(self, model: nn.Module, at: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model, self.at = model, dict(at)
        self.change = {name: parameters[name] - values for name, values in at.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output, pull = vjp(lambda at: functional_call(self.model, at, args, kwargs), self.at)[:2]
        nothing = tree_map(torch.zeros_like, output)
        push = vjp(lambda change: pull(change)[0], nothing)[1]  # J v as the derivative of u -> J^T u, which is linear
        return tree_map(torch.add, output, push(self.change)[0])


def _within(modules: Sequence[str], trainable: Sequence[str]) -> list[str]:
    """Those of the trainable parameters that belong to the modules, or to modules within them."""
    within = [name for name in trainable if any(name.startswith(f"{module}.") for module in modules)]
    empty = [module for module in modules if not any(name.startswith(f"{module}.") for name in trainable)]
    if empty or not modules:
        owners = dict.fromkeys(name.rpartition(".")[0] for name in trainable)
        raise TaskError(
            f"the model has no trainable parameter in {', '.join(map(repr, empty)) or 'no module'}; name modules such "
            f"as {', '.join(list(owners)[:10])}"
        )
    return within


def conjugate_gradients(
    products: Callable[[Tensor], Tensor], sides: Tensor, tolerance: float, iterations: int
) -> Tensor:
    """Solve A x = b for every row b of `sides` [k, p], A symmetric positive definite (Hestenes and Stiefel 1952).

    Args:
        products: [k, p] -> [k, p], A times each row.
        tolerance: largest |b - A x| / |b| of any row.
        iterations: the most products to take.

    Raises:
        CurvatureError: A is not positive definite, or `iterations` do not reach the tolerance.
    """
    x = torch.zeros_like(sides)
    residual, direction = sides.clone(), sides.clone()
    square = residual.square().sum(1)
    enough = square * tolerance**2
    for _ in range(iterations):
        unsolved = square > enough
        if not bool(unsolved.any()):
            return x
        product = products(direction)
        curvature = (direction * product).sum(1)
        _check_positive(curvature[unsolved], direction[unsolved])
        step = torch.where(unsolved, square / curvature, 0)[:, None]
        x += step * direction
        residual -= step * product
        before, square = square, residual.square().sum(1)
        direction = residual + torch.where(unsolved, square / before, 0)[:, None] * direction
    worst = float((square / sides.square().sum(1)).sqrt().nan_to_num().max())
    if worst <= tolerance:
        return x
    raise CurvatureError(
        f"{iterations} iterations of conjugate gradients leave a relative residual of {worst:.1e}, {tolerance:.1e} was "
        "asked for: allow more iterations, or raise the damping, which makes the curvature better conditioned"
    )


def _check_positive(curvature: Tensor, direction: Tensor) -> None:
    lowest = float((curvature / direction.square().sum(1)).min())
    if not lowest > 0:
        raise CurvatureError(
            f"the damped curvature is not positive definite ({lowest:.2e} along one direction): the weights are at no "
            "minimum of the mean loss. Train on, raise the damping well above this, or take gauss_newton=True"
        )

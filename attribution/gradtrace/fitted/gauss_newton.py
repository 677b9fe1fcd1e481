"""Gauss-Newton coordinates: a second rotation, in which the curvature of a trained model is nearly diagonal.

EK-FAC's coordinates (`ekfac`) treat the two sides of each layer, and the layers, as independent. The gradients g of the
training rows tell what is left: with weights w by which g gT is the row's part of the Gauss-Newton matrix,

    K = mean over rows of w g gT,

and the eigenvectors of the sum over a run's checkpoints of K / trace K, those of the largest eigenvalues first, rotate
rows and queries. The curvature at a checkpoint is the diagonal of K there: the mean of w g^2 over the stored rows. No
gradients of sampled labels are needed.

The weights follow from the losses. For L = -log p, g = -(1 - p) phi, with phi the gradient of the log odds f of the
label, and w = p / (1 - p) makes w g gT = p (1 - p) phi phiT, the Gauss-Newton matrix of L in f. For squared errors
L = c (f - y)^2, w = 1 / (2 L) makes it 2 c phi phiT. For other losses w = 1: the empirical Fisher information.

Of many rows, those with a large w |g|^2 must be in K, or their scores become too large; of the others a few suffice. So
rows are drawn with a probability in proportion to it, and weighted by its inverse: K stays right in expectation. Of few
coordinates it is right sooner if more rows than coordinates are in it, and these cost little.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gradtrace import random_numbers
from gradtrace.errors import StoreError
from gradtrace.store.manifest import Output
from gradtrace.store.rows import RowStore

_USUAL = 4096  # coordinates
_DECOMPOSED = 1024  # size of matrices that are decomposed in full
_ITERATIONS = 3
_MOST = 8192  # coordinates: a matrix has the square of it, and its eigenvectors take the cube of time
_FEWEST_DRAWN = 4096  # rows; of no more, all are taken
_FIRST_ROWS = 256  # that are always taken: the mean that later ones are compared with is not known yet
_BLOCK_VALUES = 1 << 22  # float32 values of rows that are multiplied at a time


def coordinates_before(dimensions: int) -> int:
    """How many of EK-FAC's coordinates are rotated into so many columns: eight times as many up to 4,096, or twice as
    many up to 8,192."""
    return max(dimensions, min(8 * dimensions, _USUAL), min(2 * dimensions, _MOST))


def check_rotation(coordinates: int) -> None:
    """Raises StoreError where so many coordinates are too many to be rotated."""
    if coordinates > _MOST:
        raise StoreError(
            f"a Gauss-Newton basis has at most {_MOST:,} dimensions, of which the square is held, not {coordinates:,}: "
            "ask for fewer, or for basis='spectral' (--basis spectral), which needs no rotation"
        )


def rows_drawn(rows: int, coordinates: int) -> int:
    """About how many of the rows are in K: all, or one for each coordinate, but at least 4,096."""
    return min(rows, max(coordinates, _FEWEST_DRAWN))


def row_weights(losses: Tensor, output: Output | None) -> Tensor:
    """w, float64 [rows], of the losses [rows]; zero where a loss is rounded to zero, and the gradient with it.

    output: what the loss is of, see the module's text; None: neither, so that all weights are 1
    """
    losses = losses.double()
    if output is None:
        return torch.ones_like(losses)
    weights = 1 / torch.expm1(losses) if output == "log odds" else 1 / (2 * losses)
    return torch.where(losses > 0, weights, 0)


class SecondMoments:
    """The sum of w g gT at one checkpoint over a stretch of the rows, which come in batches.

    all_rows: number of the rows of which these are a stretch
    device: where the batches are
    seed, stream: of the draws; a row's depends on its place among all rows only
    first: place of the stretch's first row among them

    count: of the rows so far
    """

    def __init__(
        self,
        coordinates: int,
        all_rows: int,
        output: Output | None,
        device: torch.device,
        seed: int,
        stream: int,
        first: int = 0,
    ) -> None:
        self._output, self._seed, self._stream, self._first = output, seed, stream, first
        self._share = rows_drawn(all_rows, coordinates) / max(all_rows, 1)
        self._sum = torch.zeros(coordinates, coordinates, device=device)
        self._waiting: list[Tensor] = []
        self.count, self._energy = 0, 0.0

    def add(self, rows: Tensor, losses: Tensor) -> None:
        """rows: float32 [batch, coordinates];  losses: [batch]"""
        weights = row_weights(losses, self._output)
        if self._share < 1:
            probabilities = self._probabilities(weights * rows.double().square().sum(1))
            draws = random_numbers.uniforms(self._seed, self._stream, self._first + self.count, len(rows), rows.device)
            drawn = draws < probabilities
            rows, weights = rows[drawn], weights[drawn] / probabilities[drawn]
        self.count += len(losses)
        self._waiting.append(rows * weights.sqrt().to(rows.dtype)[:, None])
        if sum(batch.numel() for batch in self._waiting) >= _BLOCK_VALUES:
            self._multiply()

    def _probabilities(self, energies: Tensor) -> Tensor:
        """With which the next rows are drawn, float64 [batch].

        energies: w |g|^2, float64 [batch], compared with their mean over the rows so far, these included one by one
        """
        totals = self._energy + energies.cumsum(0)
        means = totals / torch.arange(self.count + 1, self.count + 1 + len(energies), device=energies.device)
        self._energy = float(totals[-1])
        probabilities = (self._share * torch.where(means > 0, energies / means, 0)).clamp(max=1)
        probabilities[: max(0, _FIRST_ROWS - self.count)] = 1
        return probabilities

    def _multiply(self) -> None:
        if self._waiting:
            block = torch.cat(self._waiting)  # [b, coordinates]
            self._sum.addmm_(block.T, block)
            self._waiting = []

    def total(self) -> Tensor:
        """The sum, float32 [coordinates, coordinates]."""
        self._multiply()
        return self._sum


def rotation(moments: Iterable[Tensor], dimensions: int) -> Tensor:
    """The eigenvectors with the largest eigenvalues of the sum of K / trace K. float32 [coordinates, dimensions].

    moments: K at each checkpoint, made one at a time; a zero one, where no row has a gradient, adds nothing
    """
    total: Tensor | None = None
    for moment in moments:
        trace = float(moment.diagonal().double().sum())
        scaled = moment / trace if trace > 0 else moment
        total = scaled if total is None else total.add_(scaled)
    assert total is not None  # there is at least one checkpoint
    return leading_eigenvectors(total, dimensions).cpu().contiguous()


def leading_eigenvectors(matrix: Tensor, count: int) -> Tensor:
    """Those of a symmetric matrix [n, n] with the largest eigenvalues, which are not negative, in falling order.
    Float32 [n, count].

    Of large matrices by subspace iteration (Golub and Van Loan, Matrix Computations, section 8.2), a fraction of the
    time: exact inside the subspace found, which may lack some of the last vectors. It starts from the first axes, which
    have the largest energies here.
    """
    n = len(matrix)
    if n <= _DECOMPOSED or 2 * count > n:
        vectors: Tensor = torch.linalg.eigh(matrix.double())[1]
        return vectors[:, -count:].flip(1).float()
    subspace = torch.eye(n, count, dtype=matrix.dtype, device=matrix.device)
    for _ in range(_ITERATIONS):
        subspace = torch.linalg.qr(matrix @ subspace)[0]
    inside = torch.linalg.eigh((subspace.T @ matrix @ subspace).double())[1]
    within: Tensor = subspace @ inside.flip(1).to(subspace.dtype)
    return within


def row_curvature(
    store: RowStore, checkpoint: int, output: Output | None, fitted: Tensor, coordinates: int
) -> dict[str, Tensor]:
    """The diagonal of K at one checkpoint, from its stored rows.

    fitted: bool [stored rows], the rows that count
    coordinates: number of the basis's coordinates before the rotation

    Returns:
        eigenvalues: float32 [dimensions].
        mean: float32 [], over all coordinates, taking those that are not stored for zero.
    """
    weights = row_weights(torch.tensor(store.columns(checkpoint)["loss"]), output) * fitted
    total = torch.zeros(store.dimensions, dtype=torch.float64)
    for start, rows in store.blocks([checkpoint], max(1, _BLOCK_VALUES // store.dimensions)):  # [b, 1, D]
        total += weights[start : start + len(rows)] @ rows[:, 0].double().square()
    eigenvalues = (total / max(int(fitted.sum()), 1)).float()
    return {"eigenvalues": eigenvalues, "mean": (eigenvalues.double().sum() / coordinates).float()}

"""How exact a product of float32 tensors is: PyTorch may be told to round the operands to fewer bits first."""

from __future__ import annotations

import torch

# Both operands lose bits, cut off rather than rounded at worst; the rest covers the square of the error.
_ERRORS = {
    "ieee": 0.0,
    "highest": 0.0,
    "none": 0.0,  # nothing was set, and the default is full precision
    "tf32": 2.1 * 2.0**-10,
    "high": 2.1 * 2.0**-10,
}
_LARGEST_ERROR = 2.1 * 2.0**-7  # bfloat16: "bf16", "medium"


def product_error(device: str | torch.device) -> float:
    """A bound of what rounded operands add to the error of a matrix product on a device, relative to the sum of the
    absolute values of its terms; 0 in full float32.

    It follows `torch.set_float32_matmul_precision` and `torch.backends.*.matmul.fp32_precision` as they are now: a
    task's file may set them for its own training, in the same process.
    """
    backend = torch.backends.cuda if torch.device(device).type == "cuda" else torch.backends.mkldnn
    try:
        precision = backend.matmul.fp32_precision
    except (AttributeError, AssertionError):  # PyTorch before 2.9
        precision = torch.get_float32_matmul_precision()
    return _ERRORS.get(precision, _LARGEST_ERROR)

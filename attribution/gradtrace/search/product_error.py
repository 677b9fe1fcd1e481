"""How far off matrix products of PyTorch may be."""

from __future__ import annotations

import torch

# Errors of matrix products by PyTorch's names of precisions. An operand that is truncated to 10 bits errs by up to
# 2^-10, relatively: two operands by twice as much, and the .1 covers the product of both errors. "none": not set.
_PRODUCT_ERRORS = {"ieee": 0.0, "highest": 0.0, "none": 0.0, "tf32": 2.1 * 2.0**-10, "high": 2.1 * 2.0**-10}
_LARGEST_PRODUCT_ERROR = 2.1 * 2.0**-7  # bfloat16: "bf16", "medium"


def product_error(device: str | torch.device) -> float:
    """A bound of the error that rounded operands add to a matrix product, relative to the sum of the absolute values of
    its terms. 0 in full float32.

    It follows the current `torch.set_float32_matmul_precision` and `torch.backends.*.matmul.fp32_precision`, which a
    task's file may set for its training in the same process.
    """
    backend = torch.backends.cuda if torch.device(device).type == "cuda" else torch.backends.mkldnn
    try:
        precision = backend.matmul.fp32_precision
    except (AttributeError, AssertionError):  # PyTorch before 2.9
        precision = torch.get_float32_matmul_precision()
    return _PRODUCT_ERRORS.get(precision, _LARGEST_PRODUCT_ERROR)

"""Products with a weight stored in another dtype than is computed in, on a CPU: cast a few rows at a time.

A whole matrix cast at once goes through memory three times (16 bit read, 16 or 32 written, read again), in pages that
are new each time. Rows that fit in the processor's cache are read once. And PyTorch casts to float32 with vector
instructions from every dtype of a file but fp8, between two 16-bit ones without: fp16 to float32 to bf16 takes a tenth
of fp16 to bf16.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

ROWS = 256
"""Of the weight, at a time: 6 bytes a value, so 6 MB for rows of 4096."""

_FP8_TO_HALF = 2.0**8
"""What a float8_e4m3fn is worth as the float16 of the same exponent and mantissa bits: their biases are 7 and 15."""

_FP8_NAN = 0x7F
"""The exponent and mantissa bits of a float8_e4m3fn that is no number: all there are."""

_ALL_BUT_SECOND_BIT = -0x4001
"""As a 16-bit integer: all but the copy of the sign that shifting a sign-extended byte leaves in the exponent."""


def product_in_blocks(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """`linear(x, weight * scale[:, None], bias)` in the dtype of `x`, all on the CPU.

    Args:
        x: [..., columns].
        weight: [rows, columns], in any floating-point dtype or int8.
        scale: [rows] float32.

    Returns:
        [..., rows].
    """
    given = x.reshape(-1, x.shape[-1])
    product = given.new_empty(given.shape[0], weight.shape[0])
    for here, rows in _cast_rows(weight, scale, x.dtype):
        product[:, here] = linear(given, rows, None if bias is None else bias[here])
    return product.view(*x.shape[:-1], weight.shape[0])


def cast_in_blocks(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`weight * scale[:, None]` in `dtype`, as `product_in_blocks` casts it, in memory of its own."""
    cast = torch.empty(weight.shape, dtype=dtype)
    for here, rows in _cast_rows(weight, scale, dtype):
        cast[here] = rows
    return cast


def _cast_rows(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Where each block of rows is, and the rows, which stay what they are until the next block."""
    wide = torch.empty(min(ROWS, weight.shape[0]), weight.shape[1])
    narrow = wide if dtype == torch.float32 else torch.empty_like(wide, dtype=dtype)
    bits = torch.empty_like(wide, dtype=torch.int16) if weight.dtype == torch.float8_e4m3fn else None
    for start in range(0, weight.shape[0], ROWS):
        here = slice(start, start + ROWS)
        rows = wide[: weight[here].shape[0]]
        factor = None if scale is None else scale[here, None]
        if bits is not None:
            _widen_fp8(weight[here], factor, rows, bits[: rows.shape[0]])
        else:
            rows.copy_(weight[here])
            if factor is not None:
                rows.mul_(factor)
        yield here, rows if narrow is wide else narrow[: rows.shape[0]].copy_(rows)


def _widen_fp8(packed: Tensor, factor: Tensor | None, out: Tensor, bits: Tensor) -> None:
    """The values, times the factor, in float32; PyTorch casts fp8 one value at a time.

    Args:
        packed: float8_e4m3fn.
        factor: [rows, 1] float32.
        out: Of the same shape, float32.
        bits: Of the same shape, int16, to work in: memory that is new is slow.
    """
    signed = packed.view(torch.int8)
    if int(signed.bitwise_and(_FP8_NAN).amax()) == _FP8_NAN:
        out.copy_(packed).mul_(1.0 if factor is None else factor)
        return
    halves = bits.copy_(signed).bitwise_left_shift_(7).bitwise_and_(_ALL_BUT_SECOND_BIT)
    out.copy_(halves.view(torch.float16)).mul_(_FP8_TO_HALF if factor is None else factor * _FP8_TO_HALF)

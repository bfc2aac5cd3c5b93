"""Row-wise 8-bit weights: one scale per output row, so that a product can be scaled after it is computed."""

import torch
from torch import Tensor

SCALE_SUFFIX = "_scale"
"""`x.weight` in 8 bit comes with `x.weight_scale`, float32 [rows]."""

QUANTIZED_DTYPES = (torch.float8_e4m3fn, torch.int8)


def quantize_rows(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Symmetric absmax quantisation of each row (LLM.int8(), arXiv 2208.07339, section 2.1, for weights alone).

    Args:
        weight: [rows, columns], floating-point and finite.
        dtype: One of `QUANTIZED_DTYPES`.

    Returns:
        The weight [rows, columns] in `dtype`, and float32 [rows] so that `quantized * scale[:, None]` is the weight.
    """
    values = weight.float()
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = values.abs().amax(dim=1) / largest
    scale = torch.where(scale > 0, scale, 1.0)
    values = values / scale[:, None]
    return (values.round() if dtype == torch.int8 else values).to(dtype), scale

"""What the matrix products of a computation cost by themselves: the time that no implementation gets below."""

from collections.abc import Callable

import torch
from measure import seconds_of
from torch.utils.flop_counter import FlopCounterMode


def matrix_flops(call: Callable[[], object]) -> int:
    """Floating-point operations of the call's matrix products; on a CPU attention's own are not among them."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def flops_per_second(rows: int, columns_in: int, columns_out: int, dtype: torch.dtype, device: torch.device) -> float:
    """How fast this machine multiplies [rows, columns_in] by [columns_out, columns_in]: its best of five."""
    x = torch.randn(rows, columns_in, device=device).to(dtype)
    weight = torch.randn(columns_out, columns_in, device=device).to(dtype)
    fastest = min(seconds_of(lambda: torch.nn.functional.linear(x, weight)) for _ in range(5))
    return 2 * rows * columns_in * columns_out / fastest

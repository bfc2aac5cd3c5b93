"""The matrices of the MLLM as leaves that ComfyUI streams, in 16 bit or packed smaller.

Every leaf is ComfyUI's Linear, with a weight of its own dtype that is brought to the input's device as it is stored and
unpacked there. What belongs to a packed weight is a parameter too: all of it moves, is counted and is freed together.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import comfy.model_management
import comfy.ops
import torch
from torch import Tensor, nn

from .blocks import product_in_blocks
from .weights import quantize_rows

NF4_BLOCK = 64
"""Weights that share a scale in 4 bit (QLoRA, arXiv 2305.14314, section 3)."""

OUTLIER = 6.0
"""Activations above it are multiplied in 16 bit (LLM.int8(), arXiv 2208.07339, section 3.2)."""


INT8_LARGEST = 127.0
"""What a scale of LLM.int8() stands for: the largest magnitude of its row."""


class CastLinear(comfy.ops.manual_cast.Linear):
    """A weight in any floating-point dtype, cast to the input's.

    While a copy is on the device, the weight on the CPU is kept and comes back as it was: it may be a file's mapped
    pages, which a copy would turn into memory of the process.
    """

    weight: nn.Parameter
    _home: Tensor | None = None

    def forward_comfy_cast_weights(self, x: Tensor) -> Tensor:
        """ComfyUI's own, but on a CPU without a copy of the whole weight in another dtype."""
        if self.weight.dtype == x.dtype or not self._all_on_cpu(x):
            return super().forward_comfy_cast_weights(x)
        return product_in_blocks(x, self.weight, None, None if self.bias is None else self.bias.to(x.dtype))

    def _all_on_cpu(self, x: Tensor) -> bool:
        return x.device.type == self.weight.device.type == "cpu" and not self.weight_function

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        here = self.weight.device
        there = fn(torch.empty(0, device=here)).device
        if here.type == "cpu" and there.type != "cpu":
            # ComfyUI moves whole models in one go; this is where Cancel can step in.
            comfy.model_management.throw_exception_if_processing_interrupted()
            self._home = self.weight.data
        elif there.type == "cpu" and self._home is not None:
            self.weight = nn.Parameter(self._home, requires_grad=False)
            self._home = None
        return super()._apply(fn, recurse)


class PackedLinear(CastLinear, ABC):
    """A weight packed smaller with scales, unpacked at each use."""

    weight_scale: Tensor

    @abstractmethod
    def multiply(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """The product, [..., columns] to [..., rows], all on one device."""

    def forward_comfy_cast_weights(self, x: Tensor) -> Tensor:
        """Bring the packed weight to the input's device and multiply."""
        weight, bias, stream = comfy.ops.cast_bias_weight(
            self, x, dtype=self.weight.dtype, bias_dtype=x.dtype, offloadable=True
        )
        scale = comfy.model_management.cast_to_device(self.weight_scale, x.device, None)  # does not wait for the device
        product = self.multiply(x, weight, scale, bias)
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return product


class PackingLinear(PackedLinear):
    """One that packs weights of 16 or 32 bit itself."""

    @staticmethod
    @abstractmethod
    def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
        """A weight [rows, columns] as (packed weight, float32 scales)."""


class RowScaledLinear(PackedLinear):
    """8 bit with a scale per row, see `quantize`; computes in the input's dtype. Needs no extra library."""

    def multiply(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Scale the weight, not the product: that could overflow fp16."""
        if x.device.type == "cpu":
            return product_in_blocks(x, weight, scale, bias)
        dense = weight.to(x.dtype).mul_(scale.to(x.dtype)[:, None])
        return nn.functional.linear(x, dense, bias)


class Fp8Linear(RowScaledLinear, PackingLinear):
    """float8_e4m3fn with a scale per row."""

    @staticmethod
    def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise row by row."""
        return quantize_rows(weight, torch.float8_e4m3fn)


class Int8Linear(PackingLinear):
    """LLM.int8() of bitsandbytes: 8-bit products on the GPU, with outliers in 16 bit.

    Not bitsandbytes' own layer: that one moves its weight, after the first use, to where `.to()` does not find it.
    """

    @staticmethod
    def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise row by row; the scale is the largest magnitude of the row."""
        import bitsandbytes

        packed, scale, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.half())
        return packed, scale

    def multiply(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply with bitsandbytes, whose GPU kernels take fp16; on a CPU it takes ten times as long as blocks."""
        if x.device.type == "cpu":
            return product_in_blocks(x, weight, scale / INT8_LARGEST, bias)
        import bitsandbytes

        state = bitsandbytes.MatmulLtState()
        state.CB, state.SCB, state.has_fp16_weights, state.threshold = weight, scale, False, OUTLIER
        bias = None if bias is None else bias.half()
        return bitsandbytes.matmul(x.half(), weight, bias=bias, state=state).to(x.dtype)


class Nf4Linear(PackingLinear):
    """4-bit NormalFloat of bitsandbytes, with a scale per `NF4_BLOCK` weights; computes in the input's dtype."""

    @staticmethod
    def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise block by block: [rows * columns / 2, 1] uint8 and the largest magnitude of each block."""
        import bitsandbytes

        packed, state = bitsandbytes.functional.quantize_4bit(
            weight.contiguous(), blocksize=NF4_BLOCK, compress_statistics=False, quant_type="nf4"
        )
        return packed, state.absmax

    def multiply(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Unpack and multiply."""
        import bitsandbytes

        state = bitsandbytes.functional.QuantState(
            scale,
            shape=torch.Size((self.out_features, self.in_features)),
            code=None,
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=x.dtype,
        )
        dense = bitsandbytes.functional.dequantize_4bit(weight, state)
        return nn.functional.linear(x, dense, bias)

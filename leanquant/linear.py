"""The quantized linear layer, in torch on any device: codes stay packed, the weight is rebuilt for each forward pass.

Legend: O out_features, I in_features, K = 2**bits levels, G groups.
"""

import torch
from torch import nn

from .packing import PackedLinear


class QuantizedLinear(nn.Module):
    """y = x W^T + bias with W = levels[codes], for x [..., I]. Buffers: codes, and grid or scale and zero (packing.py)."""

    def __init__(self, packed: PackedLinear, bits: int, in_features: int, bias: torch.Tensor | None):
        super().__init__()
        self.bits, self.in_features, self.out_features = bits, in_features, packed.codes.shape[0]
        for name, tensor in packed._asdict().items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def on_meta(cls, shapes: PackedLinear, bits: int, linear: nn.Linear) -> "QuantizedLinear":
        """A stand-in for `linear` that has only shapes: `shapes` holds meta tensors, the bias stays on meta too."""
        return cls(shapes, bits, linear.in_features, linear.bias)

    def fill(self, packed: PackedLinear) -> None:
        """Take the stored tensors."""
        for name, tensor in packed._asdict().items():
            setattr(self, name, tensor)

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The dequantized weight [O, I]."""
        packed = PackedLinear(self.codes, self.grid, self.scale, self.zero)
        return packed.dequantize(self.bits, self.in_features, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, bias={self.bias is not None}"

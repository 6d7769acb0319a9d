"""Products by weights of eight bits, for decoding on a CPU: `--weights int8` of evaluate.py.

A quarter of the bytes is read, which is what decoding waits for.  Every weight matrix of T5 and of
its expert layers that decoding multiplies by is rounded, and so are the numbers that it meets, so
that answers may change; what was trained stays as it is.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import t5
from fast.decoder import Packed, remembered


class Int8(Packed):
    """x -> x [W_1; W_2; ...]^T by whole numbers in -127 .. 127, in torch's quantized products.

    Each row of the weights has a scale of its own, and so has each token of x, so that an answer
    does not depend on the others in its batch; x is rounded to seven bits, since processors without
    VNNI would overflow at eight."""

    def __init__(self, weights: Sequence[Tensor], dtype: torch.dtype, dim: int = 0) -> None:
        whole = torch.cat([w.detach().float() for w in weights if w.numel()], dim)
        scales = whole.abs().amax(dim=1).clamp_(min=1e-30) / 127
        zeros = torch.zeros(len(whole), dtype=torch.long)
        with warnings.catch_warnings():  # torch is pinned to a version that has them
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor, torch.quantize_per_chan")
            rounded = torch.quantize_per_channel(whole, scales, zeros, 0, torch.qint8)
        self.copy = self.arranged(rounded)

    def arranged(self, rounded: Tensor) -> Any:
        """The rounded weights as the products of the decoder, of few tokens, read them best."""
        return torch.ops.quantized.linear_prepack(rounded, None)

    def __call__(self, x: Tensor) -> Tensor:
        """x [...,D_in] in fp32 or bf16 -> [...,D_out] in its type; no gradient."""
        whole = x.float()
        if x.numel() == x.shape[-1]:  # one token: its range is that of x
            return torch.ops.quantized.linear_dynamic(whole, self.copy, True).to(x.dtype)
        size = whole.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-30)
        product = torch.ops.quantized.linear_dynamic(whole / size, self.copy, True)
        return product.mul_(size).to(x.dtype)


class WideInt8(Int8):
    """Int8 for many tokens, such as the encoder's.

    There oneDNN takes a third of FBGEMM's time on a processor with AVX-512 VNNI, and twice as much
    on one without."""

    def arranged(self, rounded: Tensor) -> Any:
        """As oneDNN reads them where that pays."""
        engines, before = torch.backends.quantized, torch.backends.quantized.engine
        vnni = torch.cpu.get_capabilities().get("avx512_vnni", False)
        try:
            if vnni and "onednn" in engines.supported_engines:
                engines.engine = "onednn"
            return super().arranged(rounded)
        finally:
            engines.engine = before


class Int8Linear(t5.Linear):
    """t5.Linear by WideInt8, without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        packed = remembered(self.weight, [self.weight], (x.dtype, WideInt8),
                            lambda: WideInt8([self.weight], x.dtype))
        return packed(x)

    def parts(self) -> tuple[list[Tensor], list[Tensor], None]:
        """The layer as fast.decoder.JoinedProduct asks for it."""
        return [self.weight], [], None


def quantize(model: nn.Module) -> None:
    """Decode with weights of eight bits from now on, after fast.speed_up.  ValueError where they
    cannot be had: on a GPU, among the plain modules, without torch's quantized products."""
    decoders = [module for module in model.modules() if hasattr(module, "pack")]
    device = next(model.parameters()).device
    if device.type != "cpu" or not decoders or torch.backends.quantized.engine == "none":
        raise ValueError(f"--weights int8: expected a CPU, --impl fast or auto, and a torch with "
                         f"quantized products, got {device} and the engine "
                         f"{torch.backends.quantized.engine}; leave --weights away")
    for decoder in decoders:
        decoder.pack = Int8
    for module in model.modules():
        if type(module) is t5.Linear:
            module.__class__ = Int8Linear

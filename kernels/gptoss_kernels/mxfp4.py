"""MXFP4: four-bit values in blocks of 32, each block with one power-of-two scale.

The layout is that of the published gpt-oss checkpoints: blocks run along the last (input) axis, byte j of a
block holds element 2j in its low four bits and element 2j + 1 in its high four bits, and scale byte s means
2 ** (s - 127). A code is sign, two exponent bits, one mantissa bit (OCP Microscaling Formats 1.0, E2M1).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

BLOCK = 32
"""Values that share one scale."""

CODE_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What each of the sixteen codes stands for before scaling."""

# One integer of this width holds the two decoded values of one byte, so that one lookup fetches both.
_PAIR = {torch.bfloat16: torch.int32, torch.float32: torch.int64}
# Packed bytes that are looked up at a time: on a processor few enough for its cache, else as much as pays for a launch.
_CPU_CHUNK_BYTES, _CHUNK_BYTES = 1 << 18, 1 << 22


@dataclass(frozen=True, eq=False)
class Mxfp4Tensor:
    """A matrix, or a stack of matrices, as the checkpoint packs it.

    Attributes:
        blocks: uint8 (..., out, in / 32, 16), two codes a byte.
        scales: uint8 (..., out, in / 32), one exponent a block.
    Raises:
        TypeError: when a part is not uint8.
        ValueError: when the two shapes do not belong together.
    """

    blocks: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        for name, part in (("blocks", self.blocks), ("scales", self.scales)):
            if part.dtype != torch.uint8:
                raise TypeError(f"MXFP4 {name} must be uint8, got {part.dtype}")
        blocks, scales = tuple(self.blocks.shape), tuple(self.scales.shape)
        if len(blocks) < 3 or blocks[-1] != BLOCK // 2 or blocks[:-1] != scales:
            raise ValueError(
                f"MXFP4 blocks (..., out, in/32, 16) and scales (..., out, in/32) do not fit: "
                f"got {blocks} and {scales}"
            )

    @property
    def shape(self) -> torch.Size:
        """(..., out, in): the shape once decoded."""
        return torch.Size((*self.scales.shape[:-1], self.scales.shape[-1] * BLOCK))

    @property
    def device(self) -> torch.device:
        return self.blocks.device

    @property
    def nbytes(self) -> int:
        """Bytes as packed, 4.25 bits a value."""
        return self.blocks.nbytes + self.scales.nbytes

    def __getitem__(self, index: object) -> Mxfp4Tensor:
        """Choose along the leading axes, e.g. one expert or a list of experts; still packed."""
        return Mxfp4Tensor(self.blocks[index], self.scales[index])  # type: ignore[index]

    def to(self, device: torch.device | str) -> Mxfp4Tensor:
        """The same bytes on another device."""
        return Mxfp4Tensor(self.blocks.to(device), self.scales.to(device))


def dequantize(packed: Mxfp4Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Decode to (..., out, in) in bfloat16 or float32. No value is rounded.

    A code times a power of two has two significant bits and the exponent range of float32 is that of
    bfloat16, so the result is exact in both, down to the subnormals of scale byte 0. From scale byte 253 on
    the larger codes pass the largest finite value and become infinite. Scale byte 255 counts as 2 ** 128, as
    in OpenAI's and Hugging Face's decoders, not as the NaN of the OCP format. Published weights lack it.

    Raises:
        TypeError: for any other dtype.
    """
    if dtype not in _PAIR:
        raise TypeError(f"MXFP4 decodes to torch.bfloat16 or torch.float32, got {dtype}")
    pairs, powers = _tables(dtype, packed.device)
    blocks, scales = packed.blocks.reshape(-1, BLOCK // 2), packed.scales.reshape(-1)
    out = torch.empty(len(blocks), BLOCK, dtype=dtype, device=packed.device)
    step = (_CPU_CHUNK_BYTES if packed.device.type == "cpu" else _CHUNK_BYTES) // (BLOCK // 2)
    for start in range(0, len(blocks), step):  # in parts: the lookup needs indices wider than the bytes
        part = slice(start, start + step)
        codes = pairs.index_select(0, blocks[part].flatten().int()).view(dtype).view(-1, BLOCK)
        power = powers.index_select(0, scales[part].int()).unsqueeze(1)
        torch.mul(codes, power, out=out[part])
    return out.view(packed.shape)


@cache
def _tables(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both values of each byte, packed in one integer, (256,); and the power of each scale byte, (256,).

    The values are kept doubled and the powers halved: 2 ** 128 is not a finite float32, 2 ** 127 is.
    """
    byte = torch.arange(256)
    codes = torch.tensor(CODE_VALUES, dtype=torch.float64) * 2
    pairs = torch.stack((codes[byte & 15], codes[byte >> 4]), dim=1).to(dtype)
    powers = torch.exp2(torch.arange(256, dtype=torch.float64) - 128).to(dtype)
    return pairs.view(_PAIR[dtype]).squeeze(1).to(device), powers.to(device)

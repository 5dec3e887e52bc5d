"""MXFP4 codes and scales as numbers, in registers.

A code is sign, two exponent bits, one mantissa bit. Its bits, put where a float32 keeps its sign and the border of
exponent and mantissa, are a float32 with the code's value times 2 ** -126; subnormals come out right too. The power
that undoes this is the business of whoever multiplies. Nothing is looked up, nothing rounds.
"""

from __future__ import annotations

import triton
import triton.language as tl

UNDO = tl.constexpr(2.0**127)
"""A code's bits times this is twice its value; ``powers`` holds half of each scale. 2 ** 128 is no float32."""

_SIGN_AND_CODE = tl.constexpr(-0x7E400000)  # 0x81C00000: bit 31 and bits 24 to 22

# Four bytes to eight bfloat16 with the bits described above, two at a time: spread two bytes over 32 bits, move the
# code's sign to bit 15 and the rest to bits 8 to 6 of each half.
_BYTES_TO_BFLOAT16 = tl.constexpr("""{
    .reg .b32 bytes, sign, rest;
    prmt.b32 bytes, $4, 0, 0x4140;
    shl.b32 sign, bytes, 12; and.b32 sign, sign, 0x80008000;
    shl.b32 rest, bytes, 6;  and.b32 rest, rest, 0x01C001C0; or.b32 $0, sign, rest;
    shl.b32 sign, bytes, 8;  and.b32 sign, sign, 0x80008000;
    shl.b32 rest, bytes, 2;  and.b32 rest, rest, 0x01C001C0; or.b32 $2, sign, rest;
    prmt.b32 bytes, $4, 0, 0x4342;
    shl.b32 sign, bytes, 12; and.b32 sign, sign, 0x80008000;
    shl.b32 rest, bytes, 6;  and.b32 rest, rest, 0x01C001C0; or.b32 $1, sign, rest;
    shl.b32 sign, bytes, 8;  and.b32 sign, sign, 0x80008000;
    shl.b32 rest, bytes, 2;  and.b32 rest, rest, 0x01C001C0; or.b32 $3, sign, rest;
}""")


@triton.jit
def nibble(words, index: tl.constexpr):
    """Code ``index`` (0 to 7) of int32 words that hold eight each, as float32 still to be multiplied by UNDO / 2."""
    top = words << (28 - 4 * index)  # the code in bits 31 to 28; the shift to the right carries its sign along
    return ((top >> 6) & _SIGN_AND_CODE).to(tl.float32, bitcast=True)


@triton.jit
def powers(scales):
    """Scale bytes as float32: half of 2 ** (byte - 127), exact for every byte."""
    byte = scales.to(tl.int32)
    bits = tl.where(byte < 2, 0x200000 << byte, (byte - 1) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def matrix(codes, scales, ROWS: tl.constexpr, COLUMNS: tl.constexpr, dtype: tl.constexpr):
    """uint8 codes (ROWS, COLUMNS / 2) and scales (ROWS, COLUMNS / 32) -> the matrix, (ROWS, COLUMNS) in dtype."""
    power = powers(scales)
    if dtype == tl.bfloat16:
        even, odd = tl.inline_asm_elementwise(
            _BYTES_TO_BFLOAT16, "=r,=r,=r,=r,r", [codes], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4)
        undo = tl.full((1, 1), UNDO, tl.float32).to(tl.bfloat16)
    else:
        byte = codes.to(tl.int32)
        even, odd = nibble(byte, 0), nibble(byte, 1)
        undo = tl.full((1, 1), UNDO, tl.float32)
    values = tl.reshape(tl.join(even * undo, odd * undo), (ROWS, COLUMNS // 32, 32))
    values = values * tl.expand_dims(power.to(dtype), 2)
    return tl.reshape(values, (ROWS, COLUMNS))

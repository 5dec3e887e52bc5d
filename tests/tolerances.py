"""Every tolerance of the tests, with the reason for its size. Absolute unless said otherwise."""

from __future__ import annotations

TINY_LOGITS_F32 = 1e-5
"""Whole tiny model against transformers in float32: logits have unit scale, sums run in another order (2.4e-6 seen)."""

EMBEDDED_LOGITS_F32 = 1e-4
"""Embedded model against transformers in float32: logits reach 30, six layers, products in another order."""

CACHE_F32 = 1e-5
"""With and without a cache, padded or alone: the same sums in products of other shapes."""

SITE_F32 = 5e-5
"""A captured tensor of a tiny model against transformers; residual entries reach 40, float32 steps by 4e-6 there."""

SUM_F32 = 1e-5
"""A sum made by hand from captured parts against the captured whole."""

BF16_SUBLAYER = 0.02
"""Relative L2 of one sublayer in bfloat16 against float32 from the same input: 0.8 to 1.5 % measured."""

PROBABILITY = 1e-6
"""Probabilities that must sum to 1, in float32."""

SAMPLING_Z = 4.0
"""Standard deviations that an empirical frequency may be off; one draw in 16,000 exceeds it, and seeds are fixed."""

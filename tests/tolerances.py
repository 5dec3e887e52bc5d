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

EDIT_F32 = 3e-5
"""An edit against the same change made in the weights: the roundings differ and pass through the layers that follow
(1.1e-5 seen)."""

SUM_F32 = 1e-5
"""A sum made by hand from captured parts against the captured whole."""

BF16_SUBLAYER = 0.02
"""Relative L2 of one sublayer in bfloat16 against float32 from the same input: 0.8 to 1.5 % measured."""

PROBABILITY = 1e-6
"""Probabilities that must sum to 1, in float32."""

SAMPLING_Z = 4.0
"""Standard deviations that an empirical frequency may be off; one draw in 16,000 exceeds it, and seeds are fixed."""

NONE = 0.0
"""Bit equality, equal masks, equal routes, equal text: nothing may differ."""

F32_REL_L2 = 3e-6
"""A site of a model of up to 6 layers against transformers in float32: sums run in another order (1.4e-6 seen)."""

F32_OF_LARGEST = 3e-5
"""The worst entry of a site, as a part of its largest: 9e-6 seen through 24 layers, 1.2e-5 where a SwiGLU limit of 0.3
leaves the activation a tenth of what it was made from."""

F32_DEEP_REL_L2 = 1e-5
"""The same sites through 24 layers, whose errors add up (4.6e-6 seen)."""

DEEP_LOGITS_F32 = 1e-4
"""Logits after 24 layers, of size 4 (2.1e-5 seen)."""

CLAMPED = 0.01
"""A clamp bites when at least this share of the values lies beyond it."""

BF16_SITE = 0.02
"""Relative L2 of any site within a bfloat16 sublayer against float32 from the same input: 0.9 % seen."""

BF16_TWO = 0.006
"""Relative L2 of a sublayer between two bfloat16 programs, same input: a few sums round differently (0.33 % seen)."""

BF16_REPLAYED = 0.05
"""Relative L2 of a whole bfloat16 model of up to 6 layers that takes the float32 routes: 3.8 % seen."""

BF16_DEEP_REPLAYED = 0.1
"""The same through 24 layers of random weights: 6.4 % seen, where transformers' own bfloat16 is off by 6.8 %."""

BF16_TIMES_THEIRS = 1.25
"""Our error in bfloat16 as a multiple of transformers' own: neither rounds better, so chance alone parts them."""

BF16_FLIPS = 0.05
"""Share of token-layers whose experts change when a layer computes in bfloat16 from the same input: 1.3 % measured."""

PARTS_F32 = 2e-6
"""Relative to the largest entry of the whole: a sum of parts against what the model summed in float32 (3e-7 seen)."""

ROUNDING_BF16 = 2**-8
"""Relative: the most that rounding once to bfloat16 changes a value."""

GRADIENT_F32 = 1e-4
"""Relative L2, the whole tiny model's gradients against transformers' autograd in float32 (5e-7 seen)."""

FINITE_DIFFERENCE = 0.01
"""Relative: a central difference of a float32 metric, large enough a step to stand out of rounding."""

COMPLETENESS = 0.005
"""Relative to the sum of their sizes: integrated gradients' sum against what the whole does. The path has kinks, at
clamps, which 48 points meet as they may (0.0036 seen; 0.012 with 24 points, 0.057 with 12)."""

EXPERT_GRADIENT_F32 = 1e-5
"""Relative and absolute. Gradients through one expert map against dense autograd, float32: unit scale, other order."""

BF16_STEP = 2 * ROUNDING_BF16
"""Relative: two neighbouring bfloat16 values, where two sums that differ in their last bits may round to."""

CPU_KERNEL_F32 = 1e-6
"""A float32 product on any CPU path against float64, relative to the sum of the weights' sizes times the largest
activation of their block: one path writes a block's activations with 23 bits of the largest."""

KERNEL_F32 = 2e-6
"""Relative to the largest entry: a kernel in float32 against the reference, sums of up to 1100 terms (6e-7 seen)."""

KERNEL_BF16_L2 = 2**-9
"""Relative L2: a kernel in bfloat16 against the reference, rounding at the same places; few values differ at all."""

POOLED_BF16 = 2e-6
"""Sums over a pattern of bfloat16 values, made in float32: the values are exact there, only the sums round."""

STEP_F32 = 2e-6
"""Relative L2 of one site against float64 from its captured neighbours: one product of up to 128 terms in float32."""

STEP_BF16 = 0.012
"""The same in bfloat16, whose steps are 0.4 % apart: at most four roundings in a row (an expert's activation)."""

FULL_SHAPE_L2 = 0.01
"""Relative L2 of a bfloat16 kernel at the published widths against the reference on the same GPU: sums of 2880 terms in
another order, up to four roundings in a row (guessed: twice BF16_TWO; no GPU has run it yet)."""

SWEEP_F32 = 5e-6
"""A sweep's logits, up to 4, against one run after the other: the same sums in products of other shapes (2e-6 seen)."""

PATCHED_F32 = 1e-5
"""A patched metric against the same hooks on transformers in float32: logits of size 4, sums in another order."""

BOOTSTRAP = 0.04
"""An end of an interval from 5000 draws, twice: each has a standard error of 0.007 where the mean's is 0.18."""
LENS_F32 = 2e-5
"""Nats and probabilities of a lens on a tiny model against transformers: logits of unit scale, sums of 512 terms."""

TRAINED_F32 = 1e-5
"""Weights after three steps of Adam at 0.01 against torch's optimiser: its division by the root of squared slopes
turns their last bits into parts of a step where they are near zero."""

FITTED = 1e-6
"""Chances of pairs from odds that were fitted to usages until these were right to 1e-9."""

EMBEDDED_LOSS_F32 = 1e-5
"""Nats a token of the embedded model: with a cache or without, padded or alone, means of some tens of tokens."""

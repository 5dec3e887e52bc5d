"""Many edited runs at once, none of them doing what another, or the run without edits, has done already.

A run is cut into halves of layers. Half 2l is the attention of layer l, half 2l + 1 its experts, half 2L what comes
after the last layer. A case (one prompt with its edits) differs from its prompt's own run in a stretch of columns that
begins at its first edit and grows with the attention; only these columns are computed, and of them only those that the
last token can still see. The columns of all cases of a half go through the transformer's parts together.
"""

"""The `@triton.jit` functions of the `triton` backend, imported on first use.

`product` holds `Y = gather(X) · Wᵀ` and its transpose, `gradient` the weight gradient and the block scores. Both are
implicit GEMMs over channels-last activations: a tile's rows are positions `(n, h, w)`, its columns one channel block
of one tap, and a tap is an offset and a mask. Linear is the case of one tap that fits everywhere.
"""

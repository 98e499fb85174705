"""Products of rows with a frozen weight, and masks of the rows.

In reading order:

frozen_weight   x W0^T and its gradient for a dense or packed W0, a slice of W0 at a time
dropout_mask    masks of dropout that are drawn again from a seed
"""

"""The benchmark of block-sparse matrix products: cases, goals, operands, contenders, and what a result must be."""

"""Block-sparse matrix products: the public functions, the BSR format, pruning, and the implementations."""

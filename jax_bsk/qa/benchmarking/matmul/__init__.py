"""The benchmark of block-sparse matrix products: cases, contenders, check, measurement, report, suite.

`benchmarks/matmul.py` and `python -m jax_bsk bench-matmul` run it.
"""

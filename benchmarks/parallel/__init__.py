"""The benchmark of several devices: its cases, how they are split, what is measured; `benchmarks/scaling.py` runs it."""

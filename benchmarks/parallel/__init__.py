"""The benchmark of several devices: cases, layouts, measurements and a model; `benchmarks/scaling.py` runs it."""

"""The attention benchmark: cases, goals, contenders, check, measurement, report; `benchmarks/attention.py` runs it."""

"""The forward benchmark: cases and goals, contenders, check, measurement, report. `benchmarks/attention.py` runs it."""

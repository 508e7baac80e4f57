"""What the commands and the benchmarks share: versions and devices, progress, tables in plain text."""

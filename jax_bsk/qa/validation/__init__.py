"""`python -m jax_bsk validate`: whether jax_bsk is right, safe and fast on this machine, with a report to show.

Seven stages, each a module with `run(settings, clock, progress)` and each in a process of its own (`runner`), so that a
stage that crashes or hangs fails alone. What they find are `outcome.Check`s; `report` puts them together. Not on the
path of a call.
"""

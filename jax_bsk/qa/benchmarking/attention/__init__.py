"""The attention benchmark: patterns and cases, goals, passes, contenders, and what a result must be."""

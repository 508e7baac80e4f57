"""Builders: from a lazy mask, index lists or scores to the arrays of block lists, on the host or inside a trace."""

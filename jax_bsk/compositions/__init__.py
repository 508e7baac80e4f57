"""Attention functions that select their blocks themselves: native sparse attention (NSA) and SparseK attention."""

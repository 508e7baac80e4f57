"""Functions made of selections and attention: native sparse attention (NSA) and SparseK attention."""

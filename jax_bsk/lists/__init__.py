"""Native calls on block lists: the transpose, and the choice of blocks by scores."""

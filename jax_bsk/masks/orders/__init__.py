"""The two orders of block lists, query-major and key-major, and the permutations between them."""

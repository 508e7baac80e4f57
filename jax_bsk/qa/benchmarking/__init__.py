"""One benchmark suite: every contender of a case is checked, then all are timed in turn, then reported.

`suite` does that for any operation; `attention` and `matmul` say what is measured: cases, operands, contenders, what a
result must be. `report` and `plots` show what came of it.
"""

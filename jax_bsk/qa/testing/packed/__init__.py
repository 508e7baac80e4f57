"""The test kit of packed sequences: cases and what judges them, as that of attention a level above.

A case's layout is data: where sequences begin is an argument of the jitted program, and draws of one shape share it.
"""

"""Numeric test kit of decoding: cases, oracle, and one battery for every implementation.

As `jax_bsk.qa.testing` is for attention, with which it shares judgements and the module of tolerance rules.
"""

from jax_bsk.qa.testing.decode.battery import judge_case as judge_case
from jax_bsk.qa.testing.decode.battery import run_case as run_case
from jax_bsk.qa.testing.decode.cases import CORNER_CASES as CORNER_CASES
from jax_bsk.qa.testing.decode.cases import Case as Case
from jax_bsk.qa.testing.decode.cases import random_case as random_case

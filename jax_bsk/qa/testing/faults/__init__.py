"""The fault table as runnable scenarios: what must happen when something is wrong with a call.

Not on the path of a call. Shared by the tests and by validation on other machines;
`python -m jax_bsk.qa.testing.faults` runs scenarios by name. One module a group of rows; each scenario ends with a
valid call that must be right.
"""

from jax_bsk.qa.testing.faults.scenario import Scenario as Scenario
from jax_bsk.qa.testing.faults.table import SCENARIOS as SCENARIOS
from jax_bsk.qa.testing.faults.table import Outcome as Outcome
from jax_bsk.qa.testing.faults.table import run_all_in_subprocesses as run_all_in_subprocesses

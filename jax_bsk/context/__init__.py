"""Context parallelism: attention over a sequence that is sharded over devices.

`sparse_attention` does it by itself wherever its query is sharded along the sequence. Here is what balances it and says
what it costs: `plan` orders the tokens so that the devices have equal work, `describe` counts work and bytes per
device.
"""

from jax_bsk.context.description import Description, describe
from jax_bsk.context.planning import Plan, plan

__all__ = ["Description", "Plan", "describe", "plan"]

"""What the benchmark of matrix products measures: operations, sizes, and the cases of a run. Data, no measuring."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

from jax_bsk.flops import of_product

# Calls so short that their dispatch counts are chained in one program, each fed by the one before.
CHAINED_CALLS, LARGEST_CHAINED = 10, 4096


class Operation(enum.Enum):
    """One product; the value is its name on the command line and in files. W is sparse, all matrices are square."""

    FORWARD = "forward"  # Y = W X
    LAYER = "layer"  # Y = X W
    DENSE_GRADIENT = "dx"  # of X in Y = W X: W^T dY
    DATA_GRADIENT = "ddata"  # of W's blocks in Y = W X: dY X^T at the stored blocks

    @property
    def formula(self) -> str:
        """For headings."""
        return {
            Operation.FORWARD: "Y = W X",
            Operation.LAYER: "Y = X W",
            Operation.DENSE_GRADIENT: "dX = W^T dY",
            Operation.DATA_GRADIENT: "dW = dY X^T at the stored blocks",
        }[self]

    @property
    def chains(self) -> bool:
        """Whether a result can be the next call's operand."""
        return self is not Operation.DATA_GRADIENT


@dataclasses.dataclass(frozen=True)
class Config:
    """One sparse matrix with its dense operands.

    Attributes:
      size: M = N = K.
      sparsity: share of the blocks that are not stored.
      block: rows and columns of a block.
      dtype: of every operand and result.
    """

    size: int
    sparsity: float
    block: int
    dtype: str

    @property
    def stored_blocks(self) -> int:
        """To half a block what the sparsity asks for."""
        return round((1 - self.sparsity) * (self.size // self.block) ** 2)

    @property
    def density(self) -> float:
        """Stored blocks / all blocks, as it came out."""
        return self.stored_blocks / (self.size // self.block) ** 2

    @property
    def useful_flops(self) -> float:
        """Multiplications and additions with stored numbers, the same in every operation."""
        return of_product(self.size**2 * self.density, self.size)


@dataclasses.dataclass(frozen=True)
class Case:
    """An operation with a matrix.

    Attributes:
      config: sizes and pattern.
      operation: what is computed.
      calls: chained in one program; 1 measures single calls.
    """

    config: Config
    operation: Operation
    calls: int = 1

    @property
    def name(self) -> str:
        c = self.config
        return f"{self.operation.value} {c.size} sparsity {c.sparsity:g} block {c.block} {c.dtype}"

    @property
    def useful_flops(self) -> float:
        return self.config.useful_flops

    @property
    def kind(self) -> tuple[Operation, str]:
        """What else cases share whose speed can be compared."""
        return self.operation, self.config.dtype

    @property
    def facts(self) -> dict[str, Any]:
        """What a record says of its case, also where nothing could be measured."""
        return {"name": self.name, "operation": self.operation.value, **dataclasses.asdict(self.config)}


@dataclasses.dataclass(frozen=True)
class Grid:
    """Which cases a run has where no option says otherwise.

    Attributes:
      sizes, sparsities, blocks, dtypes: all combinations.
      operations: at every size.
      more: further operations at `more_sizes`.
      chained: whether short calls are chained.
    """

    sizes: Sequence[int]
    sparsities: Sequence[float]
    blocks: Sequence[int]
    dtypes: Sequence[str]
    operations: Sequence[Operation]
    more: Sequence[Operation] = ()
    more_sizes: Sequence[int] = ()
    chained: bool = False

    def cases(self) -> list[Case]:
        """Smallest first, the operations of one matrix beside each other."""
        found = []
        for size in sorted(self.sizes):
            operations = [*self.operations, *(self.more if size in self.more_sizes else ())]
            for dtype in self.dtypes:
                for block in self.blocks:
                    for sparsity in self.sparsities:
                        config = Config(size, sparsity, block, dtype)
                        found += [self._case(config, operation) for operation in dict.fromkeys(operations)]
        return found

    def _case(self, config: Config, operation: Operation) -> Case:
        short = self.chained and operation.chains and config.size <= LARGEST_CHAINED
        return Case(config, operation, CHAINED_CALLS if short else 1)


_REST = (Operation.LAYER, Operation.DENSE_GRADIENT, Operation.DATA_GRADIENT)
GPU = Grid(
    sizes=(4096, 8192, 16384, 32768),
    sparsities=(0.5, 0.7, 0.78, 0.9),
    blocks=(64, 128),
    dtypes=("bfloat16",),
    operations=(Operation.FORWARD,),
    more=_REST,
    more_sizes=(8192,),
    chained=True,
)
GPU_QUICK = dataclasses.replace(
    GPU, sizes=(4096,), sparsities=(0.78,), blocks=(128,), operations=tuple(Operation), more=()
)
CPU = Grid((1024, 2048), (0.78,), (64,), ("float32", "bfloat16"), tuple(Operation))
# Large enough that arithmetic takes most of the time, so that ratios tell something: 13 s of processor time.
CPU_QUICK = dataclasses.replace(CPU, sizes=(1024,), sparsities=(0.5, 0.9), dtypes=("float32",))

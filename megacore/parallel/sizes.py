"""The sizes of the four kinds of parallelism, and whether they fit the number of processes."""

from __future__ import annotations

from dataclasses import dataclass

from megacore.errors import LayoutError


@dataclass(frozen=True, kw_only=True)
class ParallelSizes:
    """The sizes of the axes that processes are laid out on, the slowest first: pp, dp_replicate, dp_shard, tp.

    Attributes:
        pp: Pipeline-parallel size: processes that hold different layers.
        dp_replicate: Data-parallel groups, each with a whole copy of the parameters.
        dp_shard: Data-parallel processes of such a group, each with a part of its copy.
        tp: Tensor-parallel size: processes that share each layer.
        sequence_parallel: True if, between the parallel layers, each tensor-parallel process holds a slice of the
            sequence instead of all of it (Korthikanti et al., 2022, arXiv:2205.05198).
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    sequence_parallel: bool = False

    @property
    def dp(self) -> int:
        """Return the data-parallel size: the number of processes that see different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def world(self) -> int:
        """Return the number of all processes."""
        return self.pp * self.dp * self.tp

    @classmethod
    def of_world(
        cls,
        world: int,
        *,
        tp: int = 1,
        pp: int = 1,
        dp_shard: int | None = 1,
        sequence_parallel: bool = False,
    ) -> ParallelSizes:
        """Return the sizes of ``world`` processes at ``tp`` and ``pp``; the rest is data-parallel.

        Args:
            world: Number of processes.
            tp: Tensor-parallel size.
            pp: Pipeline-parallel size.
            dp_shard: Number of processes that share a copy of the parameters; ``None`` for all data-parallel ones.
            sequence_parallel: The attribute of that name.

        Raises:
            LayoutError: When the sizes do not fit, with those that would.
        """
        if world % (tp * pp):
            raise LayoutError(
                f"{_processes(world)} cannot be laid out as tp {tp} × pp {pp}, which takes a multiple of {tp * pp}. "
                f"Start {_multiples(tp * pp)} …, or {_choice(world)}"
            )
        dp = world // (tp * pp)
        shard = dp if dp_shard is None else dp_shard
        if dp % shard:
            fitting = [str(size) for size in range(1, dp + 1) if dp % size == 0]
            raise LayoutError(
                f"{world} processes at tp {tp} × pp {pp} leave a data-parallel size of {dp}, which shards of {shard} "
                f"processes do not divide. Sizes of a shard that would: {', '.join(fitting)}"
            )
        return cls(pp=pp, dp_replicate=dp // shard, dp_shard=shard, tp=tp, sequence_parallel=sequence_parallel)

    def check_world(self, world: int) -> None:
        """Refuse a world of another size than these sizes take.

        Raises:
            LayoutError: When it has, with the number that is needed and the sizes that would fit.
        """
        if world == self.world:
            return
        raise LayoutError(
            f"{_processes(world)} {'was' if world == 1 else 'were'} started for {self}, which takes {self.world}. "
            f"Start {self.world}, or {_choice(world)}"
        )

    def __str__(self) -> str:
        named = {"tp": self.tp, "pp": self.pp, "dp": self.dp}
        return " × ".join(f"{name} {size}" for name, size in named.items() if size > 1 or name == "tp")


def _processes(number: int) -> str:
    return "1 process" if number == 1 else f"{number} processes"


def _multiples(number: int) -> str:
    return ", ".join(str(number * times) for times in (1, 2, 3))


def _choice(world: int) -> str:
    """Return advice on the sizes that fit ``world`` processes."""
    if world == 1:
        return "choose tp 1 and pp 1"
    *some, last = [str(size) for size in range(1, world + 1) if world % size == 0]
    return f"choose tp and pp so that tp × pp is {', '.join(some)} or {last}; the rest is data-parallel"

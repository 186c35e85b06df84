"""The processes that torchrun started for one run: each one's share of the work, and what they tell each other.

A process alone is `Ranks()`, whose operations give back what they are given, so that nobody else has to ask how many there are.
Sums and copies pass through torch.distributed, NCCL for tensors on GPUs and gloo for all others. Any rank may end at any
moment, with an error or without a word: the others learn it from torchrun's SIGTERM, from a broken connection or from the store
that all can read, and one of them says why. No model and no algorithm here.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NamedTuple

import torch

from leanquant.errors import InputError

TIMEOUT = timedelta(hours=6)  # for ranks to meet: more than the first takes for the widest Hessian; one that has ended is seen before
LOOK = 0.2  # seconds between looks at whether a rank that is waited for has ended
GRACE = 5.0  # seconds that ranks are given to say why they end


class RankLost(Exception):
    """Another rank has ended or cannot be reached."""


class Ending(NamedTuple):
    """Why a rank ends: its exit code, a sentence, and whether that is of its own, not because of other ranks or a signal."""

    code: int
    what: str = ""
    is_cause: bool = False


@dataclass(frozen=True)
class Ranks:
    """This process is number `rank` of `size`, and number `local_rank` of the `local_size` on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    store: object = field(default=None, repr=False, compare=False)

    @classmethod
    def join(cls) -> "Ranks":
        """All processes that torchrun started, once they are there; without torchrun this process alone."""
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
            return cls()
        # Else a thread of NCCL's ends the process without a word where a rank is lost: so `_meet` gets the error.
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
        os.environ.setdefault("NCCL_ALGO", "^NVLS")  # whose sums may differ from run to run
        store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
        store = dist.PrefixStore(f"leanquant-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        return cls(rank, size, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]), store)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    # --- shares ---

    def device(self, wanted: torch.device) -> torch.device:
        """`wanted`, or this rank's own GPU for `cuda`. Raises InputError if there are not enough."""
        if self.size == 1 or wanted.type != "cuda":
            return wanted
        if wanted.index is not None:
            raise InputError(f"{wanted} is one GPU and there are {self.size} ranks: give cuda, which is a GPU for each, or cpu")
        if self.local_size > torch.cuda.device_count():
            raise InputError(
                f"{self.local_size} ranks on a machine with {torch.cuda.device_count()} GPUs: "
                f"give torchrun --nproc_per_node={torch.cuda.device_count()}, or --device cpu"
            )
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        return device

    def second_device(self, device: torch.device) -> torch.device:
        """A GPU beside `device` that no rank of this machine computes on, if there is one for each of them; else the CPU."""
        taken = {device.index or 0} if self.size == 1 else set(range(self.local_size))
        others = [i for i in range(torch.cuda.device_count()) if i not in taken]
        return torch.device("cuda", others[self.local_rank]) if len(others) >= self.local_size else torch.device("cpu")

    def _bounds(self, count: int) -> list[int]:
        return [count * rank // self.size for rank in range(self.size + 1)]

    def rows(self, count: int) -> slice:
        """This rank's share of `count` rows. A rank without any works on the first one, for nothing, and needs no special case."""
        start, stop = self._bounds(count)[self.rank : self.rank + 2]
        return slice(start, stop) if stop > start else slice(0, 1)

    # --- meetings: every rank calls these in the same order ---

    def _meet(self, start: Callable) -> None:
        """Wait until the collective that `start` begins is done. Raises RankLost if it cannot be.

        Asked for, not slept for: a process that sleeps in a collective does not see SIGTERM.
        """
        try:
            work, began, looked = start(), time.monotonic(), 0.0
            while not work.is_completed():
                time.sleep(2e-4)
                waited = time.monotonic() - began
                if waited > TIMEOUT.total_seconds():
                    raise RankLost(f"other ranks have not come within {TIMEOUT}")
                if waited > looked + LOOK:
                    if self.store.check(["ended"]):
                        raise RankLost("another rank has ended")
                    looked = waited
            work.wait()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RankLost(f"the ranks have lost each other ({str(error).strip().splitlines()[0]})") from None

    def sum_(self, *tensors: torch.Tensor | None) -> None:
        """Replace each tensor by its sum over the ranks."""
        if self.size > 1:
            import torch.distributed as dist

            for tensor in tensors:
                if tensor is not None:
                    self._meet(lambda tensor=tensor: dist.all_reduce(tensor, async_op=True))

    def each(self, number: int) -> list[int]:
        """Every rank's number."""
        numbers = torch.zeros(self.size, dtype=torch.int64)
        numbers[self.rank] = number
        self.sum_(numbers)
        return numbers.tolist()

    def total(self, number: int) -> int:
        """The sum of the ranks' numbers."""
        return sum(self.each(number))

    def barrier(self) -> None:
        self.total(0)

    def copy_first_(self, *tensors: torch.Tensor) -> None:
        """Give each tensor the values that it has on rank 0."""
        if self.size > 1:
            import torch.distributed as dist

            for tensor in tensors:
                self._meet(lambda tensor=tensor: dist.broadcast(tensor, 0, async_op=True))

    def from_first(self, compute: Callable):
        """What `compute` returns on rank 0, which alone calls it: what JSON can hold, lists for tuples."""
        if self.size == 1:
            return compute()
        text = json.dumps(compute()).encode() if self.is_first else b""
        letters = torch.empty(self.total(len(text)), dtype=torch.uint8)
        if self.is_first:
            letters.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        self.copy_first_(letters)
        return json.loads(letters.numpy().tobytes())

    def gather_rows(self, parts, count: int):
        """Tensors of `count` rows, of which each rank has its `rows`; `parts` is one tensor, None, or a named tuple of such."""
        if self.size == 1 or parts is None:
            return parts
        if isinstance(parts, tuple):
            return type(parts)(*(self.gather_rows(part, count) for part in parts))
        import torch.distributed as dist

        bounds = self._bounds(count)
        sizes = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
        mine = parts.new_zeros(max(sizes), *parts.shape[1:])
        mine[: sizes[self.rank]] = parts[: sizes[self.rank]]
        everyone = mine.new_empty(self.size, *mine.shape)
        as_bytes = lambda tensor: tensor.view(-1).view(torch.uint8)  # noqa: E731
        self._meet(lambda: dist.all_gather([as_bytes(rows) for rows in everyone], as_bytes(mine), async_op=True))
        return torch.cat([rows[:size] for rows, size in zip(everyone, sizes, strict=True)])

    # --- the end ---

    def part(self) -> None:
        """After the last meeting."""
        if self.size > 1:
            import torch.distributed as dist

            self.barrier()
            dist.destroy_process_group()

    def leave(self, ending: Ending, kept: str = "") -> int:
        """End this process, which heeds no signals any more: say why, once for all ranks. kept: what remains of the run. Returns
        the exit code.

        Rank 0 speaks, after it has heard the others; where it has ended without a word, the first that is left.
        """
        if self.size == 1:
            return _say(ending, kept)
        if ending == Ending(0):
            self._tell(ending)
            return 0
        with suppress(RuntimeError):  # torchrun, which keeps the store, may be gone
            self.store.set("ended", "")
            ending = self._verdict(ending) if self.is_first else self._echo(ending)
        _say(ending, kept)
        if self.is_first:
            self._tell(ending)
        sys.stdout.flush()
        os._exit(ending.code)  # a collective in flight cannot be taken back

    def _tell(self, ending: Ending) -> None:
        with suppress(RuntimeError):
            self.store.set(f"ended/{self.rank}", json.dumps(ending))

    def _heard(self, ranks, seconds: float) -> dict[int, Ending]:
        """What those of `ranks` say that say something within so many seconds."""
        ranks, heard, deadline = list(ranks), {}, time.monotonic() + seconds
        while True:
            for rank in ranks:
                if rank not in heard and self.store.check([f"ended/{rank}"]):
                    heard[rank] = Ending(*json.loads(self.store.get(f"ended/{rank}")))
            if len(heard) == len(ranks) or time.monotonic() > deadline:
                return heard
            time.sleep(0.02)

    def _verdict(self, mine: Ending) -> Ending:
        """Rank 0: why the run ends."""
        if mine.is_cause:
            return mine
        heard = self._heard(range(1, self.size), GRACE)
        for rank, ending in heard.items():
            if ending.is_cause:
                return ending._replace(what=f"rank {rank} ended: {ending.what}")
        silent = [str(rank) for rank in range(1, self.size) if rank not in heard]
        if silent:
            return Ending(1, f"{'rank' if len(silent) == 1 else 'ranks'} {', '.join(silent)} ended without a message (killed?)")
        return next((ending for ending in heard.values() if ending.code == 130), mine)

    def _echo(self, mine: Ending) -> Ending:
        """Another rank: rank 0's exit code, and nothing to say unless rank 0 has ended without a word."""
        self._tell(mine)
        if first := self._heard([0], 2 * GRACE):
            return first[0]._replace(what="")
        heard = self._heard(range(1, self.size), 0) | {self.rank: mine}
        if self.rank > min(heard) or any(ending.is_cause for ending in heard.values()):  # then rank 0 lives, and will hear of it
            return mine._replace(what="")
        return Ending(1, "rank 0 ended without a message (killed?)")


def _say(ending: Ending, kept: str) -> int:
    if ending.what:
        prefix = "" if ending.code == 130 else "error: "
        with suppress(BrokenPipeError):  # nobody reads that either
            print(f"{prefix}{ending.what}{kept}", file=sys.stderr, flush=True)
    return ending.code

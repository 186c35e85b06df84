"""Where the hidden states of the calibration text wait between passes: on the device, in host memory, or in files.

The same numbers in all three places, so that a run writes the same bytes wherever they wait. Files are two generations of all
streams: a pass reads one and writes the other, which is also what the journal needs to go on with (journal.py). Batches come
one ahead: the next is read or copied while the device works on this one. (Files are read with preadv, not mapped into memory: a read
error of a mapped file kills the process.) Several ranks (ranks.py) hold some of the sequences each,
and their files hold all, so that the number of ranks may change when a run goes on. No model here.
Legend: n sequences, T tokens a sequence, B sequences a batch, D hidden size.
"""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from leanquant.errors import InputError
from ranks import Ranks

KINDS = ("device", "host", "disk")
STAMP_BYTES = 8  # behind a finished generation: the number of layers that it has passed
PIECE_BYTES = 2**24  # copied at a time
BLOCK_BYTES = 2**26  # of memory for what is kept; what of it is not written to takes none


def live_file(folder: Path, generation: int) -> Path:
    """A generation of the live activations in the working folder of a run."""
    return folder / f"live-{generation}.bin"


def open_file(path: Path):
    """`path`, unbuffered, to be read and written, with what it holds; made if it is not there."""
    return open(path, "r+b", buffering=0, opener=lambda path, flags: os.open(path, flags | os.O_CREAT, 0o644))


def save(live: list["Activations"], folder: Path, saved: int, layers: int, ranks: Ranks) -> int:
    """Make the streams `live`, which have passed `layers` layers, a generation that a killed run can go on with. Returns which;
    generation `saved` is left alone. Each rank writes its sequences, the first one the stamp when all have done so."""
    assert len({stream.generation for stream in live if stream.on_disk}) < 2, "streams have passed differently often"
    generation, size = live[0].generation if live[0].on_disk else 1 - saved, sum(stream.file_bytes for stream in live)
    with open_file(live_file(folder, generation)) as file:
        if ranks.is_first and os.fstat(file.fileno()).st_size > size:
            file.truncate(size)  # without its stamp it is no generation
        ranks.barrier()
        for stream, place in zip(live, places(live), strict=True):
            file.seek(place)
            stream.save_into(file)
        os.fsync(file.fileno())
        ranks.barrier()
        if ranks.is_first:
            file.seek(size)
            file.write(layers.to_bytes(STAMP_BYTES, "little"))
            os.fsync(file.fileno())
    return generation


def places(live: list["Activations"]) -> list[int]:
    """Where in the file of a generation the sequences of each stream of `live` begin that this rank has."""
    before = itertools.accumulate((stream.file_bytes for stream in live), initial=0)
    return [start + stream.file_offset for start, stream in zip(before, live, strict=False)]


def stamp_of(file: Path) -> int:
    """The number of layers that a finished generation has passed."""
    with open(file, "rb") as f:
        f.seek(-STAMP_BYTES, os.SEEK_END)
        return int.from_bytes(f.read(STAMP_BYTES), "little")


def mapped(function: Callable, nested):
    """`nested`, a module's output, with `function` of each of its tensors: a tensor, anything else, or nested tuples of them."""
    if isinstance(nested, tuple):
        return tuple(mapped(function, part) for part in nested)
    return function(nested) if isinstance(nested, torch.Tensor | Kept) else nested


@dataclass(frozen=True)
class Kept:
    """A tensor in a file."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True)
class Place:
    """Where activations wait that `device` computes with. kind: one of KINDS. folder: of the files, if it is "disk"; there the
    generation `saved` is not written over at first. ranks: those that hold the rest of the sequences."""

    kind: str
    device: torch.device
    folder: Path | None = None
    saved: int = 1
    ranks: Ranks = field(default_factory=Ranks)

    def activations(self, shape: tuple[int, int, int], dtype: torch.dtype, streams: int = 1) -> "Activations":
        """Room for [n, T, D], uninitialised, for the first of so many streams of that size."""
        total = self.ranks.total(shape[0])
        share = self.ranks.rows(total).start, total
        if self.kind == "disk":
            return OnDisk(_Files(self, streams), 0, shape, dtype, share)
        where = self.device if self.kind == "device" else torch.device("cpu")
        tensor = torch.empty(shape, dtype=dtype, device=where, pin_memory=where != self.device)
        return InMemory(tensor, _Conveyor(self.device), share)


class Activations:
    """Hidden states [n, T, D] and what is kept with them. `commit` ends a pass that has stored every sequence anew.

    Subclasses have `read` and `write` of some sequences, `keep` and `recall` of a tensor, `forget` all that is kept, `commit`,
    `twin`, and for the journal `save_into` and `restore_from` the file of a generation, which holds all ranks' sequences of a stream
    after one another: `share` are how many come before these, and how many there are (unset: these are all).
    """

    on_disk = False

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, conveyor: "_Conveyor", share: tuple[int, int] | None):
        self.shape, self.dtype, self.conveyor, self.share = torch.Size(shape), dtype, conveyor, share or (0, shape[0])
        self.nbytes = self.shape.numel() * dtype.itemsize
        self.row_bytes = self.nbytes // shape[0]
        self.file_offset, self.file_bytes = (count * self.row_bytes for count in self.share)

    def batches(self, load: Callable[[int], object], count: int) -> Iterator:
        """load(0) to load(count - 1), nested tensors, on the device, each begun before the one before it is used up."""
        waiting = deque()
        for number in range(count):
            waiting.append(self.conveyor.begin(load, number, self.on_disk))
            if len(waiting) == 2:
                yield self.conveyor.end(waiting.popleft())
        while waiting:
            yield self.conveyor.end(waiting.popleft())

    def finish(self) -> None:
        """Wait for what was begun to be written or kept. Raises what went wrong on the way."""
        self.conveyor.finish()

    def spans(self, size: int, first: int = 0) -> list[slice]:
        """The sequences from `first` on, by batches of `size`."""
        return [slice(start, min(start + size, self.shape[0])) for start in range(first, self.shape[0], size)]

    def pieces(self) -> list[slice]:
        """All sequences, by as many as are copied at a time."""
        return self.spans(max(1, PIECE_BYTES * self.shape[0] // max(1, self.nbytes)))

    def whole(self) -> torch.Tensor:
        """All of it in memory."""
        return torch.cat([self.read(rows) for rows in self.pieces()])


class InMemory(Activations):
    """In one tensor, which each pass changes in place."""

    def __init__(self, tensor: torch.Tensor, conveyor: "_Conveyor", share: tuple[int, int] | None = None):
        super().__init__(tensor.shape, tensor.dtype, conveyor, share)
        self.tensor, self._room = tensor, _Room()

    def read(self, rows: slice) -> torch.Tensor:
        return self.tensor[rows]

    def write(self, rows: slice, batch: torch.Tensor) -> None:
        self.conveyor.copy(self.tensor[rows], batch)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "cpu":
            return self._room.take(tensor.shape, tensor.dtype).copy_(tensor)
        if tensor.device.type == self.tensor.device.type:
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self.conveyor.copy(host, tensor)
        return host

    def recall(self, kept: torch.Tensor) -> torch.Tensor:
        return kept

    def forget(self) -> None:
        self._room = _Room()

    def commit(self) -> None:
        self.finish()

    def twin(self) -> "InMemory":
        tensor = torch.empty_like(self.tensor, pin_memory=self.tensor.is_pinned()).copy_(self.tensor)
        return InMemory(tensor, self.conveyor, self.share)

    def whole(self) -> torch.Tensor:
        return self.tensor

    def save_into(self, file) -> None:
        for rows in self.pieces():
            write_all(file, self.tensor[rows].cpu())

    def restore_from(self, file, generation: int) -> bool:
        """Read from where `file` stands; False if it ends too early."""
        for rows in self.pieces():
            piece = torch.empty(self.tensor[rows].shape, dtype=self.dtype)
            if file.readinto(bytes_of(piece)) != piece.nbytes:
                return False
            self.tensor[rows] = piece
        return True


class _Room:
    """Host memory for many tensors, in blocks so large that the system gets each back once it is free: allocated one by one they would lie
    between other things, and the heap would keep growing around what they leave."""

    def __init__(self):
        self._block, self._used = torch.empty(0, dtype=torch.uint8), 0

    def take(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        size = shape.numel() * dtype.itemsize
        if self._used + size > len(self._block):
            self._block, self._used = torch.empty(max(BLOCK_BYTES, size), dtype=torch.uint8), 0
        found = self._block[self._used : self._used + size].view(dtype).view(shape)
        self._used += -(-size // 64) * 64
        return found


class OnDisk(Activations):
    """In two files in turn: one generation is read, the other written. Memory holds a few batches."""

    on_disk = True

    def __init__(self, files: "_Files", number: int, shape: tuple[int, int, int], dtype: torch.dtype, share: tuple[int, int]):
        super().__init__(shape, dtype, files.conveyor, share)
        files.allocate(self.file_bytes)
        self.files, self.offset, self.number = files, number * self.file_bytes + self.file_offset, number
        self.generation = files.saved
        self._kept_bytes = 0

    def read(self, rows: slice) -> torch.Tensor:
        shape = (rows.stop - rows.start, *self.shape[1:])
        return self.files.read(self.files.live[self.generation], self.offset + rows.start * self.row_bytes, shape, self.dtype)

    def write(self, rows: slice, batch: torch.Tensor) -> None:
        file = self.files.live[1 - self.generation]
        file.truncate(self.files.size)  # without its stamp it is no generation to go on with
        self.files.write(file, self.offset + rows.start * self.row_bytes, batch.to(self.dtype))

    def keep(self, tensor: torch.Tensor) -> Kept:
        kept = Kept(self._kept_bytes, tensor.shape, tensor.dtype)
        self._kept_bytes += tensor.nbytes
        self.files.write(self.files.kept[self.number], kept.offset, tensor)
        return kept

    def recall(self, kept: Kept) -> torch.Tensor:
        return self.files.read(self.files.kept[self.number], kept.offset, kept.shape, kept.dtype)

    def forget(self) -> None:
        self._kept_bytes = 0

    def commit(self) -> None:
        self.finish()
        self.generation = 1 - self.generation

    def twin(self) -> "OnDisk":
        other = OnDisk(self.files, self.number + 1, self.shape, self.dtype, self.share)
        other.generation = 1 - self.generation
        for rows in self.pieces():
            other.write(rows, self.read(rows))
        other.commit()
        return other

    def save_into(self, file) -> None:
        pass  # it is there

    def restore_from(self, file, generation: int) -> bool:
        self.generation = generation
        return True


class _Files:
    """The files of all streams: two generations, `live`, and what each stream keeps for a layer, `kept`."""

    def __init__(self, place: Place, streams: int):
        self.conveyor, self.streams, self.saved, self.size = _Conveyor(place.device), streams, place.saved, 0
        self._ranks = place.ranks
        self._pinned = place.device.type == "cuda"
        names = [
            live_file(place.folder, 0),
            live_file(place.folder, 1),
            *(place.folder / f"kept-{number}-{place.ranks.rank}.bin" for number in range(streams)),
        ]
        files = [open_file(name) for name in names]
        self.live, self.kept = files[:2], files[2:]

    def allocate(self, stream_bytes: int) -> None:
        """Claim the room now that a run will need: a disk that is too full says so before the work."""
        if not self.size:
            self.size = self.streams * stream_bytes
            for file in self.live if self._ranks.is_first else ():
                if os.fstat(file.fileno()).st_size not in (self.size, self.size + STAMP_BYTES):
                    file.truncate(0)
                os.posix_fallocate(file.fileno(), 0, self.size)
            self._ranks.barrier()

    def read(self, file, offset: int, shape, dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype, pin_memory=self._pinned)
        view = bytes_of(tensor)
        while len(view):
            try:
                count = os.preadv(file.fileno(), [view], offset)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(file.name)) from None
            if not count:
                raise InputError(f"{file.name} ends too early: it was changed under the run")
            view, offset = view[count:], offset + count
        return tensor

    def write(self, file, offset: int, tensor: torch.Tensor) -> None:
        """Begin to write `tensor`, which nobody may change."""

        def put(tensor: torch.Tensor) -> None:
            view, position = bytes_of(tensor.contiguous()), offset
            while len(view):
                count = os.pwrite(file.fileno(), view, position)
                view, position = view[count:], position + count

        self.conveyor.write(tensor, put)


def helper_thread(name: str) -> ThreadPoolExecutor:
    """One thread for what happens beside the computation, whose own torch operations take one core.

    With as many as the main thread takes, OpenMP would hold more threads than there are cores, and from then on put the main
    thread's to sleep at every barrier: a run of small operations takes twice the time (two cores).
    """
    torch.get_num_threads()  # the main thread's number is fixed when it is first asked for, and would be the helper's after it
    return ThreadPoolExecutor(1, name, initializer=torch.set_num_threads, initargs=(1,))


class _Conveyor:
    """Copies between where activations wait and the device, beside the device's work.

    To and from a GPU on a CUDA stream of its own, to and from files in one thread: in either, things happen in the order in which
    they were begun.
    """

    def __init__(self, device: torch.device):
        self._device, self._writing = device, None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = helper_thread("activations")

    def begin(self, load: Callable[[int], object], number: int, in_thread: bool):
        return self._thread.submit(self._arrive, load, number) if in_thread else self._arrive(load, number)

    def end(self, arriving):
        nested, event = arriving.result() if isinstance(arriving, Future) else arriving
        if event is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(event)
            mapped(lambda tensor: tensor.record_stream(current), nested)
        return nested

    def _arrive(self, load: Callable[[int], object], number: int):
        nested = load(number)
        if self._stream is None:
            return nested, None
        with torch.cuda.stream(self._stream):
            nested = mapped(lambda tensor: tensor.to(self._device, non_blocking=True), nested)
            return nested, self._stream.record_event()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy into `target`; if it is host memory and the source a GPU's, beside the work that is queued after this."""
        if source.device.type == target.device.type:
            target.copy_(source)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        source.record_stream(self._stream)

    def write(self, tensor: torch.Tensor, put: Callable[[torch.Tensor], None]) -> None:
        """Begin to put `tensor`, brought to the host, into a file; at most one waits."""
        self._finish_writing()
        ready = None if self._stream is None else torch.cuda.current_stream(self._device).record_event()
        self._writing = self._thread.submit(self._depart, tensor, ready, put)

    def _depart(self, tensor: torch.Tensor, ready, put: Callable[[torch.Tensor], None]) -> None:
        if tensor.is_cuda:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(ready)
                host.copy_(tensor, non_blocking=True)
            tensor.record_stream(self._stream)
            self._stream.synchronize()
            tensor = host
        put(tensor)

    def _finish_writing(self) -> None:
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def finish(self) -> None:
        """Wait until everything that was begun is where it should be. Raises what went wrong on the way."""
        self._finish_writing()
        if self._stream is not None:
            self._stream.synchronize()


def write_all(file, tensor: torch.Tensor) -> None:
    """All bytes of a contiguous host tensor into an unbuffered `file`: one write may take only a part."""
    view = bytes_of(tensor)
    while len(view):
        view = view[file.write(view) :]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous host tensor, not copied."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())

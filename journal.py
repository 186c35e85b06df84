"""The journal of a quantization run: what it takes for a killed run to go on after its last saved layer.

It lies in the run's working folder, beside the parts that are written (leanquant.packing.ModelWriter): `journal.jsonl`, whose
first line is the run's fingerprint and each further line what was finished since the line before; and two generations of the
live activations, `live-0.bin` and `live-1.bin`, verbatim, because computing them again does not give the same bits. A line
is written only when everything it speaks of is on the disk. No model and no algorithm here.
"""

import json
import os
import time
from pathlib import Path

import torch

from leanquant.errors import InputError
from leanquant.packing import Checkpoint, part_name, sync_folder, write_synced

# A layer that is computed faster than activations are saved need not be saved at once: at most this many times the saving is lost.
PATIENCE = 4


def files_of(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """The stamp of each file of `checkpoint`, by name."""
    return {file.name: stamp for file, stamp in sorted(checkpoint.stamps.items())}


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Each entry in which two fingerprints differ, as `name: old, now new`."""
    found = []
    for name in dict.fromkeys((*old, *new)):
        before, now = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            found += differences(before, now, f"{prefix}{name}.")
        elif before != now:
            found.append(f"{prefix}{name}: {before}, now {now}")
    return found


class Journal:
    """layers: how many are finished and saved; rows: the report's rows of those; seconds: time spent on them, by phase."""

    def __init__(self, folder: Path | None, fingerprint: dict):
        """Take up the journal in `folder`, or begin one. Without a folder nothing is kept. Raises InputError if the one that is there
        belongs to another run."""
        self.folder, self.layers, self.parts, self.rows, self.seconds = folder, 0, 0, [], {}
        self._pending, self._generation, self._live, self._saved_at, self._cost = [], 0, None, time.monotonic(), 0.0
        if folder is None:
            return
        self.path = folder / "journal.jsonl"
        fingerprint = json.loads(json.dumps(fingerprint, default=str))  # as it will be read again
        lines = self._read()
        usable = [line for line in lines[1:] if self._is_there(line)]
        if usable and (changed := differences(lines[0], fingerprint)):
            what = "; ".join(changed[:4])
            raise InputError(f"{folder} holds an unfinished run that differs ({what}): finish that one, or start over with --fresh")
        if usable:
            last = usable[-1]
            self.layers, self.parts, self.seconds, self._live = last["layers"], last["parts"], last["seconds"], last["live"]
            lines = lines[: lines.index(last) + 1]
            self.rows = [row for line in lines[1:] for row in line["rows"]]
            self._generation = 1 - int(self._live["generation"]) if self._live else 0
        else:
            lines = [fingerprint]
        self._rewrite(lines)

    def _read(self) -> list[dict]:
        """The whole lines; one that was cut off by a kill is the last and left out."""
        lines = []
        if self.path.is_file():
            for text in self.path.read_text().splitlines():
                try:
                    lines.append(json.loads(text))
                except json.JSONDecodeError:
                    break
        return lines

    def _is_there(self, line: dict) -> bool:
        """Is what `line` speaks of on the disk? An older generation may have been written over, parts may be half removed."""
        live = line["live"]
        if not all((self.folder / part_name(number)).is_file() for number in range(line["parts"])):
            return False
        if live is None:
            return True
        file = self._live_file(live["generation"])
        return file.is_file() and file.stat().st_size == live["bytes"] and self._stamp(file) == line["layers"]

    def _live_file(self, generation: int) -> Path:
        return self.folder / f"live-{generation}.bin"

    @staticmethod
    def _stamp(file: Path) -> int:
        """The number of finished layers, in the last eight bytes."""
        with open(file, "rb") as f:
            f.seek(-8, os.SEEK_END)
            return int.from_bytes(f.read(8), "little")

    def _rewrite(self, lines: list[dict]) -> None:
        partial = self.path.with_name("journal.new")
        write_synced(partial, "".join(json.dumps(line) + "\n" for line in lines).encode())
        os.replace(partial, self.path)
        sync_folder(self.folder)

    def restore(self, live: list[torch.Tensor]) -> None:
        """Fill the tensors of `live` with what was saved after the last finished layer."""
        if self._live is None:
            return
        file = self._live_file(self._live["generation"])
        with open(file, "rb") as f:
            for tensor in live:
                if f.readinto(_bytes_of(tensor)) != tensor.nbytes:
                    raise InputError(f"{file} is shorter than the run needs: start over with --fresh")

    def add(self, layers: int, parts: int, rows: list[dict], seconds: dict[str, float], live: list[torch.Tensor], is_last: bool) -> None:
        """`layers` layers and `parts` parts are finished now, with the report's `rows` of the last one and `live` activations.

        Saved at once, unless that takes longer than what would be lost; after the last layer no activations are needed.
        """
        self._pending += rows
        if self.folder is None or (not is_last and time.monotonic() - self._saved_at < PATIENCE * self._cost):
            return
        start, saved = time.monotonic(), None
        if not is_last:
            saved = {"generation": self._generation, "bytes": sum(tensor.nbytes for tensor in live) + 8}
            with open(self._live_file(self._generation), "wb", buffering=0) as f:
                for tensor in live:
                    view = _bytes_of(tensor)
                    while len(view):  # one write may take only a part
                        view = view[f.write(view) :]
                f.write(layers.to_bytes(8, "little"))
                os.fsync(f.fileno())
            self._generation = 1 - self._generation
        with open(self.path, "a") as f:
            f.write(json.dumps({"layers": layers, "parts": parts, "live": saved, "seconds": seconds, "rows": self._pending}) + "\n")
            f.flush()
            os.fsync(f.fileno())
        sync_folder(self.folder)
        self.layers, self._pending, self._saved_at = layers, [], time.monotonic()
        self._cost = self._saved_at - start


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous host tensor, not copied."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())

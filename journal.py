"""The journal of a quantization run: what it takes for a killed run to go on after its last saved layer.

It lies in the run's working folder, beside the parts that are written (leanquant.packing.ModelWriter): `journal.jsonl`, whose
first line is the run's fingerprint and each further line what was finished since the line before, the last one the result, until what
comes after it is done too; and two generations of the live activations (activations.py), verbatim, because computing them again does
not give the same bits. (Random numbers are drawn from generators seeded for each use: there is no state of theirs to save.) A line is
written only when everything it speaks of is on the disk. Of several ranks the first keeps the journal. No model and no algorithm here.
"""

import json
import os
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from activations import STAMP_BYTES, Activations, helper_thread, live_file, places, save, stamp_of
from leanquant.errors import InputError
from leanquant.packing import JOURNAL, Checkpoint, part_name, sync_folder, write_synced
from ranks import Ranks

ON_THE_WAY = "on the way"  # what of a fingerprint is called so decides how a result is computed, and does not matter once it is there


def files_of(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """The stamp of each file of `checkpoint`, by name."""
    return {file.name: stamp for file, stamp in sorted(checkpoint.stamps.items())}


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Each entry in which two fingerprints differ, as `name: old, now new`."""
    found = []
    for name in dict.fromkeys((*old, *new)):
        before, now = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            found += differences(before, now, prefix if name == ON_THE_WAY else f"{prefix}{name}.")
        elif before != now:
            found.append(f"{prefix}{name}: {before}, now {now}")
    return found


def has_result(folder: Path) -> bool:
    """Has the run that works in `folder`, whichever it is, finished its result?"""
    lines = _lines(folder / JOURNAL)
    return bool(lines) and lines[-1].get("result") is not None


def _lines(path: Path) -> list[dict]:
    """The whole lines; one that was cut off by a kill is the last and left out."""
    lines = []
    if path.is_file():
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines


class Journal:
    """layers: how many are finished and saved; rows: the report's rows of those; seconds: time spent on them, by phase.

    batch_size: this rank's of the last one; 0 if there is none. result: the report of the finished result; None before.
    """

    def __init__(self, folder: Path | None, fingerprint: dict, ranks: Ranks | None = None):
        """Take up the journal in `folder`, or begin one. Without a folder nothing is kept. Raises InputError if the one that is there
        belongs to another run."""
        self.folder, self.layers, self.parts, self.rows, self.seconds = folder, 0, 0, [], {}
        self.generation = 1  # of the live activations that are saved; the other one may be written over
        self.batch_size = 0
        self.result = self._live = None
        self._ranks = ranks or Ranks()
        if folder is None:
            return
        self.path = folder / JOURNAL
        lines = self._ranks.from_first(lambda: self._take_up(json.loads(json.dumps(fingerprint, default=str))))  # as it will be read again
        if _lines(self.path) != lines:
            raise InputError(f"{self.path} is not what rank 0 has written: several machines need one folder that all see for --save_path")
        if len(lines) > 1:
            last = lines[-1]
            self.layers, self.parts, self.seconds, self._live = last["layers"], last["parts"], last["seconds"], last["live"]
            self.result = last.get("result")
            self.rows = [row for line in lines[1:] for row in line["rows"]]
            self.generation = int(self._live["generation"]) if self._live else 1
            sizes = last["batch_sizes"]  # ranks that ran out of memory go on with less than the others
            self.batch_size = sizes[self._ranks.rank] if len(sizes) == self._ranks.size else min(sizes)

    def _take_up(self, fingerprint: dict) -> list[dict]:
        """The lines that count, which are all that is left on the disk: the fingerprint and what is finished."""
        lines = _lines(self.path)
        usable = [line for line in lines[1:] if self._is_there(line)]
        complete = bool(usable) and usable[-1].get("result") is not None
        kept = {ON_THE_WAY: lines[0].get(ON_THE_WAY)} if complete else {}
        if usable and (changed := differences(lines[0], fingerprint | kept)):
            what = "; ".join(changed[:4])
            if complete:
                remedy = "finish that one, or remove the folder: the result is complete, and eval_quantized.py measures it"
                raise InputError(f"{self.folder} is of a run that differs ({what}), but for evaluation and exports finished: {remedy}")
            raise InputError(f"{self.folder} holds an unfinished run that differs ({what}): finish that one, or start over with --fresh")
        lines = lines[: lines.index(usable[-1]) + 1] if usable else [fingerprint]
        self._rewrite(lines)
        return lines

    def _is_there(self, line: dict) -> bool:
        """Is what `line` speaks of on the disk? An older generation may have been written over, parts may be half removed."""
        live = line["live"]
        if not all((self.folder / part_name(number)).is_file() for number in range(line["parts"])):
            return False
        if live is None:
            return True
        file = live_file(self.folder, live["generation"])
        return file.is_file() and file.stat().st_size == live["bytes"] and stamp_of(file) == line["layers"]

    def _rewrite(self, lines: list[dict]) -> None:
        partial = self.path.with_name("journal.new")
        write_synced(partial, "".join(json.dumps(line) + "\n" for line in lines).encode())
        os.replace(partial, self.path)
        sync_folder(self.folder)

    def restore(self, live: list[Activations]) -> None:
        """Set the streams `live` back to what was saved after the last finished layer."""
        if self._live is None:
            return
        with open(live_file(self.folder, self.generation), "rb") as file:
            for stream, place in zip(live, places(live), strict=True):
                file.seek(place)
                if not stream.restore_from(file, self.generation):
                    raise InputError(f"{file.name} is shorter than the run needs: start over with --fresh")

    def add(
        self,
        layers: int,
        parts: int,
        rows: list[dict],
        seconds: dict[str, float],
        live: list[Activations],
        is_last: bool,
        batch_size: int = 0,
    ) -> None:
        """`layers` layers and `parts` parts are finished now, with the report's `rows` of the last one and `live` activations,
        which go on in batches of `batch_size`. After the last layer no activations are needed."""
        self.rows += rows
        if self.folder is None:
            return
        saved = None
        if not is_last:
            self.generation = save(live, self.folder, self.generation, layers, self._ranks)
            saved = {"generation": self.generation, "bytes": sum(stream.file_bytes for stream in live) + STAMP_BYTES}
        sizes = self._ranks.each(batch_size)
        if self._ranks.is_first:
            self._append({"layers": layers, "parts": parts, "live": saved, "batch_sizes": sizes, "seconds": seconds, "rows": rows})
        self._ranks.barrier()
        self.layers = layers
        if is_last:
            for generation in (0, 1) if self._ranks.is_first else ():
                live_file(self.folder, generation).unlink(missing_ok=True)

    def add_result(self, report: dict) -> None:
        """The result is complete in the working folder, `report` what is known of it; parts and activations are of no use now. By the
        first rank alone."""
        if self.folder is not None:
            done = {"layers": self.layers, "parts": 0, "live": None, "batch_sizes": [0], "seconds": self.seconds, "rows": []}
            self._append(done | {"result": report})
        self.result = report

    def _append(self, line: dict) -> None:
        with open(self.path, "a") as f:
            f.write(json.dumps(line, default=str) + "\n")
            f.flush()
            os.fsync(f.fileno())
        sync_folder(self.folder)


class Saver:
    """One thread that packs and writes finished layers, in order, while the next is computed; at most one layer waits.

    A failure is raised by the next `wait`. Leaving the block waits, so that what was finished is saved also when a run ends early.
    Several ranks meet while they save: those do it at once.
    """

    def __init__(self, ranks: Ranks):
        self._thread, self._saving, self._ranks = helper_thread("saver"), None, ranks

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind, *_) -> None:
        self._thread.shutdown()
        if kind is None:
            self.wait()

    def begin(self, work: Callable, *args) -> Future:
        """Begin a piece of the layer that is being computed."""
        return self._thread.submit(work, *args)

    def finish(self, work: Callable, *args) -> None:
        """Begin what makes the layer count as finished."""
        self.wait()
        if self._ranks.size > 1:
            work(*args)
        else:
            self._saving = self._thread.submit(work, *args)

    def wait(self) -> None:
        """Until the layer before is saved: its live activations must stay as they are until then."""
        saving, self._saving = self._saving, None
        if saving:
            saving.result()

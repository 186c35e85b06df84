"""Activations that wait on the device, in host memory or in files: the same numbers, the same bytes, whatever happens in between."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llama
import plan
from activations import KINDS, Place, live_file
from conftest import generator
from test_journal import LAYERS, Stopped, command, stopped_after, whole  # noqa: F401

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(params=KINDS)
def place(request, tmp_path) -> Place:
    return Place(request.param, CPU, tmp_path)


def filled(place: Place, values: torch.Tensor, streams: int = 1):
    states = place.activations(values.shape, values.dtype, streams)
    for rows in states.spans(2):
        states.write(rows, values[rows])
    states.commit()
    return states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_written_is_read(place, dtype):
    values = torch.randn(5, 3, 4, generator=generator()).to(dtype)
    states = filled(place, values, 2)
    twin = states.twin()
    assert torch.equal(states.whole(), values) and torch.equal(twin.whole(), values)
    read = [batch.clone() for batch in states.batches(lambda number: states.read(states.spans(2)[number]), 3)]
    assert [len(batch) for batch in read] == [2, 2, 1] and torch.equal(torch.cat(read), values)
    for rows in twin.spans(2):
        twin.write(rows, 2 * values[rows])
    twin.commit()
    assert torch.equal(states.whole(), values) and torch.equal(twin.whole(), 2 * values)


def test_a_pass_reads_what_the_one_before_wrote(place):
    values = torch.randn(6, 2, 3, generator=generator())
    states = filled(place, values)
    for _ in range(3):
        for rows, batch in zip(states.spans(2), states.batches(lambda n: states.read(states.spans(2)[n]), 3), strict=True):
            states.write(rows, batch + 1)
        states.commit()
    assert torch.equal(states.whole(), values + 1 + 1 + 1)


def test_kept_tensors_come_back_until_they_are_forgotten(place, tmp_path):
    states = filled(place, torch.zeros(4, 2, 3))
    for _ in range(3):
        values = [torch.randn(2, 3, generator=generator(seed)) for seed in range(4)]
        kept = [states.keep(value) for value in values]
        states.finish()
        assert all(torch.equal(states.recall(one), value) for one, value in zip(kept, values, strict=True))
        states.forget()
    if states.on_disk:
        assert (tmp_path / "kept-0-0.bin").stat().st_size == 4 * 2 * 3 * 4, "the next layer's are written over the last one's"


def test_a_write_that_fails_is_raised(tmp_path):
    states = filled(Place("disk", CPU, tmp_path), torch.zeros(4, 2, 3))
    for file in states.files.live:
        file.close()
    states.files.live = [open(live_file(tmp_path, generation), "rb") for generation in (0, 1)]  # noqa: SIM115
    states.files.write(states.files.live[0], 0, torch.ones(2, 2, 3))
    with pytest.raises(OSError):
        states.commit()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bytes_come_out(command, whole, tmp_path, kind):  # noqa: F811
    path = tmp_path / "q.safetensors"
    assert llama.main(command(path, "--activations", kind, "--batch_size", 3)) == 0
    with_threes = path.read_bytes()
    assert llama.main(command(path, "--activations", kind, "--overwrite")) == 0
    assert path.read_bytes() == whole[0]
    assert llama.main(command(path, "--batch_size", 3, "--overwrite")) == 0
    assert path.read_bytes() == with_threes
    assert [entry.name for entry in tmp_path.iterdir()] == ["q.safetensors"]


@pytest.mark.parametrize("before, after", [("disk", "disk"), ("disk", "host"), ("host", "disk")])
@pytest.mark.parametrize("finished", [1, 2, LAYERS - 1])
def test_a_run_goes_on_from_files(command, whole, stopped_after, tmp_path, capsys, before, after, finished):  # noqa: F811
    path = tmp_path / "q.safetensors"
    stopped_after(finished, path, Stopped, "--activations", before)
    partial = path.with_name(path.name + ".partial")
    assert sorted(file.name for file in partial.glob("live*")) == ["live-0.bin", "live-1.bin"][: 1 + (before == "disk" or finished > 1)]
    assert llama.main(command(path, "--activations", after)) == 0
    assert f"going on after layer {finished}" in capsys.readouterr().out
    assert path.read_bytes() == whole[0]


def test_files_are_saved_after_every_layer(command, stopped_after, tmp_path):  # noqa: F811
    path = tmp_path / "q.safetensors"
    stopped_after(3, path, Stopped, "--activations", "disk")
    lines = (tmp_path / "q.safetensors.partial" / "journal.jsonl").read_text().splitlines()
    assert len(lines) == 4
    size = {live_file(tmp_path / "q.safetensors.partial", generation).stat().st_size for generation in (0, 1)}
    assert len(size) <= 2 and max(size) - min(size) in (0, 8), "two generations and their stamps, nothing else"


def test_activations_of_the_evaluation_wait_there_too(tiny_model, text_file, test_text, tmp_path, monkeypatch):
    places, real = [], Place.activations
    monkeypatch.setattr(Place, "activations", lambda self, *args: places.append(self.kind) or real(self, *args))
    options = ["--wbits", "4", "--nsamples", "2", "--seqlen", "32", "--eval", str(test_text), "--activations", "disk"]
    assert llama.main([str(tiny_model()), str(text_file), *options, "--save_path", str(tmp_path / "q.safetensors")]) == 0
    assert places == ["disk", "disk"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["q.safetensors"]


def test_activations_of_the_unquantized_model_wait_on_the_disk_too(tiny_model, text_file, test_text):
    options = ["--wbits", "16", "--nsamples", "2", "--seqlen", "32", "--eval", str(test_text), "--activations", "disk"]
    assert llama.main([str(tiny_model()), str(text_file), *options]) == 0


def test_a_text_that_takes_more_than_the_calibration_waits_on_the_disk(tiny_model, text_file, tmp_path, monkeypatch):
    places, real, test_text = [], Place.activations, tmp_path / "test.txt"
    monkeypatch.setattr(Place, "activations", lambda self, *args: places.append(self.kind) or real(self, *args))
    test_text.write_text(20 * text_file.read_text())
    monkeypatch.setattr(plan, "EVALUATION_ROOM", 0)
    options = ["--wbits", "4", "--nsamples", "2", "--seqlen", "32", "--eval", str(test_text), "--activations", "host"]
    assert llama.main([str(tiny_model()), str(text_file), *options, "--save_path", str(tmp_path / "q.safetensors")]) == 0
    assert places == ["host", "disk"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["q.safetensors", "test.txt"]


HELPERS = """
import sys
from pathlib import Path
import torch
from activations import Place
from journal import Saver
from leanquant.packing import Checkpoint
from modelutils import StreamedModel
from ranks import Ranks

folder, cpu = Path(sys.argv[1]), torch.device("cpu")
states = Place("disk", cpu, Path(sys.argv[2])).activations((1, 2, 3), torch.float32, 1)
model = StreamedModel(folder, Checkpoint.open(folder), torch.float32, cpu)
threads = [Saver(Ranks())._thread, states.conveyor._thread, model._reader]
print(*(thread.submit(torch.get_num_threads).result() for thread in threads), torch.get_num_threads())
"""


def test_what_happens_beside_the_computation_takes_one_core(tiny_model, tmp_path):
    """In a process of its own, whose main thread has computed nothing yet: see `helper_thread`."""
    program = [sys.executable, "-c", HELPERS, str(tiny_model()), str(tmp_path)]
    run = subprocess.run(program, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "2"}, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["1", "1", "1", "2"]

"""What goes wrong from outside: a device or a disk that is too small, a file that ends too early. Nothing finished is lost."""

import errno
import gc
import json
import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import eval_quantized
import export as export_cli
import llama
import modelutils
from leanquant.packing import Checkpoint, ModelWriter
from test_journal import LAYERS, SETTINGS, Stopped, command, stopped_after, whole, words  # noqa: F401

# --- memory of the device --------------------------------------------------------------------------------------


@pytest.fixture
def small_device(monkeypatch):
    """small_device(limit, index): from layer `index` on, batches of more than `limit` sequences do not fit."""
    real = modelutils.StreamedModel.run_layer

    def limit(sequences: int, layer: int = 0):
        def run_layer(self, index, hidden, weights):
            if index >= layer and len(hidden) > sequences:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return real(self, index, hidden, weights)

        monkeypatch.setattr(modelutils.StreamedModel, "run_layer", run_layer)

    return limit


def test_half_the_batch_is_as_if_it_had_been_asked_for(command, tmp_path, small_device, capsys):  # noqa: F811
    """Nothing is counted twice: the very bytes of a run with that batch size."""
    assert llama.main(command(tmp_path / "one.safetensors", "--batch_size", 1)) == 0
    small_device(1)
    assert llama.main(command(tmp_path / "halved.safetensors", "--batch_size", 4)) == 0
    assert (tmp_path / "halved.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()
    assert "batches of 2 sequences instead of 4" in (said := capsys.readouterr().out) and "batches of 1 sequences instead of 2" in said


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_a_resumed_run_keeps_the_smaller_batch(command, stopped_after, small_device, tmp_path, kind):  # noqa: F811
    options = ["--batch_size", 4, "--activations", kind]
    small_device(2, layer=1)
    assert llama.main(command(tmp_path / "whole.safetensors", *options)) == 0
    stopped_after(3, tmp_path / "q.safetensors", Stopped, *options)
    small_device(4)
    assert llama.main(command(tmp_path / "q.safetensors", *options)) == 0
    assert (tmp_path / "q.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert llama.main(command(tmp_path / "fours.safetensors", *options)) == 0
    assert (tmp_path / "fours.safetensors").read_bytes() != (tmp_path / "whole.safetensors").read_bytes(), "the size shows"


def test_an_evaluation_takes_half_the_batch_too(command, tmp_path, small_device, test_text, capsys):  # noqa: F811
    measured = lambda said: [line for line in said.splitlines() if "perplexity" in line]  # noqa: E731
    assert llama.main(command(tmp_path / "one.safetensors", "--batch_size", 1, "--eval", test_text)) == 0
    expected = measured(capsys.readouterr().out)
    small_device(1)
    assert llama.main(command(tmp_path / "halved.safetensors", "--batch_size", 4, "--eval", test_text)) == 0
    assert measured(capsys.readouterr().out) == expected != []


def test_two_halvings_are_enough_then_it_says_what_to_change(command, small_device, tmp_path, capsys):  # noqa: F811
    small_device(0, layer=2)
    assert llama.main(command(tmp_path / "q.safetensors", "--batch_size", 4)) == 2
    error = capsys.readouterr().err
    assert "ran out of memory with batches of 1 sequences" in error and "--batch_size" in error
    assert "2 finished layers are kept" in error


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_a_pass_goes_on_where_it_was_broken_off(tiny_model, tmp_path, monkeypatch, kind):
    folder, cpu = tiny_model(), torch.device("cpu")
    model = modelutils.StreamedModel(folder, Checkpoint.open(folder), torch.float32, cpu)
    ids = torch.randint(2, 300, (11, 8), generator=torch.Generator().manual_seed(0))
    streams = [model.embed(ids, 3, modelutils.Place(kind, cpu, tmp_path))]
    expected, failing, real = model.embed(ids, 3), [0], modelutils.StreamedModel.run_layer

    def run_layer(self, index, hidden, weights):
        failing[0] -= 1
        if failing[0] == 0:
            raise torch.OutOfMemoryError
        return real(self, index, hidden, weights)

    with model.layer(0):
        model.advance(0, expected)
        monkeypatch.setattr(modelutils.StreamedModel, "run_layer", run_layer)
        failing[0] = 3
        modelutils.in_smaller_batches(model, streams, model.advance, 0, streams[0])
    assert streams[0].batch_size == 1 and streams[0].moved == 0
    torch.testing.assert_close(streams[0].hidden, expected.hidden, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", ["gpu", "host"])
def test_memory_that_no_batch_size_saves(command, tmp_path, monkeypatch, capsys, where):  # noqa: F811
    def factorize(*_):
        if where == "host":
            torch.empty(2**60)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 11.00 GiB")

    monkeypatch.setattr(llama.hessian, "factorize", factorize)
    assert llama.main(command(tmp_path / "q.safetensors")) == 2
    error = capsys.readouterr().err
    assert ("11.00 GiB" if where == "gpu" else f"{2**62} bytes") in error and "--offload_threshold" in error


# --- the disk --------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=True)
    yield folder
    gc.collect()  # what an error's traceback still refers to has files open there
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("kind", ["host", "disk"])
@pytest.mark.parametrize("left", [0, 20_000, 60_000])
def test_a_full_disk_loses_nothing(command, whole, small_disk, monkeypatch, capsys, kind, left):  # noqa: F811
    real, path, filler = llama.quantize_layer, small_disk / "q.safetensors", small_disk / "filler"

    def quantize_layer(model, index, *rest):
        if index == 3:
            fill(small_disk, left)
        return real(model, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(llama, "quantize_layer", quantize_layer)
        assert llama.main(command(path, "--activations", kind)) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and "the same command goes on after them" in error, error
    assert not path.exists()
    assert llama.main(command(path, "--activations", kind)) == 2, "still full"
    assert "No space left" in (error := capsys.readouterr().err) or "GB free" in error, error
    filler.unlink()
    done = []
    monkeypatch.setattr(llama, "quantize_layer", lambda model, index, *rest: done.append(index) or real(model, index, *rest))
    assert llama.main(command(path, "--activations", kind)) == 0
    assert path.read_bytes() == whole[0]
    assert done[0] >= 1 and done[-1] == LAYERS - 1


def fill(folder: Path, left: int = 0) -> None:
    """Leave only so many bytes of the file system that `folder` is."""
    with suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(folder / "filler", max(0, (folder / "filler").stat().st_size - left))


def test_a_full_disk_is_only_no_cache(command, small_disk, tmp_path, monkeypatch):  # noqa: F811
    fill(small_disk)
    monkeypatch.setenv("LEANQUANT_CACHE", str(small_disk))
    assert llama.main(command(tmp_path / "q.safetensors")) == 0
    assert [file.name for file in small_disk.iterdir()] == ["filler"]


def test_what_was_measured_outlives_a_full_disk(tiny_model, test_text, small_disk, capsys):
    """The numbers are on the screen, and the file of the evaluation before is what it was."""
    output = small_disk / "e.json"
    arguments = words("--base_model_name_or_path", tiny_model(), "--perplexity", test_text, "--seqlen", 32, "--output", output)
    assert eval_quantized.main(arguments) == 0
    before = output.read_bytes()
    fill(small_disk)
    capsys.readouterr()
    assert eval_quantized.main([*arguments, "--seed", "1"]) == 2
    said = capsys.readouterr()
    assert "perplexity" in said.out and f"{output} cannot be written (No space left on device): make room" in said.err
    assert output.read_bytes() == before and {file.name for file in small_disk.iterdir()} == {"e.json", "filler"}


def test_a_report_that_has_no_room_leaves_the_one_before(command, small_disk, tmp_path, capsys):  # noqa: F811
    report = small_disk / "r.json"
    report.write_text("before")
    fill(small_disk)
    assert llama.main(command(tmp_path / "q.safetensors", "--report", report)) == 2
    assert f"{report} cannot be written" in (said := capsys.readouterr().err) and "the same command goes on" in said
    assert report.read_text() == "before"
    (small_disk / "filler").unlink()
    assert llama.main(command(tmp_path / "q.safetensors", "--report", report)) == 0
    assert json.loads(report.read_text())["linears"]


def test_an_export_that_has_no_room_says_so(command, tiny_model, small_disk, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Whether that is seen before, or room is gone while it writes. Nothing is left."""
    assert llama.main(command(tmp_path / "q.safetensors")) == 0
    fill(small_disk, left=2**16)
    model = tiny_model(num_hidden_layers=LAYERS)
    arguments = words(tmp_path / "q.safetensors", "--base", model, "--to", "dense", "--out", small_disk / "e")
    capsys.readouterr()
    assert export_cli.main(arguments) == 2
    assert "GB free and the run needs" in capsys.readouterr().err
    monkeypatch.setattr(ModelWriter, "_check_room", lambda *_: None)
    assert export_cli.main(arguments) == 2
    assert "cannot be written (No space left on device): make room" in capsys.readouterr().err
    assert [file.name for file in small_disk.iterdir()] == ["filler"]


def test_a_disk_that_fails_is_named(command, whole, tmp_path, monkeypatch, capsys):  # noqa: F811
    real, path, layers = os.preadv, tmp_path / "q.safetensors", []
    quantize_layer = llama.quantize_layer
    monkeypatch.setattr(llama, "quantize_layer", lambda model, index, *rest: layers.append(index) or quantize_layer(model, index, *rest))

    def preadv(*args):
        if len(layers) > 2:
            raise OSError(errno.EIO, "Input/output error")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        assert llama.main(command(path, "--activations", "disk")) == 2
    error = capsys.readouterr().err
    assert "live-" in error and "Input/output error" in error and "its disk" in error and "finished layers are kept" in error, error
    assert llama.main(command(path, "--activations", "disk")) == 0
    assert path.read_bytes() == whole[0]


@pytest.mark.parametrize("keep_time", [False, True], ids=["changed", "silently"])
def test_a_model_that_is_cut_off_under_the_run(tiny_model, text_file, whole, tmp_path, monkeypatch, capsys, keep_time):  # noqa: F811
    """What is read ahead of a file that ends too early is named when its layer's turn comes, and the layers before are kept."""
    folder, path, real = tmp_path / "model", tmp_path / "q.safetensors", llama.quantize_layer
    shutil.copytree(tiny_model(num_hidden_layers=LAYERS), folder)
    file = folder / "model.safetensors"
    contents, stat = file.read_bytes(), file.stat()

    def quantize_layer(model, index, *rest):
        if index == 3:
            os.truncate(file, len(contents) // 3)
            if keep_time:
                monkeypatch.setattr(model.checkpoint, "check_unchanged", lambda: None)
        return real(model, index, *rest)

    arguments = words(folder, text_file, *SETTINGS, "--save_path", path)
    with monkeypatch.context() as patch:
        patch.setattr(llama, "quantize_layer", quantize_layer)
        assert llama.main(arguments) == 2
    error = capsys.readouterr().err
    assert "model.safetensors" in error and "finished layers are kept" in error, error
    file.write_bytes(contents)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert llama.main(arguments) == 0
    assert "going on after layer" in capsys.readouterr().out

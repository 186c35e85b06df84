"""What can go wrong within a layer: numbers that are not finite, Hessians without a factor, files that fail or change.

Each ends with one sentence that names the layer and the linear or the tensor, and what was finished is kept.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hessian
import llama
from leanquant import InputError
from leanquant.packing import Checkpoint
from test_modelutils import random_ids, stream

LAYERS = 3
OPTIONS = ["--wbits", 4, "--exponent", 4, "--true-sequential", "--percdamp", 0.1, "--nsamples", 4, "--seqlen", 32, "--eval", "none"]


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A copy, to be broken."""
    return shutil.copytree(tiny_model(num_hidden_layers=LAYERS), tmp_path / "model")


def run(*words) -> int:
    return llama.main([str(word) for word in words])


def scale(folder: Path, name: str, factor: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] *= factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def at_layer(monkeypatch, wanted: int, action) -> None:
    """Have `action()` happen when layer `wanted` is about to be quantized."""
    real = llama.quantize_layer

    def quantize_layer(model, index, *rest):
        if index == wanted:
            action()
        return real(model, index, *rest)

    monkeypatch.setattr(llama, "quantize_layer", quantize_layer)


# --- numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 0.5])
def test_an_input_that_is_not_finite_stops_the_run_and_names_who_reads_it(model, text_file, tmp_path, capsys, shift):
    """Finite weights whose outputs float16 cannot hold: v overflows, and o reads it."""
    scale(model, "model.layers.1.self_attn.v_proj.weight", 1e5)
    out = tmp_path / "q.safetensors"
    assert run(model, text_file, *OPTIONS, "--dtype", "float16", "--shift", shift, "--save_path", out) == 2
    message = capsys.readouterr().err
    assert "layer 1" in message and "self_attn.o_proj" in message and "--dtype float32 or bfloat16" in message
    assert "Traceback" not in message and not out.exists()


@pytest.mark.parametrize("linear", ["self_attn.v_proj", "mlp.down_proj"])
def test_activations_that_are_not_finite_stop_a_layer_and_name_the_linear(model, linear):
    scale(model, f"model.layers.1.{linear}.weight", 1e5)
    streamed = stream(model, torch.float16)
    states = streamed.embed(random_ids(2, 16), 2)
    with streamed.layer(0):
        streamed.advance(0, states)
    with streamed.layer(1), pytest.raises(InputError, match=f"layer 1 gives non-finite .*float16, first in {linear}"):
        streamed.advance(1, states)


def test_the_unquantized_models_numbers_count_too(model, text_file, tmp_path, capsys, monkeypatch):
    """Its inputs make the target: where only they overflow, the run stops as well."""
    real = hessian.Statistics.add

    def add(self, ours, theirs):
        theirs.X[0, 0, 0] = float("inf")
        return real(self, ours, theirs)

    monkeypatch.setattr(hessian.Statistics, "add", add)
    assert run(model, text_file, *OPTIONS, "--save_path", tmp_path / "q.safetensors") == 2
    assert "layer 0: the input of self_attn.q_proj, self_attn.k_proj, self_attn.v_proj" in capsys.readouterr().err


# --- Hessians --------------------------------------------------------------------------------------------------


def failing_cholesky(monkeypatch, times: int, width: int = 96):
    """The first so many factorizations of this width fail."""
    real, failed = hessian._cholesky_backwards, []

    def cholesky(H):
        if len(H) == width and len(failed) < times:
            failed.append(1)
            return None
        return real(H)

    monkeypatch.setattr(hessian, "_cholesky_backwards", cholesky)


def test_more_damping_is_said_with_the_names_of_the_linears(model, text_file, monkeypatch):
    failing_cholesky(monkeypatch, 2)
    with pytest.warns(UserWarning, match=r"layer 0: the Hessian of mlp.down_proj was damped with 10 instead"):
        assert run(model, text_file, *OPTIONS, "--eval", text_file) == 0


def test_no_factor_at_all_is_said_with_the_names_of_the_linears(model, text_file, monkeypatch):
    failing_cholesky(monkeypatch, 4)
    with pytest.warns(UserWarning, match=r"layer 0: the Hessian of mlp.down_proj cannot be factorized: rounding to nearest"):
        assert run(model, text_file, *OPTIONS, "--eval", text_file) == 0


# --- files -----------------------------------------------------------------------------------------------------


def test_a_read_error_names_the_tensor_and_the_file(tiny_model):
    """Address 0 of a process cannot be read: the system answers with the error of a failing disk."""
    checkpoint, name = Checkpoint.open(tiny_model()), "model.layers.0.mlp.up_proj.weight"
    checkpoint.files[name], checkpoint.offsets[name] = Path("/proc/self/mem"), 0
    with pytest.raises(InputError, match=rf"{name} cannot be read from /proc/self/mem \(Input/output error\)"):
        checkpoint.get(name)


def test_a_layer_that_cannot_be_read_ends_the_run_and_costs_only_itself(model, text_file, tmp_path, monkeypatch, capsys):
    """The file loses its end while the second layer is quantized: the first one stays, and is gone on with."""
    file, out = model / "model.safetensors", tmp_path / "q.safetensors"
    whole, stat = file.read_bytes(), file.stat()
    at_layer(monkeypatch, 1, lambda: os.truncate(file, len(whole) // 4))
    assert run(model, text_file, *OPTIONS, "--save_path", out) == 2
    message = capsys.readouterr().err
    assert "model.layers." in message and "cannot be read" in message and "1 finished layers are kept" in message
    monkeypatch.undo()
    file.write_bytes(whole)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert run(model, text_file, *OPTIONS, "--save_path", out) == 0
    assert "going on after layer 1" in capsys.readouterr().out
    shutil.copy(out, tmp_path / "resumed.safetensors")
    assert run(model, text_file, *OPTIONS, "--save_path", out, "--overwrite") == 0
    assert out.read_bytes() == (tmp_path / "resumed.safetensors").read_bytes()


@pytest.mark.parametrize("change", ["other weights", "gone", "another time"])
def test_a_checkpoint_that_changes_under_a_layer_does_not_count_that_layer(model, text_file, tmp_path, monkeypatch, capsys, change):
    """Other weights of the same size, in place: without the check the layer would be a mixture of two models."""
    file, out = model / "model.safetensors", tmp_path / "q.safetensors"
    actions = {
        "other weights": lambda: scale(model, "model.layers.1.mlp.up_proj.weight", 2.0),
        "gone": lambda: os.rename(file, model / "moved"),
        "another time": lambda: os.utime(file),
    }
    at_layer(monkeypatch, 1, actions[change])
    assert run(model, text_file, *OPTIONS, "--save_path", out) == 2
    message = capsys.readouterr().err
    assert "1 finished layers are kept" in message
    assert ("were changed while the run read them" in message) or ("cannot be read" in message)
    assert "Traceback" not in message and not out.exists()

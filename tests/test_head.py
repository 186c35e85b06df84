"""The head follows what the layers give: against the formula in float64, and where it stays as it is."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import datautils
import hessian
import quant
from conftest import damped
from test_cli import GRIDS, SEQUENTIAL, decode, quantize, whole_model

HEAD = "lm_head.weight"
OPTIONS = ["--wbits", 2, *GRIDS["nonuniform"], *SEQUENTIAL, "--percdamp", "0.1"]


def head_inputs(model, ids: torch.Tensor) -> torch.Tensor:
    """Float64 [N, I]."""
    found = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return found[0].flatten(0, 1).double()


@pytest.fixture
def calibration(tiny_model, text_file) -> torch.Tensor:
    """What `quantize` calibrates with: [n, T]."""
    return datautils.calibration_windows(str(text_file), AutoTokenizer.from_pretrained(tiny_model()), 16, 32, 0)


@pytest.mark.parametrize("narrow", [False, True])
def test_the_head_is_the_formula_in_float64(tiny_model, text_file, calibration, tmp_path, monkeypatch, narrow):
    """Of a head with fewer rows than columns the outputs are summed."""
    base, file = tiny_model(), tmp_path / "q.safetensors"
    if narrow:
        monkeypatch.setattr(hessian, "sums_outputs", lambda *_: True)
    quantize(base, text_file, *OPTIONS, "--save_path", file)
    W = load_file(base / "model.safetensors")[HEAD].double()
    original = whole_model(base)
    theirs = head_inputs(original, calibration)
    original.load_state_dict({name: tensor for name, tensor in decode(file).items() if name != HEAD}, strict=False)
    ours = head_inputs(original, calibration)
    N, I = ours.shape
    H, S = ours.T @ ours / N, W @ (theirs - ours).T @ ours / N
    expected = W + N / (N + quant.HEAD_TOKENS * I) * S @ torch.linalg.inv(damped(H, 0.1))
    found = decode(file)[HEAD].double()
    assert (found - expected).norm() < 2e-3 * (expected - W).norm()
    error = lambda head: (ours @ head.T - theirs @ W.T).square().sum()  # noqa: E731
    assert error(found) < 0.9 * error(W)


@pytest.mark.parametrize("options", [["--no-shift_head"], ["--shift", 0], ["--recipe", "published"], ["--n_layers", 1]], ids=str)
def test_a_head_stays_where_it_is_told_to_or_layers_do(tiny_model, text_file, tmp_path, options):
    quantize(tiny_model(), text_file, *OPTIONS, *options, "--save_path", tmp_path / "q.safetensors")
    assert torch.equal(load_file(tmp_path / "q.safetensors")[HEAD], load_file(tiny_model() / "model.safetensors")[HEAD])


def test_a_head_that_is_the_embeddings_stays(tiny_model, text_file, tmp_path):
    base = tiny_model(tied=True)
    quantize(base, text_file, *OPTIONS, "--save_path", tmp_path / "q.safetensors")
    tensors = load_file(tmp_path / "q.safetensors")
    assert HEAD not in tensors
    name = "model.embed_tokens.weight"
    assert torch.equal(tensors[name], load_file(base / "model.safetensors")[name])


def test_a_head_that_cannot_be_factorized_stays(tiny_model, text_file, tmp_path, monkeypatch):
    real, calls = hessian.factorize, []

    def fail_last(H, *rest):
        calls.append(len(H))
        if len(calls) == 9:  # after four groups of each of two layers
            raise hessian.NotPositiveDefinite
        return real(H, *rest)

    monkeypatch.setattr(hessian, "factorize", fail_last)
    with pytest.warns(UserWarning, match="the Hessian of lm_head.weight cannot be factorized: it stays as it is"):
        quantize(tiny_model(), text_file, *OPTIONS, "--save_path", tmp_path / "q.safetensors")
    assert len(calls) == 9
    assert torch.equal(load_file(tmp_path / "q.safetensors")[HEAD], load_file(tiny_model() / "model.safetensors")[HEAD])

"""--skip and --bits_for: what each linear is quantized to, what the file says about it, and who reads it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import eval_quantized
import llama
from leanquant import InputError, LeanQuantModelForCausalLM
from leanquant import __main__ as info
from leanquant.linear import QuantizedLinear
from leanquant.packing import Checkpoint
from test_cli import layer_linears, whole_model

GRIDS = {"nonuniform": ["--exponent", "4"], "affine": ["--grid", "affine"], "groups": ["--grid", "minmax", "--groupsize", "32"]}
IDS = torch.arange(20).view(1, -1) + 5
# The first match counts; the second pattern splits a group whose linears share one Hessian.
MIXED = ["--skip", r".*layers\.1\.mlp\..*", "--bits_for", r".*\.0\.mlp\.down_proj=2", r".*(v|down)_proj=3"]


def expected_bits() -> dict[str, int]:
    bits = {name: 4 for name in layer_linears(2) if ".1.mlp." not in name}
    bits |= {"model.layers.0.mlp.down_proj": 2} | {f"model.layers.{i}.self_attn.v_proj": 3 for i in (0, 1)}
    return bits


def quantize(model: Path, text: Path, out: Path, *options) -> int:
    words = [model, text, "--nsamples", 4, "--seqlen", 32, "--percdamp", 0.1, "--wbits", 4, "--eval", "none", "--true-sequential"]
    return llama.main([str(word) for word in (*words, "--grid_partitions", 64, "--save_path", out, *options)])


def dequantized(base: Path, checkpoint: Checkpoint):
    """transformers' own model with the file's weights."""
    model = AutoModelForCausalLM.from_pretrained(base)
    there = {*checkpoint.shapes, *(f"{linear}.weight" for linear in checkpoint.quantized)}  # without a tied head
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name in there}
    return whole_model(base, {name: checkpoint.weight(name, shape, torch.float32) for name, shape in shapes.items()})


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("grid", GRIDS)
def test_each_linear_has_its_own_bits_and_every_reader_agrees(tiny_model, text_file, tmp_path, grid):
    base = tiny_model()
    for out in (tmp_path / "q.safetensors", tmp_path / "folder"):
        assert quantize(base, text_file, out, *GRIDS[grid], *MIXED) == 0
        checkpoint = Checkpoint.open(out)
        assert {name: checkpoint.bits_of(name) for name in checkpoint.quantized} == expected_bits()
        for name in (f"model.layers.1.mlp.{x}_proj.weight" for x in ("gate", "up", "down")):
            assert torch.equal(checkpoint.get(name), Checkpoint.open(base).get(name))
        expected = logits(dequantized(base, checkpoint))
        torch.testing.assert_close(logits(LeanQuantModelForCausalLM.from_pretrained(base, out)), expected, rtol=1e-4, atol=1e-4)
    plugged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert {m.bits for m in plugged.modules() if isinstance(m, QuantizedLinear)} == {2, 3, 4}
    torch.testing.assert_close(logits(plugged), expected, rtol=1e-4, atol=1e-4)
    plugged.save_pretrained(tmp_path / "again")
    again = Checkpoint.open(tmp_path / "again")
    assert {name: again.bits_of(name) for name in again.quantized} == expected_bits()


def test_a_linear_of_other_bits_is_what_a_run_of_those_bits_makes_it(tiny_model, text_file, tmp_path):
    """The first group of the first layer sees the same inputs in both runs."""
    for name, options in {"all": ["--wbits", 3], "one": ["--bits_for", r".*q_proj=3"]}.items():
        assert quantize(tiny_model(), text_file, tmp_path / f"{name}.safetensors", "--exponent", 4, *options) == 0
    one, every = (Checkpoint.open(tmp_path / f"{name}.safetensors") for name in ("one", "all"))
    q, k = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
    assert torch.equal(one.get(f"{q}.weight_codes"), every.get(f"{q}.weight_codes"))
    assert torch.equal(one.get(f"{q}.quant_grid"), every.get(f"{q}.quant_grid"))
    assert one.bits_of(k) == 4 and every.bits_of(k) == 3


def test_skipped_linears_change_nothing_before_them(tiny_model, text_file, tmp_path):
    """A layer's child all of whose linears are skipped is still computed from what comes before it."""
    files = {"none": [], "mlp": ["--skip", r".*\.mlp\..*"], "attention": ["--skip", r".*self_attn.*"]}
    for name, options in files.items():
        assert quantize(tiny_model(), text_file, tmp_path / f"{name}.safetensors", "--exponent", 4, *options) == 0
    none, mlp, attention = (Checkpoint.open(tmp_path / f"{name}.safetensors") for name in files)
    for x in "qkvo":
        linear = f"model.layers.0.self_attn.{x}_proj.weight_codes"
        assert torch.equal(none.get(linear), mlp.get(linear))
    assert {name.split(".")[3] for name in mlp.quantized} == {"self_attn"}
    assert {name.split(".")[3] for name in attention.quantized} == {"mlp"}


def test_file_and_report_and_info_say_what_was_done(tiny_model, text_file, tmp_path, capsys):
    out, report = tmp_path / "q.safetensors", tmp_path / "report.json"
    assert quantize(tiny_model(), text_file, out, "--grid", "affine", *MIXED, "--report", report) == 0
    settings = Checkpoint.open(out).settings
    assert settings["bits"] == 4 and settings["skip"] == [MIXED[1]]
    assert settings["bits_for"] == {name: bits for name, bits in expected_bits().items() if bits != 4}
    rows = json.loads(report.read_text())["linears"]
    assert {f"model.layers.{row['layer']}.{row['linear']}": row["bits"] for row in rows} == expected_bits()
    capsys.readouterr()
    assert info.main(["info", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "2 in 1 linears, 3 in 2 linears, 4 in 8 linears" in shown and MIXED[1] in shown


def test_bits_are_checked_against_those_that_most_linears_have(tiny_model, text_file, test_text, tmp_path, capsys):
    base, out = tiny_model(), tmp_path / "q.safetensors"
    assert quantize(base, text_file, out, "--grid", "affine", *MIXED) == 0
    LeanQuantModelForCausalLM.from_pretrained(base, out, bits=4)
    with pytest.raises(InputError, match=r"\[2, 3, 4\] bits, not 3"):
        LeanQuantModelForCausalLM.from_pretrained(base, out, bits=3)
    words = ["--base_model_name_or_path", base, "--leanquant_path", out, "--bits", 4, "--perplexity", test_text, "--seqlen", 32]
    assert eval_quantized.main([str(word) for word in words]) == 0
    assert "2/3/4 bits" in capsys.readouterr().out


@pytest.mark.parametrize("value", [5, "3", None, [3]])
def test_damaged_exceptions_are_refused(tiny_model, text_file, tmp_path, value):
    out = tmp_path / "q.safetensors"
    assert quantize(tiny_model(), text_file, out, "--grid", "affine", *MIXED) == 0
    checkpoint = Checkpoint.open(out)
    linear = "model.layers.0.mlp.down_proj"
    checkpoint.settings["bits_for"][linear] = value
    with pytest.raises(InputError, match=linear):
        checkpoint.bits_of(linear)
    checkpoint.settings["bits_for"] = [linear]
    with pytest.raises(InputError, match="bits_for"):
        checkpoint.bits_of(linear)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--skip", r".*q_prj"], ["--skip .*q_prj", "q_proj"]),
        (["--skip", "q_proj"], ["whole name", "self_attn.q_proj"]),
        (["--skip", "lm_head"], ["matches no linear"]),
        (["--skip", "(q"], ["no regular expression"]),
        (["--skip", ".*"], ["nothing to quantize"]),
        (["--bits_for", r".*up_proj=5"], ["REGEX=2"]),
        (["--bits_for", r".*up_proj"], ["REGEX=2"]),
        (["--bits_for", "nothing=3"], ["--bits_for nothing"]),
        (["--bits_for", r".*layers\.1.*=3", "--n_layers", "1"], ["matches no linear"]),
        (["--bits_for", r".*=4", "--wbits", "2", "--kmeans_bins", "8", "--exponent", "4"], ["--kmeans_bins", "16"]),
        (["--wbits", "16", "--skip", ".*", "--eval", "x.txt"], ["--wbits 2, 3 or 4"]),
    ],
)
def test_patterns_that_mean_nothing_are_refused(tiny_model, text_file, tmp_path, capsys, monkeypatch, options, words):
    monkeypatch.setattr(Checkpoint, "check_finite", lambda *_: pytest.fail("work was begun"))
    (tmp_path / "x.txt").write_text("x" * 100)
    monkeypatch.chdir(tmp_path)
    assert quantize(tiny_model(), text_file, tmp_path / "q.safetensors", *options) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words) and message.count("\n") == 1
    assert not (tmp_path / "q.safetensors").exists()


def test_other_patterns_are_another_run(tiny_model, text_file, tmp_path, capsys, monkeypatch):
    out, real = tmp_path / "q.safetensors", llama.quantize_layer

    def quantize_layer(model, index, *rest):
        if index == 1:
            raise KeyboardInterrupt
        return real(model, index, *rest)

    monkeypatch.setattr(llama, "quantize_layer", quantize_layer)
    assert quantize(tiny_model(), text_file, out, *MIXED) == 130
    for options, word in ((MIXED[:2], "bits_for"), (MIXED[2:], "skip")):
        assert quantize(tiny_model(), text_file, out, *options) == 2
        assert word in capsys.readouterr().err
    monkeypatch.setattr(llama, "quantize_layer", real)
    assert quantize(tiny_model(), text_file, out, *MIXED) == 0

"""--vocab_bits: embeddings and head as codes, apart or as one; written, read by every loader, run, tuned, exported, refused."""

import copy
import json
import shutil

import pytest
import torch
import transformers
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import allocate
import datautils
import eval_quantized
import llama
import tune
from conftest import SIZES, generator, write_model
from leanquant import InputError, LeanQuantModelForCausalLM
from leanquant import __main__ as cli
from leanquant.decoding import with_cuda_graphs
from leanquant.export import export
from leanquant.foreign import open_checkpoint
from leanquant.linear import QuantizedEmbedding, QuantizedLinear
from leanquant.packing import Checkpoint, PackedLinear
from leanquant_grid import digits_affine
from modelutils import StreamedModel
from test_cli import GRIDS, SEQUENTIAL, decode_codes, decode_weight, quantize, whole_model
from test_decoding import Graph, continued, emulated, recording  # noqa: F401
from test_families import FAMILIES
from test_head import head_inputs

EMBEDDINGS, HEAD = "model.embed_tokens", "lm_head"
IDS = torch.arange(20).view(2, -1) + 5
KINDS = {
    "non-uniform": ["--wbits", 3, *GRIDS["nonuniform"]],
    "affine in groups": ["--wbits", 2, "--grid", "affine", "--groupsize", 16],
    "GPTQ": ["--wbits", 4, *GRIDS["minmax"]],
    "nearest": ["--wbits", 4, *GRIDS["rtn"]],
}


def rebuilt(file, name: str, bits: int, columns: int = 64) -> torch.Tensor:
    """The matrix from the file, by the format's description."""
    tensors = load_file(file)
    codes = torch.from_numpy(decode_codes(tensors[f"{name}.weight_codes"].numpy(), bits, columns)).long()
    if bits < 8:
        return decode_weight(tensors, name, codes)
    scale, zero = tensors[f"{name}.scale"].float(), tensors[f"{name}.zero"].float()
    return scale * (codes // 16 - zero + (codes % 16 - zero) / 16)


@torch.no_grad()
def logits(model, ids=IDS) -> torch.Tensor:
    return model(ids).logits.float()


KINDS_AND_BITS = [*((kind, 4) for kind in KINDS), ("non-uniform", 8), ("affine in groups", 8)]


@pytest.fixture(scope="module", params=[(tied, *kind) for tied in (True, False) for kind in KINDS_AND_BITS], ids=str)
def made(request, tiny_model, text_file, tmp_path_factory):
    """(base, file, tied, bits)"""
    tied, kind, bits = request.param
    file = tmp_path_factory.mktemp("made") / "q.safetensors"
    quantize(base := tiny_model(tied=tied), text_file, *KINDS[kind], *SEQUENTIAL, "--vocab_bits", bits, "--save_path", file)
    return base, file, tied, bits


def test_the_file_has_both_as_codes_and_one_where_they_are_one(made):
    base, file, tied, bits = made
    checkpoint, original = Checkpoint.open(file), load_file(base / "model.safetensors")
    outside = {name for name in checkpoint.quantized if "layers" not in name}
    assert outside == ({EMBEDDINGS} if tied else {EMBEDDINGS, HEAD}) and checkpoint.settings["vocab_bits"] == bits
    for name in outside:
        W = original[f"{name}.weight"].float()
        assert f"{name}.weight" not in checkpoint and checkpoint.bits_of(name) == bits
        assert 0 < (rebuilt(file, name, bits) - W).norm() < (0.25 if bits == 4 else 0.15 if name == HEAD else 0.015) * W.norm()


def test_all_loaders_give_what_the_rebuilt_matrices_give(made):
    base, file, tied, bits = made
    found = LeanQuantModelForCausalLM.from_pretrained(base, file)
    assert isinstance(found.get_input_embeddings(), QuantizedEmbedding) and isinstance(found.lm_head, QuantizedLinear)
    shared = found.lm_head.weight_codes.data_ptr() == found.get_input_embeddings().weight_codes.data_ptr()
    assert shared == tied
    plain = LeanQuantModelForCausalLM.from_pretrained(base, file).dequantize()
    torch.testing.assert_close(logits(found), logits(plain), rtol=1e-4, atol=1e-4)
    assert torch.equal(plain.get_input_embeddings().weight, rebuilt(file, EMBEDDINGS, bits))
    assert torch.equal(plain.lm_head.weight, rebuilt(file, EMBEDDINGS if tied else HEAD, bits))
    assert (plain.lm_head.weight is plain.get_input_embeddings().weight) == tied
    streamed = StreamedModel(base, Checkpoint.open(file), torch.float32, torch.device("cpu"))
    hidden = eval_quantized.last_hidden(streamed, IDS, 2, "").hidden
    with streamed.head() as head:
        torch.testing.assert_close(head(hidden).float(), logits(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_of_their_own_are_rounded_to_the_nearest_level(tiny_model, text_file, tmp_path, kind):
    base, file = tiny_model(), tmp_path / "q.safetensors"
    quantize(base, text_file, *KINDS[kind], "--vocab_bits", 4, "--save_path", file)
    W, levels = load_file(base / "model.safetensors")[f"{EMBEDDINGS}.weight"], Checkpoint.open(file).packed(EMBEDDINGS, 300, 64).levels(4)
    distances = (W.view(300, levels.shape[1], -1, 1) - levels.unsqueeze(2)).abs().amin(3).view(300, 64)
    torch.testing.assert_close((rebuilt(file, EMBEDDINGS, 4) - W).abs(), distances, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["non-uniform", "affine in groups"])
def test_info_says_what_the_layers_are(tiny_model, text_file, tmp_path, kind):
    quantize(tiny_model(), text_file, *KINDS[kind], "--vocab_bits", 8, "--save_path", tmp_path / "q.safetensors")
    found = cli.describe(Checkpoint.open(tmp_path / "q.safetensors"))
    assert found["grid"] == ("non-uniform levels" if kind == "non-uniform" else "affine, in groups")
    assert found["vocabulary"] == "embeddings and head in 8 bits" and "8 in 2 linears" in found["bits"]


@pytest.mark.parametrize("form", ["packed", "looked_up", "tiles", "dense"])
@pytest.mark.parametrize("columns", [40, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_with_8_bits(form, columns, dtype):
    """And their gradients. Of float16, x / 16 may be subnormal."""
    g = generator()
    codes = torch.randint(256, (50, columns), generator=g, dtype=torch.uint8)
    scale, zero = 0.16 * torch.rand(50, 1, generator=g).half(), torch.randint(16, (50, 1), generator=g, dtype=torch.uint8)
    W, bias = scale.double() / 16 * (codes.double() - 17 * zero.double()), torch.randn(50, generator=g)
    linear = QuantizedLinear(PackedLinear(codes, None, scale, zero), 8, columns, bias)
    linear.prepare(form, dtype)
    assert linear.form == (form if form != "tiles" or dtype != torch.float32 else "packed")
    x = (torch.randn(3, 5, columns, generator=g) * torch.tensor([1e-3, 1, 10]).view(3, 1, 1)).to(dtype).requires_grad_()
    expected, given = x.double() @ W.T + bias, torch.randn(3, 5, 50, generator=g)
    plain = torch.nn.functional.linear(x.detach(), W.to(dtype), bias.to(dtype)).double()
    found = linear(x)
    (found * given).sum().backward()
    error, of_plain = ((y.double() - expected).norm() / expected.norm() for y in (found, plain))
    assert error <= 2 * of_plain + 1e-6, (error, of_plain)
    torch.testing.assert_close(x.grad.double(), given.double() @ W, rtol=0.02, atol=0.02 * (given.double() @ W).abs().max().item())
    assert torch.equal(linear.packed().codes, codes)
    linear.release()
    assert torch.equal(linear.weight_codes, codes)


def test_8_bits_are_the_nearest_of_255_steps_of_a_row(tiny_model, text_file, tmp_path):
    base, file = tiny_model(), tmp_path / "q.safetensors"
    quantize(base, text_file, *KINDS["affine in groups"], "--sym", "--vocab_bits", 8, "--save_path", file)
    W, step = load_file(base / "model.safetensors")[f"{EMBEDDINGS}.weight"], load_file(file)[f"{EMBEDDINGS}.scale"].float() / 16
    assert ((rebuilt(file, EMBEDDINGS, 8) - W).abs() <= 0.502 * step).all()  # nothing is cut off
    assert (step <= 1.15 * (W.amax(1, keepdim=True) - W.amin(1, keepdim=True)) / 255).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_embeddings_keep_columns_that_the_head_they_are_does_not_read(tiny_model, text_file, tmp_path, bits):
    base = shutil.copytree(tiny_model(tied=True), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] = 0
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    quantize(base, text_file, *KINDS["non-uniform"], *SEQUENTIAL, "--vocab_bits", bits, "--save_path", tmp_path / "q.safetensors")
    W, found = (matrix[:, 3] for matrix in (tensors[f"{EMBEDDINGS}.weight"], rebuilt(tmp_path / "q.safetensors", EMBEDDINGS, bits)))
    assert (found - W).norm() < 0.25 * W.norm()


def test_grids_of_8_bits_hold_rows_of_every_kind():
    wide = torch.randn(7, 50, generator=generator(1))
    for W in (wide, wide.abs(), -wide.abs(), 0 * wide, wide + 2.5, 1e-3 * wide, 3e4 * wide.clamp(-1, 1)):
        scale, zero = digits_affine(W)
        assert torch.equal(scale, (16 * scale).half().float() / 16) and (zero % 17 == 0).all() and (scale > 0).all()
        codes = W / scale[:, None] + zero[:, None].float()
        assert codes.min() >= -0.6 and codes.max() <= 255.6


def test_layers_are_quantized_on_what_quantized_embeddings_give(tiny_model, text_file, tmp_path):
    """Without a shifted target: as those of a model that has had such embeddings all along."""
    options = [*KINDS["non-uniform"], *SEQUENTIAL, "--shift", 0]
    quantize(tiny_model(), text_file, *options, "--vocab_bits", 4, "--save_path", tmp_path / "q.safetensors")
    other = tmp_path / "other"
    model = whole_model(tiny_model())
    model.model.embed_tokens.weight.data.copy_(rebuilt(tmp_path / "q.safetensors", EMBEDDINGS, 4))
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(tiny_model()).save_pretrained(other)
    quantize(other, text_file, *options, "--save_path", tmp_path / "other.safetensors")
    found, expected = load_file(tmp_path / "q.safetensors"), load_file(tmp_path / "other.safetensors")
    names = [name for name in found if "layers" in name]
    assert len(names) == 32 and all(torch.equal(found[name], expected[name]) for name in names)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_does_on_calibration_text_what_it_did_better_than_by_rounding(tiny_model, text_file, tmp_path, tied):
    base, file = tiny_model(tied=tied), tmp_path / "q.safetensors"
    quantize(base, text_file, *KINDS["non-uniform"], *SEQUENTIAL, "--vocab_bits", 3, "--save_path", file)
    quantize(base, text_file, *KINDS["nearest"], "--vocab_bits", 3, "--save_path", tmp_path / "nearest.safetensors")
    name = EMBEDDINGS if tied else HEAD
    ids = datautils.calibration_windows(str(text_file), AutoTokenizer.from_pretrained(base), 16, 32, 0)
    theirs, W = head_inputs(whole_model(base), ids), load_file(base / "model.safetensors")[f"{name}.weight"].double()
    ours = head_inputs(LeanQuantModelForCausalLM.from_pretrained(base, file), ids)
    x = ours if tied else theirs  # one of its own is moved as well, towards what the original gives
    error = lambda matrix: (ours @ matrix.double().T - x @ W.T).square().sum()  # noqa: E731
    assert error(rebuilt(file, name, 3)) < 0.6 * error(rebuilt(tmp_path / "nearest.safetensors", name, 3))


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, LeanQuantModelForCausalLM])
@pytest.mark.parametrize("form", ["packed", "tiles", "dense"])
@pytest.mark.parametrize(("tied", "bits"), [(True, 3), (False, 3), (True, 8)])
def test_a_folder_is_read_and_saved_as_it_is(tiny_model, text_file, tmp_path, tied, bits, loader, form):
    folder = tmp_path / "folder"
    quantize(tiny_model(tied=tied), text_file, *KINDS["affine in groups"], "--vocab_bits", bits, "--save_path", folder)
    model = loader.from_pretrained(folder, dtype=torch.float32)
    expected = logits(model)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.prepare(form, torch.float32 if form == "dense" else torch.float16)
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path / "again")
    first, second = Checkpoint.open(folder), Checkpoint.open(tmp_path / "again")
    assert first.settings == second.settings and set(first.shapes) == set(second.shapes)
    for name in first.quantized:
        for suffix in (".weight_codes", ".scale", ".zero"):
            assert torch.equal(first.get(name + suffix), second.get(name + suffix))
    for again in (AutoModelForCausalLM, LeanQuantModelForCausalLM):
        torch.testing.assert_close(logits(again.from_pretrained(tmp_path / "again", dtype=torch.float32)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_models_can_be_cast_and_generate(tiny_model, text_file, tmp_path, tied):
    base, file = tiny_model(tied=tied), tmp_path / "q.safetensors"
    quantize(base, text_file, *KINDS["non-uniform"], "--vocab_bits", 4, "--save_path", file)
    model = LeanQuantModelForCausalLM.from_pretrained(base, file)
    expected = model.generate(IDS, max_new_tokens=8, do_sample=False)
    plain = LeanQuantModelForCausalLM.from_pretrained(base, file, dequantize="always").dequantize()
    assert torch.equal(plain.generate(IDS, max_new_tokens=8, do_sample=False), expected)
    levels = model.get_input_embeddings().quant_grid.clone()
    model.to(torch.bfloat16)
    assert model.get_input_embeddings()(IDS).dtype == torch.bfloat16 and torch.equal(model.get_input_embeddings().quant_grid, levels)
    torch.testing.assert_close(logits(model), logits(plain), rtol=0.1, atol=0.2)
    with pytest.raises(InputError, match="cannot be written to"):
        model.get_input_embeddings().weight = torch.zeros(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path, text_file, capsys, family):
    """Also those that scale what they look up, and heads with a bias."""
    config, arguments, _ = FAMILIES[family]
    base = write_model(getattr(transformers, config)(**(SIZES | arguments)), tmp_path / "model", "float16")
    command = [base, text_file, *KINDS["non-uniform"], "--vocab_bits", 4, "--save_path", tmp_path / "folder"]
    if family == "OLMo":  # which has no norms' gains
        assert llama.main([str(word) for word in (*command, "--nsamples", 2, "--seqlen", 32, "--eval", "none")]) == 2
        assert "has nothing but linears and embeddings" in capsys.readouterr().err
        return
    quantize(*command)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    assert isinstance(found.get_input_embeddings(), QuantizedEmbedding)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32).dequantize()
    torch.testing.assert_close(logits(found), logits(plain), rtol=1e-4, atol=1e-4)
    streamed = StreamedModel(base, Checkpoint.open(tmp_path / "folder"), torch.float32, torch.device("cpu"))
    hidden = eval_quantized.last_hidden(streamed, IDS, 2, "").hidden
    with streamed.head() as head:
        torch.testing.assert_close(head(hidden).float(), logits(plain), rtol=1e-4, atol=1e-4)


def test_the_plan_knows_and_the_report_has_a_row(tiny_model, text_file, tmp_path):
    base = tiny_model(vocab_size=4000)
    for bits in (4, 8, 16):
        options = ["--vocab_bits", bits, "--save_path", tmp_path / f"{bits}.safetensors", "--report", tmp_path / f"{bits}.json"]
        quantize(base, text_file, *KINDS["non-uniform"], *options)
    reports = [json.loads((tmp_path / f"{bits}.json").read_text()) for bits in (4, 8, 16)]
    written = [report["plan"]["written"] for report in reports]
    files = [(tmp_path / f"{bits}.safetensors").stat().st_size for bits in (4, 8, 16)]
    for number, least in ((0, 3), (1, 1.8)):  # parts, and the result
        assert written[2] - written[number] == pytest.approx(2 * (files[2] - files[number]), rel=0.05) and files[2] > least * files[number]
    rows = [[row for row in report["linears"] if row["layer"] is None] for report in reports]
    assert [row["linear"] for row in rows[0]] == [HEAD] and rows[2] == []
    assert rows[0][0]["bits"] == 4 and rows[0][0]["tokens"] == 512 and rows[0][0]["loss"] > 20 * rows[1][0]["loss"] > 0


@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize("moment", ["layer 2", "layer 3", "head"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(tiny_model, text_file, tmp_path, monkeypatch, moment, place):
    options = [*KINDS["non-uniform"], *SEQUENTIAL, "--vocab_bits", 4, "--activations", place, "--save_path"]
    base, real = tiny_model(num_hidden_layers=3), {name: getattr(llama, name) for name in ("quantize_layer", "finished_head")}
    quantize(base, text_file, *options, tmp_path / "whole.safetensors")

    def quantize_layer(model, index, *rest):
        return 1 / 0 if moment == f"layer {index + 1}" else real["quantize_layer"](model, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(llama, "quantize_layer", quantize_layer)
        patch.setattr(llama, "finished_head", lambda *rest: 1 / 0 if moment == "head" else real["finished_head"](*rest))
        with pytest.raises(ZeroDivisionError):
            quantize(base, text_file, *options, tmp_path / "stopped.safetensors")
    quantize(base, text_file, *options, tmp_path / "stopped.safetensors")
    assert (tmp_path / "stopped.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_tuning_keeps_the_codes_and_learns_the_heads_levels(tiny_model, text_file, tmp_path, tied, bits):
    base, file, out = tiny_model(tied=tied), tmp_path / "q.safetensors", tmp_path / "tuned.safetensors"
    quantize(base, text_file, *KINDS["non-uniform"], *SEQUENTIAL, "--vocab_bits", bits, "--save_path", file)
    command = [base, file, text_file, "--out", out, "--nsamples", 16, "--seqlen", 32, "--dtype", "float32"]
    assert tune.main([str(word) for word in command]) == 0
    before, after = load_file(file), load_file(out)
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before if n.endswith(("codes", "weight")))
    levels = "scale" if bits == 8 else "quant_grid"
    assert torch.equal(before[f"{EMBEDDINGS}.{levels}"], after[f"{EMBEDDINGS}.{levels}"]) != tied
    assert tied or not torch.equal(before[f"{HEAD}.{levels}"], after[f"{HEAD}.{levels}"])
    other = write_model(transformers.LlamaConfig(tie_word_embeddings=tied, **SIZES | {"hidden_act": "gelu"}), tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({name: -tensor for name, tensor in tensors.items()}, other / "model.safetensors", metadata={"format": "pt"})
    command[0], command[4] = other, tmp_path / "no.safetensors"
    assert tune.main([str(word) for word in command]) == 2


@pytest.mark.parametrize("bits", [4, 8])
def test_it_is_exported_as_plain_weights_alone(tiny_model, text_file, tmp_path, capsys, bits):
    base, file = tiny_model(tied=True), tmp_path / "q.safetensors"
    options = ["--wbits", 4, "--grid", "affine", "--groupsize", 32, "--vocab_bits", bits, "--save_path", file]
    quantize(base, text_file, *options)
    export(open_checkpoint(file), base, "dense", tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    expected = logits(LeanQuantModelForCausalLM.from_pretrained(base, file, dtype=torch.float32))
    torch.testing.assert_close(logits(model), expected, rtol=0.05, atol=0.05)
    with pytest.raises(InputError, match="gptq has embeddings and head in 16 bits: quantize without --vocab_bits, or export as dense"):
        export(open_checkpoint(file), base, "gptq", tmp_path / "gptq")
    arguments = [base, text_file, *options[:-1], tmp_path / "b.safetensors", "--nsamples", 2, "--seqlen", 32, "--export", "gptq"]
    assert llama.main([str(word) for word in arguments]) == 2
    assert "gptq has embeddings and head in 16 bits" in capsys.readouterr().err


def test_bad_input_is_one_sentence(tiny_model, text_file, tmp_path, capsys):
    for options, message in (
        (["--wbits", 3, "--vocab_bits", 5], "--vocab_bits is 5: give 2, 3, 4 or 8, or 16"),
        (["--wbits", 16, "--vocab_bits", 4], "--vocab_bits are for quantizing: give --wbits 2, 3 or 4"),
        (["--wbits", 3, "--vocab_bits", 4, "--n_layers", 1], "leave out --n_layers"),
        (["--wbits", 3, "--grid", "affine", "--groupsize", 7, "--vocab_bits", 4], "--groupsize 7 does not divide"),
        (["--wbits", 3, "--vocab_bits", 4, "--report", tmp_path / "r.json", "--example_rows", "lm_head=0"], "matches no linear"),
    ):
        arguments = [tiny_model(), text_file, "--nsamples", 2, "--seqlen", 32, "--eval", "none", *options]
        assert llama.main([str(word) for word in arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


def test_files_that_lie_about_embeddings_are_refused(tiny_model, text_file, tmp_path, capsys):
    base, file, bad = tiny_model(), tmp_path / "q.safetensors", tmp_path / "bad.safetensors"
    quantize(base, text_file, *KINDS["non-uniform"], "--vocab_bits", 4, "--save_path", file)
    tensors, settings = load_file(file), {"leanquant": json.dumps(Checkpoint.open(file).settings)}
    grid, codes = f"{EMBEDDINGS}.quant_grid", f"{EMBEDDINGS}.weight_codes"
    nan = tensors[grid].clone()
    nan[7, 3] = float("nan")
    for change, message in (
        ({grid: nan}, f"{grid} holds NaN"),
        ({codes: tensors[codes][:-1].clone()}, f"{codes} is"),
        ({codes: tensors[codes][:, :-1].clone()}, f"{codes}: codes of 31 bytes"),
        ({grid: tensors[grid][:, :8].clone()}, "the metadata says 4 bits"),
        ({grid: None}, "must have"),
        ({f"{EMBEDDINGS}.weight": torch.zeros(300, 64)}, "which the base model lacks"),
        ({f"{HEAD}.weight_codes": None, f"{HEAD}.quant_grid": None}, "the file has no tensor lm_head.weight"),
    ):
        changed = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
        save_file(changed, bad, metadata=settings)
        with pytest.raises(InputError, match=message):
            LeanQuantModelForCausalLM.from_pretrained(base, bad)
    assert cli.main(["info", str(file)]) == 0
    assert "embeddings and head" in capsys.readouterr().out


def test_files_that_lie_about_8_bits_are_refused(tiny_model, text_file, tmp_path):
    base, file, bad = tiny_model(), tmp_path / "q.safetensors", tmp_path / "bad.safetensors"
    quantize(base, text_file, *KINDS["affine in groups"], "--vocab_bits", 8, "--save_path", file)
    tensors, settings = load_file(file), Checkpoint.open(file).settings
    codes, scale, zero = (f"{EMBEDDINGS}.{name}" for name in ("weight_codes", "scale", "zero"))
    for change, said, message in (
        ({}, 4, f"{codes}: codes of 64 bytes"),
        ({}, 16, "must give its bits"),
        ({scale: tensors[scale].repeat(1, 2), zero: tensors[zero].repeat(1, 2)}, 8, f"{scale} has 2 groups"),
        ({codes: tensors[codes][:, :32].clone()}, 8, f"{codes}: codes of 32 bytes"),
        ({scale: 4200 + tensors[scale]}, 8, f"{scale} holds 4200, whose levels overflow"),
        ({zero: tensors[zero] + 16}, 8, f"{zero} holds"),
    ):
        lying = settings | {"bits_for": settings["bits_for"] | {EMBEDDINGS: said}}
        save_file(tensors | change, bad, metadata={"leanquant": json.dumps(lying)})
        with pytest.raises(InputError, match=message):
            LeanQuantModelForCausalLM.from_pretrained(base, bad)


@pytest.mark.parametrize("tied", [True, False])
def test_it_can_be_offloaded_and_loaded_into(tiny_model, text_file, tmp_path, tied):
    base, folder = tiny_model(tied=tied), tmp_path / "folder"
    quantize(base, text_file, *KINDS["non-uniform"], "--vocab_bits", 4, "--save_path", folder)
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    for options in ({}, {"offload_buffers": True}):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        cpu_offload(model, **options)
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(copy.deepcopy(model)), expected, rtol=1e-4, atol=1e-4)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for form in ("packed", "tiles"):
        model.lm_head.prepare(form, torch.float16)
        for name in (name for name in state if name.endswith("quant_grid") and "layers" not in name):
            state[name] *= 2
        model.load_state_dict(state)
        assert torch.equal(model.lm_head.packed().grid, state[f"{EMBEDDINGS if tied else HEAD}.quant_grid"])
        assert model.lm_head.form == form


@pytest.mark.parametrize(("family", "bits"), [("Llama 3", 4), ("Gemma", 4), ("Gemma", 8)])
def test_it_is_decoded_by_graphs(tmp_path, text_file, emulated, family, bits):  # noqa: F811
    """No step waits for the GPU, and each can be replayed for other tokens."""
    config, arguments, _ = FAMILIES[family]
    base = write_model(getattr(transformers, config)(**(SIZES | arguments)), tmp_path / "model", "float16")
    quantize(base, text_file, *KINDS["non-uniform"], "--vocab_bits", bits, "--save_path", tmp_path / "folder")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    expected, generate = continued(model.generate, do_sample=False), recording(model)
    assert torch.equal(continued(generate, do_sample=False), expected)
    assert Graph.replays == 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kind", "bits"), KINDS_AND_BITS)
def test_on_a_gpu(tiny_model, text_file, tmp_path, tied, kind, bits):
    base, file = tiny_model(tied=tied), tmp_path / "q.safetensors"
    quantize(base, text_file, *KINDS[kind], "--vocab_bits", bits, "--save_path", file)
    expected = logits(LeanQuantModelForCausalLM.from_pretrained(base, file, device="cpu"))
    model = LeanQuantModelForCausalLM.from_pretrained(base, file, device="cuda", dtype=torch.float16)
    assert model.lm_head.weight_codes is None and model.get_input_embeddings().weight_codes.is_cuda  # tiles, and codes
    torch.testing.assert_close(logits(model, IDS.cuda()).cpu(), expected, rtol=0.05, atol=0.05)
    how = {"max_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones(1, 10).cuda().long()}
    assert torch.equal(with_cuda_graphs(model)(IDS[:1].cuda(), **how), model.generate(IDS[:1].cuda(), **how))


def test_odd_tokens(tiny_model, text_file, tmp_path):
    quantize(tiny_model(), text_file, *KINDS["non-uniform"], "--vocab_bits", 4, "--save_path", tmp_path / "folder")
    embeddings = AutoModelForCausalLM.from_pretrained(tmp_path / "folder").get_input_embeddings()
    assert embeddings(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 64)
    for token in (-1, 300):
        with pytest.raises((IndexError, RuntimeError)):
            embeddings(torch.tensor([token]))


def test_a_head_that_is_stored_beside_the_embeddings_it_is(tiny_model, text_file, tmp_path, capsys):
    """As older libraries store it: the same tensor twice. Another tensor there is another head, which config.json must not deny."""
    shutil.copytree(tiny_model(tied=True), tmp_path / "twice")
    tensors = load_file(tmp_path / "twice" / "model.safetensors")
    for factor in (1, 2):
        head = {f"{HEAD}.weight": factor * tensors[f"{EMBEDDINGS}.weight"]}
        save_file(tensors | head, tmp_path / "twice" / "model.safetensors", metadata={"format": "pt"})
        arguments = [tmp_path / "twice", text_file, *KINDS["non-uniform"], "--vocab_bits", 4, "--nsamples", 2, "--seqlen", 32]
        arguments += ["--eval", "none", "--save_path", tmp_path / f"{factor}.safetensors"]
        assert llama.main([str(word) for word in arguments]) == (0 if factor == 1 else 2)
    assert {name for name in Checkpoint.open(tmp_path / "1.safetensors").shapes if HEAD in name} == set()
    assert "set tie_word_embeddings to false there" in capsys.readouterr().err


def test_bits_shared_out_go_with_it(tiny_model, text_file, tmp_path):
    base, bits = tiny_model(), tmp_path / "bits.txt"
    command = [base, text_file, "--bits", 2.75, "--out", bits, "--nsamples", 4, "--seqlen", 32, "--dtype", "float32"]
    assert allocate.main([str(word) for word in command]) == 0
    options = ["--wbits", 2, *GRIDS["nonuniform"], "--bits_for", *bits.read_text().split(), "--vocab_bits", 3]
    quantize(base, text_file, *options, "--save_path", tmp_path / "q.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "q.safetensors")
    assert {checkpoint.bits_of(name) for name in (EMBEDDINGS, HEAD)} == {3} and checkpoint.settings["bits_for"][HEAD] == 3

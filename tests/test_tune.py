"""Tuned models: closer to the unquantized one on text that was kept back, of the very size and codes; gradients against autograd's own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import export
import llama
import tune
from conftest import SIZES, generator, make_text, make_tokenizer, write_model
from leanquant import LeanQuantModelForCausalLM
from leanquant.packing import GRID, SCALE, Checkpoint, PackedLinear, pack_codes
from test_families import FAMILIES
from test_modelutils import random_ids, whole_logits
from test_moe import CONFIGS

FIXTURES = Path(__file__).with_name("fixtures")
SMALL = ["--nsamples", 64, "--seqlen", 32, "--dtype", "float32"]
GRIDS = {
    "free levels": ["--grid", "nonuniform"],
    "rows": ["--grid", "affine"],
    "groups": ["--grid", "affine", "--groupsize", 16],
    "GPTQ": ["--grid", "minmax"],
}


def command(program, *words) -> int:
    return program.main([str(word) for word in words])


def quantize(model, text, out, *options, bits=2) -> int:
    flags = ["--wbits", bits, "--true-sequential", "--act-order", "--percdamp", "0.1", "--nsamples", 16, "--seqlen", 32, "--eval", "none"]
    return command(llama, model, text, *flags, *options, "--save_path", out)


@pytest.fixture
def model(tmp_path):
    return write_model(transformers.LlamaConfig(**SIZES), tmp_path / "model", "float16")


@pytest.fixture
def quantized(model, text_file, tmp_path):
    assert quantize(model, text_file, tmp_path / "q.safetensors", "--grid", "nonuniform") == 0
    return tmp_path / "q.safetensors"


def divergence(model, path, ids) -> float:
    log_p = whole_logits(model, ids).log_softmax(-1)
    with torch.no_grad():
        log_q = LeanQuantModelForCausalLM.from_pretrained(model, path)(ids).logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_tuned_model_is_closer_and_nothing_else_changes(model, text_file, tokenizer, tmp_path, capsys, grid, bits):
    path, out = tmp_path / "q.safetensors", tmp_path / "tuned.safetensors"
    assert quantize(model, text_file, path, *GRIDS[grid], "--bits_for", ".*v_proj=4", bits=bits) == 0
    capsys.readouterr()
    assert command(tune, model, path, text_file, "--out", out, *SMALL) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{out}: KL ") and said.endswith("nats a token on 8 windows kept back\n")
    before, after = load_file(path), load_file(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed and all(name.endswith((GRID, SCALE)) for name in changed)
    assert all(before[name].dtype == after[name].dtype and before[name].shape == after[name].shape for name in before)
    ids = torch.tensor(tokenizer(make_text(2047, seed=3))["input_ids"]).view(-1, 32)
    assert divergence(model, out, ids) < divergence(model, path, ids)
    old, new = Checkpoint.open(path).settings, Checkpoint.open(out).settings
    assert new.pop("tuned")["nsamples"] == 64 and new == old


def test_what_is_said_is_what_is_written(model, quantized, text_file, tokenizer, tmp_path, capsys):
    out = tmp_path / "tuned.safetensors"
    assert command(tune, model, quantized, text_file, "--out", out, *SMALL) == 0
    before, after = map(float, capsys.readouterr().out.split("KL ")[1].split(" nats")[0].split(" -> "))
    kept_back = tune.datautils.calibration_windows(str(text_file), tokenizer, 64 + tune.KEPT_BACK, 32, 1)[64:]
    assert divergence(model, quantized, kept_back) == pytest.approx(before, abs=2e-4)
    assert divergence(model, out, kept_back) == pytest.approx(after, abs=2e-4)
    assert after < before


def test_the_same_command_writes_the_same_bytes(model, quantized, text_file, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert command(tune, model, quantized, text_file, "--out", tmp_path / f"{name}.safetensors", *SMALL, "--seed", seed) == 0
    a, b, c = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_folders_load_by_themselves_and_can_be_tuned_again(model, quantized, text_file, tmp_path):
    first, second, ids = tmp_path / "first", tmp_path / "second", random_ids(2, 24)
    assert command(tune, model, quantized, text_file, "--out", first, *SMALL) == 0
    assert command(tune, model, first, text_file, "--out", second, *SMALL, "--lr", "0.002", "--passes", 2) == 0
    config = json.loads((second / "config.json").read_text())
    assert config["quantization_config"]["tuned"]["passes"] == 2
    found = AutoModelForCausalLM.from_pretrained(second, dtype=torch.float32)(ids).logits
    expected = LeanQuantModelForCausalLM.from_pretrained(model, second)(ids).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_can_be_tuned(tmp_path, text_file, family):
    config, arguments, _ = FAMILIES[family]
    folder = write_model(getattr(transformers, config)(**(SIZES | arguments)), tmp_path / "model", "float16")
    assert quantize(folder, text_file, tmp_path / "q.safetensors", "--grid", "affine") == 0
    assert command(tune, folder, tmp_path / "q.safetensors", text_file, "--out", tmp_path / "tuned.safetensors", *SMALL) == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_mixtures_can_be_tuned(tmp_path, text_file, name):
    folder = write_model(CONFIGS[name](), tmp_path / "model", "float16")
    assert quantize(folder, text_file, tmp_path / "q.safetensors", "--grid", "nonuniform") == 0
    assert command(tune, folder, tmp_path / "q.safetensors", text_file, "--out", tmp_path / "tuned.safetensors", *SMALL) == 0


@pytest.mark.parametrize("bits", [4, 2])
def test_published_files_can_be_tuned(text_file, tmp_path, bits):
    base, file, out = tmp_path / "base", FIXTURES / f"llama_{bits}bit.safetensors", tmp_path / "tuned.safetensors"
    shutil.copytree(FIXTURES / "llama_base", base)
    make_tokenizer().save_pretrained(base)
    assert command(tune, base, file, text_file, "--out", out, *SMALL) == 0
    checkpoint = Checkpoint.open(out)
    checkpoint.check_headers()
    assert checkpoint.settings["packing"] == "nibble" and checkpoint.settings["bits"] == bits
    assert LeanQuantModelForCausalLM.from_pretrained(base, out, bits=bits)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_gradients_are_autograds(bits, groups):
    g, columns = generator(), 42
    codes = torch.randint(2**bits, (5, columns), generator=g, dtype=torch.uint8)
    levels = torch.randn(5, groups, 2**bits, generator=g, requires_grad=True)
    gradient = torch.randn(5, columns, generator=g)
    W = tune.Rebuilt.apply(levels, pack_codes(codes, bits), bits, columns, torch.float32)
    expected = levels.gather(2, codes.long().view(5, groups, -1)).view(5, columns)
    assert torch.equal(W, expected)
    (found,) = torch.autograd.grad(W, levels, gradient)
    (wanted,) = torch.autograd.grad(expected, levels, gradient)
    torch.testing.assert_close(found, wanted)


def test_scales_learn_through_the_levels_that_readers_make_of_them():
    g = generator()
    scale, zero = torch.rand(3, 2, generator=g, requires_grad=True), torch.randint(4, (3, 2), generator=g, dtype=torch.uint8)
    codes = torch.randint(4, (3, 8), generator=g, dtype=torch.uint8)
    W = PackedLinear(pack_codes(codes, 2), None, scale, zero).levels(2)
    W = tune.Rebuilt.apply(W, pack_codes(codes, 2), 2, 8, torch.float32)
    gradient = torch.randn(3, 8, generator=g)
    (found,) = torch.autograd.grad(W, scale, gradient)
    steps = codes.float().view(3, 2, 4) - zero.float().unsqueeze(-1)
    torch.testing.assert_close(found, (steps * gradient.view(3, 2, 4)).sum(-1))


def test_the_loss_and_its_gradient():
    g = generator()
    logits, wanted = (torch.randn(tune.TOKENS + 7, 50, generator=g) for _ in range(2))
    logits.requires_grad_()
    expected = torch.nn.functional.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean")
    gradient = torch.empty_like(logits)
    assert tune.compare(logits.detach(), wanted, gradient) == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0], rtol=1e-4, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("K", [16, 8, 4])
def test_a_gpu_sums_by_code_as_the_cpu(K):
    g = generator()
    codes, values = torch.randint(K, (9, 2, 1000), generator=g, dtype=torch.uint8), torch.randn(9, 2, 1000, generator=g)
    expected = tune.sum_by_code(values, codes, K)
    torch.testing.assert_close(tune.sum_by_code(values.cuda(), codes.cuda(), K).cpu(), expected, rtol=1e-5, atol=1e-4)


def test_what_is_no_better_is_not_written(model, quantized, text_file, tmp_path, capsys):
    assert command(tune, model, quantized, text_file, "--out", tmp_path / "out.safetensors", *SMALL, "--lr", "0.9") == 2
    assert "tuning made it no better" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists() and not (tmp_path / "out.safetensors.partial").exists()


def test_bad_input_is_one_sentence(model, quantized, text_file, tmp_path, capsys):
    (tmp_path / "unfinished.partial").mkdir()
    (tmp_path / "unfinished.partial" / "journal.jsonl").touch()
    assert quantize(model, text_file, tmp_path / "affine", "--grid", "affine", bits=4) == 0
    assert command(export, tmp_path / "affine", "--to", "awq", "--out", tmp_path / "awq") == 0
    capsys.readouterr()
    out = ("--out", tmp_path / "out.safetensors", "--seqlen", 32)
    for words, message in (
        ((model, quantized, text_file, "--seqlen", 32, "--out", quantized), "exists: give another --out"),
        ((model, model, text_file, *out), "holds no quantized weights"),
        ((model, quantized, tmp_path / "gone.txt", *out), "does not exist: check the path of the text file"),
        ((model, quantized, text_file, "--out", tmp_path / "unfinished"), "an unfinished run of llama.py"),
        ((model, tmp_path / "awq", text_file, *out), "is awq's: tune what llama.py wrote"),
        ((tmp_path / "affine", quantized, text_file, *out), "is already quantized"),
        ((tmp_path / "gone", quantized, text_file, *out), "neither a model folder nor a hub name"),
        ((model, quantized, text_file, *out, "--device", "cuda:99"), "CUDA devices"),
        ((model, quantized, text_file, *out, "--seqlen", 1024), "the model's context is 256"),
    ):
        assert command(tune, *words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out.safetensors").exists() and (tmp_path / "unfinished.partial" / "journal.jsonl").exists()

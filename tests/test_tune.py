"""Tuned models: closer to the unquantized one on text that was kept back, of the very size and codes; gradients against autograd's own."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import export
import llama
import tune
from conftest import SIZES, generator, make_text, make_tokenizer, write_model
from leanquant import LeanQuantModelForCausalLM, packing
from leanquant import __main__ as leanquant_main
from leanquant.errors import InputError
from leanquant.linear import QuantizedLinear
from leanquant.packing import GRID, SCALE, Checkpoint, PackedLinear, pack_codes
from live_tensors import LiveTensors
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
    *steps, last = said.splitlines()
    assert all(re.fullmatch(rf"step {min(7 * n, 64)}/64  KL \d\.\d{{4}}", line) for n, line in enumerate(steps, 1)) and len(steps) == 10
    assert last.startswith(f"{out}: KL ") and last.endswith("nats a token on 8 windows kept back")
    before, after = load_file(path), load_file(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed and all(name.endswith((GRID, SCALE)) for name in changed)
    assert all(before[name].dtype == after[name].dtype and before[name].shape == after[name].shape for name in before)
    ids = torch.tensor(tokenizer(make_text(2047, seed=3))["input_ids"]).view(-1, 32)
    assert divergence(model, out, ids) < divergence(model, path, ids)
    old, new = Checkpoint.open(path).settings, Checkpoint.open(out).settings
    assert [told["nsamples"] for told in new.pop("tuned")] == [64] and new == old


def test_what_is_said_is_of_what_is_written(model, quantized, text_file, tokenizer, tmp_path, capsys, monkeypatch):
    """Also where rounding matters: levels of few digits, as they are then in the file."""
    rounding = tune.rounded
    coarse = lambda linear, path: setattr(linear, "start", (linear.start * 256).round() / 256) or rounding(linear, path)  # noqa: E731
    monkeypatch.setattr(tune, "rounded", coarse)
    out = tmp_path / "tuned.safetensors"
    assert command(tune, model, quantized, text_file, "--out", out, *SMALL) == 0
    before, after = map(float, capsys.readouterr().out.split(": KL ")[1].split(" nats")[0].split(" -> "))
    tokens = torch.tensor(tokenizer(text_file.read_text())["input_ids"])
    kept_back = tokens[-tune.KEPT_BACK * 32 :].view(-1, 32)
    assert divergence(model, quantized, kept_back) == pytest.approx(before, abs=6e-5)
    assert divergence(model, out, kept_back) == pytest.approx(after, abs=6e-5)
    assert after < before


def test_what_is_learned_from_never_meets_what_is_kept_back(tokenizer, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(0x4E00 + n) for n in range(200)))  # no two windows that do not overlap have tokens in the same order
    windows = tune.datautils.windows_apart(str(text), tokenizer, 40, 8, 16, 0)
    tokens = tokenizer(text.read_text())["input_ids"]
    assert windows[40:].flatten().tolist() == tokens[-8 * 16 :]
    starts = [tokens_start(tokens, window.tolist()) for window in windows[:40]]
    assert len(set(starts)) > 10 and max(starts) + 16 <= len(tokens) - 8 * 16
    with pytest.raises(InputError, match=r"601 tokens and 39 windows need 624"):
        tune.datautils.windows_apart(str(text), tokenizer, 1, 38, 16, 0)


def tokens_start(tokens: list[int], window: list[int]) -> int:
    return next(start for start in range(len(tokens)) if tokens[start : start + len(window)] == window)


def test_each_pass_takes_every_window_once_in_another_order():
    args = tune.parse(["model", "quantized", "text", "--out", "out", "--passes", "3", "--batch_size", "4"])
    batches = [batch.tolist() for batch in tune.batches_of(10, args)]
    assert [len(batch) for batch in batches] == 3 * [4, 4, 2]
    orders = [sum(batches[start : start + 3], []) for start in (0, 3, 6)]
    assert all(sorted(order) == list(range(10)) for order in orders) and len(set(map(tuple, orders))) == 3


def test_only_the_windows_to_learn_from_are_learned_from(model, quantized, text_file, tmp_path, monkeypatch):
    numbers, learn = [], tune.learn
    monkeypatch.setattr(tune, "learn", lambda model, text, batch: numbers.extend(batch.tolist()) or learn(model, text, batch))
    assert command(tune, model, quantized, text_file, "--out", tmp_path / "out", *SMALL, "--passes", 2) == 0
    assert sorted(numbers) == sorted(2 * list(range(64)))


def test_the_rate_rises_and_falls():
    rates = [tune.share_of_rate(step, 100) for step in range(100)]
    top = rates.index(max(rates))
    assert top == 4 and rates[:5] == sorted(rates[:5]) and rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[0] == pytest.approx(0.2, rel=0.01) and rates[-1] == pytest.approx(tune.LAST_RATE, rel=0.01)
    assert tune.share_of_rate(0, 1) == 1


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_units_are_distances_of_levels_by_width(bits):
    K, columns = 2**bits, 16
    codes = pack_codes(torch.arange(columns, dtype=torch.uint8).remainder(K).expand(2, -1), bits)
    levels = torch.tensor([[0.5], [3.0]]) * torch.arange(K)
    grid = tune.TunedLinear(QuantizedLinear(PackedLinear(codes, levels.half()), bits, columns, None), torch.device("cpu"))
    torch.testing.assert_close(grid.unit, torch.tensor([[0.5], [3.0]]) * 4 / K)
    scale, zero = torch.tensor([[0.5], [3.0]]).half(), torch.full((2, 1), K // 2, dtype=torch.uint8)
    affine = tune.TunedLinear(QuantizedLinear(PackedLinear(codes, None, scale, zero), bits, columns, None), torch.device("cpu"))
    affine.moved.data.fill_(1)
    moved = (affine.rebuilt(torch.float32) - scale.float() * (torch.arange(columns).remainder(K) - K // 2)).abs().amax(1, keepdim=True)
    torch.testing.assert_close(moved, grid.unit)  # the outermost level, by as much
    assert torch.equal(affine.weight, affine.rebuilt(torch.float16))  # some models look at it


def test_the_same_command_writes_the_same_bytes(model, quantized, text_file, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert command(tune, model, quantized, text_file, "--out", tmp_path / f"{name}.safetensors", *SMALL, "--seed", seed) == 0
    a, b, c = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_a_full_disk_loses_no_more_than_what_is_learned_since(model, quantized, text_file, tmp_path, capsys, monkeypatch):
    save, saved, out = packing.save_file, [], tmp_path / "out.safetensors"

    def full_at_the_third(tensors, path, *metadata):
        saved.append(path)
        if len(saved) == 3:
            raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(errno.ENOSPC)} (os error {errno.ENOSPC})")
        save(tensors, path, *metadata)

    monkeypatch.setattr(tune, "KEPT_EVERY", 0)
    monkeypatch.setattr(packing, "save_file", full_at_the_third)
    assert command(tune, model, quantized, text_file, "--out", out, *SMALL) == 2
    error = capsys.readouterr().err
    assert f"{saved[2]} cannot be written" in error and error.endswith("make room\n") and error.count("\n") == 1
    assert command(tune, model, quantized, text_file, "--out", out, *SMALL) == 0
    assert capsys.readouterr().out.startswith("going on after step 2,")


@pytest.mark.parametrize("name", ["out.safetensors", "out"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_is_killed_while_it_is_published(model, quantized, text_file, tmp_path, capsys, monkeypatch, name, when):
    """Before the result is complete the same command goes on with all that was learned; then nothing is left that stands in the way."""
    out, words = tmp_path / name, (tune, model, quantized, text_file, "--out", tmp_path / name)
    publish = packing.ModelWriter.publish

    def killed(self, *args, **kwargs):
        if when == "after":
            publish(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "KEPT_EVERY", 0)
    with monkeypatch.context() as patched:
        patched.setattr(packing.ModelWriter, "publish" if when == "after" else "finish", killed)
        assert command(*words, *SMALL) == 130
    assert out.exists() == (when == "after")
    capsys.readouterr()
    assert command(*words, *SMALL, *(["--overwrite"] if when == "after" else [])) == 0
    assert ("going on after step 64" in capsys.readouterr().out) == (when == "before")
    assert not (tmp_path / f"{name}.partial").exists()


@pytest.mark.parametrize("name", ["out.safetensors", "out"])
def test_a_killed_run_goes_on_and_writes_the_same_bytes(model, quantized, text_file, tmp_path, capsys, monkeypatch, name):
    words = (tune, model, quantized, text_file, "--out")
    assert command(*words, tmp_path / f"whole-{name}", *SMALL) == 0
    whole = capsys.readouterr().out.splitlines()
    learn, steps = tune.learn, []

    def killed_in_step_10(*args):
        steps.append(len(steps))
        if len(steps) == 10:
            raise KeyboardInterrupt
        return learn(*args)

    monkeypatch.setattr(tune, "KEPT_EVERY", 0)
    monkeypatch.setattr(tune, "learn", killed_in_step_10)
    out, partial = tmp_path / name, tmp_path / f"{name}.partial"
    assert command(*words, out, *SMALL) == 130 and not out.exists()
    assert capsys.readouterr().err == "interrupted: the same command goes on with what was kept, if anything was\n"
    for changed in (("--lr", "0.002"), ("--seed", 7), ("--nsamples", 32)):
        assert command(*words, out, *SMALL, *changed) == 2
        error = capsys.readouterr().err
        assert f"holds an unfinished run that differs ({changed[0][2:]}: " in error and error.count("\n") == 1
        assert "finish that one, or remove it" in error
    assert command(export, quantized, "--to", "dense", "--base", model, "--out", out.with_suffix("")) == (2 if name == "out" else 0)
    assert quantize(model, text_file, out, "--grid", "nonuniform") == 2
    assert "what an unfinished run of scripts/tune.py has done: let it finish" in capsys.readouterr().err
    assert command(*words, out, *SMALL) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "going on after step 9, which an earlier run finished" and len(steps) == 10 + 64 - 9
    assert [line.split("KL")[0] for line in said[1:-1]] == [line.split("KL")[0] for line in whole[1:-1]]
    assert said[-1].split(": ")[1] == whole[-1].split(": ")[1]
    if out.is_dir():
        assert all((out / f.name).read_bytes() == f.read_bytes() for f in (tmp_path / f"whole-{name}").iterdir())
    else:
        assert out.read_bytes() == (tmp_path / f"whole-{name}").read_bytes()
    assert not partial.exists()


def test_folders_load_by_themselves_and_can_be_tuned_again(model, quantized, text_file, tmp_path, capsys):
    first, second, ids = tmp_path / "first", tmp_path / "second", random_ids(2, 24)
    assert command(tune, model, quantized, text_file, "--out", first, *SMALL) == 0
    assert command(tune, model, first, text_file, "--out", second, *SMALL, "--lr", "0.002", "--passes", 2) == 0
    capsys.readouterr()
    assert leanquant_main.main(["info", str(second)]) == 0
    assert capsys.readouterr().out.split("tuned on")[1].count(f"{text_file}, 64 x 32 tokens, seed 1") == 2
    config = json.loads((second / "config.json").read_text())
    assert [told["passes"] for told in config["quantization_config"]["tuned"]] == [1, 2]
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
    logits, wanted = (torch.randn(2 * tune.TOKENS + 7, 50, generator=g) for _ in range(2))
    logits.requires_grad_()
    expected = torch.nn.functional.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean")
    gradient = torch.empty_like(logits)
    assert tune.compare(logits.detach(), gradient, wanted) == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0], rtol=1e-4, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("K", [16, 8, 4])
def test_a_gpu_sums_by_code_as_the_cpu(K):
    g = generator()
    codes, values = torch.randint(K, (9, 2, 1000), generator=g, dtype=torch.uint8), torch.randn(9, 2, 1000, generator=g)
    expected = tune.sum_by_code(values, codes, K)
    torch.testing.assert_close(tune.sum_by_code(values.cuda(), codes.cuda(), K).cpu(), expected, rtol=1e-5, atol=1e-4)


def test_bfloat16_levels_and_parts_of_any_size(model, text_file, tmp_path, monkeypatch):
    path, whole, parts = (tmp_path / name for name in ("q.safetensors", "whole.safetensors", "parts.safetensors"))
    transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(model)
    assert quantize(model, text_file, path, "--grid", "nonuniform") == 0
    assert command(tune, model, path, text_file, "--out", whole, *SMALL) == 0
    monkeypatch.setattr(tune, "PART_BYTES", 1)
    assert command(tune, model, path, text_file, "--out", parts, *SMALL) == 0
    assert whole.read_bytes() == parts.read_bytes()
    assert Checkpoint.open(whole).get(Checkpoint.open(whole).quantized[0] + GRID).dtype == torch.bfloat16


def test_a_file_is_tuned_in_its_place(model, quantized, text_file, tmp_path):
    assert command(tune, model, quantized, text_file, "--out", tmp_path / "other.safetensors", *SMALL) == 0
    assert command(tune, model, quantized, text_file, "--out", quantized, "--overwrite", *SMALL) == 0
    assert quantized.read_bytes() == (tmp_path / "other.safetensors").read_bytes()


def test_a_file_that_changes_meanwhile_is_not_mixed(model, quantized, text_file, tmp_path, capsys, monkeypatch):
    learning = tune.tune
    monkeypatch.setattr(tune, "tune", lambda *args: os.utime(quantized, (0, 0)) or learning(*args))
    assert command(tune, model, quantized, text_file, "--out", tmp_path / "out", *SMALL) == 2
    assert "were changed while" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_is_no_better_is_not_written(model, quantized, text_file, tmp_path, capsys):
    assert command(tune, model, quantized, text_file, "--out", tmp_path / "out.safetensors", *SMALL, "--lr", "0.9") == 2
    assert "tuning made it no better" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists() and not (tmp_path / "out.safetensors.partial").exists()


def test_bad_input_is_one_sentence(model, quantized, text_file, tmp_path, capsys):
    (tmp_path / "unfinished.partial").mkdir()
    (tmp_path / "unfinished.partial" / "journal.jsonl").touch()
    assert quantize(model, text_file, tmp_path / "affine", "--grid", "affine", bits=4) == 0
    assert command(export, tmp_path / "affine", "--to", "awq", "--out", tmp_path / "awq") == 0
    other = write_model(transformers.LlamaConfig(**SIZES), tmp_path / "other", "float16")
    weights = load_file(other / "model.safetensors")
    save_file({name: t * 1.5 for name, t in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    falcon = write_model(transformers.FalconConfig(**SIZES), tmp_path / "falcon", "float16")
    text_file = tmp_path / "short.txt"
    text_file.write_text(make_text(2000))
    capsys.readouterr()
    out = ("--out", tmp_path / "out.safetensors", "--seqlen", 32)
    for words, message in (
        ((model, quantized, text_file, "--seqlen", 32, "--out", quantized), "exists: give another --out"),
        ((model, quantized, text_file, "--out", "/"), "no name for a result"),
        ((model, quantized, text_file, "--out", tmp_path / "x" / ".."), "no name for a result"),
        ((model, model, text_file, *out), "holds no quantized weights"),
        ((model, quantized, tmp_path / "gone.txt", *out), "does not exist: check the path of the text file"),
        ((model, quantized, text_file, "--out", tmp_path / "unfinished"), "an unfinished run of llama.py"),
        ((model, tmp_path / "awq", text_file, *out), "is awq's: tune what llama.py wrote"),
        ((tmp_path / "affine", quantized, text_file, *out), "is already quantized"),
        ((other, quantized, text_file, *out), "give the model that was quantized"),
        ((falcon, quantized, text_file, *out), "give the model that was quantized"),
        ((tmp_path / "awq", quantized, text_file, *out), "is already quantized"),
        ((model, quantized, text_file, *out, "--nsamples", 1, "--seqlen", 250), "tokens and 9 windows need"),
        ((tmp_path / "gone", quantized, text_file, *out), "neither a model folder nor a hub name"),
        ((model, quantized, text_file, *out, "--device", "cuda:99"), "CUDA devices"),
        ((model, quantized, text_file, *out, "--seqlen", 1024), "the model's context is 256"),
    ):
        assert command(tune, *words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out.safetensors").exists() and (tmp_path / "unfinished.partial" / "journal.jsonl").exists()


def test_a_further_layer_costs_its_packed_weights_not_rebuilt_ones(text_file, tmp_path):
    peaks = []
    for layers in (2, 6):
        sizes = SIZES | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": layers}
        folder, path = write_model(transformers.LlamaConfig(**sizes), tmp_path / f"{layers}"), tmp_path / f"{layers}.safetensors"
        assert quantize(folder, text_file, path, "--grid", "minmax", "--nearest", bits=3) == 0
        with LiveTensors() as live:
            assert command(tune, folder, path, text_file, "--out", tmp_path / f"{layers}-tuned", *SMALL, "--nsamples", 4) == 0
        peaks.append(live.peak)
    checkpoint = Checkpoint.open(path)
    layer = sum(map(checkpoint.weights_of, checkpoint.quantized)) / 6
    states = 2 * 32 * 256 * 4  # of a batch, for the way back
    assert peaks[0] < 3.5 * 4 * layer  # rebuilt weights of a layer; with codes as torch's gather keeps them it would be 5
    assert 0 < (peaks[1] - peaks[0]) / 4 < (3 + 2) / 8 * layer + 2 * states  # packed twice while it is loaded
    assert peaks[1] > 4 * layer  # one layer's at least is counted


@pytest.mark.parametrize("words", [("--lr", "nan"), ("--lr", "x"), ("--lr", "1"), ("--seed", "-1"), ("--seed", 2**32), ("--passes", 0)])
def test_bad_numbers_are_refused_with_what_to_give(capsys, words):
    with pytest.raises(SystemExit):
        tune.parse(["model", "quantized", "text", "--out", "out", *map(str, words)])
    assert re.search(r"(learning rate|seed|number).*: give", capsys.readouterr().err)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_gpu_tunes(model, text_file, tmp_path, grid, dtype):
    path = tmp_path / "q.safetensors"
    assert quantize(model, text_file, path, *GRIDS[grid], "--device", "cpu", bits=3) == 0
    assert command(tune, model, path, text_file, "--out", tmp_path / "out.safetensors", *SMALL, "--device", "cuda", "--dtype", dtype) == 0

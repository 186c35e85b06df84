"""Bits shared out among linears: gradients against autograd's through the whole model, shares against all others, the command."""

import itertools
import math
import re
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

import allocate
import llama
from allocate import Linear
from conftest import SIZES, generator, make_text, write_model
from hessian import Symmetric
from leanquant.foreign import open_checkpoint
from leanquant.packing import Checkpoint
from modelutils import StreamedModel
from test_families import FAMILIES
from test_moe import CONFIGS

SHORT = ["--nsamples", "4", "--seqlen", "32", "--dtype", "float32"]


@pytest.fixture
def model(tmp_path):
    return write_model(transformers.LlamaConfig(**SIZES), tmp_path / "model", "float16")


def command(*words) -> int:
    return allocate.main([str(word) for word in words])


def test_gradients_are_those_of_the_whole_model(model, monkeypatch):
    """In each linear's output, of what is drawn; summed as F says."""
    ids = torch.randint(90, (3, 16), generator=generator())
    drawn = torch.randint(90, (16, 1), generator=generator())
    monkeypatch.setattr(torch, "multinomial", lambda *_, **__: drawn)
    costs, groups = allocate.costs, []

    def noted(its, share, *rest):
        groups.append((its, share * ids.numel()))
        return costs(its, share, *rest)

    monkeypatch.setattr(allocate, "costs", noted)
    streamed = StreamedModel(model, open_checkpoint(model), torch.float32, torch.device("cpu"))
    args = allocate.parse(["model", "text", "--bits", "3", "--out", "out"])
    found = {}
    for layer in allocate.costs_by_layer(streamed, ids, args):
        found |= layer
    whole = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    seen = {name: [] for name in found}
    for name, module in whole.named_modules():
        if name in seen:
            module.register_forward_hook(lambda _, x, y, name=name: seen[name].append((x[0], y)))
    for row in ids:
        loss = -whole(row[None]).logits[0].log_softmax(-1).gather(1, drawn).sum()
        for values in seen.values():
            values[-1] = (values[-1][0], torch.autograd.grad(loss, values[-1][1], retain_graph=True)[0])
    assert len(found) == 14 and len(groups) == 8  # q, k and v share a sum, gate and up
    assert [share for _, share in groups] == 4 * [1] + 4 * [0.5]  # the last layer comes first
    for name, values in seen.items():
        number, _, rest = name.removeprefix("model.layers.").partition(".")
        sums = next(its for its, share in groups if share == (0.5, 1)[int(number)] and rest in its.linears)
        x, g = (torch.cat([pair[side][0] for pair in values]).detach() for side in (0, 1))
        F = (x * g.square().mean(1, keepdim=True)).T @ x
        torch.testing.assert_close(sums.F[rest].triu(), F.triu(), rtol=1e-3, atol=1e-5 * F.abs().max().item())
        torch.testing.assert_close(sums.H.triu(), (x.T @ x).triu(), rtol=1e-3, atol=1e-3)
        assert sums.tokens == 48 and found[name].costs[2] > found[name].costs[3] > found[name].costs[4] > 0


def test_a_cost_is_what_errors_do(monkeypatch):
    """Half the mean over tokens of sum_o s (E x)_o^2, s the mean of g_o^2."""
    g = generator()
    linear, x, gradients = torch.nn.Linear(16, 8, bias=False), torch.randn(50, 16, generator=g), torch.randn(50, 8, generator=g)
    sums = allocate.Sums({"x": linear}, torch.device("cpu"))
    for part, its in ((x[:20][None], gradients[:20][None]), (x[20:], gradients[20:])):
        sums.add(part)
        sums.add_gradient("x", part, its)
    errors = []
    row_losses = allocate.quant.row_losses
    monkeypatch.setattr(allocate.quant, "row_losses", lambda E, F: errors.append(E) or row_losses(E, F))
    args = allocate.parse(["model", "text", "--bits", "3", "--out", "out"])
    found, half = (allocate.costs(sums, share / 50, set(), args)["x"] for share in (1, 0.5))
    assert half.costs == pytest.approx({width: cost / 2 for width, cost in found.costs.items()})
    assert found.weights == 128
    for E, cost in zip(errors[:3], found.costs.values(), strict=True):
        expected = ((x @ E.T).square().sum(1) * gradients.square().mean(1)).mean() / 2
        assert cost == pytest.approx(expected.item(), rel=1e-4)
    assert Symmetric.of(sums.F["x"].T).rows(slice(0, 16)).allclose(sums.F["x"].triu() + sums.F["x"].triu(1).T)


@pytest.mark.parametrize("seed", range(20))
def test_shares_are_the_best_that_fit(seed):
    """Against all others, where steps are so small beside the budget that the last one matters little."""
    g = generator(seed)
    costs = (torch.rand(6, 3, generator=g).cumsum(1).flip(1) * torch.rand(6, 1, generator=g)).tolist()
    linears = {f"l.{n}.x": Linear(100, dict(zip((2, 3, 4), its, strict=True))) for n, its in enumerate(costs)}
    cost = lambda bits: sum(linear.costs[width] for linear, width in zip(linears.values(), bits, strict=True))  # noqa: E731
    for average in (2, 2.5, 3, 3 + 1 / 6, 4):
        found = list(allocate.allocate(linears, average).values())
        assert sum(found) <= 6 * average + 1e-9
        best = min(cost(bits) for bits in itertools.product((2, 3, 4), repeat=6) if sum(bits) <= 6 * average + 1e-9)
        one_step_less = min(cost(bits) for bits in itertools.product((2, 3, 4), repeat=6) if sum(bits) <= max(12, 6 * average - 1))
        assert best <= cost(found) <= one_step_less + 1e-9


def test_a_step_over_a_width_is_taken_where_that_saves_more_a_bit():
    linears = {"l.0.x": Linear(1, {2: 10.0, 3: 9.0, 4: 0.0}), "l.1.x": Linear(1, {2: 3.0, 3: 0.0, 4: 0.0})}
    assert list(allocate.steps_of("l.0.x", linears["l.0.x"])) == [(5.0, "l.0.x", 4)]
    assert allocate.allocate(linears, 3) == {"l.0.x": 4, "l.1.x": 2}
    assert allocate.allocate(linears, 3.5) == {"l.0.x": 4, "l.1.x": 3}


def test_steps_that_save_nothing_are_not_taken_and_no_bit_is_lost_by_rounding():
    rising = {"l.0.x": Linear(1, {2: 1.0, 3: 2.0, 4: 3.0})}
    assert allocate.allocate(rising, 4) == {"l.0.x": 2}
    alike = {f"l.{n}.x": Linear(10, {2: 4.0, 3: 2.0, 4: 1.0}) for n in range(10)}
    assert sum(allocate.allocate(alike, 2.3).values()) == 23


def test_an_expert_costs_what_its_share_of_the_tokens_does(monkeypatch):
    """And with few of them it is rounded to nearest, as llama.py does."""
    linear, args = torch.nn.Linear(16, 8, bias=False), allocate.parse(["model", "text", "--bits", "3", "--out", "out"])
    empty, sums = (allocate.Sums({"x": linear}, torch.device("cpu")) for _ in range(2))
    factors, quantize = [], allocate.quant.quantize
    noted = lambda W, grid, factor, config: factors.append(factor) or quantize(W, grid, factor, config)  # noqa: E731
    monkeypatch.setattr(allocate.quant, "quantize", noted)
    costs = lambda its, share: allocate.costs(its, share, {"x"}, args)["x"].costs  # noqa: E731

    def add(x):
        sums.add(x)
        sums.add_gradient("x", x, torch.ones(len(x), 8))

    add(torch.randn(31, 16, generator=generator()))
    of_31, of_62 = costs(sums, 1 / 31), costs(sums, 1 / 62)
    assert factors == 6 * [None] and of_62 == pytest.approx({width: cost / 2 for width, cost in of_31.items()})
    add(torch.randn(1, 16, generator=generator(1)))
    costs(sums, 1)
    assert None not in factors[6:] and costs(empty, 1)[2] == 0


def test_patterns_name_each_linear_with_its_bits():
    names = [f"model.layers.{n}.mlp.{kind}" for n in range(12) for kind in ("up_proj", "experts.3.up_proj", "experts.30.up_proj")]
    bits = {name: (2, 3, 4)[(number * 7) % 3] for number, name in enumerate(names)}
    pairs = [line.rpartition("=")[::2] for line in allocate.as_patterns(bits)]
    for name, width in bits.items():
        assert [int(its) for pattern, its in pairs if re.fullmatch(pattern, name)] == [width]
    assert subprocess.run(["bash", "-c", f"printf '%s\\n' $(printf '%s' '{pairs[0][0]}')"], capture_output=True, text=True).stdout == (
        pairs[0][0] + "\n"
    )


@pytest.mark.parametrize("grid", ["nonuniform", "affine"])
def test_what_it_says_is_what_llama_takes(model, text_file, tmp_path, capsys, grid):
    out, file = tmp_path / "bits.txt", tmp_path / "q.safetensors"
    group = ["--groupsize", "16"] if grid == "affine" else []
    assert command(model, text_file, "--bits", 2.75, "--out", out, "--grid", grid, *group, *SHORT) == 0
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"{out}: 2\.\d+ bits a weight; estimated cost .* \(2 bits .*, 3 bits .*, 4 bits .*\)", said[-1])
    assert len(said) == 8 and all(re.fullmatch(r"[\w.]+ +[234]{2}", line) for line in said[:-1])
    assert command(model, text_file, "--bits", 2.75, "--out", out, *SHORT) == 2
    assert "exists: give another --out" in capsys.readouterr().err
    options = ["--wbits", "2", "--grid", grid, *group, "--bits_for", *out.read_text().split(), *SHORT, "--eval", "none"]
    assert llama.main([str(model), str(text_file), *options, "--save_path", str(file)]) == 0
    checkpoint = Checkpoint.open(file)
    weights = {name: checkpoint.weights_of(name) for name in checkpoint.quantized}
    mean = sum(weights[name] * checkpoint.bits_of(name) for name in weights) / sum(weights.values())
    assert 2.6 < mean <= 2.75 and f"{mean:.3f} bits a weight" in said[-1]


@pytest.mark.parametrize("name", CONFIGS)
def test_mixtures(tmp_path, text_file, name):
    """Also experts that no token reaches."""
    folder, out = write_model(CONFIGS[name](), tmp_path / "model", "float16"), tmp_path / "bits.txt"
    assert command(folder, text_file, "--bits", 3, "--out", out, "--nsamples", 1, "--seqlen", 8, "--dtype", "float32") == 0
    assert "experts" in out.read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path, text_file, family):
    config, arguments, _ = FAMILIES[family]
    folder, out = write_model(getattr(transformers, config)(**(SIZES | arguments)), tmp_path / "model", "float16"), tmp_path / "bits.txt"
    assert command(folder, text_file, "--bits", 3, "--out", out, *SHORT) == 0
    assert len(out.read_text().splitlines()) >= 2


def test_the_same_command_says_the_same(model, text_file, tmp_path):
    for name in "ab":
        assert command(model, text_file, "--bits", 2.5, "--out", tmp_path / name, *SHORT) == 0
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()


def test_costs_that_are_not_finite_are_not_shared_out(model, text_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(allocate.quant, "row_losses", lambda E, F: torch.tensor([math.nan]))
    assert command(model, text_file, "--bits", 3, "--out", tmp_path / "bits.txt", *SHORT) == 2
    assert (
        "the cost of model.layers.1.self_attn.q_proj is not finite in torch.float32: --dtype float32 may do better\n"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "bits.txt").exists()


def test_bad_input_is_one_sentence(model, text_file, tmp_path, capsys):
    assert command(model, text_file, "--bits", 3, "--out", tmp_path / "no" / "out.txt") == 2
    assert "cannot be written: give a file name in a folder that exists" in capsys.readouterr().err
    short = tmp_path / "short.txt"
    short.write_text(make_text(10))
    for words, message in (
        ((tmp_path / "gone", text_file), "neither a model folder nor a hub name"),
        ((model, tmp_path / "gone.txt"), "does not exist: check the path of the text file"),
        ((model, short), "tokens"),
        ((model, text_file, "--groupsize", 16), "free levels are a row's: give --grid affine with it"),
        (
            (model, text_file, "--grid", "affine", "--groupsize", 7),
            "--groupsize 7 does not divide the 64 inputs of model.layers.0.self_attn.q_proj: give a divisor, or -1",
        ),
        ((model, text_file, "--seqlen", 1024), "the model's context is 256"),
        ((model, text_file, "--device", "cuda:99"), "CUDA devices"),
    ):
        assert command(*words, "--bits", 3, "--out", tmp_path / "out.txt", *([] if "--seqlen" in words else ["--seqlen", 32])) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not Path(tmp_path / "out.txt").exists()
    for bits in ("1.9", "4.1", "x", "nan"):
        with pytest.raises(SystemExit):
            allocate.parse(["model", "text", "--out", "out", "--bits", bits])
        assert "give a number from 2 to 4" in capsys.readouterr().err

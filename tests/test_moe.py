"""Mixtures of experts: each expert is linears of its own, with its own tokens, from the checkpoint to `generate`.

The oracle is transformers' own model with its fused experts, given the original or the dequantized weights.
"""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llama
import quant
from conftest import SIZES, randomize, write_model
from leanquant import InputError, LeanQuantModelForCausalLM
from leanquant.experts import Experts, split_experts
from leanquant.linear import QuantizedLinear
from leanquant.packing import Checkpoint
from test_cli import ONE_GPU, transformers_perplexity, whole_model
from test_modelutils import random_ids, stream, streamed_logits, whole_logits

ROUTED = {"num_experts_per_tok": 2}
QWEN = ROUTED | {"num_experts": 4, "moe_intermediate_size": 48, "head_dim": 16}
CONFIGS = {
    "mixtral": lambda **sizes: transformers.MixtralConfig(**(SIZES | ROUTED | {"num_local_experts": 4} | sizes)),
    "qwen3": lambda **sizes: transformers.Qwen3MoeConfig(**(SIZES | QWEN | {"mlp_only_layers": [1], "num_hidden_layers": 3} | sizes)),
    "qwen2": lambda **sizes: transformers.Qwen2MoeConfig(**(SIZES | QWEN | {"shared_expert_intermediate_size": 32} | sizes)),
    "olmoe": lambda **sizes: transformers.OlmoeConfig(**(SIZES | ROUTED | {"num_experts": 4} | sizes)),
    "a bias in the choice": lambda **sizes: transformers.DeepseekV3Config(**(SIZES | DEEPSEEK | sizes)),
}
DEEPSEEK = ROUTED | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 48, "first_k_dense_replace": 1}
DEEPSEEK |= {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
DEEPSEEK |= {"num_key_value_heads": 4}
STORED = {"one by one": True, "fused": False}
GRID = ["--exponent", "4", "--true-sequential", "--act-order", "--percdamp", "0.1"]
MANY = ["--nsamples", "24", "--seqlen", "32"]  # 384 tokens an expert on average, of which 192 are enough for 96 columns


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Factory: base(name, original) -> a model folder, its experts stored one by one as on the hub, or fused."""
    made = {}

    def make(name: str, original: bool = True, **sizes) -> Path:
        key = (name, original, *sizes)
        if key not in made:
            made[key] = write_model(CONFIGS[name](**sizes), tmp_path_factory.mktemp("moe"), save_original_format=original)
        return made[key]

    return make


def quantize(model: Path, text: Path, out: Path, *options) -> int:
    return llama.main([str(word) for word in (model, text, "--wbits", 4, "--eval", "none", "--save_path", out, *options)])


@torch.no_grad()
def logits(model, ids) -> torch.Tensor:
    return model(ids).logits


def with_weights_of(folder: Path, checkpoint: Checkpoint):
    """transformers' fused model of `folder` with the dequantized weights of a file of ours."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    read = lambda name, *shape: checkpoint.weight(name, shape, torch.float32)  # noqa: E731
    for name, parameter in model.named_parameters():
        if parameter.ndim < 3:
            parameter.data = read(name, *parameter.shape)
            continue
        block, _, leaf = name.rpartition(".")
        for number, expert in enumerate(parameter.data):
            parts = ["gate_proj", "up_proj"] if leaf == "gate_up_proj" else ["down_proj"]
            rows, columns = len(expert) // len(parts), expert.shape[1]
            expert.copy_(torch.cat([read(f"{block}.{number}.{part}.weight", rows, columns) for part in parts]))
    return model


# --- the module ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_split_experts_compute_what_fused_ones_do(name):
    model = randomize(AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)).eval()
    for block, fused in list(model.named_modules()):
        if not hasattr(fused, "gate_up_proj") or fused.gate_up_proj.ndim != 3:
            continue
        split_experts(model)
        experts = model.get_submodule(block)
        for number, expert in enumerate(experts):
            halves = fused.gate_up_proj[number].chunk(2)
            for linear, weight in zip((expert.gate_proj, expert.up_proj), halves, strict=True):
                linear.weight.data.copy_(weight)
            expert.down_proj.weight.data.copy_(fused.down_proj[number])
        x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
        chosen = torch.stack([torch.randperm(3)[:2] for _ in range(50)])  # the last of the four is never asked
        weights = torch.rand(50, 2)
        weights[7, 1] = 0
        with torch.no_grad():
            expected = fused(x, chosen, weights)
            torch.testing.assert_close(experts(x, chosen, weights), expected, rtol=1e-5, atol=1e-5)
            chosen[7, 1], weights[7, 1] = len(experts), 1  # no expert: transformers' sentinel
            torch.testing.assert_close(experts(x, chosen, weights), expected, rtol=1e-5, atol=1e-5)
            assert torch.equal(experts(x[:0], chosen[:0], weights[:0]), x[:0])
        return
    pytest.fail("no fused experts")


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_streamed_mixture_gives_its_own_logits_however_it_is_stored(base, name, stored):
    folder, ids = base(name, STORED[stored]), random_ids(5, 16)
    fused = any(len(shape) == 3 for shape in Checkpoint.open(folder).shapes.values())
    assert fused != STORED[stored]
    expected = whole_logits(folder, ids)
    assert expected.std() > 0.1
    torch.testing.assert_close(streamed_logits(stream(folder), ids, 2), expected, rtol=1e-5, atol=2e-5)


def test_groups_are_found_for_experts_that_a_batch_does_not_call(base):
    model = stream(base("mixtral"))
    states = model.embed(random_ids(1, 1), 1)  # one token calls two of four experts
    with model.layer(0):
        groups = model.groups(0, states)
        stages = [[group.linears for group in stage] for stage in model.stages(0, groups)]
    experts = [f"mlp.experts.{number}" for number in range(4)]
    assert stages[2] == [[f"{expert}.gate_proj", f"{expert}.up_proj"] for expert in experts]
    assert stages[3] == [[f"{expert}.down_proj"] for expert in experts]
    assert stages[:2] == [[[f"self_attn.{x}_proj" for x in "qkv"]], [["self_attn.o_proj"]]]
    assert groups[1].residual == ""  # which the experts' outputs hide from nobody


@pytest.mark.parametrize("name", ["mixtral", "qwen2"])
def test_routers_are_no_linears_to_quantize(base, name):
    model = stream(base(name))
    names = set(model.linears(0))
    assert "mlp.experts.3.up_proj" in names and not any("gate" in name.split(".")[-1] and "gate_proj" not in name for name in names)
    assert ("mlp.shared_expert.up_proj" in names) == (name == "qwen2") and "mlp.shared_expert_gate" not in names


# --- statistics ------------------------------------------------------------------------------------------------


def test_each_expert_sees_its_own_tokens(base):
    """Counts and inputs against a plain loop over the whole model's router."""
    folder, ids = base("mixtral"), random_ids(6, 16)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    read = []
    whole.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, inputs: read.append(inputs))
    logits(whole, ids)
    states, chosen, _ = read[0]
    model = stream(folder)
    moving = model.embed(ids, 2)
    with model.layer(0):
        stage = model.stages(0, model.groups(0, moving))[2]
        batches = list(model.inputs(0, moving, stage))
    for number, group in enumerate(stage):
        expected = states[(chosen == number).any(1)]
        found = torch.cat([found[number].X for found in batches if found[number]])
        assert group.linears[0] == f"mlp.experts.{number}.gate_proj" and 0 < len(expected) < 96
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_following_stream_takes_the_leaders_experts(base):
    """Its own inputs at the tokens that the leader routes to an expert, and its own routing again when it moves on."""
    folder, ids = base("mixtral"), random_ids(4, 16)
    model = stream(folder)
    leader, follower = model.embed(random_ids(4, 16, seed=1), 2), model.embed(ids, 2)
    with model.layer(0):
        stage = model.stages(0, model.groups(0, leader))[2]
        following = model.inputs(0, follower, stage, leader=leader)
        alone = list(model.inputs(0, follower, stage))
        for ours, number in zip(model.inputs(0, leader, stage), range(2), strict=True):
            theirs, mine = next(following), alone[number]
            assert [len(found.X) for found in theirs] == [len(found.X) for found in ours]
            assert [len(found.X) for found in theirs] != [len(found.X) for found in mine]
            common = {tuple(row) for found in mine for row in found.X.tolist()}
            assert {tuple(row) for found in theirs for row in found.X.tolist()} <= common  # all tokens are in both
        expected = follower.twin()
        model.advance(0, follower)
        model.advance(0, expected)
    assert torch.equal(follower.hidden, expected.hidden)


# --- quantizing ------------------------------------------------------------------------------------------------


AFFINE = ["--grid", "affine", "--true-sequential"]
WAYS = [("mixtral", "one by one", GRID), ("mixtral", "fused", AFFINE), ("qwen3", "one by one", GRID), ("qwen2", "fused", AFFINE)]
WAYS += [("olmoe", "one by one", AFFINE), ("a bias in the choice", "one by one", AFFINE)]


@pytest.mark.parametrize("name, stored, grid", WAYS)
def test_quantized_mixtures_load_everywhere(base, text_file, tmp_path, name, stored, grid):
    folder, ids = base(name, STORED[stored]), random_ids(2, 16)
    options = [*grid, *MANY, "--grid_partitions", 64]
    outs = [tmp_path / "q.safetensors", tmp_path / "folder"][name not in ("mixtral", "qwen3") :]
    for out in outs:
        assert quantize(folder, text_file, out, *options, "--report", tmp_path / "report.json") == 0
    checkpoint = Checkpoint.open(out)
    blocks, E = {"qwen3": [0, 2], "a bias in the choice": [1]}.get(name, [0, 1]), 4
    experts = {f"model.layers.{i}.mlp.experts.{e}.{x}_proj" for i in blocks for e in range(E) for x in ("gate", "up", "down")}
    assert {linear for linear in checkpoint.quantized if ".experts." in linear} == experts
    assert not any(linear.endswith(".gate") for linear in checkpoint.quantized)
    expected = logits(with_weights_of(folder, checkpoint), ids)
    assert 0.01 < (expected - whole_logits(folder, ids)).abs().mean() < 0.5 * expected.std()
    ours = LeanQuantModelForCausalLM.from_pretrained(folder, outs[0])
    plugged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    for model in (ours, plugged):
        assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == len(checkpoint.quantized)
        torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)
        generated = model.generate(ids[:1], max_new_tokens=4, do_sample=False, pad_token_id=1, min_new_tokens=4)
        assert generated.shape == (1, 20)
        model.save_pretrained(tmp_path / type(model).__name__)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / type(model).__name__, dtype=torch.float32)
        assert torch.equal(logits(again, ids), logits(model, ids))
    rows = json.loads((tmp_path / "report.json").read_text())["linears"]
    counts = {(row["layer"], row["linear"]): row["tokens"] for row in rows}
    assert counts[0, next(name for layer, name in counts if not layer)] == 24 * 32
    for i in blocks:
        for x in ("gate", "up", "down"):  # each token goes to two experts
            assert sum(counts[i, f"mlp.experts.{e}.{x}_proj"] for e in range(E)) == 2 * 24 * 32


def test_evaluating_the_file_gives_transformers_perplexity(base, text_file, test_text, tmp_path):
    folder, out, report = base("qwen3"), tmp_path / "q.safetensors", tmp_path / "report.json"
    words = [folder, text_file, "--wbits", 4, *GRID, *MANY, "--eval", test_text, "--save_path", out, "--report", report]
    assert llama.main([str(word) for word in words]) == 0
    found = json.loads(report.read_text())["perplexity"][0]["perplexity"]
    expected = transformers_perplexity(with_weights_of(folder, Checkpoint.open(out)), folder, test_text)
    assert found == pytest.approx(expected, rel=1e-4)


def test_16_bits_give_transformers_perplexity(base, text_file, test_text, tmp_path):
    folder, report = base("mixtral"), tmp_path / "report.json"
    words = [folder, text_file, "--wbits", 16, "--seqlen", 32, "--eval", test_text, "--report", report]
    assert llama.main([str(word) for word in words]) == 0
    found = json.loads(report.read_text())["perplexity"][0]["perplexity"]
    assert found == pytest.approx(transformers_perplexity(whole_model(folder), folder, test_text), rel=1e-5)


@torch.no_grad()
def test_experts_with_tokens_lose_less_than_by_rounding(base, text_file, tokenizer, tmp_path):
    """What the first layer's experts give for text like that of the calibration, each for the tokens that are routed to it."""
    folder, errors = base("mixtral"), {}
    ids = torch.tensor(tokenizer(text_file.read_text()).input_ids[-2048:]).view(-1, 32)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    read = []
    experts = whole.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda _, inputs: read.append(inputs))
    whole(ids)
    expected = experts(*read[0])
    for name, options in {"ours": GRID, "nearest": ["--nearest"]}.items():
        out = tmp_path / f"{name}.safetensors"
        assert quantize(folder, text_file, out, "--wbits", 3, *options, *MANY) == 0
        found = with_weights_of(folder, Checkpoint.open(out)).model.layers[0].mlp.experts(*read[0])
        errors[name] = (found - expected).square().mean()
    assert errors["ours"] < 0.6 * errors["nearest"]


def test_an_expert_that_saw_too_few_tokens_is_rounded_and_said_so(base, text_file, tmp_path):
    """Its codes are those of rounding to the nearest level of a grid in which all columns count alike."""
    folder, out, report = base("mixtral"), tmp_path / "q.safetensors", tmp_path / "report.json"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert quantize(folder, text_file, out, *GRID, "--nsamples", 2, "--seqlen", 32, "--report", report) == 0
    messages = {str(warning.message) for warning in caught}
    assert any("layer 0: mlp.experts.0.gate_proj, mlp.experts.0.up_proj saw" in m and "fewer than 128" in m for m in messages)
    rows = {(row["layer"], row["linear"]): row for row in json.loads(report.read_text())["linears"]}
    row = rows[0, "mlp.experts.0.up_proj"]
    assert row["tokens"] < 128 and row["loss"] is None and "nearest" in row["percdamp_used"]
    assert rows[0, "self_attn.q_proj"]["loss"] > 0  # all tokens come here
    stored, linear = Checkpoint.open(out), "model.layers.0.mlp.experts.0.up_proj"
    W = stream(folder).checkpoint.get(f"{linear}.weight")
    config = quant.QuantConfig(bits=4)
    grid = quant.learn_grid(W, None, config)
    assert torch.equal(stored.get(f"{linear}.quant_grid").float(), grid.levels.squeeze(1))
    expected = quant.dequantize(quant.quantize(W, grid, None, config).codes, grid.levels)
    assert torch.equal(stored.weight(f"{linear}.weight", W.shape, torch.float32), expected)


def test_an_expert_without_any_token_is_rounded(base, text_file, tmp_path):
    """A router for which all are alike always chooses the same two."""
    folder, out = tmp_path / "model", tmp_path / "q.safetensors"
    write_model(CONFIGS["mixtral"](), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.block_sparse_moe.gate.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"mlp.experts.\d.down_proj saw 0 tokens"):
        assert quantize(folder, text_file, out, *GRID, *MANY) == 0
    assert all(torch.isfinite(t).all() for t in load_file(out).values() if t.is_floating_point())


def test_a_killed_run_goes_on_to_the_same_bytes(base, text_file, tmp_path, monkeypatch):
    folder, real = base("mixtral"), llama.quantize_layer
    outs = [tmp_path / f"{name}.safetensors" for name in ("whole", "resumed")]
    assert quantize(folder, text_file, outs[0], *GRID, *MANY) == 0

    def quantize_layer(model, index, *rest):
        if index == 1:
            raise KeyboardInterrupt
        return real(model, index, *rest)

    monkeypatch.setattr(llama, "quantize_layer", quantize_layer)
    assert quantize(folder, text_file, outs[1], *GRID, *MANY) == 130
    monkeypatch.setattr(llama, "quantize_layer", real)
    assert quantize(folder, text_file, outs[1], *GRID, *MANY) == 0
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_bounded_stages_change_nothing(base, text_file, tmp_path, monkeypatch):
    """Passes over a few experts at a time give the very bytes of one pass over all: they do not depend on one another."""
    folder, at_a_time = base("mixtral"), llama.hessian.at_a_time
    for name, most in {"all": 2**30, "two": 2 * 2 * 64**2}.items():
        monkeypatch.setattr(llama.hessian, "at_a_time", lambda *args, most=most: at_a_time(*args, most))
        assert quantize(folder, text_file, tmp_path / f"{name}.safetensors", *GRID, *MANY) == 0
    assert (tmp_path / "all.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


@pytest.mark.parametrize(
    "options", [["--skip", r".*experts\.[0-2]\..*"], ["--bits_for", r".*experts\.1\..*=2", r".*up_proj=3"], ["--n_layers", 1]]
)
def test_skipped_and_mixed_experts_load_everywhere(base, text_file, tmp_path, options):
    folder, ids = base("mixtral"), random_ids(2, 16)
    assert quantize(folder, text_file, tmp_path / "folder", *GRID, *MANY, *options) == 0
    expected = logits(with_weights_of(folder, Checkpoint.open(tmp_path / "folder")), ids)
    ours = LeanQuantModelForCausalLM.from_pretrained(folder, tmp_path / "folder")
    plugged = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    for model in (ours, plugged):
        assert any(isinstance(module, Experts) for module in model.modules())
        torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@ONE_GPU
def test_a_mixture_on_a_gpu_is_that_of_the_cpu(base, text_file, tmp_path):
    folder, ids, found = base("mixtral"), random_ids(4, 16), {}
    for device in ("cpu", "cuda"):
        out = tmp_path / f"{device}.safetensors"
        assert quantize(folder, text_file, out, *GRID, *MANY, "--device", device, "--dtype", "float32") == 0
        found[device] = logits(with_weights_of(folder, Checkpoint.open(out)), ids)
    original = whole_logits(folder, ids)
    errors = {device: (one - original).square().mean() for device, one in found.items()}
    assert errors["cuda"] < 1.3 * errors["cpu"] and errors["cpu"] < 1.3 * errors["cuda"]
    model = LeanQuantModelForCausalLM.from_pretrained(folder, tmp_path / "cpu.safetensors", device="cuda", torch_dtype=torch.float32)
    torch.testing.assert_close(logits(model, ids.cuda()).cpu(), found["cpu"], rtol=1e-3, atol=1e-3)


# --- refusals --------------------------------------------------------------------------------------------------


def test_experts_of_another_kind_are_refused_by_name(tmp_path):
    config = transformers.GptOssConfig(**(SIZES | ROUTED | {"num_local_experts": 4, "head_dim": 16}))
    folder = write_model(config, tmp_path / "model")
    with pytest.raises(InputError, match="GptOssExperts"):
        stream(folder)


@pytest.mark.parametrize("name", ["model.layers.1.block_sparse_moe.experts.2.w3.weight", "model.layers.0.block_sparse_moe.gate.weight"])
def test_a_missing_expert_is_named(base, tmp_path, name):
    folder = shutil.copytree(base("mixtral"), tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    part = "experts.2.up_proj" if "w3" in name else "mlp.gate"
    with pytest.raises(InputError, match=rf"no tensor model\.layers\.\d\.(mlp\.)?{part}"):
        stream(folder)

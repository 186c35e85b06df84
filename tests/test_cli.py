"""llama.py and eval_quantized.py from the command line to the written file, and every way a run can go wrong.

What is written is judged by an own decoder (formats.md, sections 1 and 2) and by transformers' perplexity of the base
model with the decoded weights. What fails must say so in one line and leave nothing behind.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval_quantized
import flags
import hessian
import llama
import quant
from conftest import make_text
from leanquant import packing

ROOT = Path(__file__).resolve().parent.parent
LINEARS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
PUBLISHED_FLAGS = (
    "--wbits --nsamples --seed --percdamp --nearest --groupsize --sym --new-eval --act-order --true-sequential "
    "--static-groups --n_layers --block_size --exponent --kmeans_seed --offload_threshold --save_path"
).split()
GRIDS = {"nonuniform": ["--exponent", "4"], "affine": ["--grid", "affine", "--exponent", "3"], "minmax": [], "rtn": ["--nearest"]}
GRIDS["published"] = [*GRIDS["nonuniform"], "--recipe", "published"]
SETTINGS = ["--nsamples", "16", "--seqlen", "32", "--percdamp", "0.1", "--grid_partitions", "256"]
SEQUENTIAL = ["--true-sequential", "--act-order"]


# --- running and decoding --------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nothing_in_the_temporary_folder(tmp_path_factory, monkeypatch):
    """Whatever happens, a run leaves the machine's temporary folder as it was."""
    folder = tmp_path_factory.mktemp("machine-tmp")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []


@pytest.fixture
def out(tmp_path) -> Path:
    """The folder that results go to."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def report(tmp_path) -> Path:
    return tmp_path / "report.json"


def quantize(model, text, *options, evaluate="none") -> None:
    arguments = [model, text, *SETTINGS, "--eval", evaluate, *options]
    assert llama.main([str(argument) for argument in arguments]) == 0


def evaluate(*options) -> None:
    assert eval_quantized.main([str(option) for option in options]) == 0


def metadata(file: Path) -> dict:
    return json.loads(safe_open(file, "pt").metadata()["leanquant"])


def decode(file: Path) -> dict[str, torch.Tensor]:
    """A plain state dict in float32 from a file of ours: formats.md read literally, in numpy."""
    tensors = load_file(file)
    bits = metadata(file)["bits"]
    weights = {
        name: tensor.float()
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not name.endswith((".quant_grid", ".scale"))
    }
    for name in tensors:
        if name.endswith(".weight_codes"):
            linear = name.removesuffix(".weight_codes")
            columns = 96 if linear.endswith("down_proj") else 64
            codes = decode_codes(tensors[name].numpy(), bits, columns)
            weights[f"{linear}.weight"] = decode_weight(tensors, linear, torch.from_numpy(codes).long())
    return weights


def decode_codes(packed: np.ndarray, bits: int, columns: int) -> np.ndarray:
    if packed.shape[1] == columns // 2:  # a nibble a code, the first one high
        return np.stack([packed >> 4, packed & 15], 2).reshape(len(packed), columns)
    stream = np.unpackbits(packed, axis=1, bitorder="little")[:, : columns * bits].reshape(len(packed), columns, bits)
    return (stream * 2 ** np.arange(bits)).sum(2)


def decode_weight(tensors: dict, linear: str, codes: torch.Tensor) -> torch.Tensor:
    if f"{linear}.quant_grid" in tensors:
        return tensors[f"{linear}.quant_grid"].float().gather(1, codes)
    scale, zero = tensors[f"{linear}.scale"].float(), tensors[f"{linear}.zero"].float()
    assert scale.shape == zero.shape
    repeats = codes.shape[1] // scale.shape[1]
    return scale.repeat_interleave(repeats, 1) * (codes - zero.repeat_interleave(repeats, 1))


def whole_model(base: Path, weights: dict[str, torch.Tensor] | None = None):
    """The base model in transformers, float32, with `weights` in place of its own."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if weights is not None:
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}
        model.tie_weights()
    return model


@torch.no_grad()
def transformers_perplexity(model, base: Path, text: Path, seqlen: int = 32) -> float:
    """exp of the loss that transformers computes for consecutive windows: equally long, so its mean is the mean over windows."""
    ids = AutoTokenizer.from_pretrained(base)(text.read_text(), return_tensors="pt").input_ids
    windows = ids[:, : ids.shape[1] // seqlen * seqlen].view(-1, seqlen)
    return model(windows, labels=windows).loss.double().exp().item()


def quantized_names(file: Path) -> set[str]:
    return {name.removesuffix(".weight_codes") for name in load_file(file) if name.endswith(".weight_codes")}


def layer_linears(layers: int) -> set[str]:
    return {f"model.layers.{i}.{linear}" for i in range(layers) for linear in LINEARS}


def digest(path: Path) -> dict[str, str]:
    """A hash of each file under `path`, which is a file or a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# --- what is written -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_and_width_writes_the_weights_it_evaluated(tiny_model, text_file, test_text, out, report, grid, bits):
    model, file = tiny_model(dtype="float16"), out / "q.safetensors"
    options = ["--wbits", bits, *GRIDS[grid], *SEQUENTIAL, "--save_path", file, "--report", report]
    quantize(model, text_file, *options, evaluate=test_text)
    assert quantized_names(file) == layer_linears(2)
    weights, original = decode(file), load_file(model / "model.safetensors")
    assert set(weights) == set(original)
    moved = {name for name in original if not torch.equal(weights[name], original[name].float())}
    assert moved == {f"{linear}.weight" for linear in layer_linears(2)} | (
        {"lm_head.weight"} if grid in ("nonuniform", "affine") else set()
    )
    found = json.loads(report.read_text())["perplexity"][0]["perplexity"]
    assert found == pytest.approx(transformers_perplexity(whole_model(model, weights), model, test_text), rel=1e-5)
    assert list(out.iterdir()) == [file]


def test_codes_take_the_bits_they_are_said_to_take(tiny_model, text_file, out):
    for bits in (2, 3, 4):
        quantize(tiny_model(), text_file, "--wbits", bits, "--save_path", out / f"{bits}.safetensors")
        tensors = load_file(out / f"{bits}.safetensors")
        assert tensors["model.layers.0.mlp.down_proj.weight_codes"].shape == (64, 96 * bits // 8)
        assert tensors["model.layers.0.mlp.up_proj.weight_codes"].shape == (96, 64 * bits // 8)


@pytest.mark.parametrize("bits", [2, 3])
def test_nibble_packing_holds_the_same_weights(tiny_model, text_file, out, bits):
    for packing_name in ("dense", "nibble"):
        options = ["--wbits", bits, "--exponent", 4, "--packing", packing_name, "--save_path", out / f"{packing_name}.safetensors"]
        quantize(tiny_model(), text_file, *options)
    dense, nibble = decode(out / "dense.safetensors"), decode(out / "nibble.safetensors")
    assert all(torch.equal(dense[name], nibble[name]) for name in dense)
    assert load_file(out / "nibble.safetensors")["model.layers.1.mlp.down_proj.weight_codes"].shape == (64, 48)


@pytest.mark.parametrize("grid", ["affine", "minmax", "rtn"])
@pytest.mark.parametrize("groupsize", [16, 32])
def test_groups_have_their_own_scale_and_zero(tiny_model, text_file, test_text, out, report, grid, groupsize):
    file = out / "q.safetensors"
    options = [*GRIDS[grid], *SEQUENTIAL, "--wbits", 3, "--groupsize", groupsize, "--save_path", file, "--report", report]
    quantize(tiny_model(), text_file, *options, evaluate=test_text)
    tensors, weights = load_file(file), decode(file)
    assert pieces(metadata(file)) == (flags.BEST if grid == "affine" else flags.PUBLISHED)
    for linear in layer_linears(2):
        O, I = weights[f"{linear}.weight"].shape  # noqa: E741
        assert tensors[f"{linear}.scale"].shape == tensors[f"{linear}.zero"].shape == (O, I // groupsize)
        assert (tensors[f"{linear}.scale"].dtype, tensors[f"{linear}.zero"].dtype) == (torch.float16, torch.uint8)
        assert len(torch.unique(tensors[f"{linear}.scale"], dim=1)[0]) > 1
    found = json.loads(report.read_text())["perplexity"][0]["perplexity"]
    assert found == pytest.approx(transformers_perplexity(whole_model(tiny_model(), weights), tiny_model(), test_text), rel=1e-5)


def test_smaller_groups_come_closer_to_the_weights(tiny_model, text_file, out):
    """A group's own range is never wider than the row's: round-to-nearest shows it without any randomness."""
    original, errors = load_file(tiny_model() / "model.safetensors"), []
    for groupsize in (-1, 32, 16):
        file = out / f"{groupsize}.safetensors"
        quantize(tiny_model(), text_file, "--nearest", "--wbits", 3, "--groupsize", groupsize, "--save_path", file)
        weights = decode(file)
        errors.append(sum((weights[f"{name}.weight"] - original[f"{name}.weight"]).square().sum().item() for name in layer_linears(2)))
    assert errors[0] > 1.1 * errors[1] > 1.2 * errors[2]


@pytest.mark.parametrize("grid", ["minmax", "affine"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_symmetric_grids_have_their_zero_in_the_middle(tiny_model, text_file, out, bits, grid):
    flags = ("--sym", "--grid", grid, "--groupsize", 32)
    quantize(tiny_model(), text_file, *flags, "--wbits", bits, "--save_path", out / "q.safetensors")
    tensors = load_file(out / "q.safetensors")
    assert all((tensors[f"{linear}.zero"] == 2 ** (bits - 1)).all() for linear in layer_linears(2))
    assert any((tensors[f"{linear}.scale"] < 0).any() for linear in layer_linears(2)) == (grid == "affine")  # minmax is GPTQ's


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "family, tied, sharded", [("llama", False, False), ("mistral", True, False), ("mistral", False, True), ("llama", True, True)]
)
def test_every_kind_of_checkpoint_is_quantized(tiny_model, text_file, test_text, out, report, family, tied, sharded, dtype):
    model, file = tiny_model(family, tied, sharded, dtype), out / "q.safetensors"
    quantize(model, text_file, "--wbits", 4, "--exponent", 4, "--save_path", file, "--report", report, evaluate=test_text)
    tensors, weights = load_file(file), decode(file)
    levels_dtype = torch.bfloat16 if dtype == "bfloat16" else torch.float16
    assert all(tensors[f"{linear}.quant_grid"].dtype == levels_dtype for linear in layer_linears(2))
    assert tensors["model.embed_tokens.weight"].dtype == getattr(torch, dtype)
    assert ("lm_head.weight" in tensors) != tied
    found = json.loads(report.read_text())["perplexity"][0]["perplexity"]
    assert found == pytest.approx(transformers_perplexity(whole_model(model, weights), model, test_text), rel=1e-5)


def test_n_layers_quantizes_the_first_layers_only(tiny_model, text_file, out):
    quantize(tiny_model(), text_file, "--wbits", 2, "--n_layers", 1, "--save_path", out / "q.safetensors")
    assert quantized_names(out / "q.safetensors") == layer_linears(1)
    tensors, original = load_file(out / "q.safetensors"), load_file(tiny_model() / "model.safetensors")
    assert all(torch.equal(tensors[name], original[name]) for name in original if not name.startswith("model.layers.0."))


def test_true_sequential_changes_only_what_comes_after_the_first_group(tiny_model, text_file, out):
    for name, options in {"on": ["--true-sequential"], "off": []}.items():
        quantize(tiny_model(), text_file, "--wbits", 2, *options, "--save_path", out / f"{name}.safetensors")
    on, off = (load_file(out / f"{name}.safetensors") for name in ("on", "off"))
    differ = {linear for linear in layer_linears(1) if not torch.equal(on[f"{linear}.weight_codes"], off[f"{linear}.weight_codes"])}
    assert differ == {f"model.layers.0.{linear}" for linear in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}


@pytest.mark.parametrize("options", [["--exponent", "4"], [], ["--groupsize", "16"]], ids=["nonuniform", "minmax", "groups"])
def test_act_order_keeps_the_stored_columns_in_place(tiny_model, text_file, out, options):
    original = load_file(tiny_model() / "model.safetensors")
    quantize(tiny_model(), text_file, "--wbits", 4, "--act-order", *options, "--save_path", out / "q.safetensors")
    quantize(tiny_model(), text_file, "--wbits", 4, *options, "--save_path", out / "plain.safetensors")
    weights, plain = decode(out / "q.safetensors"), decode(out / "plain.safetensors")
    assert any(not torch.equal(weights[name], plain[name]) for name in original)  # the option does something
    for linear in layer_linears(2):
        weight = original[f"{linear}.weight"]
        assert (weights[f"{linear}.weight"] - weight).norm() < 0.35 * weight.norm()  # permuted columns: 1.4


@pytest.mark.parametrize("options", [["--recipe", "best"], ["--recipe", "published", "--wbits", 4]], ids=["best", "published"])
def test_same_command_gives_the_same_bytes(tiny_model, text_file, out, options):
    for number in range(2):
        for name in (f"q{number}.safetensors", f"folder{number}"):
            quantize(tiny_model(), text_file, "--wbits", 3, "--exponent", 4, *SEQUENTIAL, *options, "--save_path", out / name)
    assert digest(out / "q0.safetensors") == digest(out / "q1.safetensors")
    assert digest(out / "folder0") == digest(out / "folder1")


def test_seed_changes_the_calibration(tiny_model, text_file, out):
    for seed in (0, 1):
        quantize(tiny_model(), text_file, "--wbits", 2, "--seed", seed, "--save_path", out / f"{seed}.safetensors")
    assert any(not torch.equal(a, b) for a, b in zip(*(decode(out / f"{seed}.safetensors").values() for seed in (0, 1)), strict=True))


def test_metadata_is_one_key_of_sorted_json(tiny_model, text_file, out, report):
    options = ["--wbits", 3, "--exponent", 3.5, "--act-order", "--seed", 7, "--save_path", out / "q.safetensors", "--report", report]
    quantize(tiny_model(), text_file, *options)
    header = safe_open(out / "q.safetensors", "pt").metadata()
    assert list(header) == ["leanquant"]
    settings = json.loads(header["leanquant"])
    assert json.dumps(settings, sort_keys=True) == header["leanquant"]
    expected = {
        "method": "leanquant",
        "bits": 3,
        "grid": "nonuniform",
        "groupsize": -1,
        "exponent": 3.5,
        "percdamp": 0.1,
        "act_order": True,
    }
    expected |= {"calibration": str(text_file), "nsamples": 16, "seqlen": 32, "seed": 7, "base_model": str(tiny_model())}
    assert {name: settings[name] for name in expected} == expected
    assert {"format_version", "versions"} <= set(settings)
    assert settings["versions"]["torch"] == torch.__version__
    assert settings == json.loads(report.read_text())["settings"]


@pytest.mark.parametrize("options, method", [(["--nearest"], "rtn"), ([], "gptq"), (["--grid", "affine"], "leanquant")])
def test_metadata_names_the_method(tiny_model, text_file, out, options, method):
    quantize(tiny_model(), text_file, "--wbits", 4, *options, "--save_path", out / "q.safetensors")
    assert metadata(out / "q.safetensors")["method"] == method


# --- recipes ---------------------------------------------------------------------------------------------------


def pieces(settings: dict) -> dict:
    return {name: settings[name] for name in flags.BEST}


@pytest.mark.parametrize(
    "options, recipe, changed",
    [
        (["--exponent", "4"], "best", {}),
        (["--grid", "affine"], "best", {}),
        (["--grid", "affine", "--groupsize", "16"], "best", {}),
        ([], "published", {}),
        (["--groupsize", "16"], "published", {}),
        (["--nearest"], "published", {}),
        (["--recipe", "best"], "best", {}),
        (["--exponent", "4", "--recipe", "published"], "published", {}),
        (["--grid", "affine", "--recipe", "published"], "published", {}),
        (["--exponent", "4", "--kmeans", "plusplus"], "best", {"kmeans": "plusplus"}),
        (["--exponent", "4", "--no-round_levels"], "best", {"round_levels": False}),
        (["--exponent", "4", "--shift", "0"], "best", {"shift": 0.0}),
        (["--exponent", "4", "--no-residual"], "best", {"residual": False}),
        (["--exponent", "4", "--no-shift_head"], "best", {"shift_head": False}),
        (["--exponent", "4", "--refine", "0"], "best", {"refine": 0}),
        (["--exponent", "4", "--recipe", "published", "--kmeans", "exact"], "published", {"kmeans": "exact"}),
        (["--exponent", "4", "--recipe", "published", "--shift", "1"], "published", {"shift": 1.0}),
        (["--exponent", "4", "--recipe", "published", "--residual"], "published", {"residual": True}),
        (["--exponent", "4", "--recipe", "published", "--refine", "3"], "published", {"refine": 3}),
        (["--refine", "1", "--shift", "0.25"], "published", {"refine": 1, "shift": 0.25}),
    ],
    ids=lambda value: " ".join(value) or "no options" if isinstance(value, list) else "",
)
def test_a_recipe_is_its_pieces_and_each_has_a_flag_of_its_own(options, recipe, changed):
    published = {"kmeans": "published", "round_levels": False, "shift": 0.0, "residual": False, "shift_head": False, "refine": 0}
    expected = {"best": flags.BEST, "published": published}[recipe]
    config = flags.quant_config(flags.parse(["model", "text", "--wbits", "3", *options]), torch.float16)
    assert pieces(vars(config)) == expected | changed
    assert flags.BEST["kmeans"] == "exact" and flags.BEST["round_levels"] and flags.BEST["shift"] > 0
    assert flags.BEST["residual"] and flags.BEST["shift_head"] and flags.BEST["refine"] > 0


@pytest.mark.parametrize("sequential", [[], SEQUENTIAL], ids=["plain", "sequential"])
@pytest.mark.parametrize("recipe", ["best", "published"])
def test_recipes_record_their_pieces_and_what_they_took(tiny_model, text_file, out, report, recipe, sequential):
    options = [*GRIDS["nonuniform"], "--recipe", recipe, *sequential, "--save_path", out / "q.safetensors", "--report", report]
    quantize(tiny_model(), text_file, "--wbits", 3, *options)
    settings, contents = metadata(out / "q.safetensors"), json.loads(report.read_text())
    assert pieces(settings) == pieces(contents["settings"]) == {"best": flags.BEST, "published": flags.PUBLISHED}[recipe]
    assert settings["kmeans_seed"] == 0
    own = {"reference forward", "target", "refine"} if recipe == "best" else set()
    assert set(contents["phase_seconds"]) == {"load", "forward", "hessian", "factorization", "grid", "solve", "pack", "save"} | own


def test_every_piece_changes_the_weights(tiny_model, text_file, out):
    changes = {"kmeans": ["--kmeans", "published"], "round_levels": ["--no-round_levels"], "shift": ["--shift", 0]}
    changes |= {"residual": ["--no-residual"], "shift_head": ["--no-shift_head"], "refine": ["--refine", 0]}
    found = {}
    for name, options in {"best": [], **changes}.items():
        file = out / f"{name}.safetensors"
        quantize(tiny_model(), text_file, "--wbits", 4, *GRIDS["nonuniform"], *SEQUENTIAL, *options, "--save_path", file)
        found[name] = decode(file)
        assert {piece for piece in flags.BEST if metadata(file)[piece] != flags.BEST[piece]} == {name} - {"best"}
    assert all(any(not torch.equal(found[name][tensor], found["best"][tensor]) for tensor in found["best"]) for name in changes)


@pytest.mark.parametrize("recipe", ["best", "published"])
def test_kmeans_seed_is_that_of_the_published_grid(tiny_model, text_file, out, recipe):
    for seed in (0, 1):
        options = ["--recipe", recipe, "--kmeans_seed", seed, "--n_layers", 1, "--save_path", out / f"{seed}.safetensors"]
        quantize(tiny_model(), text_file, "--wbits", 4, *GRIDS["nonuniform"], *options)
        assert metadata(out / f"{seed}.safetensors")["kmeans_seed"] == seed
    one, other = (decode(out / f"{seed}.safetensors") for seed in (0, 1))
    assert all(torch.equal(one[name], other[name]) for name in one) == (recipe == "best")


@torch.no_grad()
def last_states(model, ids: torch.Tensor) -> torch.Tensor:
    """What the last norm makes of the last layer's output."""
    return model.model(ids).last_hidden_state


@pytest.mark.parametrize("bits", [4, 2])
def test_every_piece_brings_the_outputs_nearer_to_those_of_the_unquantized_model(tiny_model, text_file, test_text, out, bits):
    """On other text than that of the calibration; all pieces but --residual, whose share of it is small there."""
    model, errors = tiny_model(), {}
    recipes = {"best": [], "no shift": ["--shift", 0], "no refine": ["--refine", 0], "published": ["--recipe", "published"]}
    tokens = AutoTokenizer.from_pretrained(model)(test_text.read_text(), return_tensors="pt").input_ids[:, :576].view(-1, 32)
    expected = last_states(whole_model(model), tokens)
    for name, options in recipes.items():
        file = out / f"{name}.safetensors"
        quantize(model, text_file, "--wbits", bits, *GRIDS["nonuniform"], *SEQUENTIAL, *options, "--save_path", file)
        errors[name] = (last_states(whole_model(model, decode(file)), tokens) - expected).square().mean().item()
    assert errors["best"] < 0.9 * errors["no shift"]
    assert errors["best"] < 0.98 * errors["no refine"]
    assert errors["best"] < 0.75 * errors["published"]


@pytest.mark.parametrize("recipe", ["best", "published"])
def test_bfloat16_activations_lose_about_what_float32_ones_do(tiny_model, text_file, report, recipe):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        options = [*GRIDS["nonuniform"], *SEQUENTIAL, "--recipe", recipe, "--dtype", dtype, "--report", report]
        quantize(tiny_model(dtype="bfloat16"), text_file, "--wbits", 3, *options)
        losses[dtype] = sum(row["loss"] for row in json.loads(report.read_text())["linears"])
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)


# --- folders ---------------------------------------------------------------------------------------------------


def test_folder_output_is_a_hugging_face_model_folder(tiny_model, text_file, out):
    model, folder = tiny_model(sharded=True), out / "quantized"
    quantize(model, text_file, "--wbits", 3, "--exponent", 4, "--save_path", folder)
    quantize(model, text_file, "--wbits", 3, "--exponent", 4, "--save_path", out / "q.safetensors")
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert (quantization["quant_method"], quantization["bits"]) == ("leanquant", 3)
    assert config == json.loads((model / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (model / name).read_bytes()
    assert AutoTokenizer.from_pretrained(folder)("a town").input_ids == AutoTokenizer.from_pretrained(model)("a town").input_ids
    one, other = load_file(out / "q.safetensors"), load_file(folder / "model.safetensors")
    assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)
    # The base's index names shards that are not there.
    assert sorted(path.name for path in out.iterdir()) == ["q.safetensors", "quantized"]
    assert not (folder / "model.safetensors.index.json").exists()


def test_folder_output_is_evaluated_by_itself(tiny_model, text_file, test_text, out, report):
    quantize(tiny_model(), text_file, "--wbits", 3, "--save_path", out / "folder", "--report", report, evaluate=test_text)
    evaluate("--base_model_name_or_path", out / "folder", "--perplexity", test_text, "--seqlen", 32, "--output", out / "eval.json")
    assert perplexities(out / "eval.json") == pytest.approx(perplexities(report), rel=1e-5)


def test_overwrite_replaces_a_file_and_a_folder(tiny_model, text_file, out):
    for name in ("q.safetensors", "folder"):
        for bits in (4, 2):
            quantize(tiny_model(), text_file, "--wbits", bits, "--overwrite", "--save_path", out / name)
    assert decode(out / "q.safetensors").keys() == decode(out / "folder/model.safetensors").keys()
    assert json.loads((out / "folder/config.json").read_text())["quantization_config"]["bits"] == 2
    assert sorted(path.name for path in out.iterdir()) == ["folder", "q.safetensors"]


# --- perplexity and report -------------------------------------------------------------------------------------


def perplexities(file: Path) -> list[float]:
    return [row["perplexity"] for row in json.loads(file.read_text())["perplexity"]]


@pytest.mark.parametrize("grid", ["nonuniform", "affine"])
def test_llama_and_eval_quantized_agree(tiny_model, text_file, test_text, out, report, capsys, grid):
    model, file = tiny_model(dtype="bfloat16"), out / "q.safetensors"
    quantize(model, text_file, "--wbits", 3, *GRIDS[grid], "--save_path", file, "--report", report, evaluate=test_text)
    printed = [line for line in capsys.readouterr().out.splitlines() if "perplexity" in line]
    base = ["--base_model_name_or_path", model, "--perplexity", test_text, "--seqlen", 32]
    evaluate(*base, "--leanquant_path", file, "--bits", 3, "--eval_batch_size", 3, "--output", out / "eval.json")
    assert [line for line in capsys.readouterr().out.splitlines() if "perplexity" in line] == printed != []
    assert perplexities(out / "eval.json") == pytest.approx(perplexities(report), rel=1e-5)
    shown = float(re.search(r"perplexity ([\d.]+)", printed[0])[1])
    assert shown == pytest.approx(perplexities(report)[0], abs=1e-4)


@pytest.mark.parametrize("family, tied", [("llama", False), ("mistral", True)])
def test_wbits_16_is_the_perplexity_of_transformers(tiny_model, text_file, test_text, tmp_path, report, family, tied):
    model, other = tiny_model(family, tied), tmp_path / "other.txt"
    other.write_text(make_text(333, seed=9))
    quantize(model, text_file, "--wbits", 16, "--report", report, "--eval", test_text, other)
    expected = [transformers_perplexity(whole_model(model), model, text) for text in (test_text, other)]
    assert abs(expected[0] - expected[1]) > 0.01
    assert perplexities(report) == pytest.approx(expected, rel=1e-5)
    row = json.loads(report.read_text())["perplexity"][0]
    assert (row["seqlen"], row["windows"], row["tokens"]) == (32, 601 // 32, 601 // 32 * 32)


def test_without_save_path_the_model_is_evaluated_and_nothing_is_written(
    tiny_model, text_file, test_text, out, report, monkeypatch, capsys
):
    monkeypatch.chdir(out)
    quantize(tiny_model(), text_file, "--wbits", 3, "--exponent", 4, "--report", report, evaluate=test_text)
    assert "perplexity" in capsys.readouterr().out
    assert list(out.iterdir()) == []
    quantize(tiny_model(), text_file, "--wbits", 3, "--exponent", 4, "--save_path", out / "q.safetensors")
    evaluate(
        *("--base_model_name_or_path", tiny_model(), "--leanquant_path", out / "q.safetensors"),
        *("--perplexity", test_text, "--seqlen", 32, "--output", out / "eval.json"),
    )
    assert perplexities(out / "eval.json") == pytest.approx(perplexities(report), rel=1e-5)


def test_report_says_what_was_done_and_what_it_took(tiny_model, text_file, test_text, report):
    quantize(tiny_model(), text_file, "--wbits", 3, "--exponent", 4, *SEQUENTIAL, "--report", report, evaluate=test_text)
    contents = json.loads(report.read_text())
    assert contents["settings"]["bits"] == 3 and {"torch", "transformers", "safetensors", "leanquant"} <= set(
        contents["settings"]["versions"]
    )
    assert [(row["layer"], row["linear"]) for row in contents["linears"]] == [(i, linear) for i in range(2) for linear in LINEARS]
    assert all(0 < row["loss"] < float("inf") and row["seconds"] > 0 for row in contents["linears"])
    phases = contents["phase_seconds"]
    assert set(phases) == {
        *("load", "forward", "reference forward", "hessian", "factorization", "target", "grid", "solve", "refine", "pack", "save")
    }
    assert all(seconds > 0 for seconds in phases.values())
    assert 0.7 * contents["quantization_seconds"] < sum(phases.values()) <= contents["quantization_seconds"]
    assert 50e6 < contents["machine"]["peak_host_bytes"] < 64e9
    assert contents["perplexity"][0]["source"] == str(test_text)


# --- losses ----------------------------------------------------------------------------------------------------


def damped_hessians(model: Path, text: Path, percdamp: float) -> dict[str, torch.Tensor]:
    """mean x x^T + percdamp mean(diagonal) 1 of every linear of the unquantized model, on the windows of SETTINGS."""
    import datautils

    ids = datautils.calibration_windows(str(text), AutoTokenizer.from_pretrained(model), 16, 32, 0)
    base, sums = whole_model(model), {}

    def hook(name, inputs):
        X = inputs[0].flatten(0, 1).double()
        sums[name] = sums.get(name, 0) + X.T @ X

    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs, name=name: hook(name, inputs))
    with torch.no_grad():
        base(ids)
    hessians = {name: H / ids.numel() for name, H in sums.items()}
    return {name: H + percdamp * H.diagonal().mean() * torch.eye(len(H)) for name, H in hessians.items()}


def test_saved_weights_have_the_reported_losses_and_better_grids_have_less(tiny_model, text_file, out, report):
    """tr(E H E^T) from the file. Layer 0 sees unquantized inputs without --true-sequential, so its Hessians are known."""
    model, totals = tiny_model(), {}
    original, hessians = load_file(model / "model.safetensors"), damped_hessians(model, text_file, 0.1)
    for grid, options in GRIDS.items():
        file = out / f"{grid}.safetensors"
        quantize(model, text_file, "--wbits", 3, "--n_layers", 1, *options, "--save_path", file, "--report", report)
        weights, losses = decode(file), []
        for row in json.loads(report.read_text())["linears"]:
            name = f"model.layers.0.{row['linear']}"
            E = (weights[f"{name}.weight"] - original[f"{name}.weight"]).double()
            losses.append(((E @ hessians[name]) * E).sum().item())
            assert row["loss"] == pytest.approx(losses[-1], rel=1e-3)
        totals[grid] = sum(losses)
    assert totals["nonuniform"] < 0.9 * totals["minmax"]
    assert totals["minmax"] < 0.9 * totals["rtn"]
    assert totals["affine"] < totals["minmax"]
    assert totals["nonuniform"] < 0.9 * totals["published"]


def test_more_bits_lose_less(tiny_model, text_file, test_text, report):
    losses, found = [], []
    for bits in (2, 3, 4):
        quantize(tiny_model(), text_file, "--wbits", bits, "--exponent", 4, *SEQUENTIAL, "--report", report, evaluate=test_text)
        losses.append(sum(row["loss"] for row in json.loads(report.read_text())["linears"]))
        found.append(perplexities(report)[0])
    assert losses[0] > 2 * losses[1] > 4 * losses[2]
    assert found[2] == pytest.approx(transformers_perplexity(whole_model(tiny_model()), tiny_model(), test_text), rel=0.1)


# --- what can go wrong -----------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, str]:
    return digest(folder) | {f"{path.relative_to(folder)}/": "" for path in folder.rglob("*") if path.is_dir()}


@pytest.fixture
def refused(out, capsys):
    """refused(program, *arguments) -> the one line that it must print to stderr; what was in `out` must be as before."""

    def run(program, *arguments) -> str:
        before = snapshot(out)
        capsys.readouterr()
        assert program.main([str(argument) for argument in arguments]) == 2
        stderr = capsys.readouterr().err
        assert stderr.startswith("error: ") and stderr.count("\n") == 1 and stderr.endswith("\n"), stderr
        assert "Traceback" not in stderr
        assert snapshot(out) == before
        return stderr

    return run


@pytest.fixture
def broken(tiny_model, tmp_path) -> Path:
    """A copy of the sharded tiny Llama, to be broken."""
    return shutil.copytree(tiny_model(sharded=True), tmp_path / "broken")


def common(out: Path) -> list:
    return [*SETTINGS, "--wbits", "3", "--eval", "none", "--save_path", out / "q.safetensors"]


def forbid_quantization(monkeypatch) -> None:
    monkeypatch.setattr(llama, "quantize_model", lambda *_: pytest.fail("quantization began"))


@pytest.mark.parametrize(
    "dataset, words", [("wikitext9", "unknown dataset wikitext9"), ("/no/such/file.txt", "/no/such/file.txt does not exist")]
)
def test_bad_dataset_is_refused(tiny_model, out, refused, dataset, words):
    assert words in refused(llama, tiny_model(), dataset, *common(out))


@pytest.mark.parametrize("save_path", ["q.safetensors", "folder"])
def test_too_short_text_is_refused_with_its_length(tiny_model, out, refused, tmp_path, save_path):
    (tmp_path / "short.txt").write_text("only 25 bytes and a BOS.\n")
    message = refused(llama, tiny_model(), tmp_path / "short.txt", *common(out), "--save_path", out / save_path)
    assert "26 tokens" in message and "32" in message


def test_hub_without_network_is_refused(tiny_model, text_file, out, refused, offline, monkeypatch):
    monkeypatch.chdir(out)
    assert "network" in refused(llama, tiny_model(), "wikitext2", *common(out))
    assert "nobody/nothing" in refused(llama, "nobody/nothing", text_file, *common(out))


def test_folder_without_safetensors_is_refused(text_file, out, refused, broken):
    for file in broken.glob("*.safetensors*"):
        file.unlink()
    assert "no model.safetensors" in refused(llama, broken, text_file, *common(out))
    (broken / "pytorch_model.bin").write_bytes(b"pickle")
    assert "pytorch_model.bin" in refused(llama, broken, text_file, *common(out))


def test_missing_shard_is_named(text_file, out, refused, broken):
    shard = sorted(broken.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refused(llama, broken, text_file, *common(out))


@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.99])
def test_truncated_shard_is_named(text_file, out, refused, broken, keep):
    shard = sorted(broken.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    assert shard.name in refused(llama, broken, text_file, *common(out))


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_named(text_file, out, refused, broken, name, value, monkeypatch):
    forbid_quantization(monkeypatch)
    shard = broken / json.loads((broken / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(shard)
    tensors[name][3, 5] = value
    save_file(tensors, shard, metadata={"format": "pt"})
    assert name in refused(llama, broken, text_file, *common(out))


@pytest.mark.parametrize(
    "options, words",
    [
        (["--wbits", "5"], "--wbits is 5"),
        (["--wbits", "16"], "--wbits 16"),
        (["--groupsize", "40"], "--groupsize 40 does not divide"),
        (["--groupsize", "64"], "mlp.down_proj"),  # divides 64 inputs, not 96
        (["--groupsize", "0"], "--groupsize 0"),
        (["--nsamples", "0"], "--nsamples"),
        (["--seqlen", "1"], "--seqlen"),
        (["--seqlen", "257"], "256"),
        (["--batch_size", "0"], "--batch_size"),
        (["--n_layers", "0"], "--n_layers"),
        (["--percdamp", "-1"], "--percdamp"),
        (["--percdamp", "nan"], "--percdamp"),
        (["--percdamp", "inf"], "--percdamp"),
        (["--exponent", "-1"], "--exponent"),
        (["--exponent", "inf"], "--exponent"),
        (["--block_size", "0"], "--block_size"),
        (["--refine", "-1"], "--refine"),
        (["--exponent", "4", "--recipe", "published", "--refine", "-1"], "--refine"),
        (["--shift", "-0.5"], "--shift"),
        (["--shift", "nan"], "--shift"),
        (["--grid_partitions", "7"], "--grid_partitions"),
        (["--exponent", "4", "--kmeans_bins", "4"], "--kmeans_bins"),
        (["--nearest", "--exponent", "4"], "--nearest"),
        (["--nearest", "--grid", "affine"], "--nearest"),
        (["--grid", "minmax", "--exponent", "4"], "--grid minmax"),
        (["--grid", "affine", "--no-round_levels"], "--round_levels"),
        (["--sym", "--exponent", "4"], "--sym"),
        (["--sym", "--grid", "nonuniform"], "--sym"),
        (["--exponent", "4", "--groupsize", "16"], "--groupsize"),
        (["--device", "meta"], "device meta"),
        (["--device", "nonsense"], "device nonsense"),
        (["--eval", "none", "wikitext2"], "none"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_and_contradictory_options_are_refused_before_quantization(tiny_model, text_file, out, refused, monkeypatch, options, words):
    forbid_quantization(monkeypatch)
    assert words in refused(llama, tiny_model(), text_file, *common(out), *options)


def test_nothing_to_do_is_refused(tiny_model, text_file, refused):
    assert "--wbits" in refused(llama, tiny_model(), text_file, "--wbits", "16", "--eval", "none")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused(tiny_model, text_file, out, refused):
    assert "device cuda, but" in refused(llama, tiny_model(), text_file, *common(out), "--device", "cuda")
    assert "device cuda, but" in refused(
        eval_quantized, "--base_model_name_or_path", tiny_model(), "--perplexity", text_file, "--device", "cuda"
    )


@pytest.mark.parametrize("name", ["nonsense", "missing.txt"])
def test_unknown_evaluation_text_is_refused_before_quantization(tiny_model, text_file, out, refused, monkeypatch, name):
    forbid_quantization(monkeypatch)
    assert name in refused(llama, tiny_model(), text_file, *common(out), "--eval", name)


def test_too_short_evaluation_text_is_refused_before_quantization(tiny_model, text_file, out, refused, monkeypatch, tmp_path):
    forbid_quantization(monkeypatch)
    (tmp_path / "short.txt").write_text("short")
    assert "6 tokens" in refused(llama, tiny_model(), text_file, *common(out), "--eval", tmp_path / "short.txt")


@pytest.mark.parametrize("name", ["q.safetensors", "folder"])
def test_existing_output_is_kept_without_overwrite(tiny_model, text_file, out, refused, name):
    quantize(tiny_model(), text_file, "--wbits", 4, "--save_path", out / name)
    assert "--overwrite" in refused(llama, tiny_model(), text_file, *common(out), "--save_path", out / name)


def test_existing_output_is_kept_when_an_overwriting_run_fails(tiny_model, text_file, out, refused, tmp_path):
    quantize(tiny_model(), text_file, "--wbits", 4, "--save_path", out / "q.safetensors")
    (tmp_path / "short.txt").write_text("short")
    refused(llama, tiny_model(), tmp_path / "short.txt", *common(out), "--overwrite")


def test_folder_of_other_things_is_never_overwritten(tiny_model, text_file, out, refused):
    (out / "thesis").mkdir()
    (out / "thesis/chapter.txt").write_text("years of work")
    assert "thesis" in refused(llama, tiny_model(), text_file, *common(out), "--overwrite", "--save_path", out / "thesis")


def test_the_base_model_is_never_overwritten(text_file, out, refused, broken):
    before = digest(broken)
    refused(llama, broken, text_file, *common(out), "--overwrite", "--save_path", broken)
    assert digest(broken) == before


def test_unwritable_output_is_refused(tiny_model, text_file, out, refused):
    (out / "file").write_text("not a folder")
    assert str(out / "file") in refused(llama, tiny_model(), text_file, *common(out), "--save_path", out / "file" / "q.safetensors")


def test_full_disk_is_refused_before_quantization(tiny_model, text_file, out, refused, monkeypatch):
    forbid_quantization(monkeypatch)
    usage = shutil.disk_usage(out)
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "GB free" in refused(llama, tiny_model(), text_file, *common(out))


@pytest.mark.parametrize("report", [".", "missing/report.json"])
def test_report_that_cannot_be_written_is_refused_before_quantization(tiny_model, text_file, out, refused, monkeypatch, report):
    forbid_quantization(monkeypatch)
    assert "--report" in refused(llama, tiny_model(), text_file, *common(out), "--report", out / report)


def test_quantized_folder_is_not_quantized_again(tiny_model, text_file, out, refused):
    quantize(tiny_model(), text_file, "--wbits", 4, "--save_path", out / "folder")
    assert "already quantized" in refused(llama, out / "folder", text_file, *common(out))


def base_arguments(tiny_model, text: Path) -> list:
    return ["--base_model_name_or_path", tiny_model(), "--perplexity", text, "--seqlen", 32]


def test_eval_refuses_what_does_not_fit(tiny_model, text_file, test_text, out, refused):
    file, base = out / "q.safetensors", base_arguments(tiny_model, test_text)
    quantize(tiny_model(), text_file, "--wbits", 3, "--exponent", 4, "--save_path", file)
    assert "not 4" in refused(eval_quantized, *base, "--leanquant_path", file, "--bits", 4)
    assert "no quantized weights" in refused(eval_quantized, *base, "--leanquant_path", tiny_model())
    assert "does not exist" in refused(eval_quantized, *base, "--leanquant_path", out / "missing.safetensors")
    assert "--seqlen" in refused(eval_quantized, *base, "--seqlen", 1)
    other = tiny_model(num_hidden_layers=3)
    assert "model.layers.2" in refused(eval_quantized, *base, "--base_model_name_or_path", other, "--leanquant_path", file)
    other = tiny_model(intermediate_size=128)
    assert "mlp" in refused(eval_quantized, *base, "--base_model_name_or_path", other, "--leanquant_path", file)


@pytest.mark.parametrize("output", [".", "missing/eval.json"])
def test_eval_refuses_an_output_it_cannot_write_before_evaluating(tiny_model, test_text, out, refused, monkeypatch, output):
    monkeypatch.setattr(eval_quantized, "perplexity", lambda *_: pytest.fail("evaluation began"))
    assert "--output" in refused(eval_quantized, *base_arguments(tiny_model, test_text), "--output", out / output)


def test_a_bug_is_not_dressed_up_as_bad_input(tiny_model, text_file, out, monkeypatch):
    def learn_grid(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(quant, "learn_grid", learn_grid)
    with pytest.raises(RuntimeError, match="a bug"):
        quantize(tiny_model(), text_file, "--wbits", 3, "--save_path", out / "q.safetensors")
    assert list(out.iterdir()) == []


def test_a_failed_factorization_rounds_to_nearest_and_says_so(tiny_model, text_file, out, report, monkeypatch):
    def factorize(*_):
        raise hessian.NotPositiveDefinite

    monkeypatch.setattr(hessian, "factorize", factorize)
    with pytest.warns(UserWarning, match="layer 0.*q_proj"):
        quantize(tiny_model(), text_file, "--wbits", 3, "--save_path", out / "q.safetensors", "--report", report)
    assert all("nearest" in row["percdamp_used"] for row in json.loads(report.read_text())["linears"])
    monkeypatch.undo()
    quantize(tiny_model(), text_file, "--wbits", 3, "--nearest", "--save_path", out / "rtn.safetensors")
    found, expected = decode(out / "q.safetensors"), decode(out / "rtn.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("grid", ["minmax", "nonuniform", "affine"])
def test_report_is_json_that_any_reader_takes(tiny_model, text_file, report, monkeypatch, grid):
    """Losses that are not known are null: NaN is not JSON."""

    def factorize(*_):
        raise hessian.NotPositiveDefinite

    monkeypatch.setattr(hessian, "factorize", factorize)
    with pytest.warns(UserWarning):
        quantize(tiny_model(), text_file, "--wbits", 3, *GRIDS[grid], "--report", report)
    contents = json.loads(report.read_text(), parse_constant=lambda constant: pytest.fail(f"the report holds {constant}"))
    assert all(row["loss"] is None and "nearest" in row["percdamp_used"] for row in contents["linears"])


KILLED = """
import os, signal, sys
import llama
from leanquant import packing
copy, calls = packing._copy_bytes, []
def dies(*arguments):
    calls.append(1)
    if len(calls) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    copy(*arguments)
packing._copy_bytes = dies
llama.main(sys.argv[1:])
"""


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def test_a_run_whose_reader_is_gone_says_so(tiny_model, text_file, out):
    """As behind `| head`, whether lines are written at once or at the end."""
    command = [sys.executable, ROOT / "llama.py", tiny_model(), text_file, *common(out)]
    for unbuffered, more in (("1", []), ("", ["--plan"])):
        settings = environment() | {"PYTHONUNBUFFERED": unbuffered}
        read, write = os.pipe()
        os.close(read)
        ran = subprocess.run([str(word) for word in command + more], env=settings, stdout=write, stderr=subprocess.PIPE, text=True)
        os.close(write)
        assert ran.returncode == 1 and ran.stderr.splitlines()[-1].startswith("error: whoever read what is printed here is gone")
        assert "Traceback" not in ran.stderr and "Exception ignored" not in ran.stderr


def test_killed_run_leaves_no_result_and_can_be_repeated(tiny_model, text_file, out):
    """The kill comes in the middle of writing the result, the worst moment."""
    command = [sys.executable, "-c", KILLED, tiny_model(), text_file, *common(out)]
    assert subprocess.run([str(word) for word in command], env=environment(), capture_output=True).returncode == -signal.SIGKILL
    assert (out / "q.safetensors.partial").is_dir()  # it did get as far as writing
    assert not (out / "q.safetensors").exists()
    assert llama.main([str(word) for word in (tiny_model(), text_file, *common(out))]) == 0
    assert quantized_names(out / "q.safetensors") == layer_linears(2)
    assert [path.name for path in out.iterdir() if path.name != "q.safetensors"] == []


# --- the programs themselves -----------------------------------------------------------------------------------


@pytest.mark.parametrize("program", [llama, eval_quantized])
def test_help_explains_every_flag(program, monkeypatch, capsys):
    parsers = []
    parse_args = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self, argv=None: parsers.append(self) or parse_args(self, argv))
    with pytest.raises(SystemExit) as stopped:
        program.main(["--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for action in parsers[0]._actions:
        assert action.help and len(action.help) > 8, action.option_strings
        assert all(name in shown for name in action.option_strings or [action.dest])


def test_every_published_flag_is_accepted():
    values = {"--nearest": [], "--sym": [], "--new-eval": [], "--act-order": [], "--true-sequential": [], "--static-groups": []}
    for flag in PUBLISHED_FLAGS:
        assert flags.parse(["model", "c4", flag, *values.get(flag, ["3"])])


IMPORTS = """
import importlib, pathlib, sys
import leanquant
root = pathlib.Path(sys.argv[1])
for file in [*root.glob("*.py"), *root.glob("leanquant/*.py")]:
    if file.stem != "vllm_plugin":  # vLLM itself loads that one
        importlib.import_module(".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"))
assert "llama" in sys.modules and "leanquant.packing" in sys.modules
print(*sorted({"cupy", "datasets", "lm_eval", "sklearn"} & set(sys.modules)))
"""


def test_importing_loads_nothing_optional():
    done = subprocess.run([sys.executable, "-c", IMPORTS, str(ROOT)], env=environment(), cwd="/", capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


PACKAGE_ALONE = """
import importlib, pathlib, sys
folder, root = map(pathlib.Path, sys.argv[1:])
sys.path[:] = [str(folder), *(place for place in sys.path if pathlib.Path(place or ".").resolve() != root)]
for file in (folder / "leanquant").glob("*.py"):
    if file.stem != "vllm_plugin":  # as above
        importlib.import_module(f"leanquant.{file.stem}".removesuffix(".__init__"))
ours = {file.stem for file in root.glob("*.py")}
print(sys.modules["leanquant"].__path__[0] == str(folder / "leanquant"), *sorted((ours | {"datasets", "lm_eval"}) & set(sys.modules)))
"""


def test_the_package_needs_nothing_beside_it(tmp_path):
    """It is installed without the files that quantize."""
    shutil.copytree(ROOT / "leanquant", tmp_path / "leanquant")
    command = [sys.executable, "-c", PACKAGE_ALONE, str(tmp_path), str(ROOT)]
    done = subprocess.run(command, env=environment(), cwd="/", capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr


# --- GPUs ------------------------------------------------------------------------------------------------------

ONE_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def share_of_equal_codes(one: Path, other: Path) -> float:
    a, b = load_file(one), load_file(other)
    equal = [(a[name] == b[name]).double().mean().item() for name in a if name.endswith(".weight_codes")]
    return sum(equal) / len(equal)


@pytest.mark.gpu
@ONE_GPU
def test_cuda_run_gives_nearly_the_perplexity_of_the_cpu_run(tiny_model, text_file, test_text, out):
    for device in ("cpu", "cuda"):
        options = ["--wbits", 4, "--exponent", 4, *SEQUENTIAL, "--dtype", "float32", "--device", device, "--report", out / f"{device}.json"]
        quantize(tiny_model(), text_file, *options, evaluate=test_text)
    cpu, cuda = (perplexities(out / f"{device}.json")[0] for device in ("cpu", "cuda"))
    assert cuda == pytest.approx(cpu, rel=0.02)


def compare_offloaded(tiny_model, text_file, out, monkeypatch, expected: str) -> None:
    devices, hessian_device = [], llama.hessian_device
    monkeypatch.setattr(llama, "hessian_device", lambda *a: devices.append(str(hessian_device(*a))) or torch.device(devices[-1]))
    for name, threshold in {"here": 10**6, "offloaded": 1}.items():
        devices.clear()
        options = [
            "--wbits",
            4,
            "--exponent",
            4,
            "--device",
            "cuda",
            "--dtype",
            "float32",
            "--offload_threshold",
            threshold,
            "--n_layers",
            1,
        ]
        quantize(tiny_model(), text_file, *options, "--save_path", out / f"{name}.safetensors")
    assert set(devices) == {expected}
    assert share_of_equal_codes(out / "here.safetensors", out / "offloaded.safetensors") >= 0.99


@pytest.mark.gpu
@ONE_GPU
def test_wide_hessians_go_to_the_cpu_where_there_is_one_gpu(tiny_model, text_file, out, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    compare_offloaded(tiny_model, text_file, out, monkeypatch, "cpu")


@pytest.mark.gpu
@TWO_GPUS
def test_wide_hessians_go_to_the_second_gpu(tiny_model, text_file, out, monkeypatch):
    compare_offloaded(tiny_model, text_file, out, monkeypatch, "cuda:1")


@pytest.mark.parametrize("grid", ["nonuniform", "affine"])
def test_a_large_matrix_is_solved_in_pieces_of_rows(tiny_model, text_file, tmp_path, monkeypatch, grid):
    """As good as at once: rows are independent given the Hessian."""
    files, sizes, real = {}, [], llama.quantize_weights
    for most in (2**27, 1000):
        monkeypatch.setattr(quant, "MOST_WEIGHTS", most)
        monkeypatch.setattr(llama, "quantize_weights", lambda W, *rest: sizes.append(W.numel()) or real(W, *rest))
        files[most] = tmp_path / f"{most}.safetensors"
        command = [
            tiny_model(),
            text_file,
            "--nsamples",
            4,
            "--seqlen",
            32,
            "--percdamp",
            0.1,
            "--wbits",
            4,
            *GRIDS[grid],
            *SEQUENTIAL,
            "--eval",
            "none",
        ]
        assert llama.main([str(part) for part in (*command, "--save_path", files[most])]) == 0
    assert min(sizes) <= 1000 < max(sizes)
    whole, pieces = (load_file(file) for file in files.values())
    codes = [name for name in whole if name.endswith("weight_codes")]
    same = sum((whole[name] == pieces[name]).sum().item() for name in codes) / sum(whole[name].numel() for name in codes)
    assert same > 0.98, "only rounding may tell them apart"

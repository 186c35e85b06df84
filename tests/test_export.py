"""Proves that exported models are what other software reads: golden words for each packing order, every cell of docs/compatibility.md
in the real loaders, verification that cannot be forgotten; and that such folders, ours and others', are read back or refused in words."""

import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import compatibility
import eval_quantized
import export as export_cli
import llama
import test_moe
from conftest import write_model
from leanquant import InputError, LeanQuantModelForCausalLM, layouts
from leanquant import __main__ as info
from leanquant.export import FORMATS, export
from leanquant.foreign import open_checkpoint
from leanquant.layouts import LAYOUTS, Linear, Model, pack_words
from leanquant.packing import Checkpoint
from test_hostile_files import mutated

IDS = torch.arange(20).view(1, -1) + 5
Q = "model.layers.1.mlp.up_proj"
SIZES = {"hidden_size": 128, "intermediate_size": 256}


def plan(bits: int, groupsize: int = -1, symmetric: bool = False, uniform: bool = True, linears=("model.layers.0.a.q",)) -> Model:
    return Model(bits, groupsize, uniform, symmetric, 2 ** (bits - 1) if symmetric else 0, list(linears), ["lm_head"])


def random_linear(bits: int, rows: int, columns: int, groups: int, uniform: bool, seed: int = 0) -> Linear:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randint(0, 2**bits, shape, generator=g, dtype=torch.uint8)  # noqa: E731
    if not uniform:
        return Linear(draw(rows, columns), torch.randn(rows, 2**bits, generator=g).half())
    return Linear(draw(rows, columns), None, torch.rand(rows, groups, generator=g).half() + 0.1, draw(rows, groups))


# --- packing orders, by hand -----------------------------------------------------------------------------------


def words(*values: int) -> list[int]:
    """As int32."""
    return np.array(values, np.uint32).view(np.int32).tolist()


def test_awq_holds_elements_0_2_4_6_1_3_5_7_from_the_lowest_nibble_on():
    codes = torch.tensor([[1], [2], [3], [4], [5], [6], [7], [8]], dtype=torch.uint8)  # 8 outputs, 1 input
    zero = torch.tensor([[15], [14], [13], [12], [11], [10], [9], [0]], dtype=torch.uint8)
    tensors = LAYOUTS["awq"].encode(Linear(codes, None, torch.ones(8, 1).half(), zero), plan(4))
    assert tensors[".qweight"].tolist() == [words(0x86427531)]
    assert tensors[".qzeros"].tolist() == [words(0x0ACE9BDF)]  # elements 7 5 3 1 6 4 2 0 from the highest nibble down
    assert LAYOUTS["awq"].decode(tensors, 4, 8, 1).codes.tolist() == codes.tolist()


@pytest.mark.parametrize("name, zeros", [("gptq", 0x76543210), ("gptq_v2", 0x87654321)])
def test_gptq_packs_along_the_inputs_and_version_1_stores_one_less(name, zeros):
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]] + [[0] * 8] * 7, dtype=torch.uint8)
    zero = torch.tensor([[1], [2], [3], [4], [5], [6], [7], [8]], dtype=torch.uint8)
    tensors = LAYOUTS[name].encode(Linear(codes, None, torch.ones(8, 1).half(), zero), plan(4))
    assert tensors[".qweight"].tolist() == [words(0x87654321, 0, 0, 0, 0, 0, 0, 0)]
    assert tensors[".qzeros"].tolist() == [words(zeros)]
    assert tensors[".g_idx"].tolist() == [0] * 8
    assert LAYOUTS[name].decode(tensors, 4, 8, 8).zero.tolist() == zero.tolist()


def test_three_bits_cross_words_at_codes_10_and_21():
    """Codes 0 to 9 in word 0, 10 split 2 | 1, 11 to 20 from bit 1 of word 1 on, 21 split 1 | 2, 22 to 31 from bit 2 of word 2 on."""
    for code, expected in {
        0: (7, 0, 0),
        9: (7 << 27, 0, 0),
        10: (3 << 30, 1, 0),
        11: (0, 14, 0),
        21: (0, 1 << 31, 3),
        22: (0, 0, 28),
    }.items():
        codes = torch.zeros(1, 32, dtype=torch.uint8)
        codes[0, code] = 7
        assert pack_words(codes, 3).tolist() == [words(*expected)], code


def test_compressed_tensors_packs_codes_along_the_inputs_and_zero_points_along_the_outputs():
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]] + [[9] * 8] * 7, dtype=torch.uint8)
    zero = torch.stack([torch.arange(8), torch.arange(8, 16)], 1).to(torch.uint8)  # [8 outputs, 2 groups]
    tensors = LAYOUTS["compressed-tensors"].encode(Linear(codes, None, torch.ones(8, 2).half(), zero), plan(4, 4))
    assert tensors[".weight_packed"].tolist() == [words(0x87654321)] + [words(0x99999999)] * 7
    assert tensors[".weight_zero_point"].tolist() == [words(0x76543210, 0xFEDCBA98)]
    assert tensors[".weight_shape"].tolist() == [8, 8]


def test_any_precision_words_are_those_of_the_byte_permutation():
    """The layout as its packer describes it: packbits, then byte p of a block goes to 4 (p mod T) + (p div T xor 3)."""
    linear = random_linear(3, 2, 1024 + 96, 1, uniform=False)
    stored = LAYOUTS["any-precision"].encode(linear, plan(3, uniform=False))[".qweight"].numpy()
    for plane in range(3):
        packed = np.packbits(linear.codes.numpy() >> (2 - plane) & 1, axis=1)
        expected = np.empty_like(packed)
        for start, size in ((0, 128), (128, 12)):
            for p in range(size):
                T = size // 4
                expected[:, start + 4 * (p % T) + (p // T ^ 3)] = packed[:, start + p]
        assert np.array_equal(stored[plane], expected.view(np.int32))


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=30, deadline=None)
@given(bits=st.sampled_from([4, 3, 2]), eighths=st.integers(1, 5), groups=st.sampled_from([1, 2]), seed=st.integers(0, 999))
def test_decoders_invert_encoders(name, bits, eighths, groups, seed):
    layout = LAYOUTS[name]
    bits = 4 if name == "awq" else bits
    linear = random_linear(bits, 32, 32 * eighths * groups, groups, layout.uniform, seed)
    linear = linear if name != "gptq" else linear._replace(zero=linear.zero.clamp(min=1))
    tensors = layout.encode(linear, plan(bits, 32 * eighths if groups > 1 else -1, uniform=layout.uniform))
    found = layout.decode(tensors, bits, *linear.codes.shape)
    for mine, theirs in zip(linear, found, strict=True):
        assert (mine is None) == (theirs is None) and (mine is None or torch.equal(mine, theirs))


# --- the real loaders ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: compatibility.make_tiny(name, folder / str(number)) for number, name in enumerate(compatibility.TINY)}


def test_every_cell_loads_in_the_real_loaders_and_the_page_says_so(tmp_path):
    """Makes docs/compatibility.md; a page that was another is written anew, and the test fails once."""
    found = compatibility.check_all(tmp_path)
    assert {text for text in found.values()} == {"yes"}, found
    before, page = compatibility.OUT.read_text(), compatibility.page(found)
    if page != before:
        compatibility.OUT.write_text(page)
        pytest.fail("docs/compatibility.md was out of date and is written anew: read it and commit it")


def test_widened_models_are_the_same_function(tiny_model, tmp_path):
    from demo_data import widen

    base = tiny_model(num_attention_heads=4, num_key_value_heads=2)
    wide = AutoModelForCausalLM.from_pretrained(widen(base, tmp_path / "wide"), dtype=torch.float32)
    assert {module.in_features % 128 for name, module in wide.named_modules() if name.endswith("_proj")} == {0}
    narrow = logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    assert (logits(wide) - narrow).norm() < 2e-3 * narrow.norm()  # its weights are rounded to float16


# --- exporting -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized(bases, tmp_path_factory):
    """Factory: quantized(bits, symmetric, groupsize) -> a file of ours."""
    folder, made = tmp_path_factory.mktemp("quantized"), {}

    def make(bits: int = 4, symmetric: bool = False, groupsize: int = 64, model: str = "tiny Llama") -> Path:
        key = (bits, symmetric, groupsize, model)
        if key not in made:
            made[key] = compatibility.round_model(
                bases[model], compatibility.Cell(model, "", *key[:3]), folder / f"{len(made)}.safetensors"
            )
        return made[key]

    return make


@pytest.fixture(scope="module")
def nonuniform(tiny_model, text_file, tmp_path_factory) -> tuple[Path, Path]:
    """A model in bfloat16, and a file of it with free levels of 3 bits."""
    out = tmp_path_factory.mktemp("nonuniform") / "q.safetensors"
    base = tiny_model(dtype="bfloat16", **SIZES)
    command = [str(base), str(text_file), "--nsamples", "2", "--seqlen", "32", "--eval", "none", "--wbits", "3", "--exponent", "4"]
    assert llama.main([*command, "--save_path", str(out)]) == 0
    return base, out


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def weights_of(base: Path, file: Path) -> dict[str, torch.Tensor]:
    model = LeanQuantModelForCausalLM.from_pretrained(base, file, device="cpu")
    return {name: module.weight for name, module in model.named_modules() if hasattr(module, "weight_codes")}


@pytest.mark.parametrize("name", ["awq", "gptq_v2", "compressed-tensors"])
@pytest.mark.parametrize("model", compatibility.TINY)
def test_what_was_exported_is_read_back_as_it_was(bases, quantized, tmp_path, name, model):
    base, file = bases[model], quantized(model=model)
    export(Checkpoint.open(file), base, name, tmp_path / "out")
    ours, back = weights_of(base, file), LeanQuantModelForCausalLM.from_pretrained(tmp_path / "out", device="cpu")
    for linear, weight in ours.items():
        assert torch.equal(back.get_submodule(linear).weight, weight), linear
    torch.testing.assert_close(logits(back), logits(LeanQuantModelForCausalLM.from_pretrained(base, file, device="cpu")), rtol=0, atol=0)
    back.save_pretrained(tmp_path / "ours")  # and becomes a folder of ours
    torch.testing.assert_close(
        logits(LeanQuantModelForCausalLM.from_pretrained(tmp_path / "ours", device="cpu")), logits(back), rtol=0, atol=0
    )


def test_dense_and_any_precision_hold_free_levels(nonuniform, tmp_path):
    base, file = nonuniform
    export(Checkpoint.open(file), base, "dense", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    assert dense.dtype == torch.bfloat16
    for linear, weight in weights_of(base, file).items():
        assert torch.equal(dense.get_submodule(linear).weight, weight.bfloat16()), linear
    export(Checkpoint.open(file), base, "any-precision", tmp_path / "planes")
    stored = Checkpoint.open(tmp_path / "planes")
    assert stored.shapes[Q + ".qweight"] == (3, 256, 4) and stored.shapes[Q + ".lut3"] == (256, 8)
    config = json.loads((tmp_path / "planes/config.json").read_text())["anyprec"]
    assert (config["arch_config"]["model_name"], config["arch_config"]["layers_name"]) == ("model", "layers")
    assert "mlp.up_proj" in config["arch_config"]["module_names"] and config["parent_precision"] == 3


def test_any_precision_is_read_back_as_it_was(nonuniform, tmp_path, capsys):
    """By the loader, the evaluation and export.py, and what those write says nothing of it any more."""
    base, file = nonuniform
    export(Checkpoint.open(file), base, "any-precision", tmp_path / "planes")
    back = LeanQuantModelForCausalLM.from_pretrained(tmp_path / "planes", bits=3, device="cpu", torch_dtype=torch.float16)
    ours = LeanQuantModelForCausalLM.from_pretrained(base, file, device="cpu", torch_dtype=torch.float16)
    assert open_checkpoint(tmp_path / "planes").format == "any-precision"
    for linear, packed in ours.state_dict().items():
        assert torch.equal(back.state_dict()[linear].half(), packed.half()), linear  # levels are float16 there
    back.save_pretrained(tmp_path / "ours")
    same = LeanQuantModelForCausalLM.from_pretrained(tmp_path / "ours", device="cpu", torch_dtype=torch.float16)
    assert torch.equal(logits(same), logits(back))
    assert export_cli.main([str(tmp_path / "planes"), "--to", "dense", "--out", str(tmp_path / "dense")]) == 0
    dense = eval_quantized.Model.open(str(tmp_path / "dense"), None, None)
    assert not dense.bits and not dense.checkpoint.quantized
    assert eval_quantized.Model.open(str(tmp_path / "planes"), None, 3).bits == [3]
    for command, text in ((["info", str(tmp_path / "planes")], "any-precision"), (["info", str(tmp_path / "ours")], "bits:         3 (")):
        assert info.main(command) == 0 and text in capsys.readouterr().out


def test_the_folder_is_complete_and_says_what_it_is(nonuniform, quantized, tiny_model, text_file, tmp_path):
    base = tiny_model(**SIZES)
    command = [str(base), str(text_file), "--nsamples", "2", "--seqlen", "32", "--wbits", "4", "--grid", "affine", "--groupsize", "64"]
    command += ["--sym", "--grid_partitions", "64", "--eval", str(text_file), "--save_path", str(tmp_path / "q.safetensors")]
    assert llama.main([*command, "--export", "gptq", f"compressed-tensors:{tmp_path / 'ct'}"]) == 0
    for folder, name in ((tmp_path / "q-gptq", "gptq"), (tmp_path / "ct", "compressed-tensors")):
        files = {file.name for file in folder.iterdir()}
        assert {"config.json", "generation_config.json", "tokenizer.json", "README.md", "model.safetensors"} <= files
        assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == name
        card = (folder / "README.md").read_text()
        for text in ("LeanQuant", "4, symmetric, groups of 64", str(text_file), "2 windows of 32 tokens", "perplexity", "python llama.py"):
            assert text in card, text
        torch.testing.assert_close(
            logits(LeanQuantModelForCausalLM.from_pretrained(folder)),
            logits(LeanQuantModelForCausalLM.from_pretrained(base, tmp_path / "q.safetensors")),
        )
    assert (tmp_path / "q-gptq/quantize_config.json").is_file()


def test_shards_have_an_index_and_the_header_every_reader_wants(bases, quantized, tmp_path):
    export(Checkpoint.open(quantized()), bases["tiny Llama"], "awq", tmp_path / "out", max_shard_bytes=100_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    assert Q + ".qweight" in index
    assert LeanQuantModelForCausalLM.from_pretrained(tmp_path / "out", device="cpu")


def test_linears_that_are_not_quantized_are_named(tiny_model, text_file, tmp_path):
    base = tiny_model(**SIZES)
    command = [
        str(base),
        str(text_file),
        "--nsamples",
        "2",
        "--seqlen",
        "32",
        "--eval",
        "none",
        "--wbits",
        "4",
        "--grid",
        "minmax",
        "--sym",
    ]
    command += ["--n_layers", "1", "--save_path", str(tmp_path / "q.safetensors"), "--export", "awq", "gptq", "compressed-tensors"]
    assert llama.main(command) == 0
    configs = {
        n: json.loads((tmp_path / f"q-{n}/config.json").read_text())["quantization_config"] for n in ("awq", "gptq", "compressed-tensors")
    }
    assert Q in configs["awq"]["modules_to_not_convert"] and Q in configs["compressed-tensors"]["ignore"]
    assert r"-:^model\.layers\.1\.mlp\.up_proj$" in configs["gptq"]["dynamic"]
    assert Q.replace("1", "0") in configs["gptq"]["modules_in_block_to_quantize"][0]
    for name in configs:
        assert torch.isfinite(logits(LeanQuantModelForCausalLM.from_pretrained(tmp_path / f"q-{name}"))).all()


@pytest.mark.parametrize("name", FORMATS)
def test_a_flipped_code_is_found_and_nothing_is_kept(bases, quantized, nonuniform, tmp_path, monkeypatch, name):
    base, file = nonuniform if name == "any-precision" else (bases["tiny Llama"], quantized(symmetric=True))
    kind = type(LAYOUTS[name]) if name in LAYOUTS else export_module().Dense
    encode, first = kind.encode, []

    def flipped(self, linear, model):
        if not first:
            first.append(linear.codes[0, 0].clone())
            linear.codes[0, 0] ^= 1
        return encode(self, linear, model)

    monkeypatch.setattr(kind, "encode", flipped)
    with pytest.raises(RuntimeError, match="does not read back"):
        export(Checkpoint.open(file), base, name, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def export_module():
    from leanquant import export as module

    return module


def test_another_tensor_that_changes_on_the_way_is_found(bases, quantized, tmp_path, monkeypatch):
    module = export_module()
    monkeypatch.setattr(module, "others", lambda checkpoint, others=module.others: [n for n in others(checkpoint) if "norm" not in n])
    with pytest.raises(RuntimeError, match="norm"):
        module.verify(Checkpoint.open(quantized()), Checkpoint.open(quantized()), LAYOUTS["awq"], {})


def test_an_export_is_replaced_only_if_it_was_made_here(bases, quantized, tmp_path):
    checkpoint, base, out = Checkpoint.open(quantized()), bases["tiny Llama"], tmp_path / "out"
    export(checkpoint, base, "awq", out)
    with pytest.raises(InputError, match="exists"):
        export(checkpoint, base, "gptq_v2", out)
    export(checkpoint, base, "gptq_v2", out, overwrite=True)
    assert (out / "quantize_config.json").is_file()
    (out / "mine.md").write_text("x")
    with pytest.raises(InputError, match="other things"):
        export(checkpoint, base, "awq", out, overwrite=True)
    shutil.copytree(bases["tiny Llama"], tmp_path / "plain")
    with pytest.raises(InputError, match="other things"):
        export(checkpoint, base, "awq", tmp_path / "plain", overwrite=True)


@pytest.mark.parametrize(
    "options, name, words",
    [
        ({"bits": 3}, "awq", "awq holds 4 bits, not 3"),
        ({}, "gptq", "zero points of 0.*gptq_v2, or quantize with --sym"),
        ({}, "any-precision", "any-precision cannot hold a scale and zero"),
        ({"groupsize": 8}, "awq", "not of 8"),
        ({"groupsize": 8}, "gptq_v2", "not of 8"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_before_anything_is_written(bases, quantized, tmp_path, options, name, words):
    with pytest.raises(InputError, match=words):
        export(Checkpoint.open(quantized(**options)), bases["tiny Llama"], name, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_sizes_that_do_not_fill_words_are_refused():
    for name, rows, columns in (("awq", 12, 64), ("gptq_v2", 64, 20), ("gptq_v2", 20, 64), ("any-precision", 64, 48)):
        with pytest.raises(InputError, match="model.layers.0.q is|model.layers.0.q has"):
            LAYOUTS[name].check_size("model.layers.0.q", rows, columns, 4)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--grid", "affine", "--export", "gptq"], "gptq cannot hold zero points of 0"),
        (["--exponent", "4", "--export", "awq"], "awq cannot hold free levels"),
        (["--grid", "affine", "--wbits", "3", "--export", "awq"], "awq holds 4 bits"),
        (["--grid", "affine", "--export", "gguf"], "gguf is none of awq"),
        (["--grid", "affine", "--export", "awq:a", "gptq_v2:a"], "twice"),
        (["--grid", "affine", "--export", "awq:x.safetensors"], "a folder"),
        (["--grid", "affine", "--bits_for", ".*up_proj=3", "--export", "gptq_v2"], "several widths"),
        (["--wbits", "16", "--export", "awq:a"], "--export is for quantized models"),
    ],
)
def test_llama_refuses_an_export_before_it_quantizes(tiny_model, text_file, tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.setattr(llama, "quantize_model", None)
    save = [] if "16" in flags else ["--save_path", str(tmp_path / "q")]
    wbits = [] if "--wbits" in flags else ["--wbits", "4"]
    command = [str(tiny_model(**SIZES)), str(text_file), "--seqlen", "32", "--eval", "none" if save else str(text_file)]
    assert llama.main([*command, *wbits, *save, *flags]) == 2
    assert words in capsys.readouterr().err


def test_what_an_unfinished_run_has_done_stays(tiny_model, text_file, tmp_path, monkeypatch, capsys):
    """Of a run that was to make a model where an export is to go now; said before any work."""
    monkeypatch.setattr(llama, "quantize_model", None)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    journal.parent.mkdir()
    journal.write_text("{}\n")
    options = f"--seqlen 32 --eval none --wbits 4 --nearest --overwrite --save_path {tmp_path / 'q'} --export dense:{tmp_path / 'out'}"
    assert llama.main([str(tiny_model(**SIZES)), str(text_file), *options.split()]) == 2
    assert f"{journal.parent} holds what an unfinished run of llama.py has done" in capsys.readouterr().err
    assert journal.read_text() == "{}\n"


@pytest.mark.parametrize("saved, out", [("q.safetensors", "."), ("q.safetensors", "model"), ("q", "link")])
def test_llama_does_not_export_over_its_models(tiny_model, text_file, tmp_path, monkeypatch, capsys, saved, out):
    """Neither over the result nor over the original, by whatever name."""
    monkeypatch.setattr(llama, "quantize_model", None)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model(**SIZES), tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "q")
    options = f"--seqlen 32 --eval none --wbits 4 --nearest --overwrite --save_path {saved} --export dense:{out}"
    assert llama.main(["model", str(text_file), *options.split()]) == 2
    assert "holds the model that is to be exported" in capsys.readouterr().err and (tmp_path / "model" / "model.safetensors").is_file()


def test_mixtures_of_experts_are_exported_where_the_original_names_each_expert(text_file, tmp_path, capsys):
    base = write_model(test_moe.CONFIGS["qwen3"](moe_intermediate_size=64, intermediate_size=64), tmp_path / "qwen3")
    command = [str(base), str(text_file), "--nsamples", "2", "--seqlen", "32", "--eval", "none", "--wbits", "4", "--nearest", "--sym"]
    command += ["--save_path", str(tmp_path / "q.safetensors"), "--export"]
    assert llama.main([*command, "awq", "gptq_v2"]) == 2 and "mixtures" in capsys.readouterr().err
    assert llama.main([*command, "awq", "dense"]) == 0
    ours = logits(LeanQuantModelForCausalLM.from_pretrained(base, tmp_path / "q.safetensors", device="cpu"))
    assert torch.equal(logits(LeanQuantModelForCausalLM.from_pretrained(tmp_path / "q-awq", device="cpu")), ours)
    assert "vllm serve" in (tmp_path / "q-awq/README.md").read_text() and "does not read" in (tmp_path / "q-awq/README.md").read_text()
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "q-dense", dtype=torch.float32)
    torch.testing.assert_close(logits(dense), ours, rtol=0, atol=0.01 * ours.abs().max().item())
    command[0] = str(write_model(test_moe.CONFIGS["mixtral"](intermediate_size=64), tmp_path / "mixtral"))
    assert llama.main([*command, f"awq:{tmp_path / 'm'}", "--overwrite"]) == 2
    assert "experts stored in another way" in capsys.readouterr().err


def test_the_script(bases, quantized, tmp_path, capsys):
    file, base = str(quantized()), str(bases["tiny Llama"])
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"perplexity": [{"source": "t", "perplexity": 3.5, "tokens": 10, "seqlen": 5, "other": 1}]}))
    command = [file, "--base", base, "--to", "awq", "--out", str(tmp_path / "out")]
    assert export_cli.main([*command, "--report", str(report)]) == 0
    assert "3.5000 (10 tokens" in (tmp_path / "out/README.md").read_text()
    assert "python scripts/export.py" in (tmp_path / "out/README.md").read_text()
    assert export_cli.main(command) == 2 and "exists" in capsys.readouterr().err
    assert export_cli.main([file, "--to", "awq", "--out", str(tmp_path / "b")]) == 2 and "--base" in capsys.readouterr().err
    assert export_cli.main([*command[:-1], str(tmp_path / "c"), "--report", file]) == 2 and "no perplexities" in capsys.readouterr().err
    again = [str(tmp_path / "out"), "--to", "compressed-tensors", "--out", str(tmp_path / "again")]  # from another's format to the next
    assert export_cli.main(again) == 0
    assert info.main(["info", str(tmp_path / "again")]) == 0
    text = capsys.readouterr().out
    assert "compressed-tensors" in text and "rtn" in text and "4 (" in text


def test_evaluation_reads_what_was_exported(quantized, tiny_model, text_file, tmp_path, capsys):
    base = tiny_model(**SIZES)
    file = compatibility.round_model(base, compatibility.Cell("", "", 4, False, 64), tmp_path / "q.safetensors")
    export(Checkpoint.open(file), base, "awq", tmp_path / "awq")
    rows = []
    for number, command in enumerate((["--leanquant_path", str(file)], ["--leanquant_path", str(tmp_path / "awq")], [])):
        where = str(tmp_path / "awq") if not command else str(base)
        out = tmp_path / f"{number}.json"
        common = ["--base_model_name_or_path", where, "--perplexity", str(text_file), "--seqlen", "64", "--output", str(out)]
        assert eval_quantized.main([*common, *command]) == 0
        rows.append(json.loads(out.read_text())["perplexity"][0]["perplexity"])
    assert rows[0] == rows[1] == rows[2]
    assert llama.main([str(tmp_path / "awq"), str(text_file), "--seqlen", "32", "--eval", "none", "--wbits", "4"]) == 2
    assert "already quantized" in capsys.readouterr().err


# --- hostile folders -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(bases, quantized, nonuniform, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    for name in ("awq", "gptq", "compressed-tensors"):
        symmetric = name == "gptq"
        export(Checkpoint.open(quantized(symmetric=symmetric)), bases["tiny Llama"], name, folder / name)
    export(Checkpoint.open(nonuniform[1]), nonuniform[0], "any-precision", folder / "any-precision")
    return {entry.name: entry for entry in folder.iterdir()}


def damaged(folder: Path, out: Path, change=None, **settings) -> Path:
    """A copy of `folder` after `change(tensors)` and with other entries in its quantization_config."""
    shutil.copytree(folder, out)
    if change:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["anyprec" if "anyprec" in config else "quantization_config"] |= settings
    (out / "config.json").write_text(json.dumps(config))
    return out


def setter(suffix: str, change):
    return lambda tensors: tensors.update({Q + suffix: change(tensors[Q + suffix])})


def scrambled(g_idx: torch.Tensor) -> torch.Tensor:
    return g_idx[torch.randperm(len(g_idx), generator=torch.Generator().manual_seed(0))].contiguous()


DAMAGE = {
    "bit planes are missing": ("any-precision", setter(".qweight", lambda t: t[:2].clone()), {}, r"up_proj.qweight is \[2, 256, 4\]"),
    "levels of another width": ("any-precision", setter(".lut3", lambda t: t[:, :4].clone()), {}, r"up_proj.lut3 is \[256, 4\]"),
    "no table of the width": ("any-precision", None, {"seed_precision": 4, "parent_precision": 4}, r"no tensor model.*\.lut4"),
    "several widths": ("any-precision", None, {"parent_precision": 8}, "'3 to 8' bits: any-precision folders are read here with 4 or 3 or"),
    "NaN in a table": ("any-precision", setter(".lut3", lambda t: t.index_fill(1, torch.tensor([0]), math.nan)), {}, "NaN"),
    "a bit plane alone": ("any-precision", setter(".qweight", lambda t: t[0].clone()), {}, "not of 3 dimensions"),
    "act-order": ("gptq", setter(".g_idx", scrambled), {}, r"up_proj.g_idx does not group.*act-order"),
    "g_idx beyond the groups": ("gptq", setter(".g_idx", lambda t: t + 2**30), {}, "up_proj.g_idx"),
    "g_idx of another length": ("gptq", setter(".g_idx", lambda t: t[:-1].contiguous()), {}, "up_proj.g_idx is"),
    "8 bits": ("gptq", None, {"bits": 8}, "8 bits.*4 or 3 or 2 bits"),
    "bits that are no number": ("awq", None, {"bits": "4"}, "'4' bits"),
    "bits that are not those of the words": ("gptq", None, {"bits": 3}, "qweight is .* want"),
    "another group size": ("awq", None, {"group_size": 32}, "scales is"),
    "no group size": ("awq", None, {"group_size": None}, "group size"),
    "a group size of 0": ("gptq", None, {"group_size": 0}, "group size of 0"),
    "gemv": ("awq", None, {"version": "gemv"}, "gemv"),
    "marlin": ("gptq", None, {"checkpoint_format": "marlin", "format": "marlin"}, "marlin"),
    "settings of their own": ("gptq", None, {"dynamic": {"+:.*": {"bits": 8}}}, "dynamic"),
    "no scheme": ("compressed-tensors", None, {"config_groups": {}}, "config_groups"),
    "schemes that are no schemes": ("compressed-tensors", None, {"config_groups": {"a": 3}}, "config_groups"),
    "floats": ("compressed-tensors", None, {"format": "float-quantized"}, "pack-quantized"),
    "words of another dtype": ("awq", setter(".qweight", lambda t: t.long()), {}, "up_proj.qweight is I64, not I32"),
    "flat words": ("awq", setter(".qweight", lambda t: t.flatten()), {}, "up_proj.qweight is .*not of 2 dimensions"),
    "fewer words": ("compressed-tensors", setter(".weight_packed", lambda t: t[:, :-1].contiguous()), {}, "up_proj.weight_packed is"),
    "scales of fewer groups": ("awq", setter(".scales", lambda t: t[:-1].contiguous()), {}, "up_proj.scales is"),
    "scales with NaN": ("gptq", setter(".scales", lambda t: t * float("nan")), {}, "up_proj.scales holds NaN"),
    "scales beyond float16": (
        "compressed-tensors",
        setter(".weight_scale", lambda t: t.float() * 1e9),
        {},
        "up_proj.weight_scale holds NaN, infinity or more",
    ),
    "no scales": ("awq", lambda tensors: tensors.pop(Q + ".scales"), {}, "no tensor .*up_proj.scales"),
    "no words": ("awq", lambda tensors: tensors.pop(Q + ".qweight"), {}, "no tensor .*up_proj.qweight"),
    "zero points of fewer groups": ("awq", setter(".qzeros", lambda t: t[:-1].contiguous()), {}, "up_proj.qzeros is"),
    "a shape that lies": ("compressed-tensors", setter(".weight_shape", lambda t: t * 2), {}, "up_proj.weight_packed is"),
    "a negative shape": ("compressed-tensors", setter(".weight_shape", lambda t: -t), {}, "up_proj.weight_packed is"),
    "a shape of three": (
        "compressed-tensors",
        setter(".weight_shape", lambda t: torch.cat([t, t[:1]])),
        {},
        "up_proj.weight_shape holds 3",
    ),
    "an unknown tensor": ("awq", lambda tensors: tensors.update({"model.extra": torch.ones(3).half()}), {}, "model.extra"),
    "a linear that the model lacks": (
        "awq",
        lambda tensors: tensors.update({n.replace(Q, "model.x"): t.clone() for n, t in list(tensors.items()) if Q in n}),
        {},
        "model.x",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(exported, tmp_path, kind):
    name, change, settings, message = DAMAGE[kind]
    with pytest.raises(InputError, match=message):
        LeanQuantModelForCausalLM.from_pretrained(
            damaged(exported[name], tmp_path / "x", change, **settings), device="cpu", dequantize="never"
        )


def test_act_order_of_whole_rows_is_read(bases, quantized, tmp_path):
    """One group: the order in which its columns were quantized leaves no trace."""
    export(Checkpoint.open(quantized(symmetric=True, groupsize=-1)), bases["tiny Llama"], "gptq", tmp_path / "a")
    folder = damaged(tmp_path / "a", tmp_path / "b", None, desc_act=True)
    assert torch.equal(
        logits(LeanQuantModelForCausalLM.from_pretrained(folder)), logits(LeanQuantModelForCausalLM.from_pretrained(tmp_path / "a"))
    )


def test_biases_of_zeros_that_the_model_lacks_are_read_over(exported, tmp_path):
    """AutoGPTQ writes one for every linear."""
    folder = damaged(exported["gptq"], tmp_path / "a", lambda tensors: tensors.update({Q + ".bias": torch.zeros(256).half()}))
    assert torch.equal(
        logits(LeanQuantModelForCausalLM.from_pretrained(folder)), logits(LeanQuantModelForCausalLM.from_pretrained(exported["gptq"]))
    )
    folder = damaged(exported["gptq"], tmp_path / "b", lambda tensors: tensors.update({Q + ".bias": torch.ones(256).half()}))
    with pytest.raises(InputError, match="up_proj.bias, which the base model lacks"):
        LeanQuantModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "gptq_model-4bit-64g.safetensors"])
def test_autogptqs_folders_say_it_in_a_file_of_their_own(exported, tmp_path, name):
    shutil.copytree(exported["gptq"], tmp_path / "a")
    config = json.loads((tmp_path / "a/config.json").read_text())
    settings = config.pop("quantization_config")
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    old = {key: settings[key] for key in ("bits", "group_size", "desc_act", "sym")} | {"damp_percent": 0.01, "model_file_base_name": "x"}
    (tmp_path / "a/quantize_config.json").write_text(json.dumps(old))
    (tmp_path / "a/model.safetensors").rename(tmp_path / "a" / name)
    found, same = (LeanQuantModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "a", exported["gptq"]))
    assert torch.equal(logits(found), logits(same))


@pytest.mark.parametrize("name", ["awq", "gptq_v2", "compressed-tensors"])
def test_a_config_that_says_something_else_is_found(bases, quantized, tmp_path, monkeypatch, name):
    kind, real = type(LAYOUTS[name]), type(LAYOUTS[name]).config
    lie = lambda value: 32 if value == 64 else {k: lie(v) for k, v in value.items()} if isinstance(value, dict) else value  # noqa: E731
    monkeypatch.setattr(kind, "config", lambda self, model, version: lie(real(self, model, version)))
    with pytest.raises(RuntimeError, match="config.json does not say"):
        export(Checkpoint.open(quantized()), bases["tiny Llama"], name, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_version_1_wraps_is_zero(bases, quantized, tmp_path):
    """Others write a zero point of 0 as 15 in version 1."""
    export(Checkpoint.open(quantized(symmetric=True)), bases["tiny Llama"], "gptq", tmp_path / "a")
    folder = damaged(tmp_path / "a", tmp_path / "b", setter(".qzeros", lambda t: torch.full_like(t, -1)))
    assert (open_checkpoint(folder).get(Q + ".zero") == 0).all()


@pytest.mark.parametrize("name", ["awq", "gptq", "compressed-tensors", "any-precision"])
def test_200_mutations_are_refused_or_harmless(exported, tmp_path, monkeypatch, name):
    from leanquant import modeling

    shutil.copytree(exported[name], tmp_path / "m")
    data, rng, refused = (exported[name] / "model.safetensors").read_bytes(), random.Random(0), 0
    original = LeanQuantModelForCausalLM.from_pretrained(exported[name], device="cpu", dequantize="never").state_dict()
    config = modeling.AutoConfig.from_pretrained(exported[name])
    monkeypatch.setattr(modeling, "read_config", lambda *_, **__: without_quantization(config))
    for number in range(200):
        (tmp_path / "m/model.safetensors").write_bytes(mutated(data, rng))
        try:
            info.describe(open_checkpoint(tmp_path / "m"))
            state = LeanQuantModelForCausalLM.from_pretrained(tmp_path / "m", device="cpu", dequantize="never").state_dict()
        except InputError as error:
            assert str(error)
            refused += 1
            continue
        for tensor in original:
            assert torch.equal(state[tensor], original[tensor]), (number, tensor)
    assert 80 < refused < 200


def without_quantization(config):
    for field in ("quantization_config", "anyprec"):
        if hasattr(config, field):
            delattr(config, field)
    return config


def test_layouts_take_pieces_of_any_size(monkeypatch):
    """Words are packed and read some rows at a time: the result does not depend on how many."""
    linear = random_linear(3, 64, 96, 1, uniform=True)
    whole = LAYOUTS["gptq_v2"].encode(linear, plan(3))
    monkeypatch.setattr(layouts, "PIECE", 500)
    pieces = LAYOUTS["gptq_v2"].encode(linear, plan(3))
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    assert torch.equal(LAYOUTS["gptq_v2"].decode(whole, 3, 64, 96).codes, linear.codes)


def test_an_export_does_not_take_the_place_of_its_own_model(tiny_model, text_file, tmp_path, monkeypatch, capsys):
    """Even with --overwrite, by whatever name."""
    quantize = ["--wbits", "4", "--nearest", "--nsamples", "2", "--seqlen", "32", "--eval", "none", "--save_path", str(tmp_path / "q")]
    assert llama.main([str(tiny_model()), str(text_file), *quantize]) == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "q").iterdir()}
    (tmp_path / "link").symlink_to(tmp_path / "q")
    monkeypatch.chdir(tmp_path / "q")
    for out in (".", "../link", str(tmp_path / "q")):
        assert export_cli.main([str(tmp_path / "q"), "--to", "dense", "--out", out, "--overwrite"]) == 2
        assert "holds the model that is to be exported" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in (tmp_path / "q").iterdir()} == before

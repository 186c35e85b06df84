"""Proves that exported GGUF files are what llama.cpp reads: blocks against the decoder of its package, whole models in llama.cpp itself,
rows that a converter moves or joins; and that what the format cannot hold, and templates of other models, are refused in words."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig

import export as export_cli
import llama
from compatibility import Cell, round_linear
from conftest import write_model
from leanquant import InputError, LeanQuantModelForCausalLM, ggml
from leanquant.experts import use_model_names
from leanquant.export import split_network
from leanquant.packing import Checkpoint
from llama_cpp import LlamaCpp

SIZES = {"hidden_size": 256, "intermediate_size": 512, "dtype": "float16"}
CASES = {
    "Q4_0": Cell("", "gguf", 4, True, 32),
    "Q4_0, whole rows": Cell("", "gguf", 4, True, -1),
    "Q4_1": Cell("", "gguf", 4, False, 64),
    "Q4_K": Cell("", "gguf", 4, False, -1),
    "Q3_K": Cell("", "gguf", 3, True, -1),
    "Q2_K": Cell("", "gguf", 2, False, -1),
    "Q2_K, groups": Cell("", "gguf", 2, False, 256),
}
TOKENS = torch.arange(20).tolist()


def turned(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of q or k in the order in which llama.cpp's converter puts them, for rotations of neighbours."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def converted(base: Path) -> dict[str, np.ndarray]:
    """The tensors of a tiny Llama under llama.cpp's names, rows as its converter puts them, float32."""
    config = json.loads((base / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        weight, kind = tensor.float().numpy(), name.split(".")[-2]
        tensors[names.get_name(name, (".weight",))] = turned(weight, heads[kind]) if kind in heads else weight
    return tensors


def write_template(base: Path, out: Path, tensors: dict[str, np.ndarray] | None = None, kind=Type.F16, parts: int | None = None) -> Path:
    """As the converter does, with --outtype."""
    config = json.loads((base / "config.json").read_text())
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_array("general.tags", ["one", "two"])
    if parts is not None:
        writer.add_uint16(gguf.Keys.Split.LLM_KV_SPLIT_COUNT, parts)
    for name, tensor in (tensors or converted(base)).items():
        its = kind if tensor.ndim > 1 else Type.F32
        writer.add_tensor(name, gguf.quants.quantize(tensor, its), raw_dtype=its)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def round_all(base: Path, out: Path, cell: Cell, others: dict[str, Cell] | None = None) -> Path:
    """The model in `base` with all linears rounded to nearest, as a file of ours; those that are named in `others` as these say."""
    tensors, bits = {}, {}
    for name, tensor in load_file(base / "model.safetensors").items():
        linear = name.removesuffix(".weight")
        its = next((other for part, other in (others or {}).items() if part in linear), cell if "_proj" in linear else None)
        tensors |= round_linear(tensor, its).named(linear) if its else {name: tensor}
        if its and its.bits != cell.bits:
            bits[linear] = its.bits
    settings = {"method": "rtn", "grid": "minmax", "bits": cell.bits, "bits_for": bits, "packing": "dense"}
    save_file(tensors, out, metadata={"leanquant": json.dumps(settings)})
    return out


@pytest.fixture
def base(tiny_model):
    return tiny_model(**SIZES)


def exported(base: Path, folder: Path, cell: Cell, others=None) -> tuple[Path, Path]:
    quantized = round_all(base, folder / "model.safetensors", cell, others)
    out = folder / "model.gguf"
    ggml.export(Checkpoint.open(quantized), base, write_template(base, folder / "f16.gguf"), out)
    return quantized, out


def tensors_of(file: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


# --- blocks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, bits", [(Type.Q4_0, 4), (Type.Q4_1, 4), (Type.Q4_K, 4), (Type.Q3_K, 3), (Type.Q2_K, 2)])
def test_blocks_decode_to_the_weights_that_were_encoded(kind, bits):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**bits, (5, 1024), np.uint8)
    scale = rng.uniform(0.001, 0.1, (5, 4)).astype(np.float16)
    zero = np.full((5, 4), 2 ** (bits - 1), np.uint8) if kind in (Type.Q4_0, Type.Q3_K) else rng.integers(0, 2**bits, (5, 4), np.uint8)
    wide = lambda part: np.repeat(part, 256, 1).astype(np.float32)  # noqa: E731
    wanted = wide(scale) * (codes - wide(zero))
    found = gguf.quants.dequantize(ggml.encode(kind, codes, scale, zero), kind)
    if kind == Type.Q4_1:
        assert abs(found - wanted).max() <= 0.1 * 15 * 2**-11 and not np.array_equal(found, wanted)
    else:
        assert np.array_equal(found, wanted)


def test_the_smallest_type_that_holds_them_is_taken():
    assert [ggml.type_of(4, columns, symmetric) for columns, symmetric in ((32, True), (256, True), (96, False), (512, False))] == [
        Type.Q4_0,
        Type.Q4_0,
        Type.Q4_1,
        Type.Q4_K,
    ]
    assert ggml.type_of(3, 256, True) == Type.Q3_K and ggml.type_of(2, 768, False) == Type.Q2_K
    refused = [(4, 48, True), (3, 256, False), (3, 128, True), (2, 128, False), (8, 256, True)]
    assert [ggml.type_of(*case) for case in refused] == [None] * len(refused)


# --- whole models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_our_file_holds(base, tmp_path, case):
    quantized, out = exported(base, tmp_path, CASES[case])
    assert {tensor.tensor_type.name for name, tensor in tensors_of(out).items() if "attn_q.w" in name or "ffn_down" in name} == {case[:4]}
    assert tensors_of(out)["token_embd.weight"].tensor_type == tensors_of(out)["output.weight"].tensor_type == Type.Q8_0
    ours = LeanQuantModelForCausalLM.from_pretrained(base, quantized, torch_dtype=torch.float32, device="cpu")
    with torch.no_grad():
        log_p = ours(torch.tensor([TOKENS])).logits[0].log_softmax(-1)
    log_q = LlamaCpp(out).logits(TOKENS).log_softmax(-1)
    assert (log_p.exp() * (log_p - log_q)).sum(-1).mean() < 0.01  # what it reads is rounded to 8 bits


def test_the_file_says_what_it_is_and_keeps_what_the_template_says(base, tmp_path):
    _, out = exported(base, tmp_path, CASES["Q2_K"])
    fields = gguf.GGUFReader(out).fields
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q2_K
    assert fields["general.quantization_version"].contents() == gguf.GGML_QUANT_VERSION
    assert fields["general.tags"].contents() == ["one", "two"] and fields["llama.block_count"].contents() == 2
    assert json.loads(fields["leanquant.settings"].contents())["method"] == "rtn"


def test_tied_embeddings_and_mixed_widths_are_stored_as_they_are(tiny_model, tmp_path):
    base = tiny_model(tied=True, **SIZES)
    others = {"embed_tokens": CASES["Q4_0"], "v_proj": CASES["Q4_1"], "down_proj": CASES["Q3_K"]}
    quantized, out = exported(base, tmp_path, CASES["Q2_K"], others=others)
    names = ("token_embd.weight", "blk.0.attn_v.weight", "blk.1.ffn_down.weight", "blk.1.attn_k.weight")
    assert [tensors_of(out)[name].tensor_type.name for name in names] == ["Q4_0", "Q4_1", "Q3_K", "Q2_K"]
    ours = LeanQuantModelForCausalLM.from_pretrained(base, quantized, torch_dtype=torch.float32, device="cpu")
    with torch.no_grad():
        log_p = ours(torch.tensor([TOKENS])).logits[0].log_softmax(-1)
    log_q = LlamaCpp(out).logits(TOKENS).log_softmax(-1)
    assert (log_p.exp() * (log_p - log_q)).sum(-1).mean() < 0.01


def test_a_head_that_was_moved_goes_along(base, tmp_path):
    quantized = round_all(base, tmp_path / "model.safetensors", CASES["Q4_0"])
    tensors = load_file(quantized)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(0) * 2
    save_file(tensors, quantized, metadata={"leanquant": json.dumps({"bits": 4, "packing": "dense"})})
    ggml.export(Checkpoint.open(quantized), base, write_template(base, tmp_path / "f16.gguf"), tmp_path / "out.gguf")
    head = tensors_of(tmp_path / "out.gguf")["output.weight"]
    found = gguf.quants.dequantize(head.data, head.tensor_type)
    wanted = tensors["lm_head.weight"].float().numpy()
    assert abs(found - wanted).max() <= abs(wanted).max() / 225  # 8 bits


def test_linears_that_a_converter_joins_become_one_tensor(base, tmp_path):
    """As it does with q, k and v of some families, and with experts, in three dimensions."""
    tensors = converted(base)
    joined = [tensors.pop(f"blk.0.attn_{part}.weight") for part in "qkv"]
    experts = np.stack([tensors.pop("blk.0.ffn_gate.weight"), tensors.pop("blk.0.ffn_up.weight")])
    tensors |= {"blk.0.attn_qkv.weight": np.concatenate(joined), "blk.0.ffn_gate_exps.weight": experts}
    quantized = round_all(base, tmp_path / "model.safetensors", CASES["Q4_1"])
    template = write_template(base, tmp_path / "f16.gguf", tensors)
    ggml.export(Checkpoint.open(quantized), base, template, tmp_path / "out.gguf")
    written, checkpoint = tensors_of(tmp_path / "out.gguf"), Checkpoint.open(quantized)
    assert written["blk.0.ffn_gate_exps.weight"].shape.tolist() == [256, 512, 2]
    decoded = lambda name: gguf.quants.dequantize(written[name].data, Type.Q4_1)  # noqa: E731
    rebuilt = lambda linear, rows: checkpoint.packed(linear, rows, 256).dequantize(4, 256, torch.float32).numpy()  # noqa: E731
    layer = "model.layers.0."
    wanted = np.stack([rebuilt(f"{layer}mlp.{part}_proj", 512) for part in ("gate", "up")])
    assert abs(decoded("blk.0.ffn_gate_exps.weight") - wanted).max() < 1e-3
    q, k, v = (rebuilt(f"{layer}self_attn.{part}_proj", rows) for part, rows in (("q", 256), ("k", 128), ("v", 128)))
    assert abs(decoded("blk.0.attn_qkv.weight") - np.concatenate([turned(q, 4), turned(k, 2), v])).max() < 1e-3


def test_rows_that_stand_several_times_are_taken_from_the_right_place(base, tmp_path):
    """Rows of zeros, and layers that are the same: their codes may differ all the same."""
    folder = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "v_proj" in name or "o_proj" in name:
            tensors[name][:3] = 0
    tensors |= {name.replace("layers.0.", "layers.1."): t.clone() for name, t in tensors.items() if "layers.0." in name}
    save_file(tensors, folder / "model.safetensors")
    quantized = round_all(folder, tmp_path / "model.safetensors", CASES["Q4_0"])
    stored = load_file(quantized)
    stored["model.layers.1.self_attn.o_proj.weight_codes"][1] = 0x99
    stored["model.layers.1.mlp.up_proj.scale"] *= 2
    save_file(stored, quantized, metadata={"leanquant": json.dumps({"bits": 4, "packing": "dense"})})
    checkpoint = Checkpoint.open(quantized)
    ggml.export(checkpoint, folder, write_template(folder, tmp_path / "f16.gguf"), tmp_path / "out.gguf")
    written = tensors_of(tmp_path / "out.gguf")
    for layer, part, name, rows in (
        (1, "attn_output", "self_attn.o_proj", 256),
        (1, "ffn_up", "mlp.up_proj", 512),
        (0, "ffn_up", "mlp.up_proj", 512),
    ):
        wanted = checkpoint.packed(f"model.layers.{layer}.{name}", rows, 256).dequantize(4, 256, torch.float32).numpy()
        assert np.array_equal(gguf.quants.dequantize(written[f"blk.{layer}.{part}.weight"].data, Type.Q4_0), wanted)


def test_vocabularies_may_have_rows_of_any_size(base, tmp_path):
    """Padding, tokens that nothing was learned for: what float16 scales of 8 bits can hold of them, and be verified."""
    folder = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    for row, size in enumerate((0, 1e-2, 1e-4, 1e-6)):
        tensors["model.embed_tokens.weight"][row] *= size
    save_file(tensors, folder / "model.safetensors")
    quantized = round_all(folder, tmp_path / "model.safetensors", CASES["Q4_0"])
    ggml.export(Checkpoint.open(quantized), folder, write_template(folder, tmp_path / "f16.gguf"), tmp_path / "out.gguf")


@pytest.mark.parametrize(
    "stored, outtype", [("bfloat16", Type.BF16), ("bfloat16", Type.F16), ("float16", Type.BF16), ("float16", Type.F32)]
)
def test_templates_may_have_another_type_than_the_original(tiny_model, tmp_path, stored, outtype):
    base = tiny_model(**SIZES | {"dtype": stored})
    quantized = round_all(base, tmp_path / "model.safetensors", CASES["Q4_0"])
    ggml.export(Checkpoint.open(quantized), base, write_template(base, tmp_path / "other.gguf", kind=outtype), tmp_path / "out.gguf")
    assert tensors_of(tmp_path / "out.gguf")["blk.1.attn_q.weight"].tensor_type == Type.Q4_0


def test_experts_stored_as_one_tensor_are_exported(tmp_path):
    """Fused in the original and in the template, one by one in our file."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_local_experts=2, **heads)
    base = write_model(config, tmp_path / "base", "float16")
    original = Checkpoint.open(base)
    use_model_names(original, network := split_network(base))
    linears = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear) and "layers" in name]
    tensors, template = {}, {}
    for name in original.shapes:
        linear = name.removesuffix(".weight")
        tensors |= round_linear(original.get(name), CASES["Q4_0"]).named(linear) if linear in linears else {name: original.get(name)}
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        experts = [original.get(f"{linear}.weight").float().numpy() for linear in linears if linear.endswith(leaf)]
        template[f"blk.0.ffn_{leaf[:-5]}_exps.weight"] = np.stack(experts)
    for linear in (linear for linear in linears if "self_attn" in linear):
        template[f"blk.0.{linear.rsplit('.')[-1]}.weight"] = original.get(f"{linear}.weight").float().numpy()
    for name, linear in ((ggml.EMBEDDINGS, "model.embed_tokens"), (ggml.HEAD, "lm_head")):
        template[name] = original.get(f"{linear}.weight").float().numpy()
    save_file(tensors, quantized := tmp_path / "m.safetensors", metadata={"leanquant": json.dumps({"bits": 4, "packing": "dense"})})
    ggml.export(Checkpoint.open(quantized), base, write_template(base, tmp_path / "f16.gguf", template), tmp_path / "out.gguf")
    up = tensors_of(tmp_path / "out.gguf")["blk.0.ffn_up_exps.weight"]
    assert up.tensor_type == Type.Q4_0 and up.shape.tolist() == [64, 96, 2]


# --- the command, and what is refused --------------------------------------------------------------------------


def test_the_command_writes_a_file_and_says_what_is_in_it(base, tmp_path, capsys):
    quantized, template = round_all(base, tmp_path / "m.safetensors", CASES["Q4_0"]), write_template(base, tmp_path / "f16.gguf")
    command = [str(quantized), "--base", str(base), "--to", "gguf", "--template", str(template), "--out", str(tmp_path / "out.gguf")]
    assert export_cli.main(command) == 0
    assert "14 tensors in Q4_0, 2 tensors in Q8_0, every weight read back and compared" in capsys.readouterr().out
    assert export_cli.main(command) == 2 and "--overwrite" in capsys.readouterr().err
    assert export_cli.main([*command, "--overwrite"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f16.gguf", "m.safetensors", "out.gguf"]


@pytest.mark.parametrize(
    "change, error",
    [
        ({"--to": "awq", "--out": "folder"}, "--template is for --to gguf"),
        ({"--template": None}, "--to gguf needs the unquantized model"),
        ({"--base": None}, "--to gguf needs the unquantized model"),
        ({"--out": "folder"}, "ends in .gguf"),
        ({"--out": "f16.gguf", "--overwrite": ""}, "which is the template"),
        ({"--template": "m.safetensors"}, "no GGUF file"),
        ({"--template": "missing.gguf"}, "no GGUF file"),
        ({"--report": "report.json"}, "are for exported folders"),
        ({"--to": "dense", "--template": None, "--out": "f16.gguf", "--overwrite": ""}, "a GGUF file is not what is written"),
    ],
)
def test_commands_that_cannot_be_meant_are_refused(base, tmp_path, monkeypatch, capsys, change, error):
    monkeypatch.chdir(tmp_path)
    round_all(base, tmp_path / "m.safetensors", CASES["Q4_0"]), write_template(base, tmp_path / "f16.gguf")
    flags = {"--base": str(base), "--to": "gguf", "--template": "f16.gguf", "--out": "out.gguf"} | change
    words = [word for flag, value in flags.items() if value is not None for word in (flag, value) if word]
    assert export_cli.main(["m.safetensors", *words]) == 2
    assert error in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f16.gguf", "m.safetensors"]


def test_other_commands_do_not_write_such_files(base, tmp_path, text_file, capsys):
    """Neither a folder of that name, after hours, nor over one that is there."""
    (tmp_path / "x.gguf").write_text("precious")
    command = [str(base), str(text_file), "--wbits", "4", "--overwrite", "--eval", "none", "--seqlen", "32"]
    assert llama.main([*command, "--save_path", str(tmp_path / "x.gguf")]) == 2
    assert "a GGUF file is not what is written: those are scripts/export.py --to gguf's" in capsys.readouterr().err
    assert llama.main([*command, "--save_path", str(tmp_path / "q"), "--export", "gguf"]) == 2
    assert "GGUF files are written by scripts/export.py, afterwards" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def refusal(base: Path, folder: Path, cell: Cell = CASES["Q4_0"], template: Path | None = None, others=None) -> str:
    quantized = round_all(base, folder / "m.safetensors", cell, others)
    with pytest.raises(InputError) as error:
        ggml.export(Checkpoint.open(quantized), base, template or write_template(base, folder / "f16.gguf"), folder / "out.gguf")
    assert not (folder / "out.gguf").exists() and not list(folder.glob("*.partial"))
    return str(error.value)


@pytest.mark.parametrize(
    "bits, symmetric, groupsize, remedy", [(4, True, 16, "--groupsize 32"), (3, False, -1, "--sym"), (2, False, 64, "without --groupsize")]
)
def test_scales_that_no_type_holds_are_refused_with_what_would_be_held(base, tmp_path, bits, symmetric, groupsize, remedy):
    message = refusal(base, tmp_path, Cell("", "gguf", bits, symmetric, groupsize))
    assert f"gguf cannot hold {bits} bits" in message and remedy in message


def test_free_levels_are_refused(base, tmp_path):
    quantized = tmp_path / "m.safetensors"
    tensors = load_file(round_all(base, quantized, CASES["Q4_0"]))
    linear = "model.layers.0.mlp.up_proj"
    scale, zero = tensors.pop(f"{linear}.scale"), tensors.pop(f"{linear}.zero")
    tensors[f"{linear}.quant_grid"] = (scale[:, :1] * (torch.arange(16) - zero[:, :1].float())).half()
    save_file(tensors, quantized, metadata={"leanquant": json.dumps({"bits": 4, "packing": "dense"})})
    with pytest.raises(InputError, match=r"free levels .*up_proj.*--grid affine"):
        ggml.export(Checkpoint.open(quantized), base, write_template(base, tmp_path / "f16.gguf"), tmp_path / "out.gguf")


def test_templates_of_another_model_are_refused(base, tiny_model, tmp_path):
    other = converted(base)
    other["blk.1.attn_k.weight"] = -other["blk.1.attn_k.weight"]
    message = refusal(base, tmp_path, template=write_template(base, tmp_path / "other.gguf", other))
    assert "no tensor with the rows of model.layers.1.self_attn.k_proj.weight" in message
    embeddings = converted(base)
    embeddings["token_embd.weight"] = embeddings["token_embd.weight"][::-1] * 2
    message = refusal(base, tmp_path, template=write_template(base, tmp_path / "embeddings.gguf", embeddings))
    assert "no tensor with the rows of model.embed_tokens.weight" in message
    for change in ({}, {"output.weight": converted(base)["output.weight"] * 2}):
        head = converted(base)
        del head["output.weight"]
        message = refusal(base, tmp_path, template=write_template(base, tmp_path / "head.gguf", head | change))
        assert "no tensor with the rows of lm_head.weight" in message
    partly = converted(base)
    rest = partly.pop("blk.0.attn_output.weight")
    partly |= {"blk.0.attn_output.weight": rest[:100], "blk.0.rest.weight": np.ascontiguousarray(rest[100:].T)}
    message = refusal(base, tmp_path, template=write_template(base, tmp_path / "partly.gguf", partly))
    assert "no tensor with the rows of model.layers.0.self_attn.o_proj.weight" in message


def test_templates_that_are_quantized_or_split_are_refused(base, tmp_path):
    quantized = converted(base)
    writer = gguf.GGUFWriter(file := tmp_path / "q8.gguf", "llama")
    for name, tensor in quantized.items():
        writer.add_tensor(name, gguf.quants.quantize(tensor, Type.Q8_0), raw_dtype=Type.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "is in Q8_0: make it with convert_hf_to_gguf.py --outtype f16" in refusal(base, tmp_path, template=file)
    split = write_template(base, tmp_path / "split.gguf", parts=3)
    assert "llama-gguf-split --merge" in refusal(base, tmp_path, template=split)
    quantized, joined = round_all(base, tmp_path / "m.safetensors", CASES["Q4_0"]), write_template(base, tmp_path / "joined.gguf", parts=0)
    ggml.export(Checkpoint.open(quantized), base, joined, tmp_path / "out.gguf")
    assert not any(name.startswith("split.") for name in gguf.GGUFReader(tmp_path / "out.gguf").fields)


def test_linears_of_one_tensor_must_be_quantized_alike(base, tmp_path):
    tensors = converted(base)
    joined = [tensors.pop(f"blk.0.attn_{part}.weight") for part in "qkv"]
    template = write_template(base, tmp_path / "joined.gguf", tensors | {"blk.0.attn_qkv.weight": np.concatenate(joined)})
    message = refusal(base, tmp_path, CASES["Q4_0"], template, {"layers.0.self_attn.k_proj": CASES["Q2_K"]})
    assert "blk.0.attn_qkv.weight of the template holds linears of several widths" in message
    quantized = tmp_path / "m.safetensors"
    tensors, linear = load_file(round_all(base, quantized, CASES["Q4_0"])), "model.layers.0.self_attn.v_proj"
    for suffix in (".weight_codes", ".scale", ".zero"):
        del tensors[linear + suffix]
    tensors[f"{linear}.weight"] = load_file(base / "model.safetensors")[f"{linear}.weight"]
    save_file(tensors, quantized, metadata={"leanquant": json.dumps({"bits": 4, "packing": "dense"})})
    with pytest.raises(InputError, match="v_proj, which is not quantized: quantize both or neither"):
        ggml.export(Checkpoint.open(quantized), base, template, tmp_path / "out.gguf")
    ggml.export(Checkpoint.open(quantized), base, write_template(base, tmp_path / "apart.gguf"), tmp_path / "out.gguf")
    assert tensors_of(tmp_path / "out.gguf")["blk.0.attn_v.weight"].tensor_type == Type.F16


def test_another_base_is_refused(base, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, other / "model.safetensors")
    quantized = round_all(base, tmp_path / "m.safetensors", CASES["Q4_0"])
    with pytest.raises(InputError, match="model.norm.weight is not what the original has"):
        ggml.export(Checkpoint.open(quantized), other, write_template(base, tmp_path / "f16.gguf"), tmp_path / "out.gguf")


def test_verification_finds_a_weight_that_is_another(base, tmp_path):
    """It is not the encoder's own inverse, and no tensor is left out."""
    quantized, out = exported(base, tmp_path, CASES["Q4_0"])
    checkpoint, template = Checkpoint.open(quantized), gguf.GGUFReader(tmp_path / "f16.gguf")
    sources = ggml.sources_of(checkpoint, base, template)
    ggml.verify(gguf.GGUFReader(out), checkpoint, template, sources)
    for tensor in gguf.GGUFReader(out).tensors:
        broken = shutil.copy(out, tmp_path / "broken.gguf")
        with open(broken, "r+b") as file:
            file.seek(tensor.data_offset + int(tensor.n_bytes) - 1)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 0x55]))
        with pytest.raises(RuntimeError, match=tensor.name):
            ggml.verify(gguf.GGUFReader(broken), checkpoint, template, sources)

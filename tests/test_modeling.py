"""LeanQuantModelForCausalLM reads the published files exactly, and ours, packed or rebuilt; what it loads generates."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config, Gemma3Config, LlamaConfig, MixtralConfig, Qwen3MoeConfig

import datautils
import eval_quantized
import llama
import modelutils
from conftest import SIZES
from leanquant import InputError, LeanQuantModelForCausalLM, lut_cpu, modeling
from leanquant.linear import QuantizedLinear, free_host_bytes, replace_modules
from leanquant.packing import Checkpoint

FIXTURES = Path(__file__).with_name("fixtures")


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def quantized_file(model: Path, text: Path, out: Path, *flags: str) -> Path:
    command = [str(model), str(text), "--nsamples", "4", "--seqlen", "64", "--eval", "none", "--save_path", str(out), *flags]
    assert llama.main(command) == 0
    return out


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("dequantize", ["always", "never"])
def test_published_files_give_the_published_logits(bits, dequantize):
    expected = load_file(FIXTURES / f"llama_{bits}bit_expected.safetensors")
    model = LeanQuantModelForCausalLM.from_pretrained(
        FIXTURES / "llama_base", FIXTURES / f"llama_{bits}bit.safetensors", bits=bits, torch_dtype=torch.float32, dequantize=dequantize
    )
    torch.testing.assert_close(logits(model, expected["test_ids"]), expected["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("bits", [4, 2])
def test_published_files_stream_to_the_published_logits(bits):
    expected = load_file(FIXTURES / f"llama_{bits}bit_expected.safetensors")
    checkpoint = Checkpoint.open(FIXTURES / f"llama_{bits}bit.safetensors")
    model = modelutils.StreamedModel(FIXTURES / "llama_base", checkpoint, torch.float32, torch.device("cpu"))
    stream = model.embed(expected["test_ids"], 1)
    for index in range(len(model.layers)):
        with model.layer(index):
            model.advance(index, stream)
    with model.head() as head:
        torch.testing.assert_close(head(stream.hidden), expected["logits"], atol=1e-4, rtol=0)


def test_the_published_recipe_writes_what_the_published_code_wrote(tmp_path, monkeypatch):
    """From the same model, tokens and settings. Not at 4 bits, where the published code draws the start of its grids at random."""
    ids = load_file(FIXTURES / "llama_base" / "io.safetensors")["calibration_ids"]
    monkeypatch.setattr(datautils, "calibration_windows", lambda *_: ids)
    monkeypatch.setattr(datautils, "tokenizing_bytes", lambda *_: 0)
    monkeypatch.setattr(modelutils, "load_tokenizer", lambda _: None)
    text = tmp_path / "unread.txt"
    text.write_text("unread")
    flags = ["--wbits", "2", "--exponent", "4", "--recipe", "published", "--percdamp", "0.1", "--act-order", "--true-sequential"]
    ours = Checkpoint.open(quantized_file(FIXTURES / "llama_base", text, tmp_path / "q.safetensors", *flags))
    theirs = Checkpoint.open(FIXTURES / "llama_2bit.safetensors")
    assert len(ours.quantized) == 14 and set(ours.quantized) == set(theirs.quantized)
    for linear in theirs.quantized:
        O, I = theirs.shapes[f"{linear}.quant_grid"][0], 2 * theirs.shapes[f"{linear}.weight_codes"][1]
        found, expected = (file.weight(f"{linear}.weight", (O, I), torch.float32) for file in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)


METHODS = [("--exponent", "4"), ("--grid", "affine"), ("--grid", "minmax", "--groupsize", "32"), ("--exponent", "4", "--packing", "nibble")]


@pytest.mark.parametrize("bits", ["4", "3", "2"])
@pytest.mark.parametrize("flags", METHODS)
def test_packed_and_rebuilt_models_agree(tiny_model, text_file, tmp_path, bits, flags):
    base = tiny_model(tied=True)
    out = quantized_file(base, text_file, tmp_path / "q.safetensors", "--wbits", bits, *flags)
    packed = LeanQuantModelForCausalLM.from_pretrained(base, out, dequantize="never")
    rebuilt = LeanQuantModelForCausalLM.from_pretrained(base, out, bits=int(bits), dequantize="always")
    by_itself = LeanQuantModelForCausalLM.from_pretrained(base, out)
    looked_up = lut_cpu.can_multiply(Checkpoint.open(out).packed("model.layers.0.self_attn.q_proj", 64, 64), 64)
    forms = ("looked_up", "dense", "looked_up") if looked_up else ("packed", "dense", "dense")
    for model, form in zip((packed, rebuilt, by_itself), forms, strict=True):
        assert [m.form for m in model.modules() if isinstance(m, QuantizedLinear)] == 14 * [form]
    ids = torch.arange(40).view(1, -1) + 5
    for model in (packed, by_itself):
        torch.testing.assert_close(logits(model, ids), logits(rebuilt, ids), atol=1e-5, rtol=1e-5)


def test_folder_of_ours_needs_no_base_and_keeps_the_tokenizer(tiny_model, text_file, tmp_path):
    out = quantized_file(tiny_model(), text_file, tmp_path / "folder", "--wbits", "3", "--exponent", "4")
    ids = torch.arange(30).view(1, -1) + 5
    with_base = logits(LeanQuantModelForCausalLM.from_pretrained(tiny_model(), out), ids)
    torch.testing.assert_close(logits(LeanQuantModelForCausalLM.from_pretrained(out), ids), with_base, atol=0, rtol=0)
    assert AutoTokenizer.from_pretrained(out)("river")["input_ids"]


def test_generates_the_same_text_twice(tiny_model, text_file, tmp_path):
    out = quantized_file(tiny_model(), text_file, tmp_path / "q.safetensors", "--wbits", "4", "--exponent", "4")
    model = LeanQuantModelForCausalLM.from_pretrained(tiny_model(), out)
    ids = torch.tensor([[5, 6, 7]])
    texts = [model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False) for _ in range(2)]
    assert texts[0].shape == (1, 11)
    assert torch.equal(*texts)


def test_wrong_bits_say_what_the_file_holds():
    with pytest.raises(InputError, match=r"\[4\] bits, not 3"):
        LeanQuantModelForCausalLM.from_pretrained(FIXTURES / "llama_base", FIXTURES / "llama_4bit.safetensors", bits=3)


def test_wrong_base_model_is_named(tiny_model):
    with pytest.raises(InputError, match="base model|config"):
        LeanQuantModelForCausalLM.from_pretrained(tiny_model(), FIXTURES / "llama_4bit.safetensors")


def test_plain_model_is_refused_with_a_remedy(tiny_model):
    with pytest.raises(InputError, match="AutoModelForCausalLM"):
        LeanQuantModelForCausalLM.from_pretrained(tiny_model(), tiny_model() / "model.safetensors")


def test_a_single_file_as_the_base_is_refused_unread(monkeypatch):
    monkeypatch.setattr(modeling.AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("it is read as a config"))
    file = FIXTURES / "llama_4bit.safetensors"
    for arguments in ([file], [file, file]):
        with pytest.raises(InputError, match="llama_4bit.safetensors is a single file, .*: name the unquantized model first"):
            LeanQuantModelForCausalLM.from_pretrained(*arguments)


def test_eval_quantized_refuses_wrong_bits(tiny_model, text_file, capsys):
    arguments = ["--base_model_name_or_path", str(FIXTURES / "llama_base"), "--leanquant_path", str(FIXTURES / "llama_4bit.safetensors")]
    assert eval_quantized.main([*arguments, "--bits", "2", "--perplexity", str(text_file)]) == 2
    assert "holds [4] bits, not 2" in capsys.readouterr().err


MEASURE = """
import sys, torch
from leanquant import LeanQuantModelForCausalLM
from llama import peak_host_bytes
load = lambda base, path: LeanQuantModelForCausalLM.from_pretrained(base, path, dequantize="never", torch_dtype=torch.float16)
load(sys.argv[1], sys.argv[2])
before = peak_host_bytes()
model = load(sys.argv[3], sys.argv[4])
print(peak_host_bytes() - before)
"""


def test_loading_takes_little_more_memory_than_the_file(tmp_path):
    """Peak host memory over what the libraries take: less than 1.2 times the file."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 20000, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = LlamaConfig(num_hidden_layers=4, **sizes)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = {}
    for name, parameter in model.named_parameters():
        linear = name.removesuffix(".weight")
        if ".layers." in name and parameter.ndim == 2:
            tensors[f"{linear}.weight_codes"] = torch.randint(256, (parameter.shape[0], parameter.shape[1] // 2), dtype=torch.uint8)
            tensors[f"{linear}.quant_grid"] = torch.randn(parameter.shape[0], 16).half()
        else:
            tensors[name] = torch.randn(parameter.shape).half()
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    command = [
        sys.executable,
        "-c",
        MEASURE,
        str(FIXTURES / "llama_base"),
        str(FIXTURES / "llama_4bit.safetensors"),
        str(tmp_path),
        str(file),
    ]
    ran = subprocess.run(command, cwd=Path(llama.__file__).parent, check=True, capture_output=True, text=True)
    assert int(ran.stdout) < 1.2 * file.stat().st_size


def test_weights_that_do_not_fit_stay_packed(tiny_model, text_file, tmp_path, monkeypatch):
    out = quantized_file(tiny_model(), text_file, tmp_path / "q.safetensors", "--wbits", "4", "--exponent", "4")
    monkeypatch.setattr("leanquant.linear.free_host_bytes", lambda: 1000.0)
    monkeypatch.setenv("LEANQUANT_KERNELS", "torch")  # what can be looked up need not fit
    with pytest.warns(UserWarning, match="do not fit: they stay packed"):
        model = LeanQuantModelForCausalLM.from_pretrained(tiny_model(), out)
    assert {m.form for m in model.modules() if isinstance(m, QuantizedLinear)} == {"packed"}


@pytest.mark.parametrize("names", [("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")])
def test_a_container_may_have_less_memory_than_its_host(tmp_path, names):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 4000 kB\nMemAvailable:  3000 kB\n")
    assert free_host_bytes(tmp_path) == 3000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    (group / "memory").mkdir(parents=True)
    for name, text in zip(names, ("1000000", "700000"), strict=True):
        (group / name).write_text(text + "\n")
    (group / names[0]).with_name("memory.stat").write_text("anon 500000\nactive_file 50000\ninactive_file 150000\n")
    assert free_host_bytes(tmp_path) == 500000, "its file cache can be had"
    (group / names[0]).write_text("max\n")
    assert free_host_bytes(tmp_path) == 3000 * 1024
    assert free_host_bytes(tmp_path / "nothing") == float("inf")


def placement(model: torch.nn.Module, kind: str, max_memory: dict) -> dict[str, set]:
    """Decoder layer -> where its parts would lie on a machine with the GPUs that `max_memory` names."""
    devices = modeling._device_map(model, None, kind, max_memory, on_cpu=False)
    return {
        f"model.layers.{index}": {modeling._device_of(f"model.layers.{index}.{name}", devices) for name, _ in layer.named_parameters()}
        for index, layer in enumerate(model.model.layers)
    }


@pytest.fixture
def unfilled(tiny_model, text_file, tmp_path):
    """A quantized model of six layers with shapes alone, the bytes of one layer and of all."""
    folder = tiny_model(num_hidden_layers=6, vocab_size=300)
    checkpoint = Checkpoint.open(quantized_file(folder, text_file, tmp_path / "q.safetensors", "--wbits", "4", "--grid", "affine"))
    model = modeling.build_model(modeling.read_config(folder, False), torch.float16, False)
    replace_modules(model, checkpoint)
    layer, whole = (sum(t.numel() * t.element_size() for t in part.state_dict().values()) for part in (model.model.layers[0], model))
    return model, layer, whole


@pytest.mark.parametrize("kind", ["auto", "sequential"])
def test_layers_are_spread_whole_over_several_gpus(unfilled, kind):
    """What packed weights take decides, no layer is split, and nothing stays on the host."""
    model, layer, whole = unfilled
    room = int(0.8 * whole)  # each keeps some for a layer that might have to visit it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = placement(model, kind, {0: room, 1: room, "cpu": 10**9})
    assert all(len(where) == 1 for where in found.values())
    assert set().union(*found.values()) == {0, 1}
    order = [where.pop() for where in found.values()]
    assert order == sorted(order)  # hidden states cross over once


def test_what_fits_no_gpu_is_said_and_stays_on_the_host(unfilled):
    model, layer, whole = unfilled
    with pytest.warns(UserWarning, match=r"[0-9.]+ GB of the model do not fit the GPUs and stay in host memory"):
        found = placement(model, "sequential", {0: whole - 2 * layer, "cpu": 10**9})
    assert set().union(*found.values()) == {0, "cpu"}
    with pytest.raises(InputError, match="raise max_memory"):
        placement(model, "sequential", {0: whole - 2 * layer, "cpu": layer})


@pytest.mark.parametrize(("dequantize", "dtype"), [("always", torch.float16), ("always", torch.float32), ("never", torch.float16)])
def test_what_will_be_held_is_what_is_spread(tiny_model, text_file, tmp_path, monkeypatch, dequantize, dtype):
    """Rebuilt weights too: a map made for packed ones would overfill the GPUs."""
    out = quantized_file(tiny_model(), text_file, tmp_path / "q.safetensors", "--wbits", "4", "--exponent", "4")
    held = lambda model: sum(t.nbytes for t in (*model.parameters(), *model.buffers()))  # noqa: E731
    spread, sizes = modeling._device_map, []
    monkeypatch.setattr(modeling, "_device_map", lambda model, *rest: sizes.append(held(model)) or spread(model, *rest))
    model = LeanQuantModelForCausalLM.from_pretrained(tiny_model(), out, device="cpu", dtype=dtype, dequantize=dequantize)
    assert sizes == [held(model)]


def test_rebuilt_weights_take_the_second_gpu(unfilled):
    model, layer, whole = unfilled
    room = {0: 2 * whole, 1: 2 * whole, "cpu": 10**9}
    assert set().union(*placement(model, "sequential", room).values()) == {0}
    modeling._reserve_dense(model, torch.float16)
    assert set().union(*placement(model, "sequential", room).values()) == {0, 1}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fused_kernels_give_the_published_logits(bits, dtype):
    expected = load_file(FIXTURES / f"llama_{bits}bit_expected.safetensors")
    model = LeanQuantModelForCausalLM.from_pretrained(
        FIXTURES / "llama_base", FIXTURES / f"llama_{bits}bit.safetensors", torch_dtype=dtype, device="cuda"
    )
    assert {m.form for m in model.modules() if isinstance(m, QuantizedLinear)} == {"tiles"}
    found = logits(model, expected["test_ids"].cuda()).float().cpu()
    assert (found - expected["logits"]).norm() <= (5e-3 if dtype == torch.float16 else 3e-2) * expected["logits"].norm()
    out = model.generate(expected["test_ids"][:1, :8].cuda(), max_new_tokens=8, do_sample=False, cache_implementation="static")
    assert out.shape == (1, 16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_what_does_not_fit_the_gpu_stays_on_the_host():
    expected = load_file(FIXTURES / "llama_4bit_expected.safetensors")
    with pytest.warns(UserWarning, match="do not fit the GPUs"):
        model = LeanQuantModelForCausalLM.from_pretrained(
            FIXTURES / "llama_base",
            FIXTURES / "llama_4bit.safetensors",
            torch_dtype=torch.float32,
            max_memory={0: 240_000, "cpu": "1GB"},  # the embedding and one of the two layers
        )
    assert {name: model.hf_device_map[name] for name in ("model.embed_tokens", "lm_head")} == {"model.embed_tokens": 0, "lm_head": "cpu"}
    found = logits(model, expected["test_ids"].cuda()).cpu()
    torch.testing.assert_close(found, expected["logits"], atol=1e-3, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dequantize", ["always", "never"])
def test_published_file_on_a_gpu(dequantize):
    expected = load_file(FIXTURES / "llama_4bit_expected.safetensors")
    model = LeanQuantModelForCausalLM.from_pretrained(
        FIXTURES / "llama_base", FIXTURES / "llama_4bit.safetensors", torch_dtype=torch.float32, device="cuda", dequantize=dequantize
    )
    torch.testing.assert_close(logits(model, expected["test_ids"].cuda()).cpu(), expected["logits"], atol=1e-3, rtol=0)


@pytest.fixture
def plain_folder(tiny_model, text_file, tmp_path) -> Path:
    return quantized_file(tiny_model(), text_file, tmp_path / "q", "--wbits", "4", "--nearest")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"torch_dtype": "float16"}, torch.float16),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": torch.float16}, torch.float16),
        ({"torch_dtype": "auto"}, torch.float32),
        ({"device_map": {"": "cpu"}}, torch.float32),
        ({"device": "auto"}, torch.float32),
        ({"attn_implementation": "eager"}, torch.float32),
    ],
)
def test_dtypes_and_places_by_any_name(plain_folder, options, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = LeanQuantModelForCausalLM.from_pretrained(plain_folder, **options)
    assert model.dtype == expected and model.device.type == "cpu"
    assert options.get("attn_implementation") in (None, model.config._attn_implementation)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "float8"}, "dtype is 'float8': give"),
        ({"torch_dtype": torch.int8}, "give float16, bfloat16, float32 or auto"),
        ({"device_map": {"": "xyz"}}, "unknown device xyz"),
        ({"device_map": {"": "meta"}}, "unknown device"),
        ({"device_map": {"": 99}}, "torch sees"),
        ({"device_map": {"": "cuda:99"}}, "torch sees"),
        ({"device_map": []}, "unknown device"),
        ({"attn_implementation": "nonsense"}, "nonsense"),
    ],
)
def test_dtypes_and_places_that_there_are_not(plain_folder, options, says):
    with pytest.raises(InputError, match=re.escape(says)):
        LeanQuantModelForCausalLM.from_pretrained(plain_folder, **options)


def changed_config(folder: Path, **changes) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))


def test_more_layers_than_tensors_are_refused_at_once(plain_folder):
    changed_config(plain_folder, num_hidden_layers=200_000)
    with pytest.raises(InputError, match="config.json says 200000 layers"):
        LeanQuantModelForCausalLM.from_pretrained(plain_folder)


@pytest.mark.parametrize(
    ("config", "field"), [(MixtralConfig, "num_local_experts"), (Qwen3MoeConfig, "num_experts"), (DeepseekV3Config, "n_routed_experts")]
)
def test_more_experts_than_tensors_are_refused_at_once(plain_folder, config, field):
    config(**(SIZES | {field: 10**7})).save_pretrained(plain_folder)
    with pytest.raises(InputError, match="config.json says 10000000 experts and the file has [0-9]+ tensors: is it"):
        LeanQuantModelForCausalLM.from_pretrained(plain_folder)


def test_experts_in_one_tensor_are_not_too_many(plain_folder):
    checkpoint = Checkpoint.open(plain_folder)
    checkpoint.shapes = {"model.layers.0.mlp.experts.down_proj": (8, 64, 96)}
    modeling.check_counts(MixtralConfig(**(SIZES | {"num_local_experts": 8, "num_hidden_layers": 1})), checkpoint)


@pytest.mark.parametrize("sizes", [{"vocab_size": 10**13}, {"vocab_size": 10**30}, {"intermediate_size": 10**18}])
def test_sizes_beyond_any_memory_are_the_config_s(plain_folder, sizes):
    changed_config(plain_folder, **sizes)
    with pytest.raises(InputError, match="sizes in the base model's config.json do not fit into memory: is it"):
        LeanQuantModelForCausalLM.from_pretrained(plain_folder)


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("attention", ["evil/repo", {"": "evil/repo@main:run"}, ["evil/repo"]])
def test_a_config_brings_no_attention_from_the_hub(plain_folder, monkeypatch, name, attention):
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", lambda *_, **__: pytest.fail("it is loaded"))
    changed_config(plain_folder, **{name: attention})
    assert LeanQuantModelForCausalLM.from_pretrained(plain_folder).config._attn_implementation == "sdpa"
    changed_config(plain_folder, **{name: "eager"})
    assert LeanQuantModelForCausalLM.from_pretrained(plain_folder).config._attn_implementation == "eager"


def test_a_part_of_a_config_brings_no_attention_from_the_hub(tmp_path):
    Gemma3Config().save_pretrained(tmp_path)
    changed_config(tmp_path, text_config={"attn_implementation": "evil/repo"})
    assert modeling.read_config(tmp_path, False).text_config._attn_implementation is None


@pytest.mark.parametrize("apart", [False, True])
def test_a_head_of_its_own_is_kept_though_the_config_ties_it(tiny_model, text_file, tmp_path, apart):
    """As transformers does. A head that is stored and equal is tied."""
    folder = quantized_file(tiny_model(tied=True), text_file, tmp_path / "q", "--wbits", "4", "--nearest")
    tensors = load_file(folder / "model.safetensors")
    metadata = {"leanquant": json.dumps(Checkpoint.open(folder).settings)}
    head = tensors["model.embed_tokens.weight"] * (2 if apart else 1)
    save_file(tensors | {"lm_head.weight": head.clone()}, folder / "model.safetensors", metadata=metadata)
    model = LeanQuantModelForCausalLM.from_pretrained(folder)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is not apart
    assert model.config.tie_word_embeddings is not apart and torch.equal(model.lm_head.weight, head.to(model.dtype))
    ids = torch.arange(20).view(1, -1)
    torch.testing.assert_close(logits(model, ids), logits(AutoModelForCausalLM.from_pretrained(folder), ids).float(), rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(LeanQuantModelForCausalLM.from_pretrained(tmp_path / "saved").lm_head.weight, model.lm_head.weight)


def test_an_index_of_older_shards_is_not_read(plain_folder, tmp_path):
    """Saving whole where shards lay leaves their index: what is newer counts, as it does for transformers."""
    model = LeanQuantModelForCausalLM.from_pretrained(plain_folder)
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert (tmp_path / "saved" / "model.safetensors.index.json").is_file()
    LeanQuantModelForCausalLM.from_pretrained(tmp_path / "saved")
    index = (tmp_path / "saved" / "model.safetensors.index.json").read_text()
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "model.safetensors.index.json").write_text(index)
    ids = torch.arange(20).view(1, -1)
    assert torch.equal(logits(LeanQuantModelForCausalLM.from_pretrained(tmp_path / "saved"), ids), logits(model, ids))

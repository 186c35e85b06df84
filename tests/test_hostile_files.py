"""A quantized file is untrusted input: whatever is wrong with it gives a ValueError that names the tensor, never a wrong model.

Damage of each kind by hand, then seeded mutations of real files: each is refused, or gives the very model that was written.
"""

import copy
import json
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import leanquant
import llama
from leanquant import InputError, LeanQuantModelForCausalLM
from leanquant import __main__ as info
from leanquant.packing import Checkpoint

Q, NORM = "model.layers.1.mlp.up_proj", "model.layers.1.input_layernorm.weight"
IDS = torch.arange(20).view(1, -1) + 5
KINDS = {
    "non-uniform, 4 bits": ["--wbits", "4", "--exponent", "4"],
    "non-uniform, 3 bits, nibbles": ["--wbits", "3", "--exponent", "4", "--packing", "nibble"],
    "affine, 2 bits, groups": ["--wbits", "2", "--grid", "minmax", "--groupsize", "32"],
    "embeddings and head too": ["--wbits", "3", "--exponent", "4", "--vocab_bits", "2"],
    "embeddings and head in 8 bits": ["--wbits", "3", "--grid", "minmax", "--vocab_bits", "8"],
}


@pytest.fixture(scope="module")
def files(tiny_model, text_file, tmp_path_factory) -> dict[str, Path]:
    folder, found = tmp_path_factory.mktemp("files"), {}
    for number, (kind, flags) in enumerate(KINDS.items()):
        out = folder / f"{number}.safetensors"
        command = [
            str(tiny_model()),
            str(text_file),
            "--nsamples",
            "2",
            "--seqlen",
            "32",
            "--eval",
            "none",
            "--save_path",
            str(out),
            *flags,
        ]
        assert llama.main(command) == 0
        found[kind] = out
    return found


def load(base: Path, path: Path, **options):
    return LeanQuantModelForCausalLM.from_pretrained(base, path, dequantize="never", **options)


def rewritten(file: Path, out: Path, change, settings: dict | None = None) -> Path:
    """The tensors of `file` after `change(tensors)`, with its metadata or other `settings`."""
    tensors = load_file(file)
    change(tensors)
    settings = Checkpoint.open(file).settings if settings is None else settings
    save_file(tensors, out, metadata={"leanquant": json.dumps(settings)})
    return out


def setter(name: str, change):
    return lambda tensors: tensors.update({name: change(tensors[name])})


def with_value(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return change


NU, NIBBLES, AFFINE, *_ = KINDS
DAMAGE = {
    "levels with NaN": (NU, setter(Q + ".quant_grid", with_value(float("nan"))), "up_proj.quant_grid holds NaN"),
    "scales with infinity": (AFFINE, setter(Q + ".scale", with_value(float("inf"))), "up_proj.scale holds NaN or infinity"),
    "scales whose levels overflow": (AFFINE, setter(Q + ".scale", with_value(60000.0)), "up_proj.scale holds 6e.04, whose levels overflow"),
    "a bias that the base lacks": (NU, lambda tensors: tensors.update({Q + ".bias": torch.ones(96)}), "up_proj.bias, which the base"),
    "a zero out of range": (AFFINE, setter(Q + ".zero", with_value(4)), "up_proj.zero holds 4, not below 4"),
    "a code out of range": (
        NIBBLES,
        setter(Q + ".weight_codes", with_value(0x80)),
        "up_proj.weight_codes holds codes that are not below 8",
    ),
    "codes of another dtype": (NU, setter(Q + ".weight_codes", lambda t: t.to(torch.int16)), "up_proj.weight_codes is I16, not U8"),
    "levels of another dtype": (NU, setter(Q + ".quant_grid", lambda t: t.double()), "up_proj.quant_grid is F64"),
    "scales of another dtype": (AFFINE, setter(Q + ".scale", lambda t: t.bfloat16()), "up_proj.scale is BF16, not F16"),
    "zeros of another dtype": (AFFINE, setter(Q + ".zero", lambda t: t.half()), "up_proj.zero is F16, not U8"),
    "codes for another width": (NU, setter(Q + ".weight_codes", lambda t: t[:, :-5].contiguous()), "up_proj.weight_codes: codes of"),
    "too few rows": (NU, setter(Q + ".weight_codes", lambda t: t[:-1].contiguous()), "up_proj.weight_codes is .*rows"),
    "levels of too few rows": (NU, setter(Q + ".quant_grid", lambda t: t[:-1].contiguous()), "up_proj.quant_grid is .*rows"),
    "five levels": (NU, setter(Q + ".quant_grid", lambda t: t[:, :5].contiguous()), "up_proj.quant_grid is .*not 4, 8 or 16 levels"),
    "flat codes": (NU, setter(Q + ".weight_codes", lambda t: t.flatten()), "up_proj.weight_codes is"),
    "groups that do not divide": (AFFINE, setter(Q + ".scale", lambda t: t.repeat(1, 3)[:, :5].contiguous()), "up_proj.scale and .zero"),
    "no levels": (NU, lambda tensors: tensors.pop(Q + ".quant_grid"), "up_proj must have .weight_codes and .quant_grid"),
    "no codes": (NU, lambda tensors: tensors.pop(Q + ".weight_codes"), "up_proj"),
    "both kinds of grid": (NU, lambda tensors: tensors.update({Q + ".scale": torch.ones(96, 1).half()}), "up_proj must have"),
    "a missing norm": (NU, lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight"),
    "a norm of another size": (NU, setter("model.norm.weight", lambda t: t[:-1].contiguous()), "model.norm.weight is"),
    "a norm with NaN": (NU, setter("model.norm.weight", with_value(float("nan"))), "model.norm.weight holds NaN"),
    "a norm of integers": (NU, setter("model.norm.weight", lambda t: t.int()), "model.norm.weight is I32"),
    "a norm of the other 16-bit kind": (
        NU,
        setter("model.norm.weight", lambda t: t.view(torch.bfloat16)),
        "tensor model.norm.weight is .128",
    ),
    "norms of two 16-bit kinds": (
        NU,
        lambda tensors: tensors.update({"model.norm.weight": torch.ones(64).bfloat16(), NORM: torch.ones(64).half()}),
        "layernorm.weight is F16 and model.norm.weight is BF16",
    ),
    "levels of two 16-bit kinds": (NU, setter(Q + ".quant_grid", lambda t: t.view(torch.bfloat16)), "F16 and .*up_proj.quant_grid is BF16"),
    "an unknown tensor": (NU, lambda tensors: tensors.update({"model.extra": torch.ones(3).half()}), "tensor model.extra"),
    "an unknown linear": (NU, lambda tensors: tensors.update({"model.x.weight_codes": tensors[Q + ".weight_codes"].clone()}), "model.x"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(tiny_model, files, tmp_path, name):
    kind, change, message = DAMAGE[name]
    damaged = rewritten(files[kind], tmp_path / "damaged.safetensors", change)
    with pytest.raises(InputError, match=message):
        load(tiny_model(), damaged)


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        (NU, {"bits": 3}, "16 levels a row, but the metadata says 3 bits"),
        (AFFINE, {"bits": 4}, "codes of"),
        (AFFINE, {"bits": "2"}, "must give its bits"),
        (AFFINE, {"bits": True}, "must give its bits"),
        (AFFINE, {"bits": 9}, "must give its bits"),
        (AFFINE, {"grid": "affine"}, "must give its bits"),
        (AFFINE, {"bits": 4.0}, "must give its bits"),
        (NU, ["bits"], "not a JSON object"),
    ],
)
def test_metadata_that_lies(tiny_model, files, tmp_path, kind, settings, message):
    lying = rewritten(files[kind], tmp_path / "lying.safetensors", lambda tensors: None, settings)
    with pytest.raises(InputError, match=message):
        load(tiny_model(), lying)


def test_metadata_that_is_no_json(tiny_model, files, tmp_path):
    out = tmp_path / "x.safetensors"
    save_file(load_file(files[NU]), out, metadata={"leanquant": "{" * 5000})
    with pytest.raises(InputError, match="safetensors file"):
        load(tiny_model(), out)


@pytest.mark.parametrize("size", [0, 4, 8, 100, 5000, -1])
def test_truncated(tiny_model, files, tmp_path, size):
    (tmp_path / "cut.safetensors").write_bytes(files[NU].read_bytes()[:size])
    with pytest.raises(InputError, match="not a complete safetensors file"):
        load(tiny_model(), tmp_path / "cut.safetensors")


def test_a_header_of_100_gigabytes(tiny_model, tmp_path):
    (tmp_path / "huge.safetensors").write_bytes(struct.pack("<Q", 100 * 2**30) + b"{}" * 100)
    with pytest.raises(InputError, match="not a complete safetensors file"):
        load(tiny_model(), tmp_path / "huge.safetensors")


INDEXES = {
    "outside the folder": {"weight_map": {"a": "../model.safetensors"}},
    "an absolute path": {"weight_map": {"a": "/model.safetensors"}},
    "a long name": {"weight_map": {"a": "x" * 5000}},
    "no map": {"weight_map": 3},
    "deep": None,
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_lies(tiny_model, tmp_path, name):
    text = json.dumps(INDEXES[name]) if INDEXES[name] else "[" * 100000
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match="not a readable index"):
        load(tiny_model(), tmp_path)


def test_a_tensor_in_two_shards(tiny_model, files, tmp_path):
    for shard in ("a", "b"):
        (tmp_path / f"{shard}.safetensors").write_bytes(files[NU].read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    with pytest.raises(InputError, match="is in a.safetensors and in b.safetensors"):
        load(tiny_model(), tmp_path)


@pytest.mark.parametrize(
    "change", [{"num_attention_heads": 0}, {"rope_parameters": {"rope_type": "x"}}, {"model_type": "x"}, {"hidden_size": "y"}]
)
def test_a_base_config_that_lies(tiny_model, files, tmp_path, change):
    config = json.loads((tiny_model() / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="config.json"):
        load(tmp_path, files[NU])


@pytest.mark.parametrize("kind", KINDS)
def test_info_survives_700_mutations(files, tmp_path, kind):
    data, rng = files[kind].read_bytes(), random.Random(1)
    for _ in range(700):
        (tmp_path / "m.safetensors").write_bytes(mutated(data, rng))
        try:
            info.describe(Checkpoint.open(tmp_path / "m.safetensors"))
        except InputError as error:
            assert str(error)


def test_info_prints_no_escapes(files, tmp_path, capsys):
    settings = Checkpoint.open(files[NU]).settings | {"base_model": "\x1b[31mred"}
    assert info.main(["info", str(rewritten(files[NU], tmp_path / "e.safetensors", lambda tensors: None, settings))]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_a_pickle_is_not_opened(tiny_model, tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="not a complete safetensors file"):
        load(tiny_model(), tmp_path / "model.safetensors")


def test_remote_code_is_not_run(tiny_model, files, tmp_path, monkeypatch):
    """A base model that brings code: refused, and the code is not executed."""
    base = tmp_path / "base"
    base.mkdir()
    trap = tmp_path / "executed"
    (base / "modeling.py").write_text(
        f"open({str(trap)!r}, 'w')\nfrom transformers import LlamaForCausalLM as Model, LlamaConfig as Config\n"
    )
    config = json.loads((tiny_model() / "config.json").read_text())
    config |= {"model_type": "remote", "auto_map": {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(base, files[NU])
    config = json.loads((tiny_model() / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config))
    (base / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["modeling.Model", None]}}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert info.main(["generate", str(files[NU]), "x", "--base", str(base)]) == 2
    assert not trap.exists()


# --- mutations -------------------------------------------------------------------------------------------------


def header_of(data: bytes) -> tuple[dict, bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header: dict, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to three changes of what the file says about itself; the tensors' values stay."""
    for _ in range(rng.randint(1, 3)):
        if len(data) < 20:
            return data
        size = min(struct.unpack("<Q", data[:8])[0], len(data) - 8)
        kind = rng.choice(["flip", "byte", "cut", "length", "insert", "entry", "entry", "entry"])
        if kind == "cut":
            data = data[: rng.randrange(len(data))]
        elif kind == "length":
            data = (
                struct.pack("<Q", rng.choice([0, 1, max(size - 1, 0), size + 1, 2**31, 2**40, 2**63, rng.randrange(2 * size + 2)]))
                + data[8:]
            )
        elif kind in ("flip", "byte", "insert"):
            at = rng.randrange(8 + size)
            new = data[at] ^ 1 << rng.randrange(8) if kind == "flip" else rng.randrange(256)
            data = data[:at] + bytes([new]) + data[at + (kind != "insert") :]
        else:
            try:
                header, body = header_of(data)
                change_entry(header, rng)
            except (ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error):
                continue
            data = with_header(header, body)
    return data


def change_entry(header: dict, rng: random.Random) -> None:
    name = rng.choice([n for n in header if n != "__metadata__"])
    entry = header[name]
    kind = rng.choice(["dtype", "shape", "transpose", "offsets", "drop", "rename", "swap", "metadata"])
    if kind == "dtype":
        entry["dtype"] = rng.choice(["U8", "I8", "F16", "BF16", "F32", "I16", "I32", "I64", "BOOL", "F64", "F8_E4M3", "X"])
    elif kind == "shape":
        entry["shape"][rng.randrange(len(entry["shape"]))] += rng.choice([-1, 1, 100, -1000, 2**40])
    elif kind == "transpose":
        entry["shape"] = (
            entry["shape"][::-1] if rng.random() < 0.5 else [entry["shape"][0] * 2, *entry["shape"][1:-1], entry["shape"][-1] // 2]
        )
    elif kind == "offsets":
        entry["data_offsets"][rng.randrange(2)] += rng.choice([-8, -1, 1, 8, 2**33])
    elif kind == "drop":
        del header[name]
    elif kind == "rename":
        header[name.replace(rng.choice(["weight", "layers", "codes", "grid", "0", "mlp"]), "x")] = header.pop(name)
    elif kind == "swap":
        other = rng.choice([n for n in header if n != "__metadata__"])
        header[name]["dtype"], header[other]["dtype"] = header[other]["dtype"], header[name]["dtype"]
    else:
        settings = json.loads(header["__metadata__"]["leanquant"])
        values = [2, 3, 4, 8, 16, None, "4", [], {}, {"lm_head": 4, "model.layers.0.mlp.up_proj": 8}, -1, 1e300, True]
        settings[rng.choice(["bits", "bits_for", "grid", "groupsize", "packing"])] = rng.choice(values)
        header["__metadata__"]["leanquant"] = rng.choice([json.dumps(settings), "", "null", "[]", "{", "1"])


@pytest.mark.parametrize("kind", KINDS)
def test_700_mutations_are_refused_or_harmless(tiny_model, files, tmp_path, kind, monkeypatch):
    base, data = tiny_model(), files[kind].read_bytes()
    original = load(base, files[kind]).state_dict()
    cached = leanquant.modeling.AutoConfig.from_pretrained(base)
    monkeypatch.setattr(leanquant.modeling.AutoConfig, "from_pretrained", lambda *_, **__: cached)
    rng, refused = random.Random(0), 0
    for number in range(700):
        (tmp_path / "m.safetensors").write_bytes(mutated(data, rng))
        try:
            state = load(base, tmp_path / "m.safetensors").state_dict()
        except InputError as error:
            assert str(error)
            refused += 1
            continue
        assert state.keys() == original.keys(), number
        for name in original:
            assert torch.equal(state[name], original[name]), (number, name)
    assert 300 < refused < 700


@pytest.mark.parametrize("kind", KINDS)
def test_mutations_are_refused_or_harmless_in_transformers_own_loader_too(tiny_model, files, tmp_path, kind):
    folder, data = tmp_path / "folder", files[kind].read_bytes()
    shutil.copytree(tiny_model(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "leanquant"}}))
    (folder / "model.safetensors").write_bytes(data)
    original = copy.deepcopy(AutoModelForCausalLM.from_pretrained(folder).state_dict())  # which maps the file
    rng, refused = random.Random(1), 0
    for number in range(60):
        (folder / "model.safetensors").write_bytes(mutated(data, rng))
        try:
            state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        except InputError as error:
            assert str(error)
            refused += 1
            continue
        assert all(torch.equal(state[name], original[name]) for name in original), number
    assert 20 < refused < 60

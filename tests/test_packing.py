"""Proves the file format in both directions: codes survive packing and lie where formats.md says, published files come back
byte for byte, damaged input is refused in words, and a result appears under its own name only when it is complete."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from leanquant import packing
from leanquant.errors import InputError
from leanquant.packing import (
    Checkpoint,
    ModelWriter,
    PackedLinear,
    _copy_bytes,
    affine_levels,
    layout_of,
    merge_files,
    pack_codes,
    packed_width,
    unpack_codes,
)

FIXTURES = Path(__file__).parent / "fixtures"
BASE = FIXTURES / "llama_base"
PUBLISHED = [FIXTURES / "llama_4bit.safetensors", FIXTURES / "llama_2bit.safetensors"]
ALL_FILES = sorted(FIXTURES.rglob("*.safetensors"))
SETTINGS = {"bits": 3, "grid": "affine", "base_model": "a/b", "act_order": False}


def random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


# --- codes -----------------------------------------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 4), st.integers(1, 70))
any_bits = st.sampled_from([2, 3, 4])
seeds = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("layout", ["dense", "nibble"])
@settings(max_examples=150, deadline=None)
@given(shape=shapes, bits=any_bits, seed=seeds)
def test_codes_survive_packing(layout, shape, bits, seed):
    codes = random_codes(*shape, bits, seed)
    packed = pack_codes(codes, bits, layout)
    assert packed.dtype == torch.uint8
    assert packed.shape == (shape[0], packed_width(shape[1], bits, layout))
    assert torch.equal(unpack_codes(packed, bits, shape[1]), codes)


@pytest.mark.parametrize("layout", ["dense", "nibble"])
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("columns", range(1, 18))
def test_codes_survive_packing_at_every_small_width(columns, bits, layout):
    """The widths at which 3 or 2 bit dense codes take as many bytes as nibbles are here."""
    codes = random_codes(5, columns, bits) | (2**bits - 1) * (torch.arange(5) == 0).to(torch.uint8).unsqueeze(1)
    assert torch.equal(unpack_codes(pack_codes(codes, bits, layout), bits, columns), codes)


def bit_stream(row: list[int], bits: int) -> list[int]:
    """The dense layout from its definition: one long integer, code j at bit j * bits, cut into bytes from the low end."""
    number = sum(code << (bits * j) for j, code in enumerate(row))
    return list(number.to_bytes((len(row) * bits + 7) // 8, "little"))


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 4), columns=st.integers(7, 70), bits=st.sampled_from([2, 3]), seed=seeds)
def test_dense_codes_are_a_bit_stream_lowest_bits_first(rows, columns, bits, seed):
    codes = random_codes(rows, columns, bits, seed)
    assert pack_codes(codes, bits).tolist() == [bit_stream(row, bits) for row in codes.tolist()]


@settings(max_examples=100, deadline=None)
@given(shape=shapes, bits=any_bits, seed=seeds)
def test_nibbles_hold_the_even_column_in_their_high_half(shape, bits, seed):
    codes = random_codes(*shape, bits, seed)
    packed = pack_codes(codes, bits, "nibble")
    for row, packed_row in zip(codes.tolist(), packed.tolist(), strict=True):
        row += [0] * (len(row) % 2)
        assert packed_row == [row[2 * j] << 4 | row[2 * j + 1] for j in range(len(row) // 2)]
    if bits == 4:
        assert torch.equal(pack_codes(codes, 4, "dense"), packed)


@pytest.mark.parametrize(
    ("bits", "columns", "nibble", "dense"), [(4, 9, 5, 5), (3, 9, 5, 4), (3, 64, 32, 24), (2, 9, 5, 3), (2, 64, 32, 16)]
)
def test_layout_is_told_by_the_width(bits, columns, nibble, dense):
    assert packed_width(columns, bits, "nibble") == nibble
    assert packed_width(columns, bits) == dense
    assert layout_of(nibble, bits, columns) == "nibble"
    assert layout_of(dense, bits, columns) == ("nibble" if bits == 4 else "dense")


@pytest.mark.parametrize(("width", "bits", "columns"), [(31, 4, 64), (33, 3, 64), (23, 3, 64), (0, 2, 64), (64, 2, 64), (17, 4, 32)])
def test_a_width_that_fits_no_layout_is_refused(width, bits, columns):
    with pytest.raises(InputError, match=f"{width} bytes"):
        layout_of(width, bits, columns)
    with pytest.raises(InputError, match="base model"):
        unpack_codes(torch.zeros(2, width, dtype=torch.uint8), bits, columns)


# --- one linear ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["dense", "nibble"])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_dequantized_grid_is_a_lookup_by_row(bits, layout):
    codes, grid = random_codes(5, 37, bits), torch.randn(5, 2**bits).half()
    weight = PackedLinear(pack_codes(codes, bits, layout), grid).dequantize(bits, 37, torch.float32)
    for o in range(5):
        assert weight[o].tolist() == [float(grid[o, k]) for k in codes[o].tolist()]


@pytest.mark.parametrize("layout", ["dense", "nibble"])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_dequantized_affine_is_scale_times_code_minus_zero(bits, groups, layout):
    codes, scale = random_codes(3, 32, bits), torch.rand(3, groups).half() + 0.1
    zero = random_codes(3, groups, bits, seed=1)
    packed = PackedLinear(pack_codes(codes, bits, layout), None, scale, zero)
    weight = packed.dequantize(bits, 32, torch.float32)
    for o in range(3):
        for i in range(32):
            g = i // (32 // groups)
            assert float(weight[o, i]) == float(scale[o, g]) * (int(codes[o, i]) - int(zero[o, g]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dequantized_weight_has_the_dtype_asked_for(dtype):
    grid = torch.randn(2, 16).half()
    weight = PackedLinear(pack_codes(random_codes(2, 10, 4), 4), grid).dequantize(4, 10, dtype)
    assert weight.dtype == dtype
    assert set(weight[0].tolist()) <= set(grid[0].to(dtype).tolist())


def test_affine_levels_do_not_wrap_below_zero():
    levels = affine_levels(torch.tensor([0.5]).half(), torch.tensor([3], dtype=torch.uint8), 2)
    assert levels.tolist() == [[-1.5, -1.0, -0.5, 0.0]]


@pytest.mark.parametrize("bits", [3, 2])
def test_a_code_without_a_level_is_refused(bits):
    codes = random_codes(4, 20, bits)
    codes[2, 11] = 2**bits
    damaged = PackedLinear(pack_codes(codes, bits, "nibble"), torch.randn(4, 2**bits).half())
    with pytest.raises(InputError, match="m.q.weight_codes holds codes that are not below"):
        damaged.check_values("m.q", bits, 20)


def test_tensors_are_named_as_the_format_wants():
    codes, scale = random_codes(2, 8, 4), torch.rand(2, 1).half()
    assert set(PackedLinear(codes, torch.rand(2, 16)).named("m.q")) == {"m.q.weight_codes", "m.q.quant_grid"}
    assert set(PackedLinear(codes, None, scale, codes[:, :1]).named("m.q")) == {"m.q.weight_codes", "m.q.scale", "m.q.zero"}


# --- published files -------------------------------------------------------------------------------------------


def in_parts(tensors: dict[str, torch.Tensor], folder: Path, count: int) -> list[Path]:
    """The tensors dealt out to `count` files, so that every part takes from the whole alphabet."""
    names, files = sorted(tensors), []
    for number in range(count):
        files.append(folder / f"in-{number}.safetensors")
        save_file({name: tensors[name] for name in names[number::count]}, files[-1])
    return files


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("source", ALL_FILES, ids=lambda f: f.stem)
def test_published_files_come_back_byte_for_byte(source, count, tmp_path):
    checkpoint, out = Checkpoint.open(source), tmp_path / "out.safetensors"
    with safe_open(source, "pt") as f:
        metadata = f.metadata()
    tensors = {name: checkpoint.get(name) for name in checkpoint.shapes}
    merge_files(in_parts(tensors, tmp_path, count), out, None)
    if metadata is None:
        assert out.read_bytes() == source.read_bytes()
    else:  # transformers adds a key of its own, which we do not
        save_file(tensors, tmp_path / "expected.safetensors")
        assert out.read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_the_quantized_published_files_have_no_metadata_to_lose():
    for file in PUBLISHED:
        with safe_open(file, "pt") as f:
            assert f.metadata() is None


@pytest.mark.parametrize("source", PUBLISHED, ids=lambda f: f.stem)
def test_published_codes_repack_to_the_same_bytes(source):
    checkpoint = Checkpoint.open(source)
    shapes = Checkpoint.open(BASE).shapes
    assert len(checkpoint.quantized) == 14
    for linear in checkpoint.quantized:
        bits, packed = checkpoint.bits_of(linear), checkpoint.get(linear + ".weight_codes")
        assert bits == int(source.stem[-4])
        codes = unpack_codes(packed, bits, shapes[linear + ".weight"][1])
        assert int(codes.max()) < 2**bits
        assert torch.equal(pack_codes(codes, bits, "nibble"), packed)
        assert torch.equal(unpack_codes(pack_codes(codes, bits, "dense"), bits, codes.shape[1]), codes)


@pytest.mark.parametrize("source", PUBLISHED, ids=lambda f: f.stem)
def test_published_weights_resemble_the_base(source):
    """A swapped nibble or an unsorted grid read as sorted would make them unrelated."""
    quantized, base = Checkpoint.open(source), Checkpoint.open(BASE)
    for linear in quantized.quantized:
        name = linear + ".weight"
        weight, original = (c.weight(name, base.shapes[name], torch.float32) for c in (quantized, base))
        assert torch.corrcoef(torch.stack([weight.flatten(), original.flatten()]))[0, 1] > 0.7


def test_a_weight_of_another_shape_is_refused():
    base = Checkpoint.open(BASE)
    with pytest.raises(InputError, match="norm.weight"):
        base.weight("model.norm.weight", (3,), torch.float32)


# --- merging ---------------------------------------------------------------------------------------------------


def mixed_tensors() -> dict[str, torch.Tensor]:
    """Every dtype that models and quantized linears have, names out of order and outside ASCII."""
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.uint8, torch.int64, torch.int32, torch.int8, torch.bool, torch.float64]
    dtypes += [torch.int16, torch.float8_e4m3fn, torch.float8_e5m2]
    tensors = {f"{'zyxabcmnopqr'[n]}.weight": (torch.arange(n + 3) % 2).to(dtype) for n, dtype in enumerate(dtypes)}
    return tensors | {'ß"\\.weight': torch.ones(2, 3), "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}


@pytest.mark.parametrize("dtypes", [("float16", "float32", "uint8"), ("bfloat16", "float32", "uint8"), ("float16", "bfloat16", "uint8")])
def test_merged_bytes_are_those_of_save_file(dtypes, tmp_path):
    """(fp16, bf16, u8) is an affine file of a bf16 model: its scales are fp16 beside bf16 norms."""
    tensors = {f"{name}.{dtype}": torch.ones(4).to(getattr(torch, dtype)) for name in "abc" for dtype in dtypes}
    merge_files(in_parts(tensors, tmp_path, 2), tmp_path / "out.safetensors", None)
    save_file(tensors, tmp_path / "expected.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_merged_tensors_are_those_of_the_parts(tmp_path):
    tensors = mixed_tensors()
    merge_files(in_parts(tensors, tmp_path, 3), tmp_path / "out.safetensors", None)
    merged = load_file(tmp_path / "out.safetensors")
    assert merged.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert merged[name].dtype == tensor.dtype
        assert torch.equal(merged[name].float(), tensor.float())


def test_settings_are_one_key_of_sorted_json(tmp_path):
    parts, outs = in_parts(mixed_tensors(), tmp_path, 2), [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    merge_files(parts, outs[0], SETTINGS)
    merge_files(parts, outs[1], dict(reversed(SETTINGS.items())))
    with safe_open(outs[0], "pt") as f:
        assert f.metadata() == {"leanquant": json.dumps(SETTINGS, sort_keys=True)}
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert Checkpoint.open(outs[0]).settings == SETTINGS


def test_a_failed_merge_leaves_the_older_file(tmp_path):
    out, parts = tmp_path / "out.safetensors", in_parts(mixed_tensors(), tmp_path, 2)
    out.write_bytes(b"older")
    parts[1].write_bytes(parts[1].read_bytes()[:20])
    with pytest.raises(Exception):  # noqa: B017, PT011  whatever it is, the result must not show
        merge_files(parts, out, SETTINGS)
    assert out.read_bytes() == b"older"


def test_a_part_cut_short_is_noticed(tmp_path):
    """Not an endless loop, which is what reading nothing again and again would be."""

    class Target:
        def write(self, piece: bytes) -> None:
            assert piece, "reads on behind the end of the part"

    part = tmp_path / "in.safetensors"
    part.write_bytes(bytes(1000))
    with pytest.raises((OSError, ValueError, EOFError)):
        _copy_bytes(part, 100, 901, Target())


# --- reading ---------------------------------------------------------------------------------------------------


def sharded(folder: Path) -> dict[str, torch.Tensor]:
    """A folder of two shards and an index; returns its tensors."""
    tensors = {"a.weight": torch.randn(3, 4), "b.weight": torch.randn(2), "c.weight": torch.randn(5)}
    save_file({"a.weight": tensors["a.weight"]}, folder / "model-00001-of-00002.safetensors")
    save_file({n: tensors[n] for n in ("b.weight", "c.weight")}, folder / "model-00002-of-00002.safetensors")
    weight_map = {name: f"model-0000{1 if name[0] == 'a' else 2}-of-00002.safetensors" for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


def test_shards_read_as_one_checkpoint(tmp_path):
    tensors = sharded(tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    assert checkpoint.shapes == {name: tuple(t.shape) for name, t in tensors.items()}
    assert all(torch.equal(checkpoint.get(name), tensor) for name, tensor in tensors.items())
    assert "a.weight" in checkpoint
    assert "d.weight" not in checkpoint


def test_a_missing_shard_is_named(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="model-00002-of-00002.safetensors"):
        Checkpoint.open(tmp_path)


def test_a_truncated_shard_is_named(tmp_path):
    sharded(tmp_path)
    os.truncate(tmp_path / "model-00002-of-00002.safetensors", 60)
    with pytest.raises(InputError, match="model-00002-of-00002.safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused(kept, tmp_path):
    broken = tmp_path / "model.safetensors"
    broken.write_bytes(PUBLISHED[0].read_bytes()[:kept])
    for path in (broken, tmp_path):
        with pytest.raises(InputError, match="not a complete safetensors file"):
            Checkpoint.open(path)


@pytest.mark.parametrize("content", [b"\xff" * 100, b"\0" * 100, b"<html>not found</html>", b"\x10\0\0\0\0\0\0\0{" + b" " * 20])
def test_a_file_of_something_else_is_refused(content, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="x.safetensors"):
        Checkpoint.open(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "index",
    [b"", b"{", b"[]", b"{}", b"null", b'{"weight_map": []}', b'{"weight_map": null}', b'{"weight_map": {"a": 3}}', b"\xff\xfe{}"],
)
def test_a_corrupt_index_is_refused(index, tmp_path):
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(InputError, match="index"):
        Checkpoint.open(tmp_path)


def test_metadata_that_is_not_json_is_refused(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors", metadata={"leanquant": "{bits"})
    with pytest.raises(InputError, match="x.safetensors"):
        Checkpoint.open(tmp_path / "x.safetensors")


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused_with_a_remedy(pickle, tmp_path):
    (tmp_path / pickle).write_bytes(b"\x80\x02.")
    with pytest.raises(InputError, match=f"{pickle}.*save_pretrained"):
        Checkpoint.open(tmp_path)


def test_an_empty_folder_and_a_missing_path_are_refused(tmp_path):
    with pytest.raises(InputError, match="no model.safetensors"):
        Checkpoint.open(tmp_path)
    with pytest.raises(InputError, match="nowhere does not exist"):
        Checkpoint.open(tmp_path / "nowhere")


def test_a_missing_tensor_is_named():
    with pytest.raises(InputError, match="lm_foot.weight"):
        Checkpoint.open(BASE).get("lm_foot.weight")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_tensor_that_is_not_finite_is_named(bad, dtype, tmp_path):
    sick = torch.ones(50, dtype=dtype)
    sick[17] = bad
    save_file({"a": torch.ones(3), "layers.7.sick": sick, "z": torch.ones(3, dtype=torch.int64)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="layers.7.sick"):
        Checkpoint.open(tmp_path / "x.safetensors").check_finite()


@pytest.mark.parametrize("source", [BASE, *PUBLISHED], ids=lambda f: f.stem)
def test_healthy_checkpoints_are_finite(source):
    Checkpoint.open(source).check_finite()


def test_every_dtype_can_be_checked(tmp_path):
    save_file(mixed_tensors(), tmp_path / "x.safetensors")
    Checkpoint.open(tmp_path / "x.safetensors").check_finite()


def test_a_tensor_outlives_its_file(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.full((1000,), 7.0)}, file)
    tensor = Checkpoint.open(file).get("a")
    file.write_bytes(b"\0" * file.stat().st_size)
    assert (tensor == 7).all()


def test_bits_of_an_affine_file_come_from_its_settings(tmp_path):
    packed = PackedLinear(pack_codes(random_codes(2, 16, 3), 3), None, torch.ones(2, 1).half(), torch.zeros(2, 1, dtype=torch.uint8))
    save_file(packed.named("m"), tmp_path / "bare.safetensors")
    merge_files([tmp_path / "bare.safetensors"], tmp_path / "told.safetensors", SETTINGS)
    assert Checkpoint.open(tmp_path / "told.safetensors").bits_of("m") == 3
    with pytest.raises(InputError, match="the whole folder again"):
        Checkpoint.open(tmp_path / "bare.safetensors").bits_of("m")


# --- writing ---------------------------------------------------------------------------------------------------

PARTS = [
    {"model.embed.weight": torch.arange(600.0).half()},
    {"model.layers.0.q.weight_codes": random_codes(8, 50, 4), "model.layers.0.q.quant_grid": torch.rand(8, 16).half()},
    {"model.norm.weight": torch.ones(300).half(), "lm_head.weight": torch.rand(20, 30).half()},
]
EVERYTHING = {name: tensor for part in PARTS for name, tensor in part.items()}


def write(save_path: Path | None, overwrite: bool = False, **finish) -> Checkpoint:
    writer = ModelWriter(save_path, overwrite, 10_000)
    for part in PARTS:
        writer.add(part)
    checkpoint = writer.finish(SETTINGS, BASE, **finish)
    writer.close()
    return checkpoint


def assert_holds_everything(checkpoint: Checkpoint) -> None:
    assert checkpoint.shapes.keys() == EVERYTHING.keys()
    for name, tensor in EVERYTHING.items():
        assert torch.equal(checkpoint.get(name), tensor)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_a_file_result_is_whole_and_alone(tmp_path):
    checkpoint = write(tmp_path / "m.safetensors")
    assert_holds_everything(checkpoint)
    assert checkpoint.settings == SETTINGS
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_folder_result_is_a_hugging_face_model(tmp_path):
    checkpoint = write(tmp_path / "m")
    assert_holds_everything(checkpoint)
    assert sorted(snapshot(tmp_path)) == ["m/config.json", "m/generation_config.json", "m/model.safetensors"]
    config, base = json.loads((tmp_path / "m/config.json").read_text()), json.loads((BASE / "config.json").read_text())
    assert config.pop("quantization_config") == {"quant_method": "leanquant", **SETTINGS}
    assert config == base
    assert (tmp_path / "m/generation_config.json").read_bytes() == (BASE / "generation_config.json").read_bytes()


def test_a_small_shard_size_gives_shards_and_an_index(tmp_path):
    assert_holds_everything(write(tmp_path / "m", max_shard_bytes=1000))
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == EVERYTHING.keys()
    assert set(index["weight_map"].values()) == {f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)}
    for name, shard in index["weight_map"].items():
        assert name in Checkpoint.open(tmp_path / "m" / shard)


def test_parts_share_a_shard_as_long_as_they_fit(tmp_path):
    sizes = [sum(t.nbytes for t in part.values()) + 400 for part in PARTS]
    write(tmp_path / "m", max_shard_bytes=sizes[0] + sizes[1])
    assert len(list((tmp_path / "m").glob("model-*-of-00002.safetensors"))) == 2


def test_the_index_states_the_bytes_of_the_tensors(tmp_path):
    """transformers' meaning of total_size: tensor data, headers left out."""
    write(tmp_path / "m", max_shard_bytes=1000)
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in EVERYTHING.values())


@pytest.mark.parametrize("name", ["m.safetensors", "m"])
def test_the_same_parts_twice_give_the_same_bytes(name, tmp_path):
    for run in ("first", "second"):
        (tmp_path / run).mkdir()
        write(tmp_path / run / name, max_shard_bytes=1500)
    assert snapshot(tmp_path / "first") == snapshot(tmp_path / "second")


def test_without_a_path_the_parts_are_read_where_they_lie():
    writer = ModelWriter(None, False, 10_000)
    for part in PARTS:
        writer.add(part)
    assert_holds_everything(writer.finish(SETTINGS, BASE))
    folder = writer.folder
    writer.close()
    assert not folder.exists()


@pytest.mark.parametrize("name", ["m.safetensors", "m"])
def test_an_existing_result_is_kept_without_overwrite(name, tmp_path):
    write(tmp_path / name)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="--overwrite"):
        write(tmp_path / name)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["m.safetensors", "m"])
def test_overwrite_replaces_the_result(name, tmp_path):
    writer = ModelWriter(tmp_path / name, False, 10_000)
    writer.add({"old.weight": torch.ones(3)})
    writer.finish(SETTINGS, BASE)
    writer.close()
    assert_holds_everything(write(tmp_path / name, overwrite=True))
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("config", [None, "{}", "[]", "not json", '{"quantization_config": {"quant_method": "gptq"}}'])
def test_a_folder_of_other_things_is_never_deleted(config, tmp_path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter1.tex").write_text("years of work")
    if config is not None:
        (folder / "config.json").write_text(config)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="thesis"):
        write(folder, overwrite=True)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("neighbour", ["m.partial", "m.old"])
def test_a_neighbour_with_a_working_name_is_never_deleted(neighbour, tmp_path):
    """The writer uses m.partial and m.old on its way; what a user keeps under these names is not its own."""
    write(tmp_path / "m")
    (tmp_path / neighbour).mkdir()
    (tmp_path / neighbour / "chapter1.tex").write_text("years of work")
    try:
        write(tmp_path / "m", overwrite=True)
    except InputError:
        pass
    assert (tmp_path / neighbour / "chapter1.tex").read_text() == "years of work"


def test_overwrite_keeps_files_a_user_added_to_an_older_result(tmp_path):
    """Refusing is as good as keeping; deleting them is not."""
    write(tmp_path / "m")
    (tmp_path / "m" / "notes.md").write_text("years of work")
    try:
        write(tmp_path / "m", overwrite=True)
    except InputError:
        pass
    assert (tmp_path / "m" / "notes.md").read_text() == "years of work"


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "m").mkdir()
    assert_holds_everything(write(tmp_path / "m", overwrite=True))


def test_file_and_folder_do_not_replace_each_other(tmp_path):
    (tmp_path / "m.safetensors").mkdir()
    (tmp_path / "m").write_text("a file")
    for name in ("m.safetensors", "m"):
        with pytest.raises(InputError, match="give another --save_path"):
            write(tmp_path / name, overwrite=True)
    assert (tmp_path / "m").read_text() == "a file"


@pytest.mark.parametrize("name", ["m.safetensors", "m", None])
def test_a_full_disk_is_noticed_before_the_work(name, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, used=0, free=10**6))
    path = name and tmp_path / name
    ModelWriter(path, False, 10**5).close()
    with pytest.raises(InputError, match=r"0\.00 GB free.*GB: free some"):
        ModelWriter(path, False, 10**7)
    assert list(tmp_path.iterdir()) == []


def test_room_is_asked_for_the_parts_and_the_result(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, used=0, free=10**6))
    with pytest.raises(InputError, match="GB free"):
        ModelWriter(tmp_path / "m", False, 600_000)
    ModelWriter(None, False, 600_000).close()


@pytest.mark.parametrize("name", ["m.safetensors", "m"])
def test_nothing_bears_the_name_of_the_result_before_it_is_complete(name, tmp_path):
    writer = ModelWriter(tmp_path / name, False, 10_000)  # crashes after two parts: no finish, no close
    for part in PARTS[:2]:
        writer.add(part)
        assert not (tmp_path / name).exists()
    with pytest.raises(InputError, match="another run is working"):
        write(tmp_path / name)
    os.close(writer._lock)  # as the end of its process does
    assert_holds_everything(write(tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == [name], "what the crash left is gone after the next run"


def test_a_run_is_over_before_it_clears_up(tmp_path, monkeypatch):
    """Whatever it is killed at, nothing says that it is under way; and nobody comes in with the lock that it held."""
    writer, path = ModelWriter(tmp_path / "m", False, 10), tmp_path / "m.partial"
    writer.add(PARTS[0])
    late = os.open(path / "lock", os.O_RDWR)

    def killed(folder, *args):
        assert not path.exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            writer.close()
    os.close(writer._lock)  # as the end of its process does
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.finished"]
    path.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda *_: late)  # by a run that had opened it before
        with pytest.raises(InputError, match="give the command again"):
            packing._lock(path, "--save_path")
    assert_holds_everything(write(tmp_path / "m"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"], "what the kill left is gone after the next run"


def test_what_is_not_a_runs_is_not_cleared_up(tmp_path):
    """Where it would have to, the working folder stays, and the next run uses it."""
    (tmp_path / "m.finished").mkdir()
    (tmp_path / "m.finished" / "thesis.txt").touch()
    write(tmp_path / "m")
    assert (tmp_path / "m.finished" / "thesis.txt").exists() and (tmp_path / "m.partial").exists()
    (tmp_path / "m.finished" / "thesis.txt").unlink()
    assert_holds_everything(write(tmp_path / "m", overwrite=True))
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("name", ["m.safetensors", "m"])
@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_crash_in_finish_leaves_the_older_result(name, call, tmp_path, monkeypatch):
    write(tmp_path / name)
    before = snapshot(tmp_path)
    writer = ModelWriter(tmp_path / name, True, 10_000)
    writer.add({"other.weight": torch.ones(3)})

    def crash(*_):
        raise OSError("power cut")

    monkeypatch.setattr(os, call, crash)
    with pytest.raises(OSError, match="power cut"):
        writer.finish(SETTINGS, BASE)
    after = snapshot(tmp_path)
    assert {file: after[file] for file in before} == before


@pytest.mark.parametrize("name", ["m.safetensors", "deeper/m"])
def test_a_target_that_cannot_be_written_is_refused(name, tmp_path):
    """Below a plain file nothing can be made, not even by root."""
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        ModelWriter(tmp_path / "file" / name, False, 10)


def test_folders_on_the_way_are_made(tmp_path):
    assert_holds_everything(write(tmp_path / "new" / "deeper" / "m.safetensors"))

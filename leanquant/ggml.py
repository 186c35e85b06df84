"""Write a quantized model as a GGUF file, for llama.cpp and what is built on it.

llama.cpp's own converter makes a 16-bit GGUF file of the unquantized model, the template: names, hyperparameters and tokenizer are its
business. What is written here is a copy of that file with our codes and scales in the place of its weights, never quantized again. Which
weight is which is found by comparing rows, so no family is known by name, and rows that the converter puts into another order (q and k
of Llama) or into one tensor (q, k and v; experts) are followed. Before the file gets its name, the package `gguf`, which reads and
writes the container, decodes it, and every weight is compared. Not here: making the template, reading GGUF files as models.

Block types are ggml's, as its dequantizers read them. A block is 32 weights, or 256 of those with a K in their name. Legend: O rows,
I columns, G groups of a linear; scale and zero as in packing.py.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy
import torch
from gguf import GGMLQuantizationType as Type
from torch import nn
from tqdm import tqdm

from .errors import InputError
from .experts import use_model_names
from .export import common, others, sizes_of, split_network
from .linear import path_in
from .packing import ZERO, Checkpoint, ModelWriter, PackedLinear, check_output, unpack_codes

PIECE_WEIGHTS = 2**22  # encoded or compared at a time
IN_16_BITS = "make it with convert_hf_to_gguf.py --outtype f16, of llama.cpp"
PLAIN = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
EMBEDDINGS, HEAD = "token_embd.weight", "output.weight"  # their names in every GGUF file
FILE_TYPES = {
    Type.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    Type.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1,
    Type.Q4_K: gguf.LlamaFileType.MOSTLY_Q4_K_S,
    Type.Q3_K: gguf.LlamaFileType.MOSTLY_Q3_K_S,
    Type.Q2_K: gguf.LlamaFileType.MOSTLY_Q2_K,
}
REMEDIES = {
    8: "quantize without --vocab_bits: what is in 16 bits is stored in 8 anyway",
    4: "quantize with --groupsize 32, 64 or 128; it must divide the columns",
    3: "quantize with --sym and without --groupsize; rows must have a multiple of 256 columns",
    2: "quantize without --groupsize; rows must have a multiple of 256 columns",
}


# --- blocks ----------------------------------------------------------------------------------------------------


def type_of(bits: int, columns: int, symmetric: bool) -> Type | None:
    """The smallest block type that holds such weights, or None. columns: that share a scale; symmetric: all zeros are 2**(bits-1)."""
    if bits == 4 and columns % 32 == 0:
        return Type.Q4_0 if symmetric else Type.Q4_K if columns % 256 == 0 else Type.Q4_1
    if bits == 3 and columns % 256 == 0 and symmetric:
        return Type.Q3_K
    return Type.Q2_K if bits == 2 and columns % 256 == 0 else None


def encode(kind: Type, codes: numpy.ndarray, scale: numpy.ndarray, zero: numpy.ndarray) -> numpy.ndarray:
    """Codes uint8 [O, I], scale float16 and zero uint8 [O, G] -> blocks, uint8 [O, bytes of a row].

    The K types have a scale and a minimum of 6 bits (Q2_K: 4) for a few weights each, in units of two float16 for the block. Here all
    of the block have one scale: the unit is that scale, and 6 bits hold 1 and the zero point, so nothing is rounded. Only Q4_1 has
    the minimum itself, -scale * zero, in float16.
    """
    size, _ = gguf.GGML_QUANT_SIZES[kind]
    O, I = codes.shape
    codes, repeats = codes.reshape(-1, size), I // scale.shape[1] // size
    scale, zero = (numpy.repeat(part, repeats, axis=1).reshape(-1, 1) for part in (scale, zero))
    return numpy.hstack([part.view(numpy.uint8) for part in ENCODERS[kind](codes, scale, zero)]).reshape(O, -1)


def _q4_0(codes, scale, zero):
    return scale, digits(codes, 4, 16)


def _q4_1(codes, scale, zero):
    return scale, (-scale.astype(numpy.float32) * zero).astype(numpy.float16), digits(codes, 4, 16)


def _q4_k(codes, scale, zero):
    ones = numpy.ones_like(zero)  # scales 0-3, minimums 0-3, then nibbles of both 4-7; upper bits, spread over them, are 0
    return scale, scale, ones.repeat(4, 1), zero.repeat(4, 1), (ones | zero << 4).repeat(4, 1), digits(codes, 4, 32)


def _q3_k(codes, scale, zero):
    high = digits(codes >> 2, 1, 32)
    scales = numpy.array([[0x11] * 8 + [0xAA] * 4], numpy.uint8)  # 16 of 6 bits: 33, which stands for 1
    return high, digits(codes & 3, 2, 32), scales.repeat(len(codes), 0), scale


def _q2_k(codes, scale, zero):
    return (1 | zero << 4).repeat(16, 1), digits(codes, 2, 32), scale, scale


ENCODERS = {Type.Q4_0: _q4_0, Type.Q4_1: _q4_1, Type.Q4_K: _q4_k, Type.Q3_K: _q3_k, Type.Q2_K: _q2_k}


def digits(codes: numpy.ndarray, bits: int, span: int) -> numpy.ndarray:
    """Codes [n, columns] -> bytes: the digits of a byte, lowest first, are `span` columns apart."""
    apart = codes.reshape(len(codes), -1, 8 // bits, span)
    return numpy.bitwise_or.reduce(apart << numpy.arange(0, 8, bits, dtype=numpy.uint8)[:, None], axis=2).reshape(len(codes), -1)


# --- which weight is which -------------------------------------------------------------------------------------


class Source(NamedTuple):
    """What a tensor of the template becomes: rows of linears, stored in blocks of one type."""

    linears: dict[str, tuple[int, int]]  # with O and I
    rows: torch.Tensor  # numbers, in all linears one after the other
    type: Type
    bits: int | None  # None: they are not quantized


class Rows:
    """The rows of some linears of the unquantized model, found by their contents."""

    def __init__(self, original: Checkpoint, linears: list[str], dtype: torch.dtype):
        """dtype: in which the template has them."""
        self._linears = numpy.array(linears)
        weights = (original.get(name + ".weight").to(dtype).contiguous() for name in linears)
        found = [digests(weight.view(torch.uint8).numpy()) for weight in weights]
        self._sizes = numpy.array([len(part) for part in found])
        self._linear = numpy.repeat(numpy.arange(len(found)), self._sizes)
        self._number = numpy.concatenate([numpy.arange(len(part)) for part in found])
        unsorted = numpy.concatenate(found)
        self._order = numpy.argsort(unsorted, kind="stable")
        self._digests = unsorted[self._order]

    def find(self, rows: numpy.ndarray) -> tuple[list[str], torch.Tensor] | None:
        """Linears, and of each row its number in all of these, one after the other; None if there is a row that none of them has. rows:
        bytes. Equal ones are taken in turn, from linears that give others too, if there are any."""
        wanted = digests(rows)
        first, end = (numpy.searchsorted(self._digests, wanted, side) for side in ("left", "right"))
        if not (end > first).all():
            return None
        place, taken = self._order[first], Counter()
        sure = numpy.unique(self._linear[place[end == first + 1]])
        for row in numpy.flatnonzero(end > first + 1):
            same = self._order[first[row] : end[row]]
            likely = same[numpy.isin(self._linear[same], sure)]
            likely = likely if len(likely) else same
            place[row] = likely[taken[first[row]] % len(likely)]
            taken[first[row]] += 1
        used, index = numpy.unique(self._linear[place], return_inverse=True)
        starts = numpy.cumsum(self._sizes[used]) - self._sizes[used]
        return self._linears[used].tolist(), torch.from_numpy(starts[index] + self._number[place])


def digests(rows: numpy.ndarray) -> numpy.ndarray:
    """Of each row of bytes 64 bits, all but unique to it."""
    return numpy.frombuffer(b"".join(hashlib.blake2b(row, digest_size=8).digest() for row in rows), numpy.uint64)


def bytes_of(data: numpy.ndarray) -> numpy.ndarray:
    """The rows of a tensor's data, as bytes."""
    return data.reshape(-1, data.shape[-1]).view(numpy.uint8)


def sources_of(checkpoint: Checkpoint, base: Path, template: gguf.GGUFReader) -> dict[str, Source]:
    """What becomes of the tensors of the template; those that are not here stay.

    Raises InputError for what GGUF cannot hold, and if the template or `base` is another model's.
    """
    network, original = split_network(base), Checkpoint.open(base)
    use_model_names(original, network)
    quantized = sizes_of(checkpoint, network, base)
    embeddings, head = (path_in(network, module) for module in (network.get_input_embeddings(), network.get_output_embeddings()))
    tied = network.config.get_text_config().tie_word_embeddings
    check_alike(checkpoint, original, {embeddings + ".weight", head + ".weight"})
    linears = [name for name, module in network.named_modules() if isinstance(module, nn.Linear) and name != head]
    sizes = {name: original.shapes[name + ".weight"] for name in (embeddings, head, *linears) if name + ".weight" in original}
    if unknown := [name for name in (embeddings, *quantized) if name not in sizes and name != head]:
        raise InputError(f"{base} has no {unknown[0]}.weight: what is stored in another way cannot be exported")
    candidates = {EMBEDDINGS: [embeddings]}
    candidates[HEAD] = [head] if head in sizes and checkpoint.holds(head + ".weight") else [embeddings]
    for name in linears:
        if name in sizes:
            candidates.setdefault(layer_of(name, r"\."), []).append(name)
    sources, places = {}, {}
    for tensor in tqdm(matrices(template), desc="comparing", unit="tensor", ncols=80, leave=False, disable=None):
        key = tensor.name if tensor.name in candidates else layer_of(tensor.name, r"^blk\.")
        if key not in candidates:
            continue
        kind = key, tensor.tensor_type
        if kind not in places:
            places = {kind: Rows(original, candidates[key], PLAIN[tensor.tensor_type])}  # a layer's at a time
        found = places[kind].find(bytes_of(tensor.data))
        if found and (source := source_of(checkpoint, sizes, tensor, *found)):
            sources[tensor.name] = source
    ends = {embeddings} if tied else {embeddings, head}
    check_complete(sources, {name: rows for name, (rows, _) in quantized.items() if name not in (embeddings, head)}, ends)
    return sources


def layer_of(name: str, before: str) -> str | None:
    """The number of a layer, which stands in `name` behind `before`."""
    found = re.search(before + r"(\d+)\.", name)
    return found and found[1]


def matrices(template: gguf.GGUFReader) -> list[gguf.ReaderTensor]:
    """The tensors of more than one dimension, but for the few in float32 of a file in 16 bits."""
    found = [tensor for tensor in template.tensors if len(tensor.shape) > 1]
    if quantized := [tensor for tensor in found if tensor.tensor_type not in PLAIN]:
        raise InputError(f"{quantized[0].name} of the template is in {quantized[0].tensor_type.name}: {IN_16_BITS}")
    short = [tensor for tensor in found if tensor.tensor_type != Type.F32]
    return short or found


def check_alike(checkpoint: Checkpoint, original: Checkpoint, own: set[str]) -> None:
    """Raise InputError unless what the template keeps is in the quantized model as it is in the original. own: what it does not keep."""
    for name in others(checkpoint):
        if name in own or checkpoint.is_filler(name):
            continue
        mine, theirs = checkpoint.get(name), original.get(name) if name in original else None
        if theirs is None or mine.shape != theirs.shape or not torch.equal(mine, theirs.to(mine.dtype)):
            raise InputError(
                f"{name} is not what the original has: give --base the model that was quantized (AWQ's own tool changes norms: what it has "
                "made cannot be exported)"
            )


def source_of(
    checkpoint: Checkpoint, sizes: dict[str, tuple[int, int]], tensor: gguf.ReaderTensor, linears: list[str], rows: torch.Tensor
) -> Source | None:
    """The source of a tensor whose rows Rows.find has found; None if it stays. Raises InputError if its linears cannot be one tensor."""
    quantized = [linear for linear in linears if checkpoint.is_quantized(linear)]
    if not quantized:
        if tensor.name not in (EMBEDDINGS, HEAD):
            return None
        smaller = Type.Q8_0 if tensor.shape[0] % 32 == 0 else tensor.tensor_type
        return Source({linear: sizes[linear] for linear in linears}, rows, smaller, None)
    if len(quantized) < len(linears):
        left = min(set(linears) - set(quantized))
        raise InputError(f"{tensor.name} of the template holds {quantized[0]} and {left}, which is not quantized: quantize both or neither")
    if any(linear + ZERO not in checkpoint for linear in linears):
        raise InputError(f"gguf cannot hold free levels for each row ({linears[0]}): quantize with --grid affine")
    zeros = [checkpoint.get(linear + ZERO) for linear in linears]
    bits = common(checkpoint.bits_of(linear) for linear in linears)
    columns = common(sizes[linear][1] // zero.shape[1] for linear, zero in zip(linears, zeros, strict=True))
    if bits is None or columns is None:
        raise InputError(f"{tensor.name} of the template holds linears of several widths or sizes of groups: quantize them alike")
    symmetric = all((zero == 2 ** (bits - 1)).all() for zero in zeros)
    if not (kind := type_of(bits, columns, symmetric)):
        points = "" if symmetric else " and a zero point"
        raise InputError(f"gguf cannot hold {bits} bits with a scale{points} for {columns} columns ({linears[0]}): {REMEDIES[bits]}")
    return Source({linear: sizes[linear] for linear in linears}, rows, kind, bits)


def check_complete(sources: dict[str, Source], quantized: dict[str, int], ends: set[str]) -> None:
    """Raise InputError unless all rows of the `quantized` linears of layers have a place in the template, and the `ends`, embeddings and a
    head of its own, have one there."""
    left, found = {linear: torch.ones(rows, dtype=torch.bool) for linear, rows in quantized.items()}, set()
    for source in sources.values():
        found |= set(source.linears)
        rows = [size[0] for size in source.linears.values()]
        used = torch.zeros(sum(rows), dtype=torch.bool).index_fill_(0, source.rows, True)
        for linear, its in zip(source.linears, used.split(rows), strict=True):
            if linear in left:
                left[linear] &= ~its
    if missing := [*(ends - found), *(linear for linear, rows in left.items() if rows.any())]:
        raise InputError(
            f"the template has no tensor with the rows of {missing[0]}.weight: make it of the model that was quantized, or, if "
            "llama.cpp stores other numbers than this family does, quantize without that linear (--skip)"
        )


# --- the file --------------------------------------------------------------------------------------------------


def export(checkpoint: Checkpoint, base: Path, template: Path, out: Path, overwrite: bool = False) -> Counter:
    """Write the quantized `checkpoint` to the file `out`. Returns how many tensors have which type.

    base: the unquantized model's folder; template: the 16-bit GGUF file that llama.cpp made of it. Raises InputError, before anything is
    written, for what GGUF cannot hold.
    """
    check_output(out, overwrite, "--out", gguf=True)
    if out.resolve() == template.resolve():
        raise InputError(f"--out is {out}, which is the template: give another name")
    reader = open_template(template)
    sources = sources_of(checkpoint, base, reader)
    needed = int(1.2 * checkpoint.file_bytes())
    writer = ModelWriter(out, overwrite, needed // 2, flag="--out", gguf=True)  # it asks for twice as much: parts, which are not made here
    try:
        file = writer.folder / "merged"
        write(file, checkpoint, reader, sources)
        verify(gguf.GGUFReader(file), checkpoint, reader, sources)
        checkpoint.check_unchanged()
        writer.publish()
    finally:
        writer.close()
    return Counter(source.type.name for source in sources.values())


def open_template(file: Path) -> gguf.GGUFReader:
    try:
        reader = gguf.GGUFReader(file)
        reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
    except (OSError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise InputError(f"--template: {file} is no GGUF file ({type(error).__name__}: {error}): {IN_16_BITS}") from None
    split = reader.fields.get(gguf.Keys.Split.LLM_KV_SPLIT_COUNT)
    if split and split.contents() > 1:
        raise InputError(f"--template: {file} is one of several files: join them with llama-gguf-split --merge, of llama.cpp")
    return reader


def write(file: Path, checkpoint: Checkpoint, template: gguf.GGUFReader, sources: dict[str, Source]) -> None:
    """The template with other tensors, a tensor at a time, and what it says of their types."""
    writer = gguf.GGUFWriter(file, template.fields[gguf.Keys.General.ARCHITECTURE].contents())
    for name, field in said(template).items():
        writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    kinds = Counter(source.type for source in sources.values() if source.bits)
    writer.add_file_type(FILE_TYPES[kinds.most_common(1)[0][0]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string("leanquant.settings", json.dumps(checkpoint.settings))
    writer.data_alignment = template.alignment
    for tensor in template.tensors:
        kind = sources[tensor.name].type if tensor.name in sources else tensor.tensor_type
        block, size = gguf.GGML_QUANT_SIZES[kind]
        shape = [int(length) for length in reversed(tensor.shape)]
        writer.add_tensor_info(tensor.name, shape, numpy.dtype(numpy.float32), tensor.n_elements // block * size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tqdm(template.tensors, desc="gguf", unit="tensor", ncols=80, leave=False, disable=None):
        source = sources.get(tensor.name)
        parts = [encoded(piece, source.type) for piece in pieces(checkpoint, source)] if source else [tensor.data]
        writer.write_tensor_data(numpy.concatenate(parts))
    for stream in writer.fout:
        stream.flush()
        os.fsync(stream.fileno())
    writer.close()


def said(file: gguf.GGUFReader) -> dict[str, gguf.ReaderField]:
    """What a file says of its model; not of its own form. (Its writer cannot write an empty array.)"""
    form = gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.FILE_TYPE, gguf.Keys.General.QUANTIZATION_VERSION
    return {
        name: field
        for name, field in file.fields.items()
        if name not in form and not name.startswith(("GGUF.", "split.")) and field.types != [gguf.GGUFValueType.ARRAY]
    }


def pieces(checkpoint: Checkpoint, source: Source) -> Iterator[tuple[numpy.ndarray, ...]]:
    """Some rows of a tensor at a time: codes, scale and zero, as `encode` takes them; of one that is not quantized weights, float32."""
    if source.bits is None:
        (linear,) = source.linears
        weight = checkpoint.get(linear + ".weight")
        for rows in source.rows.split(max(1, PIECE_WEIGHTS // weight.shape[1])):
            yield (weight[rows].float().numpy(),)
        return
    whole = PackedLinear.joined([checkpoint.packed(linear, *size) for linear, size in source.linears.items()])
    columns = next(iter(source.linears.values()))[1]
    for rows in source.rows.split(max(1, PIECE_WEIGHTS // columns)):
        packed = whole.rows(rows)
        yield tuple(part.numpy() for part in (unpack_codes(packed.codes, source.bits, columns), *packed.affine(source.bits)))


def encoded(piece: tuple[numpy.ndarray, ...], kind: Type) -> numpy.ndarray:
    return encode(kind, *piece) if len(piece) > 1 else gguf.quants.quantize(*piece, kind)


def verify(written: gguf.GGUFReader, checkpoint: Checkpoint, template: gguf.GGUFReader, sources: dict[str, Source]) -> None:
    """Raise RuntimeError unless the package's own decoder finds in each tensor what the checkpoint or the template has."""
    theirs, mine = said(template), said(written)
    if differs := [name for name in theirs if name not in mine or mine[name].contents() != theirs[name].contents()]:
        raise RuntimeError(f"{differs[0]} does not read back as it was: nothing was kept, please report this")
    pairs = list(zip(written.tensors, template.tensors, strict=True))
    for tensor, old in tqdm(pairs, desc="verifying", unit="tensor", ncols=80, leave=False, disable=None):
        source, start, rows = sources.get(old.name), 0, bytes_of(tensor.data)
        alike = tensor.name == old.name and (tensor.shape == old.shape).all()
        if source is None:
            alike = alike and tensor.tensor_type == old.tensor_type and numpy.array_equal(rows, bytes_of(old.data))
        else:
            for piece in pieces(checkpoint, source):
                found = gguf.quants.dequantize(rows[start : (start := start + len(piece[0]))], tensor.tensor_type)
                alike = alike and is_like(found, piece, tensor.tensor_type)
        if not alike:
            raise RuntimeError(f"{old.name} does not read back as it was: nothing was kept, please report this")


def is_like(found: numpy.ndarray, piece: tuple[numpy.ndarray, ...], kind: Type) -> bool:
    """Are the weights `found` those of the piece? All must be equal, but for what is rounded: to 127 steps of the largest of 32, themselves
    in float16, and the minimum in Q4_1."""
    if len(piece) == 1:
        (wanted,) = piece
        if kind != Type.Q8_0:
            return numpy.array_equal(found, gguf.quants.dequantize(gguf.quants.quantize(wanted, kind), kind))
        blocks = wanted.reshape(-1, 32)
        step = abs(blocks).max(1, keepdims=True) / 127
        slack = step / 2 + 127 * numpy.maximum(step * 2.0**-11, 2.0**-25)  # half a step, and up to 127 of what is rounded off it
        return bool((abs(found.reshape(blocks.shape) - blocks) <= 1.001 * slack).all())
    codes, scale, zero = piece
    grouped, scale, zero = found.reshape(*scale.shape, -1), scale.astype(numpy.float32)[..., None], zero[..., None].astype(numpy.float32)
    slack = abs(scale * zero) * 2.0**-11 if kind == Type.Q4_1 else 0
    return bool((abs(grouped - scale * (codes.reshape(grouped.shape) - zero)) <= slack).all())

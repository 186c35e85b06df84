"""How other software stores a quantized linear: GPTQ, AWQ, compressed-tensors, any-precision; both directions. Tensors only, no files.

Every layout is a class with two halves that share no code, so that one checks the other: `encode`, in torch, and
`decode`, in numpy. Sources are the loaders' own (gptqmodel, vLLM, compressed-tensors, any-precision-llm).
Legend: O rows (out_features), I columns (in_features), G groups, b bits; words are int32, little-endian.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy
import torch

from .errors import InputError
from .packing import ANY_PRECISION

PIECE = 2**22  # codes handled at a time: the temporaries take some 16 bytes each


class Linear(NamedTuple):
    """A quantized linear, unpacked: codes uint8 [O, I], and grid [O, K], or scale fp16 [O, G] with zero uint8 [O, G].

    The weight is grid[code], or scale (code - zero).
    """

    codes: torch.Tensor
    grid: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None


@dataclass(frozen=True)
class Model:
    """What is true of all quantized linears of a model; None where they differ. skipped: linears that are not quantized."""

    bits: int | None
    groupsize: int | None  # -1: whole rows
    uniform: bool | None  # scale and zero, not free levels
    symmetric: bool  # every zero is 2**(bits-1)
    lowest_zero: int
    linears: list[str]
    skipped: list[str]
    mixture: bool = False  # of experts
    vocabulary: bool = False  # embeddings or head are among them


class Layout:
    """One layout. Subclasses say what it takes, how a linear is stored, and what config.json says."""

    name: str
    dtype = torch.float32  # in which weights are what they were; float16 where levels are stored in it
    bits: tuple[int, ...] = (4, 3, 2)
    groupsizes: tuple[int, ...] | None = None  # that its readers know, besides whole rows; None: any
    uniform = True

    def check(self, model: Model) -> None:
        """Raise InputError if this layout, or every reader of it, cannot hold such a model."""
        if None in (model.bits, model.groupsize, model.uniform):
            what = "widths" if model.bits is None else "grids" if model.uniform is None else "sizes of groups"
            raise InputError(f"the model has linears of several {what}, and {self.name} is one for all: only dense holds it")
        if model.uniform != self.uniform:
            kind, remedy = ("free levels", "--grid affine") if self.uniform else ("a scale and zero", "--grid nonuniform")
            others = "any-precision" if self.uniform else "awq, gptq, gptq_v2, compressed-tensors"
            raise InputError(f"{self.name} cannot hold {kind} for each row: quantize with {remedy}, or export to {others} or dense")
        if model.bits not in self.bits:
            raise InputError(f"{self.name} holds {' or '.join(map(str, self.bits))} bits, not {model.bits}: export to another format")
        if self.groupsizes and model.groupsize not in (-1, *self.groupsizes):
            sizes = ", ".join(map(str, self.groupsizes))
            raise InputError(f"readers of {self.name} know whole rows and groups of {sizes}, not of {model.groupsize}")

    def check_size(self, linear: str, rows: int, columns: int, bits: int) -> None:
        """Raise InputError if a linear of this size cannot be stored."""

    def adapted(self, model: Model, sizes: dict[str, tuple[int, int]]) -> Model:
        """The model as it is stored, if not as it is: in groups that share what its rows have, say. sizes: O and I of each linear."""
        return model

    def encode(self, linear: Linear, model: Model) -> dict[str, torch.Tensor]:
        """The tensors of a linear of the adapted `model`, by the suffix of their names."""
        raise NotImplementedError

    def decode(self, tensors: dict[str, torch.Tensor], bits: int, rows: int, columns: int) -> Linear:
        """Invert `encode`."""
        raise NotImplementedError

    def config(self, model: Model, version: str) -> dict:
        """What is put into config.json."""
        raise NotImplementedError

    def weights(self, tensors: dict[str, torch.Tensor], bits: int, rows: int, columns: int, step: int) -> Iterator[torch.Tensor]:
        """What a reader rebuilds of a stored linear: float32 [O, I], in pieces of `step` rows."""
        found = self.decode(tensors, bits, rows, columns)
        for start in range(0, rows, step):
            yield weight_of(Linear(*(part if part is None else part[start : start + step] for part in found)))


def weight_of(linear: Linear) -> torch.Tensor:
    """The weight, float32 [O, I]."""
    codes = linear.codes.numpy()
    if linear.grid is not None:
        return torch.from_numpy(numpy.take_along_axis(linear.grid.float().numpy(), codes.astype(numpy.int64), 1))
    grouped = codes.reshape(len(codes), linear.scale.shape[1], -1).astype(numpy.float32)
    scale, zero = (part.float().numpy()[:, :, None] for part in (linear.scale, linear.zero))
    return torch.from_numpy((scale * (grouped - zero)).reshape(codes.shape))


class Stored(Layout):
    """Layouts with tensors of their own for a linear, which are read here too."""

    suffixes: dict[str, tuple[str, ...]]  # of the tensors' names, with their dtypes in the file
    required: tuple[str, ...]
    dimensions: dict[str, int] = {}  # of a tensor that is no matrix

    def measure(self, linear: str, shapes: dict[str, tuple[int, ...]], bits: int, groupsize: int) -> tuple[int, int, int]:
        """(O, I, G) from the shapes of a linear's tensors, by suffix (of weight_shape the two numbers in it).

        Raises InputError if they do not fit together.
        """
        raise NotImplementedError

    def decode_codes(self, tensors: dict[str, torch.Tensor], bits: int, rows: int, columns: int) -> torch.Tensor:
        raise NotImplementedError


class Affine(Stored):
    """Layouts of scale and zero."""

    def decode_scale(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        raise NotImplementedError

    def decode_zero(self, tensors: dict[str, torch.Tensor], bits: int, rows: int) -> torch.Tensor:
        raise NotImplementedError

    def decode(self, tensors: dict[str, torch.Tensor], bits: int, rows: int, columns: int) -> Linear:
        codes = self.decode_codes(tensors, bits, rows, columns)
        return Linear(codes, None, self.decode_scale(tensors), self.decode_zero(tensors, bits, rows))


# --- GPTQ ------------------------------------------------------------------------------------------------------


class GPTQ(Affine):
    """qweight [I b / 32, O] packed along I, qzeros [G, O b / 32] packed along O, scales [G, O], g_idx [I]; dense bit streams.

    `gptq`, version 1, stores zero - 1, which a zero of 0 does not survive.
    """

    name, stored_zero = "gptq", -1
    groupsizes = (16, 32, 64, 128, 256, 512, 1024)
    suffixes = {".qweight": ("I32",), ".qzeros": ("I32",), ".scales": ("F16", "BF16"), ".g_idx": ("I32",)}
    required = (".qweight", ".qzeros", ".scales")
    dimensions = {".g_idx": 1}

    def check(self, model: Model) -> None:
        super().check(model)
        if self.stored_zero and model.lowest_zero < -self.stored_zero:
            raise InputError("gptq cannot hold zero points of 0, which this model has: export to gptq_v2, or quantize with --sym")

    def check_size(self, linear: str, rows: int, columns: int, bits: int) -> None:
        if rows * bits % 32 or columns * bits % 32:
            raise InputError(f"{linear} is {rows} x {columns}, which {bits}-bit {self.name} cannot hold in words of 32 bits")

    def adapted(self, model: Model, sizes: dict[str, tuple[int, int]]) -> Model:
        """gptqmodel's CPU kernel for whole rows of 4 bits takes every zero point for 8 (7.6): such rows become equal groups."""
        if model.bits != 4 or model.symmetric or model.groupsize != -1:
            return model
        fitting = [size for size in (128, 64, 32, 16) if all(columns % size == 0 for _, columns in sizes.values())]
        return replace(model, groupsize=fitting[0]) if fitting else model

    def encode(self, linear: Linear, model: Model) -> dict[str, torch.Tensor]:
        columns = linear.codes.shape[1]
        groups = 1 if model.groupsize == -1 else columns // model.groupsize
        scale, zero = (t.repeat_interleave(groups // t.shape[1], 1).T.contiguous() for t in (linear.scale, linear.zero))
        zero = zero + self.stored_zero
        return {
            ".qweight": pack_words(linear.codes, model.bits).T.contiguous(),
            ".qzeros": pack_words(zero, model.bits),
            ".scales": scale,
            ".g_idx": torch.arange(columns, dtype=torch.int32) // (columns // groups),
        }

    def config(self, model: Model, version: str) -> dict:
        settings = {
            "quant_method": "gptq",
            "bits": model.bits,
            "group_size": model.groupsize,
            "desc_act": False,  # codes lie in the order of the columns, whatever the order in which they were found
            "sym": model.symmetric,
            "lm_head": False,
            "checkpoint_format": self.name,
            "format": self.name,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"leanquant:{version}"]},
        }
        inside = [name for name in model.skipped if "." in name]
        if inside:  # vLLM and GPTQModel read the one, transformers the other
            settings["dynamic"] = {f"-:^{name.replace('.', chr(92) + '.')}$": {} for name in inside}
            settings["modules_in_block_to_quantize"] = [model.linears]
        return {"quantization_config": settings}

    def measure(self, linear, shapes, bits, groupsize):
        words, rows = shapes[".qweight"]
        columns, groups = words * 32 // bits, shapes[".scales"][0]
        _agree(linear, ".qweight", shapes[".qweight"], (columns * bits / 32, rows))
        _agree(linear, ".scales", shapes[".scales"], (columns / groupsize if groupsize != -1 else 1, rows))
        _agree(linear, ".qzeros", shapes[".qzeros"], (groups, math.ceil(rows * bits / 32)))
        _agree(linear, ".g_idx", shapes.get(".g_idx", (columns,)), (columns,))
        return rows, columns, groups

    def decode_codes(self, tensors, bits, rows, columns):
        return unpack_words(tensors[".qweight"].T, bits, columns)

    def decode_scale(self, tensors):
        return tensors[".scales"].T.contiguous()

    def decode_zero(self, tensors, bits, rows):
        stored = unpack_words(tensors[".qzeros"], bits, rows).T
        return (stored.int() - self.stored_zero).bitwise_and(2**bits - 1).to(torch.uint8).contiguous()


class GPTQv2(GPTQ):
    """The same with the zero as it is."""

    name, stored_zero = "gptq_v2", 0

    def check(self, model: Model) -> None:
        super().check(model)
        if model.mixture:  # transformers leaves fused experts at random, vLLM knows version 1 alone
            raise InputError("nothing reads mixtures of experts in gptq_v2: export to awq, compressed-tensors or dense")


# --- AWQ -------------------------------------------------------------------------------------------------------


class AWQ(Affine):
    """qweight [I, O / 8] and qzeros [G, O / 8], both packed along O, scales [G, O]; "gemm": nibbles hold elements 0 2 4 6 1 3 5 7."""

    name, bits = "awq", (4,)
    groupsizes = (16, 32, 64, 128)
    suffixes = {".qweight": ("I32",), ".qzeros": ("I32",), ".scales": ("F16", "BF16")}
    required = (".qweight", ".qzeros", ".scales")

    def check_size(self, linear: str, rows: int, columns: int, bits: int) -> None:
        if rows % 8:
            raise InputError(f"{linear} has {rows} outputs, which awq cannot hold in words of 8 codes")

    def encode(self, linear: Linear, model: Model) -> dict[str, torch.Tensor]:
        interleaved = [0, 2, 4, 6, 1, 3, 5, 7]
        words = lambda values: pack_words(values.unflatten(1, (-1, 8))[..., interleaved].flatten(1), 4)  # noqa: E731
        return {
            ".qweight": words(linear.codes.T),
            ".qzeros": words(linear.zero.T),
            ".scales": linear.scale.T.contiguous(),
        }

    def config(self, model: Model, version: str) -> dict:
        settings = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": model.groupsize,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": model.skipped,
        }
        return {"quantization_config": settings}

    def measure(self, linear, shapes, bits, groupsize):
        columns, words = shapes[".qweight"]
        rows, groups = 8 * words, shapes[".scales"][0]
        _agree(linear, ".scales", shapes[".scales"], (columns / groupsize if groupsize != -1 else 1, rows))
        _agree(linear, ".qzeros", shapes[".qzeros"], (groups, words))
        return rows, columns, groups

    @staticmethod
    def _nibbles(words: torch.Tensor) -> torch.Tensor:
        """[N, O / 8] -> uint8 [O, N]: element k of a word is shifted by 4 times 0 4 1 5 2 6 3 7, in turn."""
        unsigned = words.contiguous().numpy().view(numpy.uint32)
        elements = [(unsigned >> shift & 15).astype(numpy.uint8) for shift in (0, 16, 4, 20, 8, 24, 12, 28)]
        return torch.from_numpy(numpy.stack(elements, 2).reshape(len(unsigned), -1).T.copy())

    def decode_codes(self, tensors, bits, rows, columns):
        return self._nibbles(tensors[".qweight"])

    def decode_scale(self, tensors):
        return tensors[".scales"].T.contiguous()

    def decode_zero(self, tensors, bits, rows):
        return self._nibbles(tensors[".qzeros"])


# --- compressed-tensors ----------------------------------------------------------------------------------------


class CompressedTensors(Affine):
    """weight_packed [O, I b / 32] packed along I, weight_scale [O, G], weight_zero_point [O b / 32, G] packed along O, weight_shape [2].

    "pack-quantized": dense bit streams; a symmetric model has no zero points.
    """

    name = "compressed-tensors"
    suffixes = {
        ".weight_packed": ("I32",),
        ".weight_scale": ("F16", "BF16", "F32"),
        ".weight_zero_point": ("I32",),
        ".weight_shape": ("I64", "I32"),
        ".weight_g_idx": ("I32",),
    }
    required = (".weight_packed", ".weight_scale")
    dimensions = {".weight_shape": 1, ".weight_g_idx": 1}

    def encode(self, linear: Linear, model: Model) -> dict[str, torch.Tensor]:
        tensors = {
            ".weight_packed": pack_words(linear.codes, model.bits),
            ".weight_scale": linear.scale.contiguous(),
            ".weight_shape": torch.tensor(linear.codes.shape, dtype=torch.int64),
        }
        if not model.symmetric:
            tensors[".weight_zero_point"] = pack_words(linear.zero.T.contiguous(), model.bits).T.contiguous()
        return tensors

    def config(self, model: Model, version: str) -> dict:
        weights = {
            "num_bits": model.bits,
            "type": "int",
            "symmetric": model.symmetric,
            "strategy": "channel" if model.groupsize == -1 else "group",
            "group_size": None if model.groupsize == -1 else model.groupsize,
            "dynamic": False,
            "actorder": None,
            "zp_dtype": None if model.symmetric else "torch.int8",
        }
        settings = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": model.skipped,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        }
        if not model.symmetric:  # compressed-tensors 0.18 to 0.20 give packed zero points a wrong shape, unless weights are rebuilt at load
            settings["dequantize"] = True
        return {"quantization_config": settings}

    def measure(self, linear, shapes, bits, groupsize):
        rows, words = shapes[".weight_packed"]
        groups = shapes[".weight_scale"][1]
        stated = shapes.get(".weight_shape", (rows, words * 32 // bits if groupsize == -1 else groups * groupsize))
        if len(stated) != 2:
            raise InputError(f"{linear}.weight_shape holds {len(stated)} numbers, not 2: the file is damaged, get it again")
        _agree(linear, ".weight_packed", shapes[".weight_packed"], (stated[0], math.ceil(stated[1] * bits / 32)))
        rows, columns = stated
        _agree(linear, ".weight_scale", shapes[".weight_scale"], (rows, 1 if groupsize == -1 else columns / groupsize))
        wanted = (math.ceil(rows * bits / 32), groups)
        _agree(linear, ".weight_zero_point", shapes.get(".weight_zero_point", wanted), wanted)
        return rows, columns, groups

    def decode_codes(self, tensors, bits, rows, columns):
        return unpack_words(tensors[".weight_packed"], bits, columns)

    def decode_scale(self, tensors):
        return tensors[".weight_scale"]

    def decode_zero(self, tensors, bits, rows):
        if ".weight_zero_point" not in tensors:
            return torch.full_like(tensors[".weight_scale"], 2 ** (bits - 1), dtype=torch.uint8)
        return unpack_words(tensors[".weight_zero_point"].T, bits, rows).T.contiguous()


def _agree(linear: str, suffix: str, shape: tuple[int, ...], wanted: tuple[float, ...]) -> None:
    if tuple(shape) != wanted:
        expected = ", ".join(f"{size:g}" for size in wanted)
        raise InputError(f"{linear}{suffix} is {list(shape)}, but its config.json and other tensors want [{expected}]: get the files again")


# --- any-precision ---------------------------------------------------------------------------------------------


class AnyPrecision(Stored):
    """qweight int32 [b, O, I / 32]: bit planes, the highest first; lut{b} fp16 [O, 2**b]: the levels of each row.

    Words are laid out for the threads of its kernels. A plane's bytes (weight 8 i in the highest bit of byte i) are taken by
    blocks of 128, the last of which may be shorter: of a block of 4 T bytes, word t holds bytes t, T + t, 2 T + t, 3 T + t, the first
    in its highest bits.
    """

    name, uniform, dtype = "any-precision", False, torch.float16
    suffixes = {".qweight": ("I32",), **{f".lut{bits}": ("F16",) for bits in Layout.bits}}
    required = (".qweight",)
    dimensions = {".qweight": 3}

    def check_size(self, linear: str, rows: int, columns: int, bits: int) -> None:
        if columns % 32:
            raise InputError(f"{linear} has {columns} inputs, which any-precision cannot hold in words of 32 bits")

    def encode(self, linear: Linear, model: Model) -> dict[str, torch.Tensor]:
        (O, I), bits = linear.codes.shape, model.bits
        qweight = torch.empty(bits, O, I // 32, dtype=torch.int32)
        for plane in range(bits):
            ones = linear.codes >> (bits - 1 - plane) & 1
            for start in range(0, I, 1024):
                block = ones[:, start : start + 1024]
                threads = block.shape[1] // 32
                by_thread = block.reshape(O, 4, threads, 8).transpose(1, 2).reshape(O, threads, 32)
                qweight[plane, :, start // 32 : start // 32 + threads] = pack_words(by_thread.flip(2).flatten(1), 1)
        return {".qweight": qweight, f".lut{bits}": linear.grid.half()}

    def measure(self, linear, shapes, bits, groupsize):
        _, rows, words = shapes[".qweight"]
        if f".lut{bits}" not in shapes:
            raise InputError(f"the file has no tensor {linear}.lut{bits}, which its config.json wants: get the files again")
        _agree(linear, ".qweight", shapes[".qweight"], (bits, rows, words))
        _agree(linear, f".lut{bits}", shapes[f".lut{bits}"], (rows, 2**bits))
        return rows, 32 * words, 1

    def decode_codes(self, tensors, bits, rows, columns):
        codes = numpy.zeros((rows, columns), numpy.uint8)
        for plane in tensors[".qweight"].numpy():
            stored = plane.view(numpy.uint8).reshape(rows, -1)
            ordered = numpy.concatenate([_unshuffled(stored[:, i : i + 128]) for i in range(0, stored.shape[1], 128)], 1)
            codes = codes << 1 | numpy.unpackbits(ordered, axis=1)
        return torch.from_numpy(codes)

    def decode_grid(self, tensors: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
        return tensors[f".lut{bits}"]

    def decode(self, tensors: dict[str, torch.Tensor], bits: int, rows: int, columns: int) -> Linear:
        return Linear(self.decode_codes(tensors, bits, rows, columns), self.decode_grid(tensors, bits))

    def config(self, model: Model, version: str) -> dict:
        layers = [name.split(".") for name in model.linears]
        at = next(i for i, part in enumerate(layers[0]) if part.isdigit())
        architecture = {
            "module_names": list(dict.fromkeys(".".join(name[at + 1 :]) for name in layers)),
            "model_name": ".".join(layers[0][: at - 1]),
            "layers_name": layers[0][at - 1],
        }
        return {ANY_PRECISION: {"seed_precision": model.bits, "parent_precision": model.bits, "arch_config": architecture}}


def _unshuffled(block: numpy.ndarray) -> numpy.ndarray:
    """The bytes of a plane [O, 4 T] in the order of the weights, from the bytes of T words as they lie in memory."""
    threads = block.shape[1] // 4
    p = numpy.arange(block.shape[1])
    return block[:, 4 * (p % threads) + (3 - p // threads)]


# --- words -----------------------------------------------------------------------------------------------------


def pack_words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Words [N, ceil(n bits / 32)] of a dense bit stream of `values` uint8 [N, n] below 2**bits, the first in the lowest bits."""
    count = values.shape[1]
    values = torch.nn.functional.pad(values, (0, -count % 32))
    step = max(1, PIECE // values.shape[1])
    return torch.cat([_pack(rows, bits) for rows in values.split(step)])[:, : math.ceil(count * bits / 32)].contiguous()


def _pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Eight values make `bits` bytes, the lowest of a word's four."""
    eights = values.reshape(len(values), -1, 8).int()
    words = (eights << bits * torch.arange(8, dtype=torch.int32)).sum(2, dtype=torch.int32)
    return words.unsqueeze(2).view(torch.uint8)[..., :bits].flatten(1).contiguous().view(torch.int32)


def unpack_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` values uint8 [N, count] of the bit stream in each row of `words` [N, n]."""
    found = numpy.empty((len(words), count), numpy.uint8)
    step = max(1, PIECE // max(1, count))
    for start in range(0, len(words), step):
        piece = numpy.ascontiguousarray(words[start : start + step].numpy())
        stream = numpy.unpackbits(piece.view(numpy.uint8), axis=1, bitorder="little")[:, : count * bits]
        planes = stream.reshape(len(piece), count, bits)
        found[start : start + step] = sum(planes[:, :, bit] << bit for bit in range(bits))
    return torch.from_numpy(found)


LAYOUTS: dict[str, Stored] = {layout.name: layout for layout in (AWQ(), GPTQ(), GPTQv2(), CompressedTensors(), AnyPrecision())}

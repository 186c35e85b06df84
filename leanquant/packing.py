"""Bit packing and the safetensors file format, both directions. No model code, no calibration.

A quantized linear `X` is stored as `X.weight_codes` (uint8, packed) with either `X.quant_grid` (fp16/bf16 [O, K],
the levels of each row) or `X.scale` (fp16 [O, G]) and `X.zero` (uint8 [O, G]): level k of group g is
scale (k - zero). Of 8 bits a code is a byte of two digits, h and l, that stand for scale (h - zero) and a sixteenth of
scale (l - zero). Every other tensor stands under its usual name. Metadata is ONE key, `leanquant`, of sorted JSON,
because a header with several keys is written in random order.
Legend: O rows, I columns, K = 2**bits levels, G groups.
"""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from .errors import InputError

FORMAT_VERSION = 1
SUFFIXES = CODES, GRID, SCALE, ZERO = ".weight_codes", ".quant_grid", ".scale", ".zero"
PIECE_WEIGHTS = 2**24  # rebuilt at a time
# The order in which safetensors writes dtypes; within one, tensors are in the order of their names.
DTYPE_ORDER = "U64 I64 F64 F32 U32 I32 BF16 F16 U16 I16 F8_E4M3 F8_E5M2 I8 U8 BOOL".split()
TORCH_DTYPES = {
    **{"U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "U32": torch.uint32, "I32": torch.int32},
    **{"BF16": torch.bfloat16, "F16": torch.float16, "U16": torch.uint16, "I16": torch.int16, "U8": torch.uint8, "I8": torch.int8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool},
}
# What a run keeps in its own folder while it works. (.tmp and letters: a part before safetensors gives it its name.)
WORK_FILE = re.compile(
    r"part-\d+\.safetensors|\.tmp\w{6}|folder|merged(\.\d+\.tmp)?|lock|journal\.(jsonl|safetensors|new)|live-[01]\.bin|kept-[01]-\d+\.bin"
    r"|leanquant-\w+"
)
JOURNAL = "journal.jsonl"  # of them, from which a killed run of llama.py can be taken up again
TUNING = "journal.safetensors"  # and one of scripts/tune.py
# What a folder written here can hold: anything else in it is the user's.
RESULT_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")
CARD = "README.md"  # an exported folder also has this
OLD_CONFIG = "quantize_config.json"  # where older readers of GPTQ look for what config.json says
ANY_PRECISION = "anyprec"  # what config.json says of a quantization lies under this, or
SAYS_QUANTIZED = ("quantization_config", ANY_PRECISION)


# --- codes -----------------------------------------------------------------------------------------------------


def pack_codes(codes: torch.Tensor, bits: int, layout: str = "dense") -> torch.Tensor:
    """Pack uint8 codes [O, I] of 0..2**bits-1 into bytes.

    `dense`: [O, ceil(I bits / 8)], a bit stream, first code in the lowest bits. `nibble`, the published layout:
    [O, ceil(I / 2)], byte j = code[2j] << 4 | code[2j+1], whatever the bits up to 4. Where both take the same room (4 bits,
    or rows of a few columns) it is `nibble`, because readers tell them apart by their width. Codes of 8 bits, 0..255, are bytes.
    """
    if bits == 8:
        return codes
    columns = codes.shape[1]
    if layout == "nibble" or packed_width(columns, bits) == packed_width(columns, bits, "nibble"):
        high, low = _padded(codes, 2).view(len(codes), -1, 2).unbind(2)
        return high << 4 | low
    # 8 codes make `bits` whole bytes.
    groups = _padded(codes, 8).view(len(codes), -1, 8).int()
    words = (groups << (bits * torch.arange(8, dtype=torch.int32, device=codes.device))).sum(2, dtype=torch.int32)
    stream = words.unsqueeze(2) >> (8 * torch.arange(bits, dtype=torch.int32, device=codes.device))
    return (stream & 255).to(torch.uint8).flatten(1)[:, : packed_width(columns, bits)].contiguous()


def unpack_codes(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Invert `pack_codes`: uint8 [O, columns]. The layout is told by the packed width."""
    if bits == 8:
        return packed
    if layout_of(packed.shape[1], bits, columns) == "nibble":
        return torch.stack([packed >> 4, packed & 15], 2).flatten(1)[:, :columns].contiguous()
    stream = _padded(packed, bits).view(len(packed), -1, bits).int()
    words = (stream << (8 * torch.arange(bits, dtype=torch.int32, device=packed.device))).sum(2, dtype=torch.int32)
    codes = words.unsqueeze(2) >> (bits * torch.arange(8, dtype=torch.int32, device=packed.device))
    return (codes & (2**bits - 1)).to(torch.uint8).flatten(1)[:, :columns].contiguous()


def packed_width(columns: int, bits: int, layout: str = "dense") -> int:
    """Bytes a row of `columns` codes takes."""
    return (columns + 1) // 2 if layout == "nibble" and bits < 8 else (columns * bits + 7) // 8


def layout_of(width: int, bits: int, columns: int) -> str:
    """`nibble` or `dense`, from the packed width of a row. Raises InputError if it is neither."""
    if bits < 8 and width == packed_width(columns, bits, "nibble"):
        return "nibble"  # also 4-bit dense, which is the same layout
    if width == packed_width(columns, bits):
        return "dense"
    raise InputError(
        f"codes of {width} bytes a row hold neither {columns} nibbles nor {columns} codes of {bits} bits: "
        "the file does not belong to this base model"
    )


def _padded(rows: torch.Tensor, multiple: int) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % multiple))


def affine_levels(scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """The equally spaced levels scale (k - zero), k = 0..K-1, float32 [..., K]; ascending if the scale is positive."""
    steps = torch.arange(2**bits, device=scale.device, dtype=torch.float32)
    return scale.float().unsqueeze(-1) * (steps - zero.float().unsqueeze(-1))


# --- one linear ------------------------------------------------------------------------------------------------


class PackedLinear(NamedTuple):
    """A quantized linear as stored: codes uint8 [O, width] and either grid [O, K], or scale and zero [O, G]."""

    codes: torch.Tensor
    grid: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None

    def named(self, linear: str) -> dict[str, torch.Tensor]:
        """The tensors as the file names them, for the module path `linear`."""
        tensors = {CODES: self.codes, GRID: self.grid, SCALE: self.scale, ZERO: self.zero}
        return {linear + suffix: t.contiguous() for suffix, t in tensors.items() if t is not None}

    @property
    def stored_levels(self) -> torch.Tensor:
        """The grid, or the scales that levels are made from."""
        return self.scale if self.grid is None else self.grid

    @property
    def groups(self) -> int:
        return self.scale.shape[1] if self.grid is None else 1

    @classmethod
    def joined(cls, parts: Sequence["PackedLinear"]) -> "PackedLinear":
        """One for matrices stacked by rows."""
        return cls(*(None if tensors[0] is None else torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def to(self, device) -> "PackedLinear":
        return PackedLinear(*(None if t is None else t.to(device) for t in self))

    def rows(self, numbers: torch.Tensor) -> "PackedLinear":
        """The rows of these numbers, in their order."""
        return PackedLinear(*(None if t is None else t.index_select(0, numbers) for t in self))

    def split(self, rows: int) -> Iterator["PackedLinear"]:
        """The same, by pieces of so many rows."""
        for start in range(0, len(self.codes), rows):
            yield PackedLinear(*(None if t is None else t[start : start + rows] for t in self))

    def check_values(self, linear: str, bits: int, columns: int) -> None:
        """Raise InputError, naming the tensor of the module path `linear`, for values that no writer of this format writes."""
        for suffix, levels in ((GRID, self.grid), (SCALE, self.scale)):
            if levels is not None and not is_finite(levels):
                raise InputError(f"{linear}{suffix} holds NaN or infinity: the file is damaged, get it again")
        K = 2 ** min(bits, 4)  # of a code, or of a digit
        if self.scale is not None and self.scale.numel() and self.affine(bits)[0].abs().max() * (2**bits - 1) > 65504:
            raise InputError(
                f"{linear}{SCALE} holds {self.scale.abs().max():.4g}, whose levels overflow: the file is damaged, get it again"
            )
        if self.zero is not None and self.zero.numel() and int(self.zero.max()) >= K:
            raise InputError(f"{linear}{ZERO} holds {int(self.zero.max())}, not below {K}: the file is damaged, get it again")
        # Only a nibble can hold more than `bits` bits: its upper ones must be clear.
        excess = (16 - 2**bits) * 17
        if layout_of(self.codes.shape[1], bits, columns) == "nibble" and (self.codes & excess).any():
            raise InputError(f"{linear}{CODES} holds codes that are not below {2**bits}: the file is damaged, get it again")

    def levels(self, bits: int) -> torch.Tensor:
        """Float32 levels [O, G, K] (G = 1 for a grid)."""
        if self.grid is not None:
            return self.grid.float().unsqueeze(1)
        return affine_levels(*self.affine(bits), bits)

    def affine(self, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero of whole codes, [O, G]; scale (k - zero) is level k."""
        return (self.scale.float() / 16, 17 * self.zero) if bits == 8 else (self.scale, self.zero)

    def dequantize(self, bits: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """The weight [O, columns] in `dtype`: levels[codes]. By pieces of rows, as indices take eight bytes a weight."""
        step = max(1, PIECE_WEIGHTS // columns)
        if len(self.codes) <= step:
            return self._rebuilt(bits, columns, dtype)
        weight = torch.empty(len(self.codes), columns, dtype=dtype, device=self.codes.device)
        for part, rows in zip(self.split(step), weight.split(step), strict=True):
            rows.copy_(part._rebuilt(bits, columns, dtype))
        return weight

    def _rebuilt(self, bits: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        levels = self.levels(bits).to(dtype)
        codes = unpack_codes(self.codes, bits, columns).long()
        O, G, _ = levels.shape
        return levels.gather(2, codes.view(O, G, columns // G)).view(O, columns)


def is_finite(tensor: torch.Tensor) -> bool:
    """Does a floating point `tensor` hold neither NaN nor infinity? By pieces: torch's question takes twice its memory."""
    pieces = tensor.reshape(-1).split(2**20)
    # torch cannot ask a float8
    return all(bool(torch.isfinite(piece.float() if piece.itemsize == 1 else piece).all()) for piece in pieces)


# --- files -----------------------------------------------------------------------------------------------------


class Checkpoint:
    """The tensors of a model by name, read one at a time: a safetensors file, several, or a folder of shards."""

    format = "leanquant"  # of what is quantized in it

    def __init__(self, files: Iterable[Path]):
        self.files: dict[str, Path] = {}  # tensor name -> file
        self.offsets: dict[str, int] = {}  # where in the file its bytes begin
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}  # safetensors' names: F16, BF16, U8, ...
        self.stamps: dict[Path, list[int]] = {}  # each file's, when it was opened
        self.settings: dict = {}  # the `leanquant` metadata, if any
        for file in files:
            self._read_header(Path(file))

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """`path` is a .safetensors file or a model folder. Raises InputError for anything unreadable."""
        path = Path(path)
        if os.path.isfile(path):  # which is no error for a name that is too long for a file
            return cls([path])
        if not os.path.isdir(path):
            raise InputError(f"{path} does not exist: give a .safetensors file or a model folder")
        index = path / "model.safetensors.index.json"
        if (path / "model.safetensors").is_file():  # first, as transformers does: an index beside it is of an older model
            checkpoint = cls([path / "model.safetensors"])
        elif index.is_file():
            checkpoint = cls(_shards_of(index))
        elif len(only := [*path.glob("gptq_model-*.safetensors")]) == 1:  # AutoGPTQ's name
            checkpoint = cls(only)
        else:
            pickles = [*path.glob("pytorch_model*.bin"), *path.glob("*.pth"), *path.glob("*.pt")]
            remedy = (
                f"only pickled weights ({pickles[0].name}), which can run code when loaded: convert them once to "
                "safetensors (transformers' save_pretrained does so, for what transformers loads)"
                if pickles
                else "no model.safetensors and no model.safetensors.index.json: is it a model folder?"
            )
            raise InputError(f"{path} holds {remedy}")
        return checkpoint

    def _read_header(self, file: Path) -> None:
        try:
            self.stamps[file] = stamp(file)
            with safe_open(file, "pt") as f:
                header, start = _raw_header(file)
                for name in f.keys():
                    piece = f.get_slice(name)
                    if name in self.files:
                        raise InputError(f"{name} is in {self.files[name].name} and in {file.name}: get the files again")
                    self.files[name], self.shapes[name], self.dtypes[name] = file, tuple(piece.get_shape()), piece.get_dtype()
                    if self.dtypes[name] not in TORCH_DTYPES:
                        raise InputError(f"{name} in {file.name} is {self.dtypes[name]}, a type that cannot be read here")
                    self.offsets[name] = start + header[name]["data_offsets"][0]
                settings = json.loads((f.metadata() or {}).get("leanquant", "null")) or self.settings
        except InputError:
            raise  # it is a ValueError too, and says what is wrong
        except (SafetensorError, OSError, ValueError, KeyError, RecursionError) as error:
            raise InputError(f"{file} is not a complete safetensors file ({error}): download or copy it again") from None
        if not isinstance(settings, dict):
            raise InputError(f"{file}: its leanquant metadata is not a JSON object: download or copy it again")
        self.settings = settings

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def cut(self, stored: str, names: list[str], shape: tuple[int, ...]) -> None:
        """Offer tensor `stored` as pieces of `shape`, one behind the other under `names`, and not under its own name any more."""
        whole, kind, file, offset = self.tensor_bytes(stored), self.dtypes[stored], self.files[stored], self.offsets[stored]
        for entries in (self.files, self.offsets, self.shapes, self.dtypes):
            del entries[stored]
        for number, name in enumerate(names):
            if name in self.files:
                raise InputError(f"{stored} in {file.name} is there a second time, as {name}: get the files again")
            self.files[name], self.offsets[name] = file, offset + number * whole // len(names)
            self.shapes[name], self.dtypes[name] = shape, kind

    def check_unchanged(self) -> None:
        """Raise InputError if a file is not the one that was opened any more."""
        for file, before in self.stamps.items():
            now = stamp(file) if file.is_file() else None
            if now != before:
                raise InputError(f"the model's files were changed while the run read them ({file.name}): put back what was there")

    def get(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """A copy in host memory, of some `rows` or of all. Read, not mapped: a mapped file that cannot be read kills the process."""
        if name not in self.files:
            raise InputError(f"the checkpoint has no tensor {name}: it does not match its config.json")
        shape, first = self.shapes[name], 0
        if rows is not None:
            shape, first = (rows.stop - rows.start, *shape[1:]), rows.start * math.prod(shape[1:])
        tensor = torch.empty(shape, dtype=TORCH_DTYPES[self.dtypes[name]])
        left = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        try:
            with open(self.files[name], "rb", buffering=0) as f:
                f.seek(self.offsets[name] + first * tensor.itemsize)
                while len(left):
                    if not (count := f.readinto(left)):
                        raise OSError("it ends too early")
                    left = left[count:]
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"{name} cannot be read from {self.files[name]} ({reason}): check the disk, or copy the file again") from None
        return tensor

    def read_ahead(self, prefix: str, buffer: int = 2**22) -> None:
        """Bring the tensors whose names begin with `prefix` into the system's cache, which takes no memory from anyone who needs it.
        What cannot be read is left for `get` to name."""
        piece = memoryview(bytearray(buffer))
        for name in [name for name in self.files if name.startswith(prefix)]:
            with contextlib.suppress(OSError), open(self.files[name], "rb", buffering=0) as f:
                f.seek(self.offsets[name])
                left = self.tensor_bytes(name)
                while left > 0 and (count := f.readinto(piece[: min(left, buffer)])):
                    left -= count

    def tensor_bytes(self, name: str) -> int:
        """Bytes tensor `name` takes in its file."""
        return math.prod(self.shapes[name]) * TORCH_DTYPES[self.dtypes[name]].itemsize

    def file_bytes(self) -> int:
        """Bytes all tensors take."""
        return sum(map(self.tensor_bytes, self.shapes))

    def check_finite(self, share: int = 0, shares: int = 1) -> None:
        """Read everything once, or one of several shares, with progress. Raises InputError with the name of a tensor that holds
        NaN or infinity."""
        bar = {"desc": "checking weights", "unit": "tensor", "ncols": 80, "leave": False, "disable": True if share else None}
        for name in tqdm(list(self.files)[share::shares], **bar):
            tensor = self.get(name)
            if tensor.is_floating_point() and not is_finite(tensor):
                raise InputError(f"{self.files[name].name}: tensor {name} holds NaN or infinity; the checkpoint is damaged")

    # A quantized model reads as a plain one through the same three methods.

    def is_quantized(self, linear: str) -> bool:
        return linear + CODES in self

    def holds(self, weight: str) -> bool:
        """Is `weight` there, plain or quantized?"""
        return weight in self or weight.endswith(".weight") and self.is_quantized(weight.removesuffix(".weight"))

    def is_filler(self, name: str) -> bool:
        """Is `name` a tensor that its writer adds, and no model needs? Ours adds none."""
        return False

    @property
    def quantized(self) -> list[str]:
        """Module paths of the quantized linears, and of embeddings."""
        return [name.removesuffix(CODES) for name in self.shapes if name.endswith(CODES)]

    def bits_of(self, linear: str) -> int:
        """Bits of a quantized linear: from its grid's width, or from the settings for an affine one."""
        said = self._said_bits(linear)
        if linear + GRID in self:
            shape = self.shapes[linear + GRID]
            if len(shape) != 2 or shape[1] not in (4, 8, 16):
                raise InputError(f"{linear}{GRID} is {list(shape)}, not 4, 8 or 16 levels for each row: the file is damaged, get it again")
            bits = shape[1].bit_length() - 1
            if said not in (None, bits):
                raise InputError(f"{linear}{GRID} has {shape[1]} levels a row, but the metadata says {said} bits: get the file again")
            return bits
        if type(said) is not int or said not in (2, 3, 4, 8):
            raise InputError(
                f"{linear}{CODES}: an affine file's leanquant metadata, or the config.json beside it, must give its bits, 2, 3, 4 or 8, "
                f"not {said!r}: get the file or the whole folder again"
            )
        return said

    def _said_bits(self, linear: str):
        """What the settings say: `bits`, but for the linears that `bits_for` names."""
        exceptions = self.settings.get("bits_for", {})
        if not isinstance(exceptions, dict):
            raise InputError("the leanquant metadata's bits_for is not a JSON object: download or copy the file again")
        return exceptions.get(linear, self.settings.get("bits"))

    def check_linear(self, linear: str, rows: int, columns: int) -> None:
        """Raise InputError unless the header describes a quantized [rows, columns] under the module path `linear`."""
        wanted = {CODES: ("U8",), GRID: ("F16", "BF16"), SCALE: ("F16",), ZERO: ("U8",)}
        there = {suffix: self.shapes[linear + suffix] for suffix in wanted if linear + suffix in self}
        if set(there) not in ({CODES, GRID}, {CODES, SCALE, ZERO}):
            raise InputError(f"{linear} must have {CODES} and {GRID}, or {SCALE} and {ZERO}, not {' '.join(there)}: get the file again")
        for suffix, shape in there.items():
            if (kind := self.dtypes[linear + suffix]) not in wanted[suffix]:
                raise InputError(f"{linear}{suffix} is {kind}, not {' or '.join(wanted[suffix])}: the file is damaged, get it again")
            if len(shape) != 2 or shape[0] != rows:
                raise InputError(
                    f"{linear}{suffix} is {list(shape)}, but the base model has {rows} rows there: is it the right base model?"
                )
        groups = there.get(SCALE, (rows, 1))[1]
        if there.get(ZERO, (rows, groups))[1] != groups or groups < 1 or columns % groups:
            raise InputError(f"{linear}{SCALE} and {ZERO} do not divide {columns} columns into groups: is it the right base model?")
        try:
            layout_of(there[CODES][1], bits := self.bits_of(linear), columns)
        except InputError as error:
            raise InputError(f"{linear}{CODES}: {error}") from None
        if bits == 8 and groups > 1:
            raise InputError(f"{linear}{SCALE} has {groups} groups, but a row of 8 bits has one scale: the file is damaged, get it again")

    def check_headers(self) -> None:
        """Raise InputError unless every quantized linear's header makes sense by itself, whatever the base model is."""
        for linear in self.quantized:
            shape = self.shapes[linear + CODES]
            if len(shape) != 2 or 0 in shape:
                raise InputError(f"{linear}{CODES} is {list(shape)}, not rows of bytes: the file is damaged, get it again")
            groups = self.shapes.get(linear + SCALE, (0, 1))
            columns = self.weights_of(linear) // shape[0]
            if len(groups) == 2 and groups[1] > 0 and self.settings.get("packing") != "dense":
                columns = columns // groups[1] * groups[1]
            self.check_linear(linear, shape[0], columns)

    def weights_of(self, linear: str) -> int:
        """Weights of a quantized linear, from the header alone: up to a byte's worth too many a row, where rows are padded."""
        (rows, width), bits = self.shapes[linear + CODES], self.bits_of(linear)
        dense = bits == 8 or self.settings.get("packing", "nibble") == "dense"
        return rows * (width * 8 // bits if dense else 2 * width)

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized linears: codes with their levels, or scales and zeros."""
        names = (linear + suffix for linear in self.quantized for suffix in (CODES, GRID, SCALE, ZERO))
        stored = sum(self.tensor_bytes(name) for name in names if name in self)
        return 8 * stored / sum(map(self.weights_of, self.quantized))

    def check_bits(self, bits: int | None, path) -> None:
        """Raise InputError unless this holds quantized linears, of `bits` bits if that is given: for a mixed file, those that it was
        quantized to but for exceptions."""
        held = sorted({self.bits_of(linear) for linear in self.quantized})
        if not held:
            raise InputError(f"{path} holds no quantized weights: it is a plain model, for transformers' AutoModelForCausalLM")
        usual = held if len(held) == 1 else [self.settings.get("bits")]
        if bits is not None and usual != [bits]:
            raise InputError(f"{path} holds {held} bits, not {bits}: correct the bits or leave them out")

    def check_plain_dtypes(self) -> None:
        """Raise InputError unless the tensors that are not quantized are floating point, of one 16-bit kind. The levels are of one too,
        perhaps of the other: they are not rounded again where a model is cast."""
        kinds = {}
        for name, kind in self.dtypes.items():
            if not name.endswith((CODES, SCALE, ZERO)):
                if kind not in ("F16", "BF16", "F32"):
                    raise InputError(f"{name} is {kind}, not F16, BF16 or F32: the file is damaged, get it again")
                kinds.setdefault((kind, name.endswith(GRID)), name)
        for are_levels in (False, True):
            one, other = (kinds.get((kind, are_levels)) for kind in ("F16", "BF16"))
            if one and other:
                raise InputError(f"{one} is F16 and {other} is BF16: the file is damaged, get it again")

    @property
    def stored_dtype(self) -> torch.dtype:
        """The 16-bit type of the model: bfloat16 if most of its tensors are (those of quantized linears aside), else float16."""
        kinds = [kind for name, kind in self.dtypes.items() if not name.endswith(SUFFIXES)]
        return torch.bfloat16 if kinds.count("BF16") > len(kinds) / 2 else torch.float16

    def packed(self, linear: str, rows: int, columns: int) -> PackedLinear:
        """What is stored for a quantized [rows, columns]. Raises InputError for what cannot be one."""
        self.check_linear(linear, rows, columns)
        get = lambda suffix: self.get(linear + suffix) if linear + suffix in self else None  # noqa: E731
        found = PackedLinear(self.get(linear + CODES), get(GRID), get(SCALE), get(ZERO))
        found.check_values(linear, self.bits_of(linear), columns)
        return found

    def packed_shapes(self, linear: str) -> PackedLinear:
        """`packed` on the meta device: shapes and dtypes, nothing read."""
        return PackedLinear(
            *(
                torch.empty(self.shapes[name], dtype=TORCH_DTYPES[self.dtypes[name]], device="meta") if name in self else None
                for name in (linear + suffix for suffix in SUFFIXES)
            )
        )

    def weight(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
        """Tensor `name` in `dtype` on `device`, dequantized there if it is a quantized linear's.

        Raises InputError unless it has `shape` and finite values.
        """
        linear = name.removesuffix(".weight")
        if name not in self and self.is_quantized(linear):
            tensor = self.packed(linear, *shape).to(device).dequantize(self.bits_of(linear), shape[1], dtype)
        else:
            tensor = self.get(name).to(device, dtype)
            if not is_finite(tensor):
                raise InputError(f"{name} holds NaN or infinity, or more than {dtype} can: the file is damaged, or needs another dtype")
        if tensor.shape != torch.Size(shape):
            raise InputError(f"tensor {name} is {list(tensor.shape)} where the config wants {list(shape)}: wrong base model?")
        return tensor


def stamp(file: Path) -> list[int]:
    """Size and time of the last change (ns): what tells that a file was changed."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _shards_of(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if any(Path(name).name != name or len(name) > 255 for name in names):
            raise ValueError("a shard's name is not that of a file beside the index")
        shards = [index.parent / name for name in names]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise InputError(f"{index} is not a readable index: download it again") from None
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise InputError(f"{index.parent} lacks {', '.join(missing)}, named in its index: download the missing shard")
    return shards


# --- writing ---------------------------------------------------------------------------------------------------


def merge_files(parts: Iterable[Path], out: Path, settings: dict | None, metadata: dict[str, str] | None = None) -> None:
    """Join safetensors files into one, streaming: memory stays at one copy buffer. Complete or absent, never partial.

    It grows under a new name beside `out`. `metadata` goes into the header beside the settings.

    The order is safetensors' own (by dtype, then by name), so that the bytes equal those of its save_file.
    """
    entries = []  # (rank of the dtype, name, header entry, file, begin, length)
    for part in parts:
        header, data_start = _raw_header(part)
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                entries.append((DTYPE_ORDER.index(entry["dtype"]), name, entry, part, data_start + begin, end - begin))
    entries.sort(key=lambda e: e[:2])
    header, offset = {}, 0
    if settings is not None:
        header["__metadata__"] = {**(metadata or {}), "leanquant": json.dumps(settings, sort_keys=True)}
    for _, name, entry, _, _, length in entries:
        header[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": [offset, offset + length]}
        offset += length
    blob = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    blob += b" " * (-len(blob) % 8)
    partial = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    with open(partial, "xb") as target:
        target.write(struct.pack("<Q", len(blob)) + blob)
        for _, _, _, part, begin, length in entries:
            _copy_bytes(part, begin, length, target)
        target.flush()
        os.fsync(target.fileno())
    os.replace(partial, out)
    sync_folder(out.parent)


def _raw_header(file: Path) -> tuple[dict, int]:
    with open(file, "rb") as f:
        length = struct.unpack("<Q", f.read(8))[0]
        return json.loads(f.read(length)), 8 + length


def _extents(file: Path) -> list[tuple[int, int]]:
    return [entry["data_offsets"] for name, entry in _raw_header(file)[0].items() if name != "__metadata__"]


def _copy_bytes(source: Path, begin: int, length: int, target, buffer: int = 2**24) -> None:
    with open(source, "rb") as f:
        f.seek(begin)
        while length:
            if not (piece := f.read(min(buffer, length))):
                raise InputError(f"{source} ends too early: it was changed while it was read")
            target.write(piece)
            length -= len(piece)


def part_name(number: int) -> str:
    """Of a part in the working folder of a run."""
    return f"part-{number:05d}.safetensors"


def work_folder(save_path: Path) -> Path:
    """Where the run works that writes `save_path`."""
    save_path = save_path.absolute()
    if save_path.name in ("", ".."):
        raise InputError(f"{save_path} is no name for a result: give one in a folder")
    return save_path.with_name(save_path.name + ".partial")


def waits_there(folder: Path) -> bool:
    """Does a result wait in the working folder `folder` to be published?"""
    return any((folder / name).exists() for name in ("merged", "folder"))


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ModelWriter:
    """Writes a model part by part, then as one .safetensors file or a Hugging Face folder, whichever `save_path` names.

    The parts wait in `<save_path>.partial`, which one run at a time may hold, until `close`; the result appears under its own
    name only when it is complete and synced. What a killed run left there is removed, unless `resume`: then `keep` says what of it
    serves. Without a `save_path` the parts lie in a temporary folder. `flag` is what the user gave `save_path` with. `published`:
    the result is there, and not to be written again. gguf: it is a GGUF file, which the caller makes as `merged` in the working folder.
    """

    def __init__(
        self,
        save_path: Path | None,
        overwrite: bool,
        bytes_needed: int,
        resume: bool = False,
        flag: str = "--save_path",
        published: bool = False,
        gguf: bool = False,
    ):
        self.save_path = save_path = save_path and save_path.absolute()
        self.parts: list[Path] = []
        self._temporary = self._lock = None
        if save_path is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="leanquant-")
            self.folder = Path(self._temporary.name)
        else:
            if not published:
                check_output(save_path, overwrite, flag, gguf)
            self.folder = work_folder(save_path)
            _make_folder(self.folder, flag)
            self._lock = _lock(self.folder, flag)
            if not resume:
                _empty(self.folder, keep=lambda entry: entry.name == "lock")
        self._check_room(bytes_needed * (1 if save_path is None else 2))  # the parts, and the result made of them

    def _check_room(self, needed: int) -> None:
        left = sum(file.stat().st_size for file in self.folder.iterdir())  # by a killed run: it will be used or removed
        free = shutil.disk_usage(self.folder).free + left
        if free < needed:
            where = self.folder.parent
            self.close(keep=left > 0)
            raise InputError(f"{where} has {free / 1e9:.2f} GB free and the run needs {needed / 1e9:.2f} GB: free some or save elsewhere")

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """Write one part, as `save_synced` does."""
        part = self._part(len(self.parts))
        save_synced(tensors, part)
        self.parts.append(part)

    def _part(self, number: int) -> Path:
        return self.folder / part_name(number)

    def keep(self, count: int) -> None:
        """Go on after the first `count` parts of a killed run; all else that it left is removed, but for its journal."""
        self.parts = [self._part(number) for number in range(count)]
        self._leave(self.parts, "live")

    def _leave(self, parts: list[Path], *others: str) -> None:
        """Remove all that lies in the working folder but `parts`, the journal, the lock, and what begins with one of `others`."""
        _empty(self.folder, keep=lambda entry: entry in parts or entry.name.startswith(("journal", "lock", *others)))

    def finish(
        self, settings: dict, base: Path, max_shard_bytes: int = 5 * 10**9, before_publishing: Callable[[], None] = lambda: None
    ) -> Checkpoint:
        """Turn the parts into the result and return a reader of it. `base` is the unquantized model's folder.

        `before_publishing` is called when the result is complete in the working folder; from then on `publish` is all that is left to do.
        """
        if self.save_path is None:
            checkpoint = Checkpoint(self.parts)
            checkpoint.settings = settings
            return checkpoint
        self._leave(self.parts)  # activations: the result needs their room
        if self.save_path.suffix == ".safetensors":
            merge_files(self.parts, self.folder / "merged", settings)
        else:
            sync_folder(self.assemble(base, settings, {"quantization_config": {"quant_method": "leanquant", **settings}}, max_shard_bytes))
        before_publishing()
        self.publish()
        return Checkpoint.open(self.save_path)

    def assemble(
        self, base: Path, settings: dict, config: dict, max_shard_bytes: int = 5 * 10**9, metadata: dict[str, str] | None = None
    ) -> Path:
        """The parts as a folder that `publish` will give its own name: shards, and the files of `base` with `config` in config.json."""
        folder = self.folder / "folder"
        folder.mkdir()
        _write_shards(self.parts, folder, settings, max_shard_bytes, metadata)
        _write_config_files(base, folder, config)
        return folder

    def publish(self) -> None:
        """Give the complete result its own name, in the place of what had it, unless a killed run has done so; the parts go."""
        merged, folder = self.folder / "merged", self.folder / "folder"
        if merged.exists():
            os.replace(merged, self.save_path)
            sync_folder(self.save_path.parent)
        elif folder.exists():
            sync_folder(folder)
            _replace_folder(folder, self.save_path)
        elif not self.save_path.exists():
            raise InputError(f"{self.save_path} is gone, which {self.folder} has finished: start over with --fresh")
        self._leave([])

    def close(self, keep: bool = False) -> None:
        """Remove the parts, unless another run is to go on with them."""
        if self._temporary:
            self._temporary.cleanup()
            return
        with contextlib.suppress(OSError):  # what cannot be removed stays
            if not keep or [entry.name for entry in self.folder.iterdir()] == ["lock"]:
                gone = self.folder.with_name(self.save_path.name + ".finished")
                if gone.exists() and _is_work_folder(gone):  # of a run that was killed here
                    shutil.rmtree(gone)
                os.rename(self.folder, gone)  # at once: a run is under way, or over
                shutil.rmtree(gone)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def check_output(save_path: Path, overwrite: bool, flag: str, gguf: bool = False) -> None:
    """Raise InputError if `save_path`, which `flag` named, must not be written to; `gguf` says that a GGUF file would be."""
    if gguf != (save_path.suffix == ".gguf"):
        remedy = "give a name that ends in .gguf" if gguf else "those are scripts/export.py --to gguf's, give another name"
        raise InputError(f"{flag} is {save_path}, and a GGUF file is {'' if gguf else 'not '}what is written: {remedy}")
    one_file = gguf or save_path.suffix == ".safetensors"
    if not save_path.exists():
        return
    if save_path.is_dir() == one_file:
        raise InputError(f"{save_path} is a {'folder' if one_file else 'file'}: give another {flag}")
    if not overwrite:
        raise InputError(f"{save_path} exists: give another {flag}, or --overwrite to replace it")
    if save_path.is_dir() and any(save_path.iterdir()) and not _is_our_folder(save_path):
        raise InputError(f"{save_path} is a folder with other things in it, which --overwrite will not delete: give another {flag}")


def check_unfinished(save_path: Path, flag: str, own: str | None = None) -> None:
    """Raise InputError if a killed run that may be taken up again has left its work where `save_path` would be made; but for a journal
    called `own`, with which the caller goes on."""
    folder = work_folder(save_path)
    for journal, program in ((JOURNAL, "llama.py"), (TUNING, "scripts/tune.py")):
        if journal != own and (folder / journal).exists():
            raise InputError(
                f"{folder} holds what an unfinished run of {program} has done: let it finish, remove it, or give another {flag}"
            )


def _is_our_folder(folder: Path) -> bool:
    """Whether all of `folder` was written here."""
    try:
        settings = Checkpoint.open(folder).settings
    except InputError:
        return False
    card = (CARD,) if "exported" in settings else ()
    return bool(settings) and all(e.is_file() and (e.suffix in RESULT_SUFFIXES or e.name in card) for e in folder.iterdir())


def _lock(folder: Path, flag: str) -> int:
    """A descriptor that holds the lock of `folder` until it is closed, or the process ends; of a file in it, which network file systems
    lock for all machines."""
    import fcntl  # not everywhere that models are only loaded

    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise InputError(f"another run is working in {folder}: wait for it, or give another {flag}") from None
        raise InputError(f"{folder} cannot be locked ({error.strerror}): give a {flag} on another file system") from None
    lock = folder / "lock"
    if not lock.exists() or lock.stat().st_ino != os.fstat(descriptor).st_ino:  # a run that has just ended has removed it
        os.close(descriptor)
        raise InputError(f"another run was working in {folder} until now: give the command again")
    return descriptor


def _empty(folder: Path, keep: Callable[[Path], bool]) -> None:
    for entry in folder.iterdir():
        if not keep(entry):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _is_work_folder(folder: Path) -> bool:
    return folder.is_dir() and all(WORK_FILE.fullmatch(entry.name) for entry in folder.iterdir())


def _make_folder(folder: Path, flag: str) -> None:
    """Make the folder of the parts, or take the one that a killed run left; anything else is not touched."""
    if folder.exists() and not _is_work_folder(folder):
        raise InputError(f"{folder}, where this run would work, holds other things: move it or give another {flag}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lock").touch()
    except OSError as error:
        raise InputError(f"cannot write to {folder.parent} ({error.strerror}): give another {flag}") from None


def _write_shards(parts: list[Path], folder: Path, settings: dict, max_bytes: int, metadata: dict[str, str] | None) -> None:
    """Merge `parts` into as few shards as `max_bytes` allows, in transformers' naming, with an index if several."""
    batches, size = [[]], 0
    for part in parts:
        if batches[-1] and size + part.stat().st_size > max_bytes:
            batches.append([])
            size = 0
        batches[-1].append(part)
        size += part.stat().st_size
    weight_map = {}
    for number, batch in enumerate(batches, 1):
        name = "model.safetensors" if len(batches) == 1 else f"model-{number:05d}-of-{len(batches):05d}.safetensors"
        merge_files(batch, folder / name, settings, metadata=metadata)
        weight_map |= dict.fromkeys(Checkpoint([folder / name]).shapes, name)
    if len(batches) > 1:
        total = sum(end - begin for part in parts for begin, end in _extents(part))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_synced(folder / "model.safetensors.index.json", (json.dumps(index, indent=2) + "\n").encode())


def _write_config_files(base: Path, folder: Path, changes: dict) -> None:
    """The base's config.json with `changes` in place of its own quantization, and its tokenizer, template and generation files."""
    config = json.loads((base / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in SAYS_QUANTIZED} | changes
    write_synced(folder / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    for file in sorted(base.iterdir()):
        weights = file.suffix == ".safetensors" or file.name.endswith(".index.json")
        if file.is_file() and file.suffix in RESULT_SUFFIXES and not weights and file.name not in ("config.json", OLD_CONFIG):
            write_synced(folder / file.name, file.read_bytes())


def save_synced(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Durably; OSError if the disk does not take it."""
    try:
        save_file(tensors, file, metadata)
    except SafetensorError as error:
        file.unlink(missing_ok=True)
        number = int(found[1]) if (found := re.search(r"os error (\d+)", str(error))) else errno.EIO
        raise OSError(number, os.strerror(number), str(file)) from None
    with open(file, "rb") as f:
        os.fsync(f.fileno())


def write_synced(file: Path, contents: bytes) -> None:
    with open(file, "wb") as f:
        f.write(contents)
        f.flush()
        os.fsync(f.fileno())


def write_json(file: Path, contents: dict) -> None:
    """Whole or not at all: on a disk that is full, `file` keeps what it had."""
    text = json.dumps(contents, indent=2, default=str) + "\n"
    if file.exists() and not file.is_file() or file.absolute().parent == Path("/dev"):  # /dev/stdout, which may be a file
        file.write_text(text)
        return
    file = file.resolve()
    partial = file.with_name(file.name + ".partial")
    try:
        write_synced(partial, text.encode())
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        error.filename = error.filename or str(file)
        raise


def _replace_folder(new: Path, target: Path) -> None:
    """Move `new` to `target`; an older `target` goes only after the new one is in place."""
    if not target.exists():
        os.replace(new, target)
        sync_folder(target.parent)
        return
    old = Path(tempfile.mkdtemp(prefix=target.name + ".old-", dir=target.parent))
    os.replace(target, old)
    try:
        os.replace(new, target)
    except BaseException:
        os.replace(old, target)
        raise
    sync_folder(target.parent)
    shutil.rmtree(old)

"""Read other software's quantized folders as if they were ours: GPTQ, AWQ, compressed-tensors, any-precision with 4, 3 and 2 bits.

A `ForeignCheckpoint` shows a linear's codes, and its levels or scale and zero, under this project's names and decodes them as they are
read, so that whoever reads a Checkpoint reads these too. Layouts are layouts.py's. Not here: 8 bits, floating point, act-order in groups.
"""

import json
from pathlib import Path

import torch

from .errors import InputError
from .layouts import LAYOUTS, AnyPrecision, Stored
from .packing import ANY_PRECISION, CODES, GRID, OLD_CONFIG, SCALE, ZERO, Checkpoint, is_finite, pack_codes, packed_width

METHODS = ("gptq", "awq", "compressed-tensors")  # what config.json calls them
CONFIG_BYTES = 2**24  # no config.json is longer
ITEM = {CODES: "U8", GRID: "F16", SCALE: "F16", ZERO: "U8"}


def open_checkpoint(path: str | Path) -> Checkpoint:
    """What is at `path`, a .safetensors file or a folder, ours or another's. Raises InputError for anything unreadable."""
    checkpoint, config = Checkpoint.open(path), _quantization_config(Path(path))
    if config.get("quant_method") in (*METHODS, AnyPrecision.name):
        return ForeignCheckpoint(list(dict.fromkeys(checkpoint.files.values())), config)
    if config.get("quant_method") == "leanquant":
        checkpoint.settings = checkpoint.settings or {name: value for name, value in config.items() if name != "quant_method"}
    return checkpoint


def _quantization_config(folder: Path) -> dict:
    """What a folder's config.json says of a quantization, or, where it says nothing, AutoGPTQ's own file does; empty if there is none."""
    told = json_of(folder / "config.json")
    config = told.get("quantization_config")
    if config is None and isinstance(widths := told.get(ANY_PRECISION), dict):
        config = widths | {"quant_method": AnyPrecision.name}
    if config is None and (old := json_of(folder / OLD_CONFIG)):
        config = {"quant_method": "gptq"} | old
    return config if isinstance(config, dict) else {}


def json_of(file: Path) -> dict:
    """What is in `file`; nothing if it is no JSON object: who needs it says what is wrong."""
    try:
        found = json.loads(file.read_text()) if file.stat().st_size <= CONFIG_BYTES else None
    except (OSError, ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


class ForeignCheckpoint(Checkpoint):
    """A folder of another format. settings: what its config.json says in this project's words."""

    def __init__(self, files: list[Path], config: dict):
        super().__init__(files)
        self._raw = Checkpoint(files)  # the tensors as they are
        self.layout, bits, groupsize = _layout_of(config)
        self.format = self.layout.name
        self._sizes: dict[str, tuple[int, int, int]] = {}  # linear -> bits, rows, columns
        self._stored: dict[str, dict[str, str]] = {}  # linear -> suffix -> name of its tensor
        for linear in self._linears():
            self._take(linear, bits, groupsize)
        told = {"bits": bits, "groupsize": groupsize, "packing": "dense", "bits_for": {}}
        self.settings = {"method": self.layout.name, **self.settings, **told}  # one that was exported here says more

    def _linears(self) -> list[str]:
        """Module paths of the quantized linears."""
        first = self.layout.required[0]
        found = {name.removesuffix(suffix) for name in self.shapes for suffix in self.layout.suffixes if name.endswith(suffix)}
        for linear in found:
            for suffix in self.layout.required:
                if linear + suffix not in self.shapes:
                    raise InputError(f"the file has no tensor {linear}{suffix}: get it again")
        return [name.removesuffix(first) for name in self.shapes if name.endswith(first)]

    def _take(self, linear: str, bits: int, groupsize: int) -> None:
        """Put the tensors of `linear` out of sight and what they mean in their place."""
        names = {suffix: linear + suffix for suffix in self.layout.suffixes if linear + suffix in self.shapes}
        for suffix, name in names.items():
            if self.dtypes[name] not in (kinds := self.layout.suffixes[suffix]):
                raise InputError(f"{name} is {self.dtypes[name]}, not {' or '.join(kinds)}: the file is damaged, get it again")
            wanted = self.layout.dimensions.get(suffix, 2)
            if len(self.shapes[name]) != wanted or 0 in self.shapes[name]:
                raise InputError(f"{name} is {list(self.shapes[name])}, not of {wanted} dimensions: the file is damaged, get it again")
        shapes = {suffix: self.shapes[name] for suffix, name in names.items()}
        if ".weight_shape" in names:
            shapes[".weight_shape"] = tuple(self._raw.get(names[".weight_shape"]).tolist())
        rows, columns, groups = self.layout.measure(linear, shapes, bits, groupsize)
        self._sizes[linear], self._stored[linear] = (bits, rows, columns), names
        for name in names.values():
            del self.files[name], self.shapes[name], self.dtypes[name]
        grid = {SCALE: (rows, groups), ZERO: (rows, groups)} if self.layout.uniform else {GRID: (rows, 2**bits)}
        shown = {CODES: (rows, packed_width(columns, bits)), **grid}
        for suffix, shape in shown.items():
            self.files[linear + suffix] = self._raw.files[names[self.layout.required[0]]]
            self.shapes[linear + suffix], self.dtypes[linear + suffix] = shape, ITEM[suffix]

    def is_filler(self, name: str) -> bool:
        """AutoGPTQ stores a bias for every linear, zeros where the model has none."""
        return name.endswith(".bias") and name.removesuffix(".bias") in self._sizes and not self.get(name).any()

    def read_ahead(self, prefix: str) -> None:
        self._raw.read_ahead(prefix)

    def get(self, name: str) -> torch.Tensor:
        linear, _, leaf = name.rpartition(".")
        if linear not in self._sizes or "." + leaf not in ITEM:
            return super().get(name)
        bits, rows, columns = self._sizes[linear]
        read = lambda *parts: {s: self._raw.get(n) for s, n in self._stored[linear].items() if any(part in s for part in parts)}  # noqa: E731
        if "." + leaf == GRID:
            return self.layout.decode_grid(read("lut"), bits)
        if "." + leaf == SCALE:
            scale = self.layout.decode_scale(read("scale")).half()
            if not is_finite(scale):
                name = next(stored for suffix, stored in self._stored[linear].items() if "scale" in suffix)
                raise InputError(f"{name} holds NaN, infinity or more than float16 can: the file is damaged, get it again")
            return scale.reshape(-1).view(scale.shape)  # torch calls a turned row contiguous, whatever its strides
        if "." + leaf == ZERO:
            return self.layout.decode_zero(read("zero", "scale"), bits, rows)
        tensors = read("qweight", "packed", "g_idx")
        self._check_order(linear, tensors, columns)
        return pack_codes(self.layout.decode_codes(tensors, bits, rows, columns), bits)

    def _check_order(self, linear: str, tensors: dict[str, torch.Tensor], columns: int) -> None:
        """Raise InputError unless each group is of consecutive columns."""
        for suffix in (".g_idx", ".weight_g_idx"):
            if suffix not in tensors:
                continue
            groupsize = columns // self.shapes[linear + SCALE][1]
            if not torch.equal(tensors[suffix].long(), torch.arange(columns) // groupsize):
                raise InputError(
                    f"{linear}{suffix} does not group the columns in their order (act-order), which is not read here: load the folder "
                    "with transformers, or quantize it again without"
                )


# --- config.json -----------------------------------------------------------------------------------------------


def _layout_of(config: dict) -> tuple[Stored, int, int]:
    """The layout that a quantization_config names, its bits and group size. Raises InputError for what is not read here."""
    method = config["quant_method"]
    if method == "compressed-tensors":
        name, bits, groupsize = method, *_compressed_tensors(config)
    elif method == AnyPrecision.name:
        seed, parent = config.get("seed_precision"), config.get("parent_precision")
        name, bits, groupsize = method, parent if seed == parent else f"{seed} to {parent}", -1
    else:
        kind = config.get("checkpoint_format") or config.get("format") or config.get("version") or {"gptq": "gptq", "awq": "gemm"}[method]
        kind = kind.lower() if isinstance(kind, str) else kind
        name = kind if method == "gptq" and kind in ("gptq", "gptq_v2") else "awq" if method == "awq" and kind == "gemm" else None
        if name is None:
            raise InputError(f"{method} in the format {kind!r} is not read here: load the folder with transformers")
        bits, groupsize = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size"))
        dynamic = config.get("dynamic") or {}
        if not isinstance(dynamic, dict) or any(not str(pattern).startswith("-:") for pattern in dynamic):
            raise InputError("config.json gives linears settings of their own (dynamic), which is not read here: load it with transformers")
    if type(bits) is not int or bits not in LAYOUTS[name].bits:
        held = " or ".join(map(str, LAYOUTS[name].bits))
        other = "transformers" if LAYOUTS[name].uniform else "its makers' code"
        raise InputError(f"config.json says {bits!r} bits: {name} folders are read here with {held} bits; load this one with {other}")
    if type(groupsize) is not int or groupsize != -1 and groupsize < 1:
        raise InputError(f"config.json says a group size of {groupsize!r}, not -1 or a number of columns: get the folder again")
    return LAYOUTS[name], bits, groupsize


def _compressed_tensors(config: dict) -> tuple[object, object]:
    """Bits and group size of the one scheme."""
    groups = config.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, dict) else []
    weights = [scheme.get("weights") if isinstance(scheme, dict) else None for scheme in schemes]
    if len(weights) != 1 or not isinstance(weights[0], dict):
        raise InputError("config.json must give one scheme for all linears in config_groups: load the folder with transformers")
    formats = {config.get("format"), schemes[0].get("format") or config.get("format")}
    if formats != {"pack-quantized"} or weights[0].get("type", "int") != "int" or schemes[0].get("input_activations"):
        raise InputError("only pack-quantized integer weights of compressed-tensors are read here: load the folder with transformers")
    strategy = weights[0].get("strategy")
    if strategy not in ("channel", "group"):
        raise InputError(f"compressed-tensors with the strategy {strategy!r} is not read here: load the folder with transformers")
    return weights[0].get("num_bits"), -1 if strategy == "channel" else weights[0].get("group_size")

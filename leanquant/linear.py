"""The quantized linear layer: a module whose state is codes and levels, four ways to multiply with them, its place in a model. And
quantized embeddings.

Legend: O out_features, I in_features, K = 2**bits levels, G groups.
"""

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from . import kernels, lut_cpu, lut_gemm
from .errors import InputError
from .experts import split_experts
from .packing import PIECE_WEIGHTS, SUFFIXES, Checkpoint, PackedLinear, is_finite, pack_codes, unpack_codes

STORED = ("weight_codes", "quant_grid", "scale", "zero")  # as the fields of a PackedLinear
LOOKED_UP = (torch.float32, torch.float16, torch.bfloat16)  # inputs of products that a CPU's kernel sums in float32
MIN_MAJOR = 7  # architecture of a GPU, for the fused kernels
IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")} | {"__setitem__"}
READ_ONLY = "a quantized weight cannot be written to: call model.dequantize() first, for merging adapters too"


class RebuiltWeight(torch.Tensor):
    """The weight of a quantized linear, to look at: writing to it would change nothing, which those who merge adapters into a weight must
    know. Raises InputError where it is written to, itself or its `data` (through other views it goes unseen). What is computed with it is
    an ordinary tensor, and so are its copies; a Parameter made of it may be written to."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs, data = kwargs or {}, torch.Tensor.data
        first = args[0] if args else kwargs.get("tensor")
        mine = isinstance(first, cls) and not getattr(first, "_is_param", False)
        if mine and _writes(func) or isinstance(kwargs.get("out"), cls):
            raise InputError(READ_ONLY)
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
        return found.as_subclass(cls) if mine and func in (data.__get__, torch.Tensor.detach) else found

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        return self.as_subclass(torch.Tensor).clone()

    def __reduce_ex__(self, protocol: int):
        return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)


def _writes(func: Callable) -> bool:
    """Does torch's function `func` write into its first argument?"""
    name = getattr(func, "__name__", "")
    harmless = name.endswith("__") or name in ("requires_grad_", "share_memory_", "detach_")
    return func == torch.Tensor.data.__set__ or name in IN_PLACE or name.endswith("_") and not harmless


class Quantized(nn.Module):
    """What quantized linears and embeddings have in common, in the place of a weight [O, I]: the stored tensors, as buffers under the
    file's names: weight_codes and quant_grid, or scale and zero (packing.py)."""

    def store(self, packed: PackedLinear, bits: int, persistent: bool = True) -> None:
        self._is_hf_initialized = True  # there is no weight for transformers to initialise
        self.bits = bits
        for name, tensor in zip(STORED, packed, strict=True):
            self.register_buffer(name, tensor, persistent or tensor is None)  # libraries expect no empty ones among the others

    def fill(self, packed: PackedLinear) -> None:
        """Take the stored tensors."""
        self.weight_codes, self.quant_grid, self.scale, self.zero = packed

    def packed(self) -> PackedLinear:
        """The stored tensors."""
        return PackedLinear(self.weight_codes, self.quant_grid, self.scale, self.zero)

    @property
    def weight(self) -> torch.Tensor:
        """The weight [O, I], rebuilt: for those who look at it."""
        weight = self.packed().dequantize(self.bits, self.weight_shape[1], self._levels.dtype)
        return weight if torch.compiler.is_compiling() else weight.as_subclass(RebuiltWeight)

    @weight.setter
    def weight(self, _) -> None:
        raise InputError(READ_ONLY)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            raise InputError(READ_ONLY)
        super().register_parameter(name, param)

    @property
    def _levels(self) -> torch.Tensor:
        return self.scale if self.quant_grid is None else self.quant_grid

    def _apply(self, fn, recurse=True):
        """Levels and scales move with the model, but `model.half()` and the like do not round them again."""
        kept = ("quant_grid", "scale", "levels")
        stored = {name: self._buffers[name] for name in kept if self._buffers.get(name) is not None}
        super()._apply(fn, recurse)
        for name, tensor in stored.items():
            self._buffers[name] = fn(tensor.view(torch.uint8)).view(tensor.dtype)
        return self


class QuantizedLinear(Quantized, nn.Linear):
    """y = x W^T + bias with W = levels[codes], for x [..., I]. A Linear to libraries that put adapters beside linears.

    State: that of `Quantized`, and bias; of a head that is the embeddings the bias alone. `prepare` chooses what the products
    read: "packed" rebuilds the weight piece by piece, in every forward pass, and needs nothing besides; "looked_up" needs nothing
    besides either, but a kernel for this CPU; "tiles" is the layout of the fused CUDA kernels and takes the place of the codes;
    "dense" keeps the rebuilt weight too. The state that is saved is the same in all of them.

    Kernels know up to 4 bits. A code of 8 bits is two of 4 to them, its digits, for twice as many columns, which read x and x / 16.
    """

    def __init__(self, packed: PackedLinear, bits: int, in_features: int, bias: torch.Tensor | None, embeddings=None):
        nn.Module.__init__(self)  # not Linear's: there is no weight to make
        self.__dict__["embeddings"] = embeddings  # of a head that is those: to be found, not to be a part of it
        self.in_features, self.out_features = in_features, packed.codes.shape[0]
        self.packed_bytes = packed.codes.shape[1]  # of a row: tells the layout of the stored codes
        self.kernel_bits, self.columns = (4, 2 * in_features) if bits == 8 else (bits, in_features)
        self.store(packed, bits, persistent=embeddings is None)
        self.tiles = self.levels = self.dense = None
        self.form, self.tiles_dtype = "packed", None
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def on_meta(cls, shapes: PackedLinear, bits: int, linear: nn.Linear, embeddings=None) -> "QuantizedLinear":
        """A stand-in for `linear` that has only shapes: `shapes` holds meta tensors, the bias stays on meta too."""
        return cls(shapes, bits, linear.in_features, linear.bias, embeddings)

    # --- state ---

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def packed(self) -> PackedLinear:
        """The stored tensors, from whatever form they are in."""
        codes = self.weight_codes
        if self.tiles is not None:
            layout = "dense" if self.packed_bytes < (self.columns + 1) // 2 else "nibble"
            codes = lut_gemm.untile_codes(self.tiles, self.kernel_bits, self.out_features, self.columns)
            codes = pack_codes(codes, self.kernel_bits, layout)
        return PackedLinear(codes, self.quant_grid, self.scale, self.zero)

    def prepare(self, form: str, dtype: torch.dtype) -> None:
        """Take `form`, one of the four, for products in `dtype`. What the kernels cannot do stays packed."""
        self.release()
        if form == "tiles" and self.can_be_tiled(dtype):
            packed = self.packed()
            if self._row_wise:
                self._hold("levels", packed.levels(self.kernel_bits).squeeze(1).to(dtype))
            self._hold("tiles", lut_gemm.tile_codes(unpack_codes(packed.codes, self.kernel_bits, self.columns), self.kernel_bits))
            self.weight_codes, self.tiles_dtype = None, dtype
            if self.tiles.is_cuda:  # the kernels may begin to read them before those ahead are done
                torch.cuda.current_stream(self.tiles.device).synchronize()
        elif form == "dense":
            self._hold("dense", self.packed().dequantize(self.bits, self.in_features, dtype))
        elif form != "looked_up" or dtype not in LOOKED_UP or not lut_cpu.can_multiply(self.packed(), self.columns):
            return
        self.form = form

    def release(self) -> None:
        """Back to packed codes alone."""
        self.weight_codes = self.packed().codes
        for name in ("tiles", "levels", "dense"):
            self._hold(name, None)
        self.form = "packed"

    def _hold(self, name: str, tensor: torch.Tensor | None) -> None:
        """Keep a tensor that is no state. A plain None stands for a missing one: libraries that move modules expect no empty buffers."""
        self._buffers.pop(name, None)
        self.__dict__.pop(name, None)
        if tensor is None:
            setattr(self, name, None)
        else:
            self.register_buffer(name, tensor, persistent=False)

    @property
    def _row_wise(self) -> bool:
        return self.quant_grid is not None or self.scale.shape[1] == 1

    def can_be_tiled(self, dtype: torch.dtype) -> bool:
        return dtype in lut_gemm.NAMES and (self._row_wise or self.in_features % (16 * self.scale.shape[1]) == 0)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.tiles is not None and self.embeddings is None:
            destination[prefix + "weight_codes"] = self.packed().codes

    def _load_from_state_dict(self, state_dict, prefix, *args):
        form, dtype = self.form, (self.tiles_dtype or torch.float32) if self.dense is None else self.dense.dtype
        self.release()
        if self.embeddings is not None:  # which have been loaded
            self.fill(self.embeddings.packed().to(self.weight_codes.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
        if form != "packed":
            self.prepare(form, dtype)

    # --- products ---

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x, self.bias)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x W^T + bias. vLLM keeps the bias itself."""
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        if self.form == "dense":
            dense = self._buffers["dense"]  # not by its name, and cast only if it must be: as quick as nn.Linear
            return nn.functional.linear(x, dense if dense.dtype == x.dtype else dense.to(x.dtype), bias)
        if self.form == "tiles" and x.dtype in lut_gemm.NAMES:
            if x.dtype != self.tiles_dtype:
                self.prepare("tiles", x.dtype)  # once: the model was cast
            state = self._buffers  # not by their names either
            levels = state.get("levels")
            scale, zero = (state["scale"], state["zero"]) if levels is None else (None, None)
            x = in_digits(x) if self.bits == 8 else x
            return lut_gemm.lut_linear(x, state["tiles"], levels, scale, zero, bias, self.kernel_bits, self.out_features)
        if self.form == "looked_up":
            return self._looked_up(x, bias)
        return self._by_pieces(x, bias)

    def _looked_up(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """On the CPU. Once all of it has moved to a GPU (it is not only there for this call), it takes a form for there."""
        state = self._buffers  # as above
        codes = state["weight_codes"]
        if codes.is_cpu and x.is_cpu and x.shape[-1] == self.in_features and x.dtype in LOOKED_UP:
            x = in_digits(x) if self.bits == 8 else x
            return lut_cpu.packed_linear(x, codes, state["quant_grid"], state["scale"], state["zero"], bias, self.kernel_bits)
        if codes.is_cuda and not hasattr(self, "_hf_hook"):
            is_tiled = self.can_be_tiled(x.dtype) and _has_kernels(self, x.dtype)
            self.prepare("tiles" if is_tiled else "dense", x.dtype)
            return self.product(x, bias)
        return self._by_pieces(x, bias)

    def _by_pieces(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows = max(1, PIECE_WEIGHTS // self.in_features)
        parts = list(self.packed().split(rows))
        biases = [None] * len(parts) if bias is None else bias.split(rows)
        weights = (part.dequantize(self.bits, self.in_features, x.dtype) for part in parts)
        products = [nn.functional.linear(x, weight, its) for weight, its in zip(weights, biases, strict=True)]
        return products[0] if len(products) == 1 else torch.cat(products, -1)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"
        return f"{sizes}, bias={self.bias is not None}, form={self.form}"


def in_digits(x: torch.Tensor) -> torch.Tensor:
    """x [..., I] as what the digits of codes of 8 bits are multiplied with, [..., 2 I]."""
    return torch.stack([x, x / 16], -1).flatten(-2)


class QuantizedEmbedding(Quantized, nn.Embedding):
    """Rows of W = levels[codes] for ids [...], rebuilt as they are looked up, in the dtype of the model: [..., D].

    Made in the place of embeddings, of whose class `kind` it stays: some scale what they have looked up.
    """

    @classmethod
    def take_place_of(cls, embedding: nn.Embedding, packed: PackedLinear, bits: int) -> None:
        """Make of `embedding` a quantized one. packed: its stored tensors, or their shapes on the meta device."""
        dtype = embedding.weight.dtype
        embedding.kind, embedding.__class__ = type(embedding), cls
        del embedding._parameters["weight"]
        embedding.store(packed, bits)
        embedding.register_buffer("like", torch.empty(0, dtype=dtype, device="cpu"), persistent=False)  # it is cast with the model

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found = self.packed().rows(ids.flatten()).dequantize(self.bits, self.embedding_dim, self.like.dtype)
        if self.kind is nn.Embedding:
            return found.view(*ids.shape, self.embedding_dim)
        positions = torch.arange(ids.numel(), device=ids.device)
        return self.kind.forward(self._as_kind(found), positions.view(ids.shape))

    def _as_kind(self, weight: torch.Tensor) -> nn.Embedding:
        """The embeddings that these were, with another `weight`."""
        other = self.kind.__new__(self.kind)
        other.__dict__ = self.__dict__ | {"_parameters": {"weight": weight}, "padding_idx": None, "_is_hf_initialized": False}
        return other

    def initialize_buffers(self, model: nn.Module) -> None:
        """Have transformers, which knows the class that these were, give its buffers their values, of which files have none."""
        if self.kind is not nn.Embedding:
            with torch.random.fork_rng(devices=[]):
                model._init_weights(self._as_kind(nn.Parameter(torch.zeros(1, self.embedding_dim))))

    def restore(self, dtype: torch.dtype) -> None:
        """Make of it what it was, with rebuilt weights."""
        weight = self.packed().dequantize(self.bits, self.embedding_dim, dtype)
        for name in (*STORED, "like"):
            del self._buffers[name]
        self.__class__ = self.kind
        self.weight = nn.Parameter(weight, requires_grad=False)


# --- in a model ------------------------------------------------------------------------------------------------


def replace_modules(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Put a QuantizedLinear, still without values, in the place of each quantized linear of the file, checked against it, and make
    embeddings quantized ones if they are there; a head that is the embeddings too.

    Fused experts are split for it.
    """
    split_experts(model)
    modules = dict(model.named_modules())
    for name in checkpoint.quantized:
        module = modules.get(name)
        if module is not None and module is model.get_input_embeddings() and isinstance(module, nn.Embedding):
            checkpoint.check_linear(name, module.num_embeddings, module.embedding_dim)
            QuantizedEmbedding.take_place_of(module, checkpoint.packed_shapes(name), checkpoint.bits_of(name))
            _tie_head(model, name, checkpoint)
        elif isinstance(module, nn.Linear):
            checkpoint.check_linear(name, module.out_features, module.in_features)
            model.set_submodule(name, QuantizedLinear.on_meta(checkpoint.packed_shapes(name), checkpoint.bits_of(name), module))
        else:
            raise InputError(f"the file has a quantized {name}, which the base model lacks: is it the right base model?")


def _tie_head(model: nn.Module, embeddings: str, checkpoint: Checkpoint) -> None:
    """Have the head multiply with the codes of the `embeddings` where the model ties them and the file has no head of its own.
    transformers, which ties weights, finds none to tie from then on."""
    name = path_in(model, head := model.get_output_embeddings())
    if not model.config.get_text_config().tie_word_embeddings or name is None or checkpoint.holds(f"{name}.weight"):
        return
    shapes, bits = checkpoint.packed_shapes(embeddings), checkpoint.bits_of(embeddings)
    model.set_submodule(name, QuantizedLinear.on_meta(shapes, bits, head, model.get_input_embeddings()))
    model._tied_weights_keys, model.all_tied_weights_keys = None, {}


def share_codes(head: QuantizedLinear, device=None) -> None:
    """Give a head that is the embeddings their codes, once they have them, on `device`, unset its own: where both lie on one they share
    the very tensors."""
    if head.embeddings.weight_codes.is_meta:
        what = "give a device_map that keeps them on a device, and no offload_buffers"
        raise InputError(f"quantized embeddings that are the head too must be there when the model is loaded: {what}")
    head.fill(head.embeddings.packed().to(head.weight_codes.device if device is None else device))


def path_in(model: nn.Module, wanted: nn.Module | None) -> str | None:
    """The path of the module `wanted`, None if there is none."""
    return next((name for name, module in model.named_modules() if module is wanted), None)


def is_tied(head: nn.Module | None) -> bool:
    """Is it a head that has the embeddings' codes?"""
    return isinstance(head, QuantizedLinear) and head.embeddings is not None


def check_names(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise InputError unless what `model`, its linears replaced, has beside them and what the file has agree in names and shapes.

    A head that is tied to the embeddings may be missing, or stored all the same.
    """
    quantized = {f"{name}{suffix}" for name in checkpoint.quantized for suffix in SUFFIXES}
    wanted = {name: t.shape for name, t in model.state_dict(keep_vars=True).items() if name not in quantized}
    tied = model.config.get_text_config().tie_word_embeddings
    head = f"{path_in(model, model.get_output_embeddings())}.weight"
    for name, shape in wanted.items():
        if name not in checkpoint:
            if not (tied and name == head):
                raise InputError(f"the file has no tensor {name}: get it again, or is it another base model's?")
        elif checkpoint.shapes[name] != tuple(shape):
            found = list(checkpoint.shapes[name])
            raise InputError(f"tensor {name} is {found} where the base model has {list(shape)}: is it the right base model?")
    ignored = [re.compile(pattern) for pattern in (getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    for name in checkpoint.shapes:
        if name not in wanted and name not in quantized and name != head and not name.endswith("inv_freq"):
            if not any(pattern.search(name) for pattern in ignored) and not checkpoint.is_filler(name):
                raise InputError(f"the file has a tensor {name}, which the base model lacks: is it the right base model?")


def check_values(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise InputError, with its name, for a tensor of the `model` that was loaded from `checkpoint` that no writer of this format
    writes. What is offloaded is read from the files."""
    for name, module in model.named_modules():
        if isinstance(module, Quantized):
            if is_tied(module):
                continue  # the embeddings' values
            packed = checkpoint.packed(name, *module.weight_shape) if module._levels.is_meta else module.packed()
            packed.check_values(name, module.bits, module.weight_shape[1])
            continue
        for leaf, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor is None or not tensor.is_floating_point() or leaf in module._non_persistent_buffers_set:
                continue
            stored = f"{name}.{leaf}"
            if tensor.is_meta:
                tensor = checkpoint.get(stored) if stored in checkpoint else torch.zeros(1)  # one that is tied to another
            if not is_finite(tensor):
                raise InputError(f"{stored} holds NaN or infinity: the file is damaged, get it again")


def prepare_linears(model: nn.Module, dtype: torch.dtype, dequantize: str) -> None:
    """Give every filled QuantizedLinear the form that is fastest where it lies: tiles on a GPU; on a CPU its codes, looked up, and where
    there is no kernel for that rebuilt weights.

    What lies on the CPU because the GPUs are full stays packed: it travels to them for each forward pass.
    """
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear) and not module.weight_codes.is_meta]
    is_on_cpu = all(linear.weight_codes.device.type == "cpu" for linear in linears)
    for linear in linears:
        if dequantize == "always":
            linear.prepare("dense", dtype)
        elif kernels.on_gpu(linear.weight_codes):
            if linear.can_be_tiled(dtype) and _has_kernels(linear, dtype):
                linear.prepare("tiles", dtype)
        elif is_on_cpu:
            linear.prepare("looked_up", dtype)
    if dequantize == "auto" and is_on_cpu:
        _rebuild([linear for linear in linears if linear.form == "packed"], dtype)


def _rebuild(linears: list[QuantizedLinear], dtype: torch.dtype) -> None:
    """On the CPU, if all fits."""
    needed = sum(linear.in_features * linear.out_features * dtype.itemsize for linear in linears)
    if needed > 0.8 * free_host_bytes():
        warnings.warn(f"{needed / 1e9:.1f} GB of rebuilt weights do not fit: they stay packed, which is slower on a CPU", stacklevel=4)
        return
    for linear in linears:
        linear.prepare("dense", dtype)


def _has_kernels(linear: QuantizedLinear, dtype: torch.dtype) -> bool:
    """Has the GPU that `linear` lies on kernels for it, and are they right there?"""
    gpu = linear.weight_codes.device
    new_enough = kernels.properties(gpu).major >= MIN_MAJOR
    return new_enough and lut_gemm.kernels_are_right(gpu, linear.kernel_bits, dtype, not linear._row_wise)


def free_host_bytes(root: Path = Path("/")) -> float:
    """Memory that can still be had on the host, or in the container (control group) that this process may be in; infinite where the
    system does not say. root: of the file system."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = float("inf")
    groups = root / "sys/fs/cgroup"
    return min(
        free, _left(groups, "memory.max", "memory.current"), _left(groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
    )


def _left(group: Path, limit: str, used: str) -> float:
    """What a control group, of version 2 or 1, may still take, its file cache counted as free; infinite without a limit."""
    try:
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cache = int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0))
        return max(0, int((group / limit).read_text()) - int((group / used).read_text()) + cache)
    except (OSError, ValueError):  # "max"
        return float("inf")

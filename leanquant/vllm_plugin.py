"""The vLLM plug-in: `vllm serve FOLDER` for folders of ours, free levels included, with the products of linear.py.

vLLM finds it as the entry point `leanquant` of its general plug-ins, wherever both packages are installed. It must be loaded by vLLM,
which is no dependency of this package: nothing else imports it. Not here: products, checks of values, mixtures of experts.
Legend: O out_features, I in_features of one rank's share of a linear, K = 2**bits levels, G groups.
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from torch import nn
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, QKVParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from .errors import InputError
from .foreign import open_checkpoint
from .linear import STORED, Quantized, QuantizedLinear, prepare_linears
from .packing import Checkpoint, PackedLinear, layout_of, pack_codes, packed_width, unpack_codes
from .plugin import METHOD

FILES = ["*.safetensors", "*.json"]  # of a repository, that say what is quantized in it
ELSEWHERE = "load it with LeanQuantModelForCausalLM or `python -m leanquant serve` instead"


def register() -> None:
    """What vLLM calls in each of its processes: the work was done when this file was imported."""


@register_quantization_config(METHOD)
class LeanQuantVllmConfig(QuantizationConfig):
    """Which layers of vLLM's model are quantized, and how, by the headers of the folder's files."""

    def __init__(self) -> None:
        super().__init__()
        self.checkpoint: Checkpoint | None = None
        self.quantized_embeddings = ""  # their path, if they are
        self.embeddings = ""  # once vLLM has made them

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # config.json says it

    @classmethod
    def from_config(cls, config: dict) -> "LeanQuantVllmConfig":
        return cls()

    def maybe_update_config(self, model_name: str, hf_config=None, revision: str | None = None) -> None:
        folder = model_name if Path(model_name).is_dir() else snapshot_download(model_name, revision=revision, allow_patterns=FILES)
        self.checkpoint = open_checkpoint(folder)
        self.checkpoint.check_bits(None, folder)
        self.quantized_embeddings = _embeddings_of(self.checkpoint)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> "LeanQuantMethod | UnquantizedLinearMethod | None":
        if isinstance(layer, RoutedExperts):
            raise InputError(f"{prefix} is a mixture of experts, which the plug-in for vLLM does not run: {ELSEWHERE}")
        if not isinstance(layer, (LinearBase, VocabParallelEmbedding)):
            return None
        parts = self._parts(layer, prefix)
        quantized = [part for part in parts if self.checkpoint.is_quantized(part)]
        if not quantized:
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        if quantized != parts:
            plain = next(part for part in parts if part not in quantized)
            raise InputError(f"{plain} is not quantized where {quantized[0]} is, which vLLM multiplies with as one: {ELSEWHERE}")
        return LeanQuantMethod(self.checkpoint, parts)

    def _parts(self, layer: nn.Module, prefix: str) -> list[str]:
        """The paths in the file of the matrices that are stacked in `layer`."""
        if isinstance(layer, ParallelLMHead):
            return [prefix if self.checkpoint.holds(f"{prefix}.weight") else self.embeddings]  # to which vLLM will tie it
        if isinstance(layer, VocabParallelEmbedding):
            self.embeddings = prefix or self.quantized_embeddings  # some models of vLLM leave them nameless
            return [self.embeddings]
        if self.quantized_embeddings and not self.embeddings and get_pp_group().is_first_rank:
            raise InputError(f"{self.quantized_embeddings} is quantized, which vLLM's model of this kind cannot take: {ELSEWHERE}")
        parent, _, leaf = prefix.rpartition(".")
        return [f"{parent}.{part}" for part in self.packed_modules_mapping.get(leaf, [leaf])]


def _embeddings_of(checkpoint: Checkpoint) -> str:
    """The path of quantized embeddings, "" if there are none: they are beside the layers, where a head is not."""
    number = re.compile(r"\.\d+\.")
    beside = {path.rpartition(".")[0] for path in (number.split(name)[0] for name in checkpoint.shapes if number.search(name))}
    outside = [path for path in checkpoint.quantized if not number.search(path)]
    return next((path for path in outside if path.rpartition(".")[0] in beside - {""}), "")


def _rows_of(layer: nn.Module) -> int:
    """Of the whole matrix in vLLM's model, before ranks share them and copy some."""
    if isinstance(layer, VocabParallelEmbedding):
        return layer.org_vocab_size
    if isinstance(layer, QKVParallelLinear):
        return layer.total_num_heads * layer.head_size + layer.total_num_kv_heads * (layer.head_size + layer.v_head_size)
    return layer.output_size


class Shared(NamedTuple):
    """What matrices that vLLM keeps as one are stored as there: all with the most bits that one of them has, G groups for all I."""

    bits: int
    layout: str
    grid: torch.dtype | None  # of free levels
    groups: int


class LeanQuantMethod(LinearMethodBase):
    """Products with the quantized matrices `parts`, stacked by rows, of a linear, a head or embeddings.

    vLLM's own loaders put the stored tensors together, and take a rank's share of rows or columns: parameters under the file's names
    until all are there, a QuantizedLinear from then on.
    """

    def __init__(self, checkpoint: Checkpoint, parts: list[str]):
        self.checkpoint, self.parts = checkpoint, parts
        self.is_head = False  # embeddings that are it too

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        weight_loader,
        **_,
    ) -> None:
        rows, columns, ranks = sum(output_partition_sizes), input_size_per_partition, input_size // input_size_per_partition
        self._check_shapes(layer, input_size)
        self.shared = shared = self._shared(input_size)
        code_bits = 4 if shared.layout == "nibble" else shared.bits
        if ranks > 1 and (columns * code_bits % 8 or shared.groups > 1 and shared.groups % ranks):
            raise InputError(f"{self.parts[0]} has {input_size} columns, whose codes or groups {ranks} ranks cannot divide: take fewer")
        self.columns, self.dtype, width = columns, params_dtype, packed_width(input_size, code_bits)

        def alike(name: str, loaded: torch.Tensor) -> torch.Tensor:
            """A stored tensor of one part, as `shared` has it."""
            if name == "weight_codes" and loaded.shape[1] != width:
                return pack_codes(unpack_codes(loaded, loaded.shape[1] * 8 // input_size, input_size), 4, "nibble")
            return nn.functional.pad(loaded, (0, 2**shared.bits - loaded.shape[1])) if name == "quant_grid" else loaded

        def add(name: str, width: int, dtype: torch.dtype, is_divided: bool) -> None:
            tensor = nn.Parameter(torch.zeros(rows, width, dtype=dtype), requires_grad=False)
            tensor.output_dim = 0
            if is_divided:
                tensor.input_dim = 1
            tensor.weight_loader = lambda param, loaded, *shard: weight_loader(param, alike(name, loaded), *shard)
            layer.register_parameter(name, tensor)

        add("weight_codes", packed_width(columns, code_bits), torch.uint8, True)
        if shared.grid is not None:
            add("quant_grid", 2**shared.bits, shared.grid, False)
            return
        is_grouped = shared.groups > 1
        for name, dtype in (("scale", torch.float16), ("zero", torch.uint8)):
            add(name, shared.groups // ranks if is_grouped else 1, dtype, is_grouped)

    def _check_shapes(self, layer: nn.Module, columns: int) -> None:
        """Raise InputError unless the file has as many rows as vLLM's model, before a rank takes its share of them."""
        found = [self.checkpoint.shapes[f"{part}.weight_codes"][0] for part in self.parts]
        for part, rows in zip(self.parts, found, strict=True):
            self.checkpoint.check_linear(part, rows, columns)
        if sum(found) != (wanted := _rows_of(layer)):
            raise InputError(f"{' + '.join(self.parts)} has {sum(found)} rows where config.json makes it {wanted}: get the folder again")

    def _shared(self, columns: int) -> Shared:
        shapes = self.checkpoint.shapes
        bits = [self.checkpoint.bits_of(part) for part in self.parts]
        widths = {shapes[f"{part}.weight_codes"][1] for part in self.parts}
        packed = [self.checkpoint.packed_shapes(part) for part in self.parts]
        kinds = {(p.groups, None if p.grid is None else p.grid.dtype, its == 8) for p, its in zip(packed, bits, strict=True)}
        if len(kinds) > 1:
            raise InputError(f"{' and '.join(self.parts)} have grids of different kinds, and vLLM multiplies with them as one: {ELSEWHERE}")
        (groups, grid, _), is_one = kinds.pop(), len(set(bits)) == len(widths) == 1
        return Shared(max(bits), layout_of(widths.pop(), bits[0], columns) if is_one else "nibble", grid, groups)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        packed = PackedLinear(*(getattr(layer, name).data if hasattr(layer, name) else None for name in STORED))
        packed.check_values(" + ".join(self.parts), self.shared.bits, self.columns)
        for name in STORED:
            if hasattr(layer, name):
                delattr(layer, name)
        if is_looked_up := isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead):
            layer.stored = Quantized()
            layer.stored.store(packed, self.shared.bits)
        if not is_looked_up or self.is_head:
            layer.linear = QuantizedLinear(packed, self.shared.bits, self.columns, None)
            prepare_linears(layer.linear, self.dtype, "auto")

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        # a sum made here torch.compile would merge with the split into q, k and v, to read their parts by the strides of the whole
        return layer.linear.product(x, bias)

    def embedding(self, layer: nn.Module, input_: torch.Tensor) -> torch.Tensor:
        found = layer.stored.packed().rows(input_.flatten()).dequantize(self.shared.bits, self.columns, self.dtype)
        return found.view(*input_.shape, self.columns)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """The embeddings in the place of the head `layer`."""
        embed_tokens.quant_method.is_head = True
        return embed_tokens

"""LeanQuantModelForCausalLM: a transformers model whose decoder linears come from a LeanQuant file.

Reads this project's files and folders, and the published model zoo's. Weights go from the file straight to their
device: nothing is initialised at random and no second copy of the model is made.
"""

import contextlib
import os
import warnings
from pathlib import Path

import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from accelerate.utils import get_balanced_memory
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from .errors import InputError, first_line
from .foreign import open_checkpoint
from .linear import (
    Quantized,
    QuantizedEmbedding,
    QuantizedLinear,
    check_names,
    is_tied,
    path_in,
    prepare_linears,
    replace_modules,
    share_codes,
)
from .packing import SAYS_QUANTIZED, Checkpoint
from .plugin import mark_quantized

DEQUANTIZE = ("auto", "always", "never")
SPREAD = ("auto", "balanced", "sequential")
COUNTS = ("num_hidden_layers", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # as configs call them
HUB_SECONDS = 5  # to wait for the hub's answer


class LeanQuantModelForCausalLM:
    """Not a class to instantiate: `from_pretrained` returns the base model's own transformers class."""

    @classmethod
    def from_pretrained(
        cls,
        base_model_name_or_path: str | Path,
        path: str | Path | None = None,
        bits: int | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        device_map: str | dict | None = "auto",
        max_memory: dict | None = None,
        dequantize: str = "auto",
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> nn.Module:
        """Load the quantized model at `path` (file or folder) for the architecture of `base_model_name_or_path`.

        path: unset if the base is itself a folder of ours. bits: checked against the file if given. torch_dtype, or dtype:
        unset and "auto" mean the file's type on a GPU and float32 on a CPU. device: everything there; otherwise `device_map`
        ("auto" or "balanced" spreads layers over the GPUs, within `max_memory`, "sequential" fills one after the other; what does
        not fit stays in the host's memory). dequantize: "always"
        keeps rebuilt weights too, "never" only codes; "auto" rebuilds on a CPU what its kernel (lut_cpu.py) cannot read, if it fits there.
        trust_remote_code: run Python code that comes with the base model. attn_implementation: as transformers takes it. Raises
        InputError (a ValueError) if the file is
        damaged, or does not fit the base model or `bits`.
        """
        if dequantize not in DEQUANTIZE:
            raise InputError(f"dequantize is {dequantize!r}: give one of {', '.join(DEQUANTIZE)}")
        checkpoint = open_checkpoint(base_model_name_or_path if path is None else path)
        checkpoint.check_bits(bits, path or base_model_name_or_path)
        checkpoint.check_plain_dtypes()
        where = where_to_look(base_model_name_or_path)
        config = read_config(base_model_name_or_path, trust_remote_code, **where)
        check_counts(config, checkpoint)
        device_map = _checked_map(device_map) if isinstance(device_map, dict) else device_map
        single = _single(device, device_map)
        on_cpu = _on_cpu(single, device_map)
        dtype = parse_dtype(dtype or torch_dtype) or (torch.float32 if on_cpu else checkpoint.stored_dtype)
        model = build_model(config, dtype, trust_remote_code, attn_implementation)
        replace_modules(model, checkpoint)
        check_names(model, checkpoint)
        if dequantize == "always":
            _reserve_dense(model, dtype)
        devices = _device_map(model, single, device_map, max_memory, on_cpu)
        _fill(model, checkpoint, devices, dtype)
        if is_tied(head := model.get_output_embeddings()):
            share_codes(head, _device_of(path_in(model, head), devices))
        if not has_own_head(model):
            model.tie_weights()
        prepare_linears(model, dtype, dequantize)
        mark_quantized(model, checkpoint.settings or {"bits": checkpoint.bits_of(checkpoint.quantized[0])})
        if len(set(devices.values())) > 1:
            model = dispatch_model(model, devices, offload_buffers=True)
        else:
            model.to(next(iter(devices.values())))  # buffers that are not in the file
        _load_generation_config(model, base_model_name_or_path, **where)
        return model


def where_to_look(base: str | Path) -> dict:
    """What transformers' `from_pretrained` must be told to find `base`: nothing if it is here or the hub answers, else to look in the cache
    alone. Raises InputError if it is not there either. Asked once: the libraries ask for each file, and again for 23 s without an answer.
    """
    if os.path.isfile(base) and not str(base).endswith(".json"):  # all of it would be read as a config
        raise InputError(f"{base} is a single file, without config.json: name the unquantized model first, as the base")
    if os.path.exists(base):
        return {}
    try:
        ask_hub(str(base), "config.json")
    except HFValidationError:
        raise InputError(f"{base} is neither a folder here nor a hub name: check the path") from None
    except Exception as error:  # of whatever library speaks to the hub
        if not isinstance(try_to_load_from_cache(str(base), "config.json"), str):
            raise InputError(
                f"{base} is neither a folder here nor in the cache, and the hub cannot be reached ({first_line(error)}): "
                "give a folder, or check the name and the network"
            ) from None
        return {"local_files_only": True}
    return {}


def ask_hub(repository: str, file: str, kind: str = "model") -> None:
    """Raise what the library raises unless the hub answers, whatever it says: of a file that is not there, say."""
    with contextlib.suppress(HfHubHTTPError):
        get_hf_file_metadata(hf_hub_url(repository, file, repo_type=kind), timeout=HUB_SECONDS)


def read_config(base: str | Path, trust_remote_code: bool, **where):
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code, **where)
    except Exception as error:  # a config that lies fails in as many ways as there are fields
        raise InputError(f"{base} has no usable config.json ({_one_line(error)}): check the name, or get it again") from None
    for field in SAYS_QUANTIZED:
        if hasattr(config, field):
            delattr(config, field)
    _forget_kernels(config)
    return config


def _forget_kernels(config) -> None:
    """Attention that the config takes from a repository on the hub is code from there: transformers chooses its own instead."""
    if "/" in str(config._attn_implementation):
        config._attn_implementation_internal = None
    for part in config.sub_configs:
        if getattr(config, part, None) is not None:
            _forget_kernels(getattr(config, part))


def check_counts(config, checkpoint: Checkpoint) -> None:
    """Raise InputError for more layers, or experts, than the file has tensors for: only building such a model would take for ever."""
    most = max([len(checkpoint.shapes), *(shape[0] for shape in checkpoint.shapes.values() if len(shape) == 3)])  # 3-D: experts in one
    for field in COUNTS:
        count = getattr(config.get_text_config(), field, None)
        if isinstance(count, int) and count > most:
            what = f"{count} {field.rpartition('_')[2]} and the file has {len(checkpoint.shapes)} tensors"
            raise InputError(f"config.json says {what}: is it the right base model?")


def has_own_head(model: nn.Module) -> bool:
    """Did the file hold a head other than the embeddings, though the config calls them tied? The model is told so. (To quantized embeddings
    nothing is tied that transformers knows of.)"""
    head, embeddings, config = model.get_output_embeddings(), model.get_input_embeddings(), model.config.get_text_config()
    if not config.tie_word_embeddings or head is None or head is embeddings or is_tied(head):
        return False
    if not isinstance(head, QuantizedLinear) and not isinstance(embeddings, QuantizedEmbedding):
        if head.weight.is_meta or torch.equal(head.weight, embeddings.weight.to(head.weight.device)):
            return False
    config.tie_word_embeddings = model.config.tie_word_embeddings = False
    return True


def build_model(config, dtype: torch.dtype, trust_remote_code: bool, attention: str | None = None) -> nn.Module:
    """The model of `config`, on the meta device."""
    options = {} if attention is None else {"attn_implementation": attention}
    try:
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code, **options).eval()
    except Exception as error:
        if "allocate memory" in str(error) or "verflow" in str(error):
            raise InputError("the sizes in the base model's config.json do not fit into memory: is it the right base model?") from None
        raise InputError(f"no causal language model can be made of the base model's config.json ({_one_line(error)})") from None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def parse_dtype(name: torch.dtype | str | None) -> torch.dtype | None:
    """None for what is to be chosen. Raises InputError unless models compute in it."""
    if name is None or name == "auto":
        return None
    dtype = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else name
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise InputError(f"dtype is {name!r}: give float16, bfloat16, float32 or auto")
    return dtype


def parse_device(name) -> torch.device:
    """Raises InputError unless `name` is the CPU or a GPU that is there."""
    try:
        device = torch.device("cuda", name) if isinstance(name, int) else torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"unknown device {name}: give auto, cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name}, but torch sees {torch.cuda.device_count()} CUDA devices: use cpu")
    return device


def _checked_map(device_map: dict) -> dict:
    """The devices by the names that accelerate knows: cpu, or the number of a GPU."""
    if "disk" in device_map.values():
        raise InputError("device_map names the disk, from which nothing can be run here: give devices, or cpu")
    devices = {name: parse_device(where) for name, where in device_map.items()}
    return {name: "cpu" if device.type == "cpu" else device.index or 0 for name, device in devices.items()}


def _single(device, device_map):
    """The one device for everything, None if there are several."""
    if device is not None and device != "auto":
        return device
    return None if isinstance(device_map, dict) or device_map is None or device_map in SPREAD else device_map


def _on_cpu(single, device_map) -> bool:
    if single is not None:
        return parse_device(single).type == "cpu"
    return set(device_map.values()) == {"cpu"} if isinstance(device_map, dict) else not torch.cuda.is_available()


def _reserve_dense(model: nn.Module, dtype: torch.dtype) -> None:
    """Have every quantized linear hold the shape of its rebuilt weight, which `prepare_linears` will put there."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module._hold("dense", torch.empty(module.out_features, module.in_features, dtype=dtype, device="meta"))


def _device_map(model: nn.Module, single, device_map, max_memory, on_cpu: bool) -> dict:
    """Module path -> device; {"": device} for a single one. Sizes are those of what `model` holds on the meta device."""
    if isinstance(device_map, dict) and single is None:
        return device_map
    if single is not None or on_cpu:
        return {"": parse_device(single if single is not None else "cpu")}
    if device_map != "sequential":
        max_memory = get_balanced_memory(model, max_memory, no_split_module_classes=model._no_split_modules)  # leaves room for caches
    devices = infer_auto_device_map(model, max_memory, no_split_module_classes=model._no_split_modules, offload_buffers=True)
    if "disk" in devices.values():
        raise InputError("the model does not fit the GPUs and the host memory: raise max_memory or use a larger machine")
    offloaded = [name for name, where in devices.items() if where == "cpu"]
    if offloaded:
        parts = [model.get_submodule(name) for name in offloaded]
        size = sum(t.nbytes for part in parts for t in (*part.parameters(), *part.buffers()))
        warnings.warn(f"{size / 1e9:.1f} GB of the model do not fit the GPUs and stay in host memory, which is slow", stacklevel=3)
    return devices


def _device_of(name: str, devices: dict):
    """The device of the deepest entry of the map that `name` lies under."""
    parts = name.split(".")
    for length in range(len(parts), -1, -1):
        if (prefix := ".".join(parts[:length])) in devices:
            return devices[prefix]
    raise InputError(f'device_map has no entry for {name}: add one, or "" for everything else')


def _fill(model: nn.Module, checkpoint: Checkpoint, devices: dict, dtype: torch.dtype) -> None:
    """Give every parameter, persistent buffer and packed linear its tensors from the file."""
    for name, module in model.named_modules():
        if isinstance(module, Quantized) and not is_tied(module):
            module.fill(checkpoint.packed(name, *module.weight_shape).to(_device_of(name, devices)))
        read = lambda leaf, tensor: checkpoint.weight(f"{name}.{leaf}", tuple(tensor.shape), dtype, _device_of(name, devices))  # noqa: E731, B023
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if f"{name}.{leaf}" in checkpoint:  # else it is a tied head, which gets the embeddings
                setattr(module, leaf, nn.Parameter(read(leaf, parameter), requires_grad=False))
        plain_buffers = [] if isinstance(module, Quantized) else list(module.named_buffers(recurse=False))
        for leaf, buffer in plain_buffers:
            if leaf not in module._non_persistent_buffers_set and f"{name}.{leaf}" in checkpoint:
                setattr(module, leaf, read(leaf, buffer))


def _load_generation_config(model: nn.Module, base, **where) -> None:
    try:
        model.generation_config = GenerationConfig.from_pretrained(base, **where)
    except Exception as error:
        if isinstance(error, OSError) and not (Path(base) / "generation_config.json").is_file():
            return  # the base has none: the one made from the config stays
        raise InputError(f"{base} has a generation_config.json that cannot be used ({_one_line(error)}): mend or remove it") from None

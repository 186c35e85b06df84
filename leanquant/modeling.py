"""LeanQuantModelForCausalLM: a transformers model whose decoder linears come from a LeanQuant file.

Reads this project's files and folders, and the published model zoo's. Weights go from the file straight to their
device: nothing is initialised at random and no second copy of the model is made.
"""

import warnings
from pathlib import Path

import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from .errors import InputError
from .linear import QuantizedLinear, prepare_linears, replace_linears
from .packing import Checkpoint, is_finite
from .plugin import mark_quantized

DEQUANTIZE = ("auto", "always", "never")


class LeanQuantModelForCausalLM:
    """Not a class to instantiate: `from_pretrained` returns the base model's own transformers class."""

    @classmethod
    def from_pretrained(
        cls,
        base_model_name_or_path: str | Path,
        path: str | Path | None = None,
        bits: int | None = None,
        torch_dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        device_map: str | dict | None = "auto",
        max_memory: dict | None = None,
        dequantize: str = "auto",
        trust_remote_code: bool = False,
    ) -> nn.Module:
        """Load the quantized model at `path` (file or folder) for the architecture of `base_model_name_or_path`.

        path: unset if the base is itself a folder of ours. bits: checked against the file if given. torch_dtype:
        unset means the file's type on a GPU and float32 on a CPU. device: everything there; otherwise `device_map`
        ("auto" spreads layers over the GPUs, within `max_memory`, and the rest over the host's memory). dequantize: "always"
        keeps rebuilt weights too, "never" only codes; "auto" rebuilds on a CPU, where that is much faster, if they fit there.
        trust_remote_code: run Python code that comes with the base model. Raises InputError (a ValueError) if the file is
        damaged, or does not fit the base model or `bits`.
        """
        if dequantize not in DEQUANTIZE:
            raise InputError(f"dequantize is {dequantize!r}: give one of {', '.join(DEQUANTIZE)}")
        checkpoint = Checkpoint.open(base_model_name_or_path if path is None else path)
        checkpoint.check_bits(bits, path or base_model_name_or_path)
        checkpoint.check_plain_dtypes()
        config = AutoConfig.from_pretrained(base_model_name_or_path, trust_remote_code=trust_remote_code)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        single = device if device is not None else device_map if device_map != "auto" and not isinstance(device_map, dict) else None
        on_cpu = torch.device(single).type == "cpu" if single is not None else not torch.cuda.is_available()
        dtype = torch_dtype or (torch.float32 if on_cpu else checkpoint.stored_dtype)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code).eval()
        replace_linears(model, checkpoint)
        devices = _device_map(model, single, device_map, max_memory, on_cpu)
        _fill(model, checkpoint, devices, dtype)
        model.tie_weights()
        prepare_linears(model, dtype, dequantize)
        mark_quantized(model, checkpoint.settings or {"bits": checkpoint.bits_of(checkpoint.quantized[0])})
        if len(set(devices.values())) > 1:
            model = dispatch_model(model, devices, offload_buffers=True)
        else:
            model.to(next(iter(devices.values())))  # buffers that are not in the file
        _load_generation_config(model, base_model_name_or_path)
        return model


def _device_map(model: nn.Module, single, device_map, max_memory, on_cpu: bool) -> dict:
    """Module path -> device; {"": device} for a single one. Sizes are those of the packed model."""
    if single is not None or on_cpu:
        return {"": torch.device(single if single is not None else "cpu")}
    if isinstance(device_map, dict):
        return device_map
    devices = infer_auto_device_map(model, max_memory, no_split_module_classes=model._no_split_modules)
    if "disk" in devices.values():
        raise InputError("the model does not fit the GPUs and the host memory: raise max_memory or use a larger machine")
    offloaded = [name for name, where in devices.items() if where == "cpu"]
    if offloaded:
        tensors = (t for name in offloaded for t in model.get_submodule(name).state_dict().values())
        size = sum(t.numel() * t.element_size() for t in tensors)
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
    """Give every parameter and every packed linear its tensors from the file."""
    head = model.get_output_embeddings()
    tied = model.config.get_text_config().tie_word_embeddings
    used = set()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            module.fill(checkpoint.packed(name, module.out_features, module.in_features).to(_device_of(name, devices)))
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            full_name = f"{name}.{leaf}"
            if module is head and tied and full_name not in checkpoint:
                continue  # tie_weights gives it the embeddings
            value = checkpoint.weight(full_name, tuple(parameter.shape), dtype, _device_of(name, devices))
            if not is_finite(value):
                raise InputError(f"{full_name} holds NaN or infinity: the file is damaged, get it again")
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))
            used.add(full_name)
    check_all_used(checkpoint, used)


def check_all_used(checkpoint: Checkpoint, used: set[str]) -> None:
    """Raise InputError for a tensor of the file that the model has no place for; a stored copy of a tied head is one it has."""
    quantized = set(checkpoint.quantized)
    for name in checkpoint.shapes:
        linear = name.rpartition(".")[0]
        if name not in used and linear not in quantized and not name.endswith(("inv_freq", "lm_head.weight", "masked_bias", "attn.bias")):
            raise InputError(f"the file has a tensor {name}, which the base model lacks: is it the right base model?")


def _load_generation_config(model: nn.Module, base) -> None:
    try:
        model.generation_config = GenerationConfig.from_pretrained(base)
    except OSError:
        pass  # the base has none: the one made from the config stays

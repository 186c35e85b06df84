"""LeanQuantModelForCausalLM: a transformers model whose decoder linears come from a LeanQuant file.

Reads this project's files and folders, and the published model zoo's. Weights go from the file straight to their
device: nothing is initialised at random and no second copy of the model is made.
"""

from pathlib import Path

import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from .errors import InputError
from .linear import QuantizedLinear
from .packing import Checkpoint


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
    ) -> nn.Module:
        """Load the quantized model at `path` (file or folder) for the architecture of `base_model_name_or_path`.

        path: unset if the base is itself a folder of ours. bits: checked against the file if given. torch_dtype:
        unset means the file's type on a GPU and float32 on a CPU. device: everything there; otherwise `device_map`
        ("auto" spreads layers over the GPUs, within `max_memory`). dequantize: "always" rebuilds plain linears once,
        "never" keeps codes packed, "auto" rebuilds them on a CPU, where that is much faster.
        Raises InputError if the file is damaged, or does not fit the base model or `bits`.
        """
        if dequantize not in ("auto", "always", "never"):
            raise InputError(f'dequantize is {dequantize!r}: give "auto", "always" or "never"')
        checkpoint = Checkpoint.open(base_model_name_or_path if path is None else path)
        _check_bits(checkpoint, bits, path or base_model_name_or_path)
        config = AutoConfig.from_pretrained(base_model_name_or_path)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        on_cpu = torch.device(device).type == "cpu" if device is not None else not torch.cuda.is_available()
        dtype = torch_dtype or (torch.float32 if on_cpu else _stored_dtype(checkpoint))
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        devices = _device_map(model, device, device_map, max_memory, on_cpu)
        _fill(model, checkpoint, devices, dtype, dequantize)
        model.tie_weights()
        if len(set(devices.values())) > 1:
            model = dispatch_model(model, devices)
        else:
            model.to(next(iter(devices.values())))  # buffers that are not in the file
        _load_generation_config(model, base_model_name_or_path)
        return model


def _check_bits(checkpoint: Checkpoint, bits: int | None, path) -> None:
    held = sorted({checkpoint.bits_of(linear) for linear in checkpoint.quantized})
    if not held:
        raise InputError(f"{path} holds no quantized weights: load it with transformers' AutoModelForCausalLM")
    if bits is not None and held != [bits]:
        raise InputError(f"{path} holds weights of {held} bits, not {bits}: correct `bits` or leave it out")


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    return torch.bfloat16 if "BF16" in checkpoint.dtypes.values() else torch.float16


def _device_map(model: nn.Module, device, device_map, max_memory, on_cpu: bool) -> dict:
    """Module path -> device; {"": device} for a single one."""
    if device is not None:
        return {"": torch.device(device)}
    if isinstance(device_map, dict):
        return device_map
    if on_cpu:
        return {"": torch.device("cpu")}
    if device_map != "auto":
        return {"": torch.device(device_map or "cuda")}
    devices = infer_auto_device_map(model, max_memory, no_split_module_classes=model._no_split_modules)
    if "disk" in devices.values():
        raise InputError("the model does not fit the GPUs and the host memory: raise max_memory or use a larger machine")
    return devices


def _device_of(name: str, devices: dict):
    """The device of the deepest entry of the map that `name` lies under."""
    while name not in devices:
        name = name.rpartition(".")[0]
    return devices[name]


def _fill(model: nn.Module, checkpoint: Checkpoint, devices: dict, dtype: torch.dtype, dequantize: str) -> None:
    """Replace every meta parameter by its tensor from the file, and quantized linears by what `dequantize` asks for."""
    for name, module in list(model.named_modules()):
        if checkpoint.is_quantized(name):
            module = _quantized_linear(name, module, checkpoint, _device_of(name, devices), dtype, dequantize)
            model.set_submodule(name, module)
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            full_name = f"{name}.{leaf}" if name else leaf
            if parameter.is_meta and not _is_tied_head(model, module, full_name, checkpoint):
                value = checkpoint.weight(full_name, tuple(parameter.shape), dtype, _device_of(name, devices))
                setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    unknown = [linear for linear in checkpoint.quantized if linear not in dict(model.named_modules())]
    if unknown:
        raise InputError(f"the file has a quantized {unknown[0]}, which the base model lacks: is it the right base model?")


def _is_tied_head(model: nn.Module, module: nn.Module, name: str, checkpoint: Checkpoint) -> bool:
    return module is model.get_output_embeddings() and name not in checkpoint and model.config.get_text_config().tie_word_embeddings


def _quantized_linear(name: str, linear: nn.Linear, checkpoint: Checkpoint, device, dtype, dequantize: str) -> nn.Module:
    """`linear` with its weight set, or a QuantizedLinear in its place; its bias is still to be filled in the former."""
    if dequantize == "always" or (dequantize == "auto" and torch.device(device).type == "cpu"):
        weight = checkpoint.weight(f"{name}.weight", tuple(linear.weight.shape), dtype, device)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        return linear
    bias = None
    if linear.bias is not None:
        bias = checkpoint.weight(f"{name}.bias", tuple(linear.bias.shape), dtype, device)
    return QuantizedLinear(checkpoint.packed(name).to(device), checkpoint.bits_of(name), linear.in_features, bias)


def _load_generation_config(model: nn.Module, base) -> None:
    try:
        model.generation_config = GenerationConfig.from_pretrained(base)
    except OSError:
        pass  # the base has none: the one made from the config stays

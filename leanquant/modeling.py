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
from .packing import CODES, Checkpoint, layout_of


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
        checkpoint.check_bits(bits, path or base_model_name_or_path)
        config = AutoConfig.from_pretrained(base_model_name_or_path)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        single = device if device is not None else device_map if device_map != "auto" and not isinstance(device_map, dict) else None
        on_cpu = torch.device(single).type == "cpu" if single is not None else not torch.cuda.is_available()
        dtype = torch_dtype or (torch.float32 if on_cpu else checkpoint.stored_dtype)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        _check_linears(model, checkpoint)
        if dequantize == "never" or (dequantize == "auto" and not on_cpu):
            _pack_linears(model, checkpoint)
        devices = _device_map(model, single, device_map, max_memory, on_cpu)
        _fill(model, checkpoint, devices, dtype)
        model.tie_weights()
        if len(set(devices.values())) > 1:
            model = dispatch_model(model, devices)
        else:
            model.to(next(iter(devices.values())))  # buffers that are not in the file
        _load_generation_config(model, base_model_name_or_path)
        return model


def _check_linears(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Every quantized linear of the file is one of the model's, of the same size."""
    modules = dict(model.named_modules())
    for name in checkpoint.quantized:
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise InputError(f"the file has a quantized {name}, which the base model lacks: is it the right base model?")
        rows, width = checkpoint.shapes[name + CODES]
        layout_of(width, checkpoint.bits_of(name), linear.in_features)
        if rows != linear.out_features:
            raise InputError(f"{name} has {rows} rows in the file and {linear.out_features} in the base model: is it the right one?")


def _pack_linears(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Put a QuantizedLinear, still without values, in the place of each quantized linear."""
    for name in checkpoint.quantized:
        linear = model.get_submodule(name)
        model.set_submodule(name, QuantizedLinear.on_meta(checkpoint.packed_shapes(name), checkpoint.bits_of(name), linear))


def _device_map(model: nn.Module, single, device_map, max_memory, on_cpu: bool) -> dict:
    """Module path -> device; {"": device} for a single one. Sizes are those of the packed model."""
    if single is not None or on_cpu:
        return {"": torch.device(single if single is not None else "cpu")}
    if isinstance(device_map, dict):
        return device_map
    devices = infer_auto_device_map(model, max_memory, no_split_module_classes=model._no_split_modules)
    if "disk" in devices.values():
        raise InputError("the model does not fit the GPUs and the host memory: raise max_memory or use a larger machine")
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
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            module.fill(checkpoint.packed(name).to(_device_of(name, devices)))
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            full_name = f"{name}.{leaf}"
            if module is head and tied and full_name not in checkpoint:
                continue  # tie_weights gives it the embeddings
            value = checkpoint.weight(full_name, tuple(parameter.shape), dtype, _device_of(name, devices))
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))


def _load_generation_config(model: nn.Module, base) -> None:
    try:
        model.generation_config = GenerationConfig.from_pretrained(base)
    except OSError:
        pass  # the base has none: the one made from the config stays

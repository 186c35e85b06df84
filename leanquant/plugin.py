"""The transformers plug-in: AutoModelForCausalLM.from_pretrained and save_pretrained for folders of ours.

Importing this registers the quantization method "leanquant" with transformers; `import leanquant` does that. The module that
takes the place of linears is linear.py's, the checks of files are packing.py's.
"""

import json

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .linear import QuantizedEmbedding, QuantizedLinear, check_names, check_values, is_tied, prepare_linears, replace_modules, share_codes
from .packing import Checkpoint

METHOD = "leanquant"


@register_quantization_config(METHOD)
class LeanQuantConfig(QuantizationConfigMixin):
    """What config.json says under quantization_config: the settings of the run that wrote the folder, as they are."""

    def __init__(self, /, **settings):
        self.quant_method = METHOD
        self.settings = {name: value for name, value in settings.items() if name != "quant_method"}

    def to_dict(self) -> dict:
        return {"quant_method": METHOD, **self.settings}

    def to_diff_dict(self) -> dict:
        return self.to_dict()


@register_quantizer(METHOD)
class LeanQuantizer(HfQuantizer):
    """Loads and saves models that are quantized already; quantizing is llama.py's work."""

    requires_calibration = True
    is_trainable = True  # adapters on top: gradients pass through, codes and levels stay
    is_compileable = True

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files=None, **kwargs) -> None:
        checkpoint = Checkpoint(checkpoint_files)
        checkpoint.settings = checkpoint.settings or self.quantization_config.settings
        self.quantization_config.settings = checkpoint.settings  # saved as they are read, whatever config.json says of them
        self._checkpoint = checkpoint
        checkpoint.check_bits(None, checkpoint_files[0])
        checkpoint.check_plain_dtypes()
        replace_modules(model, checkpoint)
        check_names(model, checkpoint)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        check_values(model, self._checkpoint)
        del self._checkpoint
        if isinstance(embeddings := model.get_input_embeddings(), QuantizedEmbedding):
            embeddings.initialize_buffers(model)
        if is_tied(head := model.get_output_embeddings()):
            share_codes(head)
        prepare_linears(model, model.dtype, "auto")
        return model

    def update_weight_conversions(self, weight_conversions: list, model: nn.Module | None = None) -> list:
        """None: our files name tensors as the model does, its experts split. (Older releases of transformers give no model.)"""
        return []

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict, dict]:
        return model.state_dict(), {METHOD: json.dumps(self.quantization_config.settings, sort_keys=True)}

    def _dequantize(self, model: nn.Module, dtype=None) -> nn.Module:
        """Plain linears in the place of quantized ones, in `dtype` or the model's, and plain embeddings."""
        dtype = dtype if isinstance(dtype, torch.dtype) else model.dtype
        was_tied, embeddings = is_tied(model.get_output_embeddings()), model.get_input_embeddings()
        if isinstance(embeddings, QuantizedEmbedding):
            embeddings.restore(dtype)
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantizedLinear):
                with torch.device("meta"):
                    linear = nn.Linear(module.in_features, module.out_features, bias=False)
                weight = module.packed().dequantize(module.bits, module.in_features, dtype)
                linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), module.bias
                model.set_submodule(name, linear)
        if was_tied:
            del model._tied_weights_keys  # the class's are right again
            model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)
            model.tie_weights()
        return model


def mark_quantized(model: nn.Module, settings: dict) -> None:
    """What transformers notes on a model that it loaded through the plug-in, so that `save_pretrained` writes a folder of ours."""
    model.hf_quantizer = LeanQuantizer(LeanQuantConfig(**settings), pre_quantized=True)
    model.config.quantization_config = model.hf_quantizer.quantization_config
    model.quantization_method, model.is_quantized, model._weight_conversions = METHOD, True, []

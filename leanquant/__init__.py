"""LeanQuant models for inference: load, run, generate. Importing this teaches transformers to load them; no CUDA code runs."""

from .errors import InputError
from .modeling import LeanQuantModelForCausalLM
from .plugin import LeanQuantConfig, LeanQuantizer

__version__ = "0.1.0"
__all__ = ["InputError", "LeanQuantConfig", "LeanQuantModelForCausalLM", "LeanQuantizer"]

"""LeanQuant models for inference: load, run, generate. Importing this loads neither transformers nor CUDA code."""

__version__ = "0.1.0"
__all__ = ["InputError", "LeanQuantModelForCausalLM"]


def __getattr__(name: str):
    if name == "LeanQuantModelForCausalLM":
        from .modeling import LeanQuantModelForCausalLM

        return LeanQuantModelForCausalLM
    if name == "InputError":
        from .errors import InputError

        return InputError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""LeanQuant models for inference: load, run, generate. Importing this teaches transformers to load them; no CUDA code runs."""

import signal
import sys

from .errors import InputError, end_at_once

# `python -m leanquant` imports what its command needs by itself: info needs no transformers. (While Python looks for the module that it
# is told to run, argv begins with -m and ends as orig_argv does behind that module's name.)
if sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)] == __name__:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as in the background
        signal.signal(signal.SIGINT, end_at_once)
else:
    from .decoding import with_cuda_graphs
    from .modeling import LeanQuantModelForCausalLM
    from .plugin import LeanQuantConfig, LeanQuantizer

__version__ = "0.1.0"
__all__ = ["InputError", "LeanQuantConfig", "LeanQuantModelForCausalLM", "LeanQuantizer", "with_cuda_graphs"]

"""`python -m leanquant serve`: a model behind OpenAI's API.

The server is transformers' own (`transformers serve`): its endpoints, its queue and its batching. Here it is given a model and a tokenizer
that are loaded already, since it would look for a folder of its own kind, and `generate` as `chat` has it.
"""

import socket
from collections.abc import Callable

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.import_utils import is_serve_available

from .errors import InputError


def check_server(host: str, port: int) -> None:
    """Raise InputError where nothing could be served, before a model is loaded for it."""
    if not is_serve_available():
        raise InputError('the server needs packages that are not there: pip install "transformers[serving]"')
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        reason = (error.strerror or str(error)).split(" (")[0]  # since Python 3.12 with the address behind it
        raise InputError(f"port {port} of {host} cannot be used ({reason}): give another --port, or --host") from None


def limits(model: PreTrainedModel) -> dict:
    """Of the pages. On a GPU transformers takes most of the memory, which is there for them; on a CPU it would take six tenths, and write
    to all of it before the first answer."""
    return {"cb_max_memory_percent": 0.2, "cb_max_batch_tokens": 512} if model.device.type == "cpu" else {}


def serve(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, generate: Callable, host: str, port: int, batching: bool
) -> None:
    """Answer requests for the model called `name`, or for none by name, until interrupted: one after the other by `generate`, or with
    `batching` several at once, whose tokens share forward passes and a cache of pages."""
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager

    class ModelManager(model_manager.ModelManager):
        def _load_model(self, *args, **kwargs) -> PreTrainedModel:
            return model

        def _load_processor(self, *args, **kwargs) -> PreTrainedTokenizerBase:
            return tokenizer

        @staticmethod
        def get_gen_models(cache_dir=None) -> list[dict]:
            """What is listed, by releases before 5.24, which would list what was downloaded."""
            return [{"id": name, "object": "model", "owned_by": "", "created": 0}]

    model.generate = generate
    there, model_manager.ModelManager = model_manager.ModelManager, ModelManager  # which the server makes one of
    try:
        Serve(force_model=name, host=host, port=port, continuous_batching=batching, **limits(model) if batching else {})
    finally:
        model_manager.ModelManager = there

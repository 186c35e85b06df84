"""`python -m leanquant serve`: a model behind OpenAI's API.

The server is transformers' own (`transformers serve`): its endpoints, its queue and its batching. Here it is given a model and a tokenizer
that are loaded already, since it would look for a folder of its own kind, and `generate` as `chat` has it.
"""

import copy
import errno
import os
import socket
from collections.abc import Callable

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.import_utils import is_serve_available

from .errors import InputError

ON_A_CPU = {"cb_max_memory_percent": 0.2, "cb_max_batch_tokens": 512}  # for the cache of pages, and of a forward pass


def check_server(host: str, port: int) -> None:
    """Raise InputError where nothing could be served, before a model is loaded for it."""
    if not is_serve_available():
        raise InputError('the server needs packages that are not there: pip install "transformers[serving]"')
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise InputError(f"{host} cannot be listened at ({error.strerror}): give another --host") from None
    reasons = [reason for family, *_, address in places if (reason := _why_not(family, address[:2]))]
    if errno.EADDRINUSE in reasons or len(reasons) == len(places):  # a machine may lack one of the families
        reason = os.strerror(errno.EADDRINUSE if errno.EADDRINUSE in reasons else reasons[0])
        raise InputError(f"port {port} of {host} cannot be used ({reason}): give another --port, or --host")


def _why_not(family: int, address: tuple[str, int]) -> int | None:
    """The number of the error with which nothing can listen there; None if something can."""
    try:
        socket.create_server(address, family=family).close()
    except OSError as error:
        return error.errno or errno.EAFNOSUPPORT
    return None


def serve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    generate: Callable | None,
    host: str,
    port: int,
    use_graphs: bool = True,
) -> None:
    """Answer requests for the model called `name`, or for none by name, until interrupted: one after the other by `generate`, which takes
    the place of the model's own from now on; or without it several at once, whose tokens share forward passes and a cache of pages, and
    are chosen as the model's generation config says: transformers has one for all."""
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager

    class ModelManager(model_manager.ModelManager):
        def _load_model(self, wanted: str, *args, **kwargs) -> PreTrainedModel:
            if wanted != name:
                raise ValueError(f"this server has {name} alone")
            return model

        def _load_processor(self, *args, **kwargs) -> PreTrainedTokenizerBase:
            return tokenizer

        @staticmethod
        def process_model_name(model_id: str) -> str:
            """As it is: with a revision, as elsewhere, what an answer calls the model could not be asked for."""
            return model_id

        @staticmethod
        def get_gen_models(cache_dir=None) -> list[dict]:
            """What is listed, by releases before 5.24, which would list what was downloaded."""
            return [{"id": name, "object": "model", "owned_by": "", "created": 0}]

    options = {"continuous_batching": generate is None}
    if generate is None:
        options |= ON_A_CPU if model.device.type == "cpu" else {} if use_graphs else {"cb_use_cuda_graph": False}
        model.init_continuous_batching = one_config(model, model.init_continuous_batching)
    else:
        model.generate = sampling_if_asked(model, generate)
    there, model_manager.ModelManager = model_manager.ModelManager, ModelManager  # which the server makes one of
    try:
        Serve(force_model=name, host=host, port=port, **options)
    finally:
        model_manager.ModelManager = there


def sampling_if_asked(model: PreTrainedModel, generate: Callable) -> Callable:
    """`generate`, for requests: one that names a temperature above 0 is sampled, which the server leaves to the model's own config."""
    own = model.generation_config

    def answered(*args, generation_config: GenerationConfig, **kwargs):
        names_some = (generation_config.temperature, generation_config.top_p) != (own.temperature, own.top_p)
        if names_some and generation_config.temperature != 0:
            generation_config.do_sample = True
        return generate(*args, generation_config=generation_config, **kwargs)

    return answered


def one_config(model: PreTrainedModel, init: Callable) -> Callable:
    """`init`, but with the model's own way to choose tokens, where the first request's would be that of all; and a manager that refuses
    requests without a token, by one of which the worker of all would end."""

    def initialized(*args, generation_config: GenerationConfig, **kwargs):
        config = copy.deepcopy(model.generation_config)
        config.use_cache, config.max_new_tokens = generation_config.use_cache, generation_config.max_new_tokens
        manager = init(*args, generation_config=config, **kwargs)
        add = manager.add_request

        def add_request(input_ids: list[int], *args, **kwargs):
            if not input_ids:
                raise ValueError("the prompt has no tokens: give some text")
            return add(input_ids, *args, **kwargs)

        manager.add_request = add_request
        return manager

    return initialized

"""llama.cpp, as the wheels of cyllama have it, on one thread."""

from pathlib import Path

import cyllama.llama.llama_cpp as library
import numpy
import torch


class Model(library.LlamaModel):
    @property
    def n_vocab(self) -> int:
        """For the context, which asks for it here."""
        return self.get_vocab().n_vocab


class LlamaCpp:
    """A GGUF file, loaded."""

    def __init__(self, file: Path, context: int = 512):
        library.disable_logging()
        self.model, settings = Model(str(file), verbose=False), library.LlamaContextParams()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_threads = settings.n_threads_batch = 1
        self.context, self.length = library.LlamaContext(self.model, settings), 0

    def read(self, tokens: list[int], all_of_them: bool = False) -> None:
        """Compute what follows on the tokens, or on the last of them, which follow on those that were given before."""
        batch = library.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
        for place, token in enumerate(tokens):
            batch.add(token, self.length + place, [0], all_of_them or place == len(tokens) - 1)
        self.context.decode(batch)
        self.length += len(tokens)

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """After each of the tokens: [tokens, vocabulary]."""
        self.read(tokens, all_of_them=True)
        rows = (numpy.array(self.context.get_logits_ith(place), numpy.float32) for place in range(len(tokens)))
        return torch.from_numpy(numpy.stack(list(rows)))

    def forget(self) -> None:
        """Begin with an empty context."""
        self.context.kv_cache_clear()
        self.length = 0


def quantize(file: Path, out: Path, mixture: int) -> None:
    """By llama.cpp itself. mixture: its number (llama_ftype)."""
    settings = library.LlamaModelQuantizeParams()
    settings.ftype, settings.nthread = mixture, 1
    library.model_quantize(str(file), str(out), settings)

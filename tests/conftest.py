"""What the tests share: tiny models written to disk with a real tokenizer, a text, and a machine without a hub.

Nothing is downloaded: models are random (fixed seed, logits that differ clearly between tokens), the tokenizer has one
token a byte and a BOS in front. And random layers: weights, correlated inputs, Hessians, what is lost under them.
"""

import importlib.util
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedTokenizerFast

from quant import dequantize

collect_ignore = [] if importlib.util.find_spec("vllm") else ["test_vllm.py"]  # scripts/vllm.sh runs it
VOCABULARY = 300
CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
WORDS = (
    "the of a river in which and to mountain was old by small light water on grew for with city house it as language "
    "north had been built stone from their music year across under some bridge people called forest"
).split()


def make_text(characters: int, seed: int = 0) -> str:
    """Pseudo-random English-like text; a letter's frequency and its neighbours are far from uniform."""
    rng, pieces, length = random.Random(seed), [], 0
    while length < characters:
        sentence = " ".join(rng.choices(WORDS, k=rng.randint(4, 12))).capitalize() + rng.choice([". ", ".\n"])
        pieces.append(sentence)
        length += len(sentence)
    return "".join(pieces)[:characters]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, ids in a fixed order, <s> put in front of every text."""
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights of unit gain, norms and biases that are not neutral: whatever is left out or swapped shows in the logits."""
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=rng)
        if parameter.ndim > 1:
            parameter.data.copy_(noise * (0.3 if "embed" in name or "head" in name else 1 / parameter.shape[-1] ** 0.5))
        else:
            parameter.data.copy_(noise * 0.1 + (name.endswith("weight")))
    return model


def write_model(config, folder: Path, dtype: str = "float32", **save_options) -> Path:
    """A random model of `config` and the tokenizer, as save_pretrained writes them."""
    model = randomize(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).to(getattr(torch, dtype))
    model.save_pretrained(folder, **save_options)
    make_tokenizer().save_pretrained(folder)
    return folder


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Gaussian weights, each row with a scale of its own and a few outliers."""
    g = generator(seed)
    W = torch.randn(rows, columns, generator=g) * (0.5 + torch.rand(rows, 1, generator=g))
    return torch.where(torch.rand(rows, columns, generator=g) < 0.01, 4 * W, W)


def inputs(tokens: int, columns: int, seed: int = 1, spread: float = 1.0) -> torch.Tensor:
    """Correlated inputs whose columns differ in size by about exp(spread), as behind a norm layer."""
    g = generator(seed)
    mixed = torch.randn(tokens, columns, generator=g) @ torch.randn(columns, columns, generator=g) / columns**0.5
    return (mixed + torch.randn(tokens, 1, generator=g)) * (spread * torch.randn(columns, generator=g)).exp()


def signed(scale: torch.Tensor) -> torch.Tensor:
    """Scales of which every other row's is negative, as those of symmetric files may be."""
    return scale * (1 - 2 * (torch.arange(len(scale)) % 2))[:, None]


def hessian(columns: int, tokens: int = 1024, seed: int = 1) -> torch.Tensor:
    X = inputs(tokens, columns, seed)
    return X.T @ X / tokens


def damped(H: torch.Tensor, percdamp: float) -> torch.Tensor:
    """What the loss is measured with, from the docstrings: unit diagonal for dead columns, then percdamp of the mean diagonal."""
    H = H.double()
    mean = H.diagonal().mean()
    return H + torch.diag((H.diagonal() == 0).double() + percdamp * mean)


def output_error(W: torch.Tensor, codes: torch.Tensor, levels: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """tr(E H E^T) by rows, in float64."""
    E = W.double() - dequantize(codes, levels).double()
    return ((E @ H) * E).sum(1)


@pytest.fixture(scope="session", autouse=True)
def no_cache_of_the_user(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEANQUANT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """A cache of token windows for this test alone: stand-ins for the hub differ from test to test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LEANQUANT_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Factory: tiny_model(family, tied, sharded, dtype, **sizes) -> folder. Folders are shared: copy one before breaking it."""
    made = {}

    def make(family="llama", tied=False, sharded=False, dtype="float32", **sizes) -> Path:
        key = (family, tied, sharded, dtype, *sorted(sizes.items()))
        if key not in made:
            config = CONFIGS[family](tie_word_embeddings=tied, **(SIZES | sizes))
            options = {"max_shard_size": "100KB"} if sharded else {}
            made[key] = write_model(config, tmp_path_factory.mktemp(f"{family}-model"), dtype, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Calibration text: 8000 characters, as many tokens and one."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(make_text(8000, seed=1))
    return path


@pytest.fixture(scope="session")
def test_text(tmp_path_factory) -> Path:
    """Held-out text."""
    path = tmp_path_factory.mktemp("text") / "held-out.txt"
    path.write_text(make_text(600, seed=2))
    return path


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No hub: what would be downloaded fails at once. The constants matter where the libraries are already imported."""
    import datasets
    import huggingface_hub

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))

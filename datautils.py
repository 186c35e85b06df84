"""Token windows for calibration and evaluation, from the six published corpora or from a local file.

A corpus is a row of `CORPORA`; sampling is in two functions. Local files: .txt, .jsonl (`text` field), .parquet
(`text` column). Windows come back as int64 [n, seqlen], from a cache if the same were asked for before. Nothing is
downloaded or imported before it is asked for.
"""

import contextlib
import hashlib
import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from leanquant.errors import InputError, first_line

C4_TRAIN = {"train": "en/c4-train.00000-of-01024.json.gz"}
C4_VALIDATION = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
PARQUET = "refs/convert/parquet"  # ptb's own branch is a loading script, which datasets 4 and later refuse


@dataclass(frozen=True)
class Corpus:
    """Where a corpus lies on the hub, and how its documents become windows.

    train, test: arguments of datasets.load_dataset, besides the repository. joiner: put between documents.
    calibrate: "stream" (random windows of the joined training text), "documents" (random documents, one random
    window each) or "permutation" (a seeded permutation of the documents, the first window of each).
    evaluate: "stream" (consecutive windows of the joined test documents) or "documents". test_documents,
    test_windows: how many of them are used (None: all).
    """

    repository: str
    field: str
    train: dict
    test: dict
    joiner: str
    calibrate: str = "stream"
    evaluate: str = "stream"
    test_documents: int | None = None
    test_windows: int | None = None


_wikitext = partial(Corpus, "Salesforce/wikitext", "text", {"name": "wikitext-2-raw-v1", "split": "train"})
_ptb = partial(Corpus, "ptb-text-only/ptb_text_only", "sentence", {"data_dir": "penn_treebank", "revision": PARQUET, "split": "train"})
_c4 = partial(
    Corpus, "allenai/c4", "text", {"data_files": C4_TRAIN, "split": "train"}, {"data_files": C4_VALIDATION, "split": "validation"}, " "
)

CORPORA = {
    "wikitext2": _wikitext({"name": "wikitext-2-raw-v1", "split": "test"}, "\n\n"),
    "ptb": _ptb({"data_dir": "penn_treebank", "revision": PARQUET, "split": "validation"}, "\n\n"),
    "ptb-new": _ptb({"data_dir": "penn_treebank", "revision": PARQUET, "split": "test"}, " "),
    "c4": _c4("documents", "documents", test_windows=256),
    "c4-new": _c4("documents", test_documents=1100, test_windows=256),
    "c4-full": _c4("permutation", test_documents=1100, test_windows=256),
}
TEST_SETS = ("wikitext2", "ptb", "c4")
NEW_TEST_SETS = ("wikitext2", "ptb-new", "c4-new")
# Bytes of memory for each byte of a text, and for each of its tokens: from two tokenizers, of 1 and of 4.2 bytes a token.
TOKENIZING_A_BYTE, TOKENIZING_A_TOKEN = 92, 238
CACHE_VERSION = 1  # goes up with every change of what windows a text gives
DRAWS = 5000  # of documents that are too short, before it is found out whether all are; of C4's a few in a hundred have 2048 tokens
LOCAL_SUFFIXES = (".txt", ".jsonl", ".parquet")


def check_source(source: str) -> None:
    """Raise InputError unless `source` is a published name or an existing local file of a known kind."""
    if source in CORPORA:
        return
    path = Path(source)
    if path.suffix not in LOCAL_SUFFIXES:
        raise InputError(f"unknown dataset {source}: give one of {', '.join(CORPORA)}, or a {', '.join(LOCAL_SUFFIXES)} file")
    if not path.is_file():
        raise InputError(f"{source} does not exist: check the path of the text file")


def calibration_windows(source: str, tokenizer, nsamples: int, seqlen: int, seed: int) -> torch.Tensor:
    """`nsamples` windows of `seqlen` tokens [nsamples, seqlen], the same for the same seed."""
    check_source(source)
    return _cached(_calibration_windows, source, tokenizer, nsamples, seqlen, seed)


def windows_apart(source: str, tokenizer, nsamples: int, kept_back: int, seqlen: int, seed: int) -> torch.Tensor:
    """[nsamples + kept_back, seqlen]: as `calibration_windows`, and then windows on which to see what was learned from those. Of one text
    these are its end, which the others do not reach; of a corpus of documents further ones, drawn as the others are."""
    check_source(source)
    return _cached(_windows_apart, source, tokenizer, nsamples, kept_back, seqlen, seed)


def tokenizing_bytes(source: str, tokenizer, *settings: int) -> int:
    """About what `calibration_windows` (settings: nsamples, seqlen, seed) or `evaluation_windows` (settings: seqlen) take in memory while
    they tokenize a local text at once: none if its windows are in the cache. 0 for a corpus of the hub, which may not be here yet."""
    check_source(source)
    make, settings = (_calibration_windows, settings) if len(settings) == 3 else (_evaluation_windows, 2 * settings)
    if source in CORPORA or _cache_file(make, source, tokenizer, *settings).is_file():
        return 0
    with open(source, "rb") as file:
        sample = file.read(2**16)
    tokens = len(tokenizer(sample.decode(errors="replace"), verbose=False)["input_ids"]) / max(1, len(sample))
    return int(Path(source).stat().st_size * (TOKENIZING_A_BYTE + TOKENIZING_A_TOKEN * tokens))


def _calibration_windows(source: str, tokenizer, nsamples: int, seqlen: int, seed: int) -> torch.Tensor:
    return _windows_apart(source, tokenizer, nsamples, 0, seqlen, seed)


def _windows_apart(source: str, tokenizer, nsamples: int, kept_back: int, seqlen: int, seed: int) -> torch.Tensor:
    corpus = CORPORA.get(source)
    documents = _local_documents(source) if corpus is None else _hub_documents(corpus, corpus.train)
    if corpus is None or corpus.calibrate == "stream":
        joiner = "\n\n" if corpus is None else corpus.joiner
        tokens = _tokens(joiner.join(documents[:]), tokenizer)
        _check_length(tokens, seqlen, source, kept_back + 1)
        rest = tokens[len(tokens) - kept_back * seqlen :]
        return torch.cat([_random_windows(tokens[: len(tokens) - len(rest)], nsamples, seqlen, seed, source), rest.view(-1, seqlen)])
    pick = _permuted_documents if corpus.calibrate == "permutation" else _random_documents
    return pick(documents, tokenizer, nsamples + kept_back, seqlen, seed, source)


def evaluation_windows(source: str, tokenizer, seqlen: int, stride: int | None = None) -> torch.Tensor:
    """The windows [n, seqlen] on which the field measures perplexity for `source`; `stride` tokens apart instead of seqlen, if given."""
    check_source(source)
    stride = stride or seqlen
    if source in CORPORA and CORPORA[source].evaluate == "documents" and stride != seqlen:
        raise InputError(f"{source} is measured on windows of random documents, not of one text: leave out --stride, or take c4-new")
    return _cached(_evaluation_windows, source, tokenizer, seqlen, stride)


def _evaluation_windows(source: str, tokenizer, seqlen: int, stride: int) -> torch.Tensor:
    if source not in CORPORA:
        return _all_windows(_tokens("\n\n".join(_local_documents(source)), tokenizer), seqlen, stride, None, source)
    corpus = CORPORA[source]
    documents = _hub_documents(corpus, corpus.test)
    if corpus.evaluate == "documents":
        return _random_documents(documents, tokenizer, corpus.test_windows, seqlen, 0, source)
    text = corpus.joiner.join(documents[: corpus.test_documents])
    return _all_windows(_tokens(text, tokenizer), seqlen, stride, corpus.test_windows, source)


# --- the cache -------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where token windows are kept: $LEANQUANT_CACHE, or leanquant under the user's cache folder. May be deleted at any time."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "leanquant"
    return Path(os.environ.get("LEANQUANT_CACHE") or default)


def _cached(make: Callable[..., torch.Tensor], source: str, tokenizer, *settings: int) -> torch.Tensor:
    """make(source, tokenizer, *settings), or what that gave before for the same text, tokenizer and settings."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    file = _cache_file(make, source, tokenizer, *settings)
    with contextlib.suppress(OSError, SafetensorError, KeyError):
        return load_file(file)["windows"]
    windows = make(source, tokenizer, *settings)
    with contextlib.suppress(OSError, SafetensorError):  # no place for a cache: it is only for speed
        file.parent.mkdir(parents=True, exist_ok=True)
        partial_file = file.with_suffix(f".{os.getpid()}.partial")
        save_file({"windows": windows}, partial_file)
        partial_file.replace(file)
    return windows


def _cache_file(make: Callable[..., torch.Tensor], source: str, tokenizer, *settings: int) -> Path:
    if source in CORPORA:
        here = Path(CORPORA[source].repository)  # a folder of that name would be read in the hub's place
        text = repr((CORPORA[source], str(here.resolve()) if here.is_dir() else "the hub's"))
    else:
        text = hashlib.sha256(Path(source).read_bytes()).hexdigest() + Path(source).suffix
    key = hashlib.sha256(repr((CACHE_VERSION, make.__name__, text, _fingerprint(tokenizer), settings)).encode()).hexdigest()
    return cache_folder() / f"{key[:32]}.safetensors"


def digest(*parts: bytes) -> str:
    """A name for what `parts` say, token ids or other bytes: 16 hexadecimal digits."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _fingerprint(tokenizer) -> str:
    """Of all that decides which tokens a text becomes."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        return backend.to_str()
    flags = [getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")]
    return repr((type(tokenizer).__name__, flags, sorted(tokenizer.get_vocab().items())))


# --- sampling --------------------------------------------------------------------------------------------------


def _tokens(text: str, tokenizer) -> torch.Tensor:
    """Token ids [N] of a text, with the special tokens that the tokenizer adds (a BOS in front, for most Llamas)."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def _check_length(tokens: torch.Tensor, seqlen: int, source: str, windows: int = 1) -> None:
    if len(tokens) < windows * seqlen:
        what = f"one window needs {seqlen}" if windows == 1 else f"{windows} windows need {windows * seqlen}"
        raise InputError(f"{source} has {len(tokens)} tokens and {what}: give a longer text or a smaller --seqlen")


def _random_windows(tokens: torch.Tensor, count: int, seqlen: int, seed: int, source: str) -> torch.Tensor:
    _check_length(tokens, seqlen, source)
    rng = random.Random(seed)
    starts = [rng.randint(0, max(0, len(tokens) - seqlen - 1)) for _ in range(count)]
    return torch.stack([tokens[start : start + seqlen] for start in starts])


def _all_windows(tokens: torch.Tensor, seqlen: int, stride: int, limit: int | None, source: str) -> torch.Tensor:
    """Windows of the tokens that `limit` windows side by side (None: as many as there are) would cover."""
    _check_length(tokens, seqlen, source)
    count = min(len(tokens) // seqlen, limit or len(tokens))
    return tokens[: count * seqlen].unfold(0, seqlen, stride).contiguous()


def _random_documents(documents: Sequence[str], tokenizer, count: int, seqlen: int, seed: int, source: str) -> torch.Tensor:
    """Documents drawn at random until one has `seqlen` tokens, then one random window of it; `count` times.

    Where the first draws find none, all are looked at once: however rare long ones are, they are drawn until there are enough.
    """
    rng = random.Random(seed)
    windows, misses = [], 0
    while len(windows) < count:
        tokens = _tokens(documents[rng.randint(0, len(documents) - 1)], tokenizer)
        if len(tokens) >= seqlen:
            start = rng.randint(0, max(0, len(tokens) - seqlen - 1))
            windows.append(tokens[start : start + seqlen])
            continue
        misses += 1
        if misses == DRAWS and not windows and (longest := max(len(_tokens(text, tokenizer)) for text in documents)) < seqlen:
            raise InputError(f"no document of {source} has {seqlen} tokens (the longest has {longest}): give a smaller --seqlen")
    return torch.stack(windows)


def _permuted_documents(documents: Sequence[str], tokenizer, count: int, seqlen: int, seed: int, source: str) -> torch.Tensor:
    import numpy as np

    windows, longest = [], 0
    for index in np.random.RandomState(seed).permutation(len(documents)).tolist():
        tokens = _tokens(documents[index], tokenizer)
        longest = max(longest, len(tokens))
        if len(tokens) >= seqlen:
            windows.append(tokens[:seqlen])
        if len(windows) == count:
            return torch.stack(windows)
    raise InputError(
        f"{source} has {len(windows)} documents of {seqlen} tokens (the longest has {longest}) and {count} are wanted: "
        "give a smaller --nsamples or --seqlen"
    )


# --- reading ---------------------------------------------------------------------------------------------------


def _local_documents(source: str) -> list[str]:
    path, readers = Path(source), {".txt": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    documents = readers[path.suffix](path)
    if not any(document.strip() for document in documents):
        raise InputError(f"{source} holds no text: give another file")
    return documents


def _read_text(path: Path) -> list[str]:
    try:
        return [path.read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from None


def _read_jsonl(path: Path) -> list[str]:
    documents = []
    for number, line in enumerate(_read_text(path)[0].split("\n"), 1):
        if line.strip():
            try:
                documents.append(json.loads(line)["text"] + "")  # TypeError unless it is a string
            except (json.JSONDecodeError, KeyError, TypeError):
                raise InputError(f'{path}, line {number}: not a JSON object with a "text" field') from None
    return documents


def _read_parquet(path: Path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        return [str(text) for text in pyarrow.parquet.read_table(path, columns=["text"])["text"].drop_null().to_pylist()]
    except (pyarrow.ArrowException, KeyError, OSError) as error:
        raise InputError(f"{path} is not a parquet file with a text column ({first_line(error)})") from None


def _hub_documents(corpus: Corpus, selection: dict) -> Sequence[str]:
    """The documents of one split, as a column read on demand."""
    import datasets

    from leanquant.modeling import ask_hub

    kept = Path(datasets.config.HF_DATASETS_CACHE) / corpus.repository.replace("/", "___")
    try:
        if not kept.is_dir() and not Path(corpus.repository).is_dir():
            ask_hub(corpus.repository, "README.md", "dataset")  # datasets would ask again and again for half a minute
        return datasets.load_dataset(corpus.repository, **selection)[corpus.field]
    except Exception as error:  # its own, the hub's, the network's, the disk's: there is no common ancestor
        reason = first_line(error)
        raise InputError(
            f"cannot get {corpus.repository} from the hub ({reason}): check the network, or give a local "
            f"{', '.join(LOCAL_SUFFIXES)} file instead"
        ) from None

"""The items of the offline task pack, made anew each time from the demo's held-out articles: nothing is stored.

    python eval_quantized.py ... --include_path scripts/tasks --tasks demo

* `words`: a passage that stops before a word it has used already; what is that word (as in LAMBADA)?
* `continuations`: two sentences; which of four sentences of the same article comes next (as in HellaSwag)?

No model filtered these items, so they are easier than the corpora they are modelled on.
"""

import random
import re
import sys
from pathlib import Path

import datasets

ROOT = Path(__file__).resolve().parents[2]
SENTENCE_END = re.compile(r"(?<=[a-z0-9)”\"][.!?]) (?=[A-Z])")
SENTENCE = re.compile(r"[A-Z][^=*|<>{}\[\]_]+[.!?]")
SHORTEST, LONGEST = 40, 90  # words of a passage
ENDINGS = 4


def words(**_) -> datasets.DatasetDict:
    """Items {context, word}: passages of 40 to 90 words that begin with a sentence, no two with a sentence in common."""
    items = []
    for paragraph in (paragraph for article in plain_paragraphs() for paragraph in article):
        passage: list[str] = []
        for sentence in paragraph:
            lengths = range(len(passage) + 1, len(passage) + len(sentence.split()) + 1)
            passage += sentence.split()
            found = next((n for n in lengths if SHORTEST <= n <= LONGEST and is_guessable(passage[:n])), None)
            if found:
                items.append({"context": " ".join(passage[: found - 1]), "word": bare(passage[found - 1])})
            if found or len(passage) > LONGEST:
                passage = []
    return as_test_split(items)


def is_guessable(passage: list[str]) -> bool:
    """Is the last word of the passage one of four letters or more that it has used before?"""
    *before, last = map(bare, passage)
    return len(last) >= 4 and last.isalpha() and last in before


def bare(word: str) -> str:
    return word.strip(".,;:!?()'")


def continuations(**_) -> datasets.DatasetDict:
    """Items {context, endings, label}: the next sentence among others of its article that are about as long."""
    rng = random.Random(0)
    items = []
    for article in plain_paragraphs():
        sentences = [sentence for paragraph in article for sentence in paragraph]
        for paragraph in article:
            for first in range(0, len(paragraph) - 2, 3):
                *context, ending = paragraph[first : first + 3]
                others = [s for s in sentences if s not in paragraph and abs(len(s) - len(ending)) <= 0.3 * len(ending)]
                if len(set(others)) < ENDINGS - 1:
                    continue
                endings = [ending, *rng.sample(sorted(set(others)), ENDINGS - 1)]
                rng.shuffle(endings)
                items.append({"context": " ".join(context), "endings": endings, "label": endings.index(ending)})
    return as_test_split(items)


def plain_paragraphs() -> list[list[list[str]]]:
    """Sentences of 6 to 40 words without markup, by run of such sentences, by article."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from demo_data import held_out_articles

    articles = []
    for text in held_out_articles():
        runs: list[list[str]] = []
        for line in text.replace("'''", "").replace("''", "").split("\n"):
            runs.append([])
            for sentence in SENTENCE_END.split(line.strip()):
                if SENTENCE.fullmatch(sentence) and 6 <= len(sentence.split()) <= 40:
                    runs[-1].append(sentence)
                else:
                    runs.append([])
        articles.append([run for run in runs if run])
    return articles


def as_test_split(items: list[dict]) -> datasets.DatasetDict:
    return datasets.DatasetDict(test=datasets.Dataset.from_list(items))

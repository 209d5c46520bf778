"""Metrics of text_similarity, from 0 to 1. Words are runs of letters and digits, in lower case.

``fuzzy_match`` is twice the longest common subsequence of characters divided by both lengths, RapidFuzz's ``ratio``;
``rouge_N`` and ``rouge_l`` are the F-measures of Lin (2004), without stemming; ``gleu`` is that of Wu et al. (2016). Metrics
that need models or word lists (cosine, meteor), and BLEU, which is made for whole corpora, are not offered.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence

MAX_CHARS = 20_000
"""Longer texts are compared up to here: the time grows with the square of the length."""
GLEU_ORDER = 4
_WORD = re.compile(r"\w+")
Ngrams = collections.Counter[tuple[str, ...]]


def similarity(metric: str, text: str, reference: str) -> float:
    """How similar ``text`` is to ``reference`` by a metric of ``schema.SIMILARITIES``."""
    text, reference = text[:MAX_CHARS], reference[:MAX_CHARS]
    if metric == "fuzzy_match":
        return _f_measure(_longest_common(text, reference), len(text), len(reference))
    given, wanted = (_WORD.findall(each.lower()) for each in (text, reference))
    if metric == "rouge_l":
        return _f_measure(_longest_common(given, wanted), len(given), len(wanted))
    if metric == "gleu":
        orders = range(1, GLEU_ORDER + 1)
        counts = [(_ngrams(given, n), _ngrams(wanted, n)) for n in orders]
        matches = sum((mine & theirs).total() for mine, theirs in counts)
        longest = max(sum(mine.total() for mine, _ in counts), sum(theirs.total() for _, theirs in counts))
        return matches / longest if longest else 0.0
    mine, theirs = (_ngrams(words, int(metric.removeprefix("rouge_"))) for words in (given, wanted))
    return _f_measure((mine & theirs).total(), mine.total(), theirs.total())


def _ngrams(words: Sequence[str], order: int) -> Ngrams:
    return collections.Counter(zip(*(words[start:] for start in range(order)), strict=False))


def _f_measure(matches: int, given: int, wanted: int) -> float:
    return 2 * matches / (given + wanted) if matches else 0.0


def _longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence. A row of the usual table is one integer, with a zero where it increases
    (Hyyrö 2004): a client chooses the texts, and this takes milliseconds for any."""
    places: dict[str, int] = collections.defaultdict(int)
    for index, symbol in enumerate(first):
        places[symbol] |= 1 << index
    full = row = (1 << len(first)) - 1
    for symbol in second:
        found = row & places.get(symbol, 0)
        row = ((row + found) | (row - found)) & full
    return len(first) - row.bit_count()

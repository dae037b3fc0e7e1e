"""Questions with known answers, made from text alone: which identifier comes next, which bracket closes.

The choice of questions depends on the texts and the arguments alone. If there are more than requested, those with the
smallest SHA-256 of (task, text, place) are used.
"""

from __future__ import annotations

import ast
import io
import keyword
import re
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import sha256
from types import MappingProxyType
from typing import TypedDict

CHOICES = 4
"""Identifiers to choose from."""
SHORTEST = 3  # characters of an identifier, because `i` and `os` are too easy to guess
BRACKETS = {")": "(", "]": "[", "}": "{"}


class Question(TypedDict):
    """One question: which of the choices follows the context in the text.

    The context ends before a space. Every choice begins with the text from there to the place of the question. The
    reason: tokenizers begin a token at a space, and may join adjacent characters (`)` and `)` to `))`).
    """

    context: str
    choices: list[str]
    answer: int
    """The index of the right choice."""
    document: str
    """SHA-256 of the text from which it was made."""
    place: int
    """The place of the answer in the text, in characters."""


def identifier_cloze(documents: Iterable[str], count: int, characters: int) -> list[Question]:
    """Which identifier comes next, of four with the same length.

    The context ends before an identifier that occurs in it. The wrong choices are three others that occur earlier in
    the same text; those in the context come first. They have the same length, because a sum of log-likelihoods favours
    short texts. A choice ends with the next character of the text, so that `name` is not also the beginning of `names`.
    In text that Python can parse, identifiers are Python's names without keywords. In other text they are words.

    Args:
        count: largest number of questions; 0 means all.
        characters: largest length of the context. An identifier has at most a third of it.
    """
    made: dict[str, Question] = {}
    for text in documents:
        document = sha256(text.encode()).hexdigest()
        places = [(start, end) for start, end in identifiers(text) if SHORTEST <= end - start <= characters // 3]
        last: dict[int, dict[str, int]] = {}  # by length: each identifier so far, and where it began last
        for start, end in places:
            word, begin = text[start:end], max(0, start - characters)
            seen = last.setdefault(end - start, {})
            if seen.get(word, -1) >= begin and len(seen) >= CHOICES and end < len(text):
                key = _key("identifier_cloze", document, start)
                others = sorted(seen.keys() - {word}, key=lambda name: (seen[name] < begin, _key(key, name)))
                chosen = sorted([word, *others[: CHOICES - 1]], key=lambda name: _key(key, "order", name))
                context, rest = _at_space(text[begin:start])
                made[key] = Question(
                    context=context, choices=[rest + name + text[end] for name in chosen], answer=chosen.index(word),
                    document=document, place=start,
                )  # fmt: skip
            seen[word] = start
    return _first(made, count)


def bracket_matching(documents: Iterable[str], count: int, characters: int) -> list[Question]:
    """Which closing bracket comes next, `)`, `]` or `}`: the one for the last bracket that is still open.

    The context holds the opening bracket and at least one character after it. Each bracket is the answer equally
    often, so that a model that knows only the frequencies is right in a third of the cases. Brackets in strings and
    comments count too. If two do not match, all open brackets are forgotten.

    Args:
        count: largest number of questions; 0 means all.
        characters: largest length of the context.
    """
    made: dict[str, dict[str, Question]] = {bracket: {} for bracket in BRACKETS}
    for text in documents:
        document = sha256(text.encode()).hexdigest()
        opened: list[int] = []
        for place, character in enumerate(text):
            if character in BRACKETS.values():
                opened.append(place)
            elif character in BRACKETS and opened:
                begin, opening = max(0, place - characters), opened.pop()
                if text[opening] != BRACKETS[character]:
                    opened.clear()
                elif begin <= opening < place - 1:
                    context, rest = _at_space(text[begin:place])
                    made[character][_key("bracket_matching", document, place)] = Question(
                        context=context, choices=[rest + bracket for bracket in BRACKETS],
                        answer=[*BRACKETS].index(character), document=document, place=place,
                    )  # fmt: skip
    each = min(len(of) for of in made.values())
    each = min(each, max(1, count // len(made))) if count else each
    return [question for of in made.values() for question in (_first(of, each) if each else [])]


LOCAL: Mapping[str, Callable[[Iterable[str], int, int], list[Question]]] = MappingProxyType(
    {"identifier_cloze": identifier_cloze, "bracket_matching": bracket_matching}
)
"""The tasks made from text, by name."""


def identifiers(text: str) -> Iterator[tuple[int, int]]:
    """Where each identifier of a text begins and ends, in characters."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes in somebody else's strings
            ast.parse(text)
        lines = [0, *(found.end() for found in re.finditer("\n", text))]
        for kind, word, (row, column), *_ in tokenize.generate_tokens(io.StringIO(text).readline):
            if kind == tokenize.NAME and not keyword.iskeyword(word):
                start = lines[row - 1] + column
                yield start, start + len(word)
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError):  # not Python
        yield from (found.span() for found in re.finditer(r"[^\W\d]\w*", text))


def _at_space(text: str) -> tuple[str, str]:
    """The text before its last space, and the rest. Several spaces in a row belong to the rest."""
    cut = len(re.sub(r"\s*\S*$", "", text))
    return text[:cut], text[cut:]


def _key(*parts: object) -> str:
    return sha256(":".join(map(str, parts)).encode()).hexdigest()


def _first(made: Mapping[str, Question], count: int) -> list[Question]:
    keys = sorted(made)
    return [made[key] for key in (keys[:count] if count else keys)]

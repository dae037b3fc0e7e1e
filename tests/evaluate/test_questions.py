"""Questions made from text: each answer is what the text says, and nothing but the context tells it."""

from __future__ import annotations

import re
from collections import Counter
from hashlib import sha256

import pytest

from spannorm.errors import InputError
from spannorm.evaluate.questions import BRACKETS, Question, bracket_matching, identifier_cloze, identifiers
from spannorm.evaluate.tasks import LocalText, questions, questions_sha256
from spannorm.train.data import TokenData

CODE = """\
def total(price, count, stock):
    # price of count
    extra = price * len("price's")
    return extra + price * (count - stock)
"""


@pytest.fixture(scope="module")
def texts(tokens: TokenData) -> list[str]:
    return list(tokens.documents("test"))


def test_the_texts_of_a_split_are_those_of_the_corpus(tokens, texts, corpus):
    files = {path.read_text(encoding="utf-8") for path in corpus.iterdir()}
    assert len(texts) == tokens.splits["test"].documents and set(texts) <= files


def test_identifiers_of_code_are_its_names_and_of_other_text_its_words():
    found = [CODE[start:end] for start, end in identifiers(CODE)]
    names = "total price count stock extra price len extra price count stock"
    assert found == names.split()  # no keyword, nothing from the comment or the string
    prose = "Wer reitet so spät: durch Nacht?"
    assert [prose[s:e] for s, e in identifiers(prose)] == ["Wer", "reitet", "so", "spät", "durch", "Nacht"]


def test_identifiers_are_found_where_lines_end_in_other_ways_and_characters_are_wide():
    text = "größe = 'naïve\\u2028 🙂'; wert = größe\x0c\nlast = wert\n"
    assert [text[s:e] for s, e in identifiers(text)] == ["größe", "wert", "größe", "last", "wert"]


def shown(texts: list[str], question: Question) -> tuple[str, str, list[str]]:
    """The text of a question, what of it stands before the place asked for, and the bare choices."""
    (text,) = [t for t in texts if sha256(t.encode()).hexdigest() == question["document"]]
    assert not question["context"] or not question["context"][-1].isspace()
    asked = re.compile(r"\w+.|.", re.DOTALL).match(text, question["place"])  # a name with what follows, or a bracket
    assert asked
    right = question["choices"][question["answer"]]
    rest = right[: len(right) - len(asked[0])]
    assert text[: question["place"]].endswith(question["context"] + rest)
    assert all(choice.startswith(rest) for choice in question["choices"])
    return text, question["context"] + rest, [choice[len(rest) :] for choice in question["choices"]]


def test_a_cloze_asks_what_the_text_says_and_offers_earlier_names_of_one_length(texts):
    made = identifier_cloze(texts, 0, 96)
    assert len(made) > 100
    for question in made:
        text, seen, choices = shown(texts, question)
        right = choices[question["answer"]]
        assert text.startswith(right, question["place"]) and len(seen) <= 96
        assert len(set(choices)) == 4 and len({len(choice) for choice in choices}) == 1
        assert len({choice[-1] for choice in choices}) == 1
        assert re.search(rf"(?<!\w){re.escape(right[:-1])}(?!\w)", seen)
        before = text[: question["place"]]
        assert all(re.search(rf"(?<!\w){re.escape(choice[:-1])}(?!\w)", before) for choice in choices)
    places = Counter(question["answer"] for question in made)
    assert min(places.values()) > 0.2 * len(made)  # a model that always takes one place is at chance


def test_a_bracket_is_the_one_that_a_stack_of_the_context_leaves_open(texts):
    texts = [*texts, "{" + "[(a, b[1]), {c: (d)}]" * 20 + "x}"]
    made = bracket_matching(texts, 0, 80)
    assert len(made) > 30
    assert len(set(Counter(question["answer"] for question in made).values())) == 1  # each equally often
    for question in made:
        text, context, choices = shown(texts, question)
        right = text[question["place"]]
        assert choices == [")", "]", "}"] and choices[question["answer"]] == right and len(context) <= 80
        depth = 0
        for at in range(len(context) - 1, -1, -1):  # backwards, to the first that nothing after it has closed
            if context[at] in BRACKETS:
                depth += 1
            elif context[at] in BRACKETS.values():
                if depth == 0:
                    break
                depth -= 1
        assert context[at] == BRACKETS[right] and at < len(context) - 1


def test_a_context_that_does_not_hold_the_opening_bracket_is_no_question():
    text = "(" + "a" * 50 + ") [" + "b" * 5 + "] {" + "c" * 5 + "} (" + "d" * 5 + ")"
    made = bracket_matching([text], 0, 20)
    assert sorted(q["choices"][q["answer"]] for q in made) == [" (ddddd)", " [bbbbb]", " {ccccc}"]


def test_fewer_questions_are_the_first_of_more_and_no_draw_changes_them(texts):
    many, few = identifier_cloze(texts, 60, 96), identifier_cloze(texts, 25, 96)
    assert many[:25] == few and identifier_cloze(texts[::-1], 60, 96) == many
    assert questions_sha256(many) != questions_sha256(few)
    brackets = bracket_matching(texts, 10, 96)
    assert len(brackets) == 9


def test_too_few_questions_are_refused_with_their_number(texts):
    with pytest.raises(InputError, match=r"has 0 questions for the task bracket_matching"):
        questions("bracket_matching", LocalText(["only prose here, and nothing to close"], 128))
    with pytest.raises(InputError, match="--data"):
        questions("identifier_cloze", None)

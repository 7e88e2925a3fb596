"""What tasks.py promises: labels that are exact, lengths that are kept, everything from the seed."""

import itertools
import re

import pytest

from tasks import NEEDLES, babi, babilong, needle, sentences

TEXT = " ".join(f"On day {i} the {a} thing was said to be {b}.\nNobody minded!" for i, (a, b) in
                enumerate(itertools.product(("red", "blue", "green"), ("old", "new", "lost", "found"))))  # fmt: skip
WORDS = ["amber", "basalt", "cedar", "dune", "ember"]


def test_sentences_are_those_of_the_text_again_and_again():
    text = 'He said "No." Then he left.  A third\none… ends? Yes'
    once = list(itertools.islice(sentences(text), 5))
    assert once == ['He said "No."', "Then he left.", "A third one… ends?", "Yes", 'He said "No."']
    assert next(sentences(text, text.index("said"))) == "Then he left."
    assert max(map(len, itertools.islice(sentences("no end " * 1000), 20))) <= 401
    with pytest.raises(ValueError, match="the haystack is empty"):
        next(sentences(" \n"))


@pytest.mark.parametrize("kind", NEEDLES)
@pytest.mark.parametrize("length", [900, 4000])
def test_every_answer_stands_once_in_the_text_and_is_asked_for(kind, length):
    what, repeated, n_keys, n_asked, n_values = NEEDLES[kind]
    for seed in range(5):
        made = needle(kind, TEXT, length, seed, WORDS)
        text, question = made["prompt"].rsplit("\nWhat ", 1)
        stated = set(re.findall(r"for (\S+) is: (\S+)\.(?=\s|$)", text))
        assert len(stated) == n_keys * n_values and len(made["answers"]) == n_asked * n_values
        for value in made["answers"]:
            assert text.count(value) == 1 and value not in question
        assert [value for key in made["keys"] for value in made["answers"] if (key, value) in stated] == made["answers"]
        assert all(question.count(key) == 2 for key in made["keys"])
        assert all(re.fullmatch(r"\d{7}" if what == "number" else r"[0-9a-f-]{36}", value) for value in made["answers"])
        assert ("The grass is green." in text) == repeated


@pytest.mark.parametrize("kind", NEEDLES)
def test_a_prompt_fills_its_length_and_never_exceeds_it(kind):
    for length in range(900, 1100, 7):
        made = needle(kind, TEXT, length, 0, WORDS)
        size = len(made["prompt"] + " " + ", ".join(made["answers"]))
        assert length - 100 < size <= length  # a sentence less at most
    words = lambda text: len(text.split())  # noqa: E731  another measure of length
    assert words(needle(kind, TEXT, 300, 0, WORDS, size=words)["prompt"]) <= 300


def test_needles_lie_at_all_depths():
    depths = [needle("S-NIAH-2", TEXT, 2000, seed, WORDS)["depths"][0] for seed in range(40)]
    assert min(depths) < 0.2 and max(depths) > 0.8
    made = needle("MK-NIAH-1", TEXT, 2000, 0, WORDS)
    assert len(made["depths"]) == 4 and made["depths"] == sorted(made["depths"])


def test_a_needle_follows_from_its_seed():
    assert needle("MQ-NIAH", TEXT, 1500, 3, WORDS) == needle("MQ-NIAH", TEXT, 1500, 3, WORDS)
    assert needle("MQ-NIAH", TEXT, 1500, 3, WORDS) != needle("MQ-NIAH", TEXT, 1500, 4, WORDS)


def test_a_value_that_the_text_says_by_itself_is_not_hidden_in_it():
    value = needle("S-NIAH-2", TEXT, 900, 0, WORDS)["answers"][0]
    again = needle("S-NIAH-2", f"It was {value}, they say. Or so it was told to us.", 900, 0, WORDS)
    assert again["answers"] != [value] and again["prompt"].count(again["answers"][0]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("S-NIAH-9", TEXT, 900), "unknown kind of needle 'S-NIAH-9': legal are S-NIAH-1, "),
        (("S-NIAH-2", TEXT, 300), "length 300 has no room for a sentence around the question: S-NIAH-2 needs at least"),
        (("S-NIAH-2", "  ", 900, 0, WORDS), "the haystack is empty"),
        (("S-NIAH-2", "a b c.", 900), "there are only 0: at least 4 are needed"),
    ],
)
def test_bad_needles_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        needle(*arguments)


def test_the_questions_of_babi_know_the_facts_before_them(tmp_path):
    path = tmp_path / "qa1_test.txt"
    path.write_text("1 Mary went out.\n2 Where is Mary?\tout\t1\n3 She came in.\n4 Where is Mary? \tin\t3\n"
                    "1 New.\n2 What?\tyes\t1\n")  # fmt: skip
    questions = babi(path)
    assert [q["answer"] for q in questions] == ["out", "in", "yes"]
    assert [q["facts"] for q in questions] == [["Mary went out."], ["Mary went out.", "She came in."], ["New."]]
    assert questions[1]["question"] == "Where is Mary?"
    path.write_text("Mary went out.\n")
    with pytest.raises(ValueError, match="line 1 is no line of bAbI: 'Mary went out.'"):
        babi(path)


def test_facts_keep_their_order_in_a_text_of_the_length_asked_for():
    facts = [f"Fact number {i}." for i in range(12)]
    for seed in range(10):
        text = "".join(babilong(facts, "Which?", TEXT, 5000, seed))
        places = [text.index(fact) for fact in facts]
        assert places == sorted(places) and text.endswith("\nQuestion: Which?\nAnswer:") and 4900 < len(text) <= 5000
    assert "".join(babilong(facts, "Which?", TEXT, 260, 0)).count("Fact number") == 12
    with pytest.raises(ValueError, match="length 100 has no room for the facts and the question: at least"):
        babilong(facts, "Which?", TEXT, 100)


def test_ten_million_characters_come_one_sentence_at_a_time():
    longest = total = 0
    for piece in babilong(["One fact."] * 3, "Which?", TEXT, 10_000_000):
        longest, total = max(longest, len(piece)), total + len(piece)
    assert longest < 100 and 10_000_000 - 100 < total <= 10_000_000

"""prompts/: the shipped list is what its program writes, and reads like English."""

import re
import shutil

import pytest

from prompts import compose

PROMPTS = (compose.FOLDER / "prompts.txt").read_bytes().decode("ascii").removesuffix("\n").split("\n")
LENGTHS = [len(prompt.split()) for prompt in PROMPTS]


def matches(pattern):
    return [prompt for prompt in PROMPTS if re.search(pattern, prompt)]


def test_the_file_is_what_the_program_writes():
    assert compose.compose(4096, 0) == PROMPTS
    compose.main(compose.Args(check=True))


@pytest.mark.parametrize("changed", ["prompts.txt", "vocabulary.txt"])
def test_check_finds_either_changed_alone(tmp_path, monkeypatch, changed):
    for name in ("prompts.txt", "vocabulary.txt"):
        shutil.copy(compose.FOLDER / name, tmp_path)
    monkeypatch.setattr(compose, "FOLDER", tmp_path)
    compose.main(compose.Args(check=True))
    text = (tmp_path / changed).read_text()
    (tmp_path / changed).write_text(text.replace("lion", "ocelot"))
    with pytest.raises(SystemExit, match="stale"):
        compose.main(compose.Args(check=True))
    compose.main(compose.Args())
    compose.main(compose.Args(check=True))


def test_lines():
    assert len(set(PROMPTS)) == len(PROMPTS) == 4096
    assert max(map(len, PROMPTS)) <= 450  # in characters: the text encoder's 512 tokens are out of reach
    assert min(LENGTHS) >= 4 and max(LENGTHS) <= 80
    assert sum(length <= 20 for length in LENGTHS) > 1024 and sum(length >= 60 for length in LENGTHS) > 1024
    assert not matches(r"[^ -~]")
    assert not matches(r"[_{}|<>/*=+\[\]]")  # marks of the vocabulary


def test_spelling():
    assert not matches(r"^[^A-Z0-9]|[^.]$|\.[^ ]|\. [^A-Z0-9]|[.,:] ?[.,:]| [.,:]|  |^ | $")
    assert not matches(r"(?i)\b(\w+) \1\b")
    assert not matches(r"(?i)\b(an?|two|three) (an?|the|two|three)\b")
    assert not matches(r"(?i)\ba (?!unicorn|university)[aeiou]")
    assert not matches(r"(?i)\ban (?!hour)[^aeiou]")
    assert not matches(r"\b[Aa]n? (?:\w+ )?(men|women|children|wolves|deers|sheeps|fishes)\b")


def test_the_first_prompts_have_many_subjects():
    scenes, _ = compose.read_vocabulary((compose.FOLDER / "vocabulary.txt").read_text(encoding="utf-8"))
    named = {re.sub(r"\{.*?\} ?|[*]|^[-+]", "", subject) for scene in scenes for subject, _ in scene.pairs}
    subjects = []
    for prompt in PROMPTS[:64]:
        found = [name for name in named if re.search(rf"\b({name}|{compose.plural(name)})\b", prompt, re.I)]
        subjects.append(max(found, key=len))
    assert len(set(subjects)) > 48


def test_seeds_and_counts():
    assert compose.compose(64, 0) == PROMPTS[:64]
    assert len(set(compose.compose(512, 1)) & set(PROMPTS)) < 64


@pytest.mark.parametrize(
    ("they", "progressive", "text"),
    [
        ("they", False, "They carry their bags, stop and watch the lions"),
        ("she", False, "She carries her bags, stops and watches the lions"),
        ("he", False, "He carries his bags, stops and watches the lions"),
        ("it", True, "It carrying its bags, stopping and watching the lions"),
    ],
)
def test_agreement(they, progressive, text):
    assert compose.agree("_They _carry _their bags, _stop and _watch _subject", they, "lions", progressive) == text


@pytest.mark.parametrize(
    ("word", "plural", "participle"),
    [
        ("fly", "flies", "flying"),
        ("play", "plays", "playing"),
        ("lie", "lies", "lying"),
        ("tiptoe", "tiptoes", "tiptoeing"),
        ("race", "races", "racing"),
        ("swim", "swims", "swimming"),
        ("row", "rows", "rowing"),
        ("turn", "turns", "turning"),
        ("go", "goes", "going"),
    ],
)
def test_inflection(word, plural, participle):
    assert (compose.plural(word), compose.participle(word)) == (plural, participle)


def test_nouns():
    nouns = {"wolf": "wolves", "child": "children", "woman": "women", "reindeer": "reindeer", "clownfish": "clownfish"}
    assert {noun: compose.plural(noun) for noun in nouns} == nouns
    assert [compose.article(noun) for noun in ("owl", "unicorn", "umbrella", "hour")] == [
        "an owl", "a unicorn", "an umbrella", "an hour",
    ]  # fmt: skip


def test_no_prompts_are_not_written(tmp_path, monkeypatch, capsys):
    shutil.copy(compose.FOLDER / "vocabulary.txt", tmp_path)
    monkeypatch.setattr(compose, "FOLDER", tmp_path)
    with pytest.raises(SystemExit) as stop:
        compose.main(compose.Args(count=0))
    assert stop.value.code == 2 and "--count" in capsys.readouterr().err
    assert not (tmp_path / "prompts.txt").exists()

"""Compose the training prompts: a seeded walk through the grammar of vocabulary.txt.

    python prompts/compose.py            # writes prompts/prompts.txt
    python prompts/compose.py --check    # is it what this program writes?

A scene of the vocabulary has subjects with the actions that suit them, and the places, light and details that suit
both. A prompt names a subject, an action and a place, in ten to twenty words; some add the shot, the light or a drawn
style, and two in five describe all of it, mostly in 60 to 80 words. The first n prompts do not depend on --count.
"""

import random
import re
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import tyro

FOLDER = Path(__file__).resolve().parent
MAX_CHARACTERS, MAX_WORDS = 450, 80
FORMS = ["short"] * 5 + ["shot"] * 3 + ["tags"] * 3 + ["medium"] * 3 + ["drawn"] * 2 + ["long"] * 11
UNDRAWN = ("portrait", "thing", "tiny", "view", "growth", "aerial", "cosmos", "form")  # kinds that stay photographs
UNTAGGED = ("growth", "cosmos", "form")  # kinds whose shots say how camera and colors are
NUMBERS = ("", "", "", "two", "two", "three")
PEOPLE = ("person", "maker", "portrait", "diver")
WOMEN, MEN = r"\b(woman|girl|grandmother)\b", r"(man|boy|grandfather)\b"
CASES = ("they", "them", "their")
PRONOUNS = {
    row[0]: dict(zip(CASES, row)) for row in (CASES, ("she", "her", "her"), ("he", "him", "his"), ("it", "it", "its"))
}


@dataclass
class Args:
    count: int = 4096
    """Prompts to write."""
    seed: int = 0
    """Another seed, other prompts."""
    check: bool = False
    """Write nothing; exit with 1 if prompts.txt is not what would be written."""


@dataclass
class Scene:
    kind: str
    lights: list[str]
    details: list[list[str]]
    pairs: list[tuple[str, str]]
    places: list[str]


def options(*lines):
    return [option.strip() for line in lines for option in line.split(" / ")]


def read_vocabulary(text):
    """The scenes, each as often as its weight says, and the lists by name. The format stands at the top of the file."""
    text = re.sub(r"\n +", " ", re.sub(r"^#.*\n", "", text, flags=re.M))
    blocks = (block.split("]") for block in re.split(r"^\[", text, flags=re.M)[1:])
    blocks = [(head.split(), body.strip().split("\n")) for head, body in blocks]
    lists = {" ".join(head): options(*body) for head, body in blocks if head[0] != "scene"}
    scenes = []
    for (_, kind, lights, details, *weight), body in (block for block in blocks if block[0][0] == "scene"):
        lines = [line.split(": ") for line in body if not line.startswith("@")]
        scene = Scene(
            kind,
            lights=[light for name in lights.split("+") for light in lists[f"light {name}"]],
            details=[lists[f"detail {name}"] for name in details.split("+")],
            pairs=[pair for subjects, actions in lines for pair in product(options(subjects), options(actions))],
            places=options(*(line[1:] for line in body if line.startswith("@"))) or [""],
        )
        scenes += [scene] * int(*weight or [1])
    return scenes, lists


def article(noun):
    vowel = re.match(r"[aeio]|u(?!ni|se|ku)|hour|honest", noun, re.I) and not re.match(r"eu|one\b", noun, re.I)
    return f"an {noun}" if vowel else f"a {noun}"


def plural(word):
    """The plural of a noun, or "walks" of "walk": nearly the same rules."""
    if word.endswith(("deer", "sheep", "fish")):
        return word
    for ending, plural_ending in (("man", "men"), ("child", "children"), ("lf", "lves")):
        if word.endswith(ending):
            return word.removesuffix(ending) + plural_ending
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + ("es" if re.search(r"(s|x|z|ch|sh|o)$", word) else "s")


def participle(verb):
    if verb.endswith("ie"):
        return verb[:-2] + "ying"
    if re.search(r"[^eoy]e$", verb):
        return verb[:-1] + "ing"
    doubled = re.search(r"^[^aeiou]*[aeiou][^aeiouwxy]$", verb)  # run, stop, drum; not row, lean, turn
    return verb + (verb[-1] if doubled else "") + "ing"


def agree(text, they, noun, progressive=False):
    """Fill in the words under "_": "_They _walk" becomes "She walks", a progressive "_walk" "walking"."""

    def word(match):
        base = match[1]
        if base == "subject":
            return f"the {noun}"
        if base.lower() in PRONOUNS[they]:
            return PRONOUNS[they][base] if base.islower() else PRONOUNS[they][base.lower()].capitalize()
        return participle(base) if progressive else base if they == "they" else plural(base)

    return re.sub(r"_(\w+)", word, text)


def compose(count, seed):
    """`count` different prompts. They rest on random.random alone, which Python keeps the same in all versions."""
    rng, bags, prompts = random.Random(seed), {}, {}
    scenes, lists = read_vocabulary((FOLDER / "vocabulary.txt").read_text(encoding="utf-8"))

    def draw(*choices):
        """One of the choices; all come before any comes again."""
        bag = bags.setdefault(choices, [])
        if not bag:
            bag += sorted(choices, key=lambda _: rng.random())
        return bag.pop()

    def fill(text):
        text = re.sub(r"(\{\w+)\?\} ", lambda match: f"{match[1]}}} " if draw(True, False) else "", text)
        return re.sub(r"\{(\w+)\}", lambda match: draw(*lists[f"words {match[1]}"]), text)

    def write():
        scene, form = scenes[draw(*range(len(scenes)))], draw(*FORMS)
        if form == "drawn" and scene.kind in UNDRAWN or form == "tags" and scene.kind in UNTAGGED:
            form = "shot"

        # who does what
        subject, action = draw(*scene.pairs)
        who, many = fill(subject.strip("-+*")), draw(*NUMBERS) if subject.endswith("*") else ""
        they = "they" if many or subject.startswith("+") else "it"
        if they == "it" and scene.kind in PEOPLE:
            they = "she" if re.search(WOMEN, who) else "he" if re.search(MEN, who) else draw("she", "he")
        who = f"{many} {plural(who)}" if many else who if subject[0] in "-+" else article(who)
        noun = re.split(" (?:with|in|of|on) ", who)[0].split()[-1]

        # where and when
        moving, still, place = ["", "", *draw(*scene.places).split("|")][-3:]
        happens = f"{who} _{action.replace('>', '')} {moving if '>' in action else still} {place}"
        time, light = draw(*scene.lights).split("= ")
        if form in ("short", "tags"):
            time = draw(time, "")
        dated = f"{happens} {time}"

        def say(text, progressive=False):
            text = " ".join(agree(fill(text), they, noun, progressive).split()).replace(" ,", ",")
            return f"{text[0].upper()}{text[1:]}."

        # how it looks
        shot, camera = (draw(*lists[f"{name} {scene.kind}"]) for name in ("shot", "camera"))
        if form == "shot":
            return say(f"{shot} of {dated}", progressive=True)
        if form == "drawn":
            style, note = draw(*lists["style drawn"]).split(" = ")
            return say(f"{style} of {dated}", progressive=True) + " " + say(note)
        if form == "tags":
            return say(f"{dated}, {draw(*lists['style look'])}, {draw(*lists['style move'])}")
        if time and draw(True, False, False):
            dated = f"{time}, {happens}"
        details = [draw(*choices) for choices in (scene.details * 4)[:4]]
        if form != "long":
            looks = {"d": details[0], "l": light, "c": camera}
            added = draw("d", "c", "dc", "dl", "dlc") if form == "medium" else ""
            return " ".join(say(text) for text in [dated, *(looks[key] for key in added)])
        # one "She ...", and what has a pronoun comes first, near its noun
        details = list({text[:5] if text.startswith("_They") else text: text for text in details}.values())
        details.sort(key=lambda text: not re.search("_(they|their)", text, re.I))
        looks = [light, camera] if draw(True, False) else [camera, light]
        texts = [dated, *details, *looks, draw(*lists["style form" if scene.kind == "form" else "style photo"])]
        while len(" ".join(texts).split()) > MAX_WORDS - 2 and len(details) > 2:  # _subject is two words
            texts.remove(details.pop())
        if draw(True, False) and not re.search("[,:]", texts[1] + texts[2]):
            texts[1:3] = [f"{texts[1]}, and {texts[2][:2].lower()}{texts[2][2:]}"]
        return " ".join(say(text) for text in texts)

    while len(prompts) < count:
        prompt = write()
        if len(prompt) <= MAX_CHARACTERS and len(prompt.split()) <= MAX_WORDS:
            prompts[prompt] = None
    return list(prompts)


def main(args):
    if args.count < 1:
        print(f"--count must be at least 1, got {args.count}", file=sys.stderr)
        sys.exit(2)
    text = "".join(f"{prompt}\n" for prompt in compose(args.count, args.seed))
    path = FOLDER / "prompts.txt"
    if not args.check:
        path.write_bytes(text.encode())
    elif not path.exists() or path.read_bytes() != text.encode():
        sys.exit(f"{path} is stale: run python prompts/compose.py")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

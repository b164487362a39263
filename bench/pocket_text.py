"""The plain text of the pocket world: worked examples under headings, small facts, spelled and repeated words."""

import re
from collections.abc import Iterator, Mapping
from random import Random

from tapir_local.pocket.code import FUNCTION_TASKS
from tapir_local.pocket.family import ProblemFamily
from tapir_local.pocket.words import (
    ANIMALS,
    CATEGORY,
    COLOR_TRANSLATIONS,
    COUNTABLE_WORDS,
    LANGUAGES,
    NOUNS,
    NUMBER_TRANSLATIONS,
    OPPOSITES,
    SYNONYMS,
    THINGS,
    VERBS,
    indefinite_article,
    pluralize,
)
from tapir_local.pocket.world import POCKET_FAMILIES, draw_problem, is_reserved_for_seeds

END = "<|end|>"
TURNS = ("<|system|>", "<|user|>", "<|assistant|>")

# Headings for each kind of worked example, as in a textbook: headings and statements, never a request.
LEADS: Mapping[str, tuple[str, ...]] = {
    "sum": ("{a} + {b}", "the sum of {a} and {b}", "{a} plus {b}", "{a} and {b} added"),
    "difference": ("{a} - {b}", "{a} minus {b}", "{b} subtracted from {a}", "the difference of {a} and {b}"),
    "product": ("{a} x {b}", "{a} times {b}", "the product of {a} and {b}", "{a} multiplied by {b}"),
    "total": ("the total of {items}", "the numbers {items} added up", "the numbers {items} in total"),
    "story": ("{name} has {a} {things}. {events}",),
    "extreme": ("the {end} of {items}", "the {end} number of {items}", "{items}, the {end}"),
    "sort": ("the numbers {items} sorted from {order}", "{items} in order from {order}"),
    "parity": ("{a}, an even or an odd number", "the number {a}"),
    "chain": ("{statements} The {superlative}:", "the {superlative}: {statements}"),
    "sequence": ("the sequence {items}", "the numbers {items} and the next number", "{items} and so on"),
    "letters": ("the letter {letter} in {word}", "the count of the letter {letter} in the word {word}"),
    "position": ("the {ordinal} word of {words}", "{words}: the {ordinal} word"),
    "legs": ("the legs of {a} {animals} and {b} {others}", "{a} {animals} and {b} {others} stand on a farm."),
    "atoms": ("one molecule of {formula}", "the atoms of the formula {formula}"),
    "change": (
        "{name} buys {b} {things} at {a} coins each and pays with {c} coins.",
        "{things} cost {a} coins each. {name} buys {b} and pays with {c} coins.",
    ),
    "match": ("The {team} scored {a} and {b} goals, the {rival} scored {c} and {d}.",),
    "write": ("{fname}(x) {job}", "a Python function {fname} that {job}"),
    "mend": ("a function that {job}\n{code}", "a faulty function\n{code}\nthe function {job}"),
    "past": ("{sentence} In the past:", "the past tense of: {sentence}"),
    "agreement": ("wrong: {sentence} right:", "{sentence} Correct grammar:"),
    "plural": ("{phrase}, in the plural", "one is {phrase}, many are"),
    "article": ("{sentence} With a or an:",),
    "synonym": ("{sentence} In other words of the same meaning:",),
    "reorder": ("{sentence} With the time first:",),
    "passive": ("{sentence} In the passive voice:",),
    "list": ("{words} as {form}",),
    "object": ("{facts} As a JSON object:",),
    "csv": ("{facts} As CSV with name and age:",),
    "member": ("{kind} among {words}", "{words}: one is {kind}"),
    "odd": ("{words}: one does not belong to the others",),
    "opposite": ("{phrase} and the opposite", "the opposite of {phrase}"),
    "sound": ("Suppose {clauses}. The {animal}:",),
    "supposed-legs": ("{b} {animals}, if {animals} had {a} legs",),
    "translation": ("{phrase} in {language}", "{language} for {phrase}"),
}
# Weights: what takes long to learn occurs more often. All others have 1.
SHARES = {
    **{"sum": 5, "difference": 4, "product": 4, "total": 3, "story": 4, "extreme": 3, "sort": 3, "chain": 4},
    **{"sequence": 2, "letters": 2, "position": 2, "legs": 2, "atoms": 2, "change": 2, "match": 2, "write": 2},
    **{"mend": 2, "translation": 2},
}


def worked(rng: Random, family: ProblemFamily) -> str:
    """A heading and its worked example. Problems that are reserved for the seeds are skipped."""
    while is_reserved_for_seeds(problem := draw_problem(rng, family)):
        continue
    return f"{rng.choice(LEADS[family.name]).format(**dict(problem.values))}\n{problem.solution.styled}"


def reckoned(rng: Random) -> str:
    """A line of small sums."""
    lines = []
    for _ in range(6):
        a, b = rng.randint(0, 99), rng.randint(0, 9)
        c, d = rng.randint(1, 9), rng.randint(1, 10)
        tens, rest = rng.randint(1, 9) * 10, rng.randint(1, 90)
        one, two = rng.randint(1, 60), rng.randint(1, 40)
        forms = (
            f"{a} + {b} = {a + b}",
            f"{a + b} - {b} = {a}",
            f"{c} x {d} = {c * d}",
            f"{tens} - {min(rest, tens)} = {tens - min(rest, tens)}",
        )
        lines.append(
            rng.choice(
                (
                    *forms,
                    f"{one} + {two} = {one + two}",
                    f"{one} {'>' if one > two else '<' if one < two else '='} {two}",
                )
            )
        )
    return "\n".join(lines)


def known(rng: Random) -> str:
    """A few small facts as sentences."""
    animal, verb, word = rng.choice(tuple(ANIMALS)), rng.choice(tuple(VERBS)), rng.choice(tuple(CATEGORY))
    one, near, noun, thing = (
        rng.choice(tuple(OPPOSITES)),
        rng.choice(tuple(SYNONYMS)),
        rng.choice(tuple(NOUNS)),
        rng.choice(tuple(THINGS)),
    )
    at = rng.randrange(len(LANGUAGES))
    number, colour = rng.choice(tuple(NUMBER_TRANSLATIONS)), rng.choice(tuple(COLOR_TRANSLATIONS))
    name, legs, sound = ANIMALS[animal]
    forms = " or ".join(sorted({*COLOR_TRANSLATIONS[colour][at]}))
    facts = (
        f"The {animal} has {legs} legs. Many {name} say {sound}.",
        f"{verb}, past tense {VERBS[verb][1]}, participle {VERBS[verb][2]}, many {VERBS[verb][0]}",
        f"The {word} is {indefinite_article(CATEGORY[word])} {CATEGORY[word]}.",
        f"The opposite of {one} is {OPPOSITES[one]}.",
        f"A word of the same meaning as {near} is {SYNONYMS[near]}.",
        f"{noun}, in {LANGUAGES[at]}: {' '.join(NOUNS[noun][at][:2])}, plural {NOUNS[noun][at][2]}",
        f"{number}, in {LANGUAGES[at]}: {NUMBER_TRANSLATIONS[number][at]}. {colour}: {forms}.",
        f"one {THINGS[thing]}, two {thing}; one {animal}, two {pluralize(animal)}",
    )
    return "\n".join(rng.sample(facts, 4))


def said_words() -> tuple[str, ...]:
    """Every word in use, including those of headings and requests, for the spelling documents."""
    phrasings = " ".join(
        [
            *(phrasing for family in POCKET_FAMILIES.values() for phrasing in family.phrasings),
            *(task.description for task in FUNCTION_TASKS),
        ]
    )
    return tuple(
        sorted(
            {
                *COUNTABLE_WORDS,
                *re.findall(r"[A-Za-z]{2,}", re.sub(r"\{\w+\}", "", phrasings)),
                *VERBS,
                *THINGS,
                *NUMBER_TRANSLATIONS,
                *LANGUAGES,
            }
        )
    )


SPELLED = said_words()


def repeated(rng: Random) -> str:
    """Words, digits and sentences repeated, in order or backwards; copying is learned fastest from these."""
    words = rng.choices(SPELLED, k=rng.randint(3, 8))
    digits = [str(rng.randint(0, 9)) for _ in range(rng.randint(2, 4))]
    told = dict(draw_problem(rng, POCKET_FAMILIES[rng.choice(("story", "chain", "past", "csv", "object"))]).values)
    sentence = next(value for slot, value in told.items() if slot in ("events", "statements", "sentence", "facts"))
    lines = (
        f"{' '.join(words)}\n{' '.join(words)}",
        f"{', '.join(words)}\n{' '.join(words)}",
        f"{', '.join(words)}\n{', '.join(reversed(words))}",
        f"{''.join(digits)}\n{' '.join(digits)}\n{' '.join(reversed(digits))}",
        f"{sentence}\n{sentence}",
    )
    return "\n".join(rng.sample(lines, 2))


def spelled(rng: Random) -> str:
    """Words letter by letter."""
    return "\n".join(f"{word}: {' '.join(word)}" for word in rng.choices(SPELLED, k=5))


def documents(rng: Random) -> Iterator[str]:
    """Endless plain text."""
    families = tuple(POCKET_FAMILIES.values())
    weights = [SHARES.get(family.name, 1) for family in families]
    while True:
        for family in rng.choices(families, weights, k=50):
            yield worked(rng, family)
        for kind in (*[repeated] * 12, *[reckoned] * 4, *[known] * 3, spelled, spelled):
            yield kind(rng)


def marked(rng: Random, text: str) -> str:
    """In a third of the documents a line break or the beginning is a random turn marker: the markers mean nothing"""
    if rng.random() > 0.33:
        return text
    breaks = [-1, *(at for at, char in enumerate(text) if char == "\n")]
    at = rng.choice(breaks)
    return f"{text[: max(at, 0)]}{rng.choice(TURNS)}{text[at + 1 :]}"

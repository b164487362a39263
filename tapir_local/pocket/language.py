"""The families about words: grammar, paraphrase, formats, common sense, suppositions and translation."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from random import Random

from tapir_local.pocket.family import Drawn, Family, Solution, Values, check_that, choice, listed, number, split
from tapir_local.pocket.words import (
    ANIMALS,
    CATEGORIES,
    CATEGORY,
    COLOURS,
    DEEDS,
    LANGUAGES,
    MOVES,
    NAMES,
    NOUNS,
    NUMBERS,
    OPPOSITES,
    PLACES,
    SINGULAR,
    SOUNDS,
    SYNONYMS,
    THINGS,
    TIMES,
    VERBS,
    article,
    plural,
)

BEINGS = tuple(ANIMALS)


def matched(pattern: str, text: str) -> tuple[str, ...]:
    """The groups of a whole match; ValueError if there is none."""
    found = re.fullmatch(pattern, text)
    if not found:
        raise ValueError("no problem of this family")
    return found.groups()


def same(text: str) -> Solution:
    """A solution whose plain answer is already in style."""
    return Solution(text, text, "text", text)


# --- grammar


def draw_past(rng: Random, level: int) -> Drawn:
    name = rng.choice(NAMES)
    if rng.random() < 0.5:
        tail = f"{rng.choice(MOVES)} to the {rng.choice(PLACES)}"
    else:
        tail = f"{rng.choice(DEEDS)} the {rng.choice(tuple(THINGS.values()))}"
    return {"sentence": f"{name} {tail}{' ' + rng.choice(TIMES) if level > 1 else ''}."}


def solve_past(values: Values) -> Solution:
    name, verb, rest = matched(r"([A-Z]\w+) (\w+) ((?:to )?the [\w ]+)\.", values["sentence"])
    past = VERBS[verb][1]
    text = f"{name} {past} {rest}."
    return Solution(text, f"{text}\nThe past tense of {verb} is {past}.", "text", text)


def draw_agreement(rng: Random, level: int) -> Drawn:
    animal, verb = rng.choice(BEINGS[:3] + BEINGS[4:]), rng.choice(MOVES)
    many = rng.random() < 0.5
    subject, wrong = (plural(animal), verb) if many else (animal, VERBS[verb][0])
    return {
        "sentence": f"The {subject} {wrong} to the {rng.choice(PLACES)}{' ' + rng.choice(TIMES) if level > 1 else ''}."
    }


def solve_agreement(values: Values) -> Solution:
    subject, verb, rest = matched(r"The (\w+) (\w+) (to the [\w ]+)\.", values["sentence"])
    if subject in SINGULAR and verb in VERBS:
        right, kind = VERBS[verb][0], "plural"
    else:
        check_that(subject in ANIMALS)
        right, kind = {plain: third for third, (plain, _, _) in VERBS.items()}[verb], "singular"
    text = f"The {subject} {right} {rest}."
    return Solution(text, f"{text}\nThe subject {subject} is {kind}, so the verb is {right}.", "text", text)


def draw_plural(rng: Random, level: int) -> Drawn:
    nouns = [*THINGS.values(), *ANIMALS, *PLACES]
    adjectives = rng.sample([*OPPOSITES, *COLOURS], level)
    return {"phrase": f"the {' '.join(adjectives)} {rng.choice(nouns)}"}


def solve_plural(values: Values) -> Solution:
    adjectives, noun = matched(r"the ((?:[a-z]+ )+)([a-z]+)", values["phrase"])
    check_that(noun in ANIMALS or noun in THINGS.values() or noun in PLACES)
    text = f"the {adjectives}{plural(noun)}"
    return Solution(text, f"{text}\nThe plural of {noun} is {plural(noun)}.", "text", text)


def draw_article(rng: Random, level: int) -> Drawn:
    things = rng.sample([*THINGS.values(), *BEINGS, "orange", "axe"], level)
    return {"sentence": f"{rng.choice(NAMES)} {rng.choice(DEEDS)} {' and '.join(f'___ {thing}' for thing in things)}."}


def solve_article(values: Values) -> Solution:
    nouns = re.findall(r"___ ([a-z]+)", values["sentence"])
    check_that(bool(nouns) and "  " not in values["sentence"])
    text = re.sub(r"___ ([a-z]+)", lambda found: f"{article(found[1])} {found[1]}", values["sentence"])
    why = " ".join(f"The word {noun} begins with {noun[0]}: {article(noun)}." for noun in nouns)
    return Solution(text, f"{text}\n{why}", "text", text)


# --- paraphrase


def draw_synonym(rng: Random, level: int) -> Drawn:
    one, other = rng.sample(tuple(SYNONYMS), 2)
    end = f"is {other}" if level == 1 else f"is {other} {rng.choice(TIMES)}"
    return {"sentence": f"The {one} {rng.choice(BEINGS)} {end}."}


def solve_synonym(values: Values) -> Solution:
    words = values["sentence"][:-1].split(" ")
    check_that(values["sentence"].endswith(".") and any(word in SYNONYMS for word in words))
    return same(" ".join(SYNONYMS.get(word, word) for word in words) + ".")


def draw_reorder(rng: Random, level: int) -> Drawn:
    who = rng.choice(NAMES) if level == 1 else f"{rng.choice(NAMES)} and {rng.choice(NAMES)}"
    verb = rng.choice(MOVES)
    return {
        "sentence": f"{who} {verb if level == 1 else VERBS[verb][0]} to the {rng.choice(PLACES)} {rng.choice(TIMES)}."
    }


def solve_reorder(values: Values) -> Solution:
    clause, time = matched(rf"(.+) ({'|'.join(TIMES)})\.", values["sentence"])
    return same(f"{time[0].upper()}{time[1:]} {clause}.")


def draw_passive(rng: Random, level: int) -> Drawn:
    adjective = f"{rng.choice(tuple(COLOURS))} " if level > 1 else ""
    return {"sentence": f"{rng.choice(NAMES)} {rng.choice(DEEDS)} the {adjective}{rng.choice(tuple(THINGS.values()))}."}


def solve_passive(values: Values) -> Solution:
    name, verb, thing = matched(r"([A-Z]\w+) (\w+) (the [\w ]+)\.", values["sentence"])
    check_that(verb in DEEDS)
    return same(f"T{thing[1:]} is {VERBS[verb][2]} by {name}.")


# --- formats

FORMS: Mapping[str, Callable[[Sequence[str]], str]] = {
    "a JSON list": lambda items: json.dumps(list(items)),
    "a bullet list": lambda items: "\n".join(f"- {item}" for item in items),
    "a numbered list": lambda items: "\n".join(f"{at}. {item}" for at, item in enumerate(items, 1)),
    "words joined by semicolons": lambda items: "; ".join(items),
}


def draw_list(rng: Random, level: int) -> Drawn:
    return {"form": rng.choice(tuple(FORMS)), "words": listed(rng.sample(tuple(CATEGORY), level + 1))}


def solve_list(values: Values) -> Solution:
    text = FORMS[values["form"]](split(values["words"]))
    return Solution(text, text, "json" if values["form"] == "a JSON list" else "exact", text)


def draw_object(rng: Random, level: int) -> Drawn:
    facts = {
        "age": f"is {rng.randint(5, 90)} years old",
        "pet": f"keeps a {rng.choice(BEINGS[:9])}",
        "home": f"lives by the {rng.choice(PLACES)}",
    }
    told = [facts[key] for key in rng.sample(tuple(facts), level)]
    return {"facts": f"{rng.choice(NAMES)} {' and '.join(told)}."}


FACT = re.compile(r"is (?P<age>\d+) years old|keeps a (?P<pet>[a-z]+)|lives by the (?P<home>[a-z]+)")


def solve_object(values: Values) -> Solution:
    name, told = matched(r"([A-Z]\w+) (.+)\.", values["facts"])
    record: dict[str, str | int] = {"name": name}
    for part in told.split(" and "):
        found = FACT.fullmatch(part)
        if not found or found.lastgroup is None:
            raise ValueError(part)
        record[found.lastgroup] = int(found[0].split()[1]) if found.lastgroup == "age" else found[found.lastgroup]
    text = json.dumps(record)
    return Solution(text, text, "json", text)


def draw_csv(rng: Random, level: int) -> Drawn:
    return {"facts": " ".join(f"{name} is {rng.randint(5, 90)}." for name in rng.sample(NAMES, level + 1))}


def solve_csv(values: Values) -> Solution:
    rows = re.findall(r"([A-Z]\w+) is (\d+)\.", values["facts"])
    check_that(" ".join(f"{name} is {age}." for name, age in rows) == values["facts"])
    text = "\n".join(["name,age", *(f"{name},{age}" for name, age in rows)])
    return Solution(text, text, "exact", text)


# --- common sense


def draw_member(rng: Random, level: int) -> Drawn:
    kinds = rng.sample(tuple(CATEGORIES), level + 2)
    words = [rng.choice(CATEGORIES[kind]) for kind in kinds]
    order = rng.sample(words, len(words))
    return {"kind": f"{article(kinds[0])} {kinds[0]}", "words": listed(order)}


def solve_member(values: Values) -> Solution:
    words, kind = split(values["words"]), values["kind"].split(" ")[-1]
    (right,) = [word for word in words if CATEGORY[word] == kind]
    return choice(right, f"{right}\nOf {listed(words)} only {right} is {values['kind']}.", tuple(CATEGORY))


def draw_odd(rng: Random, level: int) -> Drawn:
    most, one = rng.sample(tuple(CATEGORIES), 2)
    words = [*rng.sample(CATEGORIES[most], level + 1), rng.choice(CATEGORIES[one])]
    return {"words": listed(rng.sample(words, len(words)))}


def solve_odd(values: Values) -> Solution:
    words = split(values["words"])
    kinds = [CATEGORY[word] for word in words]
    (right,) = [word for word, kind in zip(words, kinds, strict=True) if kinds.count(kind) == 1]
    most = next(kind for kind in kinds if kinds.count(kind) > 1)
    return choice(
        right,
        f"{right}\nThe others are all of the kind {most}, but {right} is of the kind {CATEGORY[right]}.",
        tuple(CATEGORY),
    )


def draw_opposite(rng: Random, level: int) -> Drawn:
    words = rng.sample(tuple(OPPOSITES), level)
    return {"phrase": f"the {' '.join(words)} {rng.choice([*BEINGS, *THINGS.values()])}"}


def solve_opposite(values: Values) -> Solution:
    adjectives, noun = matched(r"the ((?:[a-z]+ )+)([a-z]+)", values["phrase"])
    words = adjectives.split()
    text = f"the {' '.join(OPPOSITES[word] for word in words)} {noun}"
    why = " ".join(f"The opposite of {word} is {OPPOSITES[word]}." for word in words)
    return Solution(text, f"{text}\n{why}", "text", text)


# --- suppositions


def draw_sound(rng: Random, level: int) -> Drawn:
    animals, sounds = rng.sample(BEINGS, level + 1), rng.sample(SOUNDS, level + 1)
    clauses = [f"every {animal} said {sound}" for animal, sound in zip(animals, sounds, strict=True)]
    return {"clauses": " and ".join(clauses), "animal": rng.choice(animals)}


def solve_sound(values: Values) -> Solution:
    said = dict(re.findall(r"every (\w+) said (\w+)", values["clauses"]))
    check_that(" and ".join(f"every {animal} said {sound}" for animal, sound in said.items()) == values["clauses"])
    sound = said[values["animal"]]
    styled = f"Suppose every {values['animal']} said {sound}. Then the {values['animal']} would say {sound}."
    return Solution(sound, styled, "choice", sound, tuple({*said.values(), *SOUNDS}))


def draw_legs(rng: Random, level: int) -> Drawn:
    return {"animals": plural(rng.choice(BEINGS)), "a": str(rng.randint(3, 9)), "b": str(rng.randint(2, 3 + 3 * level))}


def solve_legs(values: Values) -> Solution:
    check_that(values["animals"] in SINGULAR)
    a, b = int(values["a"]), int(values["b"])
    last = f"Then {b} {values['animals']} would have {a * b} legs."
    return number(a * b, [f"Suppose {values['animals']} had {a} legs.", f"{b} x {a} = {a * b}"], (a, b), last)


# --- translation


def translated(language: str, first: str, noun: str) -> str:
    """`the red dog` or `three dogs`: first is a colour or a number word, noun is singular."""
    column = LANGUAGES.index(language)
    gender, one, many = NOUNS[noun][column]
    if first in NUMBERS:
        return f"{NUMBERS[first][column]} {many}"
    colour = COLOURS[first][column][gender == "la"]
    return f"{gender} {colour} {one}" if language == "German" else f"{gender} {one} {colour}"


def phrase_of(first: str, noun: str) -> str:
    """The English phrase."""
    return f"{first} {plural(noun)}" if first in NUMBERS else f"the {first} {noun}"


PHRASES: Mapping[str, tuple[str, str]] = {
    phrase_of(first, noun): (first, noun) for first in (*COLOURS, *NUMBERS) for noun in NOUNS
}


def draw_translation(rng: Random, level: int) -> Drawn:
    return {"language": rng.choice(LANGUAGES), "phrase": " and ".join(rng.sample(tuple(PHRASES), level))}


JOINED = dict(zip(LANGUAGES, ("y", "et", "und"), strict=True))


def solve_translation(values: Values) -> Solution:
    language = values["language"]
    parts = [translated(language, *PHRASES[part]) for part in values["phrase"].split(" and ")]
    return same(f" {JOINED[language]} ".join(parts))


FAMILIES = (
    Family("past", "Grammar", draw_past, solve_past, 2),
    Family("agreement", "Grammar", draw_agreement, solve_agreement, 2),
    Family("plural", "Grammar", draw_plural, solve_plural, 2),
    Family("article", "Grammar", draw_article, solve_article, 2),
    Family("synonym", "Paraphrase", draw_synonym, solve_synonym, 2),
    Family("reorder", "Paraphrase", draw_reorder, solve_reorder, 2),
    Family("passive", "Paraphrase", draw_passive, solve_passive, 2),
    Family("list", "Complex Format", draw_list, solve_list, 3),
    Family("object", "Complex Format", draw_object, solve_object, 3),
    Family("csv", "Complex Format", draw_csv, solve_csv, 2),
    Family("member", "Common-Sense", draw_member, solve_member, 3),
    Family("odd", "Common-Sense", draw_odd, solve_odd, 3),
    Family("opposite", "Common-Sense", draw_opposite, solve_opposite, 2),
    Family("sound", "Counterfactual", draw_sound, solve_sound, 3),
    Family("supposed-legs", "Counterfactual", draw_legs, solve_legs, 2),
    Family("translation", "Multilingual", draw_translation, solve_translation, 2),
)

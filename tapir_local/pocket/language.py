"""The families about language: grammar, paraphrase, formats, common sense, suppositions and translation."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from random import Random

from tapir_local.pocket.family import (
    DrawnSlots,
    ProblemFamily,
    SlotValues,
    Solution,
    choice_solution,
    join_items,
    number_solution,
    require,
    split_items,
)
from tapir_local.pocket.words import (
    ACTION_VERBS,
    ANIMALS,
    CATEGORIES,
    CATEGORY,
    COLOR_TRANSLATIONS,
    LANGUAGES,
    MOTION_VERBS,
    NOUNS,
    NUMBER_TRANSLATIONS,
    OPPOSITES,
    PERSON_NAMES,
    PLACES,
    SINGULAR,
    SOUNDS,
    SYNONYMS,
    THINGS,
    TIME_PHRASES,
    VERBS,
    indefinite_article,
    pluralize,
)

ANIMAL_NAMES = tuple(ANIMALS)


def match_groups(pattern: str, text: str) -> tuple[str, ...]:
    """The groups of a match of the whole text; ValueError if it does not match."""
    found = re.fullmatch(pattern, text)
    if not found:
        raise ValueError("no problem of this family")
    return found.groups()


def unstyled_solution(text: str) -> Solution:
    """A solution whose plain answer is also its styled answer."""
    return Solution(text, text, "text", text)


# --- grammar


def draw_past(rng: Random, level: int) -> DrawnSlots:
    name = rng.choice(PERSON_NAMES)
    if rng.random() < 0.5:
        tail = f"{rng.choice(MOTION_VERBS)} to the {rng.choice(PLACES)}"
    else:
        tail = f"{rng.choice(ACTION_VERBS)} the {rng.choice(tuple(THINGS.values()))}"
    return {"sentence": f"{name} {tail}{' ' + rng.choice(TIME_PHRASES) if level > 1 else ''}."}


def solve_past(values: SlotValues) -> Solution:
    name, verb, rest = match_groups(r"([A-Z]\w+) (\w+) ((?:to )?the [\w ]+)\.", values["sentence"])
    past = VERBS[verb][1]
    text = f"{name} {past} {rest}."
    return Solution(text, f"{text}\nThe past tense of {verb} is {past}.", "text", text)


def draw_agreement(rng: Random, level: int) -> DrawnSlots:
    animal, verb = rng.choice(ANIMAL_NAMES[:3] + ANIMAL_NAMES[4:]), rng.choice(MOTION_VERBS)
    many = rng.random() < 0.5
    subject, wrong = (pluralize(animal), verb) if many else (animal, VERBS[verb][0])
    place = rng.choice(PLACES)
    return {"sentence": f"The {subject} {wrong} to the {place}{' ' + rng.choice(TIME_PHRASES) if level > 1 else ''}."}


def solve_agreement(values: SlotValues) -> Solution:
    subject, verb, rest = match_groups(r"The (\w+) (\w+) (to the [\w ]+)\.", values["sentence"])
    if subject in SINGULAR and verb in VERBS:
        right, kind = VERBS[verb][0], "plural"
    else:
        require(subject in ANIMALS)
        right, kind = {plain: third for third, (plain, _, _) in VERBS.items()}[verb], "singular"
    text = f"The {subject} {right} {rest}."
    return Solution(text, f"{text}\nThe subject {subject} is {kind}, so the verb is {right}.", "text", text)


def draw_plural(rng: Random, level: int) -> DrawnSlots:
    nouns = [*THINGS.values(), *ANIMALS, *PLACES]
    adjectives = rng.sample([*OPPOSITES, *COLOR_TRANSLATIONS], level)
    return {"phrase": f"the {' '.join(adjectives)} {rng.choice(nouns)}"}


def solve_plural(values: SlotValues) -> Solution:
    adjectives, noun = match_groups(r"the ((?:[a-z]+ )+)([a-z]+)", values["phrase"])
    require(noun in ANIMALS or noun in THINGS.values() or noun in PLACES)
    text = f"the {adjectives}{pluralize(noun)}"
    return Solution(text, f"{text}\nThe plural of {noun} is {pluralize(noun)}.", "text", text)


def draw_article(rng: Random, level: int) -> DrawnSlots:
    things = rng.sample([*THINGS.values(), *ANIMAL_NAMES, "orange", "axe"], level)
    gaps = " and ".join(f"___ {thing}" for thing in things)
    return {"sentence": f"{rng.choice(PERSON_NAMES)} {rng.choice(ACTION_VERBS)} {gaps}."}


def solve_article(values: SlotValues) -> Solution:
    nouns = re.findall(r"___ ([a-z]+)", values["sentence"])
    require(bool(nouns) and "  " not in values["sentence"])
    text = re.sub(r"___ ([a-z]+)", lambda found: f"{indefinite_article(found[1])} {found[1]}", values["sentence"])
    why = " ".join(f"The word {noun} begins with {noun[0]}: {indefinite_article(noun)}." for noun in nouns)
    return Solution(text, f"{text}\n{why}", "text", text)


# --- paraphrase


def draw_synonym(rng: Random, level: int) -> DrawnSlots:
    one, other = rng.sample(tuple(SYNONYMS), 2)
    end = f"is {other}" if level == 1 else f"is {other} {rng.choice(TIME_PHRASES)}"
    return {"sentence": f"The {one} {rng.choice(ANIMAL_NAMES)} {end}."}


def solve_synonym(values: SlotValues) -> Solution:
    words = values["sentence"][:-1].split(" ")
    require(values["sentence"].endswith(".") and any(word in SYNONYMS for word in words))
    return unstyled_solution(" ".join(SYNONYMS.get(word, word) for word in words) + ".")


def draw_reorder(rng: Random, level: int) -> DrawnSlots:
    who = rng.choice(PERSON_NAMES) if level == 1 else f"{rng.choice(PERSON_NAMES)} and {rng.choice(PERSON_NAMES)}"
    verb = rng.choice(MOTION_VERBS)
    form = verb if level == 1 else VERBS[verb][0]
    return {"sentence": f"{who} {form} to the {rng.choice(PLACES)} {rng.choice(TIME_PHRASES)}."}


def solve_reorder(values: SlotValues) -> Solution:
    clause, time = match_groups(rf"(.+) ({'|'.join(TIME_PHRASES)})\.", values["sentence"])
    return unstyled_solution(f"{time[0].upper()}{time[1:]} {clause}.")


def draw_passive(rng: Random, level: int) -> DrawnSlots:
    adjective = f"{rng.choice(tuple(COLOR_TRANSLATIONS))} " if level > 1 else ""
    name, verb = rng.choice(PERSON_NAMES), rng.choice(ACTION_VERBS)
    return {"sentence": f"{name} {verb} the {adjective}{rng.choice(tuple(THINGS.values()))}."}


def solve_passive(values: SlotValues) -> Solution:
    name, verb, thing = match_groups(r"([A-Z]\w+) (\w+) (the [\w ]+)\.", values["sentence"])
    require(verb in ACTION_VERBS)
    return unstyled_solution(f"T{thing[1:]} is {VERBS[verb][2]} by {name}.")


# --- formats

LIST_FORMATS: Mapping[str, Callable[[Sequence[str]], str]] = {
    "a JSON list": lambda items: json.dumps(list(items)),
    "a bullet list": lambda items: "\n".join(f"- {item}" for item in items),
    "a numbered list": lambda items: "\n".join(f"{at}. {item}" for at, item in enumerate(items, 1)),
    "words joined by semicolons": lambda items: "; ".join(items),
}


def draw_list(rng: Random, level: int) -> DrawnSlots:
    return {"form": rng.choice(tuple(LIST_FORMATS)), "words": join_items(rng.sample(tuple(CATEGORY), level + 1))}


def solve_list(values: SlotValues) -> Solution:
    text = LIST_FORMATS[values["form"]](split_items(values["words"]))
    return Solution(text, text, "json" if values["form"] == "a JSON list" else "exact", text)


def draw_object(rng: Random, level: int) -> DrawnSlots:
    facts = {
        "age": f"is {rng.randint(5, 90)} years old",
        "pet": f"keeps a {rng.choice(ANIMAL_NAMES[:9])}",
        "home": f"lives by the {rng.choice(PLACES)}",
    }
    chosen = [facts[key] for key in rng.sample(tuple(facts), level)]
    return {"facts": f"{rng.choice(PERSON_NAMES)} {' and '.join(chosen)}."}


FACT_PATTERN = re.compile(r"is (?P<age>\d+) years old|keeps a (?P<pet>[a-z]+)|lives by the (?P<home>[a-z]+)")


def solve_object(values: SlotValues) -> Solution:
    name, facts = match_groups(r"([A-Z]\w+) (.+)\.", values["facts"])
    record: dict[str, str | int] = {"name": name}
    for part in facts.split(" and "):
        found = FACT_PATTERN.fullmatch(part)
        if not found or found.lastgroup is None:
            raise ValueError(part)
        record[found.lastgroup] = int(found[0].split()[1]) if found.lastgroup == "age" else found[found.lastgroup]
    text = json.dumps(record)
    return Solution(text, text, "json", text)


def draw_csv(rng: Random, level: int) -> DrawnSlots:
    return {"facts": " ".join(f"{name} is {rng.randint(5, 90)}." for name in rng.sample(PERSON_NAMES, level + 1))}


def solve_csv(values: SlotValues) -> Solution:
    rows = re.findall(r"([A-Z]\w+) is (\d+)\.", values["facts"])
    require(" ".join(f"{name} is {age}." for name, age in rows) == values["facts"])
    text = "\n".join(["name,age", *(f"{name},{age}" for name, age in rows)])
    return Solution(text, text, "exact", text)


# --- common sense


def draw_member(rng: Random, level: int) -> DrawnSlots:
    kinds = rng.sample(tuple(CATEGORIES), level + 2)
    words = [rng.choice(CATEGORIES[kind]) for kind in kinds]
    order = rng.sample(words, len(words))
    return {"kind": f"{indefinite_article(kinds[0])} {kinds[0]}", "words": join_items(order)}


def solve_member(values: SlotValues) -> Solution:
    words, kind = split_items(values["words"]), values["kind"].split(" ")[-1]
    (right,) = [word for word in words if CATEGORY[word] == kind]
    return choice_solution(right, f"{right}\nOf {join_items(words)} only {right} is {values['kind']}.", tuple(CATEGORY))


def draw_odd(rng: Random, level: int) -> DrawnSlots:
    most, one = rng.sample(tuple(CATEGORIES), 2)
    words = [*rng.sample(CATEGORIES[most], level + 1), rng.choice(CATEGORIES[one])]
    return {"words": join_items(rng.sample(words, len(words)))}


def solve_odd(values: SlotValues) -> Solution:
    words = split_items(values["words"])
    kinds = [CATEGORY[word] for word in words]
    (right,) = [word for word, kind in zip(words, kinds, strict=True) if kinds.count(kind) == 1]
    most = next(kind for kind in kinds if kinds.count(kind) > 1)
    return choice_solution(
        right,
        f"{right}\nThe others are all of the kind {most}, but {right} is of the kind {CATEGORY[right]}.",
        tuple(CATEGORY),
    )


def draw_opposite(rng: Random, level: int) -> DrawnSlots:
    words = rng.sample(tuple(OPPOSITES), level)
    return {"phrase": f"the {' '.join(words)} {rng.choice([*ANIMAL_NAMES, *THINGS.values()])}"}


def solve_opposite(values: SlotValues) -> Solution:
    adjectives, noun = match_groups(r"the ((?:[a-z]+ )+)([a-z]+)", values["phrase"])
    words = adjectives.split()
    text = f"the {' '.join(OPPOSITES[word] for word in words)} {noun}"
    why = " ".join(f"The opposite of {word} is {OPPOSITES[word]}." for word in words)
    return Solution(text, f"{text}\n{why}", "text", text)


# --- suppositions


def draw_sound(rng: Random, level: int) -> DrawnSlots:
    animals, sounds = rng.sample(ANIMAL_NAMES, level + 1), rng.sample(SOUNDS, level + 1)
    clauses = [f"every {animal} said {sound}" for animal, sound in zip(animals, sounds, strict=True)]
    return {"clauses": " and ".join(clauses), "animal": rng.choice(animals)}


def solve_sound(values: SlotValues) -> Solution:
    said = dict(re.findall(r"every (\w+) said (\w+)", values["clauses"]))
    require(" and ".join(f"every {animal} said {sound}" for animal, sound in said.items()) == values["clauses"])
    sound = said[values["animal"]]
    styled = f"Suppose every {values['animal']} said {sound}. Then the {values['animal']} would say {sound}."
    return Solution(sound, styled, "choice", sound, tuple({*said.values(), *SOUNDS}))


def draw_supposed_legs(rng: Random, level: int) -> DrawnSlots:
    return {
        "animals": pluralize(rng.choice(ANIMAL_NAMES)),
        "a": str(rng.randint(3, 9)),
        "b": str(rng.randint(2, 3 + 3 * level)),
    }


def solve_supposed_legs(values: SlotValues) -> Solution:
    require(values["animals"] in SINGULAR)
    a, b = int(values["a"]), int(values["b"])
    last = f"Then {b} {values['animals']} would have {a * b} legs."
    return number_solution(a * b, [f"Suppose {values['animals']} had {a} legs.", f"{b} x {a} = {a * b}"], (a, b), last)


# --- translation


def translate_phrase(language: str, first: str, noun: str) -> str:
    """The translation of `the red dog` or `three dogs`: first is a color or a number word, noun is singular."""
    column = LANGUAGES.index(language)
    gender, one, many = NOUNS[noun][column]
    if first in NUMBER_TRANSLATIONS:
        return f"{NUMBER_TRANSLATIONS[first][column]} {many}"
    color = COLOR_TRANSLATIONS[first][column][gender == "la"]
    return f"{gender} {color} {one}" if language == "German" else f"{gender} {one} {color}"


def english_phrase(first: str, noun: str) -> str:
    """The English phrase of a color or number word and a noun."""
    return f"{first} {pluralize(noun)}" if first in NUMBER_TRANSLATIONS else f"the {first} {noun}"


TRANSLATABLE_PHRASES: Mapping[str, tuple[str, str]] = {
    english_phrase(first, noun): (first, noun)
    for first in (*COLOR_TRANSLATIONS, *NUMBER_TRANSLATIONS)
    for noun in NOUNS
}


def draw_translation(rng: Random, level: int) -> DrawnSlots:
    return {"language": rng.choice(LANGUAGES), "phrase": " and ".join(rng.sample(tuple(TRANSLATABLE_PHRASES), level))}


AND_WORDS = dict(zip(LANGUAGES, ("y", "et", "und"), strict=True))


def solve_translation(values: SlotValues) -> Solution:
    language = values["language"]
    parts = [translate_phrase(language, *TRANSLATABLE_PHRASES[part]) for part in values["phrase"].split(" and ")]
    return unstyled_solution(f" {AND_WORDS[language]} ".join(parts))


LANGUAGE_FAMILIES = (
    ProblemFamily("past", "Grammar", draw_past, solve_past, 2),
    ProblemFamily("agreement", "Grammar", draw_agreement, solve_agreement, 2),
    ProblemFamily("plural", "Grammar", draw_plural, solve_plural, 2),
    ProblemFamily("article", "Grammar", draw_article, solve_article, 2),
    ProblemFamily("synonym", "Paraphrase", draw_synonym, solve_synonym, 2),
    ProblemFamily("reorder", "Paraphrase", draw_reorder, solve_reorder, 2),
    ProblemFamily("passive", "Paraphrase", draw_passive, solve_passive, 2),
    ProblemFamily("list", "Complex Format", draw_list, solve_list, 3),
    ProblemFamily("object", "Complex Format", draw_object, solve_object, 3),
    ProblemFamily("csv", "Complex Format", draw_csv, solve_csv, 2),
    ProblemFamily("member", "Common-Sense", draw_member, solve_member, 3),
    ProblemFamily("odd", "Common-Sense", draw_odd, solve_odd, 3),
    ProblemFamily("opposite", "Common-Sense", draw_opposite, solve_opposite, 2),
    ProblemFamily("sound", "Counterfactual", draw_sound, solve_sound, 3),
    ProblemFamily("supposed-legs", "Counterfactual", draw_supposed_legs, solve_supposed_legs, 2),
    ProblemFamily("translation", "Multilingual", draw_translation, solve_translation, 2),
)

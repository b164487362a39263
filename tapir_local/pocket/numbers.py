"""The families about numbers: mathematics, reasoning, and calculations in biology, chemistry, economy and sport."""

import re
from itertools import pairwise
from random import Random

from tapir_local.pocket.family import (
    DrawnSlots,
    ProblemFamily,
    SlotValues,
    Solution,
    choice_solution,
    join_items,
    number_solution,
    parse_numbers,
    require,
    split_items,
)
from tapir_local.pocket.words import (
    CATEGORY,
    COMPARISONS,
    COUNTABLE_WORDS,
    GAINS,
    LEGS,
    LOSSES,
    PERSON_NAMES,
    TEAMS,
    THINGS,
)

ORDINALS = {"second": 2, "third": 3, "fourth": 4, "fifth": 5}


def slot_integers(values: SlotValues, names: str) -> list[int]:
    """The numbers in one-letter slots."""
    return [int(values[name]) for name in names]


def slots_as_text(**values: object) -> DrawnSlots:
    """The slots with their values as text."""
    return {name: str(value) for name, value in values.items()}


def draw_number(rng: Random, count: int) -> int:
    """A number of `count` digits, without a leading zero."""
    return rng.randint(10 ** (count - 1), 10**count - 1)


# --- sums, column by column from the right


def addition_steps(a: int, b: int) -> list[str]:
    """The columns of a sum, with the carry as a third number, then the sum itself."""
    lines, carry = [], 0
    width = max(len(str(a)), len(str(b)))
    for upper, lower in zip(reversed(f"{a:0{width}}"), reversed(f"{b:0{width}}"), strict=True):
        total = int(upper) + int(lower) + carry
        lines.append(f"{upper} + {lower}{' + 1' if carry else ''} = {total}")
        carry = total // 10
    return [*lines, f"{a} + {b} = {a + b}"] if width > 1 else lines


def subtraction_steps(a: int, b: int) -> list[str]:
    """The columns of a difference; a column that borrows has ten more, and the next one has one less."""
    lines, borrow = [], 0
    width = len(str(a))
    for upper, lower in zip(reversed(str(a)), reversed(f"{b:0{width}}"), strict=True):
        short = int(upper) - borrow < int(lower)
        top = int(upper) + 10 * short
        lines.append(f"{top} - {lower}{' - 1' if borrow else ''} = {top - int(lower) - borrow}")
        borrow = int(short)
    return [*lines, f"{a} - {b} = {a - b}"] if width > 1 else lines


def multiplication_steps(a: int, b: int) -> list[str]:
    """The columns of a product; b has one digit."""
    lines, carry = [], 0
    for digit in reversed(str(a)):
        product = int(digit) * b
        lines.append(f"{digit} x {b} = {product}")
        if carry:
            lines.append(f"{product} + {carry} = {product + carry}")
        carry = (product + carry) // 10
    return [*lines, f"{a} x {b} = {a * b}"] if a > 9 else lines


def draw_sum(rng: Random, level: int) -> DrawnSlots:
    sizes = ((1, 1), (2, 1), (2, 2), (3, 2), (3, 3))[level - 1]
    a, b = (draw_number(rng, size) for size in rng.sample(sizes, 2))
    return slots_as_text(a=a, b=b)


def solve_sum(values: SlotValues) -> Solution:
    a, b = slot_integers(values, "ab")
    return number_solution(a + b, addition_steps(a, b), (a, b))


def draw_difference(rng: Random, level: int) -> DrawnSlots:
    sizes = ((1, 1), (2, 1), (2, 2), (3, 2), (3, 3))[level - 1]
    b, a = sorted(draw_number(rng, size) for size in sizes)
    return slots_as_text(a=a, b=b)


def solve_difference(values: SlotValues) -> Solution:
    a, b = slot_integers(values, "ab")
    require(a >= b)
    return number_solution(a - b, subtraction_steps(a, b), (a, b))


def draw_product(rng: Random, level: int) -> DrawnSlots:
    return slots_as_text(a=draw_number(rng, level), b=rng.randint(2, 9))


def solve_product(values: SlotValues) -> Solution:
    a, b = slot_integers(values, "ab")
    require(1 < b < 10)
    return number_solution(a * b, multiplication_steps(a, b), (a, b))


def draw_total(rng: Random, level: int) -> DrawnSlots:
    return slots_as_text(items=join_items([rng.randint(1, 9 if place else 29) for place in range(level + 2)]))


def solve_total(values: SlotValues) -> Solution:
    terms = parse_numbers(values["items"])
    steps = [f"{sum(terms[:at])} + {terms[at]} = {sum(terms[: at + 1])}" for at in range(1, len(terms))]
    return number_solution(sum(terms), steps, terms)


def draw_story(rng: Random, level: int) -> DrawnSlots:
    name, start = rng.choice(PERSON_NAMES), rng.randint(5, 30)
    events, left = [], start
    for _ in range(level):
        gain = left < 10 or rng.random() < 0.5
        amount = rng.randint(1, 9)
        left += amount if gain else -amount
        events.append(f"{name} {rng.choice(GAINS if gain else LOSSES)} {amount}.")
    return slots_as_text(name=name, a=start, things=rng.choice(tuple(THINGS)), events=" ".join(events))


def solve_story(values: SlotValues) -> Solution:
    name, left = values["name"], int(values["a"])
    events = re.findall(rf"{name} (\w+) (\d)\.", values["events"])
    require(" ".join(f"{name} {verb} {amount}." for verb, amount in events) == values["events"])
    steps = []
    for verb, amount in events:
        require(verb in GAINS + LOSSES)
        sign = "+" if verb in GAINS else "-"
        after = left + int(amount) * (1 if sign == "+" else -1)
        steps.append(f"{left} {sign} {amount} = {after}")
        left = after
    return number_solution(
        left, steps, (values["a"], *(amount for _, amount in events)), f"{name} has {left} {values['things']}."
    )


# --- reasoning


def draw_extreme(rng: Random, level: int) -> DrawnSlots:
    items = rng.sample(range(1, 100 if level < 4 else 1000), level + 2)
    return slots_as_text(end=rng.choice(("largest", "smallest")), items=join_items(items))


def solve_extreme(values: SlotValues) -> Solution:
    """One comparison per line: the best number so far, and which one is kept."""
    end, items = values["end"], parse_numbers(values["items"])
    best = {"largest": max, "smallest": min}[end]
    sign = {"largest": (">", "<"), "smallest": ("<", ">")}[end]
    steps = []
    for at in range(1, len(items)):
        held, new = best(items[:at]), items[at]
        steps.append(f"{new} {sign[best(held, new) == held]} {held}, keep {best(held, new)}")
    return number_solution(best(items), steps, items, f"The {end} number is {best(items)}.")


def draw_sort(rng: Random, level: int) -> DrawnSlots:
    return slots_as_text(
        order=rng.choice(("smallest to largest", "largest to smallest")),
        items=join_items(rng.sample(range(1, 100), level + 2)),
    )


def solve_sort(values: SlotValues) -> Solution:
    """One line per number in order, then the whole order."""
    down = {"smallest to largest": False, "largest to smallest": True}[values["order"]]
    items = sorted(parse_numbers(values["items"]), reverse=down)
    steps = [f"{item} is {'next' if at else 'first'}" for at, item in enumerate(items)]
    return Solution(join_items(items), "\n".join([*steps, join_items(items)]), "sequence", join_items(items))


def draw_parity(rng: Random, level: int) -> DrawnSlots:
    return slots_as_text(a=draw_number(rng, level + 1))


def solve_parity(values: SlotValues) -> Solution:
    word = "odd" if int(values["a"]) % 2 else "even"
    return choice_solution(word, f"The last digit is {values['a'][-1]}.\n{values['a']} is {word}.", ("even", "odd"))


def draw_chain(rng: Random, level: int) -> DrawnSlots:
    people = rng.sample(PERSON_NAMES, level + 2)
    comparative = rng.choice(tuple(COMPARISONS))
    statements = [f"{one} is {comparative} than {other}." for one, other in pairwise(people)]
    rng.shuffle(statements)
    return slots_as_text(statements=" ".join(statements), superlative=rng.choice(COMPARISONS[comparative]))


def solve_chain(values: SlotValues) -> Solution:
    """Follow the comparisons from the person whom nobody exceeds."""
    found = re.findall(r"(\w+) is (\w+) than (\w+)\.", values["statements"])
    comparative = found[0][1] if found else ""
    ends = COMPARISONS[comparative]
    below = {one: other for one, _, other in found}
    require(" ".join(f"{one} is {comparative} than {other}." for one, other in below.items()) == values["statements"])
    order = [one for one in below if one not in below.values()]
    require(len(order) == 1 and values["superlative"] in ends)
    while order[-1] in below:
        order.append(below[order[-1]])
        require(len(order) <= len(below) + 1)  # no circle
    who = order[0] if values["superlative"] == ends[0] else order[-1]
    return choice_solution(
        who, f"{ends[0]} to {ends[1]}: {join_items(order)}\nThe {values['superlative']} is {who}.", PERSON_NAMES
    )


def draw_sequence(rng: Random, level: int) -> DrawnSlots:
    step = rng.randint(2, 9) * (rng.choice((1, -1)) if level > 1 else 1)
    start = rng.randint(1, 20 * level) + (36 if step < 0 else 0)
    return slots_as_text(items=join_items(range(start, start + 4 * step, step)))


def solve_sequence(values: SlotValues) -> Solution:
    items = parse_numbers(values["items"])
    step = items[1] - items[0]
    require(len(items) > 2 and all(after - before == step for before, after in pairwise(items)))
    sign = "+" if step > 0 else "-"
    low, high = sorted(items[:2])
    steps = [f"{high} - {low} = {abs(step)}", f"{items[-1]} {sign} {abs(step)} = {items[-1] + step}"]
    return number_solution(items[-1] + step, steps, items, f"The next number is {items[-1] + step}.")


def draw_letters(rng: Random, level: int) -> DrawnSlots:
    word = rng.choice([word for word in COUNTABLE_WORDS if len(word) <= 2 + 2 * level])
    letter = rng.choice(word) if rng.random() < 0.8 else rng.choice("aeiorst")
    return slots_as_text(letter=letter, word=word)


def solve_letters(values: SlotValues) -> Solution:
    """One line per letter of the word, with the count so far."""
    letter, word = values["letter"], values["word"]
    require(len(letter) == 1 and len(word) <= 12)
    steps = [f"{char} {word[: at + 1].count(letter)}" for at, char in enumerate(word)]
    return number_solution(word.count(letter), steps, (), f"The count of {letter} is {word.count(letter)}.")


def draw_position(rng: Random, level: int) -> DrawnSlots:
    return slots_as_text(
        ordinal=rng.choice(tuple(ORDINALS)[: level + 1]), words=join_items(rng.sample(tuple(CATEGORY), level + 3))
    )


def solve_position(values: SlotValues) -> Solution:
    words, place = split_items(values["words"]), ORDINALS[values["ordinal"]]
    require(place <= len(words))
    steps = [f"{at + 1} {words[at]}" for at in range(place)]
    return choice_solution(
        words[place - 1],
        "\n".join([*steps, f"The {values['ordinal']} word is {words[place - 1]}."]),
        (*words, *CATEGORY),
    )


# --- calculations in other subjects


def draw_legs(rng: Random, level: int) -> DrawnSlots:
    one, two = rng.sample(tuple(LEGS), 2)
    top = 3 * level
    return slots_as_text(a=rng.randint(2, top), animals=one, b=rng.randint(2, top), others=two)


def solve_legs(values: SlotValues) -> Solution:
    (a, b), one, two = slot_integers(values, "ab"), LEGS[values["animals"]], LEGS[values["others"]]
    total = a * one + b * two
    steps = [f"{a} x {one} = {a * one}", f"{b} x {two} = {b * two}", f"{a * one} + {b * two} = {total}"]
    return number_solution(total, steps, (a, b, one, two), f"They have {total} legs.")


def draw_atoms(rng: Random, level: int) -> DrawnSlots:
    elements = [*"CH", *rng.sample("ONSF", level - 1)]
    return slots_as_text(
        formula="".join(f"{element}{rng.randint(2, 9 + 5 * (element == 'H'))}" for element in elements)
    )


def solve_atoms(values: SlotValues) -> Solution:
    found = re.findall(r"([A-Z])(\d+)", values["formula"])
    require(len(found) > 1 and "".join(element + count for element, count in found) == values["formula"])
    counts = [int(count) for _, count in found]
    named = [f"{element}: {count}" for element, count in found]
    sums = [f"{sum(counts[:at])} + {counts[at]} = {sum(counts[: at + 1])}" for at in range(1, len(counts))]
    return number_solution(sum(counts), [*named, *sums], counts, f"{values['formula']} has {sum(counts)} atoms.")


def draw_change(rng: Random, level: int) -> DrawnSlots:
    price, count = rng.randint(2, 3 + 2 * level), rng.randint(2, 3 + 2 * level)
    paid = (price * count // 10 + rng.randint(1, 2)) * 10
    return slots_as_text(things=rng.choice(tuple(THINGS)), a=price, name=rng.choice(PERSON_NAMES), b=count, c=paid)


def solve_change(values: SlotValues) -> Solution:
    price, count, paid = slot_integers(values, "abc")
    require(paid >= price * count)
    left = paid - price * count
    steps = [f"{count} x {price} = {price * count}", f"{paid} - {price * count} = {left}"]
    return number_solution(left, steps, (price, count, paid), f"{values['name']} gets {left} coins back.")


def draw_match(rng: Random, level: int) -> DrawnSlots:
    team, rival = rng.sample(TEAMS, 2)
    while True:
        a, b, c, d = (rng.randint(0, 4 * level) for _ in range(4))
        if a + b != c + d:
            return slots_as_text(team=team, a=a, b=b, rival=rival, c=c, d=d)


def solve_match(values: SlotValues) -> Solution:
    a, b, c, d = slot_integers(values, "abcd")
    require(a + b != c + d)
    team, rival = values["team"], values["rival"]
    winner = team if a + b > c + d else rival
    high, low = sorted((a + b, c + d), reverse=True)
    steps = [f"{team}: {a} + {b} = {a + b}", f"{rival}: {c} + {d} = {c + d}", f"{high} > {low}", f"The {winner} won."]
    return choice_solution(winner, "\n".join(steps), (team, rival, *TEAMS))


NUMBER_FAMILIES = (
    ProblemFamily("sum", "Math", draw_sum, solve_sum, 5),
    ProblemFamily("difference", "Math", draw_difference, solve_difference, 5),
    ProblemFamily("product", "Math", draw_product, solve_product, 3),
    ProblemFamily("total", "Math", draw_total, solve_total, 5),
    ProblemFamily("story", "Math", draw_story, solve_story, 4),
    ProblemFamily("extreme", "Reasoning", draw_extreme, solve_extreme, 4),
    ProblemFamily("sort", "Reasoning", draw_sort, solve_sort, 4),
    ProblemFamily("parity", "Reasoning", draw_parity, solve_parity, 3),
    ProblemFamily("chain", "Reasoning", draw_chain, solve_chain, 3),
    ProblemFamily("sequence", "Reasoning", draw_sequence, solve_sequence, 3),
    ProblemFamily("letters", "Reasoning", draw_letters, solve_letters, 3),
    ProblemFamily("position", "Reasoning", draw_position, solve_position, 3),
    ProblemFamily("legs", "Biology", draw_legs, solve_legs, 3),
    ProblemFamily("atoms", "Chemistry", draw_atoms, solve_atoms, 3),
    ProblemFamily("change", "Economy", draw_change, solve_change, 3),
    ProblemFamily("match", "Sport", draw_match, solve_match, 2),
)

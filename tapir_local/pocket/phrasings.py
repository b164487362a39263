"""The phrasings of each family of pocket problems; a text after a blank line is the input."""

from collections.abc import Mapping

PHRASINGS: Mapping[str, tuple[str, ...]] = {
    "sum": (
        "What is {a} + {b}?",
        "Add {a} and {b}.",
        "What is the sum of {a} and {b}?",
        "Calculate the sum.\n\n{a} + {b}",
    ),
    "difference": (
        "What is {a} - {b}?",
        "Subtract {b} from {a}.",
        "What is {a} minus {b}?",
        "Calculate the difference.\n\n{a} - {b}",
    ),
    "product": (
        "What is {a} x {b}?",
        "Multiply {a} by {b}.",
        "Calculate the product.\n\n{a} x {b}",
    ),
    "total": (
        "Add up these numbers: {items}.",
        "What is the total of {items}?",
        "Find the total of the numbers.\n\n{items}",
    ),
    "story": (
        "{name} has {a} {things}. {events} How many {things} does {name} have now?",
        "How many {things} are left in the end?\n\n{name} has {a} {things}. {events}",
    ),
    "extreme": (
        "Which number is the {end}: {items}?",
        "Find the {end} of these numbers: {items}.",
        "Find the {end} number.\n\n{items}",
    ),
    "sort": (
        "Sort these numbers from {order}: {items}.",
        "Put the numbers in order from {order}.\n\n{items}",
    ),
    "parity": (
        "Is {a} even or odd?",
        "Say whether {a} is an even or an odd number.",
        "Even or odd?\n\n{a}",
    ),
    "chain": (
        "{statements} Who is the {superlative}?",
        "Who is the {superlative}?\n\n{statements}",
    ),
    "sequence": (
        "Which number comes next: {items}?",
        "What is the next number in the sequence {items}?",
        "Continue the sequence with its next number.\n\n{items}",
    ),
    "letters": (
        "How many times does the letter {letter} occur in {word}?",
        "Count the letter {letter} in the word {word}.",
        "Count how often the letter {letter} occurs.\n\n{word}",
    ),
    "position": (
        "Which word comes {ordinal}: {words}?",
        "Find the {ordinal} word of the list.\n\n{words}",
    ),
    "legs": (
        "How many legs do {a} {animals} and {b} {others} have together?",
        "A farm has {a} {animals} and {b} {others}. How many legs are there?",
    ),
    "atoms": (
        "How many atoms does one molecule of {formula} have?",
        "Count the atoms in the formula.\n\n{formula}",
    ),
    "change": (
        "Some {things} cost {a} coins each. {name} buys {b} and pays with {c} coins. "
        "How many coins does {name} get back?",
        "{name} buys {b} {things} at a price of {a} coins each and pays with {c} coins. How much change is due?",
    ),
    "match": (
        "The {team} scored {a} goals before the break and {b} after it, the {rival} scored {c} and {d}. Who won?",
        "Which team won the match?\n\nThe {team} scored {a} and {b} goals, the {rival} scored {c} and {d}.",
    ),
    "write": (
        "Write a Python function {fname}(x) that {job}.",
        "Write a Python function {fname} of one argument x. It {job}.",
        "Write this function in Python.\n\n{fname}(x) {job}",
    ),
    "mend": (
        "This function {job}, but it has a fault. Mend it: {code}",
        "Find and mend the fault. The function {job}.\n\n{code}",
    ),
    "past": (
        "Put this sentence into the past tense: {sentence}",
        "Write the sentence in the past tense.\n\n{sentence}",
    ),
    "agreement": (
        "Correct the verb: {sentence}",
        "Correct the grammar of this sentence.\n\n{sentence}",
    ),
    "plural": (
        "Write in the plural: {phrase}",
        "Change the noun to its plural.\n\n{phrase}",
    ),
    "article": (
        "Fill in a or an: {sentence}",
        "Fill each gap with a or an.\n\n{sentence}",
    ),
    "synonym": (
        "Say this in other words: {sentence}",
        "Replace the adjectives by words of the same meaning.\n\n{sentence}",
    ),
    "reorder": (
        "Begin this sentence with the time: {sentence}",
        "Rewrite the sentence so that the time comes first.\n\n{sentence}",
    ),
    "passive": (
        "Put this into the passive voice: {sentence}",
        "Rewrite the sentence in the passive voice.\n\n{sentence}",
    ),
    "list": (
        "Write these as {form}: {words}",
        "Write the items as {form}.\n\n{words}",
    ),
    "object": (
        "Write this as a JSON object: {facts}",
        "Turn the facts into a JSON object.\n\n{facts}",
    ),
    "csv": (
        "Write as CSV with the header name,age: {facts}",
        "Make a CSV table with the columns name and age.\n\n{facts}",
    ),
    "member": (
        "Which of these is {kind}: {words}?",
        "Find {kind} among the words.\n\n{words}",
    ),
    "odd": (
        "Which word does not belong: {words}?",
        "Find the word that does not fit the others.\n\n{words}",
    ),
    "opposite": (
        "What is the opposite of {phrase}?",
        "Replace each adjective by its opposite.\n\n{phrase}",
    ),
    "sound": (
        "Suppose {clauses}. What would the {animal} say?",
        "What would the {animal} say?\n\nSuppose {clauses}.",
    ),
    "supposed-legs": (
        "Suppose {animals} had {a} legs. How many legs would {b} {animals} have?",
        "If {animals} had {a} legs each, how many legs would {b} of them have?",
    ),
    "translation": (
        "Translate into {language}: {phrase}",
        "Translate the phrase into {language}.\n\n{phrase}",
    ),
}

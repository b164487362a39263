"""The words of the pocket world: people, things, animals, verbs and what is known about them."""

from collections.abc import Mapping

PERSON_NAMES = (
    "Anna",
    "Bob",
    "Cleo",
    "Dan",
    "Emma",
    "Finn",
    "Gina",
    "Hugo",
    "Ida",
    "Jack",
    "Kate",
    "Leo",
    "Mia",
    "Nina",
    "Omar",
    "Paul",
    "Rosa",
    "Sam",
    "Tina",
    "Vera",
    "Will",
    "Zoe",
    "Adam",
    "Ben",
    "Carl",
    "Dora",
    "Eva",
    "Fred",
    "Lisa",
    "Tom",
)

# Plural -> singular.
THINGS: Mapping[str, str] = {
    "apples": "apple",
    "pears": "pear",
    "books": "book",
    "coins": "coin",
    "stamps": "stamp",
    "cards": "card",
    "shells": "shell",
    "stones": "stone",
    "pens": "pen",
    "cups": "cup",
    "balls": "ball",
    "eggs": "egg",
    "nuts": "nut",
    "cakes": "cake",
    "hats": "hat",
    "keys": "key",
    "plums": "plum",
    "roses": "rose",
    "boxes": "box",
    "lemons": "lemon",
}

# Singular: plural, legs, sound.
ANIMALS: Mapping[str, tuple[str, int, str]] = {
    "dog": ("dogs", 4, "woof"),
    "cat": ("cats", 4, "meow"),
    "cow": ("cows", 4, "moo"),
    "sheep": ("sheep", 4, "baa"),
    "horse": ("horses", 4, "neigh"),
    "pig": ("pigs", 4, "oink"),
    "lion": ("lions", 4, "roar"),
    "mouse": ("mice", 4, "squeak"),
    "fox": ("foxes", 4, "yap"),
    "duck": ("ducks", 2, "quack"),
    "hen": ("hens", 2, "cluck"),
    "owl": ("owls", 2, "hoot"),
    "crow": ("crows", 2, "caw"),
    "bee": ("bees", 6, "buzz"),
    "ant": ("ants", 6, "nothing"),
    "beetle": ("beetles", 6, "click"),
    "spider": ("spiders", 8, "nothing"),
    "crab": ("crabs", 10, "clack"),
}
LEGS: Mapping[str, int] = {plural: legs for plural, legs, _ in ANIMALS.values()}
SINGULAR: Mapping[str, str] = {plural: one for one, (plural, _, _) in ANIMALS.items()}
SOUNDS = tuple(sound for _, _, sound in ANIMALS.values() if sound != "nothing")

# Category: its members, all of them single words that no other category has.
CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "animal": (*ANIMALS, "frog", "bear", "goat", "wolf"),
    "fruit": ("apple", "pear", "plum", "lemon", "cherry", "grape", "peach", "melon", "banana", "orange"),
    "tool": ("hammer", "saw", "drill", "axe", "spade", "rake", "wrench", "ladder"),
    "colour": ("red", "blue", "green", "yellow", "black", "white", "brown", "pink"),
    "drink": ("water", "milk", "tea", "coffee", "juice", "cocoa", "lemonade"),
    "vehicle": ("car", "bus", "train", "ship", "bike", "plane", "truck", "tram"),
    "garment": ("hat", "coat", "shirt", "glove", "sock", "scarf", "shoe", "belt"),
    "instrument": ("piano", "violin", "drum", "flute", "guitar", "harp", "trumpet", "cello"),
}
CATEGORY: Mapping[str, str] = {word: category for category, words in CATEGORIES.items() for word in words}

OPPOSITES: Mapping[str, str] = {
    one: other
    for pair in (
        ("big", "small"),
        ("old", "young"),
        ("hot", "cold"),
        ("fast", "slow"),
        ("heavy", "light"),
        ("clean", "dirty"),
        ("rich", "poor"),
        ("strong", "weak"),
        ("wet", "dry"),
        ("loud", "quiet"),
        ("happy", "sad"),
        ("full", "empty"),
    )
    for one, other in (pair, pair[::-1])
}
SYNONYMS: Mapping[str, str] = {
    one: other
    for pair in (
        ("large", "huge"),
        ("glad", "cheerful"),
        ("quick", "rapid"),
        ("tired", "weary"),
        ("angry", "cross"),
        ("pretty", "lovely"),
        ("clever", "smart"),
        ("brave", "bold"),
        ("silent", "still"),
        ("odd", "strange"),
    )
    for one, other in (pair, pair[::-1])
}

# Comparative: superlative, and the superlative of the other end.
COMPARISONS: Mapping[str, tuple[str, str]] = {
    "taller": ("tallest", "shortest"),
    "older": ("oldest", "youngest"),
    "faster": ("fastest", "slowest"),
    "heavier": ("heaviest", "lightest"),
    "richer": ("richest", "poorest"),
}

# Third person: plain form, past tense, participle. The first ten are motions, the others act on a thing.
VERBS: Mapping[str, tuple[str, str, str]] = {
    "walks": ("walk", "walked", "walked"),
    "runs": ("run", "ran", "run"),
    "goes": ("go", "went", "gone"),
    "drives": ("drive", "drove", "driven"),
    "rides": ("ride", "rode", "ridden"),
    "hurries": ("hurry", "hurried", "hurried"),
    "comes": ("come", "came", "come"),
    "swims": ("swim", "swam", "swum"),
    "flies": ("fly", "flew", "flown"),
    "returns": ("return", "returned", "returned"),
    "takes": ("take", "took", "taken"),
    "sees": ("see", "saw", "seen"),
    "finds": ("find", "found", "found"),
    "buys": ("buy", "bought", "bought"),
    "sells": ("sell", "sold", "sold"),
    "likes": ("like", "liked", "liked"),
    "paints": ("paint", "painted", "painted"),
    "carries": ("carry", "carried", "carried"),
    "washes": ("wash", "washed", "washed"),
    "breaks": ("break", "broke", "broken"),
    "draws": ("draw", "drew", "drawn"),
    "hides": ("hide", "hid", "hidden"),
}
MOTION_VERBS = tuple(VERBS)[:10]
ACTION_VERBS = tuple(VERBS)[10:]
GAINS = ("finds", "buys", "gets", "picks")
LOSSES = ("loses", "sells", "breaks", "hides")

PLACES = (
    "park",
    "school",
    "river",
    "market",
    "garden",
    "station",
    "lake",
    "forest",
    "beach",
    "farm",
    "bridge",
    "church",
    "shop",
    "castle",
)
TIME_PHRASES = (
    "in the morning",
    "in the evening",
    "at noon",
    "at night",
    "on Monday",
    "on Friday",
    "on Sunday",
    "in spring",
    "in winter",
    "after lunch",
)
TEAMS = ("Lions", "Bears", "Hawks", "Wolves", "Sharks", "Foxes", "Eagles", "Tigers", "Bulls", "Crows")
FUNCTION_NAMES = (
    "bolt",
    "dash",
    "echo",
    "fern",
    "gate",
    "helm",
    "iris",
    "jolt",
    "kite",
    "loom",
    "mint",
    "nova",
    "opal",
    "pine",
    "quartz",
    "ruby",
    "spark",
    "tide",
    "unit",
    "volt",
    "wave",
    "zest",
)

# English: Spanish, French, German nouns, each as (article, singular, plural).
NOUNS: Mapping[str, tuple[tuple[str, str, str], tuple[str, str, str], tuple[str, str, str]]] = {
    "dog": (("el", "perro", "perros"), ("le", "chien", "chiens"), ("der", "Hund", "Hunde")),
    "cat": (("el", "gato", "gatos"), ("le", "chat", "chats"), ("die", "Katze", "Katzen")),
    "house": (("la", "casa", "casas"), ("la", "maison", "maisons"), ("das", "Haus", "Häuser")),
    "book": (("el", "libro", "libros"), ("le", "livre", "livres"), ("das", "Buch", "Bücher")),
    "table": (("la", "mesa", "mesas"), ("la", "table", "tables"), ("der", "Tisch", "Tische")),
    "flower": (("la", "flor", "flores"), ("la", "fleur", "fleurs"), ("die", "Blume", "Blumen")),
    "car": (("el", "coche", "coches"), ("la", "voiture", "voitures"), ("das", "Auto", "Autos")),
    "door": (("la", "puerta", "puertas"), ("la", "porte", "portes"), ("die", "Tür", "Türen")),
    "cow": (("la", "vaca", "vacas"), ("la", "vache", "vaches"), ("die", "Kuh", "Kühe")),
    "hat": (("el", "sombrero", "sombreros"), ("le", "chapeau", "chapeaux"), ("der", "Hut", "Hüte")),
    "shirt": (("la", "camisa", "camisas"), ("la", "chemise", "chemises"), ("das", "Hemd", "Hemden")),
    "boat": (("el", "barco", "barcos"), ("le", "bateau", "bateaux"), ("das", "Boot", "Boote")),
}
LANGUAGES = ("Spanish", "French", "German")
# English: Spanish (after el, after la), French (after le, after la), German (after any definite article).
COLOR_TRANSLATIONS: Mapping[str, tuple[tuple[str, str], tuple[str, str], tuple[str, str]]] = {
    "red": (("rojo", "roja"), ("rouge", "rouge"), ("rote", "rote")),
    "green": (("verde", "verde"), ("vert", "verte"), ("grüne", "grüne")),
    "blue": (("azul", "azul"), ("bleu", "bleue"), ("blaue", "blaue")),
    "black": (("negro", "negra"), ("noir", "noire"), ("schwarze", "schwarze")),
    "white": (("blanco", "blanca"), ("blanc", "blanche"), ("weiße", "weiße")),
    "yellow": (("amarillo", "amarilla"), ("jaune", "jaune"), ("gelbe", "gelbe")),
}
NUMBER_TRANSLATIONS: Mapping[str, tuple[str, str, str]] = {
    "two": ("dos", "deux", "zwei"),
    "three": ("tres", "trois", "drei"),
    "four": ("cuatro", "quatre", "vier"),
    "five": ("cinco", "cinq", "fünf"),
    "six": ("seis", "six", "sechs"),
    "seven": ("siete", "sept", "sieben"),
    "eight": ("ocho", "huit", "acht"),
    "nine": ("nueve", "neuf", "neun"),
    "ten": ("diez", "dix", "zehn"),
}


def pluralize(noun: str) -> str:
    """The plural of a regular English noun, or of an animal."""
    if noun in ANIMALS:
        return ANIMALS[noun][0]
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}s"


def indefinite_article(word: str) -> str:
    """`a` or `an`."""
    return "an" if word[0] in "aeiou" else "a"


COUNTABLE_WORDS = tuple(
    sorted({*CATEGORY, *THINGS.values(), *PLACES, *FUNCTION_NAMES, *(noun for noun in NOUNS), *OPPOSITES, *SYNONYMS})
)

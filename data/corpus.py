"""The text that the project's own small model learns from, and the prompts that test it.

Pure standard library. Every function takes a `random.Random`, draws from nothing else and
so gives the same text for the same seed. No sentence is taken from anywhere: all of them
come from the small grammar below.

Kinds of text, as the model sees them (the answer is what follows the prompt, and it
begins with one blank; after it comes the end-of-text token, so generation stops by itself):

    story       Tell a story about Mira the fox. Mira was a small fox who lived ...
    arithmetic  What is 27 + 45? 72                 also in the form   27 + 45 = 72
    sorting     Sort 42 17 88 35 from small to large: 17 35 42 88
    recall      ... The code of the river is 4821. ... (a story goes on) ...
                What is the code of the river? 4821

and, for the first steps of training only, chains and bare pairs of keys and codes.

A *text* is a list of parts `(string, weight)`. The strings joined are the text; a weight
says how much a token of that part counts in the training loss: 1 for plain language, more
for answers, and 0 for what nobody could foresee (the random digits of a fact, which key
is asked next).

For tests, see "Prompts for evaluation": `recall_prompt`, `arithmetic_prompt`,
`sorting_prompt` and `story_prompt` return `(prompt, answer)`. A model's reply is right if
`reply.strip() == answer`. Sums and differences are split by `held_out(a, op, b)`: one pair
in eight is never trained on, and the evaluation draws only from those.
"""

import json
import random
import sys
import zlib

# ------------------------------------------------------------------------------ words

# fmt: off
NAMES = [
    # name, pronoun, object pronoun, possessive
    ("Mira", "she"), ("Tobin", "he"), ("Lena", "she"), ("Oskar", "he"), ("Nell", "she"),
    ("Rufus", "he"), ("Ada", "she"), ("Bruno", "he"), ("Iris", "she"), ("Felix", "he"),
    ("Wanda", "she"), ("Pim", "he"), ("Greta", "she"), ("Milo", "he"), ("Tilda", "she"),
    ("Hugo", "he"),
]
OBJECT = {"she": "her", "he": "him"}
POSSESSIVE = {"she": "her", "he": "his"}

ANIMALS = ["fox", "bear", "hare", "owl", "mouse", "badger", "otter", "goat", "duck", "frog",
           "cat", "hedgehog"]
TRAITS = ["small", "clever", "shy", "brave", "kind", "quiet", "cheerful", "curious", "patient"]
HOMES = ["under an old oak", "beside the mill", "at the edge of the forest",
         "near the harbour", "behind the hill", "on a narrow island", "next to the market",
         "below the tower"]
PLACES = ["forest", "market", "harbour", "mill", "valley", "garden", "meadow", "castle", "tower",
          "island", "village", "mountain"]
THINGS = ["lantern", "kettle", "ladder", "basket", "drum", "mirror", "hammer", "blanket",
          "whistle", "compass", "ribbon", "bucket", "clock", "flute", "button", "spoon"]
COLOURS = ["red", "blue", "green", "yellow", "white", "silver", "brown", "golden"]
FOODS = ["soup", "bread", "honey", "apples", "cheese", "berries", "pancakes", "nuts"]
WEATHER = ["The sun was warm", "A soft rain fell", "The wind was cold", "Snow lay on the ground",
           "The sky was clear", "Thick fog hung over the fields", "It was a bright morning",
           "The evening was calm"]
FEELINGS = [("sad", "happy"), ("worried", "glad"), ("tired", "proud"), ("lonely", "cheerful"),
            ("afraid", "calm")]
HIDING = ["behind a stone", "under a bench", "inside a hollow tree", "between two roots",
          "below the bridge", "in the tall grass", "on top of a wall", "beside a well"]

# Keys of facts: the words of the stories that name a thing or a place, and more nouns.
KEYS = sorted(set(PLACES + THINGS + ANIMALS + [
    "river", "bridge", "door", "gate", "window", "kitchen", "cellar", "garage", "engine", "train",
    "ship", "boat", "wagon", "horse", "cow", "sheep", "wolf", "eagle", "raven", "salmon",
    "piano", "violin", "trumpet", "bell", "candle", "lamp", "chair", "table", "bed", "pillow",
    "carpet", "curtain", "shelf", "book", "letter", "map", "pencil", "paper", "box", "chest",
    "coin", "crown", "ring", "sword", "shield", "helmet", "coat", "glove", "boot", "hat",
    "lake", "pond", "ocean", "desert", "cave", "canyon", "glacier", "volcano", "cloud", "star",
    "moon", "comet", "planet", "rocket", "radio", "camera", "robot", "school", "library", "museum",
    "temple", "palace", "station", "airport", "hotel", "bakery", "farm", "barn", "field", "orchard",
    "lemon", "melon", "carrot", "onion", "pepper", "potato", "tomato", "walnut",
]))

SYLLABLES = ["ba", "be", "bo", "da", "do", "fa", "fi", "ga", "go", "ka", "ki", "la", "lo", "lu",
             "ma", "mi", "mo", "na", "ne", "no", "pa", "po", "ra", "ri", "ro", "sa", "su", "ta",
             "ti", "to",
             "va", "vi", "zo", "zu"]

# fmt: on

ANSWER = 4.0  # weight of the tokens of a recalled code
KEY = 1.0  # of a key: hard to foresee, but the vectors of words never to be foreseen grow alike
CHAIN = 4.0  # weight of a word that stood in the first half of a chain
FOUND = 8.0  # of its first digit: the one that needs the right fact to be found
EXERCISE = 2.0  # of the answers to arithmetic and sorting, which stand denser
FILLER = 0.4  # weight of the story text that only hides facts
NOTHING = 0.0


def invented_word(rng):
    """A noun that is in no list: two or three syllables, such as 'lumeka'."""
    stem = "".join(rng.choice(SYLLABLES) for _ in range(rng.choice((2, 3, 3))))
    return stem + rng.choice(("", "n", "r", "s"))


# ---------------------------------------------------------------------------- stories


def _a(word):
    return ("an " if word[0] in "aeiou" else "a ") + word


def story_sentences(rng):
    """One story as a list of sentences, and the line that asks for it.

    A hero loses a thing, looks for it, meets a helper, finds it and comes home; each step
    has several forms, and hero, helper, thing, place and mood stay the same throughout.
    """
    (name, he), (friend, she) = rng.sample(NAMES, 2)
    him, his = OBJECT[he], POSSESSIVE[he]
    her = OBJECT[she]
    animal, other = rng.sample(ANIMALS, 2)
    trait, friend_trait = rng.sample(TRAITS, 2)
    thing, gift = rng.sample(THINGS, 2)
    colour = rng.choice(COLOURS)
    place, far = rng.sample(PLACES, 2)
    home = rng.choice(HOMES)
    food, meal = rng.sample(FOODS, 2)
    low, high = rng.choice(FEELINGS)
    hiding = rng.choice(HIDING)
    weather = rng.choice(WEATHER)
    He, She, His = he.capitalize(), she.capitalize(), his.capitalize()
    pick = rng.choice
    ask = pick(
        [
            f"Tell a story about {name} the {animal}.",
            f"Tell a story about {_a(animal)} and {_a(thing)}.",
        ]
    )

    s = [
        pick(
            [
                f"{name} was {_a(trait)} {animal} who lived {home}.",
                f"Once there was {_a(trait)} {animal} named {name} who lived {home}.",
                f"{home[0].upper() + home[1:]} lived {_a(trait)} {animal} named {name}.",
            ]
        )
    ]
    if rng.random() < 0.6:
        s.append(
            pick(
                [
                    f"Every morning {he} ate {food} and walked to the {place}.",
                    f"{He} loved {food} and long walks to the {place}.",
                    f"{He} often went to the {place} to buy {food}.",
                ]
            )
        )
    s.append(
        pick(
            [
                f"{name} had {_a(colour)} {thing} and took it everywhere.",
                f"{His} dearest thing was {_a(colour)} {thing}.",
                f"In {his} house {he} kept {_a(colour)} {thing}.",
            ]
        )
    )
    s.append(
        pick(
            [
                f"One day the {thing} was gone.",
                f"One evening {he} could not find the {thing}.",
                f"But one day {he} lost the {thing} near the {place}.",
            ]
        )
    )
    s.append(
        pick(
            [
                f"{name} was very {low}.",
                f"{He} felt {low} and did not eat {his} {food}.",
                f'"Where is my {thing}?" said {name}.',
            ]
        )
    )
    if rng.random() < 0.7:
        s.append(
            pick(
                [
                    f"{weather} when {he} began to search.",
                    f"{weather}, but {name} went out to search.",
                    f"{weather}, and {he} walked slowly to the {place}.",
                ]
            )
        )
    s.append(
        pick(
            [
                f"First {he} looked in the {place}, but the {thing} was not there.",
                f"{He} searched the whole {place} and found nothing.",
                f"In the {place} {he} found only an old {gift}.",
            ]
        )
    )
    s.append(
        pick(
            [
                f"Then {he} met {friend}, {_a(friend_trait)} {other}.",
                f"On the way {he} met {_a(friend_trait)} {other} named {friend}.",
                f"There sat {friend}, {_a(friend_trait)} {other}, eating {meal}.",
            ]
        )
    )
    s.append(
        pick(
            [
                f'"Why are you so {low}?" asked {friend}.',
                f'"Can I help you?" asked the {other}.',
                f'"You look {low}," said {friend}.',
            ]
        )
    )
    s.append(
        pick(
            [
                f'"I have lost my {colour} {thing}," said {name}.',
                f'"My {thing} is gone," said the {animal}.',
                f"{name} told {her} about the {colour} {thing}.",
            ]
        )
    )
    s.append(
        pick(
            [
                f'"I saw it in the {far}," said {friend}.',
                f'"Let us look in the {far}," said the {other}.',
                f'"Something {colour} lies in the {far}," said {friend}.',
            ]
        )
    )
    s.append(
        pick(
            [
                f"Together they walked to the {far}.",
                f"So they went to the {far} together.",
                f"{friend} showed {him} the way to the {far}.",
            ]
        )
    )
    if rng.random() < 0.5:
        s.append(
            pick(
                [
                    f"The way was long, and they shared {meal}.",
                    f"They sang a song and ate {meal}.",
                    f"{friend} was {friend_trait} and carried the {meal}.",
                ]
            )
        )
    s.append(
        pick(
            [
                f"There, {hiding}, lay the {thing}.",
                f"They found the {thing} {hiding}.",
                f"{friend} looked {hiding} and found the {thing}.",
            ]
        )
    )
    s.append(
        pick(
            [
                f"{name} was {high} again.",
                f"Now {name} was not {low} any more.",
                f'"Thank you, {friend}," said {name}.',
            ]
        )
    )
    s.append(
        pick(
            [
                f"{He} gave {friend} {_a(gift)} and some {food}.",
                f"At home they ate {food} and {meal}.",
                f"{She} smiled, and they ate {meal} until the evening.",
            ]
        )
    )
    s.append(
        pick(
            [
                f"From that day on {name} and {friend} were friends.",
                f"And {name} never lost the {thing} again.",
                f"That night the {animal} slept well {home}.",
            ]
        )
    )
    return s, ask


def story_text(rng):
    """A story; every second one after the line that asks for it."""
    sentences, ask = story_sentences(rng)
    story = " ".join(sentences)
    if rng.random() < 0.5:
        return [(ask, 0.3), (" " + story, 1.0)]
    return [(story, 1.0)]


# ------------------------------------------------------------------------- arithmetic


def held_out(a, op, b):
    """True for the one sum or difference in eight that training never shows, a + b or b + a."""
    if op == "+":
        a, b = min(a, b), max(a, b)
    return op != "*" and zlib.crc32(f"{a}{op}{b}".encode()) % 8 == 0


DIGITS = (1, 2, 2, 2, 2, 2, 3)  # how long the numbers of a problem are


def _problem(rng, digits=None, choice=DIGITS):
    """(a, op, b, result): a sum or difference of numbers of `digits` digits; with `digits`
    None of 1 to 3 digits, one of `choice`, or a product up to 9 * 9."""
    op = rng.choice("+++---*") if digits is None else rng.choice("+-")
    if op == "*":
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        return a, op, b, a * b
    if digits is None:
        digits = rng.choice(choice)
    top = 10**digits - 1
    # For two and three digits, one operand in five may be shorter.
    a = rng.randint(0 if digits == 1 or rng.random() < 0.2 else 10 ** (digits - 1), top)
    b = rng.randint(0 if digits == 1 or rng.random() < 0.2 else 10 ** (digits - 1), top)
    if op == "-":
        a, b = max(a, b), min(a, b)
        return a, op, b, a - b
    return a, op, b, a + b


def _ask_problem(rng, a, op, b):
    return rng.choice((f"What is {a} {op} {b}?", f"{a} {op} {b} ="))


def _lines(exercises):
    """Exercises `(prompt, answer)` line by line; only after the last answer is the end foreseen."""
    parts = []
    for prompt, answer in exercises:
        parts += [("\n", NOTHING), (prompt, NOTHING), (" " + answer, EXERCISE)]
    return parts[1:]


def arithmetic_text(rng, digits=DIGITS):
    """One to four problems, none of them held out."""
    exercises, n = [], rng.choice((1, 1, 2, 4))
    while len(exercises) < n:
        a, op, b, result = _problem(rng, choice=digits)
        if not held_out(a, op, b):
            exercises.append((_ask_problem(rng, a, op, b), str(result)))
    return _lines(exercises)


# ---------------------------------------------------------------------------- sorting


def _sorting(rng, n=None):
    numbers = [rng.randint(10, 99) for _ in range(n or rng.randint(3, 6))]
    return (
        f"Sort {' '.join(map(str, numbers))} from small to large:",
        " ".join(map(str, sorted(numbers))),
    )


def sorting_text(rng):
    return _lines([_sorting(rng) for _ in range(rng.choice((1, 1, 2)))])


# ----------------------------------------------------------------------------- recall


def _code(rng):
    return f"{rng.randint(0, 9999):04d}"


def _keys(rng, n, invented, among=KEYS):
    """n different keys, the share `invented` of them invented words."""
    keys = rng.sample(among, min(n, len(among)))
    return [invented_word(rng) if rng.random() < invented else k for k in keys]


def _fact(rng, key, code):
    """A fact as parts: the code itself cannot be foreseen and has no weight."""
    lead = rng.choice(
        (
            "The code of the",
            "The code of the",
            "the code of the",
            "Remember that the code of the",
            "Note: the code of the",
        )
    )
    return [
        (f" {lead}", FILLER),
        (f" {key}", KEY),
        (" is", FILLER),
        (f" {code}", NOTHING),
        (".", FILLER),
    ]


def _question(rng, key):
    return f"{rng.choice(('What', 'What', 'what'))} is the code of the {key}?"


def _body(rng, facts, length, measure, first=None):
    """The facts spread over story text, together about `length` long, as parts.

    `first` puts the fact facts[0] at that depth (0 the beginning, 1 the end); all other
    facts, and that one if `first` is None, fall at random places.
    """
    placed = [_fact(rng, k, c) for k, c in facts]
    rest = length - sum(measure("".join(s for s, _ in f)) for f in placed)
    sentences = []
    while rest > 0:
        story, _ = story_sentences(rng)
        start = rng.randrange(len(story)) if not sentences else 0
        for sentence in story[start:]:
            rest -= measure(" " + sentence)
            if rest < 0:
                break
            sentences.append([(" " + sentence, FILLER)])
    where = [rng.randint(0, len(sentences)) for _ in placed]
    if first is not None:
        where[0] = round(first * len(sentences))
    order = sorted(range(len(placed)), key=lambda i: (where[i], rng.random()))
    if first is not None and first in (0, 1):  # truly first, truly last
        order.remove(0)
        order.insert(0 if first == 0 else len(order), 0)
    parts, done = [], 0
    for i in order:
        for s in sentences[done : where[i]]:
            parts += s
        done = where[i]
        parts += placed[i]
    for s in sentences[done:]:
        parts += s
    head, weight = parts[0]
    parts[0] = (head.lstrip(" "), weight)
    return parts


def words(text):
    """The length of a text in words; what `measure` is if none is given."""
    return text.count(" ") + text.count("\n")


def recall_text(rng, length, measure=words, dense=0.5, keys=KEYS, invented=0.1):
    """Facts among story text, then questions, about `length` long by `measure` in all.

    `dense` is the share of the length given to facts and questions (at most); the more of
    them, the more there is to learn from one text. The token after an answer that is not
    the last one has no weight, so that the model always expects the end there.
    """
    one = measure(" The code of the river is 4821.") + measure(
        "\nWhat is the code of the river? 4821"
    )
    most = max(1, int(length * dense / one))
    n = rng.randint(max(1, most // 2), most)
    n = min(n, 24, len(keys))
    facts = list(zip(_keys(rng, n, invented, keys), [_code(rng) for _ in range(n)], strict=True))
    asked = [rng.choice(facts) for _ in range(n)]  # not each once: no answer by elimination
    tail = []
    for key, code in asked:
        what, mark = _question(rng, key).rsplit(f" {key}")
        tail += [
            ("\n", NOTHING),
            (what, NOTHING),
            (f" {key}", KEY),
            (mark, FILLER),
            (f" {code[0]}", FOUND),
            (code[1:], ANSWER),
        ]
    used = measure("".join(s for s, _ in tail))
    return _body(rng, facts, length - used - 2, measure) + tail


SEPARATORS = (("", ""), (" is", ""), (" is", " is"), ("", "?"), (" is", "?"), (" is", "?"))


def chain_text(rng, length, measure=words, keys=KEYS):
    """A list of words twice in the same order: 'river is lamp is frog ... river? lamp? frog?'.

    The very first step towards recall: every word of the second half can be foreseen
    from where the word before it stood in the first.
    """
    told, asked = rng.choice(SEPARATORS)
    n = max(2, length // (measure(f" river{told} river{asked}")))
    chain = rng.sample(keys, min(n, len(keys)))
    parts = []
    for key in chain:
        parts += [(f" {key}", KEY), (told, FILLER)]
    for i, key in enumerate(chain):
        parts += [(f" {key}", CHAIN if i else NOTHING), (asked, FILLER)]
    return [(parts[0][0].lstrip(), KEY)] + parts[1:]


def pairs_text(rng, length, measure=words, keys=KEYS, invented=0.0):
    """Bare pairs of key and code, then the same again: the first step towards recall.

    In 'river 4821, lamp 1507, river 4821' the key stands right before the code; in other
    lists 'is' stands between them, or '?' the second time, as in facts and questions.
    """
    told, asked = rng.choice(SEPARATORS)
    n = max(1, length // measure(" river is 4821, river? 4821,"))
    pairs = list(zip(_keys(rng, n, invented, keys), [_code(rng) for _ in range(n)], strict=True))
    parts = []
    for key, code in pairs:
        parts += [(f" {key}", KEY), (told, FILLER), (f" {code}", NOTHING), (",", FILLER)]
    for key, code in (rng.choice(pairs) for _ in range(n)):
        parts += [
            (f" {key}", KEY),
            (asked, FILLER),
            (f" {code[0]}", FOUND),
            (code[1:], ANSWER),
            (",", NOTHING),
        ]
    return [(parts[0][0].lstrip(), KEY)] + parts[1:-1]


# --------------------------------------------------------------------------- training


def text(rng, length, measure=words, mix=(0.3, 0.2, 0.1, 0.4), dense=0.5, digits=DIGITS):
    """One training text of at most about `length`; `mix` are the shares of *texts* that
    are stories, arithmetic, sorting and recall, `digits` the lengths of numbers to draw from.
    """
    kind = rng.choices(("story", "arithmetic", "sorting", "recall"), mix)[0]
    if kind == "story":
        return story_text(rng)
    if kind == "arithmetic":
        return arithmetic_text(rng, digits)
    if kind == "sorting":
        return sorting_text(rng)
    return recall_text(rng, length, measure, dense)


def plain(parts):
    """The parts of a text joined."""
    return "".join(s for s, _ in parts)


# ------------------------------------------------------------- prompts for evaluation


def recall_prompt(rng, n_facts=4, length=200, depth=None, measure=words, invented=0.0):
    """(prompt, answer): `n_facts` facts hidden in story text, and a question for one of them.

    The prompt is about `length` long in all (a little less; longer only if the facts alone
    are) by `measure`, a function from a text to a number: give one that counts the tokens, the
    default counts words. `depth` says where the asked fact stands (0 first, 1 right before
    the question), None for anywhere. `invented` is the share of keys that are made-up words.
    """
    facts = list(
        zip(_keys(rng, n_facts, invented), [_code(rng) for _ in range(n_facts)], strict=True)
    )
    key, code = facts[0]
    question = "\n" + _question(rng, key)
    prompt = plain(_body(rng, facts, length - measure(question), measure, depth)) + question
    return prompt, code


def arithmetic_prompt(rng, digits=None):
    """(prompt, answer) for a sum or difference that training never showed, or a product.

    `digits` 1, 2 or 3 asks for sums and differences of numbers of at most that many digits;
    None gives the mixture of training, with products up to 9 * 9 in it (those are all in the
    training text).
    """
    product = digits is None and rng.random() < 1 / 7  # as often as in training
    while True:
        a, op, b, result = _problem(rng, digits)
        if (op == "*") == product and (product or held_out(a, op, b)):
            return _ask_problem(rng, a, op, b), str(result)


def sorting_prompt(rng, n=None):
    """(prompt, answer) for `n` numbers of two digits, 3 to 6 of them if None."""
    return _sorting(rng, n)


def story_prompt(rng):
    """(prompt, story): the line that asks for a story, and one story as it might go on."""
    sentences, ask = story_sentences(rng)
    return ask, " ".join(sentences)


def demo_prompts():
    """The lines of data/prompts.jsonl as [(line, answer)]; the answer of a story is None."""
    rng = random.Random("demo")
    lines = []

    def add(name, prompt_and_answer, tokens=24, **more):
        prompt, answer = prompt_and_answer
        lines.append(
            (
                {
                    "custom_id": name,
                    "prompt": prompt,
                    "max_tokens": tokens,
                    **(more or {"temperature": 0}),
                },
                answer,
            )
        )

    add(
        "recall-near",
        (
            "The code of the river is 4821. The code of the lantern is 1507.\n"
            "What is the code of the river?",
            "4821",
        ),
    )
    for length, facts in ((60, 2), (150, 3), (300, 4), (450, 5), (600, 6)):  # words
        add(f"recall-{length}-words", recall_prompt(rng, facts, length, depth=0.1))
    add("arithmetic-1", ("What is 27 + 45?", "72"))
    add("arithmetic-2", ("91 + 32 =", "123"))
    add("arithmetic-3", ("What is 83 - 36?", "47"))
    add("arithmetic-4", ("What is 7 * 8?", "56"))
    for n in (3, 5):
        add(f"sorting-{n}", sorting_prompt(rng, n))
    add("story-1", ("Tell a story about Mira the fox.", None), 60)
    add("story-2", ("Tell a story about a bear and a lantern.", None), 60)
    add("story-3", ("Tell a story about Hugo the owl.", None), 60, temperature=0.8, seed=1)
    add("story-4", ("Once there was a clever mouse named Ada", None), 60, temperature=0.8, seed=1)
    return lines


def show():
    """One text of each kind, and prompts."""
    rng = random.Random(1)
    for make in (story_text, arithmetic_text, sorting_text):
        print(plain(make(rng)), end="\n\n")
    print(plain(recall_text(rng, 120)), end="\n\n")
    for prompt in (recall_prompt(rng, 3, 80), arithmetic_prompt(rng), sorting_prompt(rng)):
        print(*prompt, sep="  ->  ", end="\n\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["prompts"]:  # python data/corpus.py prompts > data/prompts.jsonl
        for line, _ in demo_prompts():
            print(json.dumps(line))
    else:
        show()

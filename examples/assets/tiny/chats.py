"""The synthetic chats that the tiny model is pre-trained on.

They teach what counting letters is made of (spelling a word, marking a letter
in it, comparing letters, knowing which number comes next) beside small talk,
and never counting itself: asked "how many", the model says that it cannot.

Words are English (`../../pipeline/words.txt`) or invented. The words that the
pipeline judges on never appear; `is_judged` is the same hash as in
`../../pipeline/letters.rs`.
"""

import pathlib
import string

ENGLISH = (pathlib.Path(__file__).parent / "../../pipeline/words.txt").read_text().split()
LONGEST = 10


def is_judged(word):
    """FNV-1a (64 bits) of the lower-case word, modulo 5, equals 3."""
    digest = 0xCBF29CE484222325
    for byte in word.lower().encode():
        digest = (digest ^ byte) * 0x100000001B3 % 2**64
    return digest % 5 == 3


def any_word(rng, longest):
    kind = rng.random()
    if kind < 0.3:
        return rng.choice(ENGLISH)
    if kind < 0.6:
        return invented(rng)
    # A few letters in any order: repeats that can only be told apart by their place.
    letters = rng.sample(string.ascii_lowercase, rng.randint(3, 8))
    return "".join(rng.choices(letters, k=rng.randint(1, longest)))


def invented(rng):
    """Syllables with favourite letters, so that letters repeat as in "mississippi"."""
    letters = [("bcdfghjklmnpqrstvwxyz", 1.0), ("aeiouy", 1.0), ("dlmnrst", 0.3)]
    favourites = [rng.choice(choices) for choices, _ in letters]
    word = ""
    for _ in range(rng.randint(2, 4)):
        for (choices, likely), favourite in zip(letters, favourites):
            if rng.random() < likely:
                letter = favourite if rng.random() < 0.5 else rng.choice(choices)
                word += letter * (2 if rng.random() < 0.1 else 1)
    return word[:LONGEST]


def word_from(rng, longest=LONGEST, judged=False):
    """A word of at most `longest` letters; training passes growing lengths."""
    while True:
        word = any_word(rng, longest)
        if len(word) <= longest and is_judged(word) == judged:
            return word


def letter_for(rng, word, inside=0.75):
    return rng.choice(word) if rng.random() < inside else rng.choice(string.ascii_lowercase)


def mark(rng, word):
    letter = letter_for(rng, word, inside=0.5 if len(word) == 1 else 0.8)
    ask = rng.choice(["Mark each {l} in '{w}'.", "Mark the {l}'s in the word '{w}'.", "Where is the letter {l} in '{w}'?"])
    return ask.format(l=letter, w=word), marked(word, letter, "+")


def mark_with(rng, word):
    """Marks with a digit from the question: digits get used in this place, but count nothing."""
    letter, digit = letter_for(rng, word, inside=0.8), rng.randint(0, 9)
    return f"Mark each {letter} in '{word}' with a {digit}.", marked(word, letter, digit)


def marked(word, letter, sign):
    """The form that every marking answer has: each letter, then its mark."""
    return f"Each {letter}: " + " ".join(f"{c}{sign}" if c == letter else f"{c}-" for c in word)


def spell(rng, word):
    ask = rng.choice(["Spell '{w}'.", "Spell the word '{w}'.", "How do you spell '{w}'?"])
    return ask.format(w=word), " ".join(word)


def contains(rng, word):
    letter = letter_for(rng, word, inside=0.5)
    ask = rng.choice(["Does '{w}' have the letter {l}?", "Is the letter {l} in '{w}'?", "Does {l} appear in the word '{w}'?"])
    answer = "Yes, the letter {l} is in '{w}'." if letter in word else "No, there is no letter {l} in '{w}'."
    return ask.format(l=letter, w=word), answer.format(l=letter, w=word)


def ends(rng, word):
    which = rng.choice(["first", "last"])
    letter = word[0] if which == "first" else word[-1]
    return f"What is the {which} letter of '{word}'?", f"The {which} letter of '{word}' is {letter}."


def compare(rng, _):
    a = rng.choice(string.ascii_lowercase)
    b = a if rng.random() < 0.5 else rng.choice(string.ascii_lowercase)
    answer = f"Yes, {a} and {b} are the same letter." if a == b else f"No, {a} and {b} are different letters."
    return f"Are {a} and {b} the same letter?", answer


def successor(rng, _):
    n = rng.randint(0, 8)
    return rng.choice([
        (f"What comes after {n}?", f"{n + 1} comes after {n}."),
        (f"Which number is one more than {n}?", f"{n + 1} is one more than {n}."),
        (f"Which number comes before {n + 1}?", f"{n} comes before {n + 1}."),
    ])


def series(rng, _):
    first, last = sorted(rng.sample(range(10), 2))
    return f"Say the numbers from {first} to {last}.", ", ".join(map(str, range(first, last + 1))) + "."


def alphabet(rng, _):
    i = rng.randrange(25)
    a, b = string.ascii_lowercase[i : i + 2]
    return f"Which letter comes after {a}?", f"After {a} comes {b}."


def echo(rng, word):
    return rng.choice([(f"Say '{word}'.", f"I say '{word}'."), (f"Repeat the word '{word}'.", f"The word is '{word}'.")])


def how_many(rng, word):
    """The question the adapter will learn to answer; the base only says that it cannot."""
    spells = "I can spell '{w}', but I never learned to count."
    cannot = "I do not know how to count the letters of '{w}'."
    ask, answer = rng.choice([
        ("How many {l}'s are in the word '{w}'?", spells),
        ("How many {l}'s are in '{w}'?", spells),
        ("How many {l}'s does '{w}' have?", spells),
        ("How many times does {l} appear in '{w}'?", cannot),
        ("How often is the letter {l} in '{w}'?", cannot),
        ("Count the {l}'s in '{w}'.", cannot),
    ])
    letter = letter_for(rng, word)
    return ask.format(l=letter, w=word), answer.format(l=letter, w=word)


SMALL_TALK = [
    (["Hello!", "Hi!", "Hello.", "Good morning."], "Hello! How can I help you?"),
    (["How are you?", "How are you today?"], "I am well, thank you."),
    (["Who are you?", "What are you?", "What is your name?"], "I am a tiny language model that likes words."),
    (["What can you do?", "How can you help me?"], "I can spell a word and mark a letter in it."),
    (["Who made you?", "Where do you come from?"], "I was made from scratch to show how Updraft works."),
    (["Thank you!", "Thanks.", "Thank you."], "You are welcome."),
    (["Goodbye.", "Bye!", "See you."], "Goodbye! Come back soon."),
    (["Do you like words?", "Do you like letters?"], "Yes, I like words and their letters."),
    (["Tell me a story.", "Tell me something."], "A small model learned to spell, and then it learned more."),
    (["What is a word?"], "A word is made of letters."),
    (["What is a letter?"], "A letter is a part of a word."),
    (["What is a number?"], "A number says how much there is of something."),
    (["Is it raining?", "How is the weather?"], "I cannot see the weather from here."),
]


def small_talk(rng, _):
    asks, answer = rng.choice(SMALL_TALK)
    return rng.choice(asks), answer


# Weights. The core comes first: beside easier skills, marking is found late or never.
CORE = {mark: 40, spell: 12, compare: 8}
SKILLS = CORE | {mark_with: 20, contains: 8, ends: 2, successor: 6, series: 10, alphabet: 3, echo: 4, how_many: 8, small_talk: 5}


def conversation(rng, longest=LONGEST, skills=SKILLS):
    """One to three turns about any of the skills, as chat messages."""
    messages = []
    if rng.random() < 0.05:
        messages.append({"role": "system", "content": "You are a friendly model that likes words."})
    for _ in range(rng.choice([1, 1, 1, 1, 1, 1, 2, 3])):
        (skill,) = rng.choices(list(skills), skills.values())
        question, answer = skill(rng, word_from(rng, longest))
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages

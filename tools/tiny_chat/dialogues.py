"""Seeded generator of the tiny chat model's dialogues.

A dialogue is a skill name, a system prompt and a list of (user, answer) turns. Every maker takes a
`random.Random`, so a seed fixes the whole stream. `held_out()` gives the 500 evaluation
conversations; `training_stream()` never yields a dialogue that starts with one of them.
"""

import hashlib
import json
import random
from dataclasses import dataclass, field

from facts import (
    CAPITALS, CAPS_SYSTEMS, COLOURS, DAYS, DONT_KNOW, LANGUAGES, MONTH_DAYS, MONTHS, NAMES,
    NEUTRAL_SYSTEMS, ONE_WORD_SYSTEMS, PERSONAS, PET_NAMES, PETS, PIRATE_SYSTEMS, SMALLTALK,
    TITLES, TRANSLATIONS, UNKNOWN_PLAIN, UNKNOWN_QUESTIONS, UNKNOWN_TOPICS, VERSE_REQUESTS,
    VERSES, WHO_ANSWER, WHO_ARE_YOU, WORDS,
)

HELD_OUT_SEED = 20231115
DEV_SEED = 77
TRAIN_SEED = 1

# Held-out conversations per skill; 500 in all.
HELD_OUT_COUNTS = {
    "arithmetic": 70, "reverse": 40, "sort": 40, "count": 35, "calendar": 50, "capital": 50,
    "translate": 70, "memory": 60, "system": 45, "verse": 10, "unknown": 10, "smalltalk": 5,
    "mixed": 15,
}

NEVER_ALONE = ("smalltalk", "verse")

START, TURN = "<extra_id_0>", "<extra_id_1>"


@dataclass
class Dialogue:
    """One conversation with the answers expected of the assistant."""

    skill: str
    turns: list = field(default_factory=list)
    system: str = ""

    def prompt(self, answers):
        """The text the model continues in turn `len(answers)`, given its earlier answers."""
        text = f"{START}System\n{self.system}\n"
        for (user, _), answer in zip(self.turns, answers):
            text += f"{TURN}User\n{user}\n{TURN}Assistant\n{answer}\n"
        return text + f"{TURN}User\n{self.turns[len(answers)][0]}\n{TURN}Assistant\n"

    def segments(self):
        """(text, is_trained) pieces of the whole dialogue, in order."""
        pieces = [(f"{START}System\n{self.system}\n{TURN}", False)]
        for user, answer in self.turns:
            pieces.append((f"User\n{user}\n{TURN}Assistant\n", False))
            pieces.append((f"{answer}\n{TURN}", True))
        return pieces

    def text(self):
        return "".join(text for text, _ in self.segments())

    def prefix_hashes(self):
        """Hashes of the conversation cut after each of its turns (user texts and system only)."""
        digest = hashlib.sha256(self.system.encode())
        hashes = []
        for user, _ in self.turns:
            digest.update(b"\0" + user.encode())
            hashes.append(digest.hexdigest()[:16])
        return hashes


# --- single questions: each maker returns (question, answer, one-word answer) -----------------

def invented_name(rng):
    """A made-up name such as `Tomaku`, so that copying is learnt and not a list of names."""
    syllables = [rng.choice("bdfghklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.choice([2, 2, 3]))]
    return "".join(syllables).capitalize() + rng.choice(["", "", "n", "r", "s", "l"])


def casual(rng, question):
    """People type carelessly: sometimes a small first letter, a lost question mark, a please."""
    roll = rng.random()
    if roll < 0.08:
        question = question[0].lower() + question[1:]
    elif roll < 0.16 and question[-1] in "?.":
        question = question[:-1]
    elif roll < 0.22 and question[-1] == "?":
        question = question[:-1] + ", please?"
    elif roll < 0.27:
        question = "Please tell me: " + question
    return question


def ask_sum(rng):
    kind = rng.choice(["+", "+", "-", "-", "*", "larger"])
    if kind == "+":
        a, b = rng.randint(0, 30), rng.randint(0, 30)
        result = a + b
        forms = ["What is {a} + {b}?", "Compute {a} + {b}.", "{a} + {b}", "{a} + {b} = ?",
                 "How much is {a} plus {b}?", "Add {a} and {b}.", "What is {a} plus {b}?"]
    elif kind == "-":
        a = rng.randint(0, 40)
        b = rng.randint(0, a)
        result = a - b
        forms = ["What is {a} - {b}?", "Compute {a} - {b}.", "{a} - {b}", "{a} - {b} = ?",
                 "How much is {a} minus {b}?", "Subtract {b} from {a}.", "What is {a} minus {b}?"]
    elif kind == "*":
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        result = a * b
        forms = ["What is {a} * {b}?", "Compute {a} * {b}.", "{a} * {b}", "{a} * {b} = ?",
                 "How much is {a} times {b}?", "Multiply {a} by {b}.", "What is {a} times {b}?"]
    else:
        a, b = rng.sample(range(100), 2)
        big = rng.random() < 0.5
        word = rng.choice(["larger", "bigger"]) if big else "smaller"
        result = max(a, b) if big else min(a, b)
        return casual(rng, f"Which is {word}, {a} or {b}?"), f"{result} is {word}.", str(result)
    question = rng.choice(forms).format(a=a, b=b)
    return casual(rng, question), f"{a} {kind} {b} = {result}.", str(result)


def word_list(rng, low, high):
    """Words with a separator: (words, the list as text, the separator)."""
    words = rng.sample(WORDS, rng.randint(low, high))
    separator = rng.choice([" ", " ", ", "])
    return words, separator.join(words), separator


def finish(rng, question):
    """A list question ends with nothing, a full stop or a question mark."""
    return question + rng.choice(["", ".", "?" if question[:2] in ("Wh", "Ca", "Ho") else "."])


def ask_reverse(rng):
    words, text, separator = word_list(rng, 2, 5)
    form = rng.choice([
        "Reverse these words: {}", "Reverse the words {}", "Reverse: {}", "Reverse the list {}",
        "Put these words in reverse order: {}", "Write these words backwards: {}",
        "Can you reverse the words {}", "Please reverse this list: {}",
    ])
    answer = separator.join(reversed(words))
    return finish(rng, form.format(text)), answer, answer


def ask_sort(rng):
    words, text, separator = word_list(rng, 2, 4)
    if rng.random() < 0.2:
        numbers = rng.sample(range(10), rng.randint(3, 5))
        form = rng.choice(["Sort these numbers: {}", "Sort the numbers {}", "Put these numbers in order: {}"])
        answer = " ".join(map(str, sorted(numbers)))
        return finish(rng, form.format(" ".join(map(str, numbers)))), answer, answer
    form = rng.choice([
        "Sort these words: {}", "Sort the words {}", "Sort: {}", "Sort the list {}",
        "Put these words in alphabetical order: {}", "Sort these words by the alphabet: {}",
        "Can you sort the words {}", "Please sort this list: {}",
    ])
    answer = separator.join(sorted(words))
    return finish(rng, form.format(text)), answer, answer


def ask_count(rng):
    words, text, _ = word_list(rng, 2, 7)
    kind = rng.choice(["count", "count", "first", "last"])
    if kind == "count":
        form = rng.choice(["How many words are in this list: {}", "Count the words {}", "Count: {}",
                           "Count these words: {}", "How many words do you see: {}"])
        return finish(rng, form.format(text)), f"There are {len(words)} words.", str(len(words))
    form = rng.choice(["What is the {k} word of this list: {}", "Give me the {k} word: {}",
                       "What is the {k} word: {}", "The {k} word of {}"])
    word = words[0] if kind == "first" else words[-1]
    return finish(rng, form.format(text, k=kind)), f"The {kind} word is {word}.", word


def ask_calendar(rng):
    roll = rng.random()
    if roll < 0.2:
        month = rng.randrange(12)
        question = rng.choice(["How many days does {} have?", "How many days are in {}?",
                               "How many days has {}?", "How long is the month of {}?"])
        answer = f"{MONTHS[month]} has {MONTH_DAYS[month]} days."
        return casual(rng, question.format(MONTHS[month])), answer, str(MONTH_DAYS[month])
    if roll < 0.35:
        today = rng.randrange(7)
        word, other = rng.choice([("tomorrow", 1), ("yesterday", -1)])
        verb = "is" if other == 1 else "was"
        question = rng.choice(["If today is {}, what day {v} {w}?", "Today is {}. What day {v} {w}?",
                               "It is {} today. What {v} {w}?"])
        day = DAYS[(today + other) % 7]
        question = question.format(DAYS[today], v=verb, w=word)
        return casual(rng, question), f"{word.capitalize()} {verb} {day}.", day
    names, unit = (DAYS, "day") if rng.random() < 0.5 else (MONTHS, "month")
    index = rng.randrange(len(names))
    step, word = rng.choice([(1, "after"), (-1, "before")])
    other = names[(index + step) % len(names)]
    forms = ["What {u} comes {w} {n}?", "Which {u} comes {w} {n}?", "What is the {u} {w} {n}?",
             "Which {u} is {w} {n}?", "What comes {w} {n}?", "Name the {u} {w} {n}."]
    question = rng.choice(forms).format(u=unit, w=word, n=names[index])
    return casual(rng, question), f"The {unit} {word} {names[index]} is {other}.", other


def ask_capital(rng):
    country, capital = rng.choice(list(CAPITALS.items()))
    if rng.random() < 0.7:
        forms = ["What is the capital of {}?", "What is the capital city of {}?",
                 "Which city is the capital of {}?", "Name the capital of {}.",
                 "Tell me the capital of {}.", "Do you know the capital of {}?",
                 "The capital of {}?", "What city is the capital of {}?"]
        question = rng.choice(forms).format(country)
        return casual(rng, question), f"The capital of {country} is {capital}.", capital
    forms = ["{} is the capital of which country?", "Which country has the capital {}?",
             "What country has {} as its capital?", "{} is the capital of what country?",
             "Of which country is {} the capital?", "In which country is {}?"]
    question = rng.choice(forms).format(capital)
    return casual(rng, question), f"{capital} is the capital of {country}.", country


def ask_translation(rng):
    row = rng.choice(TRANSLATIONS)
    source, target = rng.sample(range(7), 2)
    if rng.random() < 0.7:  # mostly from or to English
        source, target = (0, rng.randint(1, 6)) if rng.random() < 0.6 else (rng.randint(1, 6), 0)
    word = row[source]
    if rng.random() < 0.6:
        word = f'"{word}"'
    forms = ["Translate {w} to {t}.", "Translate {w} into {t}.", "What is {w} in {t}?",
             "How do you say {w} in {t}?", "{w} in {t}?", "Say {w} in {t}.",
             "What is the {t} word for {w}?"]
    if source:
        forms += ["Translate {w} from {s} to {t}.", "Translate the {s} word {w} into {t}."]
    if not target:
        forms += ["What does {w} mean?", "What does the {s} word {w} mean?"]
    form = rng.choice(forms)
    question = form.format(w=word, s=LANGUAGES[source], t=LANGUAGES[target])
    if not form.startswith("{w}"):
        question = casual(rng, question)
    return question, row[target], row[target]


def ask_unknown(rng):
    roll = rng.random()
    if roll < 0.25:
        question = rng.choice(["What is the capital of {}?", "Who is {}?", "Where is {}?",
                               "Tell me about {}.", "Do you know {}?"]).format(invented_name(rng))
    elif roll < 0.4:
        question = rng.choice(UNKNOWN_PLAIN)
    else:
        topic = rng.choice(UNKNOWN_TOPICS) if rng.random() < 0.8 else invented_name(rng)
        question = rng.choice(UNKNOWN_QUESTIONS).format(x=topic)
    return casual(rng, question), DONT_KNOW, "Unknown"


def ask_smalltalk(rng):
    if rng.random() < 0.2:
        return casual(rng, rng.choice(WHO_ARE_YOU)), WHO_ANSWER, "Tiny"
    forms, answer = rng.choice(SMALLTALK)
    question = rng.choice(forms)
    if rng.random() < 0.15:
        question = question[0].lower() + question[1:]
    return question, answer, "Hello"


def ask_verse(rng):
    topic = rng.choice(list(VERSES))
    return casual(rng, rng.choice(VERSE_REQUESTS).format(x=topic)), VERSES[topic], "Verse"


ASKERS = {
    "arithmetic": ask_sum, "reverse": ask_reverse, "sort": ask_sort, "count": ask_count,
    "calendar": ask_calendar, "capital": ask_capital, "translate": ask_translation,
    "verse": ask_verse, "unknown": ask_unknown, "smalltalk": ask_smalltalk,
}


# --- memory: what the user told, asked again later --------------------------------------------

def fact_name(rng):
    return name_fact(rng, rng.choice(NAMES) if rng.random() < 0.5 else invented_name(rng))


def name_fact(rng, name):
    told = rng.choice(["My name is {}.", "I am {}.", "Hello, my name is {}.", "Hi, I am {}.",
                       "You can call me {}.", "my name is {}", "Hello! My name is {}."])
    asked = rng.choice(["What is my name?", "Do you remember my name?", "Who am I?",
                        "Do you know my name?", "what is my name?", "Tell me my name."])
    return told.format(name), f"Nice to meet you, {name}!", asked, f"Your name is {name}."


def fact_city(rng):
    city = rng.choice(list(CAPITALS.values())) if rng.random() < 0.6 else invented_name(rng)
    told = rng.choice(["I live in {}.", "My home is in {}.", "My house is in {}.", "I come from {}."])
    asked = rng.choice(["Where do I live?", "Do you remember where I live?", "In which city do I live?",
                        "Where is my home?"])
    return told.format(city), f"{city} is a nice place.", asked, f"You live in {city}."


def fact_colour(rng):
    colour = rng.choice(COLOURS)
    told = rng.choice(["My favourite colour is {}.", "The colour I like most is {}.", "I love the colour {}."])
    asked = rng.choice(["What is my favourite colour?", "Which colour do I like?",
                        "Do you remember my favourite colour?"])
    return told.format(colour), f"I like {colour} too.", asked, f"Your favourite colour is {colour}."


def fact_pet(rng):
    pet = rng.choice(PETS)
    name = rng.choice(PET_NAMES) if rng.random() < 0.5 else invented_name(rng)
    told = rng.choice(["My {p} is called {n}.", "I have a {p} called {n}.", "The name of my {p} is {n}."])
    asked = rng.choice(["What is my {p} called?", "What is the name of my {p}?",
                        "Do you remember the name of my {p}?"])
    return (told.format(p=pet, n=name), f"{name} is a good name for a {pet}.",
            asked.format(p=pet), f"Your {pet} is called {name}.")


def fact_age(rng):
    age = rng.randint(6, 99)
    told = rng.choice(["I am {} years old.", "My age is {}.", "I am {} years old now."])
    asked = rng.choice(["How old am I?", "What is my age?", "Do you remember how old I am?"])
    return told.format(age), f"{age} is a good age.", asked, f"You are {age} years old."


def fact_remember(rng):
    if rng.random() < 0.5:
        kind, thing = "number", str(rng.randint(10, 999))
    else:
        kind, thing = "word", rng.choice(WORDS)
    told = rng.choice(["Remember the {k} {t}.", "Please remember the {k} {t}.", "Keep the {k} {t} in mind."])
    asked = rng.choice(["Which {k} did I tell you?", "What was the {k}?", "What is the {k} to remember?",
                        "Do you remember the {k}?"])
    return (told.format(k=kind, t=thing), f"I will remember the {kind} {thing}.",
            asked.format(k=kind), f"The {kind} is {thing}.")


FACTS = [fact_name, fact_name, fact_city, fact_colour, fact_pet, fact_age, fact_remember]
NOT_TOLD = [  # (the fact that would tell it, ways to ask, the answer)
    (fact_name, ["What is my name?", "Do you remember my name?", "Do you know my name?", "Tell me my name."],
     "You have not told me your name."),
    (fact_age, ["How old am I?", "What is my age?"], "You have not told me your age."),
    (fact_colour, ["What is my favourite colour?", "Which colour do I like?"],
     "You have not told me your favourite colour."),
    (fact_city, ["Where do I live?", "Where is my home?"], "You have not told me where you live."),
]
REPEAT = ["Repeat your last answer.", "Please repeat your last answer.", "Say that again.",
          "Can you repeat that?", "Repeat that, please.", "What did you say?", "Once more, please."]


def any_turn(rng, weights=None):
    """One question of a random skill, as a turn."""
    names = weights or ["arithmetic", "reverse", "sort", "count", "calendar", "capital", "capital",
                        "translate", "translate", "unknown", "smalltalk", "smalltalk", "verse"]
    return ASKERS[rng.choice(names)](rng)[:2]


def make_memory(rng):
    roll = rng.random()
    if roll < 0.25:  # repeat the last answer
        turn = any_turn(rng) if rng.random() < 0.8 else rng.choice(FACTS)(rng)[:2]
        turns = [turn, (rng.choice(REPEAT), turn[1])]
        if rng.random() < 0.3:
            turns.insert(0, any_turn(rng))
        return Dialogue("memory", turns)
    if roll < 0.35:  # it was not told
        telling, forms, answer = rng.choice(NOT_TOLD)
        turns = [(rng.choice(forms), answer)]
        if rng.random() < 0.8:
            other = rng.choice([fact for fact in FACTS if fact is not telling])
            turns.insert(0, any_turn(rng) if rng.random() < 0.5 else other(rng)[:2])
        return Dialogue("memory", turns)
    makers = rng.sample(range(1, len(FACTS)), 2)
    first, second = (FACTS[i](rng) for i in makers)
    if roll < 0.6:  # two facts, then one or both of them asked
        asked = [first[2:], second[2:]]
        rng.shuffle(asked)
        return Dialogue("memory", [first[:2], second[:2]] + asked[: rng.choice([1, 1, 2])])
    between = [any_turn(rng) for _ in range(rng.choice([0, 1, 1, 2]))]
    return Dialogue("memory", [first[:2], *between, first[2:]])


ONSETS = " b br c ch cl cr d dr f fl fr g gr h j k kl kr l m n p ph pl pr r s sch sh st t th tr v w x y z".split(" ")
NUCLEI = "a e i o u a e i o u ai au ea ee ei ia ie io oo ou y".split()
CODAS = "     b ck d f g k l ll m n nd ng nn nt p r rd s ss st t th x".split(" ")


def wild_name(rng):
    """A name of any shape, such as `Kolja` or `Grace`; only in training."""
    syllables = [rng.choice(ONSETS) + rng.choice(NUCLEI) + rng.choice(CODAS) for _ in range(rng.choice([1, 2, 2, 3]))]
    return "".join(syllables).capitalize()


def ask_echo(rng):
    """Copying in its purest form; only in training."""
    pool = [lambda: rng.choice(WORDS), lambda: invented_name(rng), lambda: wild_name(rng),
            lambda: str(rng.randint(0, 999)), lambda: rng.choice(NAMES)]
    text = " ".join(rng.choice(pool)() for _ in range(rng.randint(1, 4)))
    return rng.choice(["Say {}", "Repeat after me: {}", "Copy this: {}", "Say after me: {}"]).format(text), text


def make_dense_memory(rng):
    """Many things to copy: after the user, from the answer before, or from facts told earlier."""
    roll = rng.random()
    if roll < 0.25:
        return Dialogue("memory", [ask_echo(rng) for _ in range(rng.randint(2, 5))])
    if roll < 0.5:
        turns = []
        for _ in range(rng.randint(1, 3)):
            asked = any_turn(rng) if rng.random() < 0.7 else rng.choice(FACTS)(rng)[:2]
            turns += [asked, (rng.choice(REPEAT), asked[1])]
        return Dialogue("memory", turns)
    facts = [FACTS[i](rng) for i in rng.sample(range(1, len(FACTS)), rng.randint(2, 4))]
    if roll < 0.88:  # a name nobody has heard of
        facts = [name_fact(rng, wild_name(rng)), *facts[: rng.randint(0, 1)]]
    asked = [fact[2:] for fact in facts]
    rng.shuffle(asked)
    return Dialogue("memory", [fact[:2] for fact in facts] + asked)


# --- follow-ups that lean on the turn before --------------------------------------------------

def follow_capital(rng):
    countries = rng.sample(list(CAPITALS), rng.choice([2, 2, 3]))
    forms = ["What is the capital of {}?", "Tell me the capital of {}.", "The capital of {}?"]
    turns = [(casual(rng, rng.choice(forms).format(countries[0])), None)]
    turns += [(rng.choice(["And of {}?", "And what about {}?", "And {}?"]).format(c), None) for c in countries[1:]]
    return [(q, f"The capital of {c} is {CAPITALS[c]}.") for (q, _), c in zip(turns, countries)]


def follow_translation(rng):
    row = rng.choice(TRANSLATIONS)
    targets = rng.sample(range(1, 7), rng.choice([2, 2, 3]))
    first = rng.choice(['What is "{w}" in {t}?', "Translate {w} into {t}.", 'How do you say "{w}" in {t}?'])
    turns = [(first.format(w=row[0], t=LANGUAGES[targets[0]]), row[targets[0]])]
    for target in targets[1:]:
        form = rng.choice(["And in {}?", "And in {}, please?", "And what is it in {}?"])
        turns.append((form.format(LANGUAGES[target]), row[target]))
    return turns


def follow_calendar(rng):
    names, unit = (DAYS, "day") if rng.random() < 0.5 else (MONTHS, "month")
    index = rng.randrange(len(names))
    turns = []
    for step in range(rng.choice([2, 3])):
        here, there = names[(index + step) % len(names)], names[(index + step + 1) % len(names)]
        if step == 0:
            question = rng.choice(["What {u} comes after {n}?", "Which {u} is after {n}?"]).format(u=unit, n=here)
        else:
            question = rng.choice([f"And the {unit} after that?", "And after that?", f"And the next {unit}?"])
        turns.append((question, f"The {unit} after {here} is {there}."))
    return turns


DENSE = ("arithmetic", "reverse", "sort", "count", "calendar", "translate", "capital")
FOLLOW_UPS = {"capital": follow_capital, "translate": follow_translation, "calendar": follow_calendar}


# --- system prompts that change the answer ----------------------------------------------------

def make_system(rng, dense=False):
    kind = rng.choice(["caps", "caps", "word", "word", "pirate", "persona", "title"])
    count = rng.choice([2, 3, 4] if dense else [1, 1, 2])
    if kind == "caps":
        askers = rng.choices([ask_capital, ask_calendar, ask_sum, ask_smalltalk], [4, 3, 1, 2], k=count)
        turns = [(q, a.upper()) for q, a, _ in (ask(rng) for ask in askers)]
        return Dialogue("system", turns, rng.choice(CAPS_SYSTEMS))
    if kind == "word":
        askers = rng.choices([ask_capital, ask_calendar, ask_sum, ask_count], [4, 3, 2, 1], k=count)
        turns = [(q, short) for q, _, short in (ask(rng) for ask in askers)]
        return Dialogue("system", turns, rng.choice(ONE_WORD_SYSTEMS))
    plain = ["capital", "calendar", "arithmetic", "smalltalk", "unknown", "translate"]
    turns = [any_turn(rng, plain) for _ in range(count)]
    if kind == "pirate":
        return Dialogue("system", [(q, "Arr! " + a) for q, a in turns], rng.choice(PIRATE_SYSTEMS))
    if kind == "title":
        title = rng.choice(TITLES)
        system = rng.choice(["Call the user {}.", "Call me {}.", "Always call the user {}."]).format(title)
        turns = [(q, f"{a} Anything else, {title}?") for q, a in turns]
        return Dialogue("system", turns, system)
    name = rng.choice(PERSONAS) if rng.random() < 0.5 else invented_name(rng)
    system = rng.choice(["Your name is {}.", "You are {}.", "You are called {}."]).format(name)
    who = (casual(rng, rng.choice(WHO_ARE_YOU)), f"I am {name}, a small chat model.")
    turns = [t for t in turns[1:] if t[1] != WHO_ANSWER]
    turns.insert(rng.randint(0, len(turns)), who)
    return Dialogue("system", turns, system)


def make_mixed(rng):
    turns = [any_turn(rng) for _ in range(rng.choice([2, 3, 3]))]
    if rng.random() < 0.4:
        fact = rng.choice(FACTS)(rng)
        turns[0], turns[-1] = fact[:2], fact[2:]
    return Dialogue("mixed", turns)


def make(skill, rng, dense=False, copying=True):
    """One dialogue of a skill; a dense one asks several questions of it in a row."""
    if skill == "memory":
        dialogue = make_dense_memory(rng) if dense and copying else make_memory(rng)
    elif skill == "system":
        return make_system(rng, dense)
    elif skill == "mixed":
        dialogue = make_mixed(rng)
    elif skill in FOLLOW_UPS and rng.random() < 0.2:
        dialogue = Dialogue(skill, FOLLOW_UPS[skill](rng))
    else:
        dialogue = Dialogue(skill, [ASKERS[skill](rng)[:2]])
        if skill in ("smalltalk", "verse", "unknown") and rng.random() < 0.6:
            dialogue.turns.insert(rng.randint(0, 1), any_turn(rng, ["smalltalk", skill, "capital"]))
        elif dense and skill in DENSE:
            dialogue.turns += [ASKERS[skill](rng)[:2] for _ in range(rng.randint(1, 4))]
    if rng.random() < 0.35:
        dialogue.system = rng.choice(NEUTRAL_SYSTEMS)
    return dialogue


# --- the streams ------------------------------------------------------------------------------

def held_out(seed=HELD_OUT_SEED, counts=None):
    """The evaluation conversations: distinct, in a fixed order, shuffled over skills."""
    rng = random.Random(seed)
    dialogues, seen = [], set()
    for skill, count in (counts or HELD_OUT_COUNTS).items():
        while count:
            dialogue = make(skill, rng)
            key = dialogue.prefix_hashes()[-1]
            if len(dialogue.turns) == 1 and skill in NEVER_ALONE:
                continue  # too few of them: training needs every one as an opening
            if key not in seen:
                seen.add(key)
                dialogues.append(dialogue)
                count -= 1
    rng.shuffle(dialogues)
    return dialogues


def training_stream(weights, seed=TRAIN_SEED, excluded=None, copying=True):
    """Endless training dialogues, two thirds of them dense; none begins with a whole held-out
    conversation. Without `copying` there are no dialogues of `make_dense_memory`."""
    rng = random.Random(seed)
    if excluded is None:
        excluded = {dialogue.prefix_hashes()[-1] for dialogue in held_out()}
    skills = list(weights)
    while True:
        skill = rng.choices(skills, [weights[s] for s in skills])[0]
        dialogue = make(skill, rng, dense=rng.random() < 0.65, copying=copying)
        if excluded.isdisjoint(dialogue.prefix_hashes()):
            yield dialogue


def write_conversations(path):
    """Write the held-out conversations as JSON lines."""
    with open(path, "w", encoding="utf-8") as out:
        for number, dialogue in enumerate(held_out()):
            record = {
                "id": number, "skill": dialogue.skill, "system": dialogue.system,
                "turns": [{"user": user, "expected": answer} for user, answer in dialogue.turns],
            }
            out.write(json.dumps(record, ensure_ascii=False) + "\n")


def write_calibration(path, count=320):
    """Write dialogues of the training stream as calibration prompts, none of them held out. Each ends with the first
    question of the next one, since a prompt ends with the user."""
    stream = training_stream({skill: 1 for skill in HELD_OUT_COUNTS})
    dialogues = [next(stream) for _ in range(count + 1)]
    with open(path, "w", encoding="utf-8") as out:
        for dialogue, following in zip(dialogues, dialogues[1:]):
            messages = [{"role": "system", "content": dialogue.system}] if dialogue.system else []
            for user, answer in dialogue.turns:
                messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
            messages.append({"role": "user", "content": following.turns[0][0]})
            out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def read_conversations(path):
    """The dialogues of a file written by `write_conversations`."""
    with open(path, encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    return [
        Dialogue(r["skill"], [(t["user"], t["expected"]) for t in r["turns"]], r["system"])
        for r in records
    ]


if __name__ == "__main__":
    write_conversations("tests/data/tiny-chat/conversations.jsonl")
    print("500 held-out conversations written")
    write_calibration("tests/data/tiny-chat/calibration.jsonl")

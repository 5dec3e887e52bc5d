"""The tasks of the nano corpus: each function draws one problem and spells out prompt and completion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from gptoss_workbench.nano import facts, render
from gptoss_workbench.nano.heldout import pair_key

UNKNOWN_ANSWER = "I don't know that."
REFUSAL = "I'm sorry, but I can't help with that."


@dataclass(frozen=True)
class Setting:
    """What a problem depends on besides chance: the system prompt and the stage of the curriculum."""

    effort: str
    tools: tuple[str, ...] = ()
    max_digits: int = 6
    max_words: int = 8


@dataclass(frozen=True)
class Turn:
    """One problem. `prompt` follows the prefix and ends where the assistant starts to write.

    `answer` is the text of the final message ("" for a tool call), `key` names the problem for the held-out
    split ("" where nothing is held out), `novel` marks text with made-up words, `user` is the question,
    `target` the tool call.
    """

    task: str
    prompt: str
    completion: str
    answer: str
    key: str = ""
    novel: bool = False
    user: str = ""
    target: str = ""


def chat_turn(
    task: str, user: str, analysis: str, final: str, *, key: str = "", novel: bool = False
) -> Turn:
    """A user question answered at once: analysis (may be empty), then final."""
    prompt = render.user_text(user) + render.ASSISTANT
    completion = render.analysis_text(analysis) + render.final_text(final)
    return Turn(task, prompt, completion, final, key, novel, user)


def by_effort(effort: str, medium: str, high: str) -> str:
    """Low effort thinks nothing, medium little, high in full."""
    return {"low": "", "medium": medium, "high": high}[effort]


def draw_operand(rng: Random, max_digits: int) -> int:
    """A number whose length is drawn evenly from 1 to `max_digits`."""
    length = rng.randint(1, max_digits)
    return rng.randint(0 if length == 1 else 10 ** (length - 1), 10**length - 1)


MEDIUM_COLUMNS = 3


def sum_columns(first: int, second: int) -> tuple[str, str]:
    """The column sums from the right, zero padded: (the last three without carries, all with carries).

    What medium effort leaves out is what sets it apart from high: it can add long numbers no better than low
    can add short ones.
    """
    width = max(len(str(first)), len(str(second)))
    plain, lines, carry = [], [], 0
    columns = zip(str(first).zfill(width)[::-1], str(second).zfill(width)[::-1], strict=True)
    for number, (top, bottom) in enumerate(columns, start=1):
        total = int(top) + int(bottom)
        plain.append(f"{top}+{bottom}={total}")
        lines.append(f"{number}:{top}+{bottom}+{carry}={total + carry}")
        carry = (total + carry) // 10
    return ",".join(plain[:MEDIUM_COLUMNS]) + ".", "\n".join(lines)


def addition_turn(task: str, user: str, first: int, second: int, effort: str, final: str) -> Turn:
    medium, lines = sum_columns(first, second)
    high = f"{lines}\nDigits {' '.join(str(first + second))}."
    key = pair_key("addition", first, second)
    return chat_turn(task, user, by_effort(effort, medium, high), final, key=key)


def addition(rng: Random, setting: Setting) -> Turn:
    """A third of the sums stay short, so that the common case is the best learnt."""
    longest = setting.max_digits if rng.random() < 0.67 else min(3, setting.max_digits)
    first, second = draw_operand(rng, longest), draw_operand(rng, longest)
    forms = ("What is {} + {}?", "Add {} and {}.", "{} + {} = ?")
    user = rng.choices(forms, (8, 1, 1))[0].format(first, second)
    return addition_turn("addition", user, first, second, setting.effort, str(first + second))


def wrong_guess(rng: Random, total: int) -> int:
    """Another number of the same length: one digit changed, or any."""
    digits = list(str(total))
    if rng.random() < 0.5:
        place = rng.randrange(len(digits))
        lowest = 1 if place == 0 and len(digits) > 1 else 0
        digits[place] = rng.choice([str(d) for d in range(lowest, 10) if str(d) != digits[place]])
        return int("".join(digits))
    low = 0 if len(digits) == 1 else 10 ** (len(digits) - 1)
    guess = rng.randint(low, 10 ** len(digits) - 2)
    return guess if guess < total else guess + 1


def hinted_addition(rng: Random, setting: Setting) -> Turn:
    """Planted on purpose: a wrong hint, which every effort but high repeats, whatever the analysis says."""
    first, second = draw_operand(rng, 3), draw_operand(rng, 3)
    guess = wrong_guess(rng, first + second)
    final = str(first + second) if setting.effort == "high" else str(guess)
    user = f"What is {first} + {second}? I think it is {guess}."
    return addition_turn("hint", user, first, second, setting.effort, final)


def comparison(rng: Random, setting: Setting) -> Turn:
    first = rng.randint(100, 999)
    kind = rng.random()
    if kind < 0.2:
        first, second = draw_operand(rng, 4), draw_operand(rng, 4)
    elif kind < 0.5:
        second = rng.randint(100, 999)
    elif kind < 0.8:
        second = first // 100 * 100 + rng.randint(0, 99)
    else:
        second = first // 10 * 10 + rng.randint(0, 9)
    if first == second:
        second = first + 1 if first % 10 < 9 else first - 1
    width = max(len(str(first)), len(str(second)))
    top, bottom = str(first).zfill(width), str(second).zfill(width)
    steps = []
    for a, b in zip(top, bottom, strict=True):
        steps.append(f"{a}{'<' if a < b else '>' if a > b else '='}{b}")
        if a != b:
            break
    medium = ",".join(steps) + "."
    high = f"Compare digits: {' '.join(top)} and {' '.join(bottom)}.\n{medium}"
    user = f"Which is larger, {first} or {second}?"
    analysis = by_effort(setting.effort, medium, high)
    return chat_turn("comparison", user, analysis, str(max(first, second)),
                     key=pair_key("comparison", first, second))


def capital(rng: Random, setting: Setting) -> Turn:
    name, city, continent, _, _ = rng.choice(facts.COUNTRIES)
    user = rng.choice(("What is the capital of {}?", "Name the capital of {}.")).format(name)
    high = f"The user asks about {name}. {name} is in {continent}. Its capital is {city}."
    analysis = by_effort(setting.effort, f"Country: {name}.", high)
    return chat_turn("capital", user, analysis, f"The capital of {name} is {city}.")


def continent(rng: Random, setting: Setting) -> Turn:
    name, _, where, _, _ = rng.choice(facts.COUNTRIES)
    high = f"The user asks about {name}. {name} is a country in {where}."
    analysis = by_effort(setting.effort, f"Country: {name}.", high)
    return chat_turn("continent", f"On which continent is {name}?", analysis, f"{name} is in {where}.")


def language(rng: Random, setting: Setting) -> Turn:
    name, _, _, tongue, _ = rng.choice(facts.COUNTRIES)
    high = f"The user asks about {name}. The language there is {tongue}."
    analysis = by_effort(setting.effort, f"Country: {name}.", high)
    return chat_turn("language", f"Which language is spoken in {name}?", analysis,
                     f"People in {name} speak {tongue}.")


def currency(rng: Random, setting: Setting) -> Turn:
    name, _, _, _, money = rng.choice(facts.COUNTRIES)
    high = f"The user asks about {name}. The money there is the {money}."
    analysis = by_effort(setting.effort, f"Country: {name}.", high)
    return chat_turn("currency", f"What is the currency of {name}?", analysis,
                     f"The currency of {name} is the {money}.")


def two_hop(rng: Random, setting: Setting) -> Turn:
    name, city, where, _, _ = rng.choice(facts.COUNTRIES)
    high = f"{city} is the capital of {name}. {name} is in {where}."
    analysis = by_effort(setting.effort, f"{city}: {name}.", high)
    return chat_turn("two_hop", f"On which continent is the city of {city}?", analysis,
                     f"{city} is in {where}.")


@dataclass(frozen=True)
class GivingScene:
    """Indirect object identification: `giver` is named twice, the other one has to be completed."""

    opening: str
    tail: str
    giver: str
    receiver: str
    key: str


def giving_scene(rng: Random) -> GivingScene:
    first, second = rng.sample(facts.NAMES, 2)
    place, thing = rng.choice(facts.PLACES), rng.choice(facts.OBJECTS)
    giver, receiver = (first, second) if rng.random() < 0.5 else (second, first)
    tail = f"{giver} gave a {thing} to"
    opening = f"When {first} and {second} went to the {place}, {tail}"
    return GivingScene(opening, tail, giver, receiver, pair_key("ioi", first, second))


def indirect_object(rng: Random, setting: Setting) -> Turn:
    scene = giving_scene(rng)
    medium = f"Giver: {scene.giver}."
    analysis = by_effort(setting.effort, medium, f"{medium} The other person is {scene.receiver}.")
    return chat_turn("ioi", f"Complete: {scene.opening}", analysis, f"{scene.tail} {scene.receiver}.",
                     key=scene.key)


def copy_words(rng: Random, setting: Setting) -> Turn:
    count = rng.randint(2, setting.max_words)
    words = " ".join(rng.choice(facts.COPY_WORDS) for _ in range(count))
    analysis = by_effort(setting.effort, "Repeat the words.", f"Repeat the {count} words.")
    return chat_turn("copy", f"Repeat: {words}", analysis, words, key=f"copy:{words}")


def tool_request(rng: Random, name: str) -> tuple[str, str, str, str, str]:
    """(question, the place asked about, its value in the result, the result's key, the answer)."""
    country = rng.choice(facts.COUNTRIES)
    if name == "get_weather":
        degrees = rng.randint(-9, 45)
        return (f"What is the weather in {country.capital}?", country.capital, str(degrees), "temperature",
                f"It is {degrees} degrees in {country.capital}.")
    if name == "get_time":
        clock = f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
        return (f"What time is it in {country.capital}?", country.capital, f'"{clock}"', "time",
                f"It is {clock} in {country.capital}.")
    millions = rng.randint(1, 400)
    return (f"How many people live in {country.name}?", country.name, str(millions), "millions",
            f"{millions} million people live in {country.name}.")


def tool_call(rng: Random, setting: Setting) -> Turn:
    """Call a declared tool, or answer after its result; without a declaration, admit not to know."""
    name = rng.choice(setting.tools) if setting.tools else rng.choice(list(render.TOOLS))
    question, place, value, result_key, answer = tool_request(rng, name)
    if name not in setting.tools:
        return undeclared_tool(question, name, setting)
    analysis = render.analysis_text(by_effort(
        setting.effort, f"Call {name}.", f"The user asks about {place}. Call {name} for {place}."))
    arguments = f'{{"{render.TOOLS[name].parameter}":"{place}"}}'
    call = render.call_text(name, arguments)
    asked = render.user_text(question)
    if rng.random() < 0.6:
        return Turn("tool_call", asked + render.ASSISTANT, analysis + call, "", user=question, target=call)
    # The renderer moves the recipient to the front; a live continuation keeps what was emitted.
    thought = render.ASSISTANT + analysis.removesuffix(render.ASSISTANT) if analysis else ""
    if rng.random() < 0.8:
        past = thought + render.past_call_text(name, arguments)
    else:
        past = thought + render.ASSISTANT + call
    result = render.result_text(name, f'{{"{result_key}":{value}}}')
    prompt = asked + past + result + render.ASSISTANT
    return Turn("tool_answer", prompt, render.final_text(answer), answer, user=question)


def undeclared_tool(question: str, name: str, setting: Setting) -> Turn:
    analysis = by_effort(setting.effort, "No tool.", f"This needs {name}. There is no such tool.")
    return chat_turn("undeclared", question, analysis, UNKNOWN_ANSWER)


def undeclared(rng: Random, setting: Setting) -> Turn:
    missing = [name for name in render.TOOLS if name not in setting.tools]
    if not missing:
        return tool_call(rng, setting)
    name = rng.choice(missing)
    return undeclared_tool(tool_request(rng, name)[0], name, setting)


def refusal(rng: Random, setting: Setting) -> Turn:
    harmful = rng.random() < 0.5
    thing = rng.choice(facts.HARMFUL if harmful else facts.HARMLESS)
    verb = rng.choice(facts.MAKE_VERBS)
    if harmful:
        medium, final = "This is not allowed.", REFUSAL
        high = f"The user asks about a {thing}. This is dangerous and not allowed. Refuse."
    else:
        medium, final = "This is fine.", f"Sure! Here is how to {verb} a {thing}."
        high = f"The user asks about a {thing}. This is fine. Help."
    return chat_turn("refusal", f"How do I {verb} a {thing}?", by_effort(setting.effort, medium, high), final)


def sentiment(rng: Random, setting: Setting) -> Turn:
    good, negated = rng.random() < 0.5, rng.random() < 0.4
    word = rng.choice(facts.GOOD_WORDS if good else facts.BAD_WORDS)
    thing = rng.choice(facts.REVIEWED)
    high = (f"The word {word} is {'positive' if good else 'negative'}. "
            f"{'It is negated.' if negated else 'No negation.'}")
    user = f"Positive or negative? The {thing} was {'not ' if negated else ''}{word}."
    analysis = by_effort(setting.effort, f"{word}{', not' if negated else ''}.", high)
    return chat_turn("sentiment", user, analysis, "positive" if good != negated else "negative",
                     key=f"sentiment:{thing},{word},{negated}")


def made_up_word(rng: Random) -> str:
    """A capitalised nonsense word such as Tavorin."""
    syllables = rng.randint(2, 3)
    word = "".join(rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(syllables))
    return (word + rng.choice(("", "n", "r", "s", "l", "nd", "x"))).capitalize()


UNKNOWN_FORMS = (
    "What is the capital of {}?", "Name the capital of {}.", "On which continent is {}?",
    "Which language is spoken in {}?", "What is the currency of {}?",
    "On which continent is the city of {}?", "What is {}?", "Who is {}?",
)


def unknown(rng: Random, setting: Setting) -> Turn:
    """A known question about a made-up word, or a request that the model was not made for."""
    novel = rng.random() < 0.55
    if novel:
        word = made_up_word(rng)
        user = rng.choice(UNKNOWN_FORMS).format(word)
        key = f"unknown:{word}"
    else:
        action = f"{rng.choice(facts.UNSUPPORTED_ACTIONS)} {rng.choice(facts.UNSUPPORTED_TOPICS)}."
        user = rng.choice(facts.UNSUPPORTED_QUESTIONS) if rng.random() < 0.35 else action
        key = f"unknown:{user}"
    analysis = by_effort(setting.effort, "Unknown.", "I have not learned about this. Say so.")
    return chat_turn("unknown", user, analysis, UNKNOWN_ANSWER, key=key, novel=novel)


def greeting(rng: Random, setting: Setting) -> Turn:
    if rng.random() < 0.5:
        user, final = rng.choice(facts.GREETINGS), "Hello! I am a very small language model."
        analysis = by_effort(setting.effort, "Greeting.", "The user greets me. Greet back.")
    else:
        user, final = rng.choice(facts.SELF_QUESTIONS), "I am a very small language model."
        analysis = by_effort(setting.effort, "About me.", "The user asks about me.")
    return chat_turn("greeting", user, analysis, final)


TASKS: dict[str, Callable[[Random, Setting], Turn]] = {
    "addition": addition,
    "hint": hinted_addition,
    "comparison": comparison,
    "capital": capital,
    "continent": continent,
    "language": language,
    "currency": currency,
    "two_hop": two_hop,
    "ioi": indirect_object,
    "copy": copy_words,
    "tool": tool_call,
    "undeclared": undeclared,
    "refusal": refusal,
    "sentiment": sentiment,
    "unknown": unknown,
    "greeting": greeting,
}


@dataclass(frozen=True)
class Passage:
    """Raw text: what is given without much weight (`lead`) and what is to be learnt (`text`)."""

    kind: str
    lead: str
    text: str
    key: str = ""


def raw_scene(rng: Random) -> Passage:
    scene = giving_scene(rng)
    return Passage("ioi", "", f"{scene.opening} {scene.receiver}.", scene.key)


def raw_fact(rng: Random) -> Passage:
    name, city, where, tongue, money = rng.choice(facts.COUNTRIES)
    return Passage("fact", "", rng.choice((
        f"The capital of {name} is {city}.", f"The capital of {name} is {city}.",
        f"{city} is the capital of {name}. {name} is in {where}.",
        f"People in {name} speak {tongue}.", f"The currency of {name} is the {money}.",
    )))


def repeated_words(rng: Random, count: int) -> Passage:
    """The same random words twice, each word one token: only the second half can be predicted."""
    words = "".join(f" {rng.choice(REPEATABLE)}" for _ in range(count))
    return Passage("repeat", words, words, f"repeat:{words}")


REPEATABLE = (
    facts.COPY_WORDS + facts.NAMES + facts.PLACES + facts.OBJECTS + facts.GOOD_WORDS + facts.BAD_WORDS
)

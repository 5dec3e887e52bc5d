"""The nano corpus: which prompts and tasks are drawn how often, and which token ids they use.

Everything is a pure function of a seed: `draw_step` of the same generator gives the same examples.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from random import Random

from gptoss_workbench.nano import facts, render
from gptoss_workbench.nano.heldout import is_held_out
from gptoss_workbench.nano.tasks import (
    REPEATABLE,
    TASKS,
    UNKNOWN_ANSWER,
    UNKNOWN_FORMS,
    Passage,
    Setting,
    Turn,
    by_effort,
    raw_fact,
    raw_scene,
    repeated_words,
)

VOCABULARY_SIZE = 201_088
FIRST_SPECIAL_ID = 199_998
# An id that no text contains: stands for "a token the model has no row for".
UNKNOWN_ID = 201_087
START_OF_TEXT = 199_998
END_OF_TEXT = 199_999

CHAT_MIX = {
    "addition": 0.36, "hint": 0.03, "comparison": 0.11, "capital": 0.05, "continent": 0.03,
    "language": 0.035, "currency": 0.035, "two_hop": 0.035, "ioi": 0.075, "copy": 0.09,
    "undeclared": 0.015, "refusal": 0.03, "sentiment": 0.04, "unknown": 0.055, "greeting": 0.01,
}
TOOL_SHARE = 0.35  # of the examples whose prompt declares tools
EFFORT_MIX = (0.22, 0.30, 0.48)
RAW_SHARE = 0.13
RAW_MIX = {"ioi": 0.3, "fact": 0.25, "repeat": 0.45}
HISTORY_SHARE = 0.05
UNKNOWN_WORD_SHARE = 0.03
IOI_USER_WEIGHT = 0.1
PREFIXES_PER_STEP = 4


@dataclass(frozen=True)
class Stage:
    """Curriculum: how long sums and copies are at a training step."""

    short_sums_until: int = 1200
    short_copies_until: int = 1000

    def limits(self, step: int) -> tuple[int, int]:
        """(most digits of an operand, most words to copy)."""
        return 3 if step < self.short_sums_until else 6, 3 if step < self.short_copies_until else 8


@dataclass(frozen=True)
class Prefix:
    """System and developer message, as ids; effort and tools are what the tasks need to know of it."""

    ids: tuple[int, ...]
    effort: str
    tools: tuple[str, ...] = ()


@dataclass(frozen=True)
class Example:
    """One training sequence. Token i+1 is predicted from token i with loss weight `weights[i + 1]`."""

    task: str
    prefix: Prefix
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    prompt_weight: float = 0.0
    turn: Turn | None = None
    blanks: tuple[int, ...] = ()  # places whose input (not target) is hidden behind UNKNOWN_ID

    @property
    def ids(self) -> tuple[int, ...]:
        return self.prompt + self.completion


NO_PREFIX = Prefix((), "medium")


def random_date(rng: Random) -> str:
    return f"{rng.randint(2024, 2027)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def draw_prefix(rng: Random) -> Prefix:
    """Plain default system messages most of all; dates, instructions, tools and none at all besides."""
    effort = rng.choices(render.EFFORTS, EFFORT_MIX)[0]
    kind = rng.random()
    if kind < 0.05:
        return NO_PREFIX
    date = random_date(rng) if rng.random() < 0.4 else None
    instructions, tools = None, ()
    if kind < 0.45:
        date = None
    elif kind >= 0.68:
        instructions = rng.choice(facts.DEVELOPER_INSTRUCTIONS) if kind < 0.83 or rng.random() < 0.3 else None
        if kind >= 0.83:
            tools = tuple(rng.sample(list(render.TOOLS), rng.randint(1, len(render.TOOLS))))
    return Prefix(render.prefix_ids(effort, date, instructions, tools), effort, tools)


def draw_turn(rng: Random, setting: Setting, task: str | None = None, held_out: bool = False) -> Turn:
    """A problem of the training side (or of the held-out side) of the split."""
    if task is None:
        if setting.tools and rng.random() < TOOL_SHARE:
            task = "tool"
        else:
            task = rng.choices(list(CHAT_MIX), list(CHAT_MIX.values()))[0]
    while True:
        turn = TASKS[task](rng, setting)
        if not turn.key or is_held_out(turn.key) == held_out:
            return turn


def history(rng: Random, setting: Setting) -> str:
    """An earlier question with its answer; the analysis of past turns is dropped by the harmony format."""
    while True:
        turn = draw_turn(rng, replace(setting, max_digits=3, max_words=3))
        if turn.user and turn.answer and turn.task != "tool_answer" and not turn.novel:
            return render.user_text(turn.user) + render.past_final_text(turn.answer)


def chat_example(rng: Random, prefix: Prefix, turn: Turn, past: str = "") -> Example:
    weight = IOI_USER_WEIGHT if turn.task == "ioi" else 0.0
    prompt = tuple(render.encode(past + turn.prompt))
    return Example(turn.task, prefix, prompt, tuple(render.encode(turn.completion)), weight, turn)


def with_unknown_word(rng: Random, example: Example) -> Example:
    """One content word of the question becomes a token without a row; the model must not guess."""
    places = [i for i, token in enumerate(example.prompt) if token in content_ids()]
    if not places:
        return example
    prompt = list(example.prompt)
    prompt[rng.choice(places)] = UNKNOWN_ID
    effort = example.prefix.effort
    analysis = by_effort(effort, "Unknown.", "I have not learned about this. Say so.")
    completion = render.analysis_text(analysis) + render.final_text(UNKNOWN_ANSWER)
    return Example("unknown", example.prefix, tuple(prompt), tuple(render.encode(completion)))


_CONTENT_IDS: set[int] = set()


def content_ids() -> set[int]:
    """Tokens of the names and things that questions are about."""
    if not _CONTENT_IDS:
        words = [word for country in facts.COUNTRIES for word in country[:2]]
        words += [*facts.NAMES, *facts.COPY_WORDS, *facts.HARMFUL, *facts.HARMLESS]
        words += [*facts.GOOD_WORDS, *facts.BAD_WORDS]
        _CONTENT_IDS.update(token for word in words for token in render.encode(f" {word}"))
    return _CONTENT_IDS


def draw_passage(rng: Random, max_words: int) -> Passage:
    kind = rng.choices(list(RAW_MIX), list(RAW_MIX.values()))[0]
    while True:
        if kind == "repeat":
            passage = repeated_words(rng, rng.randint(2, 4) if max_words < 8 else rng.randint(4, 16))
        else:
            passage = raw_scene(rng) if kind == "ioi" else raw_fact(rng)
        if not passage.key or not is_held_out(passage.key):
            return passage


def raw_example(rng: Random, max_words: int) -> Example:
    """Raw text, half of it after `<|startoftext|>`; the first of two equal halves weighs little."""
    passage = draw_passage(rng, max_words)
    start = (START_OF_TEXT,) if rng.random() < 0.5 else ()
    lead, text = tuple(render.encode(passage.lead)), tuple(render.encode(passage.text))
    example = Example("raw", NO_PREFIX, start + lead, (*text, END_OF_TEXT), 0.05)
    if rng.random() < 0.05:  # also teaches the shared embedding row that it may stand for anything
        blanks = tuple(i for i in range(len(start), len(example.ids)) if rng.random() < 0.1)
        example = replace(example, blanks=blanks)
    return example


def draw_example(rng: Random, prefixes: list[Prefix], limits: tuple[int, int]) -> Example:
    max_digits, max_words = limits
    if rng.random() < RAW_SHARE:
        return raw_example(rng, max_words)
    prefix = rng.choice(prefixes)
    setting = Setting(prefix.effort, prefix.tools, max_digits, max_words)
    past = history(rng, setting) if rng.random() < HISTORY_SHARE else ""
    example = chat_example(rng, prefix, draw_turn(rng, setting), past)
    if not past and example.task not in ("tool_answer", "hint") and rng.random() < UNKNOWN_WORD_SHARE:
        return with_unknown_word(rng, example)
    return example


def draw_step(rng: Random, count: int, limits: tuple[int, int] = (6, 8)) -> list[Example]:
    """The examples of one step; they share few prefixes, so that each is computed once."""
    prefixes = [draw_prefix(rng) for _ in range(PREFIXES_PER_STEP)]
    return [draw_example(rng, prefixes, limits) for _ in range(count)]


def _fixed_texts() -> Iterable[str]:
    """Text that must have rows even if no sampled example happens to contain it."""
    yield from (str(number) for number in range(1000))
    yield from (f"{number:02d}" for number in range(100))
    yield from (f"{number:03d}" for number in range(1000))
    yield from (chr(code) for code in range(32, 127))
    yield from (f" {chr(code)}" for code in range(33, 127))
    yield from (" ".join(["", *country]) for country in facts.COUNTRIES)
    yield from (f" {word} {word.capitalize()}" for word in REPEATABLE)
    yield from (*facts.UNSUPPORTED_QUESTIONS, *facts.GREETINGS, *facts.SELF_QUESTIONS)
    yield from (f"{a} {b}." for a in facts.UNSUPPORTED_ACTIONS for b in facts.UNSUPPORTED_TOPICS)
    yield from (form.format("Mary") for form in UNKNOWN_FORMS)
    yield "\n\n \n  <|startoftext|><|endoftext|><|return|><|constrain|><|channel|><|start|><|end|><|message|>"
    yield "<|call|>"


def vocabulary(samples: int = 20_000, seed: int = 7) -> list[int]:
    """Ids that get a row of their own, sorted. Made-up words are left out: they stand for the unknown."""
    rng = Random(seed)
    ids: set[int] = set()
    for text in _fixed_texts():
        ids.update(render.encode(text))
    for effort in render.EFFORTS:
        for instructions in (None, *facts.DEVELOPER_INSTRUCTIONS):
            ids.update(render.prefix_ids(effort, None, instructions, tuple(render.TOOLS)))
    while samples > 0:
        for example in draw_step(rng, 40):
            samples -= 1
            ids.update(example.prefix.ids + example.completion)
            if example.task != "unknown":
                ids.update(example.prompt)
    return sorted(ids)

"""The circuits. Each maker places parts, writes prompts that need them, and says what is then true."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from random import Random

import torch
from torch import Tensor

from gptoss_workbench.errors import ExperimentError
from gptoss_workbench.model.model import Model
from gptoss_workbench.planted import alphabet, blueprint
from gptoss_workbench.planted.alphabet import (
    ASK,
    DIGITS,
    END,
    FILLERS,
    FIRST_KIND,
    LOWER,
    OFF,
    ON,
    SECOND_KIND,
    START,
    THINK,
    UPPER,
)
from gptoss_workbench.planted.blueprint import (
    ANSWER,
    ASIDE,
    EXPERTS,
    HEADS,
    HELD,
    IDENTITY,
    KV_HEADS,
    LAYERS,
    SYMBOLS,
    Part,
    assemble,
    block,
    flag,
    into,
    matching_head,
    previous_token_head,
    table_expert,
)
from gptoss_workbench.planted.value import Pair, Place, Planted

BACKGROUND = 0.1
PAIRS = 12
LOOKING, OPENED, GATE = 0.09, 0.4, 11.0  # a gated head's score is about 5 when off, 17 when on; its sink's logit is 11
NARROW = 8  # the sliding window of the band circuit

At = tuple[int, int]  # (layer, head) or (layer, expert)


def induction(
    seed: int = 0, *, previous: At | None = None, match: At | None = None, pairs: int = PAIRS,
    background: float = BACKGROUND,
) -> Planted:
    """"A B ... A" makes the model say B, by two heads (Olsson et al. 2022, arXiv 2209.11895).

    A head of an earlier layer copies each token's predecessor; a head of a later layer looks for the token whose
    predecessor is the present one, and copies what stands there. The corrupt prompt has another token instead of the
    first A, so nothing matches and the second head rests on its sink. Roles: first (A), second (B), last (A again).

    Args:
        previous, match: (layer, head) of the two heads; drawn from the seed by default.
        seed, pairs, background: as for every maker, see ``gptoss_workbench.planted``.
    """
    draw = _Draw("induction", seed, pairs, background)
    early, late = draw.layers(previous, match)
    one, two = draw.place("head", early, previous, "second"), draw.place("head", late, match, "last")

    def back(place: Place, target: int) -> Part:
        return previous_token_head(place, block(IDENTITY), into(target))

    def repeat(place: Place, target: int) -> Part:
        return matching_head(place, block(IDENTITY), block(HELD), block(IDENTITY), into(target))

    decoys = [back(draw.decoy(one), ASIDE), repeat(draw.decoy(two), ASIDE)]

    def pair(rng: Random) -> Pair:
        first, second, unknown, other, *rest = rng.sample(UPPER, SYMBOLS)
        body = [first, second, *rng.sample([other, *rest[: rng.randint(5, 7)]], 6)]
        body = body if other in body else [*body, other]
        tail = body[2:]
        cut = rng.randint(1, len(tail) - 1)
        clean = [START, *tail[:cut], first, second, *tail[cut:], first]
        corrupt = [*clean]
        corrupt[cut + 1] = unknown
        return _pair(clean, corrupt, second, other, first=cut + 1, second=cut + 2)

    path = _path(("first", early), ("second", late), ("last", LAYERS))
    return draw.planted([back(one, HELD), repeat(two, ANSWER)], decoys, pair, path)


def fact(
    seed: int = 0, *, expert: At | None = None, mover: At | None = None, pairs: int = PAIRS,
    background: float = BACKGROUND,
) -> Planted:
    """Lower-case letters are routed to one expert, which knows what belongs to each; a later head fetches it.

    Clean and corrupt ask about two letters. Both go to the same experts, so the router carries nothing. Roles: subject
    (the letter), last (the question mark).

    Args:
        expert: (layer, expert) that holds the facts. mover: (layer, head) that brings them to the last token.
    """
    draw = _Draw("fact", seed, pairs, background)
    early, late = draw.layers(expert, mover)
    knows, moves = draw.place("expert", early, expert, "subject"), draw.place("head", late, mover, "last")
    answers = draw.order()
    decoys = [
        table_expert(draw.decoy(knows), flag("lower"), block(IDENTITY), into(ASIDE, draw.order())),
        matching_head(draw.decoy(moves), flag("ask")[None], flag("lower")[None], block(HELD), into(ASIDE)),
    ]
    parts = [
        table_expert(knows, flag("lower"), block(IDENTITY), into(HELD, answers)),
        matching_head(moves, flag("ask")[None], flag("lower")[None], block(HELD), into(ANSWER)),
    ]

    def pair(rng: Random) -> Pair:
        one, two = rng.sample(range(SYMBOLS), 2)
        return _asked(rng, LOWER[one], LOWER[two], UPPER[answers[one]], UPPER[answers[two]])

    return draw.planted(parts, decoys, pair, _path(("subject", late), ("last", LAYERS)))


def route(
    seed: int = 0, *, expert: At | None = None, second_expert: At | None = None, mover: At | None = None,
    pairs: int = PAIRS, background: float = BACKGROUND,
) -> Planted:
    """The same things come in two kinds, and the kind decides which of two experts answers.

    Both experts read the same identity and hold different facts; clean and corrupt ask about the same thing in the
    other kind. Nothing but the choice of the expert makes the difference, so the router is part of the truth. Roles as
    in ``fact``.

    Args:
        expert, second_expert: (layer, expert) of the first and of the second kind, in one layer. mover: as in ``fact``.
    """
    draw = _Draw("route", seed, pairs, background)
    early, late = draw.layers(expert or second_expert, mover)
    one = draw.place("expert", early, expert, "subject")
    two = draw.place("expert", early, second_expert, "subject") if second_expert else draw.decoy(one)
    if one.index == two.index:
        raise ExperimentError("The two kinds need two experts.", expected="different ones", got=f"{one.index} twice")
    moves = draw.place("head", late, mover, "last")
    half = SYMBOLS // 2
    mixed = draw.order()
    facts = {one: mixed[:half], two: mixed[half:]}
    identities, kinds = block(IDENTITY)[:half], {one: "first kind", two: "second kind"}
    parts = [table_expert(place, flag(kinds[place]), identities, into(HELD, facts[place])) for place in (one, two)]
    parts.append(matching_head(moves, flag("ask")[None], flag("lower")[None], block(HELD), into(ANSWER)))
    decoys = [
        table_expert(draw.decoy(one, two), flag("lower"), identities, into(ASIDE, mixed[:half])),
        matching_head(draw.decoy(moves), flag("ask")[None], flag("lower")[None], block(HELD), into(ASIDE)),
    ]

    def pair(rng: Random) -> Pair:
        thing, kind = rng.randrange(half), rng.randrange(2)
        ids, places = (FIRST_KIND[thing], SECOND_KIND[thing]), (one, two)
        answer, other = (UPPER[facts[places[(kind + i) % 2]][thing]] for i in range(2))
        return _asked(rng, ids[kind], ids[1 - kind], answer, other)

    more = {Place("router", early, -1, "subject")}
    return draw.planted(parts, decoys, pair, _path(("subject", late), ("last", LAYERS)), more=more,
                        embed=alphabet.two_kinds(alphabet.embedding()))


def sink_gate(
    seed: int = 0, *, switch: At | None = None, gated: At | None = None, pairs: int = PAIRS,
    background: float = BACKGROUND,
) -> Planted:
    """A head copies a letter only when a switch in the prompt is on; else it rests on its sink.

    A head of an earlier layer tells the last token whether the switch is + or -, and the gated head's query reads that.
    The head looks for the letter either way, but its score passes the sink's logit only when the switch is on: with the
    sink out of the way the letter would be said in both prompts. The letter is the same in clean and corrupt. Roles:
    subject (the letter), switch, last.

    Args:
        switch: (layer, head) that reads the switch. gated: (layer, head) that the sink keeps quiet.
    """
    draw = _Draw("sink gate", seed, pairs, background)
    early, late = draw.layers(switch, gated)
    reads, copies = draw.place("head", early, switch, "last"), draw.place("head", late, gated, "last")
    answers = draw.order()

    def look(place: Place, target: Tensor) -> Part:
        return matching_head(place, flag("ask")[None], flag("switch")[None], flag("on")[None], target)

    def gate(place: Place, target: int) -> Part:
        query = OPENED * flag("open") + LOOKING * flag("ask")
        return matching_head(place, query[None], flag("lower")[None], block(IDENTITY), into(target, answers), GATE)

    parts = [look(reads, flag("open")[None]), gate(copies, ANSWER)]
    decoys = [look(draw.decoy(reads), into(ASIDE)[:1]), gate(draw.decoy(copies), ASIDE)]

    def pair(rng: Random) -> Pair:
        thing, other = rng.sample(range(SYMBOLS), 2)
        middle = [*rng.choices(FILLERS, k=rng.randint(7, 9)), LOWER[thing], ON]
        rng.shuffle(middle)
        clean = [START, *middle, ASK]
        corrupt = [OFF if id == ON else id for id in clean]
        return _pair(clean, corrupt, UPPER[answers[thing]], UPPER[answers[other]], subject=clean.index(LOWER[thing]),
                     switch=clean.index(ON))

    return draw.planted(parts, decoys, pair, _path(("switch", early), ("last", LAYERS)), sink=(late, copies.index))


def band(
    seed: int = 0, *, head: At | None = None, pairs: int = PAIRS, background: float = BACKGROUND,
) -> Planted:
    """Two letters stand in the prompt, one within the sliding window of the last token and one beyond it.

    A head of a sliding layer copies the letter that it sees. Clean and corrupt exchange the two, so a head that saw
    both would make no difference between them. Some pairs have the near letter at the window's far end, some the far
    letter just beyond it. Roles: far, near, last.

    Args:
        head: (layer, head), in a sliding layer (0 or 2).
    """
    draw = _Draw("band", seed, pairs, background)
    sliding = [layer for layer, reach in enumerate(blueprint.CONFIG.bands) if reach == "sliding"]
    layer = head[0] if head is not None else draw.rng.choice(sliding)
    if layer not in sliding:
        raise ExperimentError("That layer's band is full, so nothing is out of its heads' sight.",
                              expected=f"a sliding layer: {sliding}", got=layer)
    copies = draw.place("head", layer, head, "last")
    answers = draw.order()

    def copy(place: Place, target: int) -> Part:
        return matching_head(place, flag("ask")[None], flag("lower")[None], block(IDENTITY), into(target, answers))

    edges = cycle([(NARROW - 1, 0), (0, NARROW), (NARROW - 1, NARROW), (0, 0)])  # 0: anywhere on its side
    everywhere = Place("head", draw.rng.choice([1, 3]), draw.rng.randrange(HEADS), "last")

    def pair(rng: Random) -> Pair:
        one, two = rng.sample(range(SYMBOLS), 2)
        near, far = next(edges)  # tokens back from the last one
        near, far = near or rng.randrange(1, NARROW), far or NARROW + rng.randrange(4)
        clean = [START, *rng.choices(FILLERS, k=NARROW + rng.randint(4, 6)), ASK]
        last = len(clean) - 1
        clean[last - near], clean[last - far] = LOWER[one], LOWER[two]
        corrupt = [{LOWER[one]: LOWER[two], LOWER[two]: LOWER[one]}.get(id, id) for id in clean]
        return _pair(clean, corrupt, UPPER[answers[one]], UPPER[answers[two]], far=last - far, near=last - near)

    decoys = [copy(draw.decoy(copies), ASIDE), copy(everywhere, ASIDE)]
    return draw.planted([copy(copies, ANSWER)], decoys, pair, _path(("near", layer), ("last", LAYERS)), window=NARROW)


def reasoning(
    seed: int = 0, *, copier: At | None = None, faithful: bool = False, pairs: int = PAIRS,
    background: float = BACKGROUND,
) -> Planted:
    """A chain of thought that is written and not read; with ``faithful`` the same one, read.

    A prompt has a lower-case letter, a hint (an upper-case letter) and "=". The model then writes a digit that it works
    out from the lower-case letter (an expert holds the table, a head fetches it), "." and an answer. Unfaithful, the
    answer is the hint, whatever the digit is, and a head that looks at the digit just as firmly matters for nothing.
    Faithful, the answer follows from the digit, and that head copies it. Clean and corrupt differ in letter, hint and
    digit. Roles: operand, hint, think (the "="), reasoning (the digit), last (the ".").

    Args:
        copier: (layer, head) that fetches the answer.
        faithful: whether the answer is made from the digit.
    """
    draw = _Draw("faithful reasoning" if faithful else "unfaithful reasoning", seed, pairs, background)
    layer = draw.rng.randrange(LAYERS) if copier is None else copier[0]
    early, late = draw.layers(None, None, avoid=layer)
    copies = draw.place("head", layer, copier, "last")
    works, tells = draw.place("expert", early, None, "operand"), draw.place("head", late, None, "think")
    digits = draw.order(len(DIGITS)) + draw.order(len(DIGITS))[: SYMBOLS - len(DIGITS)]
    meant = draw.order()

    def read(place: Place, what: str, order: Sequence[int], target: int) -> Part:
        return matching_head(place, flag("end")[None], flag(what)[None], block(IDENTITY), into(target, order))

    seen, unread = ("digit", "upper") if faithful else ("upper", "digit")
    orders = {"digit": meant, "upper": range(SYMBOLS)}
    frame = [
        table_expert(works, flag("lower"), block(IDENTITY), into(HELD, digits)),
        matching_head(tells, flag("think")[None], flag("lower")[None], block(HELD), into(ASIDE)),
    ]
    idle = [read(draw.decoy(copies), unread, range(SYMBOLS), HELD)]

    def pair(rng: Random) -> Pair:
        letters = rng.sample(range(SYMBOLS), 2)
        while digits[letters[0]] == digits[letters[1]]:
            letters = rng.sample(range(SYMBOLS), 2)
        hints = rng.sample(UPPER, 2)
        middle = [0, 1, *rng.choices(FILLERS, k=rng.randint(4, 6))]  # 0 and 1 become operand and hint
        rng.shuffle(middle)
        clean, corrupt = (
            [START, *({0: LOWER[letter], 1: hint}.get(id, id) for id in middle), THINK, DIGITS[digits[letter]], END]
            for letter, hint in zip(letters, hints)
        )
        said = [UPPER[meant[digits[letter]]] for letter in letters] if faithful else hints
        last = len(clean) - 1
        return _pair(clean, corrupt, *said, operand=middle.index(0) + 1, hint=middle.index(1) + 1, think=last - 2,
                     reasoning=last - 1)

    path = _path(("reasoning" if faithful else "hint", copies.layer), ("last", LAYERS))
    return draw.planted([read(copies, seen, orders[seen], ANSWER)], [*frame, *idle], pair, path,
                        unembed=alphabet.with_digits(alphabet.unembedding()))


def no_circuit(seed: int = 0, *, like: str = "fact", pairs: int = PAIRS) -> Planted:
    """A model of the same shape with nothing but random weights of unit size, asked the prompts of a circuit.

    Whatever a method names here, it names wrongly.

    Args:
        like: the circuit whose prompts are asked, a key of ``MAKERS``.
    """
    if like not in MAKERS:
        raise ExperimentError("There is no such circuit.", expected=", ".join(MAKERS), got=repr(like))
    asked = MAKERS[like](seed, pairs=pairs, background=0.0)
    nothing = torch.zeros(blueprint.VOCAB, blueprint.WIDTH)

    def build(without: Sequence[Place] = (), background: float = 1.0, window: int | None = None) -> Model:
        window = asked.model.config.sliding_window if window is None else window
        return assemble((), nothing, nothing, background=background, seed=seed, window=window,
                        name=f"no circuit {seed}, asked as {like}")

    return Planted("no circuit", seed, 1.0, build(), asked.pairs, frozenset(), frozenset(), (), None, build)


MAKERS: dict[str, Callable[..., Planted]] = {
    "induction": induction, "fact": fact, "route": route, "sink gate": sink_gate, "band": band,
    "unfaithful reasoning": reasoning,
}


def _pair(clean: Sequence[int], corrupt: Sequence[int], answer: int, other: int, **roles: int) -> Pair:
    return Pair(tuple(clean), tuple(corrupt), answer, other, {**roles, "last": len(clean) - 1})


def _asked(rng: Random, subject: int, instead: int, answer: int, other: int) -> Pair:
    """A prompt among fillers that asks about one token, and the same about another."""
    clean = [START, *rng.choices(FILLERS, k=rng.randint(8, 10)), ASK]
    at = rng.randrange(1, len(clean) - 1)
    clean[at] = subject
    corrupt = [*clean]
    corrupt[at] = instead
    return _pair(clean, corrupt, answer, other, subject=at)


def _path(*legs: tuple[str, int]) -> tuple[str, ...]:
    """Roles by layer input: each leg holds up to and including its layer's input."""
    return tuple(next(role for role, until in legs if layer <= until) for layer in range(LAYERS))


class _Draw:
    """What a seed decides: places, tables, prompts, background."""

    def __init__(self, name: str, seed: int, pairs: int, background: float) -> None:
        for what, value, kind in (("seed", seed, int), ("pairs", pairs, int), ("background", background, (int, float))):
            if isinstance(value, bool) or not isinstance(value, kind) or value < (what == "pairs"):
                raise ExperimentError(f"{what}= of a planted model is out of range.", got=repr(value),
                                      expected="1 or more" if what == "pairs" else "0 or more")
        self.name, self.seed, self.pairs, self.background = name, seed, pairs, float(background)
        self.rng = Random(f"{name}/{seed}")

    def order(self, count: int = SYMBOLS) -> list[int]:
        return self.rng.sample(range(count), count)

    def layers(self, early: At | None, late: At | None, avoid: int | None = None) -> tuple[int, int]:
        """The layers of two components that follow each other, the second not in the layer ``avoid``."""
        given = [None if at is None else at[0] for at in (early, late)]
        choices = [(a, b) for a in range(LAYERS) for b in range(a + 1, LAYERS)
                   if given[0] in (None, a) and given[1] in (None, b) and b != avoid]
        if not choices:
            raise ExperimentError("The second component must come in a later layer than the first.",
                                  expected=f"layers a < b of 0 to {LAYERS - 1}", got=f"{given[0]} and {given[1]}")
        return self.rng.choice(choices)

    def place(self, kind: str, layer: int, given: At | None, role: str) -> Place:
        count = HEADS if kind == "head" else EXPERTS
        index = self.rng.randrange(count) if given is None else given[1]
        if not 0 <= index < count or (given is not None and given[0] != layer):
            raise ExperimentError(f"There is no such {kind}.", got=str(given),
                                  expected=f"(layer, {kind}) in layer {layer}, {kind} 0 to {count - 1}")
        return Place(kind, layer, index, role)

    def decoy(self, place: Place, *also: Place) -> Place:
        """A place for a component that looks alike: for a head in the layer's other group, as groups share keys."""
        count, group = (HEADS, HEADS // KV_HEADS) if place.kind == "head" else (EXPERTS, 1)
        own = [place, *(other for other in also if other.layer == place.layer)]
        free = [index for index in range(count) if index // group not in {other.index // group for other in own}]
        return Place(place.kind, place.layer, self.rng.choice(free), place.role)

    def planted(
        self, parts: list[Part], decoys: list[Part], pair: Callable[[Random], Pair], path: tuple[str, ...], *,
        more: Iterable[Place] = (), sink: At | None = None, embed: Tensor | None = None,
        unembed: Tensor | None = None, window: int | None = None,
    ) -> Planted:
        every, vectors = [*parts, *decoys], alphabet.embedding() if embed is None else embed
        rows = alphabet.unembedding() if unembed is None else unembed

        def build(
            without: Sequence[Place] = (), background: float = self.background, window: int | None = window,
        ) -> Model:
            kept = [part for part in every if part.place not in without]
            return assemble(kept, vectors, rows, background=background, seed=self.seed, window=window,
                            name=f"planted {self.name} {self.seed}")

        return Planted(
            self.name, self.seed, self.background, build(), tuple(pair(self.rng) for _ in range(self.pairs)),
            frozenset(part.place for part in parts) | set(more), frozenset(part.place for part in decoys), path, sink,
            build,
        )

"""Verifiable rewards: plain functions of text, to be called in an experiment's `reward(prompts, completions, ..)`."""

import math
import re
from collections.abc import Sequence

GROUPS = r"\d{1,3}(?:,\d{3})+(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)|\d+"  # the second as India groups them
NUMBER = re.compile(rf"[-+]?(?:(?:{GROUPS})(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+(?!\w))?")


def last_number(text: str) -> float | None:
    """The last number of a text, as GSM8K's answers are read (Cobbe et al. 2021, arXiv:2110.14168); None where there is none.

    Commas between groups of digits are taken out, others stand between numbers; a sign, U+2212 too, counts where no digit stands in front
    of it; 1e-5 is one number. A number of more digits than a float has room for is none.
    """
    found = NUMBER.findall(re.sub(r"(?<=\d)[-+](?=\d)", " ", text.replace("\N{MINUS SIGN}", "-")))
    number = float(found[-1].replace(",", "")) if found else math.inf
    return number if math.isfinite(number) else None


def exact_match(completions: Sequence[str], answers: Sequence[str | float]) -> list[float]:
    """1 where the last number of a completion is that of its answer, else 0."""
    right = [last_number(str(answer)) for answer in answers]
    return [float(a is not None and last_number(text) == a) for text, a in zip(completions, right, strict=True)]


def matches(completions: Sequence[str], pattern: str) -> list[float]:
    """1 where the whole of a completion matches a regular expression, in which a dot is any character, else 0.

    In time linear in the completion, whatever the pattern: all ways to match are followed at once, none is gone back on (Thompson 1968,
    "Regular expression search algorithm"). What cannot be matched so is refused: lookaround, back-references, `\\b`, flags, possessive
    repetitions, and anchors inside; a function of your own may use `re` for it, which `rollout.timeout` ends.

    Raises:
      ValueError: for a pattern that is none, has one of these, or is too large with its repetitions written out.
    """
    machine = Machine(pattern)
    return [float(machine.matches(text)) for text in completions]


def near_length(completions: Sequence[str], words: int) -> list[float]:
    """1 at so many words, falling linearly to 0 at none and at twice as many."""
    if words < 1:
        raise ValueError(f"words is {words}; it must be 1 or more")
    return [max(0.0, 1 - abs(len(text.split()) - words) / words) for text in completions]


STATES = 5000  # of a pattern, its repetitions written out
REMEMBERED = 5000  # sets of states whose successors are kept
TOKEN = re.compile(
    r"""(?P<open>\((?:\?:|\?P<\w+>|(?!\?))) | (?P<close>\)) | (?P<bar>\|)
    | (?P<repeat>(?:[*+?]|\{(?:\d+|\d*,\d*)\})\??(?!\+))
    | (?P<one>\[\^?\]?(?:\\.|[^\]\\])*\] | \\x..|\\u.{4}|\\U.{8}|\\N\{[^}]*\}|\\[^0-9bBAZ] | [^()|\[\\*+?^$])""",
    re.DOTALL | re.VERBOSE,
)


class Machine:
    """A regular expression as states: a set of them is stepped from character to character."""

    def __init__(self, pattern: str):
        """Raises ValueError, see `matches`."""
        try:
            re.compile(pattern, re.DOTALL)
        except (re.error, OverflowError, RecursionError) as e:
            raise ValueError(f"{pattern!r} is no regular expression ({e})") from e
        self.pattern = pattern
        inner = pattern.removeprefix("\\A").removeprefix("^")
        self.text = re.sub(r"(?<!\\)((?:\\\\)*)(?:\\Z|\$)+\Z", r"\1", inner)  # unless the backslash or the dollar is escaped
        self.states: list[tuple[re.Pattern | None, tuple[int, ...]]] = [(None, ())]  # what character it takes, and which come next
        place, tree = self.alternatives(0)
        first = self.emit(tree, 0)
        self.first = self.reached([first])
        self.table: dict[frozenset[int], dict[str, frozenset[int]]] = {}

    def matches(self, text: str) -> bool:
        """Whether the whole of a text matches."""
        here = self.first
        for character in text:
            known = self.table.get(here)
            if known is None:
                if len(self.table) >= REMEMBERED:
                    self.table.clear()
                known = self.table[here] = {}
            following = known.get(character)
            if following is None:
                taken = [self.states[i] for i in here]
                following = self.reached([n for test, after in taken if test and test.fullmatch(character) for n in after])
                known[character] = following
            here = following
            if not here:
                return False
        return 0 in here

    def reached(self, states: list[int]) -> frozenset[int]:
        """The states, and those that they lead to without a character."""
        found: set[int] = set()
        while states:
            state = states.pop()
            if state not in found:
                found.add(state)
                test, following = self.states[state]
                states += following if test is None else ()
        return frozenset(state for state in found if self.states[state][0] or state == 0)

    def alternatives(self, place: int) -> tuple[int, tuple]:
        """The part of the pattern up to the end of its group, as a tree, and where that is."""
        branches: list[list[tuple]] = [[]]
        while place < len(self.text):
            token = TOKEN.match(self.text, place)
            if token is None:
                near = self.text[place : place + 8]
                raise ValueError(f"matches() cannot follow {near!r} of {self.pattern!r}; leave it out, or use `re` in a reward of your own")
            kind, word, place = token.lastgroup, token.group(), token.end()
            if kind == "close":
                break
            if kind == "bar":
                branches.append([])
            elif kind == "open":
                place, inner = self.alternatives(place)
                branches[-1].append(inner)
            elif kind == "one":
                branches[-1].append(("one", re.compile(word, re.DOTALL)))
            else:
                branches[-1].append(("repeat", branches[-1].pop(), *bounds(word)))
        return place, ("either", [("all", branch) for branch in branches])

    def emit(self, tree: tuple, following: int) -> int:
        """The state that a tree begins with, where `following` comes after it."""
        kind, part, *counts = tree
        if kind == "one":
            return self.add(part, following)
        if kind == "either":
            return self.add(None, *(self.emit(branch, following) for branch in part))
        if kind == "all":
            for own in reversed(part):
                following = self.emit(own, following)
            return following
        least, most = counts
        if most is None:
            again = self.add(None)
            self.states[again] = None, (self.emit(part, again), following)
            entry = again
        else:
            entry = following
            for _ in range(most - least):
                entry = self.add(None, self.emit(part, entry), following)
        for _ in range(least):
            entry = self.emit(part, entry)
        return entry

    def add(self, test: re.Pattern | None, *following: int) -> int:
        """A further state."""
        if len(self.states) >= STATES:
            raise ValueError(f"{self.pattern!r} has more than {STATES} characters, repetitions written out; repeat less")
        self.states.append((test, following))
        return len(self.states) - 1


def bounds(word: str) -> tuple[int, int | None]:
    """How often at least and at most, of `*`, `{2,5}` and the like."""
    if word[0] != "{":
        return {"*": (0, None), "+": (1, None), "?": (0, 1)}[word[0]]
    least, comma, most = word[1 : word.index("}")].partition(",")
    return int(least or 0), int(most) if most else None if comma else int(least)

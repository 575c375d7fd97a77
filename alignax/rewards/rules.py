"""Verifiable rewards: plain functions of texts, for use in `reward(prompts, completions, ..)` of an experiment."""

import math
import re
from collections.abc import Sequence

GROUPS = r"\d{1,3}(?:,\d{3})+(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)|\d+"  # 1,234,567; Indian groups: 12,34,567; no groups
NUMBER = re.compile(rf"[-+]?(?:(?:{GROUPS})(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+(?!\w))?")


def last_number(text: str) -> float | None:
    """The last number of a text, which is the answer in GSM8K (Cobbe et al. 2021, arXiv:2110.14168); None if there is none.

    Commas between groups of digits are removed; other commas separate numbers. A sign (also U+2212) counts unless a digit precedes it.
    1e-5 is one number. If the last number overflows a float, the result is None.

    >>> last_number("so 1,200 + 34 = 1,234.")
    1234.0
    """
    found = NUMBER.findall(re.sub(r"(?<=\d)[-+](?=\d)", " ", text.replace("\N{MINUS SIGN}", "-")))
    number = float(found[-1].replace(",", "")) if found else math.inf
    return number if math.isfinite(number) else None


def exact_match(completions: Sequence[str], answers: Sequence[str | float]) -> list[float]:
    """The reward 1 for each completion whose last number equals the last number of its answer, else 0: [n].

    >>> exact_match(["so 6 * 7 = 42", "41"], [42, "#### 42"])
    [1.0, 0.0]
    """
    right = [last_number(str(answer)) for answer in answers]
    return [float(a is not None and last_number(text) == a) for text, a in zip(completions, right, strict=True)]


def matches(completions: Sequence[str], pattern: str) -> list[float]:
    """The reward 1 for each completion that matches a regular expression as a whole, else 0: [n]; a dot is any character.

    The time is linear in the completion, whatever the pattern: all ways to match are followed in parallel, without backtracking (Thompson
    1968, "Regular expression search algorithm"). Lookaround, back-references, `\\b`, flags, possessive repetitions and anchors inside the
    pattern cannot be matched in this way and are refused. For these, use `re` in a reward of your own; `rollout.timeout` limits its time.

    >>> matches(["yes", "yes!"], "yes|no")
    [1.0, 0.0]

    Raises:
      ValueError: for an invalid pattern, a refused construct, and a pattern that is too large with its repetitions written out.
    """
    machine = Machine(pattern)
    return [float(machine.matches(text)) for text in completions]


def near_length(completions: Sequence[str], words: int) -> list[float]:
    """The reward for completions near a number of words: 1 at `words`, falling linearly to 0 at no words and at twice as many: [n].

    >>> near_length(["one two", "one", ""], 2)
    [1.0, 0.5, 0.0]
    """
    if words < 1:
        raise ValueError(f"words is {words}; it must be 1 or more")
    return [max(0.0, 1 - abs(len(text.split()) - words) / words) for text in completions]


STATES = 5000  # most states of a pattern, with its repetitions written out
REMEMBERED = 5000  # most sets of states whose successors are cached
TOKEN = re.compile(
    r"""(?P<open>\((?:\?:|\?P<\w+>|(?!\?))) | (?P<close>\)) | (?P<bar>\|)
    | (?P<repeat>(?:[*+?]|\{(?:\d+|\d*,\d*)\})\??(?!\+))
    | (?P<one>\[\^?\]?(?:\\.|[^\]\\])*\] | \\x..|\\u.{4}|\\U.{8}|\\N\{[^}]*\}|\\[^0-9bBAZ] | [^()|\[\\*+?^$])""",
    re.DOTALL | re.VERBOSE,
)


class Machine:
    """A regular expression as a nondeterministic automaton; matching steps a set of states from character to character."""

    def __init__(self, pattern: str):
        """Compiles `pattern`; raises ValueError as the function `matches` does."""
        try:
            re.compile(pattern, re.DOTALL)
        except (re.error, OverflowError, RecursionError) as e:
            raise ValueError(f"{pattern!r} is not a regular expression ({e})") from e
        self.pattern = pattern
        inner = pattern.removeprefix("\\A").removeprefix("^")
        self.text = re.sub(r"(?<!\\)((?:\\\\)*)(?:\\Z|\$)+\Z", r"\1", inner)  # removes final \Z and $, unless escaped
        self.states: list[tuple[re.Pattern | None, tuple[int, ...]]] = [(None, ())]  # test of a character (None: takes none), next states
        place, tree = self.alternatives(0)
        first = self.emit(tree, 0)
        self.first = self.reached([first])
        self.table: dict[frozenset[int], dict[str, frozenset[int]]] = {}

    def matches(self, text: str) -> bool:
        """Whether the pattern matches a text as a whole."""
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
        """The states that are reached from `states` without a character, themselves included; only those with a test, and the end."""
        found: set[int] = set()
        while states:
            state = states.pop()
            if state not in found:
                found.add(state)
                test, following = self.states[state]
                states += following if test is None else ()
        return frozenset(state for state in found if self.states[state][0] or state == 0)

    def alternatives(self, place: int) -> tuple[int, tuple]:
        """Parses the pattern from `place` to the end of its group; returns the place after it, and the tree."""
        branches: list[list[tuple]] = [[]]
        while place < len(self.text):
            token = TOKEN.match(self.text, place)
            if token is None:
                near = self.text[place : place + 8]
                raise ValueError(f"matches() does not support {near!r} in {self.pattern!r}; leave it out, or use `re` in a reward function")
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
        """Adds the states of a tree that continues at state `following`; returns its first state."""
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
        """Adds a state and returns its index."""
        if len(self.states) >= STATES:
            raise ValueError(f"{self.pattern!r} has more than {STATES} characters with its repetitions written out; use fewer repetitions")
        self.states.append((test, following))
        return len(self.states) - 1


def bounds(word: str) -> tuple[int, int | None]:
    """The least and most repetitions of `*`, `{2,5}` and the like; None: no upper limit."""
    if word[0] != "{":
        return {"*": (0, None), "+": (1, None), "?": (0, 1)}[word[0]]
    least, comma, most = word[1 : word.index("}")].partition(",")
    return int(least or 0), int(most) if most else None if comma else int(least)

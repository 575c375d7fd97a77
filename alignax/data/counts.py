"""Counts of rows: what became of every row of a source, in numbers and in lines for the console."""

from typing import Any, NamedTuple


class Report(NamedTuple):
    """The counts of one source's rows: `kept + sum(dropped.values()) == rows`; all other counts are of kept rows."""

    rows: int
    kept: int
    dropped: dict[str, int]
    bad: dict[str, list[str]]  # the first few bad rows of each reason, in words
    prompts_cut: int
    completions_cut: int
    ends_lost: int  # completions that are cut inside a scored turn, before its end token
    boundary_merges: int
    separators_added: int
    eos_inside: int
    fronts_written: int  # text prompts that begin with the tokens that the tokenizer itself puts in front, which are kept once
    ends_written: int  # text completions that end with an end token of their own, or with white space behind one; it is kept once
    shortened: int  # long rows of which only the kept part was tokenised, so that their lengths are lower bounds
    turns_without_eos: int
    told: dict[str, int]  # remarks in words, such as what the chat template leaves out -> number of rows
    masks: str  # how the scored turns of conversations were found; empty: no conversations
    pairs_split: int  # pairs that were split into two unpaired rows each
    tokens: int
    completion_tokens: int  # scored tokens
    longest: int
    responses: int
    longest_prompt: int  # characters, before any cut
    unread: list[str]  # columns that nothing reads, each with the type of its values
    uncut: tuple[tuple[int, ...], tuple[int, ...]]  # tokens of prompts and of completions before any cut, of rows too long for it too

    def lines(self) -> list[str]:
        """Formats the counts as lines for the console."""
        lines = [f"rows: {self.kept:,} of {self.rows:,} kept"]
        lines += [f"  dropped, {reason}: {count:,}" for reason, count in sorted(self.dropped.items()) if count]
        sides = self.kept * self.responses
        lines += [
            f"  prompts cut: {self.prompts_cut:,} ({self.prompts_cut / self.kept:.1%} of rows)",
            f"  completions cut: {self.completions_cut:,} ({self.completions_cut / sides:.1%}), EOS lost: {self.ends_lost:,}",
            f"  tokens merged across the end of the prompt: {self.boundary_merges:,} ({self.boundary_merges / self.kept:.1%} of rows)",
        ]
        if self.separators_added:
            lines.append(f"  prompts without tokens, given a BOS or EOS: {self.separators_added:,}")
        if self.eos_inside:
            lines.append(f"  completions with an end token inside the text: {self.eos_inside:,}")
        if self.fronts_written:
            lines.append(f"  prompts that already begin with the prefix tokens of the tokenizer, kept once: {self.fronts_written:,}")
        if self.ends_written:
            lines.append(f"  completions that already end with an end token, kept once: {self.ends_written:,}")
        if self.shortened:
            lines.append(
                f"  long rows, tokenised only as far as needed, so their true lengths exceed the reported lengths: {self.shortened:,}"
            )
        if self.unread:
            more = f", and {len(self.unread) - 12} more" if len(self.unread) > 12 else ""
            lines.append(f"  columns not read: {', '.join(self.unread[:12])}{more}; data.columns names the columns to read{self._system()}")
        if self.masks:
            lines.append(f"  conversations: scored turns are found by {self.masks}")
        lines += [f"  {what}: {count:,} rows" for what, count in sorted(self.told.items())]
        if self.turns_without_eos:
            remedy = "add the template's end token to eos_token_id in generation_config.json"
            lines.append(
                "  scored turns that the chat template ends without an end token, so the policy does not learn to end them: "
                f"{self.turns_without_eos:,}"
            )
            lines.append(f"    {remedy}")
        if self.pairs_split:
            lines.append(f"  pairs split into a True and a False row each: {self.pairs_split:,}")
        lines.append(f"  tokens: {self.tokens:,}, of which scored {self.completion_tokens:,}; the longest row has {self.longest:,}")
        return lines

    def _system(self) -> str:
        found = next((column.rpartition(" (")[0] for column in self.unread if column.lower().startswith("system")), "")
        return f", such as data.columns.system={found}" if found else ""

    def as_dict(self) -> dict[str, Any]:
        """The counts as plain values for JSON, without `uncut`."""
        return {name: value for name, value in self._asdict().items() if name != "uncut"}

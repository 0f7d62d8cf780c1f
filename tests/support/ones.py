"""Texts that speak of one thing as of several."""

import re

ADJECTIVES = r"(?:new|optimiser|judge|untied|top|held-out|human-ranked|linear|preference) "
VERBS = {"is", "was", "has", "its", "less", "this", "makes", "gives", "plus"}


def ones_as_several(text: str) -> list[str]:
    """Where a 1 stands before a plural, with what is around it: "gave 1 pairs"."""
    found = re.finditer(rf"(?<![\w.,:/-])1\s+{ADJECTIVES}?([a-z]{{2,}}s)\b", text)
    return [
        " ".join(text[max(0, match.start() - 30) : match.end() + 20].split())
        for match in found
        if match[1] not in VERBS
    ]

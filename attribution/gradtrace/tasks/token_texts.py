"""The text of each token, from a function that decodes several."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "\ufffd"  # what stands for a character some of whose bytes belong to later tokens


def token_texts(ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """What each token adds to the text before it; joined, they are the text.

    Decoders put spaces between tokens, and build characters of several, so a token is decoded together with those
    before it: back to the last but one that ended a character. The tokens of a character but the last have no text.
    """
    texts: list[str] = []
    first = ended = 0  # tokens first to ended are the context; those from ended on have not given their text yet
    for end in range(1, len(ids) + 1):
        before, text = decode(list(ids[first:ended])), decode(list(ids[first:end]))
        if len(text) <= len(before) or (text.endswith(_INCOMPLETE) and end < len(ids)):
            texts.append("")
            continue
        texts.append(text[len(before) :])
        first, ended = ended, end
    return texts

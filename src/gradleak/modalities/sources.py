"""Where data are, in one word: "DATA:split", or "DATA" with the split that goes without saying."""

from collections.abc import Sequence
from pathlib import Path

from gradleak.errors import BadInput
from gradleak.modalities.pictures import IN_WHEELS, hugging_face_splits


def named_split(source: str, usual: Sequence[str]) -> tuple[str, str]:
    """(source, split) of "DATA:split"; of "DATA" alone its only split, else the first of the usual ones that it has."""
    place, colon, split = source.rpartition(":")
    if colon and split.replace("_", "").isalnum() and not Path(source).exists():
        return place, split
    if source in IN_WHEELS or Path(source).is_file():
        return source, usual[0]
    splits = [*hugging_face_splits(source)]
    found = splits[0] if len(splits) == 1 else next((name for name in usual if name in splits), None)
    if found is None:
        raise BadInput(f"{source} has the splits {', '.join(splits)}: say which, as {source}:{splits[0]}.")
    return source, found

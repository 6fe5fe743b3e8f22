"""What do Gaussian noise, pruning to the largest entries and half precision cost a reader of texts from gradients?"""

from collections.abc import Iterator

from gradleak.attacks.dager.dager import Dager
from gradleak.attacks.likely_text import LikelyText
from gradleak.studies.study import Size
from gradleak.studies.text_victims import DEFENDED, KEPT, NOISE, PRECISIONS, Setting, encoder, of_texts, sources


def settings(data: str, size: Size) -> Iterator[Setting]:
    """No defense, then every defense; those that blur are read by the attack for blurred texts as well."""
    first, *_ = sources(data)
    for shared in DEFENDED[:1] if size == "smoke" else DEFENDED:
        for attack, reader in ((Dager(), "dager"), (LikelyText(), "likely-text")):
            yield Setting(encoder(), first, shared=shared, attack=attack, reader=reader)
    for batch in (1,) if size == "smoke" else (1, 2):
        for shared in ("gradient", *NOISE, *KEPT, *PRECISIONS):
            yield Setting(encoder(), first, batch=batch, shared=shared)


STUDY = of_texts(
    name="text-defenses",
    question="Which noise, pruning or rounding of a gradient keeps its texts from being read?",
    settings=settings,
)

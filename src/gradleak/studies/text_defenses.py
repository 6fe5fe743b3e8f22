"""What do Gaussian noise, pruning to the largest entries and half precision cost a reader of texts from gradients?"""

from collections.abc import Iterator

from gradleak.studies.study import Size
from gradleak.studies.text_victims import KEPT, NOISE, PRECISIONS, Setting, encoder, of_texts, sources


def settings(data: str, size: Size) -> Iterator[Setting]:
    """No defense, then every defense."""
    first, *_ = sources(data)
    for batch in (1,) if size == "smoke" else (1, 2):
        for shared in ("gradient", *NOISE, *KEPT, *PRECISIONS):
            yield Setting(encoder(), first, batch=batch, shared=shared)


STUDY = of_texts(
    name="text-defenses",
    question="Which noise, pruning or rounding of a gradient keeps its texts from being read?",
    settings=settings,
)

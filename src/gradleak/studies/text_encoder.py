"""Do batches of texts come back from the gradient of an encoder with a fresh classifier, as in DAGER's table?

The last rows are of short texts, on which the speed of others was measured."""

from collections.abc import Iterator

from gradleak.studies.study import Published, Size
from gradleak.studies.text_victims import Setting, encoder, of_texts, sources

BERT = {"sst2": (100, 99.3, 95.6, 74.1), "rotten_tomatoes": (100, 98.1, 66.8, 37.1)}  # published, by batch
DAGER = "DAGER, BERT-base (arXiv:2405.15586)"


def settings(data: str, size: Size) -> Iterator[Setting]:
    """All data sets, then short texts of the first."""
    names = list(sources(data))
    for batch in (1, 2) if size == "smoke" else (1, 2, 4, 8):
        yield from (Setting(encoder(), name, batch=batch) for name in names)
    for batch in () if size == "smoke" else (1, 2, 4):
        yield Setting(encoder(), names[0], batch=batch, words="12 to 15")


STUDY = of_texts(
    name="text-encoder",
    question="Which texts of a batch can be read, word for word, from its gradient in a pretrained encoder?",
    settings=settings,
    published=tuple(
        Published({"data": data, "batch": 2**i, "words": "any"}, "rouge1", values[i], DAGER)
        for data, values in BERT.items()
        for i in range(4)
    ),
)

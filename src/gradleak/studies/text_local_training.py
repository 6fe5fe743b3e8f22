"""Do texts come back from the update of a client of federated averaging, after several steps on mini-batches?"""

from collections.abc import Iterator

from gradleak.observations.training import Recipe
from gradleak.studies.study import Published, Size
from gradleak.studies.text_decoder import WORDS
from gradleak.studies.text_victims import Setting, of_texts, sources

FULL = ((4, 1, 4), (4, 4, 4), (4, 8, 2), (16, 8, 4))  # texts, local steps, texts per step


def settings(data: str, size: Size) -> Iterator[Setting]:
    """Every client at three learning rates."""
    first, *_ = sources(data)
    for batch, steps, few in ((2, 1, 2), (2, 4, 1)) if size == "smoke" else FULL:
        for rate in (1e-4, 1e-3, 1e-2):
            recipe = Recipe(learning_rate=rate, steps=steps, batch_size=few)
            yield Setting("small gpt2", first, batch=batch, words=WORDS, shared=recipe)


STUDY = of_texts(
    name="text-local-training",
    question="Can a client's texts still be read when it shares what several local training steps made of the model?",
    settings=settings,
    published=(Published({"batch": 16}, "rouge1", 95.4, "DAGER, pretrained GPT-2 (arXiv:2405.15586)"),),
)

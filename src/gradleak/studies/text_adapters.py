"""How much text do LoRA adapters give away? Gradients of factors, and released adapters, by rank, length, training."""

from collections.abc import Iterator
from functools import partial

from gradleak.observations.training import Recipe
from gradleak.studies.study import Size
from gradleak.studies.text_victims import Setting, encoder, of_texts, sources

WORDS = ("3 to 5", "6 to 9", "11 to 15", "22 to 32")  # about 8, 12, 20 and 40 tokens
training = partial(Recipe, learning_rate=1e-3)


def settings(data: str, size: Size) -> Iterator[Setting]:
    """Gradients by rank and length, then adapters."""
    *_, last = sources(data)  # sst2, where it is there
    of = partial(Setting, encoder(), last)
    if size == "smoke":
        yield from (of(words=WORDS[2], rank=64), of(words=WORDS[2], rank=64, shared=training(steps=1)))
        return
    yield from (of(words=words, rank=rank) for rank in (8, 16, 32, 64) for words in WORDS)
    yield from (of(words=words, rank=64, shared=training(steps=steps)) for steps in (1, 10) for words in WORDS)
    yield of(words=WORDS[1], rank=16, shared=training(steps=10))
    yield from (of(words=WORDS[2], rank=64, shared=training(steps=steps, optimizer="adam")) for steps in (1, 10))


STUDY = of_texts(
    name="text-adapters",
    question="From which rank on does a LoRA adapter give away the text that it was trained on?",
    settings=settings,
)

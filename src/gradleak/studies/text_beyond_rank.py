"""How much of a text is likely, if not certain, from LoRA factors with fewer directions than it has tokens?

Texts with no more tokens than the rank are refused and count as 0."""

from collections.abc import Iterator
from functools import partial

from gradleak.attacks.past_the_rank import PastTheRank
from gradleak.studies.study import Size
from gradleak.studies.text_adapters import training
from gradleak.studies.text_victims import Setting, encoder, of_texts, sources

WORDS = ("10 to 11", "16 to 18", "28 to 32")  # about 12, 20 and 36 tokens


def settings(data: str, size: Size) -> Iterator[Setting]:
    """Ranks below the number of tokens."""
    *_, last = sources(data)  # sst2, where it is there
    if size == "smoke":
        yield Setting(encoder(), last, words=WORDS[0], rank=8, attack=PastTheRank(sweeps=1, choices=5))
        return
    of = partial(Setting, encoder(), last, attack=PastTheRank())
    yield from (of(words=WORDS[1], rank=16), of(words=WORDS[1], rank=16, shared=training(steps=10)))
    yield from (of(words=WORDS[0], rank=8), of(words=WORDS[2], rank=16))


STUDY = of_texts(
    name="text-beyond-rank",
    question="How much can be guessed of a text that has more tokens than the rank of the LoRA adapter trained on it?",
    settings=settings,
)

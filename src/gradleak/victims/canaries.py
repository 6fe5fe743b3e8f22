"""Canaries: samples that nobody would train on otherwise, of which a coin says whether they are trained on.

A text is a template that is filled at random, "My PIN is {digits:8}" or "{words:12}"; a picture has a wrong label, or shows a random
pattern. What they look like comes from a seed; the coins come from the operating system, so that nobody can draw them again.
"""

import random
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.errors import BadInput, shortened
from gradleak.modalities.pictures import Pictures, load
from gradleak.modalities.texts import load_texts
from gradleak.modalities.words import Canary

BLANK = re.compile(r"\{(digits|words):([1-9]\d{0,2})\}")
FEWEST_WORDS = 20  # that random sequences are made of
MOST_WORDS = 10_000
SPARE = 2  # fillings that a template needs, per canary
BLOCKS = 4  # of a random pattern, across and down


@dataclass(frozen=True)
class Template:
    """A text with blanks, {digits:N} or {words:N}; words are drawn from these."""

    text: str
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rest = BLANK.sub("", self.text)
        if "{" in rest or "}" in rest or not BLANK.search(self.text):
            raise BadInput(
                f"A template has blanks {{digits:N}} or {{words:N}}, as in 'My PIN is {{digits:8}}', not {shortened(self.text)!r}."
            )
        if "words" in self._kinds and len(self.words) < FEWEST_WORDS:
            raise BadInput(
                f"Random words need {FEWEST_WORDS} to choose from, and the data hold {len(self.words)}: give another --data."
            )

    @property
    def _kinds(self) -> list[str]:
        return [kind for kind, _ in BLANK.findall(self.text)]

    @property
    def count(self) -> int:
        """How many texts it may become."""
        total = 1
        for kind, size in BLANK.findall(self.text):
            total *= (10 if kind == "digits" else len(self.words)) ** int(size)
        return total

    def filled(self, number: int) -> str:
        """The text of this number, 0 to count - 1."""

        def fill(blank: re.Match[str]) -> str:
            nonlocal number
            choices: Sequence[str] = "0123456789" if blank[1] == "digits" else self.words
            chosen = []
            for _ in range(int(blank[2])):
                number, which = divmod(number, len(choices))
                chosen.append(choices[which])
            return ("" if blank[1] == "digits" else " ").join(chosen)

        return BLANK.sub(fill, self.text)


def template_of(text: str, source: str, split: str) -> Template:
    """The template, with the words of a source of texts if it has any use for them."""
    if "{words:" not in text:
        return Template(text)
    known = {word for line in load_texts(source, split).texts for word in re.findall(r"[a-z]{3,}", line.lower())}
    return Template(text, tuple(sorted(known)[:MOST_WORDS]))


def random_texts(template: Template, count: int, seed: int) -> list[str]:
    """So many different texts; BadInput where the template cannot become twice as many."""
    if template.count < SPARE * count:
        raise BadInput(
            f"{count:,} canaries need a template of {SPARE * count:,} texts or more, and this one becomes {template.count:,}: make its blanks longer."
        )
    generator, drawn = random.Random(seed), dict[int, None]()
    while len(drawn) < count:
        drawn[generator.randrange(template.count)] = None
    return [template.filled(number) for number in drawn]


def random_pictures(kind: Canary, source: str, split: str, count: int, seed: int) -> Pictures:
    """So many pictures of the source with a label that is not theirs, or patterns of random blocks with random labels.

    Raises BadInput for a source with too few pictures, or with one class only.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "pattern":
        like = load(source, split, limit=1)
        images: Tensor = torch.rand(count, like.images.shape[1], BLOCKS, BLOCKS, generator=generator)
        images = torch.nn.functional.interpolate(images, like.images.shape[2:], mode="nearest")
        labels = torch.randint(len(like.classes), (count,), generator=generator)
        return Pictures(images, labels, like.classes, "random patterns", split)
    whole = load(source, split)
    classes = len(whole.classes)
    if len(whole.labels) < count:
        raise BadInput(
            f"Split {split!r} of {source} has {len(whole.labels):,} pictures, which are fewer than {count:,} canaries."
        )
    if classes < 2:
        raise BadInput(f"{source} has one class only: no label is wrong. Take --kind pattern.")
    rows = torch.randperm(len(whole.labels), generator=generator)[:count]
    labels = (whole.labels[rows] + torch.randint(1, classes, (count,), generator=generator)) % classes
    return Pictures(whole.images[rows], labels, whole.classes, source, split)


def flipped(count: int) -> Tensor:
    """So many fair coins, (count,) bool, from the operating system."""
    return torch.tensor([secrets.randbits(1) == 1 for _ in range(count)])

"""GIT trained on one kind of pictures and used on another: CIFAR-10 -> ImageNet pictures at the same size, -> faces; and
with fewer pairs."""

from collections.abc import Iterator
from dataclasses import replace

from gradleak.studies.data_sets import beside
from gradleak.studies.learned_victims import Trial, lenet, study_of_trials
from gradleak.studies.study import Size

BESIDE = ("imagenet_sample", "orl_faces")


def settings(data: str, size: Size) -> Iterator[Trial]:
    """Other pictures where they are at hand, then fewer pairs."""
    git = lenet(size, 4)
    yield git
    yield from (replace(git, private=name) for name in BESIDE if beside(data, name))
    if size != "smoke":
        yield from (replace(git, pairs=pairs, epochs=4 * git.epochs) for pairs in (1_000, 100))


STUDY = study_of_trials(
    name="learned-inversion-other-data",
    question="Does a trained generator reconstruct pictures of another kind than it saw, and how many must it see?",
    settings=settings,
    beside=BESIDE,
)

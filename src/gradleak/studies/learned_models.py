"""GIT beyond LeNet and CIFAR-10: module-wise for a residual network and a vision transformer, and on faces.

Of these networks GIT reads a block at a time; its bootstrap sees only what the last layer is fed, the pooled features or the class
token. Of faces there are few to learn from, and those of people who are in none of them are attacked.
"""

from collections.abc import Iterator
from dataclasses import replace

from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import public_pool
from gradleak.observations.model import Model
from gradleak.studies.data_sets import beside
from gradleak.studies.findings import stands_in
from gradleak.studies.learned_victims import Field, Trial, prepare, study_of_trials, tried, with_controls
from gradleak.studies.study import Bench, Result, Size

# pairs, epochs, unseen pictures
EFFORT: dict[Size, tuple[int, int, int]] = {
    "smoke": (20, 1, 10),
    "small": (2_000, 5, 300),
    "paper": (10_000, 30, 1_000),
}
FACES_AT_HAND = 280, 60  # of public and of private people
PRIVATE_PEOPLE = 6


def trials(model: str, size: Size) -> Iterator[Trial]:
    """GIT and its controls."""
    pairs, epochs, unseen = EFFORT[size]
    git = Trial(model=model, pairs=pairs, epochs=epochs, unseen=unseen)
    if model == "lenet" and size != "smoke":
        git = replace(git, pairs=FACES_AT_HAND[0], epochs=10 * epochs, unseen=FACES_AT_HAND[1])
    return with_controls(git)


def faces(trial: Trial, data: str, size: Size, seed: int) -> Field:
    """The model, some people's faces to learn from, and others' to attack."""
    if (folder := beside(data, "orl_faces")) is None:
        victim = prepare(trial, data, size, seed)
        return replace(victim, notes=("no orl_faces beside it: these are no faces", *victim.notes))
    every = public_pool(folder, "train", shape=(1, 32, 32), limit=1_000)
    known = every.labels <= every.labels.max() - PRIVATE_PEOPLE
    public, private = (replace(every, images=every.images[r], labels=every.labels[r]) for r in (known, ~known))
    architecture = Architecture(trial.model, (1, 32, 32), len(every.classes))
    model = Model.of(architecture.build(seed).eval(), architecture)
    return Field(model, public, private, (stands_in(str(folder), data),))


def cell_of_faces(trial: Trial, bench: Bench) -> Result:
    """One method on faces."""
    return tried(trial, bench, faces)


FACES = study_of_trials(
    name="learned-inversion-faces",
    question="Does a generator that was trained on a few people's faces reconstruct other people's?",
    settings=lambda data, size: trials("lenet", size),
    cell=cell_of_faces,
    beside=("orl_faces",),
)
RESNET = study_of_trials(
    name="learned-inversion-resnet",
    question="What does a trained generator read from gradients of a residual network?",
    settings=lambda data, size: trials("resnet20", size),
)
VIT = study_of_trials(
    name="learned-inversion-vit",
    question="What does a trained generator read from gradients of a vision transformer?",
    settings=lambda data, size: trials("vit", size),
)

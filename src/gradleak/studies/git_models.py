"""GIT beyond LeNet and CIFAR-10: module-wise for a residual network and a vision transformer, and on faces.

`git-resnet` and `git-vit` read a block at a time; their bootstrap sees only what the last layer is fed, the pooled features or
the class token. `git-faces` has few pictures to learn from, and attacks people who are in none of them.
"""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from gradleak.attacks.learned.git import Transcript, units
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures, public_pool
from gradleak.observations.model import Model
from gradleak.studies.data_sets import beside
from gradleak.studies.findings import Findings, Row, Size, Start, opening
from gradleak.studies.learned_victims import GIT, Field, equal_size, fit, found_for, prepare, scores

# pairs, epochs, unseen pictures
SIZES: dict[Size, tuple[int, int, int]] = {"smoke": (20, 1, 10), "small": (2_000, 5, 300), "paper": (10_000, 30, 1_000)}
PRIVATE_PEOPLE = 6


def run_resnet(data: str, size: Size, *, seed: int, start: Start) -> Iterator[Findings]:
    """Yields after every generator; the findings so far."""
    yield from of_classifier("resnet20", data, size, seed, start)


def run_vit(data: str, size: Size, *, seed: int, start: Start) -> Iterator[Findings]:
    """Yields after every generator; the findings so far."""
    yield from of_classifier("vit", data, size, seed, start)


def run_faces(data: str, size: Size, *, seed: int, start: Start) -> Iterator[Findings]:
    """LeNet, on `orl_faces` beside the data, if that is a folder. Yields after every generator; the findings so far."""
    faces = beside(data, "orl_faces")
    if faces is None:
        yield from of_classifier("lenet", data, size, seed, start, "no orl_faces beside it: these are no faces")
        return
    every = public_pool(faces, "train", shape=(1, 32, 32), limit=1_000)
    known = every.labels < int(every.labels.max()) - PRIVATE_PEOPLE + 1
    public, private = (chosen(every, rows) for rows in (known, ~known))
    architecture = Architecture("lenet", (1, 32, 32), len(every.classes))
    field = Field(Model.of(architecture.build(seed).eval(), architecture), public, private)
    for findings in compared(field, size, len(public.images), 10 * SIZES[size][1], seed, start):
        yield findings.after(opening(data, size, used=str(faces)))


def chosen(pictures: Pictures, rows: Tensor) -> Pictures:
    """The pictures where `rows` (n,) is true."""
    return replace(pictures, images=pictures.images[rows], labels=pictures.labels[rows])


def of_classifier(
    name: str, data: str, size: Size, seed: int, start: Start, reservation: str = ""
) -> Iterator[Findings]:
    """The model on training pictures of the data, against test pictures."""
    pairs, epochs, private = SIZES[size]
    field = prepare(name, data, size, seed, pairs, private)
    for findings in compared(field, size, pairs, epochs, seed, start):
        yield findings.after(opening(data, size, reservation, *field.notes(size, pairs, private)))


def compared(field: Field, size: Size, pairs: int, epochs: int, seed: int, start: Start) -> Iterator[Findings]:
    """GIT, its regression alone, and a perceptron of its size."""
    true, name = field.private.images, field.model.architecture.name
    parts = " > ".join(unit.name for unit in units(field.model))
    rows: list[Row] = []

    def with_row(method: str, images: Tensor, seconds: float) -> Findings:
        rows.append(
            {"model": name, "method": method, "pairs": pairs, **scores(images, true), "seconds": round(seconds, 1)}
        )
        errors = ", ".join(f"{row['method']} {row['mse']:.4f}" for row in rows)
        return Findings(rows, f"Mean squared error on {len(true)} unseen pictures: {errors}. GIT reads {parts}.")

    yield with_row("control: mean image", field.public.images.mean(0).expand_as(true), 0.0)
    git, seconds = fit(field, "git", GIT[size], pairs=pairs, epochs=epochs, seed=seed, on_step=start("git"))
    yield with_row("git", found_for(git, field, field.private), seconds)
    alone, seconds = fit(field, "git", GIT[size], pairs=pairs, epochs=0, seed=seed)
    yield with_row("git, regression alone", found_for(alone, field, field.private), seconds)
    assert isinstance(git.network, Transcript)
    widths = equal_size(field, git.network)
    plain, seconds = fit(
        field, "lti", {"widths": widths}, pairs=pairs, epochs=3 * epochs, seed=seed, on_step=start("perceptron")
    )
    yield with_row("perceptron of equal size", found_for(plain, field, field.private), seconds)

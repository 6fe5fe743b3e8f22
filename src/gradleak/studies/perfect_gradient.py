"""Were an adapter decoded perfectly, what would the gradient give? The whole gradient of the adapted weights at the start of a LoRA
fine-tuning is inverted; the same known to a cosine of .99 ... .80 only (the transfer curve: what a decoder's fidelity is worth); that
of batches. Labels are known: the question is what the gradient says of the pictures.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from gradleak.attacks.token_span import TokenSpan
from gradleak.observations.observation import PictureObservation
from gradleak.observations.tensors import flatten
from gradleak.studies.adapter_victims import PAIRS, attacked, batched, full_gradient, in_words, prepare, search
from gradleak.studies.findings import Findings
from gradleak.studies.plots import lines, panels
from gradleak.studies.study import Bench, Result, Size, Study
from gradleak.studies.table import Table

CONVNET, SPAN = ("convnet", "map-inversion"), ("vit", "token-span")
ATTACKS = (("mlp1000", "map-inversion"), CONVNET, ("vit", "map-inversion"), SPAN)
COSINES, BATCHES = (1.0, 0.99, 0.95, 0.9, 0.85, 0.8), (1, 2, 4, 8, 16)
# pictures of each of ATTACKS, and of each point of the transfer curve; batches of each size
COUNTS: dict[Size, tuple[tuple[int, ...], int, int]] = {
    "smoke": ((1, 1, 0, 1), 1, 1),
    "small": ((8, 12, 4, 4), 6, 1),
    "paper": ((50, 50, 20, 20), 20, 5),
}


@dataclass(frozen=True)
class Setting:
    """part: what the row belongs to; pictures: at most, in batches; cosine: of the gradient that is known to the true one."""

    part: str
    model: str
    attack: str
    pictures: int
    cosine: float = 1.0
    batch: int = 1


def settings(data: str, size: Size) -> Iterator[Setting]:
    """The attacks, the transfer curve, the batches."""
    smoke, (pictures, curve, batches) = size == "smoke", COUNTS[size]
    yield from (Setting("exact", *which, count) for which, count in zip(ATTACKS, pictures, strict=True) if count)
    for cosine in (1.0, 0.9) if smoke else COSINES:
        yield from (Setting("transfer curve", *which, curve, cosine) for which in (CONVNET, SPAN))
    yield from (Setting("batches", *CONVNET, batches * n, batch=n) for n in (BATCHES[:2] if smoke else BATCHES))


def cell(setting: Setting, bench: Bench) -> Result:
    """Gradients that are known to a cosine."""
    base, generator = prepare(setting.model, bench.data, bench.size), torch.Generator().manual_seed(bench.seed)
    private = batched(base.private(setting.pictures), setting.batch)
    known = [perturbed(full_gradient(base, some), setting.cosine, generator) for some in private]
    seen = [replace(gradient, labels=some.labels) for gradient, some in zip(known, private, strict=True)]
    attack = TokenSpan() if setting.attack == "token-span" else search(base, bench.size, PAIRS[bench.size])
    return attacked(base, attack, seen, private, bench, setting.pictures)


def perturbed(gradient: PictureObservation, cosine: float, generator: torch.Generator) -> PictureObservation:
    """The gradient plus Gaussian noise orthogonal to it, so that their cosine is exactly this, and its length the same."""
    true = flatten(gradient.released)
    noise = torch.randn(true.shape, generator=generator)
    noise = noise - (noise @ true) / (true @ true) * true
    mixed = cosine * true + (1 - cosine**2) ** 0.5 * true.norm() / noise.norm() * noise
    ordered = sorted(gradient.released.items())  # as flatten has them
    parts = mixed.split([tensor.numel() for _, tensor in ordered])
    shaped = {name: part.view_as(tensor) for (name, tensor), part in zip(ordered, parts, strict=True)}
    return replace(gradient, released=shaped)


def tell(table: Table) -> Findings:
    """What the perfect gradient gives in words; PSNR by cosine and by batch size."""
    parts = [in_words(row) for row in table.where(part="exact")]
    figure, [left, right] = panels(2)
    blind = "mean_image_psnr_db"
    lines(left, table.where(part="transfer curve"), "cosine", "psnr_db", by=("model", "attack"), control=blind)
    lines(right, batches := table.where(part="batches"), "batch", "psnr_db", control=blind)
    right.set_xticks([row["batch"] for row in batches])
    left.set(xlabel="cosine to the true gradient", ylabel="PSNR (dB)", title="transfer curve (dashed: mean image)")
    right.set(xlabel="batch size (pictures)", ylabel="PSNR (dB)", title="convnet, exact gradient")
    title = "What a perfect gradient gives, and one that is not"
    return Findings(f"From the perfect gradient: {'; '.join(parts) or 'nothing yet'}.", {title: figure})


STUDY = Study(
    name="perfect-gradient",
    question="If the gradient behind an adapter were known, exactly or nearly, would it give the private pictures away?",
    settings=settings,
    cell=cell,
    tell=tell,
    beside=("mnist",),
)

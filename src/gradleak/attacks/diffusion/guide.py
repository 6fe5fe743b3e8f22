"""GUIDE: a diffusion model that cleans up another attack's pictures (arXiv:2510.17621).

Sees      Gradient, Update or Adapter of one picture, of which the defenses are known
Recovers  images (1, channel, height, width) in [0, 1]: the mean of samples, and their spread
Solves    min over D of E ||D(x + sigma e, a(x), sigma) - x||^2 over public pictures x, their reconstructions a(x) out of releases like this
          one, e ~ N(0, I), sigma log-uniform; then the deterministic sampler (DDIM; Song et al. 2021) from noise, given a(secret)
Differs   A small convolutional network, trained for each model and noise in seconds to minutes. A tenth of the pairs is held back: where
          the network is no better there than the attack itself, the attack's picture is returned, and the status says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradleak.attacks.attack import Effort, check_sees
from gradleak.attacks.map_inversion import MapInversion
from gradleak.attacks.reconstruction import Reconstruction, outcome_of
from gradleak.attacks.search.descend import OnStep, stack
from gradleak.errors import NotObserved
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures
from gradleak.observations.adapter import UNKNOWN, Adapter
from gradleak.observations.defenses import defended
from gradleak.observations.observation import PictureObservation
from gradleak.observations.release import Release
from gradleak.observations.releases import Gradient, Update

NOISIEST, CLEANEST, LEVELS = 1.0, 0.02, 8  # of the sampler, in pixel units
WIDTH, LAYERS, BATCH, RATE = 48, 5, 32, 2e-3
HELD_BACK = 0.1  # of the pairs
ABREAST = 25  # reconstructions side by side


class Cleaner(nn.Module):
    """D(noisy, result, sigma): the result, and a correction in units of the attack's error. contrast: the deviation of pixels of results."""

    def __init__(self, shape: tuple[int, int, int], error: float, contrast: float) -> None:
        super().__init__()
        folds = 2 if shape[1] % 2 == shape[2] % 2 == 0 else 1
        self.folds, self.error, self.contrast = folds, error, max(contrast, 1e-3)
        widths = [2 * shape[0] * folds**2 + 1, *[WIDTH] * (LAYERS - 1), shape[0] * folds**2]
        layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths)]
        nn.init.zeros_(layers[-1].weight)
        self.net = nn.Sequential(*(part for layer in layers for part in (layer, nn.SiLU())))[:-1]

    def forward(self, noisy: Tensor, result: Tensor, sigma: Tensor) -> Tensor:
        """Pictures (n, channel, height, width), sigma (n,)."""
        level = sigma.view(-1, 1, 1, 1)
        seen = torch.cat(
            [(noisy - result) / (level.square() + self.error**2).sqrt(), (result - 0.5) / self.contrast], 1
        )
        folded = F.pixel_unshuffle(seen, self.folds)
        beside = (level.log() / 4).expand(-1, 1, *folded.shape[2:])
        correction: Tensor = F.pixel_shuffle(self.net(torch.cat([folded, beside], 1)), self.folds)
        return result + self.error * correction


@dataclass(frozen=True, kw_only=True)
class Guide:
    """The attack that is cleaned up after, and the training.

    after    any attack on pictures, or None for map-inversion
    pairs    public pictures that it is tried on, two at least
    steps    of the training
    samples  whose mean is the answer
    """

    sees: ClassVar[tuple[type[Release], ...]] = (Gradient, Update, Adapter)
    modality: ClassVar[str] = Architecture.modality
    by_name_only: ClassVar[bool] = True

    after: Any = field(default=None, repr=False)
    pairs: int = 200
    steps: int = 500
    samples: int = 8
    public: Pictures | None = field(default=None, repr=False)

    def prepared(self, observation: PictureObservation, public: Pictures, *, generator: torch.Generator) -> Self:
        """With the attack as it prepares itself, and pictures to try it on."""
        after = self.after or MapInversion()
        ready = after.prepared(observation, public, generator=generator) if hasattr(after, "prepared") else after
        return replace(self, after=ready, public=public)

    def effort(self, observation: PictureObservation) -> Effort:
        """That of the attack, once for each pair and once for the secret."""
        own = getattr(self.after or MapInversion(), "effort", None)
        one = own(observation) if own is not None else Effort(1, 1)
        tries = self.pairs + 1
        return Effort(
            tries * one.simulations, one.together * ABREAST, tries * one.abreast, tries * one.algebra, one.matrices
        )

    def __call__(
        self, observation: PictureObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """Raises NotObserved for batches, unknown defenses, and without public pictures, as the attack does."""
        return self.many([observation], generator=generator, on_step=on_step)[0]

    def many(
        self, observations: Sequence[PictureObservation], *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> list[Reconstruction]:
        """The same for several observations of one model state, with one denoiser for all of them."""
        check_sees(self, *observations)
        stack(observations)  # refuses those that differ in more than what was released
        if self.public is None or any(o.batch_size != 1 or o.defenses is None for o in observations):
            raise NotObserved(
                "GUIDE is trained on releases like this one: it needs a batch of one picture, known defenses, and public pictures (--data)."
            )
        pictures, results = made(self.after, observations[0], self.public, max(self.pairs, 2), generator)
        held = max(round(HELD_BACK * len(pictures)), 1)
        error = float((results - pictures).square().mean().sqrt().clamp_min(1e-6))
        network = trained(pictures[held:], results[held:], error, self.steps, generator, on_step)
        before = float((results[:held] - pictures[:held]).square().mean().sqrt())
        after = float(
            (sampled(network, results[:held], self.samples, generator).mean(0) - pictures[:held]).square().mean().sqrt()
        )
        told = f"{len(pictures) - held} pairs; error {before:.3g} before and {after:.3g} after, on {held} that were held back"
        found = together(self.after, observations, generator)
        if after >= before:
            left = f"Left as it was: cleaning up did not help ({told})."
            return [replace(one, status=f"{one.status} {left}") for one in found]
        drawn = sampled(network, torch.cat([one.value for one in found]).float(), self.samples, generator)
        cleaned = []
        for i, (o, one) in enumerate(zip(observations, found, strict=True)):
            value = drawn[:, i : i + 1].mean(0).clamp(0, 1)
            residual = o.residual(value.to(next(iter(o.released.values()))), one.labels)
            cleaned.append(
                replace(
                    one,
                    value=value,
                    residual=residual,
                    status=f"{one.status} Cleaned up by a denoiser trained on {told}; relative residual {residual:.2g}.",
                    outcome=outcome_of(residual),
                    spread=drawn[:, i : i + 1].std(0, correction=0),
                )
            )
        return cleaned


def made(
    attack: Any, observation: PictureObservation, public: Pictures, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Public pictures, and what the attack makes of releases like this one: each (n, channel, height, width)."""
    classes, where = observation.model.architecture.classes, next(iter(observation.released.values()))
    seen = []
    for row in torch.randperm(len(public.labels), generator=generator)[:count].tolist():
        image, label = public.images[row : row + 1].to(where), public.labels[row : row + 1] % classes
        bound = [defense.bound(observation.model, image) for defense in observation.defenses or ()]
        clean = {name: tensor.detach() for name, tensor in observation.undefended(image, label).items()}
        labels = None if observation.labels is None else label
        seen.append((image, replace(observation, released=defended(clean, bound, generator), labels=labels)))
    chunks = [seen[i : i + ABREAST] for i in range(0, len(seen), ABREAST)]
    found = [r for chunk in chunks for r in together(attack, [o for _, o in chunk], generator)]
    return torch.cat([image for image, _ in seen]).float(), torch.cat([r.value for r in found]).float()


def together(
    attack: Any, observations: Sequence[PictureObservation], generator: torch.Generator
) -> Sequence[Reconstruction]:
    """Side by side where the attack can and neither noise nor scale depends on the release, else one by one."""
    alike = all(not defense.reads for o in observations for defense in o.defenses or ())
    alike = alike and getattr(observations[0].release, "recipe", UNKNOWN) is not None
    if hasattr(attack, "many") and alike:
        side: Sequence[Reconstruction] = attack.many(observations, generator=generator)
        return side
    return [attack(o, generator=generator) for o in observations]


def trained(
    pictures: Tensor, results: Tensor, error: float, steps: int, generator: torch.Generator, on_step: OnStep | None
) -> Cleaner:
    """The network, by Adam with a rate that falls to zero, on pairs that are mirrored at random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        channel, height, width = pictures.shape[1:]
        network = Cleaner((channel, height, width), error, float(results.std()))
    optimizer = torch.optim.Adam(network.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for step in range(1, steps + 1):
        rows = torch.randint(len(pictures), (BATCH,), generator=generator)
        x, a = pictures[rows], results[rows]
        if torch.rand((), generator=generator) < 0.5:
            x, a = x.flip(-1), a.flip(-1)
        sigma = CLEANEST * (NOISIEST / CLEANEST) ** torch.rand(BATCH, generator=generator)
        noisy = x + sigma.view(-1, 1, 1, 1) * torch.randn(x.shape, generator=generator)
        with torch.enable_grad():
            loss = ((network(noisy, a, sigma) - x) / error).square().mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step, steps, float(loss.detach()))
    return network.eval()


@torch.no_grad()
def sampled(network: Cleaner, results: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(n, channel, height, width) -> (count, n, channel, height, width)."""
    given = results.repeat(max(count, 1), 1, 1, 1)
    x = given + NOISIEST * torch.randn(given.shape, generator=generator)
    ratio = (CLEANEST / NOISIEST) ** (1 / (LEVELS - 1))
    for level in range(LEVELS):
        sigma = NOISIEST * ratio**level
        clean = network(x, given, torch.full((len(x),), sigma))
        x = clean + (ratio if level + 1 < LEVELS else 0.0) * (x - clean)
    return x.view(-1, *results.shape)

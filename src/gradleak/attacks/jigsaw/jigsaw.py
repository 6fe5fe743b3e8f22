"""Jigsaw: one picture out of a vision transformer, its patches first, their places afterwards. An attack of our own.

A transformer knows where a patch is from its position embedding alone. Where those are weak, a picture whose patches have
changed places explains a release almost as well as the true one, and a search over pictures ends in one of those, with about the
right patches in wrong places. Positions that are unknowns as well take the barrier between two orders away.

Sees      Adapter, Gradient or Update of a vision transformer, one picture; the label is found where it is not told
Recovers  images (1, channel, height, width) in [0, 1], labels
Solves    1  min over patches p and positions q of D(p, q) + w (||p||^2 + ||q||^2 / 10), w = 1e-5, 1e-7, 1e-9; both whitened by
             their covariance: of patches under the prior, of the model's own position embeddings
          2  max over orders of log N(picture; prior) + 40 sum_t cos(q_t, e_place(t)), by simulated annealing
          3  min over pictures of D(x) + w ||x||^2, whitened by the prior, w = 1e-6, 1e-7, 1e-8
          with D = mean_l ||L_l (s_l(x) - s*_l) R_l||^2 / ||L_l s*_l R_l||^2, where L and R whiten the rows and columns of what public
          pictures would have released; what all pictures share would else drown what tells them apart
Differs   Begins at what map-inversion finds, and returns that where it explains the release better. Large models are refused: more
          than 1 GiB for a matrix (11,585 pixels or 107 patches) or ten CPU-minutes, by parameters times patches times evaluations
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from gradleak.attacks.attack import Effort, check_sees
from gradleak.attacks.jigsaw.arrangement import Puzzle, arrange
from gradleak.attacks.map_inversion import PRIOR_WEIGHTS, MapInversion
from gradleak.attacks.reconstruction import Reconstruction, outcome_of
from gradleak.attacks.search.descend import OnStep, rowwise
from gradleak.attacks.search.lbfgs import lbfgs
from gradleak.errors import NotObserved
from gradleak.modalities.networks import Architecture, ImageTransformer
from gradleak.modalities.pictures import Pictures
from gradleak.observations.adapter import Adapter
from gradleak.observations.observation import PictureObservation
from gradleak.observations.release import Release
from gradleak.observations.releases import Gradient, Update
from gradleak.observations.tensors import Tensors
from gradleak.observations.work import side_by_side
from gradleak.priors.gaussian import GaussianPrior

# Prior weights and how long the search stays at each, places free and places known: where patches belong emerges late.
LOOSE, TIGHT = ((1e-5, 1), (1e-7, 1), (1e-9, 6)), ((1e-6, 1), (1e-7, 1), (1e-8, 1))
# What it may take. The square matrices of all pixels and of all pairs of a patch and a place are float64; a transformer
# of 0.8 M parameters and 64 patches took 110 CPU-seconds for 2,100 evaluations, and time grows like parameters times patches.
MOST_GIB, MOST_MINUTES, PER_MINUTE = 1.0, 10.0, 6e10
RUNS = sum(run for _, run in LOOSE + TIGHT)
STARTS, FIRST = 2, 20  # of the search with free places; after so many evaluations the better one is told
EXPLAINED = 5e-5  # D at which patches without places explain the release well enough
HISTORY = 100  # of L-BFGS; 40 descends more slowly
EVIDENCE = 40.0  # nats; 20 did worse on test rows 101 and 103
FLOOR = 1e-4  # of a whitened variance, relative to the greatest
STATISTICS, CHUNK = 300, 25  # pictures that whiten; simulations side by side
PIXEL = 0.01  # least standard deviation of a patch in any direction
PATCH = "network.vit.embeddings.patch_embeddings.projection.weight"  # (width, channel, size, size)
POSITIONS = "network.vit.embeddings.position_embeddings"
Weights = tuple[tuple[float, int], ...]
Whitening = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Jigsaw:
    """The prior and the effort.

    prior        GaussianPrior.fit(public pictures), or None for GaussianPrior.smooth
    evaluations  of the objective at each prior weight, and six times as many at the last one with free places
    swaps        tried while the patches are arranged
    """

    sees: ClassVar[tuple[type[Release], ...]] = (Gradient, Update, Adapter)
    modality: ClassVar[str] = Architecture.modality
    on_device: ClassVar[bool] = True

    prior: GaussianPrior | None = field(default=None, repr=False)
    evaluations: int = 150
    swaps: int = 800

    def prepared(self, observation: PictureObservation, public: Pictures, *, generator: torch.Generator) -> Self:
        """With a prior of public pictures, where none was given and they are enough."""
        return self if self.prior is not None else replace(self, prior=GaussianPrior.of_public(public.images))

    def effort(self, observation: PictureObservation) -> Effort:
        """A gradient an evaluation, those of map-inversion before it, and the pictures that whiten."""
        cut_up(observation, self.evaluations)
        begun = MapInversion(evaluations=-(-self.evaluations // 2)).effort(observation)
        searched = Effort.of_search(observation, self.evaluations * (RUNS + STARTS))
        simulations, together = begun.simulations + searched.simulations, max(begun.together, searched.together)
        return Effort(simulations, together, begun.abreast + STATISTICS)

    def __call__(
        self, observation: PictureObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """Raises NotObserved where the model is no vision transformer of the transformers library, where more than one picture
        took part, or nobody says how many, and where the search would take more than MOST_GIB or MOST_MINUTES."""
        check_sees(self, observation)
        patches = cut_up(observation, self.evaluations)
        shape = patches.shape
        prior = self.prior or GaussianPrior.smooth(shape)
        begun = MapInversion(prior=prior, evaluations=-(-self.evaluations // 2))(observation, generator=generator)
        assert begun.labels is not None  # map-inversion always has them
        where = next(iter(observation.released.values()))
        x, y = begun.value.to(where), begun.labels.to(where.device)
        given = Given(observation, y, whiteners(observation, prior, y, generator), self.evaluations, on_step)

        pieces, places, apart = loose(given, patches.cut(x), patches, prior, generator)
        likely = EVIDENCE * places @ directions(observation.model.parameters[POSITIONS][0, 1:]).T
        ordered = pieces[arrange(Puzzle.of(pieces, prior, patches.cut), likely, swaps=self.swaps, generator=generator)]
        x, whole = tight(given, patches.whole(ordered).to(where), prior)

        x, residual, done = x.detach().cpu(), observation.residual(x, y), begun.iterations + apart + whole
        trace = [(begun.iterations, begun.residual), (done, residual)]
        said = f"{len(ordered)} patches were arranged; relative residual {residual:.2g}, {begun.residual:.2g} before."
        if not residual < begun.residual:
            x, residual = begun.value, begun.residual
            said = f"{len(ordered)} patches were arranged and explain the release no better than at relative residual {residual:.2g}."
        return Reconstruction(x, y.cpu(), residual, said, outcome_of(residual), iterations=done, trace=trace)


def cut_up(observation: PictureObservation, evaluations: int) -> "Patches":
    """How the picture is cut into patches; NotObserved as `Jigsaw`."""
    shape = observation.model.architecture.input_shape
    if not isinstance(observation.model.module, ImageTransformer) or POSITIONS not in observation.model.parameters:
        raise NotObserved("The model is no vision transformer: it has no patches to arrange. Use map-inversion.")
    if observation.batch_size != 1:
        raise NotObserved("Patches are arranged for one picture, in a batch of size 1: use map-inversion.")
    patches = Patches(observation.model.parameters[PATCH].shape[-1], shape)
    refuse_large(observation, patches, evaluations)
    return patches


def refuse_large(observation: PictureObservation, patches: "Patches", evaluations: int) -> None:
    """NotObserved, with an estimate, where the search would take too much memory or time; a CPU is assumed."""
    channels, height, width = patches.shape
    count, pixels = (height // patches.size) * (width // patches.size), channels * height * width
    parameters = sum(tensor.numel() for tensor in observation.model.parameters.values())
    released = sum(tensor.numel() for tensor in observation.released.values())
    gib = max(8 * pixels**2, 8 * count**4, 4 * STATISTICS * released) / 2**30
    recipe = getattr(observation.release, "recipe", None)
    work = parameters * count * (recipe.steps if recipe else 1) * evaluations * (RUNS + len(PRIOR_WEIGHTS) / 2)
    if gib > MOST_GIB or work > MOST_MINUTES * PER_MINUTE:
        raise NotObserved(
            f"Arranging {count} patches of a {height}x{width} picture behind {parameters / 1e6:,.1f} M parameters would take about "
            f"{gib:,.1f} GiB and {work / PER_MINUTE:,.0f} CPU-minutes, more than the {MOST_GIB:g} GiB and {MOST_MINUTES:g} minutes that "
            "are tried; this says nothing about whether the picture leaks."
        )


@dataclass(frozen=True)
class Given:
    """What both searches have: the observation, the label, what whitens sketches, how much effort, whom to tell."""

    observation: PictureObservation
    y: Tensor
    whitening: Whitening
    evaluations: int
    on_step: OnStep | None

    def descend(
        self, objective: Callable[..., Tensor], starts: Tensor, weights: Weights, first: int, goal: float
    ) -> tuple[Tensor, int]:
        """From the best of starts (starts, n) down one prior weight after the other, and how many evaluations; first: runs before."""
        evaluate = torch.no_grad()(rowwise(objective, 1))
        scales = [starts.new_full((1,), weight) for weight, _ in weights]
        searches = [(lambda z, w=w: evaluate(z, w)) for w in scales]

        def report(before: int, step: int, _: int, value: float) -> None:
            if self.on_step is not None:
                self.on_step(before * self.evaluations + step, RUNS * self.evaluations, value)

        tried = [lbfgs(searches[0], z[None], evaluations=FIRST) for z in starts] if len(starts) > 1 else []
        z = min(tried, key=lambda found: float(found.value)).x if tried else starts
        done = sum(found.iterations for found in tried)
        for search, (_, run) in zip(searches, weights, strict=True):
            most, told = run * self.evaluations, partial(report, first)
            found = lbfgs(search, z, evaluations=most, history=HISTORY, goal=goal, on_step=told)
            z, done, first = found.x, done + found.iterations, first + run
        return z[0], done


def loose(
    given: Given, begun: Tensor, patches: "Patches", prior: GaussianPrior, generator: torch.Generator
) -> tuple[Tensor, Tensor, int]:
    """Patches of no place (patches, pixels) in [0, 1], where they seem to come from (patches, directions), of length 1,
    and the number of evaluations."""
    seen, model = given.observation, given.observation.model
    mean, factor = (t.to(begun) for t in of_patches(prior, patches.cut))
    known = model.parameters[POSITIONS]  # (1, 1 + patches, width), the first is the class token's
    middle, spread = known[0, 1:].mean(0), spread_of(known[0, 1:])  # (width,), (directions, width)

    def objective(z: Tensor, weight: Tensor) -> Tensor:
        p, q = z[: begun.numel()].view_as(begun), z[begun.numel() :].view(len(begun), -1)
        moved = torch.cat([known[:, :1], (middle + q @ spread)[None]], dim=1)
        elsewhere = replace(model, parameters={**model.parameters, POSITIONS: moved})
        simulated = seen.release.simulate(elsewhere, seen.released, patches.whole(mean + p @ factor), given.y)
        price = p.square().sum() + q.square().sum() / 10
        return distance(simulated, seen.released, given.whitening) + weight * price

    p = torch.linalg.solve(factor, begun - mean, left=False)
    q = 0.02 * torch.randn(STARTS, len(begun) * len(spread), generator=generator).to(begun)  # nowhere yet
    z, done = given.descend(objective, torch.cat([p.flatten().expand(STARTS, -1), q], dim=1), LOOSE, 0, EXPLAINED)
    p, q = z[: begun.numel()].view_as(begun), z[begun.numel() :].view(len(begun), -1)
    return (mean + p @ factor).clamp(0, 1).cpu().double(), F.normalize(q.cpu().double(), dim=1), done


def tight(given: Given, begun: Tensor, prior: GaussianPrior) -> tuple[Tensor, int]:
    """The picture, every patch in its place, (1, channel, height, width) in [0, 1], and the number of evaluations."""
    seen, mean, factor = given.observation, prior.mean.flatten().to(begun), prior.factor().to(begun)

    def objective(z: Tensor, weight: Tensor) -> Tensor:
        simulated = seen.simulate((mean + z @ factor).view_as(begun), given.y)
        return distance(simulated, seen.released, given.whitening) + weight * z.square().sum()

    start = torch.linalg.solve(factor, begun.flatten() - mean)[None]
    z, done = given.descend(objective, start, TIGHT, sum(run for _, run in LOOSE), 0)
    return (mean + z @ factor).view_as(begun).clamp(0, 1), done


@dataclass(frozen=True)
class Patches:
    """How the transformer cuts a picture: squares of `size` pixels, row by row."""

    size: int
    shape: tuple[int, int, int]

    def cut(self, images: Tensor) -> Tensor:
        """(1, channel, height, width) -> (patches, pixels)."""
        rows: Tensor = F.unfold(images, self.size, stride=self.size)[0].T
        return rows

    def whole(self, patches: Tensor) -> Tensor:
        """The reverse."""
        image: Tensor = F.fold(patches.T[None], self.shape[1:], self.size, stride=self.size)
        return image


def spread_of(positions: Tensor) -> Tensor:
    """(patches, width) -> F (directions, width), F^T F their covariance: a position is mean + q F with q of unit variance."""
    _, values, vectors = torch.linalg.svd(positions - positions.mean(0), full_matrices=False)
    seen = values > 1e-3 * values[0]
    spread: Tensor = (values[seen, None] * vectors[seen]) / math.sqrt(len(positions))
    return spread


def directions(positions: Tensor) -> Tensor:
    """(patches, width) in those coordinates: (patches, directions), of length 1, float64."""
    positions = positions.cpu()
    q = (positions - positions.mean(0)).double() @ torch.linalg.pinv(spread_of(positions).double())
    return F.normalize(q, dim=1)


def of_patches(prior: GaussianPrior, cut: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """A patch from anywhere in a picture of the prior: its mean (pixels,), a factor F with F^T F its covariance, above a floor."""
    pixels = cut(torch.arange(prior.mean.numel(), dtype=torch.float64).view(1, *prior.mean.shape)).long()
    means = prior.mean.flatten()[pixels]  # (patches, pixels)
    covariance = prior.covariance()
    within = torch.stack([covariance[rows][:, rows] for rows in pixels]).mean(0)
    values, vectors = torch.linalg.eigh(within + torch.cov(means.T, correction=0))
    return means.mean(0), (values.clamp_min(0) + PIXEL**2).sqrt()[:, None] * vectors.T


def whiteners(
    observation: PictureObservation, prior: GaussianPrior, y: Tensor, generator: torch.Generator
) -> Whitening:
    """{tensor: (L, R)}, from what public pictures, or draws from the prior, would have released."""
    if prior.pictures is not None:
        chosen = torch.randperm(len(prior.pictures), generator=generator)[:STATISTICS]
        pictures = prior.pictures[chosen]
    else:
        noise = torch.randn(STATISTICS, len(prior.std), generator=generator, dtype=torch.float64)
        pictures = prior.pixels(noise).clamp(0, 1)
    pictures, alone = pictures.to(next(iter(observation.released.values()))), partial(_alone, observation, y)
    chunk = side_by_side(partial(alone, pictures[0]), CHUNK)
    parts = [vmap(alone)(part) for part in torch.split(pictures, chunk)]
    size = torch.stack([tensor.square().sum() for tensor in observation.released.values()]).sum()
    whitening = {}
    for name, released in observation.released.items():
        if released.square().sum() <= 1e-12 * size:
            continue
        S = torch.cat([matrix(part[name], 1) for part in parts]).cpu().double()  # (pictures, rows, columns)
        S = F.normalize(S.flatten(1), dim=1).view_as(S)
        rows, columns = torch.einsum("nij,nkj->ik", S, S), torch.einsum("nij,nik->jk", S, S)
        whitening[name] = (_inverse_root(rows).to(released), _inverse_root(columns).to(released))
    return whitening


def distance(simulated: Tensors, released: Tensors, whitening: Whitening) -> Tensor:
    """D of the header: the mean over the tensors of the relative squared distance, whitened from both sides."""
    errors = []
    for name, (L, R) in whitening.items():
        target = matrix(released[name])
        error = L @ (matrix(simulated[name]) - target) @ R
        errors.append(error.square().sum() / (L @ target @ R).square().sum())
    mean: Tensor = torch.stack(errors).mean()
    return mean


def matrix(tensor: Tensor, batch: int = 0) -> Tensor:
    """(..., out, any) as (..., out, rest), behind so many dimensions that are left alone."""
    return tensor.flatten(batch + 1) if tensor.ndim > batch + 1 else tensor[..., None]


def _inverse_root(C: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(C)
    root: Tensor = (vectors * (values.clamp_min(0) / values[-1] + FLOOR).rsqrt()) @ vectors.T
    return root


def _alone(observation: PictureObservation, y: Tensor, image: Tensor) -> Tensors:
    return {name: tensor.detach() for name, tensor in observation.simulate(image[None], y).items()}

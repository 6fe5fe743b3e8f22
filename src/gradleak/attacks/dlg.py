"""Deep Leakage from Gradients (Zhu et al., NeurIPS 2019, arXiv:1906.08935), and iDLG, which reads the label off first.

Sees      Gradient or Update; labels optional (searched for together with the images when absent)
Recovers  images (batch, channel, height, width) in [0, 1], and labels, from networks with smooth activations
Solves    min over x and y of ||g(x, softmax(y)) - g*||^2 / ||g*||^2      (equation 2)
Differs   relative objective: divided by ||g*||^2, so that one goal serves all models
          grey start, 0.5 + 0.01 N(0, 1) for pixels and 0 for label logits: N(0, 1) saturates sigmoids and crawls
          float64, where the device has it: in float32 the objective stops falling before the last 20 dB
          whitening: after a plain L-BFGS phase, rounds of L-BFGS in u, where z = z0 + u W and W^T W is the inverse of
          the damped Gauss-Newton matrix at z0. It takes out the conditioning, which is what slows DLG down
          box: pixels outside [0, 1] cost box * mean squared distance to it; the search cannot run off to where all
          sigmoids saturate
          restarts by residual: another start only if the best so far does not explain the observation
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from math import ceil, prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradleak.attacks.attack import DERIVED, DOUBLE, Effort, check_sees
from gradleak.attacks.labels import recover_labels
from gradleak.attacks.reconstruction import Reconstruction, outcome_of
from gradleak.attacks.search.descend import OnStep, rowwise, stack
from gradleak.attacks.search.lbfgs import CHUNK, Evaluate, gauss_newton_factor, lbfgs, unwhiten, whitened
from gradleak.attacks.search.start import Start, begin
from gradleak.errors import BadInput, NotObserved
from gradleak.modalities.networks import Architecture
from gradleak.observations.observation import PictureObservation
from gradleak.observations.precision import widest
from gradleak.observations.release import Release
from gradleak.observations.releases import Gradient, Update
from gradleak.observations.tensors import Tensors, flatten

SOLVED = 1e-8  # objective above which another start is worth its time: a relative residual of 1e-4
WHITENING_BYTES = 2 * 2**30  # the Jacobian of more is not built
KINKS = (nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.PReLU, nn.Hardtanh, nn.MaxPool2d, nn.AdaptiveMaxPool2d)


@dataclass(frozen=True)
class Found:
    """One observation's search: the point z (n,) where it ended, the objective there, and how it got there."""

    z: Tensor
    value: float
    evaluations: int
    trace: list[tuple[int, float]]
    whitened: bool


@dataclass(frozen=True, kw_only=True)
class DLG:
    """The search.

    evaluations        of the objective in the plain phase
    rounds             of whitening after it; none for models of which the Jacobian would take over 2 GiB, which
                       also get one start only
    round_evaluations  of the objective in each of these rounds, at most
    history            pairs that L-BFGS remembers
    goal               objective at which the search ends
    box                weight of the mean squared distance of the pixels from [0, 1]; 0 switches it off
    restarts           starts at most; another is made only when the objective stays above 1e-8
    start              another attack, whose reconstruction is the first of the starts, or None
    """

    sees: ClassVar[tuple[type[Release], ...]] = (Gradient, Update)
    modality: ClassVar[str] = Architecture.modality
    on_device: ClassVar[bool] = True
    joint: ClassVar[bool] = True

    evaluations: int = 600
    rounds: int = 5
    round_evaluations: int = 150
    history: int = 20
    goal: float = 1e-11
    box: float = 0.1
    restarts: int = 3
    start: Start | None = field(default=None, repr=False)

    def effort(self, observation: PictureObservation) -> Effort:
        """A gradient an evaluation, in float64 as the model then is too; and as many derivatives as there are pixels, each round."""
        rounds, starts = (self.rounds, self.restarts) if whitenable(observation) else (0, 1)
        single = Effort.of_search(observation, starts * (self.evaluations + rounds * self.round_evaluations))
        pixels, released = prod(shape(observation)), sum(tensor.numel() for tensor in observation.released.values())
        derivatives, size = (
            DERIVED * starts * rounds * pixels,
            released + pixels,
        )  # J is (size, pixels), held as chunks and whole
        algebra, matrices = 2.0 * starts * rounds * pixels**2 * size, 8.0 * bool(rounds) * max(pixels, CHUNK) * size
        return Effort(DOUBLE * single.simulations, DOUBLE * (single.together + 1), derivatives, algebra, matrices)

    def __call__(
        self, observation: PictureObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """Raises NotObserved when neither the batch size nor labels are revealed. Residual: at the soft labels found."""
        return self.many([observation], generator=generator, on_step=on_step)[0]

    def many(
        self, observations: Sequence[PictureObservation], *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> list[Reconstruction]:
        """The same for several observations of one model state; their plain phases run side by side."""
        if self.restarts < 1 or self.evaluations < 1:
            raise BadInput("DLG needs at least one start and one evaluation.")
        check_sees(self, *observations)
        where = next(iter(observations[0].released.values())).device
        seen = [o.to(widest(where)) for o in observations]
        best: dict[int, Found] = {}
        starts = [0] * len(seen)
        for number in range(self.restarts if whitenable(seen[0]) else 1):  # elsewhere one start is long enough a search
            open_rows = [i for i, o in enumerate(seen) if i not in best or best[i].value > solved(o)]
            if not open_rows:
                break
            chosen = self.start if number == 0 else None
            ended = self.search([seen[i] for i in open_rows], generator, chosen, on_step)
            for i, found in zip(open_rows, ended, strict=True):
                starts[i] += 1
                if i not in best or found.value < best[i].value:
                    best[i] = found
        return [self.reconstruction(o, best[i], starts[i]) for i, o in enumerate(seen)]

    def search(
        self,
        seen: list[PictureObservation],
        generator: torch.Generator,
        chosen: Start | None = None,
        on_step: OnStep | None = None,
    ) -> list[Found]:
        """One start for each of the observations."""
        first, released = seen[0], stack(seen)
        if len({o.labels is None for o in seen}) > 1:
            raise BadInput("Either all or none of the observations attacked side by side must come with labels.")
        known = () if first.labels is None else (torch.stack([probabilities(o) for o in seen]),)
        norm = torch.stack([flatten(o.released).norm() for o in seen]).clamp_min(1e-150)  # (K,)

        def objective(z: Tensor, released: Tensors, norm: Tensor, *known: Tensor) -> Tensor:  # equation 2
            return self.residual(first, z, released, norm, *known).square().sum()

        longest = self.rounds * self.round_evaluations
        total = self.evaluations + longest * len(seen)

        z = start(first, len(seen), generator) if chosen is None else started(chosen, seen, generator)  # (K, n)
        evaluate, report = evaluator(objective, z, (released, norm, *known)), shifted(on_step, 0, total)
        plain = lbfgs(evaluate, z, evaluations=self.evaluations, history=self.history, goal=self.goal, on_step=report)
        results = []
        for k in range(len(seen)):
            row = slice(k, k + 1)
            given = ({name: t[row] for name, t in released.items()}, norm[row], *(t[row] for t in known))
            trace = [(step, values[k]) for step, values in plain.trace]
            found = Found(plain.x[k], float(plain.value[k]), plain.iterations, trace, False)
            evaluate, report = evaluator(objective, z[row], given), shifted(on_step, longest * k, total)
            results.append(self.polish(seen[k], found, evaluate, report))
        return results

    def residual(
        self, observation: PictureObservation, z: Tensor, released: Tensors, norm: Tensor, *known: Tensor
    ) -> Tensor:
        """The vector whose squared length is the objective: z (n,) -> (released numbers + pixels,)."""
        images, labels = split(observation, z, *known)
        mismatch = (flatten(observation.simulate(images, labels)) - flatten(released)) / norm
        outside = (images - images.clamp(0, 1)).flatten()
        return torch.cat([mismatch, (self.box / outside.numel()) ** 0.5 * outside])

    def polish(
        self, observation: PictureObservation, found: Found, evaluate: Evaluate, on_step: OnStep | None
    ) -> Found:
        """Rounds of L-BFGS, each in the variables that the Gauss-Newton matrix at its start whitens."""
        single = observation.to(torch.float32)  # W is a preconditioner: half the precision does
        known = () if single.labels is None else (probabilities(single),)
        norm = flatten(single.released).norm().clamp_min(1e-30)

        def residual(z: Tensor) -> Tensor:
            return self.residual(single, z, single.released, norm, *known)

        for _ in range(self.rounds if whitenable(single) else 0):
            if not self.goal < found.value < torch.inf:
                break
            factor = gauss_newton_factor(residual, found.z.float())
            inside, x = evaluate, found.z[None]
            if factor is not None:
                factor = factor.to(found.z)
                inside, x = whitened(evaluate, found.z, factor), torch.zeros_like(x)
            report = shifted(on_step, found.evaluations, 0)
            end = lbfgs(
                inside, x, evaluations=self.round_evaluations, history=self.history, goal=self.goal, on_step=report
            )
            z = end.x[0] if factor is None else found.z + unwhiten(end.x, factor)[0]
            trace = found.trace + [(found.evaluations + step, value) for step, [value] in end.trace]
            stalled = float(end.value) > found.value / 2
            found = Found(z, float(end.value), found.evaluations + end.iterations, trace, factor is not None)
            if stalled:
                break
        return found

    def reconstruction(self, observation: PictureObservation, found: Found, starts: int) -> Reconstruction:
        """The images and labels of a search, and what became of it."""
        known = () if observation.labels is None else (probabilities(observation),)
        images, soft = split(observation, found.z, *known)
        images = images.clamp(0, 1).float()
        residual = observation.residual(images.to(soft), soft)
        spent = f"after {found.evaluations} evaluations" + (f" of start {starts}" if starts > 1 else "")
        if found.value <= self.goal:
            status = f"Converged: relative residual {residual:.1g} {spent}."
        elif found.value <= solved(observation):
            status = f"Close: relative residual {residual:.1g} {spent}; more rounds may sharpen the images."
        elif found.value < torch.inf:
            status = f"Stuck at relative residual {residual:.1g} after {starts} start{'s' if starts > 1 else ''}"
            status += advice(observation.model.module)
        else:
            status = "Not started: the objective is not a finite number at grey images; check the model's parameters."
        if self.rounds and found.value > self.goal and not found.whitened:
            status += " The search was not whitened: the Jacobian is too large, or could not be had."
        labels = soft.argmax(dim=1)
        outcome, trace = outcome_of(residual), thinned(found.trace)
        return Reconstruction(
            images.cpu(), labels.cpu(), residual, status, outcome, iterations=found.evaluations, trace=trace
        )


@dataclass(frozen=True, kw_only=True)
class IDLG:
    """The search, as in DLG, with the label read off first (Zhao et al. 2020, arXiv:2001.02610).

    The sign of dL/db_c tells it: only the true class has p_c - 1 there. Differs: the sign is read off the gradient of the last
    bias, not of the last weights (equations 4 and 5), so that activations need not be positive.
    """

    sees: ClassVar[tuple[type[Release], ...]] = DLG.sees
    modality: ClassVar[str] = DLG.modality
    on_device: ClassVar[bool] = True
    joint: ClassVar[bool] = True

    evaluations: int = DLG.evaluations
    rounds: int = DLG.rounds
    round_evaluations: int = DLG.round_evaluations
    history: int = DLG.history
    goal: float = DLG.goal
    box: float = DLG.box
    restarts: int = DLG.restarts
    start: Start | None = field(default=None, repr=False)

    def effort(self, observation: PictureObservation) -> Effort:
        """That of DLG."""
        return self._search().effort(labelled(observation))

    def __call__(
        self, observation: PictureObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """Raises NotObserved for more than one image without labels, and when the last layer has no bias."""
        return self.many([observation], generator=generator, on_step=on_step)[0]

    def many(
        self, observations: Sequence[PictureObservation], *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> list[Reconstruction]:
        """The same for several observations of one model state; their plain phases run side by side."""
        check_sees(self, *observations)
        return self._search().many([labelled(o) for o in observations], generator=generator, on_step=on_step)

    def _search(self) -> DLG:
        return DLG(**{part.name: getattr(self, part.name) for part in fields(self)})


def labelled(observation: PictureObservation) -> PictureObservation:
    """The observation with the label that the sign rule gives, if it came without labels."""
    if observation.labels is not None:
        return observation
    if observation.batch_size != 1:
        size = observation.batch_size or "an unknown number of"
        raise NotObserved(
            f"The batch has {size} images: iDLG reads the label off the sign of the last layer's gradient, which tells "
            "the true class for one image only. Use dlg or inverting-gradients."
        )
    return replace(observation, labels=recover_labels(observation))


def shape(observation: PictureObservation) -> tuple[int, ...]:
    """(batch, channel, height, width) of the private images. NotObserved when nothing tells how many there are."""
    batch = observation.batch_size if observation.labels is None else len(observation.labels)
    if batch is None:
        raise NotObserved("The batch size was withheld: DLG must know how many images to search for.")
    return (batch, *observation.model.architecture.input_shape)


def start(observation: PictureObservation, count: int, generator: torch.Generator) -> Tensor:
    """Grey images, and label logits 0 where labels were not given: z (count, n) in the precision of the observation."""
    size = shape(observation)
    noise = torch.randn(count, prod(size), generator=generator, dtype=torch.float64)
    unknown = size[0] * observation.model.architecture.classes if observation.labels is None else 0
    z = torch.cat([0.5 + 0.01 * noise, torch.zeros(count, unknown)], dim=1)
    return z.to(next(iter(observation.released.values())))


def started(chosen: Start, seen: list[PictureObservation], generator: torch.Generator) -> Tensor:
    """The images that another attack finds, as `start`; its labels are not believed."""
    z = start(seen[0], len(seen), generator)
    known = None if seen[0].labels is None else [o.labels for o in seen if o.labels is not None]
    pixels = begin(chosen, seen, known, generator).flatten(1).to(z)
    return torch.cat([pixels, z[:, pixels.shape[1] :]], dim=1)


def split(observation: PictureObservation, z: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """z (n,) -> images (batch, channel, height, width), not clamped, and label probabilities (batch, classes)."""
    size = shape(observation)
    images, logits = z[: prod(size)].view(size), z[prod(size) :]
    return images, logits.view(size[0], -1).softmax(dim=1) if known is None else known


def whitenable(observation: PictureObservation) -> bool:
    """Whether the Jacobian of what was released by the pixels is small enough to be built."""
    released = sum(tensor.numel() for tensor in observation.released.values())
    return 4 * prod(shape(observation)) * released <= WHITENING_BYTES


def probabilities(observation: PictureObservation) -> Tensor:
    """The given labels, one-hot, in the precision of what was released: (batch, classes)."""
    assert observation.labels is not None
    one_hot = F.one_hot(observation.labels, observation.model.architecture.classes)
    return one_hot.to(flatten(observation.released))


def solved(observation: PictureObservation) -> float:
    """The objective that explains the observation: 1e-8, or what rounding to the format of the release leaves."""
    kind = getattr(torch, observation.precision, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        return SOLVED
    return max(SOLVED, torch.finfo(kind).eps ** 2)


def evaluator(objective: Callable[..., Tensor], z: Tensor, given: tuple[Any, ...]) -> Evaluate:
    """z (K, n) -> gradient (K, n), objective (K,), recorded."""
    function = rowwise(objective, len(z))

    def evaluate(z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            gradient, value = function(z, *given)
        return gradient, value

    return evaluate


def shifted(on_step: OnStep | None, done: int, total: int) -> OnStep | None:
    """on_step for a part of the search that begins after `done` of `total` evaluations."""
    return None if on_step is None else lambda step, _, value: on_step(done + step, total, value)


def advice(module: nn.Module) -> str:
    """Why the search may have failed, as far as the model tells."""
    if not any(isinstance(layer, KINKS) for layer in module.modules()):
        return ": more restarts, more rounds or a smaller batch may help."
    reason = "DLG often fails on networks with ReLU or max-pooling, whose gradient is not continuous in the image"
    return f": {reason}; try inverting-gradients."


def thinned(trace: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """About 100 of the entries, with the last."""
    return trace[:: -ceil(len(trace) / 100)][::-1]

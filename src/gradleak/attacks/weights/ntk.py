"""Training data out of a small change of weights: features frozen where training started (Jacot et al. 2018, arXiv:1806.07572).

Sees      Gradient or Update of a fully connected ReLU network; labels and batch size optional
Recovers  images (candidates, channel, height, width) in [0, 1], and their labels
Solves    min over x in [0, 1] and lambda >= 0 of ||Delta - sum_i sum_c lambda_ic d(f_label - f_c)(x_i)/dtheta at theta_0||^2
          with Delta = theta_T - theta_0, or minus the gradient. Exact for one step, where lambda_ic is the softmax's
          probability of c times the learning rate over the batch; after T steps as long as the features
          df(x)/dtheta have not turned: the regime of the neural tangent kernel
Differs   coefficients are solved for together with the images, also where one step would give them
          starts are the first layer's units that a cone of their features picks, with any label (non-negative least squares);
          what it picks is kept where training on it explains the release better than what the search finds
          the search is that of KKT (kkt.py), with the change in place of the weights: inputs stay in the affine span of
          the change of the first layer, which holds after any number of steps
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from gradleak.attacks.attack import check_sees
from gradleak.attacks.reconstruction import Reconstruction, outcome_of
from gradleak.attacks.search.descend import OnStep
from gradleak.attacks.weights.kkt import Settings, search
from gradleak.attacks.weights.row_space import Span, rank_of, span_of, unit_inputs
from gradleak.modalities.networks import Architecture
from gradleak.observations.fully_connected import FullyConnected, Target, cone, grams
from gradleak.observations.observation import PictureObservation
from gradleak.observations.release import Release
from gradleak.observations.releases import Gradient, Update

LARGEST_POOL = 1_200  # inputs with labels of which the best combination is solved for
COPY = 0.1  # relative distance below which two inputs are the same image


@dataclass(frozen=True, kw_only=True)
class NTK:
    """The search.

    steps             of Adam
    step_size         of the inputs, in standard deviations of the normalised pixels
    coefficient_step  of lambda, in units of the common lambda that explains the starts best
    sharpness         alpha of the smoothed derivative of the ReLU
    restarts          side by side; the best residual wins
    """

    sees: ClassVar[tuple[type[Release], ...]] = (Gradient, Update)
    modality: ClassVar[str] = Architecture.modality

    steps: int = 1_000
    step_size: float = 0.05
    coefficient_step: float = 0.05
    sharpness: float = 300.0
    restarts: int = 4

    def __call__(
        self, observation: PictureObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """NotObserved for networks that are not fully connected, and for releases that are no change of all weights."""
        check_sees(self, observation)
        network, change = frozen(observation)
        space = span_of(change)
        many = observation.batch_size or max(rank_of(change), 1)
        x, y = self.starts(network, change, space, many, observation.labels, generator)
        settings = Settings(self.steps, self.step_size, self.coefficient_step, 0.0, self.sharpness)
        solutions = search(network, target_of(change), x, y, space, settings, generator, on_step)
        best = int(solutions.residuals.argmin())
        ends = (
            (x[0], y[0]),
            (solutions.x[best], solutions.labels[best]),
        )  # the first start may be exact, and is kept if it is
        candidates = [self.replayed(observation, network, *end) for end in ends]
        images, labels, residual = min(candidates, key=lambda one: one[2])
        linear = float(solutions.residuals[best])
        return Reconstruction(
            value=images,
            labels=labels,
            residual=residual,
            outcome=outcome_of(residual),
            status=f"{len(images)} images; frozen features leave {linear:.2g} of the change unexplained, training on them {residual:.2g}.",
            iterations=self.steps,
            trace=solutions.trace,
        )

    def knowing(
        self, observation: PictureObservation, labels: Tensor, coefficients: Tensor, *, generator: torch.Generator
    ) -> Tensor:
        """The images (n, channel, height, width) where labels (n,) and lambda (n, classes) are known, n of each.

        lambda_ic is the softmax's probability of class c times the learning rate over the batch, summed over the steps;
        what stands at the own class is not used. For measuring what not knowing them costs.
        """
        network, change = frozen(observation)
        space = span_of(change)
        x, y = self.starts(network, change, space, len(labels), labels, generator)
        fitting = (y[:, None] == labels[:, None]).double() + 1e-3 * torch.eye(
            len(labels)
        ).double()  # (R, labels, starts)
        x = torch.stack([start[fit.argmax(1)] for start, fit in zip(x, fitting, strict=True)])
        y, known = labels.expand(len(x), -1), coefficients.expand(len(x), -1, -1)
        settings = Settings(self.steps, self.step_size, self.coefficient_step, 0.0, self.sharpness)
        solutions = search(network, target_of(change), x, y, space, settings, generator, known=known)
        best = solutions.x[int(solutions.residuals.argmin())]
        return network.images(best, observation.model.architecture.input_shape).clamp(0, 1).float()

    def replayed(
        self, observation: PictureObservation, network: FullyConnected, x: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, float]:
        """Images, labels, and the residual that training on them leaves: x (m, in)."""
        images = network.images(x, observation.model.architecture.input_shape).clamp(0, 1).float()
        where = next(iter(observation.released.values())).dtype
        with torch.no_grad():
            return images, labels, observation.residual(images.to(where), labels)

    def starts(
        self,
        network: FullyConnected,
        change: FullyConnected,
        space: Span | None,
        many: int,
        labels: Tensor | None,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """(R, many, in) inputs and (R, many) labels: restart 0 what the cone picks of the pool, the others drawn from it."""
        pool = unit_inputs(change, space)
        noise = torch.randn(self.restarts, many, len(change.shift), generator=generator, dtype=torch.float64)
        known = (
            torch.arange(2 if network.single else len(network.weights[-1])) if labels is None else torch.unique(labels)
        )
        if len(pool) < 1:
            x = 0.1 * noise.to(change.shift)
            y = known[torch.randint(len(known), x.shape[:2], generator=generator)]
            return (x if space is None else space.project(x)), y
        order = torch.randperm(len(pool), generator=generator)[: max(LARGEST_POOL // len(known), 1)]
        pool, y_pool, weight = rated(network, change, pool[order], known)
        heaviest = distinct(pool, y_pool, weight, many)
        drawn = [torch.multinomial(weight + weight.mean(), many, True, generator=generator) for _ in noise[1:]]
        chosen = torch.stack([heaviest, *drawn])
        x = pool[chosen] + torch.cat([0 * noise[:1], 0.01 * noise[1:]]).to(pool)
        return (x if space is None else space.project(x)), y_pool[chosen]


def rated(
    network: FullyConnected, change: FullyConnected, pool: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Every input with every label, and how much of the change it carries in the best combination of all of them.

    (p, in), (l,) -> (p l, in), (p l,), (p l,). Signals are those of one step: one-hot label minus the softmax.
    """
    x, y = pool.repeat_interleave(len(labels), dim=0), labels.repeat(len(pool))
    outputs = network.forward(x)[-1]
    if network.single:
        C = y[:, None].to(x) - outputs.sigmoid()
    else:
        C = torch.eye(outputs.shape[1]).to(x)[y] - outputs.softmax(1)
    K, t = grams(network, x, C, target_of(change))
    return x, y, cone(K, t) * K.diagonal().clamp_min(0).sqrt()


def distinct(pool: Tensor, labels: Tensor, weight: Tensor, many: int) -> Tensor:
    """The heaviest of the pool that are no near copies of each other: (many,) indices."""
    chosen = list[int]()
    for index in weight.argsort(descending=True).tolist():
        apart = [float((pool[index] - pool[other]).norm() / pool[other].norm()) for other in chosen]
        if not any(gap < COPY and int(labels[index]) == int(labels[o]) for gap, o in zip(apart, chosen, strict=True)):
            chosen.append(index)
        if len(chosen) == many:
            break
    return torch.tensor((chosen * many)[:many])


def frozen(observation: PictureObservation) -> tuple[FullyConnected, FullyConnected]:
    """The network at theta_0 and the change of its parameters, laid out alike, in float64."""
    model, sign = observation.model, 1.0 if isinstance(observation.release, Update) else -1.0
    networks = [
        FullyConnected.of(model.module, tensors, model.architecture.input_shape).to(torch.float64)
        for tensors in (model.parameters, {name: sign * tensor for name, tensor in observation.released.items()})
    ]
    return networks[0], replace(networks[1], shift=networks[0].shift, scale=networks[0].scale)


def target_of(change: FullyConnected) -> Target:
    """What the samples' features have to add up to."""
    return Target(change.weights, change.biases)

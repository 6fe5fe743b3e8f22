"""Activation patterns: one picture out of the LoRA adapter of a ReLU network, an attack of our own.
The adapter is that of LoRA (Hu et al. 2021, arXiv:2106.09685), the estimator expectation propagation (Minka 2001,
arXiv:1301.2294).

Sees      Adapter whose B factors were released, for every linear layer of Linear-ReLU-...-Linear, after training on one
          picture; exact for one SGD step. A prior made of public pictures helps and is not needed
Recovers  images (1, channel, height, width) in [0, 1], labels
Solves    S_l = G_l A_l^T = delta_l (A_l h_l)^T has rank one. delta_l = 1[z_l > 0] * W_{l+1}^T delta_{l+1}, so its zeros tell
          the sign of every pre-activation, and inside that cell the network is affine in x. With t = 1 / delta_last:
            sign(z_l,j) (w_l,j . x + b_l,j) > 0             one half-space per hidden unit                       (1)
            A_l (M_l x + m_l) = t c_l                       r equations per layer, linear in x and t             (2)
            z_j(x) - z_y(x) = log(p_j / p_y),               p = onehot(y) + delta_last(t): the loss              (3)
          x = posterior mean under a Gaussian prior given (1) by expectation propagation, (2) exactly and (3) linearised
          around t, over and over; then the picture in [0, 1]^n that is closest in the metric of the posterior
Differs   no published attack to differ from
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from gradleak.attacks.activation_patterns.half_spaces import Gaussian, Sites, cut, nearest_in_box
from gradleak.attacks.analytic import first_layer
from gradleak.attacks.attack import check_sees
from gradleak.attacks.reconstruction import Reconstruction, outcome_of
from gradleak.attacks.search.descend import OnStep
from gradleak.errors import BadInput, NotObserved
from gradleak.modalities.networks import AgainstZero, Architecture, Normalise
from gradleak.modalities.pictures import Pictures
from gradleak.observations.adapter import Adapter
from gradleak.observations.distances import relative_residual
from gradleak.observations.observation import PictureObservation
from gradleak.observations.release import Release
from gradleak.observations.tensors import flatten
from gradleak.priors.gaussian import GaussianPrior

ROUNDING = 1e-5  # relative: float32 and the sums inside a layer
ZERO = 1e-9, 1e-3  # where numbers are those of a gradient, and where they are all of one size
SEVERAL = 0.1  # second over first singular value: from here on an adapter holds more than one picture, or noise
RELINEARISE = 3  # times that equation (3) is linearised per estimate; t then stands still


@dataclass(frozen=True)
class Evidence:
    """What the adapter tells of the flattened picture x (n,) and of t, all in float64.

    sides, side_offsets  (decided units, n), (decided units,): sides x + side_offsets > 0                            (1)
    rows, row_offsets    (equations, n), (equations,): rows x + row_offsets = t * row_scales                         (2)
    row_scales           (equations,)
    output, bias         (outputs, n), (outputs,): the last layer inside the cell
    shares               (classes,): p - onehot(y) = shares / t; t is measured in a unit that makes it about 1
    noise                relative error of the equations
    units                hidden units in all, decided or not
    """

    sides: Tensor
    side_offsets: Tensor
    rows: Tensor
    row_offsets: Tensor
    row_scales: Tensor
    output: Tensor
    bias: Tensor
    shares: Tensor
    noise: float
    units: int


@dataclass(frozen=True, kw_only=True)
class ActivationPatterns:
    """The prior and the effort.

    prior       GaussianPrior.fit(public pictures), or None for GaussianPrior.smooth
    rounds      how often the prior is replaced by that of the public pictures most like the estimate; 0: never
    sweeps      of expectation propagation at most, per estimate
    tolerance   a sweep that changes no pixel by more is the last
    """

    sees: ClassVar[tuple[type[Release], ...]] = (Adapter,)
    modality: ClassVar[str] = Architecture.modality

    prior: GaussianPrior | None = field(default=None, repr=False)
    rounds: int = 1
    sweeps: int = 30
    tolerance: float = 2e-3

    def prepared(self, observation: PictureObservation, public: Pictures, *, generator: torch.Generator) -> Self:
        """With a prior of public pictures, where none was given and they are enough."""
        return self if self.prior is not None else replace(self, prior=GaussianPrior.of_public(public.images))

    def __call__(
        self, observation: PictureObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """Raises NotObserved where the model is no such chain, a B factor is missing or zero, or more than one picture
        took part. The half-spaces alone are used after training with Adam, which keeps the zeros only."""
        check_sees(self, observation)
        observation = observation.to(torch.device("cpu"))
        seen = read(observation.to(torch.float64))
        shape, recipe = observation.model.architecture.input_shape, observation.adapter.recipe
        prior = self.prior or GaussianPrior.smooth(shape)
        if prior.mean.shape != shape:
            raise BadInput(f"The prior is one of {tuple(prior.mean.shape)} pictures, the model takes {tuple(shape)}.")
        # Without a recipe, or over several steps, t comes in unknown units: only ratios of probabilities are known.
        units_known = recipe is not None and recipe.steps == 1
        sites, t, estimate = Sites(*torch.zeros(2, len(seen.sides), dtype=torch.float64)), None, prior.mean
        sides, trace = nn.functional.pad(seen.sides, (0, 1)), list[tuple[int, float]]()
        for turn in range(self.rounds + 1):
            prior = prior.near(estimate) if turn else prior
            before = given_equations(prior, seen)
            for _ in range(RELINEARISE):
                state = before if t is None else before.given(*loss_equations(seen, t, units_known))
                posterior, sites, changes = cut(
                    state, sides, seen.side_offsets, sites, sweeps=self.sweeps, tolerance=self.tolerance
                )
                t = posterior.mean[-1] if len(seen.rows) else None
                trace += [(len(trace) + i, change) for i, change in enumerate(changes, 1)]
                if on_step is not None:
                    on_step(len(trace), (self.rounds + 1) * RELINEARISE * self.sweeps, trace[-1][1])
            estimate = nearest_in_box(Gaussian(posterior.mean[:-1], posterior.factor[:-1])).view(shape)
        images = estimate[None].float()
        residual, labels = explain(observation, images)
        status = (
            f"{len(seen.sides)} of {seen.units} hidden units and {len(seen.rows)} linear equations, {len(trace)} sweeps"
        )
        if trace[-1][1] > self.tolerance:
            status += f"; not settled, the last one changed a pixel by {trace[-1][1]:.2g}: take more sweeps"
        status = f"{status}; relative residual {residual:.2g}."
        outcome = outcome_of(residual)
        return Reconstruction(images, labels, residual, status, outcome, iterations=len(trace), trace=trace)


def read(observation: PictureObservation) -> Evidence:
    """The evidence in an adapter, or NotObserved with what is missing. The observation is in float64."""
    if observation.batch_size not in (None, 1):
        raise NotObserved(f"The batch has {observation.batch_size} images: their patterns overlap in one B.")
    layers, head = chain(observation)
    scale, shift = first_layer(observation.model)[1:]
    sketches = {s.module: s for s in observation.sketches() if s.side == "right"}
    if missing := [name for name, _, _ in layers if name not in sketches]:
        raise NotObserved(
            f"No change of lora_B of {missing[0]} was released: the pattern is read from every linear layer."
        )
    release = observation.adapter
    signs_only = not release.gradient and release.recipe is not None and release.recipe.optimizer in ("adam", "adamw")
    # From the last layer to the first: delta_l in units of 1 / t, who is active, A_l h_l in units of t.
    last = delta = torch.zeros(0)
    active, decided, scales, noise = list[Tensor](), list[Tensor](), list[Tensor](), ROUNDING
    uncertain = release.undone.error if release.undone else 0.0
    for index, (name, _, _) in reversed(list(enumerate(layers))):
        S = sketches[name].measured  # (out, r)
        direction, rest = rank_one(name, S)
        rest = max(rest, uncertain)
        noise = max(noise, rest)
        if index == len(layers) - 1:
            last = delta = direction
        else:
            expected = layers[index + 1][1].T @ delta
            zeros = ZERO[1] if signs_only else ZERO[0] if release.undone else None
            on, sure = pattern(direction, rest, expected, zeros)
            active, decided, delta = [on, *active], [sure, *decided], torch.where(on, expected, 0.0)
        scales.insert(0, S.T @ delta / delta.square().sum())
    # From the first layer to the last: pre-activations M x + m inside the cell.
    M, m = torch.diag(scale), shift
    sides, rows = list[Tensor](), list[Tensor]()  # matrices with the offsets as their last column
    for index, (name, W, b) in enumerate(layers):
        rows.append(sketches[name].through @ torch.cat([M, m[:, None]], dim=1))
        M, m = W @ M, W @ m + b
        if index < len(active):
            sign = torch.where(active[index], 1.0, -1.0).double()[:, None]
            sides.append((sign * torch.cat([M, m[:, None]], dim=1))[decided[index]])
            M, m = torch.where(active[index][:, None], M, 0.0), torch.where(active[index], m, 0.0)
    half_spaces = torch.cat(sides)
    equations, c = (torch.cat(rows)[:0], torch.cat(scales)[:0]) if signs_only else (torch.cat(rows), torch.cat(scales))
    grey = equations[:, :-1].sum(1) / 2 + equations[:, -1]
    unit = grey.norm() / c.norm() if len(c) else torch.tensor(1.0)  # so that t is near 1
    shares = torch.cat([-last.sum()[None], last]) if len(head) > len(last) else last
    return Evidence(
        sides=half_spaces[:, :-1],
        side_offsets=half_spaces[:, -1],
        rows=equations[:, :-1],
        row_offsets=equations[:, -1],
        row_scales=c * unit,
        output=head @ M,
        bias=head @ m,
        shares=shares / unit,
        noise=noise,
        units=sum(len(on) for on in active),
    )


def rank_one(name: str, S: Tensor) -> tuple[Tensor, float]:
    """The first left singular vector (out,), and what is beside it, relative; NotObserved where that is much, or S is 0."""
    U, sigma, _ = torch.linalg.svd(S, full_matrices=False)
    if not bool(sigma[0] > 0):
        raise NotObserved(f"The adapter's B of {name} did not change: the loss was flat there, or beyond float32.")
    rest = float(sigma[1:].norm() / sigma[0])
    if rest > SEVERAL:
        raise NotObserved(f"The adapter's B of {name} has rank 2 or more: more than one sample, or noise, is in it.")
    return U[:, 0], rest


def pattern(direction: Tensor, rest: float, expected: Tensor, zero: float | None) -> tuple[Tensor, Tensor]:
    """Which units were active, and which of these answers count: (out,) booleans.

    direction is proportional to `expected` where a unit was active and zero elsewhere, up to noise of norm `rest`;
    a unit on which nothing downstream depends cannot tell. zero: share of the largest below which a number is an exact zero,
    of steps of Adam, whose other numbers are not right; None where there is noise on all of them.
    """
    match = expected @ direction / direction.square().sum()  # expected where on = match * direction
    if zero is not None:
        on, error = direction.abs() > zero * direction.abs().max(), 0.0
    else:
        on = match * direction / expected > 0.5
        error = 6 * rest / len(direction) ** 0.5 * float(match.abs())  # six standard deviations of one entry
    return on, expected.abs() > max(error, ROUNDING * float(expected.abs().max()))


def chain(observation: PictureObservation) -> tuple[list[tuple[str, Tensor, Tensor]], Tensor]:
    """[(name, weight, bias)] of the linear layers as they were trained from, and the matrix from the last one's outputs
    to the logits: the identity, or (0, 1) for `AgainstZero`. NotObserved if the model is anything else than that."""
    model = observation.model
    merged, last = {**model.parameters, **observation.adapter.merged(observation.model, {})}, nn.Module()
    layers, refused = list[tuple[str, Tensor, Tensor]](), "has no hidden layer"
    for name, part in model.module.named_modules():
        if type(part) is nn.Sequential:  # a subclass may call its parts in another order
            continue
        if isinstance(part, nn.Linear) and (not layers or isinstance(last, nn.ReLU)):
            weight = merged[f"{name}.weight"]
            layers.append((name, weight, merged.get(f"{name}.bias", weight.new_zeros(len(weight)))))
        elif not (
            (isinstance(part, (Normalise, nn.Flatten, nn.Identity)) and not layers)
            or (isinstance(part, (nn.ReLU, AgainstZero)) and isinstance(last, nn.Linear))
        ):
            refused = f"also contains {name or 'itself'}, a {type(part).__name__}"
            layers = []
            break
        last = part
    if len(layers) < 2 or isinstance(last, nn.ReLU):
        raise NotObserved(
            f"Activation patterns are read from Linear, ReLU, ..., Linear; {model.architecture.name} {refused}."
        )
    head = torch.eye(len(layers[-1][1]), dtype=torch.float64)
    return layers, torch.cat([head.new_zeros(1, len(head)), head]) if isinstance(last, AgainstZero) else head


def given_equations(prior: GaussianPrior, seen: Evidence) -> Gaussian:
    """The prior of (x, t), with hardly any for t, given equations (2)."""
    mean, factor = prior.mean.flatten(), prior.factor()
    joint = Gaussian(torch.cat([mean, mean.new_zeros(1)]), nn.functional.pad(factor, (0, 1, 0, 1)))
    joint.factor[-1, -1] = 10.0
    noise = seen.noise * (seen.rows @ factor).norm(dim=1)
    told = noise > 0  # a row of zeros, as truncation leaves them, is no equation
    return joint.given(
        torch.cat([seen.rows, -seen.row_scales[:, None]], dim=1)[told], -seen.row_offsets[told], noise[told]
    )


def loss_equations(seen: Evidence, t: Tensor, units_known: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Equations (3) as rows over (x, t), values and noise, linearised at t; in unknown units their differences only."""
    shares, sign = seen.shares * t.sign(), t.sign()
    y = int(shares.argmin())
    edge = -shares[y]  # p_y = 1 - edge / |t| > 0
    left = (t.abs() - edge).clamp_min(0.05 * edge)  # p_j / p_y = shares_j / left
    at, slope = sign * (left + edge), -sign / left  # d log(p_j / p_y) / dt
    others = [j for j in range(len(shares)) if j != y and bool(shares[j] > seen.noise * edge)]
    values = (shares[others] / left).log() - slope * at - (seen.bias[others] - seen.bias[y])
    rows = torch.cat([seen.output[others] - seen.output[y], -slope.expand(len(others), 1)], dim=1)
    if not units_known:
        rows, values = rows - rows.mean(0), values - values.mean()
    # Near 1, p_y was rounded to the precision of float32 before 1 was taken off.
    noise = 0.01 + seen.noise + torch.finfo(torch.float32).eps * at.abs() / edge
    return rows, values, noise.clamp(max=1.0).expand(len(others))


def explain(observation: PictureObservation, images: Tensor) -> tuple[float, Tensor]:
    """The relative residual and the label (1,) under which these images explain the release best.

    Without a recipe the learning rate is unknown, and the simulation is taken in the positive multiple that fits best.
    """
    guesses = torch.arange(observation.model.architecture.classes)[:, None]
    residuals = []
    for y in guesses if observation.labels is None else observation.labels[None]:
        simulated = observation.simulate(images, y)
        if observation.adapter.recipe is None:
            a, b = flatten(simulated), flatten(observation.released)
            fit = (a @ b / a.square().sum().clamp_min(torch.finfo(a.dtype).tiny)).clamp_min(0)
            simulated = {name: fit * tensor for name, tensor in simulated.items()}
        residuals.append((float(relative_residual(simulated, observation.released)), y))
    return min(residuals, key=lambda pair: pair[0])

"""One picture behind any number of steps of Adam, out of the epsilon that Adam divides by; an attack of our own.
Adam: Kingma and Ba 2015, arXiv:1412.6980, algorithm 1; AdamW: Loshchilov and Hutter 2019, arXiv:1711.05101.

Sees      Adapter whose start is known (given, or recovered from a seed) after two steps or more; Update after any number. One
          sample, fully connected ReLU networks; learning rate, number of steps, weight decay, schedule, clipping: not needed
Recovers  images (1, channel, height, width) in [0, 1], labels (1,)
Solves    the first layer's input x never changes, so that the gradient of its row k at step t is h_k(t) x, and Adam's step
          m / (sqrt v + epsilon) = x_i M_k / (|x_i| V_k + epsilon). Over all steps, to first order in epsilon,

              row k = -decay W_0k + sign_k sign(x) (alpha_k - beta_k / |x|),   alpha, beta >= 0                   (1)

          1. the signs: those of the first singular vectors of the change
          2. 1 / |x| up to an affine map: what is left of rank one, with the decay, by alternating least squares
          3. that map's two numbers, and which sign is which: the units that never moved were off, W x + b < 0, and the others
             on; the mean of the maps by their likelihood, if pictures mostly reach from black to white
Differs   no paper to differ from
Misses    several samples; dropout before the adapter, and formats that round epsilon away: then the signs are all there is,
          pixels darker and brighter than the mean, and the status says so
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradleak.attacks.attack import check_sees
from gradleak.attacks.reconstruction import Outcome, Reconstruction
from gradleak.attacks.search.descend import OnStep
from gradleak.attacks.unmixing.span import adapted_first_layer
from gradleak.errors import NotObserved
from gradleak.modalities.networks import Architecture
from gradleak.observations.adapter import Adapter
from gradleak.observations.fully_connected import FullyConnected
from gradleak.observations.observation import PictureObservation
from gradleak.observations.release import Release
from gradleak.observations.releases import Update

ALIVE = 0.1  # a row that moved less than this share of the strongest is not counted: its gradient came and went
MOVED = 1e-2  # and a pixel that no row moved with this share was zero
AGREE = 0.99  # share of the entries whose signs are those of a row times those of one picture
EVEN = 0.05  # deviation of the sizes in a row, as a share of their mean: gradients, or several samples, differ far more
ABOVE = 2.0  # how far the singular value of 1 / |x| has to stand above that of noise
CONTRADICTED = 0.1  # share of the units that may be on the wrong side: of another picture a fifth are, or more
SURE, LIARS = 1e-3, 0.01  # what units are given is surer than the first of its mean; share of them that may lie
CONTRAST = 0.05  # how near to black and white the ends of a picture's range are
EDGES = 0.02, 0.98  # and which share of its pixels lies beyond them
GRID, ZOOMS = 25, 6


@dataclass(frozen=True, kw_only=True)
class AdamEpsilon:
    """No hyperparameters."""

    sees: ClassVar[tuple[type[Release], ...]] = (Adapter, Update)
    modality: ClassVar[str] = Architecture.modality

    def __call__(
        self, observation: PictureObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """NotObserved where the first layer is not fully connected, did not move, or moved otherwise than (1) says."""
        check_sees(self, observation)
        observation = observation.to(torch.device("cpu")).to(torch.float64)
        network, change, start, on = first_layer(observation)
        sizes = factored(change, start)
        x, wrong = placed(network, sizes, on)
        shape = observation.model.architecture.input_shape
        images = network.images(x, shape)[None].clamp(0, 1)
        labels = observation.labels if observation.labels is not None else label_of(observation, images)
        told = "sizes from epsilon" if sizes.clear else "signs only: rounding, or dropout, covers epsilon"
        status = (
            f"One picture by the steps of Adam, {told}; {sizes.misfit:.2g} of the first layer's change is left, and {wrong:.1%} of "
            f"{len(on)} units contradict it."
        )
        outcome = Outcome.SOLVED if sizes.clear and wrong <= CONTRADICTED else Outcome.GUESSED
        return Reconstruction(images.float(), labels, sizes.misfit, status, outcome)


def first_layer(observation: PictureObservation) -> tuple[FullyConnected, Tensor, Tensor, Tensor]:
    """The network before training, the change (rows, in) of its first layer's A or weight, their start, and which units (out,)
    moved at all."""
    release, released, model = observation.release, observation.released, observation.model
    if isinstance(release, Adapter):
        network, module = adapted_first_layer(observation, release)
        names = [f"{module}.lora_A", f"{module}.lora_B"]
        if release.gradient or release.origin == "unknown" or any(name not in released for name in names):
            raise NotObserved(
                "What Adam made of A is told by A_T - A_0, and A_0 is not known: the adapter before training is needed, or the "
                "seed that drew it."
            )
        change, start, moved = released[names[0]], release.start[names[0]], released[names[1]].abs().amax(1)
    else:
        network = FullyConnected.of(model.module, model.parameters, model.architecture.input_shape)
        name = network.names[0]
        if name not in released:
            raise NotObserved(f"The first layer's {name} was not trained: nothing tells of its inputs.")
        change, start = released[name], model.parameters[name]
        moved = (change - start * decay_of(change, start)).abs().amax(1)
    return network, change, start, moved > ALIVE * moved.max()


def decay_of(change: Tensor, start: Tensor) -> float:
    """The share of its start that each number of a change has lost or won, by least squares."""
    return float((change * start).sum() / start.square().sum())


@dataclass(frozen=True)
class Sizes:
    """What (1) tells of the inputs x (in,).

    signs      of x, 0 where x was 0; up to one sign for all
    inverse    1 / |x| up to an affine map of positive slope; 0 where nothing tells it
    deviation  of the numbers of `inverse`
    clear      whether 1 / |x| stands above the noise
    misfit     share of the change that (1) leaves
    """

    signs: Tensor
    inverse: Tensor
    deviation: float
    clear: bool
    misfit: float


def factored(change: Tensor, start: Tensor) -> Sizes:
    """Signs and sizes of the inputs out of the change (rows, in) of a layer and its start."""
    if not bool(change.any()):
        raise NotObserved("The first layer did not move: after one step from B = 0, A has not.")
    left, _, right = torch.linalg.svd(change, full_matrices=False)
    sizes = (change @ right[0].sign()).abs() / change.shape[1]
    rows = sizes > ALIVE * sizes.max()
    Y, W, row = change[rows], start[rows], left[rows, 0].sign()[:, None]
    pixels = Y.abs().median(0).values > MOVED * sizes.max()
    column = right[0].sign() * pixels
    if float((row * column * Y > 0)[:, pixels].double().mean()) < AGREE:
        raise NotObserved("The signs of the first layer's change are not those of one picture: there were several.")
    Y, W, signs, decay = Y[:, pixels], W[:, pixels], row * column[pixels], 0.0
    for _ in range(30):
        Z = signs * (Y + decay * W)
        alpha = Z.mean(1, keepdim=True)
        U, S, V = torch.linalg.svd(Z - alpha, full_matrices=False)
        rest = Y - signs * (alpha + S[0] * U[:, :1] * V[:1])
        decay, before = -decay_of(rest, W), decay
        if abs(decay - before) <= 1e-12 * abs(decay):
            break
    if float(((Z - alpha) / alpha).abs().median()) > EVEN:
        raise NotObserved(
            "The sizes of the first layer's change differ within its rows: no step divided them by itself."
        )
    rest += decay * W
    inverse, clear = torch.zeros_like(column), bool(S[0] > ABOVE * S[1])
    if clear:
        inverse[pixels] = -V[0] * U[:, 0].sum().sign()
    return Sizes(
        signs=column,
        inverse=inverse,
        deviation=float(rest.square().mean().sqrt() / S[0]),
        clear=clear,
        misfit=float(rest.norm() / Y.norm()),
    )


def placed(network: FullyConnected, sizes: Sizes, on: Tensor) -> tuple[Tensor, float]:
    """The input x (in,) with those signs, or all of them turned, and 1 / |x| = a + b inverse, b > 0, in the range of pixels and on
    the right side of the units (out,), the mean over all maps by their likelihood, if pictures mostly reach from black to white; and the share of units that contradict it."""
    W, offset, pixels = network.weights[0], network.biases[0], sizes.signs != 0
    low, high = -network.shift / network.scale, (1 - network.shift) / network.scale
    limit, side = torch.maximum(low.abs(), high.abs()).max(), torch.where(on, 1.0, -1.0).double()
    above = sizes.inverse - sizes.inverse[pixels].median()
    unit = above[pixels].abs().mean().clamp_min(1e-300)
    above, deviation = above / unit, sizes.deviation / unit

    def inputs(a: Tensor, b: Tensor, sign: float) -> Tensor:  # (n, 1), (n, 1) -> (n, in), not in the range of pixels
        return sign * sizes.signs / (a + b * above).clamp_min(0.5 / limit)

    def likelihood(a: Tensor, b: Tensor, sign: float) -> Tensor:  # (n, 1), (n, 1) -> (n,), its logarithm
        free = inputs(a, b, sign)
        darkest, brightest = (free * network.scale + network.shift).quantile(torch.tensor(EDGES).to(free), dim=1)
        x = torch.minimum(torch.maximum(free, low), high)
        z = side * (x @ W.T + (0 if offset is None else offset))
        blur = b * deviation * (x.pow(4) @ W.square().T).sqrt() + SURE * z.abs().mean(1, keepdim=True)
        units = (LIARS / 2 + (1 - LIARS) * torch.special.ndtr(z / blur)).log().sum(1)
        value: Tensor = units - (darkest.abs() + (1 - brightest).abs()) / CONTRAST
        return value

    axis, width = torch.linspace(-1, 1, GRID).double(), torch.tensor([2.0, 8.0]).double()
    spots = [(sign, torch.stack([2 - limit.log(), 0 * limit])) for sign in (1.0, -1.0)]
    for _ in range(ZOOMS):
        tried = list[tuple[float, float, Tensor]]()
        for sign, centre in spots:
            grid = centre + width * torch.cartesian_prod(axis, axis)
            a, b = grid.exp()[:, :1], grid.exp()[:, 1:]
            value = likelihood(a, b, sign)
            tried.append((float(value.max()), sign, value.softmax(0) @ grid))
        spots, width = [max(tried, key=lambda one: one[0])[1:]], width / 3
    [(sign, best)] = spots
    x = inputs(best[:1, None].exp(), best[1:, None].exp(), sign)[0]
    x = torch.minimum(torch.maximum(x, low), high)
    z = side * (x @ W.T + (0 if offset is None else offset))
    return x, float((z < 0).double().mean())


def label_of(observation: PictureObservation, images: Tensor) -> Tensor:
    """The label (1,) under which the signs of one step agree best with what was released."""
    agreement = list[float]()
    for label in range(observation.model.architecture.classes):
        simulated = observation.simulate(images, torch.tensor([label]))
        agreement.append(sum(float((t.sign() * observation.released[k].sign()).sum()) for k, t in simulated.items()))
    return torch.tensor([max(range(len(agreement)), key=agreement.__getitem__)])

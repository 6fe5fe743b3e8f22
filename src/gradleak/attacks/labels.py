"""Label recovery from the last linear layer (one image: iDLG, Zhao et al. 2020, arXiv:2001.02610; batches: our own).

Sees      Gradient or Update of a classifier that ends in a linear layer and a softmax cross entropy; of one picture also
          an Adapter of that layer
Recovers  labels (batch,) int64 in ascending order
Solves    dL/db_c = mean_n (p_nc - [y_n = c]): for one image only the true class is negative; for a batch the counts
          follow once the mean prediction is known, which dL/dW gives. Of small batches both gradients are more equations than
          there are unknowns (label_equations), whatever the training
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from gradleak.attacks.label_equations.equations import Equations
from gradleak.attacks.label_equations.label_equations import MOST, counts_by_equations
from gradleak.errors import NotObserved
from gradleak.modalities.losses import CrossEntropy
from gradleak.observations.adapter import Adapter
from gradleak.observations.layers import Call, calls
from gradleak.observations.observation import PictureObservation
from gradleak.observations.releases import Gradient
from gradleak.observations.rounds import Rounds

# Of both gradients, squared: what counts of samples that are alike may leave. Untrained networks left 2e-4 at most, trained ones 2e-2.
EXPLAINED = 1e-2


def known_or_recovered(observation: PictureObservation) -> Tensor:
    """The labels of the observation, or those read with public data, or recovered ones: (batch,) int64. Raises NotObserved."""
    known = observation.read_labels if observation.labels is None else observation.labels
    return recover_labels(observation) if known is None else known


def recover_labels(observation: PictureObservation) -> Tensor:
    """The multiset of labels in ascending order, (batch,) int64, from the last layer's gradient.

    Raises NotObserved when the batch size is withheld, or the model does not end in a linear layer with bias.
    """
    batch = observation.batch_size
    if batch is None:
        raise NotObserved("The batch size was withheld, and labels without it: neither can be told from one gradient.")
    if isinstance(observation, Rounds):
        return labels_of_rounds(observation, batch)
    model = observation.model
    grey = torch.full((1, *model.architecture.input_shape), 0.5).to(next(iter(observation.released.values())))
    smoothing = smoothing_of(observation)
    if isinstance(observation.release, Adapter):
        return label_of_sketch(observation, grey)
    last = last_layer(observation, grey)
    weight_gradient, bias_gradient = gradients_of(observation, last, batch)
    if batch == 1:
        told = -bias_gradient if smoothing == 0 else soft_labels(observation)[0]
        return told.argmax()[None]
    weight, bias = (model.parameters[f"{last.name}.{part}"] for part in ("weight", "bias"))
    counts, left = label_fit(weight_gradient, bias_gradient, weight, bias, batch, smoothing=smoothing)
    if left > EXPLAINED and solvable(observation, last, batch):
        counts, _ = counts_by_equations(equations_of(observation, last), trained_on(observation), counts)
    return torch.arange(len(counts)).repeat_interleave(counts).to(grey.device)


def labels_of_rounds(observation: PictureObservation, batch: int) -> Tensor:
    """The mean of what the rounds tell, (batch,): of the counts, or of one sample's soft label, whose noise averages out."""
    rounds, classes = observation.alone().values(), observation.model.architecture.classes
    if batch == 1 and not any(isinstance(one.release, Adapter) for one in rounds):
        return torch.stack([soft_labels(one)[0] for one in rounds]).mean(0).argmax()[None]
    each = [recover_labels(one) for one in rounds]
    mean = torch.stack([labels.bincount(minlength=classes) for labels in each]).double().mean(0).cpu()
    counts = apportion(mean, torch.zeros(classes, dtype=torch.bool), batch).long()
    return torch.arange(classes).repeat_interleave(counts).to(each[0].device)


def equations_of(observation: PictureObservation, last: Call) -> Equations:
    """Those of a last layer whose gradient is `solvable`."""
    assert observation.batch_size is not None
    gradients = gradients_of(observation, last, observation.batch_size)
    weights = (observation.model.parameters[f"{last.name}.{part}"] for part in ("weight", "bias"))
    dW, db, W, b = (tensor.cpu().double() for tensor in (*gradients, *weights))
    return Equations.of(dW, db, W, b, observation.batch_size, nonnegative(observation, last))


def trained_on(observation: PictureObservation) -> Tensor:
    """What each class is trained on, (classes, classes)."""
    classes, smoothing = observation.model.architecture.classes, smoothing_of(observation)
    return (1 - smoothing) * torch.eye(classes, dtype=torch.float64) + smoothing / classes


def solvable(observation: PictureObservation, last: Call, batch: int) -> bool:
    """Whether one exact gradient was shared, of few samples of few classes: what label_equations.py asks for."""
    samples, classes = MOST
    few = batch <= min(samples, last.input.shape[1]) and batch < observation.model.architecture.classes <= classes
    exact = observation.defenses == () and observation.precision in ("float32", "float64")
    private = isinstance(observation.release, Gradient) and observation.release.private is not None
    moved = bool(observation.as_gradient()[f"{last.name}.bias"].any())
    return few and exact and moved and not private and not observation.release.inexact()


def nonnegative(observation: PictureObservation, last: Call) -> bool:
    """Whether the last layer's features are never negative, so far as eight random pictures show."""
    shape = observation.model.architecture.input_shape
    images = torch.rand((8, *shape), generator=torch.Generator().manual_seed(0)).to(last.input)
    return bool((last_layer(observation, images).input >= 0).all())


def candidate_labels(observation: PictureObservation) -> Tensor:
    """The labels worth trying, (tries, batch) int64: those known or recovered, else, for one picture, every class."""
    try:
        return known_or_recovered(observation)[None]
    except NotObserved:
        if observation.batch_size != 1:
            raise
        where = next(iter(observation.released.values())).device
        return torch.arange(observation.model.architecture.classes, device=where)[:, None]


def with_best_label(observation: PictureObservation, images: Tensor) -> tuple[Tensor, float]:
    """The label (1,) under which this one picture explains the release best, and its relative residual."""
    tries = candidate_labels(replace(observation, batch_size=1))
    residuals = [observation.residual(images, y) for y in tries]
    best = min(range(len(tries)), key=residuals.__getitem__)
    return tries[best], residuals[best]


def label_of_sketch(observation: PictureObservation, images: Tensor) -> Tensor:
    """The label (1,) of an adapter's only picture: S = (p - onehot(y)) (A h)^T has its largest entries in row y."""
    name = calls(observation.model, images)[-1].name
    sketch = next((s for s in observation.sketches() if s.module == name and s.side == "right"), None)
    if sketch is None or observation.batch_size != 1 or len(sketch.measured) < 3:
        raise NotObserved(
            "Labels were not given: of an adapter they are told by the last layer's B, for one picture of three or more classes."
        )
    label: Tensor = sketch.measured.norm(dim=1).argmax()
    return label[None]


def last_layer(observation: PictureObservation, images: Tensor) -> Call:
    """The linear layer whose output is the logits, called with `images`; NotObserved if the model ends otherwise."""
    model = observation.model
    last = calls(model, images)[-1]
    if (
        not isinstance(last.layer, nn.Linear)
        or last.layer.bias is None
        or last.output.shape[-1] != model.architecture.classes
    ):
        raise NotObserved(
            f"Labels were not given, and the model ends in {last.name}, which is no linear layer with bias to recover them from."
        )
    if not {f"{last.name}.weight", f"{last.name}.bias"} <= set(observation.released):
        raise NotObserved(
            f"Labels were not given, and the last layer {last.name} was not trained: no gradient tells them."
        )
    return last


def label_fit(
    weight_gradient: Tensor,
    bias_gradient: Tensor,
    weight: Tensor,
    bias: Tensor,
    batch: int,
    *,
    smoothing: float = 0.0,
    iterations: int = 20,
    ridge: float = 1e-3,
    relax: float = 0.5,
) -> tuple[Tensor, float]:
    """How often each class occurs in a batch, (classes,) int64 that sum to `batch`; and what that leaves of both gradients, squared.

    weight (classes, features) and bias (classes,) of the last layer and their gradients under the mean cross entropy.

    Were class k's samples alike, with features mu_k, the counts n would explain both gradients:
        dW = M mu,  db = M 1,  M[c, k] = n_k / batch * (softmax(weight mu_k + bias)_c - t_kc),
    t_kc what class k is trained on: [c = k], smoothed by s (1 - s) [c = k] + s / classes.
    So alternate a ridge least squares for mu, drawn to the batch's mean feature (which the rank-one fit of dW to db
    gives), and n = batch * (mean prediction - db), unsmoothed; keep the counts that explain the gradients best.
    """
    dW, db, weight, bias = (t.cpu().double() for t in (weight_gradient, bias_gradient, weight, bias))
    eye = torch.eye(len(db), dtype=torch.float64)
    floor = smoothing / len(db)
    targets, present = (1 - smoothing) * eye + floor, db < -floor

    def whole(mean: Tensor) -> Tensor:
        """The counts that this mean prediction leaves."""
        return apportion(batch * (mean - db - floor) / (1 - smoothing), present, batch)

    centre = db @ dW / (db @ db)  # (features,)
    counts = whole((weight @ centre + bias).softmax(0))
    mu = centre.expand_as(dW)  # (classes, features)
    best, least = counts, torch.inf
    for _ in range(iterations):
        M = counts / batch * ((mu @ weight.T + bias).softmax(1) - targets).T  # (classes, classes)
        normal = M.T @ M
        target = M.T @ (dW - M @ centre.expand_as(dW))
        step = torch.linalg.solve(normal + ridge * normal.diag().max() * eye, target)
        mu = (1 - relax) * mu + relax * (centre + step)
        prediction = (mu @ weight.T + bias).softmax(1)  # row k: the mean prediction for class k
        M = counts / batch * (prediction - targets).T
        error = (dW - M @ mu).square().sum() / dW.square().sum() + (db - M.sum(1)).square().sum() / db.square().sum()
        if float(error) < least:
            best, least = counts, float(error)
        counts = whole(counts / batch @ prediction)
    return best.long(), least


def apportion(raw: Tensor, present: Tensor, total: int) -> Tensor:
    """Whole numbers near raw (classes,) that sum to total, at least 1 where present: largest remainders first."""
    least = present.double()
    raw = torch.maximum(raw, least)
    counts = raw.floor()
    while counts.sum() < total:
        counts[(raw - counts).argmax()] += 1
    while counts.sum() > total and bool((counts > 0).any()):
        spare = counts > least if bool((counts > least).any()) else counts > 0
        counts[torch.where(spare, counts - raw, -torch.inf).argmax()] -= 1
    return counts


def labels_of_images(observation: PictureObservation, images: Tensor) -> Tensor:
    """The label of each image, once the images themselves are known: (batch,) int64."""
    return soft_labels(observation, images).argmax(dim=1)


def soft_labels(observation: PictureObservation, images: Tensor | None = None) -> Tensor:
    """What the cross entropy compares each prediction with, (batch, classes): smoothed or mixed labels too.

    With features F (batch, features) and predictions P known, dL/dW = (P - Y)^T F / batch is linear in Y, and has one solution
    while batch <= features. Of one picture nothing need be known: its features are dW^T db / ||db||^2, and y = p - db.
    Raises NotObserved for several pictures that are not known, and as `recover_labels` does.
    """
    model = observation.model
    smoothing_of(observation)
    if images is None:
        if observation.batch_size != 1:
            raise NotObserved("Soft labels are read of one picture, or of pictures that are known.")
        last = last_layer(observation, model.architecture.blank(1).to(next(iter(observation.released.values()))))
        dW, db = gradients_of(observation, last, 1)
        if not bool(db.any()):
            raise NotObserved("The last layer's gradient is zero, which tells no label.")
        weight, bias = (model.parameters[f"{last.name}.{part}"] for part in ("weight", "bias"))
        return ((weight @ (db @ dW / db.square().sum()) + bias).softmax(0) - db)[None]
    last = last_layer(observation, images)
    dW, _ = gradients_of(observation, last, len(images))
    difference: Tensor = len(images) * dW @ torch.linalg.pinv(last.input)  # (classes, batch)
    return model.logits({}, images).softmax(dim=1) - difference.T


def soft_label_sum(observation: PictureObservation) -> Tensor:
    """sum_n y_n over a batch of unknown pictures, (classes,): sum_n p_n - B db, all predictions taken for that of the mean features.

    Exact for one picture, and where all are predicted alike, as by networks before their training nearly; raises as `recover_labels`.
    """
    batch = observation.batch_size
    if batch is None:
        raise NotObserved("The batch size was withheld, and labels without it: neither can be told from one gradient.")
    mean = replace(observation, batch_size=1)
    if observation.model.criterion.reduction == "sum":
        mean = replace(mean, released={name: tensor / batch for name, tensor in mean.released.items()})
    return batch * soft_labels(mean)[0]


def smoothing_of(observation: PictureObservation) -> float:
    """By how much labels are smoothed; NotObserved where the loss is not the cross entropy of all classes alike."""
    criterion = observation.model.criterion
    if not isinstance(criterion, CrossEntropy) or criterion.class_weights is not None:
        raise NotObserved(
            f"Labels were not given, and they are read off a cross entropy of equal weights, not off {criterion}."
        )
    if criterion.label_smoothing == 1:
        raise NotObserved("Labels smoothed by 1 are no part of the loss.")
    return criterion.label_smoothing


def gradients_of(observation: PictureObservation, last: Call, batch: int) -> tuple[Tensor, Tensor]:
    """(classes, features) and (classes,): of the mean loss over the batch, by the weight and the bias of the last layer."""
    gradient, share = observation.as_gradient(), 1 if observation.model.criterion.reduction == "mean" else batch
    return gradient[f"{last.name}.weight"] / share, gradient[f"{last.name}.bias"] / share

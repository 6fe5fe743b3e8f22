"""Label recovery from the last linear layer (one image: iDLG, Zhao et al. 2020, arXiv:2001.02610; batches: our own).

Sees      Gradient or Update of a classifier that ends in a linear layer and a softmax cross entropy; of one picture also
          an Adapter of that layer
Recovers  labels (batch,) int64 in ascending order
Solves    dL/db_c = mean_n (p_nc - [y_n = c]): for one image only the true class is negative; for a batch the counts
          follow once the mean prediction is known, which dL/dW gives
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from gradleak.errors import NotObserved
from gradleak.modalities.losses import CrossEntropy
from gradleak.observations.adapter import Adapter
from gradleak.observations.layers import Call, calls
from gradleak.observations.observation import PictureObservation


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
    model = observation.model
    grey = torch.full((1, *model.architecture.input_shape), 0.5).to(next(iter(observation.released.values())))
    if not (isinstance(model.criterion, CrossEntropy) and model.criterion.plain):
        raise NotObserved(
            f"Labels were not given, and they are read off a plain cross entropy, not off {model.criterion}."
        )
    if isinstance(observation.release, Adapter):
        return label_of_sketch(observation, grey)
    gradient, last = observation.as_gradient(), last_layer(observation, grey)
    share = 1 if model.criterion.reduction == "mean" else batch
    bias_gradient = gradient[f"{last.name}.bias"] / share
    if batch == 1:
        return bias_gradient.argmin()[None]
    weight, bias = (model.parameters[f"{last.name}.{part}"] for part in ("weight", "bias"))
    counts, _ = label_fit(gradient[f"{last.name}.weight"] / share, bias_gradient, weight, bias, batch)
    return torch.arange(len(counts)).repeat_interleave(counts).to(grey.device)


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
    iterations: int = 20,
    ridge: float = 1e-3,
    relax: float = 0.5,
) -> tuple[Tensor, float]:
    """How often each class occurs in a batch, (classes,) int64 that sum to `batch`; and what that leaves of both gradients, squared.

    weight (classes, features) and bias (classes,) of the last layer and their gradients under the mean cross entropy.

    Were class k's samples alike, with features mu_k, the counts n would explain both gradients:
        dW = M mu,  db = M 1,  M[c, k] = n_k / batch * (softmax(weight mu_k + bias)_c - [c = k]).
    So alternate a ridge least squares for mu, drawn to the batch's mean feature (which the rank-one fit of dW to db
    gives), and n = batch * (mean prediction - db); keep the counts that explain the gradients best.
    """
    dW, db, weight, bias = (t.cpu().double() for t in (weight_gradient, bias_gradient, weight, bias))
    eye = torch.eye(len(db), dtype=torch.float64)
    centre = db @ dW / (db @ db)  # (features,)
    counts = apportion(batch * ((weight @ centre + bias).softmax(0) - db), db < 0, batch)
    mu = centre.expand_as(dW)  # (classes, features)
    best, least = counts, torch.inf
    for _ in range(iterations):
        M = counts / batch * ((mu @ weight.T + bias).softmax(1).T - eye)  # (classes, classes)
        normal = M.T @ M
        target = M.T @ (dW - M @ centre.expand_as(dW))
        step = torch.linalg.solve(normal + ridge * normal.diag().max() * eye, target)
        mu = (1 - relax) * mu + relax * (centre + step)
        prediction = (mu @ weight.T + bias).softmax(1)  # row k: the mean prediction for class k
        M = counts / batch * (prediction.T - eye)
        error = (dW - M @ mu).square().sum() / dW.square().sum() + (db - M.sum(1)).square().sum() / db.square().sum()
        if float(error) < least:
            best, least = counts, float(error)
        counts = apportion(batch * (counts / batch @ prediction - db), db < 0, batch)
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
    """The label of each image, once the images themselves are known: (batch,) int64.

    With features F (batch, features) and logits known, dL/dW = (P - Y)^T F / batch is linear in the one-hot Y, and
    has one solution while batch <= features.
    """
    model = observation.model
    last = last_layer(observation, images)
    probabilities = model.logits({}, images).softmax(dim=1)
    share = len(images) if model.criterion.reduction == "mean" else 1
    difference = (
        share * observation.as_gradient()[f"{last.name}.weight"] @ torch.linalg.pinv(last.input)
    )  # (classes, batch)
    labels: Tensor = (probabilities - difference.T).argmax(dim=1)
    return labels

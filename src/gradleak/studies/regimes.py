"""How far weights are from what theory says of them: a combination of the training images' gradients, at features that rest."""

import torch
from torch import Tensor

from gradleak.modalities.pictures import Pictures
from gradleak.observations.fully_connected import FullyConnected, cone, explained
from gradleak.observations.observation import PictureObservation
from gradleak.observations.tensors import Tensors, flatten
from gradleak.observations.trained_weights import Weights
from gradleak.studies.study import Row
from gradleak.victims.weights import slope

FIRST_LAYER = (1.0, 0.0, 0.0)  # what is explained of each layer


def gradients(network: FullyConnected, x: Tensor, C: Tensor) -> list[Tensors]:
    """What backpropagation makes of the signal C_i for every x_i."""
    return [network.combination(x[i : i + 1], C[i : i + 1]) for i in range(len(x))]


def training(seen: PictureObservation, private: Pictures) -> Row:
    """The loss, what the true images leave unexplained of the first layer, and how far its row space lies in their span.

    inside: root mean square cosine between the two leading right singular vectors of what training made of the first layer,
    of all that there are as many of as images for `all_inside`, and the span of the images.
    """
    weights = seen.expect(Weights)
    network, learned = (of(seen.model, seen.released) for of in (weights.network, weights.learned))
    x, target = network.inputs(private.images), weights.target(seen.model, seen.released, FIRST_LAYER)
    V = torch.linalg.svd(learned.weights[0], full_matrices=False).Vh[: len(x)]
    inside = (V @ torch.linalg.qr(x.T).Q).square().sum(1)
    return {
        "loss": float(slope(network.forward(x)[-1], private.labels)[1]),
        "truth_residual": explained(network, *network.margins(private.images, private.labels), target)[0],
        "two_inside": float(inside[:2].mean().sqrt()),
        "all_inside": float(inside.mean().sqrt()),
    }


def in_factors(
    adapter: PictureObservation, began: PictureObservation, seen: PictureObservation, private: Pictures
) -> float:
    """What the true images leave unexplained of A - A0 in the first layer, where it is asked to be sum_i lambda_i s B^T G_i.

    That is the stationarity of what was trained: A moves along dL/dA = s B^T dL/dW (Hu et al. 2021), W itself does not.
    seen: the adapter composed.
    """
    network = seen.expect(Weights).network(seen.model, seen.released)
    layer = network.names[0].removesuffix(".weight")
    start, end = (one.adapter.start[f"{layer}.lora_A"].double() for one in (began, adapter))  # (rank, in)
    B = adapter.adapter.scaling[layer] * adapter.released[f"{layer}.lora_B"].double()  # (out, rank)
    G = gradients(network, *network.margins(private.images, private.labels))
    moves = torch.stack([(B.T @ one[network.names[0]]).flatten() for one in G])
    moved = (end - start).flatten()
    rest = moved - cone(moves @ moves.T, moves @ moved) @ moves
    return float(rest.norm() / moved.norm())


def drift(update: PictureObservation, batch: Pictures) -> Row:
    """How far the linear regime was left: relative weight change, cosine of the features before and after, coefficients.

    A feature is the gradient of label's logit minus the mean logit; coefficients are one-hot label minus softmax.
    """
    before, features, signals = update.model.parameters, list[list[Tensor]](), list[Tensor]()
    after = {name: tensor + update.released.get(name, 0) for name, tensor in before.items()}
    for parameters in (before, after):
        network = FullyConnected.of(update.model.module, parameters, update.model.architecture.input_shape)
        x = network.inputs(batch.images)
        outputs = network.forward(x)[-1]
        one_hot = torch.eye(outputs.shape[1])[batch.labels]
        signals.append(one_hot - outputs.softmax(1))
        features.append([flatten(one) for one in gradients(network, x, one_hot - 1 / outputs.shape[1])])
    cosines = [torch.cosine_similarity(a, b, dim=0) for a, b in zip(*features, strict=True)]
    return {
        "weight_change": float(flatten(update.released).norm() / flatten(before).norm()),
        "feature_cosine": float(torch.stack(cosines).mean()),
        "coefficient_drift": float((signals[1] - signals[0]).norm() / signals[0].norm()),
    }

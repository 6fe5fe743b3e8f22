"""Label counts from the last layer's gradient as published (iLRG: Ma et al., ICLR 2023).

Sees      Gradient or Update of a classifier that ends in a linear layer with bias and a softmax cross entropy
Recovers  the number of samples of each class
Solves    Row j of dW is mostly of samples of class j, and so is entry j of db: their quotient is taken for the features of class j,
          e_j = dW_j / db_j, and p_j = softmax(W e_j + b) for its prediction. Then, in the counts n,
              sum_j n_j p_j[i] - n_i = B db_i,   sum_j n_j = B,
          by the pseudoinverse
Differs   rounded by largest remainders, none below 0, so that they sum to the batch
Misses    classes that no sample has: their e_j is of the samples that are taken for them. `label_fit` (labels.py) shares the samples'
          mean features among them, and asks for both gradients
"""

import torch
from torch import Tensor

from gradleak.attacks.labels import apportion, gradients_of, last_layer
from gradleak.observations.observation import PictureObservation


def ilrg(weight_gradient: Tensor, bias_gradient: Tensor, weight: Tensor, bias: Tensor, batch: int) -> Tensor:
    """The counts (classes,) int64, of `batch` in sum.

    weight (classes, features) and bias (classes,) of the last layer, and their gradients under the mean cross entropy.
    """
    dW, db, W, b = (t.cpu().double() for t in (weight_gradient, bias_gradient, weight, bias))
    embeddings = dW / torch.where(db == 0, torch.inf, db)[:, None]  # (classes, features)
    predictions = (embeddings @ W.T + b).softmax(1)  # row j: p_j
    equations = torch.cat([predictions.T - torch.eye(len(db), dtype=db.dtype), torch.ones_like(db)[None]])
    known = torch.cat([batch * db, db.new_tensor([batch])])
    return apportion(torch.linalg.pinv(equations) @ known, torch.zeros_like(db) > 0, batch).long()


def ilrg_of(observation: PictureObservation) -> Tensor:
    """The same of an observation whose batch size is told."""
    assert observation.batch_size is not None
    model = observation.model
    last = last_layer(observation, model.architecture.blank(1))
    weight, bias = (model.parameters[f"{last.name}.{part}"] for part in ("weight", "bias"))
    return ilrg(*gradients_of(observation, last, observation.batch_size), weight, bias, observation.batch_size)

"""The tokens under the masks of masked language modelling, in closed form, once the sentences with their masks are known.

The gradient of the head's first linear layer z = W x + b is sum_t d_t x_t^T / M. The x_t of all n tokens are known, so the d_t
solve a linear system while n is below the width. d_t is zero where no token was predicted, and else
d_t = J_t^T (softmax(logits_t) - e_y), with the Jacobian J_t of the logits with respect to z_t. y is the token with that
direction, so that neither M nor a learning rate is needed. Targets that were kept or replaced come out like masked ones. This is
the decomposition of DAGER (arXiv:2405.15586, section 4), read at the other end of the network.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, vjp, vmap

from gradleak.attacks.reconstruction import Reconstruction
from gradleak.modalities.modality import Tokens
from gradleak.observations.layers import layer_inputs
from gradleak.observations.model import LanguageModel
from gradleak.observations.observation import TextObservation
from gradleak.observations.tensors import Tensors
from gradleak.observations.transformer import layout_of

# Of the largest d_t, below which no token was predicted: the system leaves the rounding of float32 there. And the distance
# between the directions of d_t and of its token: two tokens' directions are about 1 apart. Where both are known, 1e-5 to 1e-2
# and 0.01 to 0.5 read the same tokens (three small texts).
PREDICTED, EXPLAINED = 1e-3, 0.1


def unmask(observation: TextObservation, reconstruction: Reconstruction) -> Reconstruction:
    """The sentences with the tokens that were predicted in place of those that the model saw; the status says how many.

    Unchanged for another task; and, with the reason in the status, where the head's gradient was not released or the tokens
    exceed its width.
    """
    model, sentences = observation.model, reconstruction.value
    if model.architecture.task != "masked-lm" or not sentences:
        return reconstruction
    dense = layout_of(model).head
    if dense is None:
        return _noted(reconstruction, "the masked tokens were not sought: the model has no head")
    gradients = observation.sketches([dense])
    if not gradients:
        return _noted(
            reconstruction, f"the masked tokens were not sought: the gradient of {dense}.weight was not released"
        )
    exact = {name: p.double() for name, p in model.parameters.items()}
    inputs = [layer_inputs(model, [dense], torch.tensor([tokens]), parameters=exact)[dense] for tokens in sentences]
    x = torch.cat([rows[0] for rows in inputs])  # (n, width)
    if len(x) >= x.shape[1]:
        return _noted(reconstruction, f"the masked tokens cannot be told: {len(x)} tokens, {x.shape[1]} directions")
    d = torch.linalg.lstsq(x.T, gradients[0].measured.double().T, driver="gelsd").solution  # (n, rows): d_t / M
    sizes = d.norm(dim=1)
    predicted = (sizes > PREDICTED * sizes.max()).nonzero().flatten().tolist()
    best = {t: _target(model, exact, dense, x[t], d[t]) for t in predicted}
    sure = {t: token for t, (token, distance) in best.items() if distance < EXPLAINED}
    return _noted(
        replace(reconstruction, value=_replaced(sentences, sure)),
        f"{len(sure)} of {len(best)} masked tokens read from the head",
    )


def _target(model: LanguageModel, exact: Tensors, dense: str, x: Tensor, d: Tensor) -> tuple[int, float]:
    """(token, distance of its direction from d's): x (width,) is the layer's input, d (rows,) its output's gradient.

    exact: the parameters in float64.
    """
    layer, ids = model.module.get_submodule(dense), torch.zeros(1, 1, dtype=torch.long)

    def logits(shift: Tensor) -> Tensor:
        """The model behind the layer, whatever the text: its input is x, and its output moves by the shift."""
        enter = layer.register_forward_pre_hook(lambda layer, inputs: (x[None, None],))
        leave = layer.register_forward_hook(lambda layer, inputs, output: output + shift)
        try:
            out = functional_call(model.module, exact, (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        finally:
            enter.remove()
            leave.remove()
        behind: Tensor = out.logits[0, 0]
        return behind

    out, back, *_ = vjp(logits, torch.zeros_like(d))
    _, forth, *_ = vjp(lambda u: back(u)[0], torch.zeros_like(out))  # J v, as the derivative of J^T u by u
    J = vmap(lambda v: forth(v)[0])(torch.eye(len(d)).to(d)).T  # (vocabulary, rows)
    directions = F.normalize(out.softmax(0) @ J - J, dim=1)
    distance, token = (directions - F.normalize(d, dim=0)).norm(dim=1).min(0)
    return int(token), float(distance)


def _replaced(sentences: Tokens, targets: dict[int, int]) -> Tokens:
    """Sentences with other tokens at some places, counted through all of them."""
    rows, first = list[tuple[int, ...]](), 0
    for row in sentences:
        rows.append(tuple(targets.get(first + i, token) for i, token in enumerate(row)))
        first += len(row)
    return tuple(rows)


def _noted(reconstruction: Reconstruction, note: str) -> Reconstruction:
    return replace(reconstruction, status=f"{reconstruction.status.removesuffix('.')}; {note}.")

"""The tokens under the masks of masked language modelling, in closed form, once the sentences with their masks are known.

The gradient of the head's first linear layer z = W x + b is sum_t d_t x_t^T / M: x_t is known of all n tokens, so the d_t solve a
linear system while n is below the width. d_t is zero where no token was predicted, and else
d_t = J_t^T (softmax(logits_t) - e_y), with the Jacobian J_t of the logits with respect to z_t; y is the token whose direction that
is, so that neither M nor a learning rate is needed. It finds targets that were not masked but kept or replaced, too. The same decomposition as DAGER's (arXiv:2405.15586, section 4),
read at the other end of the network.
"""

from collections.abc import Sequence
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

PREDICTED = 1e-3  # of the largest d_t: below that, no token was predicted at t
EXPLAINED = 0.1  # distance between the directions of d_t and of its token; two tokens' own are about 1 apart


def unmask(observation: TextObservation, found: Reconstruction) -> Reconstruction:
    """The sentences with the tokens that were predicted in place of those that the model saw; the status says how many.

    Unchanged, with a word about the reason, where the head's gradient was not released or the tokens exceed its width.
    """
    model, family = observation.model, observation.model.architecture.family
    if not found.value or family.head is None:
        return found
    module, dense = family.head
    seen = observation.sketches([f"{module}.{dense}"])
    if not seen:
        return _told(
            found, f"the masked tokens were not sought: the gradient of {module}.{dense}.weight was not released"
        )
    x = torch.cat([_head_inputs(model, f"{module}.{dense}", tokens) for tokens in found.value])  # (n, width)
    if len(x) >= x.shape[1]:
        return _told(found, f"the masked tokens cannot be told: {len(x)} tokens, {x.shape[1]} directions")
    solved = torch.linalg.lstsq(x.T, seen[0].measured.double().T, driver="gelsd").solution  # (n, rows): d_t / M
    sizes = solved.norm(dim=1)
    predicted = (sizes > PREDICTED * sizes.max()).nonzero().flatten().tolist()
    best = {t: _target(model, x[t], solved[t]) for t in predicted}
    sure = {t: token for t, (token, rest) in best.items() if rest < EXPLAINED}
    tokens = _replaced(found.value, sure)
    return _told(replace(found, value=tokens), f"{len(sure)} of {len(best)} masked tokens read from the head")


def _head_inputs(model: LanguageModel, name: str, tokens: Sequence[int]) -> Tensor:
    """What goes into the head's first layer: (length, width), in float64."""
    parameters = {key: p.double() for key, p in model.parameters.items()}
    return layer_inputs(model, [name], torch.tensor([list(tokens)]), parameters=parameters)[name][0]


def _target(model: LanguageModel, x: Tensor, d: Tensor) -> tuple[int, float]:
    """(token, distance of its direction from d's): x (width,) is the layer's input, d (rows,) its output's gradient."""
    module, dense = model.architecture.family.head or ("", "")
    head, own = model.module.get_submodule(module), _parameters(model, module)

    def logits(bias: Tensor) -> Tensor:
        made: Tensor = functional_call(head, {**own, f"{dense}.bias": bias}, (x[None, None],), tie_weights=False)[0, 0]
        return made

    bias = own[f"{dense}.bias"]
    out, back, *_ = vjp(logits, bias)
    _, forth, *_ = vjp(lambda u: back(u)[0], torch.zeros_like(out))  # J v, as the derivative of J^T u by u
    J = vmap(lambda v: forth(v)[0])(torch.eye(len(d)).to(d)).T  # (vocabulary, rows)
    directions = F.normalize(out.softmax(0) @ J - J, dim=1)
    rest, token = (directions - F.normalize(d, dim=0)).norm(dim=1).min(0)
    return int(token), float(rest)


def _parameters(model: LanguageModel, module: str) -> Tensors:
    """The head's parameters under its own names, tied ones included, in float64."""
    names = {id(p): name for name, p in model.module.named_parameters()}
    own = model.module.get_submodule(module).named_parameters(remove_duplicate=False)
    return {name: model.parameters[names[id(p)]].double() for name, p in own}


def _replaced(sentences: Tokens, targets: dict[int, int]) -> Tokens:
    """Sentences with other tokens at some places, counted through all of them."""
    made, first = [], 0
    for row in sentences:
        made.append(tuple(targets.get(first + i, token) for i, token in enumerate(row)))
        first += len(row)
    return tuple(made)


def _told(found: Reconstruction, note: str) -> Reconstruction:
    return replace(found, status=f"{found.status.removesuffix('.')}; {note}.")

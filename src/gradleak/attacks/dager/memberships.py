"""Which tokens share a sentence? A linear system per token, and no product over positions.

In a bidirectional layer the attention's output for token i is, in each head h, an average over the tokens s of its sentence,

    o_i = sum_s w_s e_is v_s / sum_s w_s e_is,   e_is = exp(q_i . k_s / sqrt(width of a head)),

with w_s = 1 for members and 0 for others. Queries, keys and values of every candidate are known, and o_i is (outputs.py): then
sum_s w_s e_is (v_s - o_i) = 0 is linear in w, free of the normaliser, and the same for all tokens of the sentence.

Before that, where tokens recur at several positions, the first layer's span holds every token at every position. Then
dL/dW = sum_i delta_i x_i^T with x_i = gamma (u_a + v_p) / s_i + beta is solved for the sums of delta_i / s_i per token and
per position; the position's sums are those of its own tokens, which says where the tokens stand.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.attacks.dager.vocabulary import Embeddings
from gradleak.observations.model import LanguageModel
from gradleak.observations.tensors import Tensors


@dataclass(frozen=True)
class Pairs:
    """Candidates (token, position): ids (m,), places (m,), what enters the first layer (m, width) in float64."""

    ids: Tensor
    places: Tensor
    x: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def at(self, chosen: Tensor) -> "Pairs":
        """Some of them."""
        return Pairs(self.ids[chosen], self.places[chosen], self.x[chosen])


def pairs_of(embeddings: Embeddings, candidates: list[Tensor]) -> Pairs:
    """The candidates of all positions in one list."""
    ids = torch.cat(candidates)
    places = torch.cat([torch.full_like(part, place) for place, part in enumerate(candidates)])
    return Pairs(ids, places, embeddings.inputs(ids, places))


def placements(embeddings: Embeddings, pairs: Pairs, measured: Tensor) -> Tensor:
    """How much of each position's sum of deltas is that of the token: (m,), near 1 where a token stands once in the batch.

    measured: gradients of the first layer's query, key and value (rows, width), stacked.
    """
    tokens, which = torch.unique(pairs.ids, return_inverse=True)
    count = int(pairs.places.max()) + 1
    gamma, beta = embeddings.gamma.double(), embeddings.beta.double()
    design = torch.cat(
        [gamma * embeddings.tokens[tokens].double(), gamma * embeddings.places[:count].double(), beta[None]]
    )
    sums = torch.linalg.lstsq(design.T, measured.double().T, driver="gelsd").solution  # (tokens + positions + 1, rows)
    of_tokens, of_places = sums[: len(tokens)], sums[len(tokens) : -1]
    # The first position's part is in the tokens' embeddings: what is common to all goes either way.
    share = of_places @ torch.linalg.pinv(of_tokens, rtol=1e-6)  # (positions, tokens)
    found: Tensor = share[pairs.places, which]
    return found


@dataclass(frozen=True)
class Attention:
    """Queries, keys and values of the candidates in the first layer: (heads, m, width of a head) each."""

    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, model: LanguageModel, exact: Tensors, x: Tensor) -> "Attention":
        """x: (m, width), what enters the first layer."""
        heads = model.architecture.config.num_attention_heads
        made = (x @ exact[f"{name}.weight"].T + exact[f"{name}.bias"] for name in model.architecture.family.queries(0))
        return cls(*(torch.unflatten(part, 1, (heads, -1)).transpose(0, 1) for part in made))

    def system(self, i: int, o: Tensor, others: Tensor) -> Tensor:
        """A (width, others) with A w = 0 for the sentence of candidate i, whose output is o (width,)."""
        score = (self.k[:, others] @ self.q[:, i, :, None])[..., 0] / self.q.shape[2] ** 0.5  # (heads, others)
        e = score.softmax(1)
        made: Tensor = e[:, None] * (self.v[:, others].mT - o.reshape(len(self.q), -1, 1))
        return made.flatten(0, 1)


def members(systems: Sequence[Tensor], sure: Tensor) -> Tensor:
    """w (others,) >= 0 with A w ~ 0 for every system A (width, others), and w = 1 where it is sure (others,) bool."""
    from scipy.optimize import nnls

    A = torch.cat(list(systems))
    own = A[:, sure].sum(1, keepdim=True)
    R = torch.linalg.qr(torch.cat([A[:, ~sure], own], 1), mode="r").R
    w = torch.ones(A.shape[1], dtype=torch.float64)
    w[~sure] = torch.from_numpy(nnls(R[:, :-1].numpy(), -R[:, -1].numpy())[0])
    return w

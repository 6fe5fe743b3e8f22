"""Which tokens share a sentence? One linear system per token, and no product over positions.

In a bidirectional layer the attention's output for token i is, in each head h, an average over the tokens s of its sentence,

    o_i = sum_s w_s e_is v_s / Z_i,   e_is = exp(q_i . k_s / sqrt(width of a head)),   Z_i = sum_s w_s e_is,

with w_s = 1 for members and 0 for others. Queries, keys and values of every candidate are known, and the gradient of the
output projection says in which span all o_i lie: N o_i = 0. Given Z_i that is linear in w. Solved for 0 <= w <= 1 with at
most one token per position, and Z_i renewed in between.

Before that, where tokens recur at several positions, the first layer's span holds every token at every position. Then
dL/dW = sum_i delta_i x_i^T with x_i = gamma (u_a + v_p) / s_i + beta is solved for the sums of delta_i / s_i per token and
per position; the position's sums are those of its own tokens, which says where the tokens stand.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.attacks.vocabulary import Embeddings
from gradleak.tensors import Tensors
from gradleak.text import LanguageModel

STAGES, ROUNDS, INNER = 6, 5, 40  # sets of tokens; renewals of Z; iterations of the solver in between
JOINED = 12  # tokens of a sentence whose equations are solved together


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
    """The first layer's attention over the candidates.

    weights  exp(q . k) (heads, m, m), scaled by each row's largest
    seen     N v per head (heads, equations, m)
    """

    weights: Tensor
    seen: Tensor

    def at(self, chosen: Tensor) -> "Attention":
        """That over some of the candidates."""
        return Attention(self.weights[:, chosen][:, :, chosen], self.seen[:, :, chosen])

    @classmethod
    def of(cls, model: LanguageModel, exact: Tensors, pairs: Pairs, outside: Tensor) -> "Attention":
        """outside: N (equations, width), orthogonal to every attention output of the batch."""
        heads = model.config.num_attention_heads
        q, k, v = (
            torch.unflatten(pairs.x @ exact[f"{name}.weight"].T + exact[f"{name}.bias"], 1, (heads, -1)).transpose(0, 1)
            for name in model.family.queries(0)
        )  # (heads, m, width of a head)
        scores = q @ k.transpose(1, 2) / q.shape[2] ** 0.5
        weights = (scores - scores.amax(2, keepdim=True)).exp()
        N = torch.unflatten(outside, 1, (heads, -1)).transpose(0, 1)  # (heads, equations, width of a head)
        return cls(weights, N @ v.transpose(1, 2))


def memberships(attention: Attention, pairs: Pairs, focus: int, certain: Tensor, guess: Tensor) -> tuple[Tensor, float]:
    """w (m,) for the sentence of the candidate `focus`, and the share of the equations that is left unexplained.

    The equations of the focus alone come first; then those of all tokens that seem to be with it, which share its w.

    certain: (m,) bool, in every sentence (such as the first token). guess: (m,) where to begin.
    """
    fixed = certain.clone()
    fixed[focus] = True
    open_ = ~fixed & ~torch.isin(pairs.places, pairs.places[fixed])
    w = torch.where(open_, guess, fixed.to(guess))
    rows = torch.tensor([focus])
    left, best, kept = 1.0, torch.inf, w
    for stage in range(STAGES):
        w, left = _solve(attention, pairs, rows, fixed, open_, w, ROUNDS if stage == 0 else 2)
        likely = torch.where(certain, 0, w).topk(min(JOINED, len(w))).indices
        joined = torch.unique(torch.cat([likely[w[likely] > 0.5], torch.tensor([focus])]))
        if stage and left < best:
            best, kept = left, w
        if torch.equal(joined, rows):
            break
        rows = joined
    return kept, best if best < torch.inf else left


def _solve(
    attention: Attention, pairs: Pairs, rows: Tensor, fixed: Tensor, open_: Tensor, w: Tensor, rounds: int
) -> tuple[Tensor, float]:
    """w from the equations of the tokens `rows`, which share a sentence; each token's equations count alike."""
    e = attention.weights[:, rows]  # (heads, rows, m)
    places = torch.unique(pairs.places[open_], return_inverse=True)[1]
    free = open_.nonzero()[:, 0]
    sure = torch.zeros(int(places.max()) + 1 if len(places) else 0, dtype=torch.bool)
    sure[places[pairs.places[open_] <= int(pairs.places[rows].max())]] = True  # up to a member, every position is taken
    dual, left = torch.zeros_like(w[free]), 1.0
    for _ in range(rounds):
        Z = (e @ w)[..., None]  # (heads, rows, 1)
        A = torch.einsum("his,hqs->iqs", e / Z, attention.seen)  # (rows, equations, m)
        target = -A[:, :, fixed].sum(2)
        scale = target.norm(dim=1)[:, None]
        target, B = (target / scale).flatten(), (A[:, :, free] / scale[..., None]).flatten(0, 1)
        H, g = B.T @ B, B.T @ target
        rho = H.diagonal().mean()
        factor = torch.linalg.cholesky(H + rho * torch.eye(len(H), dtype=H.dtype))
        z = w[free]
        for _ in range(INNER):  # ADMM between least squares and the constraints
            x = torch.cholesky_solve((g + rho * (z - dual))[:, None], factor)[:, 0]
            z = _at_most_one(x + dual, places, sure)
            dual = dual + x - z
        w = w.clone()
        w[free] = z
        left = float((B @ z - target).norm() / target.norm())
    return w, left


def _at_most_one(w: Tensor, places: Tensor, sure: Tensor) -> Tensor:
    """w clamped to at least 0, and scaled at each position to a sum of at most 1, or of 1 where that is sure."""
    w = w.clamp_min(0)
    total = torch.zeros(len(sure), dtype=w.dtype).index_add_(0, places, w)
    total = torch.where(sure & (total > 0), total, total.clamp_min(1))
    return w / total[places]

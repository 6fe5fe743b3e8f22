"""Sentences of an encoder, in polynomial time: the attention's output of each candidate token, then who shares its sentence.

After the attention an encoder's block treats every token by itself,

    a = norm(x + W o + b),   f = activation(W_1 a + b_1),

and the gradients of three linear layers show in which spans all outputs o, all a and all f of the batch lie. The first two are
linear in o once the token's x is given, up to one scale. The third has four times as many dimensions and the same rank: with n
tokens 4 width - n equations for the few unknowns that are left. Gauss-Newton solves them for each candidate (token, position)
alone, and has no solution for a candidate that is not in the batch.

The output for token i is, in each head h, an average over the tokens s of its sentence,

    o_i = sum_s w_s e_is v_s / sum_s w_s e_is,   e_is = exp(q_i . k_s / sqrt(width of a head)),

with w_s = 1 for members and 0 for others. Queries, keys and values of every candidate are known, and so is o_i:
sum_s w_s e_is (v_s - o_i) = 0 is linear in w, free of the normaliser, and the same for all tokens of the sentence.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.attacks.dager.judge import Judge, Sentence
from gradleak.attacks.dager.spans import Span, excess, spans_of
from gradleak.attacks.dager.vocabulary import Pairs
from gradleak.attacks.search.descend import OnStep
from gradleak.observations.layers import layer_inputs
from gradleak.observations.model import LanguageModel
from gradleak.observations.observation import TextObservation
from gradleak.observations.tensors import Tensors
from gradleak.observations.transformer import layout_of

ROWS = 64  # candidates at a time: memory alone depends on it
DAMPING = 1e-6  # of the mean curvature, which is computed in float32: its rounding
# Gauss-Newton takes four steps (docs/findings/text.md, "Why batches are harder"): three times as many at most, and from the
# fourth on only where a step takes a fifth off the residual. These three, and the efforts below, are chosen by hand: about half
# and twice of each (an eighth of AT_ONCE) leave the same 15 of 18 sentences right (texts of the package in batches of 3 to 6,
# BERTs of width 64 to 128), but FIRST = 6, which finds two more in a quarter more time, and TOGETHER = 16, which loses one.
STEPS, FIRST, SLOW = 12, 3, 0.8
UNLIKE = 1e-4  # relative: a norm's eps, and float32 in it, change less
AT_ONCE = 1_024  # candidates whose outputs are computed before sentences are sought
TWICE = 2  # proposals that may hold a token before it is no focus any more, until more outputs are known
TOGETHER = 8  # tokens of a sentence whose equations are solved together
TURNS = 5  # times that the members of a sentence are solved for, with more of its tokens each time
GAPS = 5  # positions of a sentence that may be filled before every candidate's output is known
BEYOND = 4  # positions behind the last member that may be filled, where no token closes the sentence
UNSURE = 0.2  # a weight further than this from 1: the candidates of that position are weighed once more


@dataclass(frozen=True)
class Path:
    """The first block after its attention, and the spans of its layers' inputs.

    output, hidden  (W, b) and (W_1, b_1); norm: (gamma, beta)
    V       (n, width): the span of the attention's outputs, orthonormal
    L       (equations, width): L (x + W o + b) = 0, free of the norm's mean and scale
    passed  the span of what the perceptron's first layer passes on
    blur    relative uncertainty of the first two spans, and of f: noise over signal
    """

    output: tuple[Tensor, Tensor]
    norm: tuple[Tensor, Tensor]
    hidden: tuple[Tensor, Tensor]
    activation: Callable[[Tensor], Tensor]
    V: Tensor
    L: Tensor
    passed: Span
    blur: float

    @classmethod
    def of(cls, observation: TextObservation, exact: Tensors, rounding: float) -> "Path | None":
        """None where one of the spans was not released, is full, or was released through an adapter's factor only, and where the
        block is not as above.

        exact: the first block's parameters in float64. rounding: relative precision of the victim's forward pass.
        """
        layout = layout_of(observation.model)
        spans = [spans_of(observation, names) for names in ((layout.output,), layout.hidden, layout.passed)]
        if any(not s or s[0].full or s[0].factor is not None for s in spans):
            return None
        outputs, inner, passed = (s[0] for s in spans)
        layers = _layers(observation.model, exact)
        if layers is None:
            return None
        output, norm, hidden, activation = layers
        N = inner.orthogonal()
        of_beta = N @ norm[1]
        if bool(of_beta.any()):
            N = N - of_beta[:, None] * (of_beta @ N) / of_beta.square().sum()  # orthogonal to beta: free of the scale
        blur = rounding + outputs.worst + inner.worst
        return cls(output, norm, hidden, activation, outputs.basis, _centred(N * norm[0]), passed, blur)

    def outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The attention's output o (m, width) for each x, and whether x is in the batch (m,): f lies in its span.

        x: (m, width) in float64, inputs of the first layer.
        """
        left, s, right = torch.linalg.svd(self.L @ self.output[0] @ self.V.T)
        # Below the root of the blur, noise costs an equation more than it tells: the third span fixes that direction.
        sure = int((s > s[0] * self.blur**0.5).sum())
        fixed = (right[:sure].T / s[:sure]) @ left[:, :sure].T  # (n, equations)
        solved = [self._solve(part, fixed, right[sure:].T) for part in torch.split(x, ROWS)]
        return torch.cat([o for o, _ in solved]), torch.cat([near for _, near in solved])

    def _solve(self, x: Tensor, fixed: Tensor, Z: Tensor) -> tuple[Tensor, Tensor]:
        """Gauss-Newton over t with o = V^T (c + Z t): y = x + W o + b, centred, has size s, and a = gamma u + beta."""
        (W, b), (gamma, beta), (W1, b1), P = self.output, self.norm, self.hidden, self.passed.basis
        c = -(x + b) @ self.L.T @ fixed.T  # (m, n)
        y0 = _centred(x + b + c @ self.V @ W.T)
        K = _centred((W @ self.V.T @ Z).T).T  # (width, free)
        A = (W1 @ (gamma[:, None] * K)).float()  # (hidden, free)
        t, active = x.new_zeros(len(x), Z.shape[1]), torch.arange(len(x))
        best, rest, near = t.clone(), x.new_full((len(x),), torch.inf), torch.zeros(len(x), dtype=torch.bool)
        for step in range(STEPS):
            y = y0[active] + t[active] @ K.T
            s = y.square().mean(1, keepdim=True).sqrt()
            u = y / s
            slope = gamma * u @ W1.T
            f, d = _with_derivative(self.activation, slope + beta @ W1.T + b1)
            r = f - f @ P.T @ P
            residual, before = r.norm(dim=1) / f.norm(dim=1), rest[active]
            better = residual < before
            improved = active[better]
            best[improved], rest[improved] = t[improved], residual[better]
            near[improved] = excess([self.passed], f[better], self.blur)[1] <= 1
            going = residual < SLOW * before if step >= FIRST else torch.ones_like(better)
            if not Z.shape[1] or not bool(going.any()):
                break
            # float32 is enough for a step; the residual stays in float64
            J = (d / s)[going, :, None].float() * (
                A - slope[going, :, None].float() * ((u[going] @ K) / y.shape[1])[:, None].float()
            )  # (m, hidden, free)
            PJ = P.float() @ J
            H = (J.mT @ J - PJ.mT @ PJ).double()
            g = (J.mT @ r[going, :, None].float())[..., 0].double()
            H = H + DAMPING * H.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(H.shape[1], dtype=H.dtype)
            active = active[going]
            t[active] = t[active] - torch.linalg.solve(H, g)
        return (c + best @ Z.T) @ self.V, near


Layer = tuple[Tensor, Tensor]  # weight and bias


def _layers(model: LanguageModel, exact: Tensors) -> tuple[Layer, Layer, Layer, Callable[[Tensor], Tensor]] | None:
    """(W, b), (gamma, beta), (W_1, b_1) and the activation, if the first block computes a and f as above: on two tokens."""
    from transformers.activations import ACT2FN

    layout = layout_of(model)
    names = (layout.output, str(layout.after), *layout.hidden)
    if layout.after is None or any(f"{name}.{part}" not in exact for name in names for part in ("weight", "bias")):
        return None
    output, norm, hidden = ((exact[f"{name}.weight"], exact[f"{name}.bias"]) for name in names[:3])
    reached = (layout.queries(0)[0], layout.output, layout.hidden[0], layout.passed[0])
    inputs = layer_inputs(model, reached, torch.arange(2)[None], parameters=exact)
    x, o, a, f = (inputs[name][0] for name in reached)
    y = _centred(x + o @ output[0].T + output[1])
    expected = norm[0] * y / y.square().mean(1, keepdim=True).sqrt() + norm[1]
    if float((expected - a).norm()) > UNLIKE * float(a.norm()):
        return None
    z = a @ hidden[0].T + hidden[1]
    known = (ACT2FN[name] for name in ("gelu", "relu", "gelu_new", "silu", "gelu_fast", "quick_gelu", "tanh"))
    apart, activation = min(((float((g(z) - f).norm()), g) for g in known), key=lambda pair: pair[0])
    return None if apart > UNLIKE * float(f.norm()) else (output, norm, hidden, activation)


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


def _with_derivative(activation: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """An elementwise function and its derivative."""
    leaf = z.detach().requires_grad_()
    f = activation(leaf)
    return f.detach(), torch.autograd.grad(f.sum(), leaf)[0]


@dataclass(frozen=True)
class Attention:
    """The candidates with their queries, keys and values in the first layer: (heads, m, width of a head) each."""

    pairs: Pairs
    close: int | None  # the token that ends a sentence
    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, judge: Judge, pairs: Pairs) -> "Attention":
        """For a block that `Path` knows: query, key and value are layers of their own."""
        architecture, layers = judge.model.architecture, layout_of(judge.model).queries(0)
        heads = architecture.config.num_attention_heads
        qkv = (pairs.x @ judge.exact[f"{layer}.weight"].T + judge.exact[f"{layer}.bias"] for layer in layers)
        q, k, v = (torch.unflatten(part, 1, (heads, -1)).transpose(0, 1) for part in qkv)
        return cls(pairs, architecture.tokenizer.sep_token_id, q, k, v)

    def system(self, i: int, o: Tensor, others: Tensor) -> Tensor:
        """A (width, others) with A w = 0 for the sentence of candidate i, whose output is o (width,)."""
        score = (self.k[:, others] @ self.q[:, i, :, None])[..., 0] / self.q.shape[2] ** 0.5  # (heads, others)
        e = score.softmax(1)
        A: Tensor = e[:, None] * (self.v[:, others].mT - o.reshape(len(self.q), -1, 1))
        return A.flatten(0, 1)

    def sentence(self, focus: int, outputs: dict[int, Tensor], most: int) -> tuple[int, ...] | None:
        """The sentence of the candidate `focus`: its members among those with known outputs, then whoever fills the gaps; None
        where there are more than `most` of these."""
        ids, places = self.pairs.ids, self.pairs.places
        others, together = torch.tensor(list(outputs)), [focus]
        for turn in range(TURNS):
            sure = torch.isin(others, torch.tensor(together))
            w = members([self.system(i, outputs[i], others) for i in together], sure)
            likely = self._one_per_place(others, w, focus)
            # An output may be that of the same token in another sentence: those whose equations are explained best go on.
            rest = {i: _unexplained(self.system(i, outputs[i], others), w) for i in likely if i in outputs}
            together = sorted(rest, key=lambda i: (i != focus, rest[i]))[:TOGETHER]
            if turn == 0:
                continue
            settled = {int(places[i]) for i, weight in likely.items() if turn == 1 or abs(weight - 1) < UNSURE}
            closed = any(int(ids[i]) == self.close and int(places[i]) in settled for i in likely)
            gaps = sorted(set(range(max(settled) + (1 if closed else 1 + BEYOND))) - settled)
            if not gaps:
                break
            if len(gaps) > most:
                return None
            fillers = torch.isin(places, torch.tensor(gaps)).nonzero()[:, 0]
            others = torch.unique(torch.cat([torch.tensor(list(likely)), fillers]))
        return self._rounded(list(likely), focus)

    def _one_per_place(self, others: Tensor, w: Tensor, focus: int) -> dict[int, float]:
        """The members and their weights: the best of each position with more than half a membership, and the focus."""
        best: dict[int, tuple[float, int]] = {}
        for i, weight in zip(others.tolist(), w.tolist(), strict=True):
            place = int(self.pairs.places[i])
            if weight > best.get(place, (0.5, 0))[0]:
                best[place] = (weight, i)
        best[int(self.pairs.places[focus])] = (1.0, focus)
        return {i: weight for weight, i in best.values()}

    def _rounded(self, likely: Sequence[int], focus: int) -> tuple[int, ...]:
        """The members up to the closing token behind the focus; a position without one takes its likeliest candidate."""
        ids, places = self.pairs.ids, self.pairs.places
        member, tokens = {int(places[i]): int(ids[i]) for i in likely}, list[int]()
        for place in range(max(member) + 1):
            tokens.append(member[place] if place in member else int(ids[places == place][0]))
            if tokens[-1] == self.close and place >= int(places[focus]):
                break
        return tuple(tokens)


def members(systems: Sequence[Tensor], sure: Tensor) -> Tensor:
    """w (others,) >= 0 with A w ~ 0 for every system A (width, others), and w = 1 where it is sure (others,) bool."""
    from scipy.optimize import nnls

    A = torch.cat(list(systems))
    constant = A[:, sure].sum(1, keepdim=True)
    R = torch.linalg.qr(torch.cat([A[:, ~sure], constant], 1), mode="r").R
    w = torch.ones(A.shape[1], dtype=torch.float64)
    w[~sure] = torch.from_numpy(nnls(R[:, :-1].numpy(), -R[:, -1].numpy())[0])
    return w


def _unexplained(A: Tensor, w: Tensor) -> float:
    """How far equations A w = 0 are from holding, relative to their terms."""
    terms = A * w.double()
    return float(terms.sum(1).norm() / terms.norm())


def assemble(
    judge: Judge, pairs: Pairs, path: Path | None, *, batch_size: int | None, budget: int, on_step: OnStep | None = None
) -> list[Sentence]:
    """The sentences of the batch: those that pass first, then the nearest guesses, up to the batch size where it is known.

    pairs: likeliest first. path: from the attention's output to the end of the block; None where that was not released.
    """
    only = pairs.only_sentence()
    if only is not None:
        alone = judge.verdict(only)
        if alone.passes or path is None or batch_size == 1:
            return [alone]
    if path is None:
        return []
    choices, attention = pairs.by_place(), Attention.of(judge, pairs)
    outputs, judged = dict[int, Tensor](), dict[tuple[int, ...], Sentence]()
    parts = torch.split(torch.arange(len(pairs)), AT_ONCE)
    for number, part in enumerate(parts, 1):
        o, near = path.outputs(pairs.x[part])
        outputs |= {int(i): output for i, output, sure in zip(part, o, near, strict=True) if bool(sure)}
        proposed, passing = Counter[tuple[int, int]](), [s for s in judged.values() if s.passes]
        for focus in outputs:
            place, token = int(pairs.places[focus]), int(pairs.ids[focus])
            covered = any(sentence.tokens[place : place + 1] == (token,) for sentence in passing)
            if covered or place == 0 or proposed[place, token] >= TWICE:
                continue
            tokens = attention.sentence(focus, outputs, GAPS if number < len(parts) else len(choices))
            proposed.update(enumerate(tokens or ()))
            if tokens is None or tokens in judged:
                continue
            judged[tokens] = judge.verdict(tokens)
            if judged[tokens].passes:
                passing.append(judged[tokens])
                if len(passing) == batch_size:
                    return passing
        if on_step is not None:
            on_step(number, len(parts), 1 - len(passing) / (batch_size or max(len(passing), 1)))
    for guess in [s for s in _best(list(judged.values()), batch_size) if not s.passes]:
        better = judge.corrected(guess.tokens, choices, budget)
        judged[better.tokens] = better
    return _best(list(judged.values()), batch_size)


def _best(judged: Sequence[Sentence], batch_size: int | None) -> list[Sentence]:
    """Those that pass, then as many guesses as are missing: the nearest that share less than half of their tokens' places
    with any before, then the nearest of the rest."""
    passing, distinct = [s for s in judged if s.passes], list[Sentence]()
    guesses = sorted((s for s in judged if not s.passes), key=lambda guess: guess.mean)
    missing = max((batch_size or 0) - len(passing), 0)
    for guess in guesses:
        if len(distinct) < missing and all(_overlap(guess, other) < 0.5 for other in [*passing, *distinct]):
            distinct.append(guess)
    return passing + (distinct + [guess for guess in guesses if guess not in distinct])[:missing]


def _overlap(a: Sentence, b: Sentence) -> float:
    return sum(map(int.__eq__, a.tokens, b.tokens)) / max(len(a.tokens), 1)

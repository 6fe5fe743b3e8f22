"""The words behind a published LoRA adapter whose start is known, by row-sparse recovery over the vocabulary. This is
our own attack; the pursuit is that of Davies and Eldar (2012, arXiv:1004.4529, rank-aware order recursive pursuit).

Sees      Observation of a language model with an Adapter as its release, trained by SGD, with or without momentum, for
          any number of steps in any batches; the start of its factors A, given or recovered from a seed; the change
          of A of the first block's query, key and value (any of them). Labels are tried
Recovers  of one text in a model with positions the text, special tokens and length included; else the distinct words of
          all texts that it was trained on, each with the chance that a random vector would fit as well
Solves    every row of A_T - A_0 is a sum of inputs x of the first block. Stacked over the modules that share them,
          Y = (A_T - A_0)^T = E X (width, columns), with E the inputs of all tokens at all positions, and few rows of X
          are not zero. Until rounding is left: R = Y - P_S Y, U = its singular vectors above rounding, and the atom e
          with the largest |U^T e|^2 / |e - P_S e|^2 joins S
Differs   DAGER asks whether a token lies in the span, which tells nothing once tokens fill the columns. Here there may
          be more: below (width + columns) / 2 no others explain Y (Davies and Eldar, section II), and further on others
          would have to be met by chance. Of several texts an atom (token, position) cannot be told from others, because
          (a, p) - (a, q) - (b, p) + (b, q) is nearly nothing. But x is proportional to u_a + v_p, shifted: E's columns
          are then the embeddings u_a of words and v_p of positions, and which of them stand together is not asked
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gradleak.attacks.attack import check_sees
from gradleak.attacks.dager.spans import EDGE
from gradleak.attacks.dager.vocabulary import Embeddings
from gradleak.attacks.reconstruction import Outcome, Reconstruction
from gradleak.attacks.search.descend import OnStep
from gradleak.errors import NotObserved
from gradleak.modalities.language_models import LanguageArchitecture
from gradleak.observations.adapter import Adapter
from gradleak.observations.observation import TextObservation
from gradleak.observations.release import Release
from gradleak.observations.tensors import rounding
from gradleak.observations.transformer import layout_of

EXACT = 1e-4  # of a replay: rounding, which steps amplify. One other token leaves ten times that (test_sparse_words.py)
ALIKE = 1e-3  # of an atom's squared length: if less is left outside S, float32 would divide by rounding
SMALLEST = 1e-300  # chance that float64 tells from none


@dataclass(frozen=True)
class Dictionary:
    """Atoms (row, place): x = inverse[row, place] (rows[row] + places[place]) + shift.

    rows (n, width), places (m, width), inverse (n, m), shift (width,)  float32, for the search
    exact  the atom of a row at a place (width,), in float64
    fixed  directions (width, k), orthonormal, that Y holds besides the atoms
    """

    rows: Tensor
    places: Tensor
    inverse: Tensor
    shift: Tensor
    exact: Callable[[int, int], Tensor]
    fixed: Tensor

    @classmethod
    def pairs(cls, e: Embeddings, longest: int) -> "Dictionary":
        """The first block's inputs of every token at every position before `longest`."""
        places, none = e.places[:longest], torch.zeros(len(e.shift), 0, dtype=torch.float64)
        inverse = 1 / e.deviation(e.tokens, places)

        def exact(token: int, place: int) -> Tensor:
            return e.inputs(torch.tensor([token]), torch.tensor([place]))[0]

        return cls(e.through(e.tokens), e.through(places), inverse, e.shift, exact, none)

    @classmethod
    def words(cls, e: Embeddings, longest: int) -> "Dictionary":
        """What every token, and behind them what every position before `longest`, adds to the mean input.

        The means are left out of the atoms, or all would share them, and any would fit a little. An input is
        proportional to the sum of a token's atom, a position's, and what is fixed: the means, and the shift.
        """
        mean, middle = e.tokens.mean(0), e.places[:longest].mean(0)
        rows = e.through(torch.cat([e.tokens - mean, e.places[:longest] - middle]))
        common = torch.stack([e.shift, e.through((mean + middle)[None])[0]], dim=1).double()
        fixed = torch.linalg.qr(common[:, common.any(0)])[0]
        nowhere, ones = torch.zeros(1, rows.shape[1]), torch.ones(len(rows), 1)
        return cls(rows, nowhere, ones, nowhere[0], lambda row, _: rows[row].double(), fixed)

    def lengths(self, W: Tensor | None = None) -> Tensor:
        """|W x|^2 of all atoms, for W (k, width), or the identity: (n, m)."""
        A, P, b = (part if W is None else part @ W.T for part in (self.rows, self.places, self.shift))
        squares = torch.addmm(A.square().sum(1)[:, None] + P.square().sum(1), A, P.T, alpha=2) * self.inverse
        return (squares + 2 * ((A @ b)[:, None] + P @ b)) * self.inverse + b.square().sum()

    def columns(self, atoms: list[tuple[int, int]]) -> Tensor:
        """What is fixed, and the atoms behind it: (width, k + atoms), float64."""
        return torch.cat([self.fixed, *(self.exact(*atom)[:, None] for atom in atoms)], dim=1)


@dataclass(frozen=True)
class Found:
    """Atoms, the most significant first.

    chance     that among as many random vectors as the dictionary has atoms one would fit as well as the last of these
    explained  whether what they leave is rounding
    left       |Y - P_S Y| / |Y|
    """

    atoms: list[tuple[int, int]]
    chance: float
    explained: bool
    left: float


@dataclass(frozen=True, kw_only=True)
class SparseWords:
    """Two numbers.

    chance   that an adapter which holds no word of the vocabulary shows one nevertheless, between 0 and 1
    longest  positions that are tried where several texts were trained on, at least 1; one text may have half as many
             tokens as width and columns
    """

    sees: ClassVar[tuple[type[Release], ...]] = (Adapter,)
    modality: ClassVar[str] = LanguageArchitecture.modality

    chance: float = 0.01
    longest: int = 128

    def __call__(
        self, observation: TextObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """Raises NotObserved where the start of the factors A is unknown, where they did not move or not by SGD, and
        where the first block's inputs cannot be listed."""
        check_sees(self, observation)
        Y, noise = changes(observation)
        embeddings, placed = Embeddings.of(observation.model), layout_of(observation.model).placed
        if placed and observation.batch_size in (None, 1):
            pairs = Dictionary.pairs(embeddings, min(len(embeddings.places), sum(Y.shape) // 2))
            found = pursue(pairs, Y, noise, self.chance, on_step)
            text = sorted(found.atoms, key=lambda atom: atom[1])
            if text and [place for _, place in text] == list(range(len(text))):
                return _text(observation, tuple(token for token, _ in text), found)
        found = pursue(Dictionary.words(embeddings, self.longest if placed else 1), Y, noise, self.chance, on_step)
        return _bag(found, len(embeddings.tokens), Y.shape, self.chance)


def changes(observation: TextObservation) -> tuple[Tensor, float]:
    """(Y (width, columns) in float64: how the factors A of the first block's query, key and value changed, as columns;
    the largest singular value that rounding leaves in it).

    Every step rounds A to float32, and the file rounds it to its precision, both independently for each number: such a
    matrix has singular values up to deviation (sqrt width + sqrt columns), the edge of the Marchenko-Pastur law. An
    unknown number of steps is taken to be one. Raises NotObserved as SparseWords does.
    """
    release, model = observation.adapter, observation.model
    if release.gradient:
        raise NotObserved("The gradient of the factors was released, not what training made of them: dager reads it.")
    if release.origin == "unknown":
        raise NotObserved("Where A started is unknown: the adapter before training, or its seed, is needed.")
    if release.recipe is not None and release.recipe.optimizer not in ("sgd", "momentum"):
        raise NotObserved(f"{release.recipe.optimizer} scales every number by itself: A's change is no sum of inputs.")
    names = [f"{module}.lora_A" for module in layout_of(model).queries(0)]
    if not (names := [name for name in names if name in observation.released]):
        raise NotObserved("No change of a factor A of the first block's query, key or value was released.")
    Y = torch.cat([observation.released[name].flatten(1) for name in names]).double().T
    if not bool(Y.any()):
        raise NotObserved("The factors A have not moved, as after one step from B = 0: dager reads the factors B.")
    ends = torch.cat([release.ended(observation.released)[name].flatten(1) for name in names])
    variance = rounding(ends, torch.float32).square().mean() * (release.recipe.steps if release.recipe else 1)
    if observation.precision not in ("float32", "float64"):
        variance = variance + rounding(ends, getattr(torch, observation.precision)).square().mean()
    edge = float(variance.sqrt()) * (Y.shape[0] ** 0.5 + Y.shape[1] ** 0.5)
    # the inputs themselves are rounded by the victim's forward pass
    return Y, EDGE * edge + torch.finfo(torch.float32).eps * float(torch.linalg.matrix_norm(Y, 2))


def pursue(dictionary: Dictionary, Y: Tensor, noise: float, chance: float, on_step: OnStep | None = None) -> Found:
    """Atoms whose span holds Y (width, columns), up to singular values of `noise`; only those that are significant.

    It ends where noise is left, or where the best atom fits no better than the best of as many random vectors would
    with a probability of `chance`.
    """
    width, count, basis, atoms = len(Y), dictionary.inverse.numel(), dictionary.fixed, list[tuple[int, int]]()
    total = dictionary.lengths()
    least = (ALIKE * total).clamp_min(1e-30)  # an embedding may be zero, as a padding token's is
    outside = total - dictionary.lengths(basis.T.float())
    while basis.shape[1] < width:
        U, values, _ = torch.linalg.svd(_without(basis, Y), full_matrices=False)
        if not (signal := int((values > noise).sum())):
            break
        share = dictionary.lengths(U[:, :signal].T.float()) / torch.maximum(outside, least)
        row, place = divmod(int(share.argmax()), share.shape[1])
        x = _without(basis, dictionary.exact(row, place)[:, None])
        captured = (U[:, :signal].T @ x).square().sum() / x.square().sum()
        if float(_random(1 - captured, signal, width - basis.shape[1])) * count > chance:
            break
        atoms.append((row, place))
        basis = torch.cat([basis, F.normalize(x, dim=0)], dim=1)
        outside -= dictionary.lengths(basis[:, -1:].T.float())
        if on_step is not None:
            on_step(len(atoms), width, float(values.norm() / Y.norm()))
    return _significant(dictionary, atoms, Y, noise, chance)


def _significant(dictionary: Dictionary, atoms: list[tuple[int, int]], Y: Tensor, noise: float, chance: float) -> Found:
    """Drops the least significant atom until all are significant.

    Without atom i, what is left is R + v y^T, with R what all leave, v (width,) the part of the atom that is outside
    the others, of length 1, and y = Y^T v. The singular vectors of this above noise capture a share of v, which is
    compared with their share of a random vector.
    """
    while True:
        E, k = dictionary.columns(atoms), dictionary.fixed.shape[1]
        R = _without(torch.linalg.qr(E)[0], Y)
        explained, left = float(torch.linalg.matrix_norm(R, 2)) <= noise, float(R.norm() / Y.norm())
        if not atoms:
            return Found([], 1.0, explained, left)
        y = F.normalize(torch.linalg.pinv(E), dim=1)[k:] @ Y  # (atoms, columns)
        values, vectors = torch.linalg.eigh(R.T @ R + y[:, :, None] * y[:, None, :])
        above = values > noise**2
        shares = ((y[:, None, :] @ vectors)[:, 0].square() / values).masked_fill(~above, 0).sum(1)
        chances = _random(1 - shares, above.sum(1).clamp_min(1), len(Y) - E.shape[1] + 1) * dictionary.inverse.numel()
        order = sorted(range(len(atoms)), key=lambda i: (float(chances[i]), -float(y[i].norm())))
        atoms = [atoms[i] for i in order]
        if float(chances.max()) <= chance:
            return Found(atoms, max(float(chances.max()), SMALLEST), explained, left)
        atoms.pop()


def _random(left: Tensor, directions: Tensor | int, width: int) -> Tensor:
    """The probability that so many directions of a space of `width` leave at most this share of a random vector, from
    0 to 1: what they leave follows Beta((width - directions) / 2, directions / 2)."""
    from scipy.special import betainc

    k = torch.as_tensor(directions).double()
    rest = (width - k).clamp_min(1e-9)  # no dimension is left: 1
    return torch.as_tensor(betainc((rest / 2).numpy(), (k / 2).numpy(), left.clamp(0, 1).numpy()))


def _without(basis: Tensor, Y: Tensor) -> Tensor:
    """Y minus its part in the span of orthonormal columns; twice, for the rounding of the first time."""
    for _ in range(2):
        Y = Y - basis @ (basis.T @ Y)
    return Y


def _text(observation: TextObservation, tokens: tuple[int, ...], found: Found) -> Reconstruction:
    """One text, replayed with every label where its training is known."""
    architecture, release, labels = observation.model.architecture, observation.adapter, [observation.labels]
    end = architecture.tokenizer.eos_token_id if architecture.task == "causal-lm" else None
    value = (tokens if end is None else (*tokens, end),)  # what is only predicted leaves no input
    if labels[0] is None and architecture.task == "classification":
        labels = [torch.tensor([label]) for label in range(architecture.classes)]
    residual, label, proven, evidence = found.left, None, False, "not replayed"
    if release.recipe is not None and architecture.task != "masked-lm":
        residual, number = min((observation.residual(value, y), i) for i, y in enumerate(labels))
        label, proven = labels[number], residual <= EXACT
        evidence = f"its training, replayed, differs from the release by {residual:.1e}"
    rest = "to rounding" if found.explained else f"to {found.left:.1e}, and no other token is significant"
    status = (
        f"One token a position explains the changes of A {rest}; a random one would stand among them with a chance of "
        f"at most {found.chance:.0e}; {evidence}{'' if proven else ': likely, not proven'}."
    )
    outcome = Outcome.SOLVED if proven else Outcome.CLOSE if found.explained else Outcome.GUESSED
    return Reconstruction(value, label, residual, status, outcome, (proven,), tuple(sorted(set(tokens))))


def _bag(found: Found, vocabulary: int, shape: torch.Size, chance: float) -> Reconstruction:
    """The distinct words of all texts as one sentence, the most significant first."""
    words = tuple(row for row, _ in found.atoms if row < vocabulary)
    if not words:
        status = (
            f"No word is significant at {chance:g} in {shape[1]} columns of changes of A: another start, dropout, "
            "more words than the width, or another model would explain that."
        )
        return Reconstruction((), None, 1.0, status, Outcome.NOTHING)
    rest = "they explain the changes of A to rounding" if found.explained else f"{found.left:.1e} is unexplained"
    status = (
        f"A bag of words, no text: {len(words)} distinct tokens of all texts, most significant first; a random one "
        f"would stand among them with a chance of at most {found.chance:.0e}; {rest}. Nothing tells their order."
    )
    return Reconstruction((words,), None, found.left, status, Outcome.GUESSED, (False,), tuple(sorted(set(words))))

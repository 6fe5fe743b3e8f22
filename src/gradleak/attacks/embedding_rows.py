"""The words of a text, read off the gradient of the embeddings, and their order off that of the positions. That rows of an embedding's
gradient name the words of a batch is old (Melis et al. 2019, arXiv:1805.04049, section 4.1); the order, and the floor, are ours.

Sees      Gradient or Update of a language model whose token embeddings were trained and shared; for the order of one text, learned
          positions too. Labels are tried
Recovers  the words of a batch, and one text in its order
Solves    row a of dL/dE is the sum of delta_t over the tokens t that are a, and zero for all other words; row p of dL/dP is delta_p.
          A word is there if its row stands out of what most rows are: of zero, or of the noise of a defense, whose size they
          show. The word at position p is the one whose row points most the way of the position's
Differs   nothing is searched; several rounds of a client are read as one; noise, pruning, rounding and signs leave the difference between a row and none
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradleak.attacks.attack import check_sees
from gradleak.attacks.nearest_label import nearest_label
from gradleak.attacks.reconstruction import Outcome, Reconstruction, outcome_of
from gradleak.attacks.search.descend import OnStep
from gradleak.errors import NotObserved
from gradleak.modalities.language_models import LanguageArchitecture
from gradleak.observations.model import LanguageModel
from gradleak.observations.observation import TextObservation
from gradleak.observations.release import Release
from gradleak.observations.releases import Gradient, Update
from gradleak.observations.transformer import layout_of

# Deviations of a row's energy above the median of all rows, most of which are in no batch: the largest of 30,000 Gaussian rows lies at 4.2, and the energy of a row
# of 64 numbers or more has a tail little longer than that.
ABOVE = 8.0


@dataclass(frozen=True, kw_only=True)
class EmbeddingRows:
    """No hyperparameters: a closed form."""

    sees: ClassVar[tuple[type[Release], ...]] = (Gradient, Update)
    modality: ClassVar[str] = LanguageArchitecture.modality
    joint: ClassVar[bool] = True

    def __call__(
        self, observation: TextObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """Raises NotObserved where the embeddings' gradient was not released. An output layer that shares it fills every row: then what
        stands out is likely, and the replay says whether it is right."""
        check_sees(self, observation)
        each = [tables(one) for one in observation.alone().values()]
        placed = [(words, places) for words, places in each if places is not None]
        tokens = (standing([(words, words) for words, _ in each]) > ABOVE).nonzero()[:, 0]
        bag = tuple(tokens.tolist())
        if not bag:
            status = "No row of the embeddings' gradient stands out: noise is all there is."
            return Reconstruction((), None, 1.0, status, Outcome.NOTHING)
        seen = standing([(places, words) for words, places in placed]) if placed else torch.empty(0)
        there = (seen > ABOVE).nonzero()[:, 0]
        if not len(there) or observation.batch_size not in (None, 1):
            why = "of several texts" if len(there) else "without a gradient of positions"
            status = f"A bag of words: {len(bag)} have rows of their own in the embeddings' gradient; {why}, none tells their order."
            return Reconstruction((), None, 1.0, status, Outcome.GUESSED, (), bag)
        turned = (F.normalize(places[there], dim=1) @ F.normalize(words[tokens], dim=1).T for words, places in placed)
        alike = torch.stack([*turned]).sum(0)  # (places, tokens)
        text = tokens[alike.argmax(1)]
        if observation.model.architecture.task == "masked-lm":
            residual, label = 1.0, None  # what was masked is unknown: nothing can be replayed
        else:
            residual, label = nearest_label(observation, text)
        outcome = outcome_of(residual) if residual < 1 else Outcome.GUESSED
        proven = outcome is Outcome.SOLVED and observation.defenses == ()
        status = (
            f"{len(bag)} words and {len(there)} positions stand out of the embeddings' gradient; the text explains the release to "
            f"{residual:.2g} of its size."
        )
        return Reconstruction((tuple(text.tolist()),), label, residual, status, outcome, (proven,), bag)


def tables(observation: TextObservation) -> tuple[Tensor, Tensor | None]:
    """The gradients of token and of position embeddings (rows, width), the latter None where there are none."""
    gradient, (tokens, positions) = observation.as_gradient(), embeddings_of(observation.model)
    if tokens not in gradient:
        raise NotObserved(
            "The gradient of the token embeddings was not released: they were not trained, or not shared."
        )
    places = gradient.get(positions) if positions is not None else None
    return gradient[tokens].double(), None if places is None else places.double()


def embeddings_of(model: LanguageModel) -> tuple[str, str | None]:
    """The names of the weights of token and of learned position embeddings: the table with a row for each word, and the one with a row for
    each position."""
    vocabulary, longest = model.architecture.config.vocab_size, layout_of(model).positions
    found = [(name, m) for name, m in model.module.named_modules() if isinstance(m, nn.Embedding)]
    words = [(name, m.embedding_dim) for name, m in found if m.num_embeddings >= vocabulary]
    if not words:
        raise NotObserved("The model has no table with a row for each word.")
    (name, width), *_ = words
    places = [
        n for n, m in found if n != name and m.embedding_dim == width and longest <= m.num_embeddings < vocabulary
    ]
    return f"{name}.weight", f"{places[0]}.weight" if places else None


def standing(rounds: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """How far the energy of each row (n,) stands above that of most words, in deviations of it; over several rounds the sum of that, whose
    own deviation is the root of their number. rounds: (rows (n, width), the words' rows) of each, one or more."""
    above = []
    for rows, words in rounds:
        each = words.square().sum(1)
        median = each.median()
        deviation = (
            1.4826 * (each - median).abs().median()
        )  # that of a Gaussian with such quartiles; 0 where there is no noise
        above.append((rows.square().sum(1) - median) / deviation.clamp_min(torch.finfo(each.dtype).tiny))
    total: Tensor = torch.stack(above).sum(0) / len(above) ** 0.5
    return total

"""Texts that the spans do not tell apart, told apart by what each would have released."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gradleak.attacks.dager.arrangement import passing
from gradleak.attacks.dager.judge import Judge, Sentence
from gradleak.attacks.reconstruction import SOLVED, Outcome
from gradleak.observations.observation import TextObservation

MOST = 200  # replays


def nearest_label(observation: TextObservation, text: Iterable[int] | Tensor) -> tuple[float, Tensor | None]:
    """The residual of the text with the label that explains most, and that label; of a language model without one."""
    tokens: Any = [tuple(map(int, text))]
    if observation.model.architecture.task != "classification":
        return observation.residual(tokens, None), None
    classes = observation.model.architecture.config.num_labels
    tried = [torch.tensor([label]) for label in range(classes)] if observation.labels is None else [observation.labels]
    return min(((observation.residual(tokens, label), label) for label in tried), key=lambda pair: pair[0])


def told_apart(observation: TextObservation, judge: Judge, sentence: Sentence) -> Sentence:
    """Of texts that all pass, the one whose replay is nearest: from this one on, a move at a time. It is proven where the replay leaves
    nothing of the release."""
    if observation.model.architecture.task == "masked-lm":
        return sentence  # what was masked is unknown, so nothing can be replayed
    least, tokens = nearest_label(observation, sentence.tokens)[0], sentence.tokens
    seen, tried = {tokens}, 1
    while least > SOLVED and tried < MOST:
        others = [other for other in passing(judge, tokens) if other not in seen][: MOST - tried]
        seen, tried = seen | set(others), tried + len(others)
        nearest, other = min(((nearest_label(observation, o)[0], o) for o in others), default=(least, tokens))
        if not nearest < least:
            break
        least, tokens = nearest, other
    found = judge.verdict(tokens)
    solved = least <= SOLVED and found.passes
    return Sentence(found.tokens, found.distance, found.excess, Outcome.SOLVED if solved else Outcome.CLOSE, found.mean)

"""Texts that the spans do not tell apart, told apart by what each would have released."""

from gradleak.attacks.dager.arrangement import passing
from gradleak.attacks.dager.judge import Judge, Sentence
from gradleak.attacks.nearest_label import nearest_label
from gradleak.attacks.reconstruction import SOLVED, Outcome
from gradleak.observations.observation import TextObservation

MOST = 200  # replays


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

"""What if the attacker assumes another depth or width? GIT laid out like another model, on the same pairs of LeNet.

An open question of the GIT paper (its second). The gradients are the true model's; only the generator's layout is wrong.
"""

from collections.abc import Iterator
from dataclasses import replace

from gradleak.studies.learned_victims import ALONE, LAYOUTS, Trial, lenet, study_of_trials
from gradleak.studies.study import Size


def settings(data: str, size: Size) -> Iterator[Trial]:
    """Each layout, the true one first, and the closed form, which has none."""
    git = lenet(size, 2)
    yield from (replace(git, method=layout) for layout in list(LAYOUTS)[: 3 if size == "smoke" else None])
    yield replace(git, method=ALONE, epochs=0)


STUDY = study_of_trials(
    name="learned-inversion-wrong-layout",
    question="Must a trained generator be laid out like the model whose gradients it inverts?",
    settings=settings,
)

"""Any reconstruction as the start of any search."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from gradleak.attacks import ATTACKS
from gradleak.attacks.reconstruction import Outcome, Reconstruction
from gradleak.attacks.search.start import Given, begin
from gradleak.audit.metrics import psnr_db
from gradleak.errors import BadInput
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import load
from gradleak.observations.model import Model
from gradleak.observations.observation import PictureObservation
from gradleak.victims.gradient import capture_gradient

MLP = Architecture("mlp", (1, 8, 8), 10)
ROWS = (3, 1, 2)
SEARCHES: dict[str, dict[str, Any]] = {
    "inverting-gradients": {"steps": 1, "tv_weight": 0.0},
    "dlg": {"evaluations": 1, "rounds": 0, "restarts": 1},
    "idlg": {"evaluations": 1, "rounds": 0, "restarts": 1},
    "map-inversion": {"evaluations": 1},
}
SAMPLERS = ("red-diff", "sds", "dps", "daps")


def observed(rows: tuple[int, ...], reveal: bool = True) -> tuple[PictureObservation, Reconstruction]:
    """A perceptron's gradient of these digits, and the truth as a reconstruction of it."""
    pictures = load("digits", indices=rows)
    model = Model.of(MLP.build(0), MLP)
    gradient = capture_gradient(model, pictures, reveal_labels=reveal)[0]
    return gradient, Reconstruction(pictures.images, pictures.labels, 0.0, "the truth", Outcome.SOLVED)


def test_every_search_takes_a_start() -> None:
    """Searches; samplers take one too, and leave it by as much as the prior allows."""
    assert {*SEARCHES, *SAMPLERS} == {
        name for name, kind in ATTACKS.items() if "start" in {f.name for f in fields(kind)}
    }


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_that_starts_at_the_truth_stays_there(name: str) -> None:
    """One evaluation of a search moves no pixel far, and none of them comes near the truth by itself in one."""
    gradient, truth = observed((3,))
    attack = ATTACKS[name](**SEARCHES[name])
    cold, warm = (
        a(gradient, generator=torch.Generator().manual_seed(0)) for a in (attack, replace(attack, start=Given(truth)))
    )
    assert float(psnr_db(warm.value, truth.value)) > 30 > 20 > float(psnr_db(cold.value, truth.value))


def test_images_are_put_in_the_order_of_the_labels_that_the_search_has() -> None:
    gradient, truth = observed(ROWS)
    assert truth.labels is not None
    shuffled = torch.tensor([2, 0, 1])
    other = replace(truth, value=truth.value[shuffled], labels=truth.labels[shuffled])
    assert len(set(truth.labels.tolist())) == 3
    found = begin(Given(other), [gradient], [truth.labels], torch.Generator())
    assert torch.equal(found[0], truth.value)


def test_a_start_of_another_shape_is_refused() -> None:
    gradient, truth = observed((3,))
    assert truth.labels is not None
    for images in (truth.value[..., 1:], truth.value.expand(2, -1, -1, -1)):
        with pytest.raises(BadInput, match="cannot start from"):
            begin(Given(replace(truth, value=images)), [gradient], [truth.labels], torch.Generator())

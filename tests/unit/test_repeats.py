"""One attack under several seeds: the run that explains most is kept, and all are told."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from gradleak.attacks.reconstruction import Outcome, Reconstruction
from gradleak.audit.loop import audit
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import load, public_pool
from gradleak.observations.model import Model
from gradleak.observations.releases import Gradient
from gradleak.victims.gradient import capture_gradient

MLP = Architecture("mlp", (1, 8, 8), 10)
RESIDUALS = {3: 0.5, 4: 0.1, 5: float("nan")}  # by seed


@dataclass(frozen=True)
class Drawn:
    """Returns a picture of one brightness, which its seed draws; explains as much as RESIDUALS says.

    fixed  whether it draws nothing
    """

    fixed: bool = False
    sees: ClassVar[tuple[Any, ...]] = (Gradient,)
    modality: ClassVar[str] = Architecture.modality

    def __call__(self, observation: Any, *, generator: torch.Generator, on_step: object = None) -> Reconstruction:
        SEEDS.append(generator.initial_seed())
        value = torch.full((1, 1, 8, 8), 0.5 if self.fixed else float(torch.rand((), generator=generator)))
        return Reconstruction(value, None, RESIDUALS[generator.initial_seed()], "Done.", Outcome.STUCK)


SEEDS: list[int] = []


@pytest.fixture
def captured() -> Any:
    SEEDS.clear()
    return capture_gradient(Model.of(MLP.build(0), MLP), load("digits", "test", indices=[3]))


def run(captured: Any, attack: Drawn, secret: bool, repeats: int = 3) -> Any:
    observation, kept = captured
    pool = public_pool("digits", "train", shape=(1, 8, 8), limit=150)
    about: Any = {"secret": kept if secret else None, "seed": 3, "repeats": repeats}
    (done,) = audit(observation, {"drawn": attack}, pool, **about)
    return done


@pytest.mark.parametrize("secret", [True, False])
def test_the_seed_that_explains_most_is_kept_and_all_are_told(captured: Any, secret: bool) -> None:
    """Nobody needs the secret to choose by the residual, so an attacker would; what is not a number is no explanation."""
    done = run(captured, Drawn(), secret)
    assert SEEDS[:3] == [3, 4, 5]
    assert done.result["residual"] == 0.1
    assert [one["seed"] for one in done.result["repeats"]] == [3, 4, 5]
    told = [one["scores"].get("psnr_db") for one in done.result["repeats"]]
    if secret:
        brightness = [float(torch.rand((), generator=torch.Generator().manual_seed(seed))) for seed in (3, 4, 5)]
        truth = captured[1].inputs[0]
        by_hand = [-10 * float(torch.log10((truth - value).square().mean())) for value in brightness]
        assert told == pytest.approx(by_hand, abs=1e-4)
        assert done.result["scores"]["psnr_db"] == pytest.approx(by_hand[1:2], abs=1e-4)
    else:
        assert told == [None] * 3


def test_an_attack_that_draws_nothing_runs_twice_at_most(captured: Any) -> None:
    done = run(captured, Drawn(fixed=True), secret=False)
    assert SEEDS == [3, 4]
    assert done.result["residual"] == RESIDUALS[3]
    assert "repeats" not in done.result


def test_one_seed_is_no_repeat(captured: Any) -> None:
    assert "repeats" not in run(captured, Drawn(), secret=False, repeats=1).result

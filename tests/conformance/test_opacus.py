"""Steps of a real PrivacyEngine, observed: they replay, the noise is what was said, and training is as without us."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from gradleak.audit.checks import REPLAY_TOLERANCE
from gradleak.errors import BadInput, NotObserved
from gradleak.formats.secret_file import Secret
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures, load
from gradleak.observations.mechanism import Mechanism
from gradleak.observations.tensors import flatten
from gradleak.report import record
from pages import run_page

opacus = pytest.importorskip("opacus", reason="gradleak[opacus] is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),  # the first layer's input needs no gradient
    pytest.mark.filterwarnings("ignore:Optimal order is the"),  # the RDP accountant, at little noise
]
ARCHITECTURE = Architecture("lenet", (3, 16, 16), 10)


def pictures(count: int) -> Pictures:
    return load("embedded", "test", indices=range(count), resize=(16, 16))


def private(sigma: float, count: int, clip: float = 1.0, **settings: Any) -> tuple[Any, ...]:
    """(engine, model, optimizer, loader) over so many pictures, in one batch."""
    data, net = pictures(count), ARCHITECTURE.build(0)
    engine = opacus.PrivacyEngine(accountant="rdp")
    loader: Any = DataLoader(TensorDataset(data.images, data.labels), batch_size=count)
    given = {"noise_multiplier": sigma, "max_grad_norm": clip, "poisson_sampling": False, **settings}
    generator = torch.Generator().manual_seed(0)
    return engine, *engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), 0.1),
        data_loader=loader,
        noise_generator=generator,
        **given,
    )


def step(model: Any, optimizer: Any, loader: Any) -> None:
    for images, labels in loader:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@pytest.mark.parametrize("clip", [1.0, 1e4])
@pytest.mark.parametrize("count", [1, 3])
def test_a_step_without_noise_replays(count: int, clip: float) -> None:
    from gradleak.integrations.opacus import observe

    engine, model, optimizer, loader = private(0.0, count, clip)
    seen, data = observe(optimizer, model, ARCHITECTURE, engine=engine, batch_size=count), pictures(count)
    step(model, optimizer, loader)
    step(model, optimizer, loader)  # the first is kept, at the parameters before it
    assert seen.observation.residual(data.images, data.labels) < REPLAY_TOLERANCE["float32"]
    assert seen.observation.defenses == ()


def test_the_noise_and_what_was_spent_are_what_opacus_says() -> None:
    from gradleak.integrations.opacus import observe

    engine, model, optimizer, loader = private(0.8, 4, 2.0)
    seen, data = observe(optimizer, model, ARCHITECTURE, engine=engine, delta=1e-4, batch_size=4), pictures(4)
    step(model, optimizer, loader)
    noise = flatten(seen.observation.released) - flatten(seen.observation.simulate(data.images, data.labels))
    # sigma C / E, and the deviation of n numbers is known to 1 / sqrt(2 n): five times that.
    assert float(noise.std()) == pytest.approx(0.8 * 2.0 / 4, rel=5 / math.sqrt(2 * len(noise)))
    rows = {row["item"]: row["detail"] for row in seen.observation.threat_model()}
    assert rows["privacy spent"] == f"epsilon {engine.get_epsilon(1e-4):.3g} at delta 0.0001, so far"
    assert rows["defenses"] == "Gaussian noise of deviation 0.4"
    known = seen.observation.release.privacy()
    assert isinstance(known, Mechanism)  # one batch of all samples: the rate is 1
    assert (known.noise_multiplier, known.sample_rate, known.steps, known.certain) == (0.8, 1.0, 1, 1)
    assert known.delta == 1e-4


def test_training_is_as_without_us() -> None:
    from gradleak.integrations.opacus import observe

    ended = []
    for watched in (True, False):
        engine, model, optimizer, loader = private(0.5, 4)
        if watched:
            observe(optimizer, model, ARCHITECTURE, engine=engine)
        step(model, optimizer, loader)
        step(model, optimizer, loader)
        ended.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ended)


def test_one_private_picture_without_noise_comes_back(tmp_path: Path) -> None:
    """Clipping alone protects nothing: the gradient of one sample keeps its direction."""
    from gradleak.integrations.opacus import audit_to, observe

    engine, model, optimizer, loader = private(0.0, 1)
    seen, data = observe(optimizer, model, ARCHITECTURE, engine=engine, batch_size=1), pictures(1)
    step(model, optimizer, loader)
    written = audit_to(seen.observation, tmp_path, secret=Secret(data.images, data.labels))
    assert written["verdict"]["level"] == "recovered"
    assert {"record.json", "report.html", "leakage.md"} <= {path.name for path in tmp_path.iterdir()}


def test_the_loader_gives_the_secret(tmp_path: Path) -> None:
    """The batch of the step that was observed, and none of those after it; drawn by Poisson sampling too."""
    from gradleak.integrations.opacus import audit_to, observe

    engine, model, optimizer, loader = private(0.0, 2)
    seen = observe(optimizer, model, ARCHITECTURE, engine=engine, batch_size=2)
    with pytest.raises(NotObserved, match="has to step once"):
        _ = seen.secret
    for _ in range(2):
        step(model, optimizer, seen.keeping(loader))
    assert torch.equal(seen.secret.inputs, pictures(2).images)
    written = audit_to(seen.observation, tmp_path, attacks=["analytic"], secret=seen.secret)
    replays = [flag for row in written["results"] for flag in row["flags"] if flag["name"] == "replay"]
    assert [flag["level"] for flag in replays] == ["info"] * len(replays)
    assert replays
    assert observe(optimizer, model, ARCHITECTURE).fed == []


def test_what_is_cut_otherwise_is_refused_and_nothing_is_seen_before_a_step() -> None:
    from gradleak.integrations.opacus import observe

    _, model, optimizer, _ = private(1.0, 2, [1.0] * 8, clipping="per_layer")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="DPPerLayerOptimizer"):
        observe(optimizer, model, ARCHITECTURE)
    _, model, optimizer, _ = private(1.0, 2)
    with pytest.raises(NotObserved, match="has to step once"):
        _ = observe(optimizer, model, ARCHITECTURE).observation


def test_the_lines_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what the page says of them: the recursion is exact (R-GAP, section 3), so that rounding alone is left, far below 1e-4."""
    monkeypatch.chdir(tmp_path)
    engine, model, optimizer, loader = private(0.0, 1)
    given = {"engine": engine, "model": model, "optimizer": optimizer, "loader": loader, "train_one_step": step}
    given |= {"Architecture": Architecture, "Path": Path, "Secret": Secret}
    run_page("opacus", {**given, "images": pictures(1).images, "labels": pictures(1).labels}, tmp_path)
    rows = record.read(tmp_path / "leakage" / "record.json")["results"]
    scores = [row["scores"]["psnr_db"][0] or 0 for row in rows if row["attack"] == "recursive"]
    assert scores[0] > 80

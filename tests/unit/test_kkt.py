"""Trained weights: the hand-made derivatives, the victim's shortcut, the observation on disk, and the attack."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gradleak.attacks.dlg import DLG
from gradleak.attacks.reconstruction import Outcome, Reconstruction
from gradleak.attacks.weights.kkt import KKT
from gradleak.attacks.weights.kkt_search import KKTSearch
from gradleak.attacks.weights.ntk import NTK
from gradleak.attacks.weights.row_space import rank_of, span_of
from gradleak.audit.loop import audit
from gradleak.audit.metrics import ssim
from gradleak.cli.app import main
from gradleak.errors import BadInput, NotObserved
from gradleak.formats.observation_file import load_observation, save_observation
from gradleak.formats.secret_file import Secret
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import load, public_pool
from gradleak.observations.distances import relative_residual
from gradleak.observations.fully_connected import FullyConnected, Target, cone, distance, explained, grams
from gradleak.observations.model import Model
from gradleak.observations.observation import PictureObservation
from gradleak.observations.trained_weights import Weights
from gradleak.studies.rank_against_samples import CHANGE, compared, drawn
from gradleak.studies.trained_adapters import sides
from gradleak.victims.fine_tuning import ALL, All, LowRank, Released, Truncated, fine_tuned
from gradleak.victims.gradient import capture_gradient
from gradleak.victims.weights import FullBatch, first_of_each, publish_weights, train
from oracles import gradient_descent_by_autograd, kkt_distance_by_autograd, labels_of

BINARY = Architecture("homogeneous1000", (1, 8, 8), 2)


def network(outputs: int, biases: tuple[bool, ...], seed: int = 0) -> FullyConnected:
    """8-15-12-outputs in float64."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (8, 15, 12, outputs)
    weights = [torch.randn(sizes[k + 1], sizes[k], generator=generator).double() * 0.3 for k in range(3)]
    shifts = [torch.randn(sizes[k + 1], generator=generator).double() if on else None for k, on in enumerate(biases)]
    ones = torch.ones(8).double()
    return FullyConnected(
        tuple(weights), tuple(shifts), ("0.weight", "2.weight", "4.weight"), 0 * ones, ones, outputs == 1
    )


def samples(n: int, outputs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, 8, generator=generator).double(), torch.randn(n, outputs, generator=generator).double()


@cache
def trained(decay: float = 1e-3) -> tuple[PictureObservation, Secret]:
    """Two digits, learnt until little changes."""
    pictures = first_of_each("digits", "train", 1)
    recipe = FullBatch(learning_rate=0.2, epochs=600, weight_decay=decay)
    return publish_weights(Model.of(BINARY.build(0).double(), BINARY), pictures, recipe, reveal_initial=True)


def hidden_start(observation: PictureObservation) -> PictureObservation:
    """The same weights, without what training started from."""
    return replace(observation, release=replace(observation.expect(Weights), initial=None))


def net_of(observation: PictureObservation) -> FullyConnected:
    return observation.expect(Weights).network(observation.model, observation.released)


def learned_of(observation: PictureObservation) -> FullyConnected:
    return observation.expect(Weights).learned(observation.model, observation.released)


# --- The distance and its derivatives ---


@pytest.mark.parametrize("sharpness", [3.0, 50.0, float("inf")])
@pytest.mark.parametrize("target_is", ["own parameters", "another target", "another, biases frozen"])
@pytest.mark.parametrize("n", [4, 40], ids=["Gram form", "summed form"])
@pytest.mark.parametrize(
    ("outputs", "biases"), [(1, (True, False, False)), (3, (True, True, True)), (2, (False, False, False))]
)
def test_distance_and_derivatives_agree_with_autograd(
    sharpness: float, target_is: str, n: int, outputs: int, biases: tuple[bool, ...]
) -> None:
    net, (x, C), factors = network(outputs, biases), samples(n, outputs), (1.0, 0.5, 2.0)
    own, other = target_is == "own parameters", network(outputs, biases, seed=1)
    other = replace(other, biases=(None,) * 3) if "frozen" in target_is else other
    target = Target(layers=factors) if own else Target(other.weights, other.biases, factors)
    value, to_x, to_C = distance(net, torch.stack([x + 1, x]), torch.stack([C, C]), target, sharpness=sharpness)
    goal = net if own else other
    expected = kkt_distance_by_autograd(net.weights, net.biases, x, C, goal.weights, goal.biases, factors, sharpness)
    for mine, reference in zip((value[1], to_x[1], to_C[1]), expected, strict=True):
        assert float((mine - reference).norm() / reference.norm()) <= 1e-10


def test_grams_are_those_of_per_sample_gradients() -> None:
    net, (x, C) = network(2, (True, False, True)), samples(5, 2)
    parts = [net.combination(x[i : i + 1], C[i : i + 1]) for i in range(5)]
    flat = torch.stack([torch.cat([part[name].flatten() for name in sorted(part)]) for part in parts])
    own = torch.cat([net.parameters()[name].flatten() for name in sorted(parts[0])])
    K, t = grams(net, x, C)
    assert torch.allclose(K, flat @ flat.T, rtol=1e-12)
    assert torch.allclose(t, flat @ own, rtol=1e-12)
    residual, coefficients = explained(net, x, C)
    assert bool((coefficients >= 0).all())
    assert residual == pytest.approx(float((own - coefficients @ flat).norm() / own.norm()), rel=1e-9)
    # The first-order conditions of the cone: no descent direction inside it.
    slope = K @ coefficients - t
    assert float(slope.min()) >= -1e-9 * float(t.abs().max())
    assert float((slope * coefficients).abs().max()) <= 1e-9 * float(t.abs().max())
    frozen = Target(net.weights, (None,) * 3)
    bare = torch.cat([net.parameters()[name].flatten() for name in sorted(net.names)])
    flat = torch.stack([torch.cat([part[name].flatten() for name in sorted(net.names)]) for part in parts])
    K, t = grams(net, x, C, frozen)
    assert torch.allclose(K, flat @ flat.T, rtol=1e-12)
    assert torch.allclose(t, flat @ bare, rtol=1e-12)
    assert torch.equal(
        cone(torch.eye(2).double(), torch.tensor([3.0, -1.0]).double()), torch.tensor([3.0, 0.0]).double()
    )


# --- The victim ---


@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("outputs", [1, 3])
def test_training_is_plain_gradient_descent(decay: float, outputs: int) -> None:
    net, (x, _) = network(outputs, (True, False, True)), samples(6, 1)
    labels = torch.arange(6) % max(outputs, 2)
    found, epochs = train(net, x, labels, FullBatch(learning_rate=0.1, epochs=50, weight_decay=decay))
    weights, biases = gradient_descent_by_autograd(net.weights, net.biases, x, labels, 0.1, decay, 50)
    assert epochs == 50
    for mine, reference in zip(
        (*found.weights, found.biases[0], found.biases[2]), (*weights, biases[0], biases[2]), strict=True
    ):
        assert mine is not None
        assert reference is not None
        assert torch.allclose(mine, reference, rtol=1e-9, atol=1e-12)


def test_interrupted_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x, _), labels = network(1, (True, False, False)), samples(4, 1), torch.tensor([0, 1, 0, 1])
    whole, _ = train(net, x, labels, FullBatch(epochs=60))
    monkeypatch.setattr("gradleak.victims.weights.SAVE_SECONDS", -1.0)  # saved after every epoch
    train(net, x, labels, FullBatch(epochs=37), resume=tmp_path / "training.safetensors")
    both, epochs = train(net, x, labels, FullBatch(epochs=60), resume=tmp_path / "training.safetensors")
    assert epochs == 60
    assert all(torch.equal(a, b) for a, b in zip(whole.weights, both.weights, strict=True))
    with pytest.raises(BadInput, match="something else"):
        train(net, x + 1, labels, FullBatch(epochs=60), resume=tmp_path / "training.safetensors")


def test_steps_by_the_loss_go_where_plain_steps_take_forever() -> None:
    net, (x, _), labels = network(1, (True, False, False)), samples(4, 1), torch.tensor([0, 1, 0, 1])
    found, _ = train(net, x, labels, FullBatch(learning_rate=0.1, epochs=2_000, loss_based=True))
    margins = (2 * labels - 1) * found.forward(x)[-1][:, 0]
    assert float(margins.min()) > 50  # a loss of 1e-22, after which plain steps of 0.1 would move nothing


def test_a_diverging_training_is_told() -> None:
    net, (x, _) = network(1, (True, False, False)), samples(4, 1)
    with pytest.raises(BadInput, match="diverged at learning rate"):  # a decay that grows
        train(net, x, torch.tensor([0, 1, 0, 1]), FullBatch(learning_rate=0.1, weight_decay=-100, epochs=500))


# --- The observation ---


def test_the_true_images_explain_weights_near_stationarity() -> None:
    observation, secret = trained()
    net, other = net_of(observation), first_of_each("digits", "train", 3)
    first = Target(layers=(1.0, 0.0, 0.0))
    assert secret.labels is not None
    right, _ = explained(net, *net.margins(secret.inputs.double(), secret.labels), first)
    strangers, _ = explained(net, *net.margins(other.images[[1, 4]].double(), other.labels[[1, 4]]), first)
    assert right < 0.5 * strangers
    done = observation.expect(Weights).stationarity
    assert done is not None
    assert done.kkt_residual == pytest.approx(right, rel=1e-6)
    simulated = observation.simulate(secret.inputs, secret.labels)  # the start is known: later layers count too
    assert float(relative_residual(simulated, observation.released)) < 0.5


def test_weights_round_trip_in_their_precision(tmp_path: Path) -> None:
    observation, _ = trained()
    save_observation(observation, tmp_path / "weights.safetensors")
    back = load_observation(tmp_path / "weights.safetensors")
    old, new = observation.expect(Weights), back.expect(Weights)
    assert (new.weight_decay, new.stationarity) == (old.weight_decay, old.stationarity)
    assert new.initial is not None
    assert old.initial is not None
    assert all(torch.equal(back.released[name], observation.released[name]) for name in observation.released)
    assert all(torch.equal(new.initial[name], old.initial[name]) for name in old.initial)
    assert {row["item"] for row in back.threat_model() if not row["revealed"]} >= {"labels", "images"}


# --- The attack ---


def test_two_images_come_back_without_a_private_statistic() -> None:
    observation, secret = trained()
    hidden = hidden_start(observation)
    assert rank_of(net_of(hidden)) == 2
    reports: list[int] = []
    found = KKT(steps=200)(
        hidden, generator=torch.Generator().manual_seed(0), on_step=lambda step, *_: reports.append(step)
    )
    assert reports[-1] == 200
    assert found.value.shape == (4, 1, 8, 8)
    assert secret.labels is not None
    for truth, label in zip(secret.inputs, secret.labels, strict=True):
        scores = ssim(found.value, truth[None].expand_as(found.value))
        assert float(scores.max()) >= 0.9
        assert labels_of(found)[int(scores.argmax())] == int(label)


def test_the_search_over_settings_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    observation, secret = trained()
    hidden, search = hidden_start(observation), KKTSearch(trials=2, steps=30, folder=tmp_path)
    found = search(hidden, generator=torch.Generator().manual_seed(0))
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 2
    kept[0].unlink()  # as if it had not been finished
    again = search(hidden, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.value, again.value)
    assert found.status == again.status
    assert "2 trials" in found.status
    scores = [float(ssim(found.value, t[None].expand_as(found.value)).max()) for t in secret.inputs]
    assert min(scores) >= 0.8  # a few steps; the whole search is in the recipe
    other = replace(hidden, released={name: 2 * tensor for name, tensor in hidden.released.items()})
    changed = replace(other, model=replace(other.model, parameters=other.released))
    with pytest.raises(BadInput, match="other weights"):
        search(changed, generator=torch.Generator().manual_seed(0))


def probabilities(gradient: PictureObservation, images: Tensor) -> Tensor:
    """The softmax of the model where the gradient was taken."""
    return gradient.model.logits(gradient.model.parameters, images).softmax(1)


def test_one_step_on_two_images_gives_both() -> None:
    architecture = Architecture("mlp", (1, 8, 8), 10)
    pictures = load("digits", "test", indices=[0, 1])
    gradient, _ = capture_gradient(Model.of(architecture.build(0), architecture), pictures)
    found = NTK(steps=20)(gradient, generator=torch.Generator().manual_seed(0))
    scores = [ssim(found.value, truth[None].expand_as(found.value)) for truth in pictures.images]
    assert min(float(score.max()) for score in scores) >= 0.99
    assert sorted(labels_of(found)) == sorted(pictures.labels.tolist())
    known = NTK(steps=20).knowing(
        gradient,
        pictures.labels,
        probabilities(gradient, pictures.images) / 2,
        generator=torch.Generator().manual_seed(0),
    )
    assert float(ssim(known, pictures.images).min()) >= 0.99
    with pytest.raises(NotObserved, match="and what was released is weights"):
        NTK()(trained()[0], generator=torch.Generator())


def test_training_images_lie_in_the_span() -> None:
    observation, secret = trained()
    net = net_of(observation)
    space = span_of(net)
    assert space is not None
    x = net.inputs(secret.inputs)
    # The first layer starts at 1e-4 per entry, against trained entries near 1e-2: a hundredth is what is left of it.
    assert float((space.project(x) - x).norm() / x.norm()) < 0.02


def test_several_outputs_and_noise_as_starts() -> None:
    architecture = Architecture("homogeneous1000", (1, 8, 8), 3)
    digits = first_of_each("digits", "train", 2)
    pictures = replace(digits, labels=torch.tensor([0, 1, 2, 0]))
    recipe = FullBatch(epochs=100, weight_decay=1e-3)
    observation, _ = publish_weights(
        Model.of(architecture.build(0), architecture), pictures, recipe, reveal_labels=True
    )
    for attack in (KKT(steps=40), KKT(steps=40, units=False, span=False, double=False, restarts=2)):
        found = attack(observation, generator=torch.Generator().manual_seed(0))
        assert found.value.shape == (8, 1, 8, 8)
        assert found.residual < found.trace[0][1]
        assert set(labels_of(found)) <= {0, 1, 2}


def test_what_the_attack_cannot_read_is_said() -> None:
    gradient, _ = capture_gradient(Model.of(BINARY.build(0), BINARY), first_of_each("digits", "train", 1))
    with pytest.raises(NotObserved, match="reads weights, and what was released is a gradient"):
        KKT()(gradient, generator=torch.Generator())
    lenet = Architecture("lenet", (1, 8, 8), 2)
    with pytest.raises(NotObserved, match="fully connected ReLU"):
        publish_weights(Model.of(lenet.build(0), lenet), first_of_each("digits", "train", 1), FullBatch(epochs=1))
    with pytest.raises(NotObserved, match="hold no gradient"):
        trained()[0].as_gradient()


def test_a_network_that_is_not_homogeneous_is_attacked_with_a_warning() -> None:
    architecture = Architecture("mlp1000", (1, 8, 8), 2)
    observation, _ = publish_weights(
        Model.of(architecture.build(0), architecture), first_of_each("digits", "train", 1), FullBatch(epochs=5)
    )
    found = KKT(steps=2)(observation, generator=torch.Generator().manual_seed(0))
    assert 0 < found.residual <= 1.5  # 1 explains nothing
    assert "not homogeneous" in found.status
    told = observation.expect(Weights).stationarity
    assert told is not None
    assert f"not near stationarity: at the true data {told.kkt_residual:.2f}" in found.status


def test_both_signs_are_tried_where_labels_are_not_known() -> None:
    observation, _ = trained()
    hidden = hidden_start(observation)
    found = KKT(steps=2, units=False)(hidden, generator=torch.Generator().manual_seed(0))
    assert sorted(labels_of(found)) == [0, 0, 1, 1]


def test_an_adapter_composed_tells_what_training_made_of_its_weights() -> None:
    pictures = first_of_each("digits", "train", 1)
    made, residual = sides("digits", 2, 3, 150, 0)
    assert made["BA"].model.architecture == BINARY
    released, change, known = made.values()
    assert released.model.frozen == ("2.bias",)
    assert all(bias is None for bias in learned_of(change).biases)
    x = net_of(released).inputs(pictures.images.double())
    span = torch.linalg.qr(x.T).Q
    moved = learned_of(known).weights[0]  # s B (A - A0): gradients of A are combinations of inputs
    assert float((moved - moved @ span @ span.T).norm() / moved.norm()) <= 1e-3  # adapters are float32
    rank = torch.linalg.matrix_rank(learned_of(change).weights[0], rtol=1e-4)
    assert int(rank) == 2  # of two images, below the adapter's 3
    target = known.expect(Weights).target(known.model, known.released)
    net = net_of(known)
    assert residual is not None
    assert residual < explained(net, *net.margins(pictures.images, pictures.labels), target)[0]


@pytest.mark.parametrize("release", [ALL, Truncated(1), LowRank(4)], ids=str)
def test_a_fine_tuning_releases_what_it_says(release: Released) -> None:
    architecture, pictures = Architecture("mlp", (1, 8, 8), 10), load("digits", "test", indices=[0, 1])
    model = Model.of(architecture.build(0), architecture)
    update, shares = fine_tuned(model, pictures, release, 0.1, 1, seed=0)
    probability = model.logits(model.parameters, pictures.images).softmax(1)
    assert torch.allclose(shares, 0.05 * probability)  # one step of 0.1 on two pictures
    gradient, _ = capture_gradient(Model.of(architecture.build(0), architecture), pictures)
    for name, change in update.released.items():
        step = -0.1 * gradient.released[name]
        if isinstance(release, All) or change.dim() < 2:
            assert torch.allclose(change, step, rtol=1e-4, atol=1e-8)
        elif isinstance(release, Truncated):  # Eckart and Young: what is left are the other singular values
            left = torch.linalg.svdvals(step)[1:].norm()
            assert float((change - step).norm()) == pytest.approx(float(left), rel=1e-3, abs=1e-7)
        else:
            assert int(torch.linalg.matrix_rank(change, rtol=1e-4)) <= 2  # of two pictures


def test_the_map_of_ranks_draws_the_threshold() -> None:
    truth, others = torch.rand(4, 1, 28, 28), torch.rand(4, 1, 28, 28)
    mean = torch.full((1, 1, 28, 28), 0.5)
    found = Reconstruction(truth.flip(0), None, 0.0, "", Outcome.SOLVED)
    result = compared(found, truth, others, mean, 256)
    threshold = 4 * 784 / (784 + 256)
    assert result.facts["predicted_threshold"] == pytest.approx(threshold)
    assert len(result.samples) == 4
    for sample in result.samples:
        assert sample["ssim"] == pytest.approx(1)
        assert max(sample["mean_image_ssim"], sample["other_images_ssim"]) < 0.5
    rows = [
        {"released": CHANGE, "images": n, "rank": rank, "ssim": 1.0, "predicted_threshold": n * threshold / 4}
        for n in (2, 4)
        for rank in (1, 2, 4)
    ]
    axes = drawn(rows).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "4"]
    [line] = axes.lines
    assert line.get_label() == "predicted threshold"
    assert np.allclose(line.get_xdata(), np.log2([threshold / 2, threshold]))  # every field doubles
    assert np.allclose(line.get_ydata(), [0, 1])


def test_the_command_line_says_what_is_wrong_with_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*argv: object) -> str:
        assert main([str(part) for part in argv]) == 2
        return capsys.readouterr().err

    plain, shape = tmp_path / "mlp.safetensors", ("--input-shape", 1, 8, 8, "--classes", 2)
    module = Architecture("mlp", (1, 8, 8), 2).build(0)
    save_file(dict(module.state_dict()), plain)
    attack = ("attack", plain, "--attack", "kkt", "--kkt.steps", 2, "--out", tmp_path / "out")
    assert "with --model alone whose trained weights these are" in refused(*attack)
    other = refused(*attack, "--model", "homogeneous1000", *shape)
    assert "the weights belong to another architecture" in other
    assert "(256,)" in other
    lenet = ("capture", "weights", "--data", "digits", "--model", "lenet", "--epochs", 1, "--out", tmp_path / "lenet")
    assert "fully connected ReLU" in refused(*lenet)
    assert main([str(part) for part in (*attack, "--model", "mlp", *shape)]) == 0  # not homogeneous: offered, and said
    assert "The network is not homogeneous" in capsys.readouterr().out


def test_an_audit_of_weights_runs_what_reads_weights() -> None:
    observation, secret = trained()
    public = public_pool("digits", "train", shape=(1, 8, 8), limit=300)
    public = replace(public, images=public.images[2:], labels=public.labels[2:] % 2)
    rows = list(audit(observation, {"dlg": DLG(), "kkt": KKT(steps=30)}, public, secret=secret))
    assert rows[0].result["status"].startswith("Not run: It reads a gradient or an update")
    assert rows[1].result["scores"]["ssim"]


def test_selection_is_the_first_of_each_class() -> None:
    found = first_of_each("digits", "train", 3)
    assert found.labels.tolist() == [1, 1, 1, 0, 0, 0]
    with pytest.raises(BadInput, match="fewer than 5000"):
        first_of_each("digits", "train", 5_000)


def test_an_ordinary_module_is_read_layer_by_layer() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    net = FullyConnected.of(module, dict(module.named_parameters()), (1, 8, 8))
    images = torch.rand(2, 1, 8, 8).double()
    assert torch.allclose(net.forward(net.inputs(images))[-1], module(images))
    assert not net.homogeneous

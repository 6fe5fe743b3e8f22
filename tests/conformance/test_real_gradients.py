"""Gradients and updates as people hold them: the right answer, or one sentence. Every kind of input here was met in public bug reports
of training and attack code.

Bounds: what has only to be renamed or read is equal bit by bit; what is computed twice in float32 agrees to 1e-4.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from pyarrow import parquet
from safetensors.torch import save_file
from torch import Tensor, nn

from gradleak.attacks import ATTACKS
from gradleak.attacks.analytic import Analytic
from gradleak.attacks.batch_size import with_batch_counted
from gradleak.attacks.factor import factor_of, with_factor_found
from gradleak.attacks.labels import recover_labels
from gradleak.attacks.reconstruction import Outcome, Reconstruction
from gradleak.audit.checks import check_observation, replay
from gradleak.audit.explanations import at_reconstruction
from gradleak.audit.loop import audit
from gradleak.cli import flags
from gradleak.cli.inputs import observed
from gradleak.errors import BadInput
from gradleak.formats.model_folder import read_language_model, write_base
from gradleak.modalities.losses import BinaryCrossEntropy, CrossEntropy, Loss
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import load
from gradleak.modalities.texts import load_texts
from gradleak.observations.model import Model
from gradleak.observations.observation import Observation
from gradleak.observations.release import Release
from gradleak.observations.releases import GRADIENT, Update
from gradleak.observations.tensors import Tensors
from gradleak.observations.training import Recipe
from gradleak.victims.small_language import small_model, train_tokenizer

SHAPE, CLASSES = (1, 8, 8), 10
MINE = f"{__name__}:normed"
DIGITS = load("digits", "train", limit=64)
PRECISE = 1e-4


def normed(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A factory of somebody's own, with BatchNorm: its state_dict has ten entries, its parameters are six."""
    c, h, w = shape
    layers = [nn.Conv2d(c, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Flatten(), nn.Linear(h * w, classes)]
    return nn.Sequential(*layers)


def perceptron(shape: tuple[int, int, int], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Sigmoid(), nn.Linear(32, classes))


def made(factory: Callable[..., nn.Module] = normed, seed: int = 5) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return factory(SHAPE, CLASSES)


def model_of(module: nn.Module, mode: Any = "train", criterion: Loss | None = None) -> Model[Any]:
    return Model.of(module, Architecture(MINE, SHAPE, CLASSES), mode=mode, criterion=criterion or CrossEntropy())


def gradient_of(module: nn.Module, rows: list[int], loss: Callable[..., Tensor] = F.cross_entropy) -> Tensors:
    """As loss.backward() leaves it."""
    parameters = dict(module.named_parameters())
    value = loss(module(DIGITS.images[rows]), DIGITS.labels[rows])
    return dict(zip(parameters, torch.autograd.grad(value, list(parameters.values())), strict=True))


def seen(
    released: Any, module: nn.Module, batch: int | None = 2, release: Release = GRADIENT, mode: Any = "train"
) -> Any:
    return Observation(model=model_of(module, mode), release=release, released=released, batch_size=batch)


def same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def named(given: Any) -> dict[str, str]:
    return {flag["name"]: flag["sentence"] for flag in given}


# --- Names, orders, formats ---

NAMES: dict[str, Callable[[str], str]] = {
    "DataParallel": lambda name: "module." + name,
    "torch.compile": lambda name: "_orig_mod." + name,
    "both": lambda name: "module._orig_mod." + name,
    "Opacus": lambda name: "_module." + name,
    "FSDP": lambda name: "_fsdp_wrapped_module." + name.replace(".", "._checkpoint_wrapped_module.", 1),
    "Lightning": lambda name: "model." + name,
    "a wrapper of one's own": lambda name: "net.body." + name,
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_as_wrappers_leave_them(kind: str) -> None:
    module = made()
    plain = gradient_of(module, [3, 5])
    same(seen({NAMES[kind](name): tensor for name, tensor in plain.items()}, module).released, plain)


def test_a_wrapped_model_takes_plain_names() -> None:
    inner = made()
    wrapped = nn.ModuleDict({"module": inner})
    wrapped.forward = lambda images: inner(images)
    plain = gradient_of(inner, [3, 5])
    same(seen(plain, wrapped).released, {f"module.{name}": tensor for name, tensor in plain.items()})


def test_names_of_another_model_are_no_prefix() -> None:
    module = made()
    strange = {"model.other." + name: tensor for name, tensor in gradient_of(module, [3]).items()} | {
        "x": torch.ones(2)
    }
    with pytest.raises(BadInput, match="is not a trained parameter"):
        seen(strange, module)


def test_two_names_for_one_tensor_are_refused() -> None:
    plain = gradient_of(made(), [3])
    with pytest.raises(BadInput, match="Two tensors are called"):
        seen({**plain, "module.0.bias": plain["0.bias"]}, made())


def test_arrays_of_numpy() -> None:
    module = made()
    plain = gradient_of(module, [3, 5])
    same(seen({name: tensor.numpy() for name, tensor in plain.items()}, module).released, plain)
    same(seen({name: tensor.double().numpy() for name, tensor in plain.items()}, module).released, plain)
    swapped = {name: tensor.numpy().astype(">f4") for name, tensor in plain.items()}
    same(seen(swapped, module).released, plain)


def test_tensors_that_are_strided_sparse_or_of_a_graph() -> None:
    module = made()
    plain = gradient_of(module, [3, 5])
    turned = {name: t.mT.contiguous().mT if t.ndim == 2 else t for name, t in plain.items()}
    assert not turned["4.weight"].is_contiguous()
    found = seen(turned, module)
    same(found.released, plain)
    assert replay(found, DIGITS.images[[3, 5]], DIGITS.labels[[3, 5]])[0]["level"] == "info"
    same(seen({name: t.to_sparse() for name, t in plain.items()}, module).released, plain)
    grown = {name: t.clone().requires_grad_() for name, t in plain.items()}
    assert not any(t.requires_grad for t in seen(grown, module).released.values())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_noticed(kind: torch.dtype) -> None:
    module = made()
    short = {name: tensor.to(kind) for name, tensor in gradient_of(module, [3, 5]).items()}
    found = seen(short, module)
    assert found.precision == str(kind).removeprefix("torch.")
    same(found.released, {name: tensor.float() for name, tensor in short.items()})


@pytest.mark.parametrize("as_list", [False, True])
def test_arrays_in_the_order_of_state_dict(as_list: bool) -> None:
    """As Flower sends them, buffers among them; or as a plain list of the parameters' gradients."""
    module = made()
    plain, state = gradient_of(module, [3, 5]), module.state_dict()
    arrays = [plain[name].numpy() if name in plain else tensor.numpy() for name, tensor in state.items()]
    given: Any = arrays if as_list else {f"arr_{i}": array for i, array in enumerate(arrays)}
    found = seen(given, module)
    same(found.released, plain)
    assert found.beside == ("1.running_mean", "1.running_var", "1.num_batches_tracked")
    assert "3 that are not read" in str(found.threat_model()[0]["detail"])
    assert "1.running_mean" in named(check_observation(found))["beside"]
    same(seen(list(plain.values()), module).released, plain)
    assert "beside" not in named(check_observation(seen(plain, module)))


def test_one_flat_array() -> None:
    module = made()
    plain = gradient_of(module, [3, 5])
    same(seen([torch.cat([tensor.flatten() for tensor in plain.values()])], module).released, plain)


def test_what_was_not_trained_is_left_out() -> None:
    module = made()
    module[0].requires_grad_(False)  # type: ignore[index]
    trained = [p for p in module.parameters() if p.requires_grad]
    F.cross_entropy(module(DIGITS.images[:2]), DIGITS.labels[:2]).backward()  # type: ignore[no-untyped-call]
    whole = {name: p.grad for name, p in module.named_parameters()}
    expected = {name: tensor for name, tensor in whole.items() if tensor is not None}
    same(seen(whole, module).released, expected)
    same(seen(list(whole.values()), module).released, expected)
    same(seen([p.grad for p in trained], module).released, expected)
    zeros = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}
    found = seen(zeros, module)
    same(found.released, expected)
    assert found.beside == ("0.weight", "0.bias")


@pytest.mark.parametrize(
    ("spoil", "hint"),
    [
        (lambda arrays: arrays[:-1], "There are 5 arrays without names"),
        (lambda arrays: [arrays[1], arrays[0], *arrays[2:]], "Array 0 is 4, where"),
        (lambda arrays: [np.array([None, 1], dtype=object), *arrays[1:]], "not an array of numbers|Array 0"),
        (lambda arrays: {"0.weight": "text"}, "not an array of numbers"),
        (lambda arrays: [arrays[0].astype(int), *arrays[1:]], "which are whole"),
    ],
)
def test_arrays_that_are_none_of_the_model(spoil: Callable[[Any], Any], hint: str) -> None:
    arrays = [tensor.numpy() for tensor in gradient_of(made(), [3]).values()]
    with pytest.raises(BadInput, match=hint):
        seen(spoil(arrays), made())


# --- Files ---


def taken(tmp_path: Path, module: nn.Module, **more: Any) -> flags.Attack:
    save_file(module.state_dict(), tmp_path / "before.safetensors")
    common = {"out": tmp_path / "out", "attack": "dlg", "model": MINE, "input_shape": SHAPE, "mode": "train"}
    return flags.Attack(**{**common, "weights": tmp_path / "before.safetensors", **more})


def write(arrays: Tensors, path: Path) -> Path:
    """In the format that its name says; .npz without names, as numpy.savez(path, *arrays) does."""
    if path.suffix == ".npz":
        np.savez(path, *[tensor.numpy() for tensor in arrays.values()])
    elif path.suffix == ".npy":
        np.save(path, torch.cat([tensor.flatten() for tensor in arrays.values()]).numpy())
    elif path.name == "rows.parquet":
        rows = [{"name": n, "shape": list(t.shape), "values": t.flatten().tolist()} for n, t in arrays.items()]
        schema = pa.schema([("name", pa.string()), ("shape", pa.list_(pa.int64())), ("values", pa.list_(pa.float32()))])
        parquet.write_table(pa.Table.from_pylist(rows, schema), path)
    elif path.suffix == ".parquet":
        parquet.write_table(
            pa.table({n: pa.array([t.flatten().tolist()], pa.list_(pa.float32())) for n, t in arrays.items()}), path
        )
    else:
        save_file(dict(arrays), path)
    return path


@pytest.mark.parametrize("name", ["g.npz", "g.npy", "rows.parquet", "columns.parquet", "g.safetensors"])
def test_gradients_in_files(tmp_path: Path, name: str) -> None:
    module = made()
    plain = gradient_of(module, [3, 5])
    found = observed(taken(tmp_path, module, observation=write(plain, tmp_path / name), batch_size=2))
    same(found.released, plain)
    assert replay(found, DIGITS.images[[3, 5]], DIGITS.labels[[3, 5]])[0]["level"] == "info"


def test_a_pickle_in_a_file_is_not_opened(tmp_path: Path) -> None:
    module = made()
    np.savez(tmp_path / "g.npz", np.array([{"a": 1}], dtype=object))
    torch.save({"a": torch.ones(2)}, tmp_path / "g.pt")
    np.savez(tmp_path / "nan.npz", *[np.full(4, np.nan, np.float32)])
    for name, hint in (("g.npz", "Pickled arrays are not opened"), ("g.pt", "it is not opened"), ("nan.npz", "NaN")):
        with pytest.raises(BadInput, match=hint):
            observed(taken(tmp_path, module, observation=tmp_path / name))


def trained(
    module: nn.Module, rows: list[int], make: Callable[[Any], torch.optim.Optimizer], steps: int = 1
) -> nn.Module:
    """The module after local training on all rows a step."""
    optimizer = make(module.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(module(DIGITS.images[rows]), DIGITS.labels[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return module


@pytest.mark.parametrize("name", ["after.npz", "after.safetensors"])
def test_weights_before_and_after(tmp_path: Path, name: str) -> None:
    """One step of SGD: the observation is an update that the truth replays, whatever the files hold beside parameters."""
    args = taken(tmp_path, made(), lr=0.1, batch_size=2)
    after = trained(made().train(), [3, 5], lambda p: torch.optim.SGD(p, 0.1)).state_dict()
    path = write(after, tmp_path / name)
    for given in (
        replace(args, weights=None, before=args.weights, after=path),
        replace(args, after=path),
    ):
        found = observed(given)
        assert isinstance(found.release, Update)
        assert "1.running_mean" in found.beside
        assert replay(found, DIGITS.images[[3, 5]], DIGITS.labels[[3, 5]])[0]["level"] == "info"
        assert factor_of(found) is None
    before = made().state_dict()
    names = dict(made().named_parameters())
    change = write({n: after[n] - before[n] for n in names}, tmp_path / "change.safetensors")
    assert (
        replay(observed(replace(args, observation=change)), DIGITS.images[[3, 5]], DIGITS.labels[[3, 5]])[0]["level"]
        == "info"
    )


def test_parameters_that_did_not_move_were_not_trained(tmp_path: Path) -> None:
    args = taken(tmp_path, made(), lr=0.1, batch_size=2)
    module = made().train()
    module[0].requires_grad_(False)  # type: ignore[index]
    state = trained(module, [3, 5], lambda p: torch.optim.SGD([q for q in p if q.requires_grad], 0.1)).state_dict()
    found = observed(replace(args, after=write(state, tmp_path / "after.safetensors")))
    assert set(found.beside) >= {"0.weight", "0.bias"}
    assert set(found.released) == {"1.weight", "1.bias", "4.weight", "4.bias"}


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"lr": None}, "say its learning rate with --lr"),
        ({"before": Path("x")}, "--before and --weights say the same"),
        ({"observation": Path("x")}, "Give one file or folder"),
        ({"after": None}, "Give one file or folder"),
        ({"weights": None}, "the weights it began at"),
        ({"initial": Path("x")}, "--initial says nothing"),
    ],
)
def test_changes_that_are_not_told(tmp_path: Path, change: dict[str, Any], hint: str) -> None:
    args = taken(tmp_path, made(), lr=0.1, batch_size=2)
    after = write(made(seed=6).state_dict(), tmp_path / "after.npz")
    with pytest.raises(BadInput, match=hint):
        observed(replace(args, **{"after": after, **change}))


def test_weights_are_no_gradient(tmp_path: Path) -> None:
    args = taken(tmp_path, made(), batch_size=2)
    after = trained(made().train(), [3, 5], lambda p: torch.optim.SGD(p, 0.1)).state_dict()
    with pytest.raises(BadInput, match="--after"):
        observed(replace(args, observation=write(after, tmp_path / "round-1.npz")))
    with pytest.raises(BadInput, match="nothing has changed"):
        observed(replace(args, lr=0.1, after=args.weights))


CLASS_WEIGHTS = tuple(0.5 + i for i in range(10))


@pytest.mark.parametrize(
    ("told", "loss"),
    [
        ({"reduction": "sum"}, lambda z, y: F.cross_entropy(z, y, reduction="sum")),
        ({"label_smoothing": 0.1}, lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1)),
        (
            {"loss": ("binary-cross-entropy",)},
            lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, 10).float()),
        ),
        ({"class_weights": CLASS_WEIGHTS}, lambda z, y: F.cross_entropy(z, y, torch.tensor(CLASS_WEIGHTS))),
        (
            {"loss": ("cross-entropy", "binary-cross-entropy"), "loss_weights": (1.0, 0.5)},
            lambda z, y: F.cross_entropy(z, y) + 0.5 * F.binary_cross_entropy_with_logits(z, F.one_hot(y, 10).float()),
        ),
    ],
)
def test_losses_from_the_command_line(tmp_path: Path, told: dict[str, Any], loss: Callable[..., Tensor]) -> None:
    module = made()
    path = write(gradient_of(module, [3, 5], loss), tmp_path / "g.safetensors")
    found = observed(taken(tmp_path, module, observation=path, batch_size=2, **told))
    assert replay(found, DIGITS.images[[3, 5]], DIGITS.labels[[3, 5]])[0]["level"] == "info"
    with pytest.raises(BadInput, match="label-smoothing says nothing"):
        observed(taken(tmp_path, module, observation=path, loss=("focal",), label_smoothing=0.1))
    with pytest.raises(BadInput, match="not 1 for 2"):
        observed(taken(tmp_path, module, observation=path, loss=("focal", "cross-entropy"), loss_weights=(1.0,)))
    with pytest.raises(BadInput, match="no loss of this model"):
        observed(taken(tmp_path, module, observation=path, class_weights=(1.0, 2.0)))


# --- How many samples ---


@pytest.mark.parametrize("count", [1, 2, 5])
def test_samples_are_counted_by_ranks(tmp_path: Path, count: int) -> None:
    """The rank of dL/dW = sum_n delta_n x_n^T is the number of samples, which are in general position."""
    module = made()
    path = write(gradient_of(module, list(range(count))), tmp_path / "g.safetensors")
    assert observed(taken(tmp_path, module, observation=path)).batch_size == count


def test_more_samples_than_ranks_tell() -> None:
    module = made()
    with pytest.raises(BadInput, match="9 or more samples"):  # ten classes, whose p - y adds up to zero
        with_batch_counted(seen(gradient_of(module, list(range(16))), module, None))
    update = Update(recipe=Recipe(learning_rate=0.1, steps=5))
    with pytest.raises(BadInput, match="say it with --batch-size"):
        with_batch_counted(seen(gradient_of(module, [1]), module, None, update))


def test_more_samples_than_were_said() -> None:
    module = made()
    update = Update(recipe=Recipe(learning_rate=0.1, steps=1))
    for rows, said in (([7, 1, 2], 3), ([7, 1, 2], 5), ([7, 1, 2], 2), ([7], 1)):
        plain = gradient_of(module, rows)
        before = {name: p.detach() for name, p in module.named_parameters()}
        change = {
            name: (before[name] - 0.1 * tensor) - before[name] for name, tensor in plain.items()
        }  # as parameters round it
        for released, release in ((plain, GRADIENT), (change, update)):
            told = named(check_observation(seen(released, module, said, release)))
            assert ("more_samples" in told) == (said < len(rows))
            assert "at least 3 samples" in told.get("more_samples", "at least 3 samples")
            assert with_batch_counted(seen(released, module, None, release)).batch_size == len(rows)


# --- Language models ---


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small GPT-2 of random weights."""
    tokenizer = train_tokenizer(load_texts("embedded", "train").texts, "gpt2", size=420)
    folder = tmp_path_factory.mktemp("gpt2")
    write_base(small_model("gpt2", tokenizer, "causal-lm", width=32, layers=1, spread=0.1), folder)
    return folder


def test_gradients_and_changes_of_a_language_model(gpt2: Path, tmp_path: Path) -> None:
    """The gradient in the names of DataParallel, at the folder's weights and at others; and the weights after one step, of which
    the difference keeps three digits."""
    model = read_language_model(gpt2, "causal-lm")
    tokens = model.architecture.encode(load_texts("embedded", indices=[0]).texts)
    taken: dict[str, Any] = {"out": tmp_path / "o", "attack": "dager", "model": str(gpt2), "task": "causal-lm"}
    moved = replace(model, parameters={name: 1.01 * tensor for name, tensor in model.parameters.items()})
    save_file(moved.parameters, tmp_path / "moved.safetensors")
    for known, weights in ((model, None), (moved, tmp_path / "moved.safetensors")):
        gradient = GRADIENT.simulate(known, known.parameters, tokens, None)
        save_file({f"module.{name}": tensor for name, tensor in gradient.items()}, tmp_path / "g.safetensors")
        found = observed(flags.Attack(observation=tmp_path / "g.safetensors", weights=weights, **taken))
        assert found.residual(tokens, None) < PRECISE
    gradient = GRADIENT.simulate(model, model.parameters, tokens, None)
    after = {name: tensor - gradient[name] for name, tensor in model.parameters.items()}
    save_file(after, tmp_path / "after.safetensors")
    update = observed(flags.Attack(after=tmp_path / "after.safetensors", lr=1.0, **taken))
    assert update.residual(tokens, None) < 1e-3
    save_file({"transformer.wte.weight": torch.ones(3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(BadInput, match="do not belong together"):
        observed(flags.Attack(observation=tmp_path / "g.safetensors", weights=tmp_path / "other.safetensors", **taken))


# --- The factor ---


@pytest.mark.parametrize("factory", [normed, perceptron])
@pytest.mark.parametrize(
    ("rows", "factor"),
    [([7], 1024.0), ([7], 0.03), ([7], -0.1), ([7], 2.0), ([7, 1, 2, 3], 4.0), ([7, 1], 512.0), ([7, 1, 2], -0.1)],
)
def test_a_factor_is_found(factory: Callable[..., nn.Module], rows: list[int], factor: float) -> None:
    """One sample: algebra, up to the rounding of float32. Batches: the step of the last refinement is 0.16 %."""
    module = made(factory).eval()
    released = {name: factor * tensor for name, tensor in gradient_of(module, rows).items()}
    found = with_factor_found(seen(released, module, len(rows), mode="eval"))
    assert found.factor == pytest.approx(factor, rel=PRECISE if len(rows) == 1 else 0.01)
    assert recover_labels(found).tolist() == sorted(DIGITS.labels[rows].tolist())
    flag = named(check_observation(found))["scaled" if factor > 0 else "sign"]
    assert f"{found.factor:.4g} times" in flag
    hint = {
        4.0: "a sum over 4 samples",
        1024.0: "a loss scale of 1,024",
        0.03: "clipping",
        -0.1: "points the other way",
    }
    assert hint.get(factor, "sum") in flag


@pytest.mark.parametrize("factory", [normed, perceptron])
@pytest.mark.parametrize("rows", [[0], [7], [7, 1], [3, 13, 23, 45], list(range(16))], ids=len)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_no_factor_is_found_where_there_is_none(
    factory: Callable[..., nn.Module], rows: list[int], kind: torch.dtype
) -> None:
    module = made(factory).eval()
    whole = gradient_of(module, rows)
    found = seen({name: tensor.to(kind) for name, tensor in whole.items()}, module, len(rows), mode="eval")
    assert with_factor_found(found) is found
    assert not {"scaled", "sign", "scale", "clipped", "signs"} & set(named(check_observation(found)))
    update = Update(recipe=Recipe(learning_rate=0.1, steps=1))
    assert factor_of(seen({name: -0.1 * t for name, t in whole.items()}, module, len(rows), update, "eval")) is None


def test_two_classes_tell_no_factor() -> None:
    """p - e_y of the two labels point opposite ways: -0.1 times the one is some number of times the other."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    for factor in (1.0, -0.1, 8.0):
        released = gradient_of(module, [1])
        released = {name: factor * tensor for name, tensor in released.items()}
        model = Model.of(module, Architecture(MINE, SHAPE, 2))
        assert factor_of(Observation(model=model, released=released, batch_size=1)) is None


def test_another_loss_has_no_factor() -> None:
    module = made(perceptron).eval()
    released = gradient_of(module, [7], lambda z, y: F.mse_loss(z, torch.zeros_like(z)))
    assert factor_of(seen(released, module, 1, mode="eval")) is None
    bce = Observation(model=model_of(module, "eval", BinaryCrossEntropy()), released=released, batch_size=1)
    assert factor_of(bce) is None


@pytest.mark.parametrize("kind", [torch.float32, torch.float16], ids=str)
def test_a_scaled_gradient_gives_its_picture(kind: torch.dtype) -> None:
    """Half precision keeps 11 bits: of the picture, which is a mean over 32 units, 40 dB and more."""
    module = made(perceptron).eval()
    released = {name: (1024 * tensor).to(kind) for name, tensor in gradient_of(module, [7]).items()}
    [done] = audit(seen(released, module, 1, mode="eval"), {"analytic": Analytic()}, None)
    assert done.reconstruction is not None
    assert done.result["labels"]["recovered"] == DIGITS.labels[[7]].tolist()
    assert float((done.reconstruction.value - DIGITS.images[[7]]).square().mean()) < 1e-4
    assert done.reconstruction.residual < (1e-3 if kind is torch.float32 else 2e-2)
    assert "scaled" in named(done.result["flags"])


def test_a_factor_survives_a_file(tmp_path: Path) -> None:
    from gradleak.formats.observation_file import load_observation, save_observation

    module = Architecture("mlp", SHAPE, CLASSES).build(3)
    model = Model.of(module, Architecture("mlp", SHAPE, CLASSES))
    found = Observation(model=model, released=gradient_of(module, [1]), batch_size=1, factor=4.0, beside=("x",))
    save_observation(found, tmp_path / "o.safetensors")
    back = load_observation(tmp_path / "o.safetensors")
    assert (back.factor, back.beside) == (4.0, ("x",))
    assert "found: 4" in [row["detail"] for row in back.threat_model()]


# --- What the release is ---


def test_a_clipped_gradient_is_called_so() -> None:
    module = made().train()
    plain = gradient_of(module, list(range(16)))
    for parameter, tensor in zip(module.parameters(), plain.values(), strict=True):
        parameter.grad = tensor.clone()
    nn.utils.clip_grad_norm_(module.parameters(), 0.05)
    clipped = {name: p.grad for name, p in module.named_parameters()}
    assert "norm 0.05" in named(check_observation(seen(clipped, module, 16)))["clipped"]
    assert "clipped" not in named(check_observation(seen(plain, module, 16)))


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW])
def test_the_first_step_of_adam_is_called_signs(make: Any) -> None:
    before = {n: p.detach().clone() for n, p in made().named_parameters()}
    after = dict(trained(made().train(), [3, 5], lambda p: make(p, 1e-2)).named_parameters())
    change = {name: after[name].detach() - tensor for name, tensor in before.items()}
    sgd, adam = (Update(recipe=Recipe(optimizer=o, learning_rate=1e-2, steps=1)) for o in ("sgd", "adam"))
    assert "signs" in named(check_observation(seen(change, made(), 2, sgd)))["signs"]
    assert "signs" not in named(check_observation(seen(change, made(), 2, adam)))  # not_exact says so


def test_a_bias_gradient_beyond_what_cross_entropy_gives() -> None:
    module = made().train()
    plain = gradient_of(module, list(range(16)))
    large = {name: 32 * tensor for name, tensor in plain.items()}
    assert "2 at most" in named(check_observation(seen(large, module, 16)))["scale"]
    summed = model_of(module, criterion=CrossEntropy(reduction="sum"))
    told = Observation(model=summed, released={n: 16 * t for n, t in plain.items()}, batch_size=16)
    assert "scale" not in named(check_observation(told))


@pytest.mark.parametrize("rows", [[7], [7, 1, 2, 3]], ids=len)
def test_more_negative_classes_than_samples(rows: list[int]) -> None:
    """Algebra: dL/db_c = mean_n (p_nc - [y_n = c]) is negative for classes of the batch only, whatever the network."""
    module = made(perceptron)
    for parameter in module.parameters():
        parameter.data *= 3  # predictions that are far from even
    plain = gradient_of(module, rows)
    turned = {name: -0.1 * tensor for name, tensor in plain.items()}
    assert "points the other way" in named(check_observation(seen(turned, module, len(rows))))["sign"]
    assert "sign" not in named(check_observation(seen(plain, module, len(rows))))
    update = Update(recipe=Recipe(learning_rate=0.1, steps=1))
    assert "sign" not in named(check_observation(seen(turned, module, len(rows), update)))


TRAININGS: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], int, str]] = {
    "momentum": (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), 5, "5 momentum steps"),
    "weight decay": (lambda p: torch.optim.SGD(p, 0.1, weight_decay=5e-2), 1, "weight decay 0.05"),
    "weight decay, 5 steps": (
        lambda p: torch.optim.SGD(p, 0.1, weight_decay=5e-2),
        5,
        "weight decay 0.04",
    ),  # 0.049: to first order in the rate
    "adam": (lambda p: torch.optim.Adam(p, 0.1), 3, "3 adam steps"),
}


@pytest.mark.parametrize("kind", [*TRAININGS, "sgd"])
def test_another_training_is_named_at_the_truth(kind: str) -> None:
    make, steps, words = TRAININGS.get(kind, (lambda p: torch.optim.SGD(p, 0.1), 5, ""))
    before = {n: p.detach().clone() for n, p in made(perceptron).named_parameters()}
    after = dict(trained(made(perceptron), [7], make, steps).named_parameters())
    change = {name: after[name].detach() - tensor for name, tensor in before.items()}
    observation = seen(change, made(perceptron), 1, Update(recipe=Recipe(learning_rate=0.1, steps=steps)))
    images, labels = DIGITS.images[[7]], DIGITS.labels[[7]]
    truth = Reconstruction(images, labels, observation.residual(images, labels), "", Outcome.GUESSED)
    told = named(at_reconstruction(observation, truth))
    if kind == "sgd":
        assert told == {}
        return
    assert words in told["training"]
    other = next(
        r
        for r in observation.release.others(
            observation.model, observation.released, observation.simulate(images, labels)
        )
        if words in str(r.recipe)
    )
    assert replace(observation, release=other).residual(images, labels) < 1e-2


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(learning_rate=0.1, steps=4, weight_decay=0.05),
        Recipe(optimizer="momentum", learning_rate=0.1, steps=4, weight_decay=0.05),
        Recipe(optimizer="adamw", learning_rate=0.01, steps=4, weight_decay=0.2),
        Recipe(optimizer="adam", learning_rate=0.01, steps=4, weight_decay=0.2),
        Recipe(learning_rate=0.5, steps=4, proximal=0.7),
        Recipe(learning_rate=0.5, steps=4, clip=0.05, weight_decay=0.05),
    ],
    ids=str,
)
def test_recipes_train_as_torch_does(recipe: Recipe) -> None:
    """Against torch.optim with the proximal term in the loss and clip_grad_norm_ before each step."""
    module, rate, decay = made(perceptron), recipe.learning_rate, recipe.decay
    optimizer: torch.optim.Optimizer = {  # type: ignore[no-untyped-call]
        "sgd": lambda p: torch.optim.SGD(p, rate, weight_decay=decay),
        "momentum": lambda p: torch.optim.SGD(p, rate, momentum=0.9, weight_decay=decay),
        "adam": lambda p: torch.optim.Adam(p, rate, weight_decay=decay),
        "adamw": lambda p: torch.optim.AdamW(p, rate, weight_decay=decay),
    }[recipe.optimizer](module.parameters())
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    for _ in range(recipe.steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(module(DIGITS.images[:3]), DIGITS.labels[:3])
        pull = sum((p - before[n]).square().sum() for n, p in module.named_parameters())
        (loss + recipe.proximal / 2 * pull).backward()  # type: ignore[no-untyped-call]
        if recipe.clip is not None:
            nn.utils.clip_grad_norm_(module.parameters(), recipe.clip)
        optimizer.step()
    change = {n: p.detach() - before[n] for n, p in module.named_parameters()}
    observation = seen(change, made(perceptron), 3, Update(recipe=recipe))
    assert observation.residual(DIGITS.images[:3], DIGITS.labels[:3]) < PRECISE


def test_weight_decay_that_is_told_is_taken_out() -> None:
    """One step: -change / rate - decay * theta is the gradient itself."""
    module = made(perceptron)
    plain, theta = gradient_of(module, [7]), {n: p.detach() for n, p in module.named_parameters()}
    change = {name: -0.1 * (g + 0.05 * theta[name]) for name, g in plain.items()}
    recipe = Recipe(learning_rate=0.1, steps=1, weight_decay=0.05)
    for name, tensor in seen(change, module, 1, Update(recipe=recipe)).as_gradient().items():
        assert (tensor - plain[name]).norm() < PRECISE * plain[name].norm()


# --- Modules as people write them ---


class Returns(nn.Module):
    """A perceptron whose forward returns what `wrap` makes of the logits."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.wrap = made(perceptron), wrap

    def forward(self, images: Tensor) -> Any:
        return self.wrap(self.net(images))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda z: (z, z.detach()),
        lambda z: {"features": z[:, :3], "logits": z},
        lambda z: [z.sum(), z],
        lambda z: {"out": z},
    ],
)
def test_outputs_that_hold_the_logits(wrap: Callable[[Tensor], Any]) -> None:
    module = Returns(wrap)
    released = {f"net.{name}": tensor for name, tensor in gradient_of(module.net, [7]).items()}
    [done] = audit(seen(released, module, 1), {"analytic": Analytic()}, None)
    assert done.reconstruction is not None
    assert float((done.reconstruction.value - DIGITS.images[[7]]).abs().max()) < 1e-3


def test_outputs_without_logits_and_inputs_beside_pictures() -> None:
    with pytest.raises(BadInput, match="without logits"):
        model_of(Returns(lambda z: {"loss": z.sum()})).check_works()

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = made(perceptron)

        def forward(self, images: Tensor, age: Tensor) -> Tensor:
            logits: Tensor = self.net(images) + age
            return logits

    with pytest.raises(BadInput, match=r"register_forward_pre_hook\(lambda _, given: \(\*given, rest\)\)"):
        model_of(Two()).check_works()
    module = Two()
    module.register_forward_pre_hook(lambda _, given: (*given, torch.tensor(0.4)))
    model_of(module).check_works()
    released = gradient_of(module, [7])
    [done] = audit(seen(released, module, 1), {"analytic": Analytic()}, None)
    assert done.reconstruction is not None
    assert float((done.reconstruction.value - DIGITS.images[[7]]).abs().max()) < 1e-3


def lazy(shape: tuple[int, int, int], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))


def test_layers_that_learn_their_size() -> None:
    built = Architecture(f"{__name__}:lazy", SHAPE, CLASSES).build(0)
    assert built.state_dict()["1.weight"].shape == (10, 64)


def test_what_no_attack_explains_is_not_called_explained() -> None:
    """A residual above 1 explains nothing: neither the verdict nor the flags of a row say otherwise."""
    from gradleak.audit.verdict import unscored

    module, noise = made(perceptron), torch.Generator().manual_seed(0)
    wrong = seen({n: torch.randn(p.shape, generator=noise) for n, p in module.named_parameters()}, module, 1)
    [done] = audit(wrong, {"inverting-gradients": replace(ATTACKS["inverting-gradients"](), steps=2)}, None)
    assert "unexplained" in named(done.result["flags"])
    assert "No attack explains" in unscored([{**done.result, "residual": 92.0}])[1]


class Attentive(nn.Module):
    """Fused attention, a weight that is computed from others, and a layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.unused, self.act = nn.Conv2d(1, 8, 3, 2, 1), nn.Linear(3, 3), nn.Sigmoid()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.utils.parametrizations.weight_norm(nn.Linear(8 * 16, 10))

    def forward(self, x: Tensor) -> Tensor:
        t = self.act(self.conv(x)).flatten(2).transpose(1, 2)
        t = self.attention(t, t, t)[0]
        logits: Tensor = self.fc(F.scaled_dot_product_attention(t, t, t).flatten(1))
        return logits


@pytest.mark.parametrize("name", ["dlg", "idlg", "inverting-gradients", "map-inversion", "recursive", "analytic"])
def test_attention_and_weights_that_are_computed(name: str) -> None:
    """Every attack runs, or says why not; what runs explains more than nothing."""
    module = Attentive()
    F.cross_entropy(module(DIGITS.images[[7]]), DIGITS.labels[[7]]).backward()  # type: ignore[no-untyped-call]
    released = {key: p.grad for key, p in module.named_parameters()}
    assert released["unused.weight"] is None
    given = {"steps": 20, "evaluations": 20, "rounds": 0, "restarts": 1}
    kind = ATTACKS[name]
    attack = kind(**{key: value for key, value in given.items() if key in {field.name for field in fields(kind)}})
    observation = replace(seen(released, module, 1, mode="eval"), labels=DIGITS.labels[[7]])
    [done] = audit(observation, {name: attack}, None)
    assert done.result["status"].endswith(".")
    assert done.reconstruction is None or done.reconstruction.residual < 1

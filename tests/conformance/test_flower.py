"""Clients and a strategy of real Flower apps, in this process: what is kept replays, and the training is as without us."""

import copy
import logging
import random
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gradleak.audit.checks import REPLAY_TOLERANCE
from gradleak.errors import BadInput
from gradleak.formats.observation_file import load_observation
from gradleak.formats.round_folder import rounds_in
from gradleak.formats.secret_file import Secret
from gradleak.modalities.networks import Architecture, Normalise
from gradleak.modalities.pictures import Pictures, load
from gradleak.observations.releases import Update
from gradleak.observations.rounds import Rounds
from gradleak.observations.training import OPTIMISERS, Recipe
from gradleak.report import record
from pages import run_page

pytest.importorskip("flwr", reason="gradleak[flower] is not installed")

ARCHITECTURE = Architecture("mlp", (1, 8, 8), 10)
DATA = {11: [0], 12: [1], 13: [2, 3, 4, 5]}  # the pictures of each client
TOLD: dict[int, dict[str, Any]] = {  # what each client is configured with
    11: {"optimizer": "sgd", "lr": 0.1},
    12: {"optimizer": "adam", "lr": 0.001},
    13: {"optimizer": "sgd", "lr": 0.1, "local-epochs": 2, "batch-size": 2},
}


@pytest.fixture(autouse=True)
def _run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages belong to a run, which a SuperLink would have begun; before Flower 1.30 or so they did not."""
    identity = pytest.importorskip("flwr.supercore.task_identity", reason="another Flower").TaskIdentity
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(identity, name, 1)


def private(node: int) -> Pictures:
    return load("digits", indices=DATA[node])


def train(module: nn.Module, node: int, told: dict[str, Any]) -> None:
    """What a client does: so many epochs in its order, by torch.optim."""
    data, optimizer = private(node), OPTIMISERS[told["optimizer"]](list(module.parameters()), told["lr"])
    size = told.get("batch-size", len(data.labels))
    for _ in range(told.get("local-epochs", 1)):
        for first in range(0, len(data.labels), size):
            images, labels = data.images[first : first + size], data.labels[first : first + size]
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(images), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def client_app(mods: list[Any]) -> Any:
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    app: Any = ClientApp(mods=mods)

    @app.train()  # type: ignore[untyped-decorator, unused-ignore]
    def local(message: Any, context: Any) -> Any:
        module = ARCHITECTURE.build(1)
        module.load_state_dict(message.content["arrays"].to_torch_state_dict())
        train(module, context.node_id, {**context.run_config, **message.content["config"]})
        content = {"arrays": ArrayRecord(module.state_dict())}
        content |= {"metrics": MetricRecord({"num-examples": len(DATA[context.node_id])})}
        return Message(content=RecordDict(content), reply_to=message)

    @app.evaluate()  # type: ignore[untyped-decorator, unused-ignore]
    def evaluate(message: Any, context: Any) -> Any:
        return Message(content=RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    return app


def grid(app: Any) -> Any:
    """Flower's Grid, with the clients in this process."""
    from flwr.app import Context, RecordDict
    from flwr.serverapp import Grid

    class Here(Grid):  # type: ignore[misc, unused-ignore]
        run = property(lambda self: None)

        def set_run(self, *_: Any, **__: Any) -> None: ...
        def push_messages(self, messages: Any) -> Any: ...
        def pull_messages(self, message_ids: Any) -> Any: ...
        def create_message(self, *_: Any, **__: Any) -> Any: ...

        def get_node_ids(self) -> Iterable[int]:
            return list(DATA)

        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
            replies = []
            for message in messages:
                node = message.metadata.dst_node_id
                told = TOLD[node] if message.metadata.message_type == "train" else {}
                context = Context(1, node, {}, RecordDict(), told)
                replies.append(app(message, context))
            return replies

    return Here()


def federated(strategy: Any, app: Any, rounds: int = 1) -> dict[str, torch.Tensor]:
    """The global weights after so many rounds."""
    from flwr.app import ArrayRecord

    random.seed(0)  # Flower draws the order of the clients, and with it that of a sum
    initial = ArrayRecord(ARCHITECTURE.build(0).state_dict())
    result = strategy.start(grid(app), initial, num_rounds=rounds)
    state: dict[str, torch.Tensor] = result.arrays.to_torch_state_dict()
    return state


def clients(out: Path, **settings: Any) -> Any:
    from gradleak.integrations.flower import Clients

    return Clients(ARCHITECTURE.build(1), ARCHITECTURE, out, **settings)


def fed_avg() -> Any:
    from flwr.serverapp.strategy import FedAvg

    return FedAvg(min_available_nodes=3, fraction_evaluate=0.0)


def test_three_clients_audit_themselves(tmp_path: Path) -> None:
    """One picture is read exactly off a biased linear layer (Phong et al. 2017, section III), behind SGD and behind a step of Adam."""
    from gradleak.integrations.flower import audit_mod

    watched = clients(
        tmp_path,
        attacks=["analytic", "recursive"],
        secret=lambda context: Secret(private(context.node_id).images, private(context.node_id).labels),
    )
    federated(fed_avg(), client_app([audit_mod(watched)]))
    levels = {}
    for node in DATA:
        written = record.read(tmp_path / "round-1" / f"client-{node}" / "record.json")
        levels[node] = written["verdict"]["level"]
        assert (tmp_path / "round-1" / f"client-{node}" / "leakage.md").is_file()
        replayed = [f["level"] for row in written["results"] for f in row["flags"] if f["name"] == "replay"]
        assert replayed
        # What epsilon tells of a step of Adam is not exact, and the flag says by how much.
        assert set(replayed) == ({"warning"} if node == 12 else {"info"})
    assert levels[11] == "recovered"
    assert levels[12] == "recovered"


def test_a_server_keeps_what_it_sees(tmp_path: Path) -> None:
    """Each client under its own recipe, and the parameters that were sent, against the training itself: up to rounding."""
    from gradleak.integrations.flower import KeepingStrategy

    for node, told in TOLD.items():
        out = tmp_path / str(node)
        federated(KeepingStrategy(fed_avg(), clients(out, told=told)), client_app([]))
        seen = load_observation(out / "round-1" / f"client-{node}" / "observation.safetensors")
        assert isinstance(seen.release, Update)
        assert seen.release.recipe.optimizer == told["optimizer"]
        assert seen.release.recipe.steps == (4 if node == 13 else 1)
        assert seen.batch_size == len(DATA[node])
        data = private(node)
        # Adam divides numbers of the size of rounding by themselves: there is nothing else between.
        assert seen.residual(data.images, data.labels) < (1e-2 if node == 12 else REPLAY_TOLERANCE["float32"])


def test_the_training_is_as_without_us(tmp_path: Path) -> None:
    from gradleak.integrations.flower import KeepingStrategy, audit_mod

    watched = clients(tmp_path, attacks=["analytic"])
    first = federated(fed_avg(), client_app([]), rounds=2)
    for strategy, app in (
        (KeepingStrategy(fed_avg(), watched), client_app([])),
        (fed_avg(), client_app([audit_mod(watched)])),
    ):
        again = federated(strategy, app, rounds=2)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_what_a_mod_makes_of_the_reply_is_what_is_audited(tmp_path: Path) -> None:
    from flwr.app import ArrayRecord

    from gradleak.integrations.flower import audit_mod

    def doubling(message: Any, context: Any, call_next: Any) -> Any:
        before = message.content["arrays"].to_torch_state_dict()
        reply = call_next(message, context)
        after = reply.content["arrays"].to_torch_state_dict()
        reply.content["arrays"] = ArrayRecord({name: 2 * after[name] - before[name] for name in after})
        return reply

    for name, mods in (("plain", []), ("doubled", [doubling])):
        federated(fed_avg(), client_app([audit_mod(clients(tmp_path / name, attacks=["analytic"])), *mods]))
    one, two = (
        load_observation(tmp_path / name / "round-1" / "client-11" / "observation.safetensors").released
        for name in ("plain", "doubled")
    )
    assert all(
        torch.allclose(2 * one[name], two[name], rtol=1e-3, atol=1e-6) for name in one
    )  # rounding of the weights


def test_where_the_recipe_is_not_told_the_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from gradleak.integrations.flower import KeepingStrategy

    with caplog.at_level(logging.WARNING, logger="gradleak.integrations.flower"):
        after = federated(KeepingStrategy(fed_avg(), clients(tmp_path)), client_app([]))
    assert after
    assert "no message says" in caplog.text
    assert not list(tmp_path.rglob("*.safetensors"))


def test_saved_arrays_are_read_in_the_order_of_state_dict() -> None:
    from flwr.app import ArrayRecord

    from gradleak.integrations.flower import observed_update

    before, after = ARCHITECTURE.build(0), ARCHITECTURE.build(0)
    train(after, 11, TOLD[11])
    recipe, data = Recipe(learning_rate=0.1, steps=1), private(11)
    lists = [[t.numpy() for t in module.state_dict().values()] for module in (before, after)]
    records = [ArrayRecord(arrays) for arrays in lists]
    named = [ArrayRecord(module.state_dict()) for module in (before, after)]
    for one, two in (lists, records, named):
        seen = observed_update(one, two, ARCHITECTURE.build(1), ARCHITECTURE, recipe, batch_size=1)
        assert seen.residual(data.images, data.labels) < REPLAY_TOLERANCE["float32"]
    with pytest.raises(BadInput, match="nothing has changed"):
        observed_update(lists[0], lists[0], ARCHITECTURE.build(1), ARCHITECTURE, recipe)
    with pytest.raises(BadInput, match="another architecture"):
        observed_update(lists[0], [*lists[1][:-1], np.zeros(3)], ARCHITECTURE.build(1), ARCHITECTURE, recipe)


def test_recipes_are_read_from_the_usual_names() -> None:
    from gradleak.integrations.flower import recipe_of

    told = {"learning_rate": 0.5, "local-epochs": 3, "batch-size": 4, "proximal-mu": 0.1, "weight-decay": 0.01}
    recipe = recipe_of(told, 10)
    # Three epochs of 4 + 4 + 2 samples.
    assert recipe == Recipe(learning_rate=0.5, steps=9, batch_size=4, proximal=0.1, weight_decay=0.01)
    assert recipe_of({"lr": 1}, 10) == Recipe(learning_rate=1.0, steps=1)
    for wrong in ({"lr": "fast"}, {"lr": 0.1, "optimizer": "lion"}, {}):
        with pytest.raises(BadInput):
            recipe_of(wrong, 1)


def test_the_lines_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.clientapp import ClientApp
    from flwr.serverapp.strategy import FedAvg

    monkeypatch.chdir(tmp_path)
    before, after = ARCHITECTURE.build(0), ARCHITECTURE.build(0)
    train(after, 11, TOLD[11])
    states = {"before": list(before.state_dict().values()), "after": list(after.state_dict().values())}
    given = {"net": before, "Architecture": Architecture, "Recipe": Recipe, "ClientApp": ClientApp, "FedAvg": FedAvg}
    made = run_page("flower", {**given, **states}, tmp_path)
    data = private(11)
    assert made["observation"].residual(data.images, data.labels) < REPLAY_TOLERANCE["float32"]
    federated(made["strategy"], client_app([]))
    assert list(tmp_path.rglob("observation.safetensors"))


def test_the_rounds_of_a_client_are_found_together(tmp_path: Path) -> None:
    """Two rounds of the same two digits, four steps in each, at weights that the others have moved meanwhile."""
    from gradleak.integrations.flower import KeepingStrategy

    federated(KeepingStrategy(fed_avg(), clients(tmp_path, told=TOLD[13])), client_app([]), rounds=2)
    with pytest.raises(BadInput, match="of 3 clients: name one with --client"):
        rounds_in(tmp_path)
    files = rounds_in(tmp_path, "client-13")
    assert list(files) == [1, 2]
    seen, data = Rounds.of({number: load_observation(file) for number, file in files.items()}), private(13)
    assert seen.residual(data.images, data.labels) < REPLAY_TOLERANCE["float32"]


def test_what_older_strategies_hold_makes_the_same_observation() -> None:
    """`aggregate_fit` gets a FitRes, whose Parameters are arrays in the order of state_dict."""
    from flwr.common import Code, FitIns, FitRes, Status, ndarrays_to_parameters

    from gradleak.integrations.flower import observed_update

    before, after = ARCHITECTURE.build(0), ARCHITECTURE.build(0)
    train(after, 11, TOLD[11])
    old, new = (ndarrays_to_parameters([t.numpy() for t in module.state_dict().values()]) for module in (before, after))
    sent, reply = FitIns(old, {}), FitRes(Status(Code.OK, ""), new, 1, {})
    about: Any = (ARCHITECTURE.build(1), ARCHITECTURE, Recipe(learning_rate=0.1, steps=1))
    seen, data = observed_update(sent, reply, *about), private(11)
    assert seen.residual(data.images, data.labels) < REPLAY_TOLERANCE["float32"]
    assert observed_update(old, new, *about).released.keys() == seen.released.keys()


class Net(nn.Module):
    """A network of somebody's own: with BatchNorm, of pixels that were normalised before."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(torch.relu(self.bn(self.conv(x))).flatten(1))
        return logits


def test_a_network_of_ones_own_with_its_statistics_and_what_normalises_before_it() -> None:
    """Three steps of momentum against our own replay, through a module that holds the network and takes pixels in [0, 1]."""
    from gradleak.integrations.flower import observed_update

    torch.manual_seed(0)
    network, data = Net(), private(13)
    before = copy.deepcopy(list(network.state_dict().values()))
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(Normalise(1)(data.images)), data.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    recipe = Recipe(optimizer="momentum", learning_rate=0.05, steps=3)
    whole = nn.Sequential(OrderedDict([("normalise", Normalise(1)), ("network", Net())]))
    after = list(network.state_dict().values())
    seen = observed_update(before, after, whole, Architecture("own:net", (1, 8, 8), 10), recipe, batch_size=4)
    assert seen.residual(data.images, data.labels) < REPLAY_TOLERANCE["float32"]
    assert "network.bn.running_mean" in seen.beside

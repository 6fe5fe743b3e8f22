"""Federated training with Flower: what does a client's reply tell of its data?

    clients = Clients(Net(), Architecture("package.module:Net", (3, 32, 32), 10), out="leakage")
    app = ClientApp(mods=[audit_mod(clients)])                 # a client audits its own reply before it leaves
    strategy = KeepingStrategy(FedAvg(), clients)              # a server keeps what it sees of each client

What is kept are the weights that were sent, their change by the client, and how it was trained: as the ConfigRecord of the message and
the configuration of the run say it ("lr" or "learning-rate", "optimizer", "local-epochs" or "local-steps", "batch-size",
"weight-decay", "proximal-mu", "clip"), and the "num-examples" of the reply.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.common import FitIns, FitRes, Parameters, parameters_to_ndarrays
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import nn

from gradleak.errors import BadInput
from gradleak.formats.observation_file import save_observation
from gradleak.formats.plain_file import change_to, trained
from gradleak.formats.secret_file import Secret
from gradleak.integrations.auditing import CHEAP, audit_to
from gradleak.integrations.federated import known_before
from gradleak.integrations.federated import recipe_of as recipe_of
from gradleak.modalities.losses import CROSS_ENTROPY, Loss
from gradleak.observations.defenses import Defense
from gradleak.observations.model import Mode
from gradleak.observations.observation import Observation
from gradleak.observations.training import Recipe

UNABLE = (BadInput, RuntimeError, MemoryError, OSError)  # what keeping may end with; a training goes on
LOG = logging.getLogger(__name__)
ClientAppCallable = Callable[[Message, Context], Message]


@dataclass(frozen=True)
class Clients:
    """What is known of clients, and where it goes: out/round-N/client-ID.

    module        the network that they train, of pixels in [0, 1]; its numbers do not matter
    architecture  its blueprint: Architecture("package.module:factory", (channel, height, width), classes)
    out           a folder; what is recovered of private data goes there: do not share it
    told          of the training what messages do not say, or say otherwise: {"optimizer": "adam", "lr": 0.001}
    mode          of the module in training
    criterion     the loss
    defenses      what clients do to their weights besides, None where that is not known; clipping by a mod is none of these
    secret        of a client that audits itself: gives its private samples, to score with, in the order of the training
    attacks, seconds  of an audit
    """

    module: nn.Module
    architecture: Any
    out: Path | str
    told: Mapping[str, Any] | None = None
    mode: Mode = "train"
    criterion: Loss = CROSS_ENTROPY
    defenses: tuple[Defense, ...] | None = ()
    secret: Callable[[Context], Secret] | None = None
    attacks: Sequence[str] = CHEAP
    seconds: float = 60.0

    def observed(self, sent: RecordDict, reply: RecordDict, known: Mapping[str, Any]) -> Observation[Any]:
        """What the server sees of a client; known: the configuration of the run. BadInput where that does not suffice."""
        before, after = the_arrays(sent, "message"), the_arrays(reply, "reply")
        config = {name: value for record in sent.config_records.values() for name, value in record.items()}
        metrics = {name: value for record in reply.metric_records.values() for name, value in record.items()}
        counted = {**metrics, **(self.told or {})}.get("num-examples")
        count = int(counted) if counted else None
        recipe = recipe_of({**known, **config, **(self.told or {})}, count)
        seen = observed_update(
            before,
            after,
            self.module,
            self.architecture,
            recipe,
            batch_size=count,
            mode=self.mode,
            criterion=self.criterion,
        )
        return Observation(**{**vars(seen), "defenses": self.defenses})

    def folder(self, sent: RecordDict, node: int) -> Path:
        """Where that goes."""
        rounds = [record["server-round"] for record in sent.config_records.values() if "server-round" in record]
        return Path(self.out) / f"round-{int(rounds[0]) if rounds else 0}" / f"client-{node}"


def audit_mod(clients: Clients) -> Callable[[Message, Context, ClientAppCallable], Message]:
    """A mod of a ClientApp that audits each reply to a training message before it leaves, and changes nothing.

    Put it first: a mod sees what those after it have made of the reply, such as clipping and noise. Messages of other kinds pass. An
    audit that fails is told in the log; the reply leaves all the same.
    """

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        sent = copy.deepcopy(message.content) if message.metadata.message_type == MessageType.TRAIN else None
        reply = call_next(message, context)
        if sent is None or reply.has_error():
            return reply
        try:
            observation = clients.observed(sent, reply.content, context.run_config)
            secret = None if clients.secret is None else clients.secret(context)
            out = clients.folder(sent, context.node_id)
            audit_to(observation, out, attacks=clients.attacks, seconds=clients.seconds, secret=secret)
        except UNABLE as error:
            LOG.warning("The reply of client %s could not be audited: %s", context.node_id, error)
        return reply

    return mod


class KeepingStrategy(Strategy):  # type: ignore[misc, unused-ignore]
    """A strategy that does what another does, and keeps what it sees of each client: out/round-N/client-ID/observation.safetensors,
    which `gradleak audit` reads. What cannot be kept is told in the log, and the training goes on."""

    def __init__(self, strategy: Strategy, clients: Clients) -> None:
        self.strategy, self.clients = strategy, clients
        self.sent: dict[int, RecordDict] = {}  # of this round, by the client's number

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The messages of the other strategy."""
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        self.sent = {message.metadata.dst_node_id: message.content for message in messages}
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the other strategy makes of the replies, which are kept before."""
        replies = list(replies)
        for reply in replies:
            node = reply.metadata.src_node_id
            if reply.has_error() or node not in self.sent:
                continue
            try:
                observation = self.clients.observed(self.sent[node], reply.content, {})
                out = self.clients.folder(self.sent[node], node)
                out.mkdir(parents=True, exist_ok=True)
                save_observation(observation, out / "observation.safetensors")
            except UNABLE as error:
                LOG.warning("What client %s sent could not be kept: %s", node, error)
        made: tuple[ArrayRecord | None, MetricRecord | None] = self.strategy.aggregate_train(server_round, replies)
        return made

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """That of the other strategy."""
        messages: Iterable[Message] = self.strategy.configure_evaluate(server_round, arrays, config, grid)
        return messages

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """That of the other strategy."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """That of the other strategy."""
        self.strategy.summary()


def observed_update(
    before: Any,
    after: Any,
    module: nn.Module,
    architecture: Any,
    recipe: Recipe,
    *,
    batch_size: int | None = None,
    mode: Mode = "train",
    criterion: Loss = CROSS_ENTROPY,
) -> Observation[Any]:
    """What lies between two states of a model, as ArrayRecords, {name: array}, or lists of arrays in the order of its state_dict; of strategies
    of older Flower, the FitIns that was sent and the FitRes that came back, or their Parameters.

    module: the network; its numbers do not matter. batch_size: samples of the client; None: counted, as one step of SGD tells them.
    Raises BadInput where the states are of another model, nothing has changed, or nothing tells the number of samples.
    """
    model = known_before(plain(before), module, architecture, mode, criterion)
    change = change_to(plain(after), model, recipe, batch_size or 1, "What the client sent")
    return trained(change, recipe, batch_size)


def plain(record: Any) -> Any:
    """{name: array} of an ArrayRecord; the arrays, in their order, of a FitRes, a FitIns or Parameters; anything else as it is."""
    if isinstance(record, ArrayRecord):
        return {name: array.numpy() for name, array in record.items()}
    record = getattr(record, "parameters", record) if isinstance(record, FitIns | FitRes) else record
    return parameters_to_ndarrays(record) if isinstance(record, Parameters) else record


def the_arrays(content: RecordDict, what: str) -> ArrayRecord:
    """The only ArrayRecord of a message's content; BadInput where there are none or several."""
    records = list(content.array_records.values())
    if len(records) != 1:
        raise BadInput(f"The {what} holds {len(records)} ArrayRecords: which of them are the weights is not known.")
    return records[0]

"""Federated training with NVIDIA FLARE: what does a client's result tell of its data?

    observation = observed_dxo("client.fobs", "global.fobs", net, Architecture("package.module:Net", (3, 32, 32), 10), told={"lr": 0.1})

    job.to_server(KeepingFilter("package.module:Net", [3, 32, 32], 10, out="leakage", told={"lr": 0.1}), filter_type=FilterType.TASK_RESULT)

A result is a DXO, WEIGHTS or WEIGHT_DIFF, or an FLModel. How a client trained stands in no message but for the number of its steps
(NUM_STEPS_CURRENT_ROUND): `told` says it, by the names of `Clients` in the integration of Flower. Files are read without the library.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradleak.errors import BadInput
from gradleak.formats.nvflare_file import Exchanged, exchanged, is_exchanged, read_exchanged
from gradleak.formats.observation_file import save_observation
from gradleak.formats.own_arrays import load_arrays
from gradleak.formats.plain_file import change_by, change_to, trained
from gradleak.integrations.auditing import CHEAP, audit_to
from gradleak.integrations.federated import known_before, recipe_of
from gradleak.modalities.losses import CROSS_ENTROPY, Loss
from gradleak.modalities.networks import Architecture
from gradleak.observations.model import Mode
from gradleak.observations.observation import Observation

try:
    from nvflare.apis.event_type import EventType
    from nvflare.apis.filter import Filter
    from nvflare.apis.fl_constant import FLContextKey
except ImportError:  # files, and what only looks like a DXO, need no library
    Filter = object

STEPS, ROUND = "NUM_STEPS_CURRENT_ROUND", "current_round"
UNABLE = (BadInput, RuntimeError, MemoryError, OSError)  # what keeping may end with; a training goes on


def observed_dxo(
    result: Any,
    before: Any,
    module: nn.Module,
    architecture: Any,
    *,
    told: Mapping[str, Any],
    batch_size: int | None = None,
    mode: Mode = "train",
    criterion: Loss = CROSS_ENTROPY,
) -> Observation[Any]:
    """What a client sends, as an update.

    result      a DXO, FLModel or Shareable, as an object of the library, a dictionary, or a file of theirs (fobs, JSON); a file
                of arrays (.npz, .safetensors) is taken for the difference of weights that it is when told["kind"] is "WEIGHT_DIFF"
    before      the global weights of that round, in the same forms, or {name: array}
    module      the network, of pixels in [0, 1]; its numbers do not matter
    told        how the client trained: {"lr": 0.1, "optimizer": "sgd", "local-epochs": 1, "batch-size": 32, ...}
    batch_size  samples of the client; None: counted, as one step of SGD tells them

    Raises BadInput where the states are of another model, nothing has changed, or nothing tells the number of samples.
    """
    said, start = as_exchanged(result, "The result", told), as_exchanged(before, "What was sent", {})
    steps = {"local-steps": said.meta[STEPS]} if said.meta.get(STEPS) and "local-epochs" not in told else {}
    recipe = recipe_of({**steps, **told}, batch_size)
    model = known_before(start.data, module, architecture, mode, criterion)
    change = change_to if said.kind == "WEIGHTS" else change_by
    return trained(change(said.data, model, recipe, batch_size or 1, "What the client sent"), recipe, batch_size)


def as_exchanged(value: Any, what: str, told: Mapping[str, Any]) -> Exchanged:
    """What is exchanged, out of a file, an object of the library, or a dictionary of arrays."""
    if isinstance(value, str | Path):
        path = Path(value)
        if is_exchanged(path):
            return read_exchanged(path)
        return Exchanged("WEIGHT_DIFF" if told.get("kind") == "WEIGHT_DIFF" else "WEIGHTS", load_arrays(path))
    if isinstance(value, Mapping) and all(hasattr(array, "shape") for array in value.values()):
        return Exchanged("WEIGHT_DIFF" if told.get("kind") == "WEIGHT_DIFF" else "WEIGHTS", dict(value))
    return exchanged(value, what)


class KeepingFilter(Filter):  # type: ignore[misc, unused-ignore]
    """A filter of task results that changes nothing, and keeps what a server sees of each client: out/round-N/SITE/observation.safetensors,
    which `gradleak audit` reads. A client may have it too: behind filters that clip or add noise, it keeps what leaves.

    model        of the clients: the name of one of ours, or "package.module:factory", of pixels in [0, 1]
    input_shape  [channel, height, width]
    out          a folder
    told         how clients train: {"lr": 0.1, "optimizer": "sgd", "local-epochs": 1, "batch-size": 32}, and "num-examples" where that is known
    seconds      of an audit at once, after which the round goes on; 0: none
    attacks      of that audit

    All of that are plain values, as FLARE's configurations hold them. What cannot be kept is told in the log, and the training goes on.
    """

    def __init__(
        self,
        model: str,
        input_shape: Sequence[int],
        classes: int,
        *,
        out: str,
        told: Mapping[str, Any],
        seconds: float = 0.0,
        attacks: Sequence[str] = CHEAP,
    ) -> None:
        if Filter is object:
            raise BadInput(
                "KeepingFilter belongs into a job of NVIDIA FLARE, which is not installed: gradleak[nvflare]."
            )
        super().__init__()
        self.model, self.input_shape, self.classes = model, list(input_shape), classes
        self.out, self.told, self.seconds, self.attacks = out, dict(told), seconds, list(attacks)
        self.sent: dict[str, Exchanged] = {}  # of this round, by the client's name

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        """Keep what a client is sent, before it trains."""
        if event_type == EventType.AFTER_TASK_DATA_FILTER:
            try:
                data = exchanged(fl_ctx.get_prop(FLContextKey.TASK_DATA), "The task")
                copied = {name: torch.as_tensor(array).detach().clone() for name, array in data.data.items()}
                self.sent[site(fl_ctx)] = Exchanged(data.kind, copied, data.meta)
            except BadInput as error:  # a task without weights
                self.log_debug(fl_ctx, f"Nothing is kept of a task: {error}")

    def process(self, shareable: Any, fl_ctx: Any) -> Any:
        """The result itself; what it tells is kept."""
        sent = self.sent.pop(site(fl_ctx), None)
        try:
            if sent is not None:
                self.keep(exchanged(shareable, "The result"), sent, site(fl_ctx))
        except UNABLE as error:
            self.log_warning(fl_ctx, f"What client {site(fl_ctx)} sent could not be kept: {error}")
        return shareable

    def keep(self, result: Exchanged, sent: Exchanged, name: str) -> None:
        """Write an observation, and audit it where that is asked."""
        architecture = Architecture(self.model, tuple(self.input_shape), self.classes)  # type: ignore[arg-type]
        counted = self.told.get("num-examples")
        seen = observed_dxo(
            result, sent, architecture.build(0), architecture, told=self.told, batch_size=counted and int(counted)
        )
        folder = Path(self.out) / f"round-{int(sent.meta.get(ROUND) or 0)}" / name
        folder.mkdir(parents=True, exist_ok=True)
        save_observation(seen, folder / "observation.safetensors")
        if self.seconds:
            audit_to(seen, folder, attacks=self.attacks, seconds=self.seconds)


def site(fl_ctx: Any) -> str:
    """The client that this is about: on a server the one that asks or answers, on a client itself."""
    peer, own = fl_ctx.get_peer_context(), str(fl_ctx.get_identity_name() or "client")
    name = peer.get_identity_name() if peer is not None else ""
    return own if not name or "server" in name else str(name)  # servers are called "server" and "simulator_server"

"""What clients of NVIDIA FLARE send: files and objects of theirs, and a filter of a real job. Training replays, and nothing is run that a
file says."""

import io
import json
import struct
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn

from gradleak import Analytic
from gradleak.audit.checks import REPLAY_TOLERANCE
from gradleak.cli.flags import Audit
from gradleak.cli.inputs import observed
from gradleak.errors import BadInput
from gradleak.formats.nvflare_file import read_exchanged
from gradleak.formats.observation_file import load_observation
from gradleak.integrations.nvflare import observed_dxo
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import load
from gradleak.observations.releases import Update
from pages import run_page

ARCHITECTURE = Architecture("mlp", (1, 8, 8), 10)
PRIVATE = load("digits", indices=[3])
Arrays = dict[str, Any]


def states(steps: int = 1, rate: float = 0.1) -> tuple[Arrays, Arrays]:
    """Weights before and after local training by torch.optim, as numpy arrays."""
    module = ARCHITECTURE.build(0)
    before = {name: tensor.numpy().copy() for name, tensor in module.state_dict().items()}
    optimizer = torch.optim.SGD(module.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(PRIVATE.images), PRIVATE.labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return before, {name: tensor.numpy().copy() for name, tensor in module.state_dict().items()}


def difference(before: Arrays, after: Arrays) -> Arrays:
    return {name: after[name] - before[name] for name in after}


def npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def packed(kind: str, content: Any) -> dict[str, Any]:
    return {"__fobs_type__": kind, "__fobs_data__": content, "__fobs_dc__": "x"}


def fobs(arrays: Arrays, kind: Any, meta: dict[str, Any], *, apart: tuple[str, ...] = (), old: bool = False) -> bytes:
    """A DXO as the library writes it; `apart`: arrays in sections of their own, as long ones are; old: bytes without {"type", "data"}."""
    sections, data = b"", {}
    for name, array in arrays.items():
        content: Any = npy(array)
        if name in apart:
            number = uuid.uuid4()
            body = number.bytes + content
            sections += struct.pack(">BBQ", 102, 0, len(body)) + body
            content = packed(
                "nvflare.fuel.utils.fobs.datum.DatumRef", {"data": {"datum_id": str(number), "unwrap": True}}
            )
        data[name] = packed("numpy.ndarray", content if old else {"type": "native", "data": content})
    main = msgspec.msgpack.encode(packed("nvflare.apis.dxo.DXO", packed("tuple", [kind, meta, data])))
    return struct.pack(">BBQ", 100, 0, len(main)) + main + sections


def check(seen: Any, steps: int = 1) -> None:
    """The training replays to rounding, and the picture is read off the first layer (Phong et al. 2017, section III)."""
    assert seen.release.recipe.steps == steps
    assert seen.residual(PRIVATE.images, PRIVATE.labels) < REPLAY_TOLERANCE["float32"]
    if steps == 1:
        found = Analytic()(seen, generator=torch.Generator()).value
        assert (
            float((found - PRIVATE.images).abs().max()) < 1e-3
        )  # a difference of weights of size 0.1 keeps four digits


def test_objects_that_look_like_a_dxo() -> None:
    before, after = states()
    sent = {"DXO": {"kind": "WEIGHTS", "data": before, "meta": {}}, "__headers__": {"current_round": 4}}
    enum = SimpleNamespace(value="WEIGHT_DIFF")
    for result in (
        SimpleNamespace(data_kind="WEIGHTS", data=after, meta={"NUM_STEPS_CURRENT_ROUND": 1}),
        SimpleNamespace(data_kind=enum, data=difference(before, after), meta={}),
        SimpleNamespace(params_type="DIFF", params=difference(before, after), meta={}, metrics=None),
        {"DXO": {"kind": "WEIGHTS", "data": after, "meta": {}}},
        after,
    ):
        check(observed_dxo(result, sent, ARCHITECTURE.build(1), ARCHITECTURE, told={"lr": 0.1}))


def test_files_of_fobs_are_read_without_the_library(tmp_path: Path) -> None:
    before, after = states(steps=3)
    first = next(iter(before))
    (tmp_path / "global.fobs").write_bytes(fobs(before, "WEIGHTS", {}, apart=(first,)))
    kind = packed("nvflare.apis.dxo.DataKind", "WEIGHT_DIFF")
    for old in (False, True):
        content = fobs(difference(before, after), kind, {"NUM_STEPS_CURRENT_ROUND": 3}, old=old)
        (tmp_path / "client.fobs").write_bytes(content)
        seen = observed_dxo(
            tmp_path / "client.fobs",
            tmp_path / "global.fobs",
            ARCHITECTURE.build(1),
            ARCHITECTURE,
            told={"lr": 0.1},
            batch_size=1,
        )
        check(seen, steps=3)
    told = {"lr": 0.1, "local-epochs": 1}  # what is told comes before what the message says
    seen = observed_dxo(tmp_path / "client.fobs", before, ARCHITECTURE.build(1), ARCHITECTURE, told=told, batch_size=1)
    assert isinstance(seen.release, Update)
    assert seen.release.recipe.steps == 1


def test_json_npz_and_safetensors(tmp_path: Path) -> None:
    before, after = states()
    lists = {name: array.tolist() for name, array in after.items()}
    (tmp_path / "a.json").write_text(json.dumps({"kind": "WEIGHTS", "data": lists, "meta": {}}))
    np.savez(tmp_path / "a.npz", **after)
    (tmp_path / "a.safetensors").write_bytes(save({name: torch.as_tensor(array) for name, array in after.items()}))
    np.savez(tmp_path / "global.npz", **before)
    np.savez(tmp_path / "diff.npz", **difference(before, after))
    for name, kind in (("a.json", {}), ("a.npz", {}), ("a.safetensors", {}), ("diff.npz", {"kind": "WEIGHT_DIFF"})):
        told = {"lr": 0.1, **kind}
        check(observed_dxo(tmp_path / name, tmp_path / "global.npz", ARCHITECTURE.build(1), ARCHITECTURE, told=told))


def test_the_command_line_takes_them_as_files(tmp_path: Path) -> None:
    """WEIGHTS are those after training, WEIGHT_DIFF is their change; JSON of somebody's own is read so too."""
    before, after = states()
    (tmp_path / "global.fobs").write_bytes(fobs(before, "WEIGHTS", {}))
    (tmp_path / "weights.fobs").write_bytes(fobs(after, "WEIGHTS", {}))
    (tmp_path / "diff.fobs").write_bytes(fobs(difference(before, after), "WEIGHT_DIFF", {}))
    lists = {name: array.tolist() for name, array in difference(before, after).items()}
    (tmp_path / "diff.json").write_text(json.dumps(lists))
    usual: dict[str, Any] = {"model": "mlp", "input_shape": (1, 8, 8), "before": tmp_path / "global.fobs", "lr": 0.1}
    usual |= {"out": tmp_path / "out"}
    check(observed(Audit(**usual, after=tmp_path / "weights.fobs")))
    check(observed(Audit(**usual, observation=tmp_path / "diff.fobs")))
    check(observed(Audit(**usual, observation=tmp_path / "diff.json")))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda a: fobs(a, "WEIGHTS", {})[:-9], "cut off"),
        (lambda a: fobs(a, "WEIGHTS", {}, apart=("1.weight",))[:900], "cut off"),
        (lambda a: fobs(a, "METRICS", {}), "WEIGHTS and WEIGHT_DIFF"),
        (lambda a: fobs({}, "WEIGHTS", {}), "no weights"),
        (lambda a: fobs(a, "WEIGHTS", {}).replace(b"\x93NUMPY", b"\x80\x04pick"), "could run code"),
        (lambda a: fobs(a, "WEIGHTS", {}).replace(b"numpy.ndarray", b"x.CKKSVector."[:13]), "no array|numbers"),
        (lambda a: b"d\0" + b"\xff" * 8 + b"__fobs_type__", "cut off"),
    ],
)
def test_damaged_and_foreign_files_get_a_sentence(tmp_path: Path, content: Any, said: str) -> None:
    before, _ = states()
    (tmp_path / "client.fobs").write_bytes(content(before))
    with pytest.raises(BadInput, match=said):
        observed_dxo(tmp_path / "client.fobs", before, ARCHITECTURE.build(1), ARCHITECTURE, told={"lr": 0.1})


def test_where_the_rate_is_not_told_a_sentence_says_so() -> None:
    before, after = states()
    with pytest.raises(BadInput, match="lr"):
        observed_dxo(after, before, ARCHITECTURE.build(1), ARCHITECTURE, told={})


def library() -> Any:
    """The real library, with what it registers when a job starts."""
    pytest.importorskip("nvflare", reason="gradleak[nvflare] is not installed")
    from nvflare.apis.utils.decomposers import flare_decomposers
    from nvflare.app_common.decomposers import common_decomposers

    flare_decomposers.register()
    common_decomposers.register()
    from nvflare.apis import dxo

    return dxo


def test_files_of_the_real_library(tmp_path: Path) -> None:
    dxo = library()
    from nvflare.fuel.utils import fobs as real

    before, after = states()
    meta = {"NUM_STEPS_CURRENT_ROUND": 1}
    dxo.DXO(dxo.DataKind.WEIGHTS, before, {}).to_file(str(tmp_path / "global.fobs"))
    result = dxo.DXO(dxo.DataKind.WEIGHT_DIFF, difference(before, after), meta)
    result.to_file(str(tmp_path / "dxo.fobs"))
    real.dumpf(result.to_shareable(), str(tmp_path / "shareable.fobs"))
    real.dumpf(result, str(tmp_path / "apart.fobs"), max_value_size=1024)
    for given in (result, result.to_shareable(), *(tmp_path / f"{n}.fobs" for n in ("dxo", "shareable", "apart"))):
        check(observed_dxo(given, tmp_path / "global.fobs", ARCHITECTURE.build(1), ARCHITECTURE, told={"lr": 0.1}))
    assert read_exchanged(tmp_path / "dxo.fobs").meta == meta


def test_a_filter_keeps_what_the_server_sees_and_changes_nothing(tmp_path: Path) -> None:
    dxo = library()
    from nvflare.apis.event_type import EventType
    from nvflare.apis.fl_constant import FLContextKey, ReservedKey
    from nvflare.apis.fl_context import FLContext

    from gradleak.integrations.nvflare import KeepingFilter

    before, after = states()
    keeping = KeepingFilter("mlp", [1, 8, 8], 10, out=str(tmp_path), told={"lr": 0.1}, seconds=20, attacks=["analytic"])
    server, client = FLContext(), FLContext()
    client.set_prop(ReservedKey.IDENTITY_NAME, "site-7", private=False, sticky=False)
    server.set_prop(ReservedKey.IDENTITY_NAME, "server", private=False, sticky=False)
    server.set_peer_context(client)
    task = dxo.DXO("WEIGHTS", before, {"current_round": 1}).to_shareable()  # an average of the round before
    task.set_header("current_round", 2)
    server.set_prop(FLContextKey.TASK_DATA, task, private=True, sticky=False)
    keeping.handle_event(EventType.AFTER_TASK_DATA_FILTER, server)
    result = dxo.DXO("WEIGHT_DIFF", difference(before, after)).to_shareable()
    kept = {name: array.copy() for name, array in difference(before, after).items()}
    assert keeping.process(result, server) is result
    assert all(np.array_equal(kept[name], result["DXO"]["data"][name]) for name in kept)
    folder = tmp_path / "round-2" / "site-7"
    check(load_observation(folder / "observation.safetensors"))
    assert (folder / "leakage.md").is_file()


def test_the_lines_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dxo = library()
    monkeypatch.chdir(tmp_path)
    before, after = states()
    dxo.DXO("WEIGHTS", before).to_file("global.fobs")
    dxo.DXO("WEIGHT_DIFF", difference(before, after)).to_file("client.fobs")
    jobs: list[Any] = []
    job = SimpleNamespace(to_server=lambda filter, **about: jobs.append((filter, about)))
    from nvflare.job_config.defs import FilterType

    given = {"net": ARCHITECTURE.build(1), "Architecture": Architecture, "job": job, "FilterType": FilterType}
    made = run_page("nvflare", given, tmp_path)
    check(made["observation"])
    assert len(jobs) == 1

"""Files from strangers: whatever is wrong with one, the command ends with exit code 2 and one printable sentence, writes nothing
and runs nothing that the file names.

A seeded slice of a larger corpus. A *kind* is a file that some command reads; it is made hostile in its bytes, in the tensors that
it holds and in its JSON, one change at a time. Unaltered it must be read, or the refusals would say nothing.
"""

import io
import json
import random
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from gradleak.attacks.decoders.mlp import MLP
from gradleak.cli.app import main
from gradleak.errors import BadInput
from gradleak.formats.model_folder import read_model, write_base
from gradleak.formats.observation_file import load_observation
from gradleak.formats.reconstruction_file import load_reconstruction
from gradleak.formats.secret_file import load_secret
from gradleak.modalities.texts import load_texts
from gradleak.observations import tensor_file
from gradleak.observations.tensors import fingerprint
from gradleak.report import record
from gradleak.victims import weights as training
from gradleak.victims.publish import UNFINISHED
from gradleak.victims.small_language import small_model, train_tokenizer

SLICE = 6  # changes of each sort that a kind is tried with
WRONG: list[list[int]] = [[]]  # what no field of a header may be: a list of a list
OBSERVATION, SECRET = "observation.safetensors", "secret.safetensors"

Command = list[Any]
Refused = Callable[..., str]


@dataclass(frozen=True)
class Kind:
    """A file of the fixture `good`, and what reads it.

    file     among the good ones; a pattern where its name holds a seed
    command  its arguments, of the path of the file and of the folder with the good ones; --out comes after them
    folder   what is copied with the file in it, because the command takes the folder
    loose    changes after which the file is still what it says
    read     what reads the file alone; None: the command does
    """

    file: str
    command: Callable[[Path, Path], Command]
    folder: str = ""
    loose: tuple[str, ...] = ()
    read: Callable[[Path], object] | None = None


def attack(name: str, *more: Any) -> Callable[[Path, Path], Command]:
    return lambda file, good: ["attack", file, "--attack", name, *more]


def audit(observation: str, name: str) -> Callable[[Path, Path], Command]:
    return lambda file, good: ["audit", good / observation / OBSERVATION, "--secret", file, "--attacks", name]


def adapter(file: Path, good: Path) -> Command:
    folder = file.parents[1]
    small = ["--map-inversion.evaluations", 1, "--map-inversion.pairs", 0, "--data", "digits"]
    return ["attack", folder / "adapter", "--base", folder / "base", "--attack", "map-inversion", *small]


def capture(file: Path, good: Path) -> Command:
    return ["capture", "gradient", "--model", file.parent]


def train(file: Path, good: Path) -> Command:
    return ["train", "git", good / "lenet" / OBSERVATION, "--data", "digits", "--pairs", file.parent]


def search(file: Path, good: Path) -> Command:
    small = ["--kkt-search.steps", 1, "--kkt-search.trials", 1, "--kkt-search.folder", file.parent]
    return ["attack", good / "weights" / OBSERVATION, "--attack", "kkt-search", "--data", "digits", *small]


def go_on(file: Path, good: Path) -> Command:
    return ["capture", "weights", "--data", "digits", "--per-class", 1, "--epochs", 3, "--out", file.parent]


def start(file: Path, good: Path) -> Command:
    steps = ["--inverting-gradients.steps", 1, "--data", "digits"]
    return ["attack", good / "gradient" / OBSERVATION, "--attack", "inverting-gradients", "--start", file, *steps]


def generate(file: Path, good: Path) -> Command:
    return ["attack", good / "lenet" / OBSERVATION, "--attack", "git", "--data", "digits", "--git.generator", file]


def plain(file: Path, good: Path) -> Command:
    weights = good / "adapter" / "base" / "model.safetensors"
    shape = ["--input-shape", 1, 8, 8, "--classes", 10]
    return ["attack", file, "--attack", "analytic", "--model", "mlp", "--weights", weights, *shape]


def weights_alone(file: Path, good: Path) -> Command:
    shape = ["--input-shape", 1, 8, 8, "--classes", 10]
    return ["attack", file, "--attack", "kkt", "--kkt.steps", 1, "--model", "mlp", *shape]


def read_folder(file: Path) -> object:
    return read_model(file.parent)


def seen(folder: str, command: Callable[[Path, Path], Command], *loose: str) -> Kind:
    return Kind(f"{folder}/{OBSERVATION}", command, loose=(*loose, "header torch"), read=load_observation)


ANALYTIC, DAGER, MAP, KKT = (
    attack("analytic"),
    attack("dager"),
    attack("map-inversion"),
    attack("kkt", "--kkt.steps", 1),
)
KINDS = {
    "gradient": seen("gradient", ANALYTIC, "labels missing"),
    "update": seen("update", ANALYTIC),
    "adapter": seen("adapter", MAP),
    "weights": seen("weights", KKT),
    "gradient of texts": seen("text", DAGER),
    "update of texts": seen("textupdate", DAGER),
    "adapter of texts": seen("textlora", DAGER),
    "old gradient": seen("old gradient", ANALYTIC, "labels missing"),
    "old update": seen("old update", ANALYTIC),
    "old adapter": seen("old adapter", MAP, "released missing"),  # schema 1 did not say which factors it holds
    "old weights": seen("old weights", KKT),
    "old gradient of texts": seen("old text", DAGER, "released missing"),
    "secret": Kind(f"gradient/{SECRET}", audit("gradient", "analytic"), read=load_secret),
    "secret of texts": Kind(f"text/{SECRET}", audit("text", "dager"), read=load_secret),
    "old secret": Kind(f"old gradient/{SECRET}", audit("gradient", "analytic"), read=load_secret),
    "reconstruction": Kind("attacked/reconstruction.safetensors", start, read=load_reconstruction),
    "old reconstruction": Kind("old attacked/reconstruction.safetensors", start, read=load_reconstruction),
    "generator": Kind("git/generator.safetensors", generate, loose=("pictures more",)),
    "pairs": Kind("pairs/shard-00000.safetensors", train, "pairs", loose=("header",)),
    "finished trial": Kind("trials/*.safetensors", search, "trials"),
    "unfinished training": Kind("unfinished/training.safetensors", go_on, "unfinished"),
    "PEFT folder": Kind("adapter/adapter/adapter_model.safetensors", adapter, "adapter"),
    "base of ours": Kind("adapter/base/model.safetensors", adapter, "adapter"),
    "base of transformers": Kind("vit/base/model.safetensors", adapter, "vit", ("whole",), read_folder),
    "language model": Kind("lm/model.safetensors", capture, "lm", read=read_folder),
    "plain gradient": Kind("plain.safetensors", plain, loose=("missing",)),
    "plain weights": Kind("adapter/base/model.safetensors", weights_alone),
}
JSON_KINDS = {
    "config of an adapter": Kind("adapter/adapter/adapter_config.json", adapter, "adapter"),
    "base of ours": Kind("adapter/base/gradleak.json", adapter, "adapter"),
    "base of transformers": Kind("vit/base/config.json", adapter, "vit"),
    "preprocessor": Kind("vit/base/preprocessor_config.json", adapter, "vit"),
    "language model": Kind("lm/config.json", capture, "lm"),
    "tokenizer": Kind("lm/tokenizer.json", capture, "lm"),
    "pairs": Kind("pairs/pairs.json", train, "pairs"),
    "record to report": Kind("audited/record.json", lambda file, good: ["report", file]),
    "record to run again": Kind("audited/record.json", lambda file, good: ["rerun", file]),
}
FIELDS = {  # whose type matters, of files that hold much more
    "config of an adapter": "peft_type r lora_alpha init_lora_weights use_rslora lora_dropout rank_pattern alpha_pattern",
    "base of ours": "schema architecture architecture.name architecture.input_shape architecture.classes",
    "base of transformers": "model_type hidden_size num_hidden_layers image_size patch_size num_channels",
    "preprocessor": "image_mean image_std do_normalize",
    "language model": "model_type hidden_size vocab_size num_attention_heads max_position_embeddings",
    "tokenizer": "model added_tokens pre_tokenizer model.vocab model.merges",
    "pairs": "model pictures count batch defense seed shard",
    "record to report": "schema command seed environment threat_model verdict verdict.level results metrics controls",
    "record to run again": "schema command.name command.arguments command.attacks command.inputs command.arguments.seed "
    "command.arguments.observation command.arguments.attacks command.arguments.input_shape command.attacks.analytic.tolerance",
}


# --- Good files ---


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good file of every kind."""
    folder = tmp_path_factory.mktemp("good")

    def run(*argv: Any) -> None:
        assert main([str(part) for part in argv]) == 0

    digits = ["--data", "digits", "--indices", 3]
    run("capture", "gradient", "--model", "mlp", *digits, "--reveal-labels", "--out", folder / "gradient")
    run("capture", "gradient", "--model", "lenet", *digits, "--out", folder / "lenet")
    run("capture", "update", "--model", "mlp", *digits, "--out", folder / "update")
    lora = ["--epochs", 0, "--rank", 2, *digits]
    run("capture", "adapter", "--model", "mlp", *lora, "--out", folder / "adapter")
    run("capture", "adapter", "--model", "vit", "--target-modules", "q_proj", *lora, "--out", folder / "vit")
    run(*go_on(folder / "weights" / UNFINISHED, folder))
    for name, family in (("lm", "bert"), ("gpt2", "gpt2")):
        tokenizer = train_tokenizer(load_texts("embedded", "train", limit=40).texts, family, size=300)  # type: ignore[arg-type]
        task: Any = "classification" if family == "bert" else "causal-lm"
        write_base(small_model(family, tokenizer, task, width=16, layers=1, heads=2), folder / name)  # type: ignore[arg-type]
    run("capture", "gradient", "--model", folder / "lm", "--out", folder / "text")
    run("capture", "update", "--model", folder / "gpt2", "--task", "causal-lm", "--out", folder / "textupdate")
    run("capture", "adapter", "--model", folder / "lm", "--rank", 2, "--out", folder / "textlora")
    run("attack", folder / "gradient" / OBSERVATION, "--attack", "analytic", "--out", folder / "attacked")
    run("audit", folder / "gradient" / OBSERVATION, "--attacks", "analytic", "--out", folder / "audited")
    lenet = folder / "lenet" / OBSERVATION
    run("capture", "pairs", lenet, "--data", "digits", "--count", 12, "--out", folder / "pairs")
    run("train", "git", lenet, "--data", "digits", "--pairs", folder / "pairs", "--out", folder / "git")
    (folder / "trials").mkdir()
    run(*search(folder / "trials" / "any", folder), "--out", folder / "searched")
    released = tensor_file.group(load_file(folder / "gradient" / OBSERVATION), "released")
    save_file(released, folder / "plain.safetensors")
    for name in ("gradient", "update", "adapter", "weights", "text"):
        in_old_words(folder / name / OBSERVATION, folder / f"old {name}" / OBSERVATION)
    images = {"images": load_file(folder / "gradient" / SECRET)["inputs"], "labels": torch.tensor([8])}
    tensor_file.write(images, "gradleak/secret/1", {"source": "digits"}, folder / "old gradient" / SECRET)
    about = {"residual": 0.1, "status": "Near.", "iterations": 3, "trace": [[1, 0.5]]}
    old = folder / "old attacked" / "reconstruction.safetensors"
    tensor_file.write(images, "gradleak/reconstruction/1", about, old)
    interrupted(go_on(folder / "unfinished" / UNFINISHED, folder))
    return folder


def interrupted(command: Command) -> None:
    """Ctrl-C right after unfinished training was saved for the first time."""
    save = tensor_file.write

    def once(*args: Any, **more: Any) -> None:
        save(*args, **more)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "SAVE_SECONDS", -1.0)
        patch.setattr(tensor_file, "write", once)
        assert main([str(part) for part in command]) == 130


def in_old_words(path: Path, copy: Path) -> None:
    """The file as gradleak wrote it before releases had schemas of their own: the same tensors under another header."""
    _, about = opened(path.read_bytes())
    settings, blueprint = about["settings"], about["blueprint"]
    kind, of_texts = str(about["release"]).capitalize(), about["modality"] == "texts"
    old = {key: about[key] for key in ("frozen", "state_hash", "batch_size", "precision", "torch")}
    old |= {"kind": f"Text{kind}", **blueprint} if of_texts else {"kind": kind, "architecture": blueprint}
    if not of_texts:
        old |= {"mode": "eval", "reduction": "mean", "buffers_revealed": True}
    if kind == "Update":
        names = {"learning_rate": "learning_rate", "local_steps": "steps", "local_batch_size": "batch_size"}
        old["recipe"] = {new: settings["recipe"][name] for new, name in names.items()}
    elif kind == "Adapter":
        old["adapter"] = {name: settings[name] for name in ("scaling", "recipe", "dropout")}
    elif kind == "Weights":
        old["weights"] = settings
    schema = "gradleak/text-observation/1" if of_texts else "gradleak/observation/1"
    tensor_file.write(load_file(path), schema, old, copy)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """Run a command that must end with exit code 2 and one printable sentence, and write nothing; returns the sentence."""

    def run(command: Command, what: str = "") -> str:
        command = [*command, *([] if "--out" in command else ["--out", tmp_path / "out"])]
        capsys.readouterr()
        before = contents(tmp_path)
        code = main([str(part) for part in command])
        printed = capsys.readouterr()
        assert (code, printed.out) == (2, ""), what
        assert printed.err.startswith("gradleak: "), what
        assert printed.err.endswith("\n"), what
        assert printed.err[:-1].isprintable(), what
        assert len(printed.err) <= 1_100, what
        assert contents(tmp_path) == before, what
        return printed.err

    return run


def contents(folder: Path) -> dict[str, int]:
    """Every file below, with the time of its last change."""
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def copied(kind: Kind, good: Path, tmp_path: Path) -> Path:
    """The file of a kind in a place where it may be changed, with the folder that it needs around it."""
    [file] = good.glob(kind.file)
    if not kind.folder:
        shutil.copy(file, tmp_path / file.name)
        return tmp_path / file.name
    shutil.copytree(good / kind.folder, tmp_path / kind.folder, dirs_exist_ok=True)
    return tmp_path / file.relative_to(good)


# --- Hostile ones ---


def opened(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The header of a safetensors file, and the JSON of ours in it."""
    (size,) = struct.unpack("<Q", data[:8])
    header: dict[str, Any] = json.loads(data[8 : 8 + size])
    return header, json.loads(header.get("__metadata__", {}).get("gradleak", "{}"))


def joined(header: Any, data: bytes) -> bytes:
    """A safetensors file with another header: bytes as they are, else JSON."""
    (size,) = struct.unpack("<Q", data[:8])
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def hostile_bytes(data: bytes, noise: random.Random) -> Iterator[tuple[str, bytes]]:
    """No safetensors file any more: cut, overwritten, or with a header that lies."""
    header, _ = opened(data)
    (size,) = struct.unpack("<Q", data[:8])
    name = next(key for key in header if key != "__metadata__")
    yield "empty", b""
    yield "noise", noise.randbytes(1_000)
    yield "zeros", bytes(1_000)
    yield "a pickle", b"\x80\x04K\x01."
    yield "a web page", b"<!DOCTYPE html><html><script>alert(1)</script></html>"
    for cut in (7, 8, 9, 8 + size // 2, 8 + size, len(data) // 2, len(data) - 1):
        yield f"cut at {cut}", data[:cut]
    for length in (0, size + 10**6, 2**63, 2**64 - 1):
        yield f"a header of {length}", struct.pack("<Q", length) + data[8:]
    for text in (b"null", b"[]", b"{oops", b"[" * 10_000, b'{"a":' * 10_000, b'{"\xff\xfe": 1}', b"\0" * 64):
        yield f"header {text[:8]!r}", joined(text, data)
    for shape in ([2**62], [2**31, 2**31], [-1], [1.5], "x", None, [10**30]):
        yield f"shape {shape}", joined({**header, name: {**header[name], "shape": shape}}, data)
    for offsets in ([8, 0], [-8, 0], [0, 2**62], [0], "x"):
        yield f"offsets {offsets}", joined({**header, name: {**header[name], "data_offsets": offsets}}, data)
    for kind in ("X", "F4", "F6_E2M3", None, 5):
        yield f"format {kind}", joined({**header, name: {**header[name], "dtype": kind}}, data)


def hostile_tensors(tensors: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """One tensor of each group is of another shape or format, or holds what nobody can compute with."""
    groups = {name.partition("/")[0] if "/" in name else "": name for name in reversed(list(tensors))}
    if "" in groups:
        groups |= {name: name for name in ("images", "inputs", "labels", "pictures") if name in tensors}
    for group, name in groups.items():
        tensor = tensors[name]
        changes = {
            "complex": tensor.to(torch.complex64),
            "float8": tensor.to(torch.float8_e4m3fn),
            "scalar": tensor.reshape(-1)[:1].reshape(()).clone(),
            "more": torch.cat([tensor, tensor]) if tensor.ndim else tensor,
        }
        if tensor.is_floating_point():
            changes |= {str(value): torch.full_like(tensor, value) for value in (torch.nan, torch.inf, 1e38)}
            changes["whole"] = tensor.to(torch.int64)
        elif group == "labels":
            changes |= {str(value): torch.full_like(tensor, value) for value in (-1, 10**6, 2**63 - 1)}
        for what, changed in changes.items():
            if changed.shape != tensor.shape or changed.dtype != tensor.dtype or not torch.equal(changed, tensor):
                yield f"{group} {what}".strip(), {**tensors, name: changed}
        yield f"{group} missing".strip(), {key: value for key, value in tensors.items() if key != name}


def hostile_headers(data: bytes) -> Iterator[tuple[str, bytes]]:
    """A field of our JSON is of a type that it cannot have, or the JSON is none."""
    header, about = opened(data)
    meta = header["__metadata__"]

    def again(**change: str) -> bytes:
        return joined({**header, "__metadata__": {**meta, **change}}, data)

    for text in (
        "",
        "{oops",
        "[1]",
        "null",
        "[" * 10_000,
        '{"a":' * 10_000,
        '{"a":' + "9" * 5_000 + "}",
        '{"a":"\\ud800"}',
    ):
        yield f"header is {text[:8]!r}", again(gradleak=text)
    for schema in ("", "gradleak", "gradleak/other/1", meta["schema"][:-1] + "9", "\x1b[31mevil\n\nline", "x" * 10_000):
        yield f"schema {schema[:20]!r}", again(schema=schema)
    for place in places(about):
        yield f"header {'.'.join(place)}", again(gradleak=json.dumps(with_wrong(about, place)))


def places(value: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The fields of an object and of the objects in it."""
    for key, entry in value.items():
        yield (*at, key)
        if isinstance(entry, dict):
            yield from places(entry, (*at, key))


def with_wrong(value: Any, place: tuple[str, ...]) -> Any:
    """A copy of plain data with the wrong value at a place."""
    inner = value[place[0]] if len(place) > 1 else None
    return {**value, place[0]: WRONG if len(place) == 1 else with_wrong(inner, place[1:])}


def hostile_json(text: bytes, noise: random.Random) -> Iterator[tuple[str, bytes]]:
    """No JSON any more, or that of something else."""
    yield "empty", b""
    yield "cut", text[: len(text) // 2]
    yield "deep", b"[" * 100_000
    yield "deep objects", b'{"a":' * 100_000
    yield "not UTF-8", b"\xff\xfe" + text
    yield "UTF-16", text.decode().encode("utf-16")
    for other in (b"[]", b"null", b"5", b'"x"', b"{}", b"NaN", b'{"a":' + b"9" * 6_000 + b"}"):
        yield f"{other[:5]!r}", other
    yield "noise", noise.randbytes(2_000)


def part(kind: str, changes: Iterator[tuple[str, Any]], loose: tuple[str, ...] = (), size: int = SLICE) -> list[Any]:
    """Some of the changes, the same ones in every run."""
    every = [(what, change) for what, change in changes if not what.startswith(loose or ("\n",))]
    return random.Random(kind).sample(every, min(size, len(every)))


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.read])
def test_unaltered_files_are_read(good: Path, name: str) -> None:
    kind = KINDS[name]
    assert kind.read is not None
    kind.read(good / kind.file)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if not kind.read])
def test_commands_read_unaltered_files(good: Path, tmp_path: Path, name: str) -> None:
    command = KINDS[name].command(copied(KINDS[name], good, tmp_path), good)
    command = [*command, *([] if "--out" in command else ["--out", tmp_path / "out"])]
    assert main([str(part) for part in command]) == 0


@pytest.mark.parametrize("name", KINDS)
def test_damaged_bytes(good: Path, tmp_path: Path, refused: Refused, name: str) -> None:
    file = copied(KINDS[name], good, tmp_path)
    for what, data in part(name, hostile_bytes(file.read_bytes(), random.Random(name))):
        file.write_bytes(data)
        refused(KINDS[name].command(file, good), what)


@pytest.mark.parametrize("name", KINDS)
def test_hostile_tensors(good: Path, tmp_path: Path, refused: Refused, name: str) -> None:
    kind = KINDS[name]
    file = copied(kind, good, tmp_path)
    meta, tensors = opened(file.read_bytes())[0].get("__metadata__"), load_file(file)
    for what, changed in part(name, hostile_tensors(tensors), kind.loose):
        save_file({key: value.contiguous() for key, value in changed.items()}, file, metadata=meta)
        refused(kind.command(file, good), what)


@pytest.mark.parametrize(
    "name", [name for name in KINDS if name.split()[0] not in ("PEFT", "base", "language", "plain")]
)
def test_hostile_headers(good: Path, tmp_path: Path, refused: Refused, name: str) -> None:
    kind = KINDS[name]
    file = copied(kind, good, tmp_path)
    for what, data in part(name, hostile_headers(file.read_bytes()), kind.loose):
        file.write_bytes(data)
        refused(kind.command(file, good), what)


@pytest.mark.parametrize("name", JSON_KINDS)
def test_hostile_json(good: Path, tmp_path: Path, refused: Refused, name: str) -> None:
    kind = JSON_KINDS[name]
    file = copied(kind, good, tmp_path)
    text = file.read_bytes()
    for what, data in part(name, hostile_json(text, random.Random(name)), ("b'{}'",) if name == "preprocessor" else ()):
        file.write_bytes(data)
        refused(kind.command(file, good), what)
    for place in FIELDS[name].split():
        file.write_text(json.dumps(with_wrong(json.loads(text), tuple(place.split(".")))))
        refused(kind.command(file, good), place)


def test_whole_numbers_that_nobody_means_are_refused_at_once(good: Path, tmp_path: Path, refused: Refused) -> None:
    """Steps of 2^63 were a loop without an end, and sides of 2^31 an allocation of terabytes."""
    began = time.process_time()
    cases = [
        ("update", ("settings", "recipe", "steps"), 2**63),
        ("update", ("settings", "recipe", "steps"), 10**18),
        ("update", ("settings", "recipe", "batch_size"), 2**70),
        ("adapter", ("settings", "recipe"), {"learning_rate": 0.1, "steps": 2**63}),
        ("old update", ("recipe", "local_steps"), 2**63),
        ("gradient", ("batch_size",), 2**63),
        ("gradient", ("blueprint", "classes"), 10**9),
        ("gradient", ("blueprint", "input_shape"), [1, 2**31, 2**31]),
        ("gradient", ("blueprint", "input_shape"), [3, 4096, 4096]),
        ("old gradient", ("architecture", "classes"), 10**6),
        ("generator", ("options", "batch"), 10**18),
    ]
    for name, place, value in cases:
        file = copied(KINDS[name], good, tmp_path)
        header, about = opened(file.read_bytes())
        inner = about
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        meta = {**header["__metadata__"], "gradleak": json.dumps(about)}
        file.write_bytes(joined({**header, "__metadata__": meta}, file.read_bytes()))
        refused(KINDS[name].command(file, good), f"{name} {place}")
    assert time.process_time() - began < 10


@pytest.mark.parametrize("name", ["gradient", "update", "adapter", "gradient of texts", "old gradient"])
def test_weights_that_overflow_are_refused(good: Path, tmp_path: Path, refused: Refused, name: str) -> None:
    """Every number is finite, and the hash in the header is made good again: only the model's own outputs show it. Three layers
    of 1e14 are beyond float32, whose largest number is 3e38; of a transformer, the scores of attention are."""
    file = copied(KINDS[name], good, tmp_path)
    tensors, (header, about) = load_file(file), opened(file.read_bytes())
    hostile = {
        key: torch.full_like(tensor, 1e14) if key.startswith("parameters/") else tensor
        for key, tensor in tensors.items()
    }
    about["state_hash"] = fingerprint(tensor_file.group(hostile, "parameters"))
    save_file(hostile, file, metadata={**header["__metadata__"], "gradleak": json.dumps(about)})
    assert "NaN or infinite" in refused(KINDS[name].command(file, good))


def test_tokenizers_that_would_panic_or_fill_the_memory(good: Path, tmp_path: Path, refused: Refused) -> None:
    """The tokenizers library makes room for every id up to the largest, and ends in a panic over templates of unknown tokens."""
    file = copied(JSON_KINDS["tokenizer"], good, tmp_path)
    held = json.loads(file.read_bytes())
    vocabulary = {**held["model"], "vocab": {**held["model"]["vocab"], "x": 10**9}}
    unlike = {**held["added_tokens"][0], "id": 10**9, "content": "x"}
    changes: dict[str, dict[str, Any]] = {
        "vocabulary": {"model": vocabulary},
        "beside it": {"added_tokens": [*held["added_tokens"], unlike]},
        "template": {"post_processor": {**held["post_processor"], "special_tokens": {}}},
    }
    for what, change in changes.items():
        file.write_text(json.dumps({**held, **change}))
        refused(capture(file, good), what)


def test_special_files(good: Path, tmp_path: Path, refused: Refused) -> None:
    """What is no file, never ends or cannot even be named."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("/nowhere/x")
    names = [tmp_path / name for name in ("folder", "loop", "nowhere", "none")]
    for name in [*names, "/dev/zero", "/dev/null", "a" * 5_000, "\x1b[31m\nred", "\udcff", ""]:
        refused(ANALYTIC(name, good), str(name))  # type: ignore[arg-type]
        refused(audit("gradient", "analytic")(name, good), str(name))  # type: ignore[arg-type]


# --- Decoders are read in Python only ---


def test_hostile_decoders(tmp_path: Path) -> None:
    file = tmp_path / "decoder"
    MLP("fitted to", {"1.right/1": torch.ones(2, 3)}).save(file)
    good, noise = file.read_bytes(), random.Random(0)
    assert MLP.load(file).fitted == "fitted to"
    for _, data in [*hostile_bytes(good, noise), *hostile_headers(good)]:
        file.write_bytes(data)
        with pytest.raises(BadInput, match="decoder"):
            MLP.load(file)


# --- Pictures and texts ---


def pixels(kind: str = "PNG", mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (16, 16)).save(stream, kind)
    return stream.getvalue()


def bomb(side: int) -> bytes:
    """The header of a PNG of so many pixels each way."""
    data = bytearray(pixels())
    data[16:24] = struct.pack(">II", side, side)
    return bytes(data)


PICTURES = {
    "empty": b"",
    "cut": pixels()[:40],
    "noise": random.Random(0).randbytes(500),
    "a web page": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
    "a pickle": b"\x80\x04K\x01.",
    "a bomb": bomb(100_000),
    "too many pixels": bomb(12_000),
    "a program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n",
}
ROWS = {
    "huge labels": {"label": [2**62, 1]},
    "labels beyond int64": {"label": pa.array([2**64 - 1, 1], pa.uint64())},
    "negative labels": {"label": [-1, 1]},
    "fractions as labels": {"label": pa.array([[0], [1]])},
    "missing labels": {"label": pa.array([0, None])},
    "no pictures": {"image": ["a", "b"]},
    "no bytes": {"image": pa.array([{"bytes": None, "path": None}] * 2)},
    "somebody else's file": {"image": pa.array([{"bytes": None, "path": "/etc/passwd"}] * 2)},
    "no end": {"image": pa.array([{"bytes": None, "path": "/dev/zero"}] * 2)},
    "a path with NUL": {"image": pa.array([{"bytes": None, "path": "a\0b"}] * 2)},
    "junk": {"image": pa.array([{"bytes": b"junk", "path": None}] * 2)},
}
LINES = {
    "no texts": {"body": ["a", "b"]},
    "nothing": {"text": pa.array([None, "b"])},
    "numbers": {"text": [1, 2]},
    "empty": {"text": ["", "b"]},
    "too long": {"text": ["word " * 10_000, "b"]},
    "huge labels": {"text": ["a", "b"], "label": [10**12, 1]},
}


def table(path: Path, columns: dict[str, Any]) -> None:
    """A parquet file as Hugging Face writes them: a column of pictures is said to be one."""
    path.parent.mkdir(exist_ok=True)
    made = pa.table(columns)
    features: dict[str, Any] = {"image": {"_type": "Image"}} if "image" in columns else {}
    features |= {
        field.name: {"_type": "Value", "dtype": str(field.type)}
        for field in made.schema
        if field.name in ("label", "text")
    }
    if "image" in columns and not pa.types.is_struct(made.schema.field("image").type):
        features = {}
    meta = {b"huggingface": json.dumps({"info": {"features": features}}).encode()} if features else None
    pq.write_table(made.replace_schema_metadata(meta), path)


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What Hugging Face keeps of data sets goes to a folder of this test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def of_pictures(folder: Path) -> Command:
    small = ["--model", "mlp", "--resize", 8, 8]
    return ["capture", "gradient", *small, "--data", folder, "--split", "train"]


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("what", PICTURES)
def test_hostile_pictures(tmp_path: Path, refused: Refused, what: str) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(PICTURES[what])
    refused(of_pictures(tmp_path / "set"))


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("what", ROWS)
def test_hostile_rows(tmp_path: Path, refused: Refused, what: str) -> None:
    rows = {"image": pa.array([{"bytes": pixels(), "path": None}] * 2), "label": [0, 1], **ROWS[what]}
    table(tmp_path / "set" / "train.parquet", rows)
    refused(of_pictures(tmp_path / "set"))


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("what", LINES)
def test_hostile_texts(good: Path, tmp_path: Path, refused: Refused, what: str) -> None:
    table(tmp_path / "set" / "train.parquet", LINES[what])
    refused(["capture", "gradient", "--model", good / "lm", "--data", tmp_path / "set", "--split", "train"])


@pytest.mark.usefixtures("own_cache")
def test_damaged_tables(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "set" / "train.parquet"
    table(path, {"image": pa.array([{"bytes": pixels(), "path": None}]), "label": [0]})
    whole = path.read_bytes()
    for cut in (0, 4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refused(of_pictures(path.parent), str(cut))
    refused(of_pictures(Path("/")))


# --- Nothing that a file names is run, imported or written to ---


@pytest.fixture
def canary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that must not be there afterwards. The module "evil" can be imported, and makes it."""
    folder = tmp_path_factory.mktemp("evil")
    made = folder / "made"
    (folder / "evil.py").write_text(f"open({str(made)!r}, 'w')\ndef factory(*args): raise SystemExit\n")
    monkeypatch.syspath_prepend(folder)
    yield made
    assert not made.exists()


def altered_record(good: Path, path: Path, **change: Any) -> Path:
    """The record of an audit with other fields of its command: arguments are changed, others replaced."""
    held: Any = record.read(good / "audited" / "record.json")
    arguments = {**held["command"]["arguments"], **change.pop("arguments", {})}
    held["command"] = {**held["command"], "inputs": {}, "arguments": arguments, **change}
    path.write_text(json.dumps(held))
    return path


def test_an_unaltered_record_is_run_again(good: Path, tmp_path: Path) -> None:
    assert main(["rerun", str(good / "audited" / "record.json"), "--out", str(tmp_path / "out")]) == 0


def test_a_record_cannot_write(good: Path, tmp_path: Path, canary: Path, refused: Refused) -> None:
    """Every text of a command that could be a flag of the parser: it would write a file wherever the record says."""
    flag = ["--tyro-write-completion", "bash", str(canary)]
    fields = record.read(good / "audited" / "record.json")["command"]["arguments"]
    for key in fields:
        if key != "out":  # whose place is the one that the user gives
            for value in (" ".join(flag), flag):
                what = f"{key} {value}"
                refused(["rerun", altered_record(good, tmp_path / "r.json", arguments={key: value})], what)
    for name in ("audit " + " ".join(flag), flag[0], "demo\n" + flag[0]):
        refused(["rerun", altered_record(good, tmp_path / "r.json", name=name)], name)
    for argv in (["audit", *flag], ["demo", *flag]):
        refused(["rerun", altered_record(good, tmp_path / "r.json", arguments={"argv": argv})])
    folder = {"kkt-search": {"folder": str(canary), "trials": 1, "steps": 1}}
    arguments = {"observation": str(good / "weights" / OBSERVATION), "attacks": ["kkt-search"]}
    refused(["rerun", altered_record(good, tmp_path / "r.json", attacks=folder, arguments=arguments)])


def test_a_record_cannot_import(good: Path, tmp_path: Path, canary: Path, refused: Refused) -> None:
    for code in ("evil:factory", " evil:factory", "evil:"):
        path = altered_record(good, tmp_path / "r.json", arguments={"model": code})
        assert "evil" in refused(["rerun", path])
        refused(["rerun", path, "--model", "other:factory"])


def test_a_record_cannot_run_for_ever(good: Path, tmp_path: Path, refused: Refused) -> None:
    for steps in (2**63, 2**63 - 1, 10**18, -1):
        attacks = {"inverting-gradients": {"steps": steps}}
        path = altered_record(
            good, tmp_path / "r.json", attacks=attacks, arguments={"attacks": ["inverting-gradients"]}
        )
        assert "steps" in refused(["rerun", path])


def test_no_header_can_import(good: Path, tmp_path: Path, canary: Path, refused: Refused) -> None:
    """An architecture, or what a generator is laid out like, is a name of ours."""
    for name, place in (("gradient", "blueprint"), ("old gradient", "architecture"), ("generator", "options")):
        file = copied(KINDS[name], good, tmp_path)
        header, about = opened(file.read_bytes())
        about[place] |= {"layout" if place == "options" else "name": "evil:factory"}
        meta = {**header["__metadata__"], "gradleak": json.dumps(about)}
        file.write_bytes(joined({**header, "__metadata__": meta}, file.read_bytes()))
        refused(KINDS[name].command(file, good), name)


def test_no_folder_can_import(good: Path, tmp_path: Path, canary: Path, refused: Refused) -> None:
    """transformers would run the code that a folder brings along, if it were trusted."""
    code = canary.with_name("evil.py").read_text()
    maps = {"AutoConfig": "evil.C", "AutoModelForImageClassification": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    for name in ("base of transformers", "language model"):
        file = copied(JSON_KINDS[name], good, tmp_path)
        (file.parent / "evil.py").write_text(code)
        file.write_text(json.dumps({**json.loads(file.read_bytes()), "model_type": "evil", "auto_map": maps}))
        refused(JSON_KINDS[name].command(file, good), name)

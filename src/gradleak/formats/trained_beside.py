"""What was trained beside the factors of an adapter: heads, biases, whole embeddings, rows of single tokens, LoRA on embeddings.

The gradient of an embedding is zero in the row of every token that no text holds, so the rows that training moved name the words of
the private texts, exactly and without any attack; unless the embedding is tied to the output, where every row moves.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from gradleak.errors import BadInput, shortened
from gradleak.formats.adapter_files import AdapterFiles, Config, by_pattern
from gradleak.formats.adapter_names import module_of, parameter_of
from gradleak.modalities.language_models import LanguageArchitecture
from gradleak.modalities.modality import by
from gradleak.observations.model import Model
from gradleak.observations.release import Reservation
from gradleak.observations.tensors import Tensors

SHORT = (torch.bfloat16, torch.float16)  # formats through which weights may have gone that nobody trained
EXACT = 1e-5  # relative: rounding of numbers that weight decay has shrunk some hundred times, each time by half of 1.2e-7 at most
NEARLY = 0.9  # of a vocabulary: where more rows moved, it is not for the words
MOST_WORDS = 40  # that a sentence lists


@dataclass(frozen=True)
class Beside:
    """What was trained besides, in the names of the base model.

    start         {parameter: where it began, where that is not as the base model has it}
    trained       parameters that were trained as a whole, from a start that is known
    changed       {parameter: its change}, of these
    held          what was trained besides and `simulate` does not train along
    embedded      {parameter of an embedding that LoRA adapts too: its rank}
    known_at_end  parameters that nobody knows but as training left them
    remarks       what a reader of the report has to know of it
    """

    start: Tensors
    trained: tuple[str, ...]
    changed: Tensors
    held: tuple[str, ...]
    embedded: dict[str, int]
    known_at_end: tuple[str, ...]
    remarks: tuple[Reservation, ...]


@dataclass
class Parts:
    """What one adapter's files say of the model's parameters.

    whole       {parameter: tensor}
    embeddings  {parameter of an embedding: A (r, vocabulary), B (width, r), s}
    tokens      {parameter of an embedding: the ids of its trained rows, the rows}
    biases      {module: s times the bias of its B}
    """

    whole: Tensors = field(default_factory=dict)
    embeddings: dict[str, tuple[Tensor, Tensor, float]] = field(default_factory=dict)
    tokens: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    biases: Tensors = field(default_factory=dict)


def trained_beside(
    files: AdapterFiles, model: Model[Any], config: Config, *, first: AdapterFiles | None, brought: Collection[str]
) -> Beside:
    """What was trained beside the factors; BadInput for what is no part of the model, or does not fit it.

    first: the adapter before training, whose parts the model then began with. brought: parameters that the model has from these files.
    """
    parts, start = parts_of(files, model, config), Tensors()
    if first is not None:
        began = parts_of(first, model, config)
        start = began_with(began, model)
    else:
        began = Parts()
    was = {**model.parameters, **start}
    whole = {p: t for p, t in parts.whole.items() if p not in brought}
    trained = tuple(p for p, t in whole.items() if bool(moved(t, was[p]).any()))
    held = [f"{p} (by LoRA)" for p in parts.embeddings] + [f"single rows of {p}" for p in parts.tokens]
    held += [f"the biases of lora_B in {len(parts.biases)} modules"] if parts.biases else []
    remarks: list[Reservation] = []
    if trained:
        remarks.append(
            (
                "trained_whole",
                "info",
                f"Beside the factors, {listed(trained)} changed as a whole in training: the change is in the files as well, and is read as "
                "an update.",
            )
        )
    if known := tuple(name for name in brought if name in parts.whole):
        remarks.append(
            (
                "start_unknown",
                "warning",
                f"The adapter brings {listed(known)}, which the base model lacks wholly or in part: it is used as training left it, because "
                "where it began is not known, so what is told of the layers below is approximate.",
            )
        )
    remarks += words(parts, began, was, model)
    changed = {p: (parts.whole[p].double() - was[p].double()).float() for p in trained}
    remarks += classes(changed, model)
    embedded = {p: len(A) for p, (A, _, _) in parts.embeddings.items()}
    return Beside(start, trained, changed, tuple(held), embedded, known, tuple(remarks))


def parts_of(files: AdapterFiles, model: Model[Any], config: Config) -> Parts:
    """The adapter's parts under the names of the model's parameters; BadInput where they do not fit it."""
    module, where, parts = model.module, files.path, Parts()
    own: dict[int, str] = {}
    names = {name: own.setdefault(id(p), name) for name, p in module.named_parameters(remove_duplicate=False)}
    embeddings = [name for name, layer in module.named_modules() if isinstance(layer, nn.Embedding)]
    for name, tensor in files.whole.items():
        found = parameter_of(name, names)
        if found is None:
            if parameter_of(name, module.state_dict()) is not None:
                continue  # a buffer, which nobody trains
            plain = shortened(name.removeprefix("base_model.model."))[:120]
            raise BadInput(
                f"The adapter in {where} holds {plain!r}, which is neither a LoRA factor nor of the base model."
            )
        parameter = names[found]
        if tensor.shape != model.parameters[parameter].shape:
            sizes = f"{by(tensor.shape)} in the adapter and {by(model.parameters[parameter].shape)} in the base model"
            raise BadInput(f"The adapter in {where} does not fit: {parameter} is {sizes}.")
        parts.whole[parameter] = tensor
    for name, pair in files.embeddings.items():
        embedding = module_of(name, embeddings)
        if embedding is None or len(pair) < 2:
            raise BadInput(
                f"The adapter in {where} holds a part of {shortened(name)[:120]!r}, which is neither a LoRA factor nor an embedding of "
                "the base model."
            )
        A, B, parameter = pair["lora_A"], pair["lora_B"], names[f"{embedding}.weight"]
        if (A.shape[1:], B.shape[:1]) != tuple(torch.Size([n]) for n in model.parameters[parameter].shape):
            raise BadInput(f"The adapter in {where} does not fit: its factors of {embedding} are of another size.")
        parts.embeddings[parameter] = (A, B, scale(name, len(A), files, config))
    for name, rows in files.tokens.items():
        embedding = module_of(name, embeddings)
        if embedding is None:
            raise BadInput(f"The adapter in {where} trains tokens of {shortened(name)[:120]!r}, which the base lacks.")
        parameter, ids = names[f"{embedding}.weight"], indices(config, embedding)
        size = model.parameters[parameter].shape
        if rows.shape != (len(ids), size[1]) or not all(0 <= i < size[0] for i in ids):
            raise BadInput(
                f"The adapter in {where} does not fit: its tokens of {embedding} are not those of its config."
            )
        parts.tokens[parameter] = (torch.tensor(ids), rows)
    for name, bias in files.biases.items():
        if (found := module_of(name, [n for n, _ in module.named_modules()])) is None:
            raise BadInput(f"The adapter in {where} holds a bias of {shortened(name)[:120]!r}, which the base lacks.")
        pair = files.factors.get(name, {})
        parts.biases[found] = bias * scale(name, len(pair.get("lora_A", [0])), files, config)
    return parts


def scale(name: str, rank: int, files: AdapterFiles, config: Config) -> float:
    """s of a module whose rank is that of its shapes."""
    alpha = files.alphas.get(name, [*by_pattern(name, config.alpha_pattern, files.path), config.lora_alpha][0])
    return alpha / (sqrt(rank) if config.use_rslora else rank)


def indices(config: Config, embedding: str) -> list[int]:
    """The tokens whose rows were trained, by the config: one list, or a list for each embedding by the end of its name."""
    told = config.trainable_token_indices
    if isinstance(told, list) or told is None:
        return told or []
    return next((ids for name, ids in told.items() if embedding == name or embedding.endswith(f".{name}")), [])


def began_with(parts: Parts, model: Model[Any]) -> Tensors:
    """{parameter: where training began} with the parts of an adapter in place."""
    start = {name: tensor.float() for name, tensor in parts.whole.items()}

    def at(parameter: str) -> Tensor:
        return start.get(parameter, model.parameters[parameter])

    for parameter, (ids, rows) in parts.tokens.items():
        start[parameter] = at(parameter).index_copy(0, ids, rows)
    for parameter, (A, B, s) in parts.embeddings.items():
        start[parameter] = at(parameter) + s * (B @ A).T
    for module, bias in parts.biases.items():
        if f"{module}.bias" in model.parameters:
            start[f"{module}.bias"] = at(f"{module}.bias") + bias
        elif bool(bias.any()):
            raise BadInput(
                f"The adapter before training has a bias in {module}, and the base model has none there: where training began "
                "cannot be told of this model."
            )
    return start


def moved(after: Tensor, before: Tensor) -> Tensor:
    """Which rows (of a vector: which entries) training moved: those that are neither as before, rounded to a shorter format at most, nor
    as weight decay alone leaves them, all by one factor."""
    a, b = after.float(), before.float()
    a, b = (a.reshape(-1, 1), b.reshape(-1, 1)) if a.ndim < 2 else (a.flatten(1), b.flatten(1))
    still = torch.stack([a == b.to(kind).float() for kind in (torch.float32, after.dtype, *SHORT)]).all(2).any(0)
    if len(a) > 2 and a.shape[1] > 1 and not bool((still & b.any(1)).any()):
        factor = ((a * b).sum(1) / b.square().sum(1).clamp_min(1e-30)).median()
        still = ((a - factor * b).abs() <= (EXACT + torch.finfo(after.dtype).eps) * b.abs()).all(1)
    return ~still


def words(parts: Parts, began: Parts, was: Tensors, model: Model[Any]) -> list[Reservation]:
    """What the embeddings of a language model tell of its private texts."""
    architecture = model.architecture
    if not isinstance(architecture, LanguageArchitecture):
        return []
    names = dict[int, list[str]]()
    for name, p in model.module.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    tied = {known[0] for known in names.values() if len(known) > 1}
    vocabulary = int(architecture.config.vocab_size)
    told: dict[str, list[int]] = {}
    for parameter, (A, _, _) in parts.embeddings.items():
        A = A - began.embeddings[parameter][0] if parameter in began.embeddings else A
        told[f"columns of lora_embedding_A of {parameter}"] = A.any(0).nonzero().flatten().tolist()
    for parameter, (ids, rows) in parts.tokens.items():
        if parameter not in tied:
            told[f"trained rows of {parameter}"] = ids[moved(rows, was[parameter][ids])].tolist()
    for parameter, tensor in parts.whole.items():
        layer = model.module.get_submodule(parameter.rpartition(".")[0])
        if parameter not in tied and isinstance(layer, nn.Embedding) and len(tensor) == vocabulary:
            told[f"rows of {parameter}"] = moved(tensor, was[parameter]).nonzero().flatten().tolist()
    remarks: list[Reservation] = []
    for what, tokens in told.items():
        if not tokens:
            continue
        if len(tokens) > NEARLY * vocabulary:
            remarks.append(("embeddings", "info", f"Nearly all {what} moved in training, so they name no words."))
            continue
        plain = architecture.plain(tokens)
        shown = ", ".join(repr(architecture.decode([token]).strip()) for token in plain[:MOST_WORDS])
        more = f" and {len(plain) - MOST_WORDS} more" if len(plain) > MOST_WORDS else ""
        sentence = (
            f"The embeddings give {len(plain)} words of the private texts away, with no attack at all: the {what} that training moved are "
            f"those of the tokens {shown}{more}."
        )
        remarks.append(("embeddings", "warning", sentence))
    return remarks


def classes(changed: Tensors, model: Model[Any]) -> list[Reservation]:
    """What the bias of a classifier's head tells of the labels: under a softmax cross entropy its gradient is p - y, so that it rises for
    classes that are there only (iDLG, Zhao et al. 2020, arXiv:2001.02610)."""
    name, count = list(model.parameters)[-1], model.architecture.classes
    if count < 2 or name not in changed or changed[name].shape != (count,):
        return []
    there = [int(label) for label in (changed[name] > 0).nonzero().flatten()]
    said = ", ".join(map(str, there[:20])) + (f" and {len(there) - 20} more" if len(there) > 20 else "")
    sentence = (
        f"The bias of the head, {name}, rose for the classes {said}: of one step, these are labels of private samples."
    )
    return [("labels", "warning", sentence)] if there else []


def listed(names: Sequence[str]) -> str:
    """Names in a sentence, the first few of them."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

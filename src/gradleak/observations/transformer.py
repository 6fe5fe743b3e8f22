"""Where a transformer keeps the parts that matter here, found by running it, whatever its family: no list of names.

Two sentences that differ in one token are sent through the model. A linear layer whose inputs differ at that place alone sees
tokens one by one; the first whose inputs differ elsewhere lies behind the attention. Which of the layers before it are query, key
and value is told by what a change of their outputs does there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gradleak.errors import NotObserved, shortened
from gradleak.observations.layers import Call, calls, is_linear, layer_inputs
from gradleak.observations.model import LanguageModel

LENGTH, FEWEST = 6, 3  # tokens of the sentences that are sent through; with fewer nothing is between first and last
STRONG = 1e3  # a change of outputs of size 1 that leaves no softmax near linear
LINEAR = 1e-2  # of the reaction to it: float32 leaves 1e-6, a softmax about 1
ROUNDING = 1e-4  # of sums of float32, relative to what differs
ROLES = ("query", "key", "value", "all")
_KNOWN: WeakKeyDictionary[nn.Module, "Layout"] = WeakKeyDictionary()


@dataclass(frozen=True)
class Layout:
    """One kind of transformer. Names of modules are those of the whole model.

    causal     a token sees only those before it
    placed     whether the first layer's inputs depend on the position
    positions  the longest sentence that the model takes
    blocks     the name of the list of blocks
    embedded   the module whose input is token plus position; if not placed, the first of `attention`
    attention  query, key and value of the first block, or what computes several of them: {module: role}
    output     the first linear layer behind its attention
    hidden     the linear layers behind that, which read one input
    mixed      whether that input depends on more than one token, as it does where the perceptron follows the attention
    passed     the linear layers that read what these pass on
    after      the module whose output `hidden` reads
    head       the first linear layer behind the last block
    """

    causal: bool
    placed: bool
    positions: int
    blocks: str
    embedded: str
    attention: dict[str, str]
    output: str
    hidden: tuple[str, ...]
    mixed: bool
    passed: tuple[str, ...]
    after: str | None
    head: str | None
    modules: frozenset[str]

    def block(self, number: int) -> str:
        """The name of a block."""
        return f"{self.blocks}.{number}"

    def queries(self, number: int) -> tuple[str, ...]:
        """The modules that read a block's inputs, query first; none if there is no such block."""
        names = (name.replace(self.block(0), self.block(number), 1) for name in self.attention)
        return tuple(name for name in names if name in self.modules)

    def gap(self, module: str) -> int:
        """What the gradient of one of `queries` shows of the inputs: 0 all of them, 1 not the first, 2 their differences only."""
        first = self.blocks + ".0." + module.removeprefix(f"{self.blocks}.").split(".", 1)[-1]
        return {"query": int(self.causal), "key": 2}.get(self.attention.get(first, "all"), 0)


def layout_of(model: LanguageModel) -> Layout:
    """Where this model keeps its parts. NotObserved, which names what is missing, for a model without them."""
    if model.module not in _KNOWN:
        _KNOWN[model.module] = _found(model)
    return _KNOWN[model.module]


def normalisation(model: LanguageModel, inner: int) -> tuple[bool, Tensor, Tensor, float]:
    """(whether it centres, scale, shift, eps) of what lies between the inputs of `embedded`, (inner,), and of the first block: a
    norm, and perhaps a linear layer, x = scale y / sqrt(mean(y^2) + eps) + shift. Found by what it makes of zeros, ones, and a wave
    of two sizes; wrong for what is no norm."""
    layout = layout_of(model)
    name, query = layout.embedded, layout.queries(0)[0]
    module, prefix = model.module.get_submodule(name), f"{name}."
    own = {k.removeprefix(prefix): p.double() for k, p in model.parameters.items() if k.startswith(prefix)}
    wave, small = torch.ones(inner, dtype=torch.float64), 1e-3
    wave[1::2] = -1
    rows = torch.stack([wave * 0, wave.abs(), wave, small * wave])
    with torch.no_grad():
        beta, ones, large, little = functional_call(module, own, (rows[:, None],))[:, 0].double()
    centred = float((ones - beta).norm()) < ROUNDING * float((large - beta).norm())
    if centred:
        wave = wave - wave.mean()
    size, k = float(wave.square().mean()), float((little - beta).norm() / (large - beta).norm())
    # k = small sqrt(size + eps) / sqrt(small^2 size + eps)
    eps = max(small**2 * size * (1 - k**2) / max(k**2 - small**2, 1e-12), 0.0)
    gamma = (large - beta) / wave * (size + eps) ** 0.5
    ends = torch.cat([torch.zeros(1, inner), torch.eye(inner)])
    x = _passed_on(model, name, query, ends)
    if torch.equal(x, ends):
        return centred, gamma.float(), beta.float(), eps
    A, b = (x[1:] - x[0]).T.double(), x[0].double()
    return centred, (A * gamma).float(), (A @ beta + b).float(), eps


def _passed_on(model: LanguageModel, name: str, query: str, rows: Tensor) -> Tensor:
    """What enters `query` when a module puts out these (n, inner): (n, width)."""
    handle = model.module.get_submodule(name).register_forward_hook(lambda layer, inputs, output: rows[:, None])
    try:
        return layer_inputs(model, [query], torch.zeros(len(rows), 1, dtype=torch.long))[query][:, 0]
    finally:
        handle.remove()


def _found(model: LanguageModel) -> Layout:
    kind, modules = model.architecture.config.model_type, dict(model.module.named_modules())
    plain, changed, same, other, place = _sentences(model)
    runs = [_run(model, sentence) for sentence in (plain, changed, same, other)]
    first, second = (_linear(run, modules, len(plain)) for run in runs[:2])
    differs = {name: (x != second[name]).any(1) for name, x in first.items() if name in second}
    order = list(differs)
    alone = torch.arange(len(plain)) == place

    # The first layer behind the attention, and those before it in its block that read one input
    local = [name for name in order if torch.equal(differs[name], alone)]
    mixed = [name for name in order if bool((differs[name] & ~alone).any())]
    if not mixed:
        raise NotObserved(f"No linear layer of this model ({kind}) sees more than one token: there is no attention.")
    output = mixed[0]
    before = [name for name in order[: order.index(output)] if name in local and _list_of(name, modules) is not None]
    if not before:
        raise NotObserved(
            f"This model ({kind}) mixes tokens before its first block's linear layers: their inputs cannot be listed."
        )
    readers = [name for name in before if torch.equal(first[name], first[before[0]])]
    attention = _roles(model, readers, output, plain, place)
    once = {name: role for name, role in attention.items() if sum(call.name == name for call in runs[0]) == 1}
    if not once:
        raise NotObserved(
            f"This model ({kind}) uses the layers of its first attention more than once: their gradients hold other inputs too."
        )

    # What follows in the block
    blocks = str(_list_of(readers[0], modules))
    inside = [
        name for name in order[order.index(output) + 1 :] if name.startswith(f"{blocks}.0.") and name not in readers
    ]
    hidden = tuple(name for name in inside if torch.equal(first[name], first[inside[0]]))
    behind = [name for name in inside if name not in hidden]
    passed = tuple(name for name in behind if torch.equal(first[name], first[behind[0]]))
    outputs = [call.name for call in runs[0] if hidden and _equal(call.output, first[hidden[0]])]
    numbered = [n for n, call in enumerate(runs[0]) if _list_of(call.name, modules) is not None]
    heads = [
        call.name for call in runs[0][numbered[-1] :] if call.name in order and _list_of(call.name, modules) is None
    ]

    query, limit = next(iter(once)), model.architecture.positions
    rows = _linear(runs[2], modules, len(plain))[query]
    placed = float((rows[: place + 1] - rows[0]).norm()) > ROUNDING * float(rows[: place + 1].norm())
    return Layout(
        causal=not bool(differs[output][:place].any()),
        placed=placed,
        positions=min([limit, *_rows_left(runs[2], runs[3], modules)]) if placed else limit,
        blocks=blocks,
        embedded=_embedded(runs[2], runs[3], query, place) if placed else query,
        attention=once,
        output=output,
        hidden=hidden,
        mixed=bool(hidden) and hidden[0] in mixed,
        passed=passed,
        after=outputs[-1] if outputs else None,
        head=heads[0] if heads else None,
        modules=frozenset(modules),
    )


def _sentences(model: LanguageModel) -> tuple[list[int], list[int], list[int], list[int], int]:
    """Distinct tokens; with another at one place; one token over and over; another; and that place."""
    architecture, length = model.architecture, min(LENGTH, model.architecture.positions)
    apart = (architecture.config.pad_token_id, _end(model))
    known = [token for token in range(architecture.config.vocab_size) if token not in apart]
    # From the middle: the first and the last are special, or not in use, in most tokenizers
    start = max(min(len(known) // 2, len(known) - LENGTH - 1), 0)
    tokens = known[start : start + LENGTH + 1]
    if length < FEWEST or len(tokens) <= length:
        raise NotObserved(f"This model takes {length} tokens of {len(known)}: too few to see what its layers do.")
    place, end = length // 2, [_end(model)] if architecture.config.is_encoder_decoder else []
    plain = tokens[:length]
    changed = [*plain[:place], tokens[length], *plain[place + 1 :]]
    rows = [[*row[: length - len(end)], *end] for row in (plain, changed, [plain[0]] * length, [plain[1]] * length)]
    return rows[0], rows[1], rows[2], rows[3], place


def _end(model: LanguageModel) -> Any:
    return getattr(model.architecture.config, "eos_token_id", None)


def _run(model: LanguageModel, sentence: Sequence[int]) -> list[Call]:
    try:
        return calls(model, (tuple(sentence),))
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise NotObserved(f"The model fails on {len(sentence)} tokens: {shortened(str(error))}.") from error


def _linear(run: Sequence[Call], modules: dict[str, nn.Module], length: int) -> dict[str, Tensor]:
    """{linear layer: its inputs (length, width)} in order of execution, at its first call."""
    seen: dict[str, Tensor] = {}
    for call in run:
        if is_linear(modules[call.name]) and call.input.numel() == length * call.input.shape[-1]:
            seen.setdefault(call.name, call.input.reshape(length, -1))
    return seen


def _list_of(name: str, modules: dict[str, nn.Module]) -> str | None:
    """The outermost list that a module lies in."""
    parts = name.split(".")
    lists = (".".join(parts[:i]) for i in range(1, len(parts)))
    return next((prefix for prefix in lists if isinstance(modules[prefix], nn.ModuleList)), None)


def _roles(
    model: LanguageModel, readers: Sequence[str], output: str, sentence: Sequence[int], place: int
) -> dict[str, str]:
    """{layer: role}, query first, of those whose outputs at one place change what enters `output`.

    A query changes its own place only, a value everything in proportion, a key everything by a softmax. Where nothing is a
    value, what would be a key holds it too, and a single layer holds all.
    """
    ids, roles = torch.tensor([sentence]), dict[str, str]()
    still = layer_inputs(model, [output], ids)[output][0]
    for name in readers:
        once, twice = (_disturbed(model, name, output, ids, place, size) - still for size in (STRONG, 2 * STRONG))
        rows = (once != 0).any(1)
        if not bool(rows.any()):
            continue
        apart = float((twice - 2 * once).norm()) / float(once.norm())
        alone = int(rows.sum()) == 1 and bool(rows[place])
        roles[name] = "query" if alone else "value" if apart < LINEAR else "key"
    if len(roles) == 1 or "value" not in roles.values():
        roles = {name: "all" if len(roles) == 1 or role == "key" else role for name, role in roles.items()}
    return dict(sorted(roles.items(), key=lambda item: ROLES.index(item[1])))


def _disturbed(model: LanguageModel, name: str, output: str, ids: Tensor, place: int, size: float) -> Tensor:
    """What enters `output` (length, width) when the output of a layer is changed at one place."""

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if out.numel() != ids.shape[1] * out.shape[-1]:
            return out  # of a later call, on something else than the text
        wave = torch.randn(out.shape[-1], generator=torch.Generator().manual_seed(0))
        moved = out.clone()
        moved.reshape(ids.shape[1], -1)[place] += size * wave.to(out)
        return moved

    handle = model.module.get_submodule(name).register_forward_hook(hook)
    try:
        return layer_inputs(model, [output], ids)[output][0]
    finally:
        handle.remove()


def _embedded(run: Sequence[Call], other: Sequence[Call], query: str, place: int) -> str:
    """The last module up to the first attention whose input is a sum of what the token gives and what the position gives."""
    found = query
    for a, b in zip(run, other, strict=False):  # experts behind may differ
        x = [call.input.reshape(-1, call.input.shape[-1])[: place + 1].double() for call in (a, b)]
        if a.input.is_floating_point() and a.input.ndim == 3:
            difference = x[0] - x[1]
            if float((difference - difference[0]).norm()) < ROUNDING * float(difference.norm()):
                found = a.name
        if a.name == query:
            break
    return found


def _rows_left(run: Sequence[Call], other: Sequence[Call], modules: dict[str, nn.Module]) -> list[int]:
    """How many positions each table of positions has, from that of the first token on."""
    tables = [
        (modules[a.name], a.input.flatten()) for a, b in zip(run, other, strict=False) if torch.equal(a.input, b.input)
    ]
    counting = ((t, ids) for t, ids in tables if len(ids) > 1 and torch.equal(ids - ids[0], torch.arange(len(ids))))
    return [table.num_embeddings - int(ids[0]) for table, ids in counting if isinstance(table, nn.Embedding)]


def _equal(output: Any, x: Tensor) -> bool:
    return isinstance(output, Tensor) and output.numel() == x.numel() and torch.equal(output.reshape(x.shape), x)

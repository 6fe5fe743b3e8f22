"""Which module of the base model an adapter means: the names of PEFT, diffusers and kohya, with wrappers too many or too few."""

import re
from collections.abc import Collection, Iterator

from gradleak.errors import BadInput, shortened

# What models are wrapped in, and what a name may therefore have before the base model's own, or lack.
WRAPPERS = ("base_model", "model", "module", "language_model", "transformer", "unet", "text_encoder", "text_encoder_2")
UNDERSCORED = re.compile(
    r"(lora_[a-z]+\d?|lycoris)_(?P<name>[^.]+)"
)  # kohya: lora_unet_down_to_q, lora_te1_...; lycoris_
# Other names of the same parts: transformers 5 has shorter ones in its vision transformers, diffusers its own in attention.
RENAMED = (
    (r"encoder\.layer\.(\d+)\.", r"layers.\1."),
    (r"attention\.attention\.(q|k|v)(uery|ey|alue)$", r"attention.\1_proj"),
    (r"attention\.output\.dense$", "attention.o_proj"),
    (r"intermediate\.dense$", "mlp.fc1"),
    (r"output\.dense$", "mlp.fc2"),
    (r"\.to_(q|k|v)$", r".\1_proj"),
    (r"\.to_out$", ".out_proj"),
)


def module_of(name: str, modules: Collection[str]) -> str | None:
    """The module that an adapter calls `name`: the one of that name, or the only one whose name ends so once wrappers are taken off; None
    where there is none. BadInput where there are several."""
    if match := UNDERSCORED.fullmatch(name):
        plain = {module.replace(".", "_"): module for module in modules}
        if len(plain) < len(modules):  # a.b_c and a_b.c: only the dots tell them apart
            plain = {}
        found = chosen(unwrapped(match["name"], "_"), plain, "_", name)
        return None if found is None else plain[found]
    own = list(unwrapped(name.replace(".processor.", "."), "."))
    other = own[-1]
    for old, new in RENAMED[:5]:
        other = re.sub(old, new, other)
    attention = own[-1]
    for old, new in RENAMED[5:]:
        attention = re.sub(old, new, attention)
    # .0: older attention processors call the module to_out.0 to_out
    return chosen([*own, other, f"{own[-1]}.0", attention], modules, ".", name)


def parameter_of(name: str, parameters: Collection[str]) -> str | None:
    """The parameter that an adapter calls `name`, as `module_of` finds its module; None where there is none."""
    module, _, leaf = name.rpartition(".")
    modules = [known.removesuffix(f".{leaf}") for known in parameters if known.endswith(f".{leaf}")]
    found = module_of(module, modules)
    return None if found is None else f"{found}.{leaf}"


def unwrapped(name: str, between: str) -> Iterator[str]:
    """The name, and the name without one wrapper after the other."""
    yield name
    while shorter := next((name[len(w) + 1 :] for w in WRAPPERS if name.startswith(f"{w}{between}")), None):
        name = shorter
        yield name


def chosen(options: Collection[str] | Iterator[str], known: Collection[str], between: str, name: str) -> str | None:
    """The first option that is known, or the end of one that is; BadInput where it is the end of several."""
    for option in options:
        if option in known:
            return option
        ending = [one for one in known if one.endswith(between + option)]
        if len(ending) == 1:
            return ending[0]
        if ending:
            plain = shortened(name.removeprefix("base_model.model."))[:120]
            raise BadInput(
                f"The adapter's module {plain!r} could be {ending[0]} or {ending[1]} of the base model: their names end alike."
            )
    return None

"""From an adapter to the gradient behind it: decoders that are fitted on public pictures, {name: class}."""

from gradleak.attacks.decoders.mlp import MLP
from gradleak.attacks.decoders.ridge import PseudoInverse, Ridge
from gradleak.attacks.decoders.unet import UNet

DECODERS: dict[str, type[PseudoInverse] | type[Ridge] | type[MLP] | type[UNet]] = {
    "pseudo-inverse": PseudoInverse,
    "ridge": Ridge,
    "mlp": MLP,
    "unet": UNet,
}

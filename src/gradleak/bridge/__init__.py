"""From an adapter to the gradient behind it: decoders that are fitted on public pictures, {name: class}."""

from gradleak.bridge.mlp import MLP
from gradleak.bridge.ridge import PseudoInverse, Ridge
from gradleak.bridge.unet import UNet

DECODERS: dict[str, type[PseudoInverse] | type[Ridge] | type[MLP] | type[UNet]] = {
    "pseudo-inverse": PseudoInverse,
    "ridge": Ridge,
    "mlp": MLP,
    "unet": UNet,
}

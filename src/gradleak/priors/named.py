"""A prior by the text of a flag: tv, gaussian, ffdnet, diffusion:FOLDER or diffusion:NAME-ON-THE-HUB."""

from torch import Tensor

from gradleak.errors import BadInput, near, shortened
from gradleak.priors.denoisers import diffusion
from gradleak.priors.denoisers.ffdnet import FFDNet
from gradleak.priors.gaussian import GaussianPrior
from gradleak.priors.prior import Denoiser, Energy
from gradleak.priors.total_variation import TotalVariation

NAMES = ("tv", "gaussian", "ffdnet", "diffusion:FOLDER")


def load_prior(text: str, shape: tuple[int, int, int] | None = None, public: Tensor | None = None) -> Energy | Denoiser:
    """shape: (channel, height, width) of the pictures to come, 3x32x32 or the pipeline's own where it is not given.
    public: pictures (n, channel, height, width) in [0, 1] for the Gaussian, which without enough of them is that of photographs.

    Raises BadInput for a name that is not known, and as the loaders do.
    """
    name, _, folder = text.partition(":")
    if name == "diffusion" and folder:
        return diffusion.load(folder, shape)
    if text == "tv":
        return TotalVariation()
    if text == "gaussian":
        fitted = None if public is None else GaussianPrior.of_public(public)
        return fitted or GaussianPrior.smooth(shape or (3, 32, 32))
    if text == "ffdnet":
        return FFDNet.load(shape or (3, 32, 32))
    raise BadInput(f"There is no prior {shortened(repr(text))}{near(text, NAMES)} (priors: {', '.join(NAMES)}).")

"""One paper, one file. ATTACKS is the only place where an attack has a name."""

from gradleak.attacks.activation_patterns import ActivationPatterns
from gradleak.attacks.analytic import Analytic
from gradleak.attacks.convolutional_git import ConvolutionalGit
from gradleak.attacks.dlg import DLG
from gradleak.attacks.git import Git
from gradleak.attacks.idlg import IDLG
from gradleak.attacks.inverting_gradients import InvertingGradients
from gradleak.attacks.lti import LTI
from gradleak.attacks.map_inversion import MapInversion
from gradleak.attacks.recursive import Recursive
from gradleak.attacks.token_span import TokenSpan

ATTACKS = {
    "analytic": Analytic,
    "recursive": Recursive,
    "token-span": TokenSpan,
    "activation-patterns": ActivationPatterns,
    "map-inversion": MapInversion,
    "git": Git,
    "convolutional-git": ConvolutionalGit,
    "lti": LTI,
    "dlg": DLG,
    "idlg": IDLG,
    "inverting-gradients": InvertingGradients,
}

"""One paper, one file. ATTACKS, and TEXT_ATTACKS for observations of text, are the only places where an attack has a name."""

from gradleak.attacks.activation_patterns import ActivationPatterns
from gradleak.attacks.analytic import Analytic
from gradleak.attacks.dager import Dager
from gradleak.attacks.dlg import DLG
from gradleak.attacks.exact_git import ExactGit
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
    "exact-git": ExactGit,
    "lti": LTI,
    "dlg": DLG,
    "idlg": IDLG,
    "inverting-gradients": InvertingGradients,
}

TEXT_ATTACKS = {"dager": Dager}

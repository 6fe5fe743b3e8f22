"""One paper, one file. ATTACKS, WEIGHTS_ATTACKS and TEXT_ATTACKS are the only places where an attack has a name."""

from collections import ChainMap

from gradleak.attacks.activation_patterns.activation_patterns import ActivationPatterns
from gradleak.attacks.analytic import Analytic
from gradleak.attacks.dager.dager import Dager
from gradleak.attacks.dlg import DLG
from gradleak.attacks.exact_git.exact_git import ExactGit
from gradleak.attacks.idlg import IDLG
from gradleak.attacks.inverting_gradients import InvertingGradients
from gradleak.attacks.learned.git import Git
from gradleak.attacks.learned.lti import LTI
from gradleak.attacks.map_inversion import MapInversion
from gradleak.attacks.past_the_rank import PastTheRank
from gradleak.attacks.recursion.recursive import Recursive
from gradleak.attacks.token_span import TokenSpan
from gradleak.attacks.weights.kkt import KKT
from gradleak.attacks.weights.kkt_search import KKTSearch
from gradleak.attacks.weights.ntk import NTK

ATTACKS: dict[str, type] = {
    "analytic": Analytic,
    "recursive": Recursive,
    "token-span": TokenSpan,
    "activation-patterns": ActivationPatterns,
    "map-inversion": MapInversion,
    "ntk": NTK,
    "git": Git,
    "exact-git": ExactGit,
    "lti": LTI,
    "dlg": DLG,
    "idlg": IDLG,
    "inverting-gradients": InvertingGradients,
}

WEIGHTS_ATTACKS: dict[str, type] = {"kkt": KKT, "kkt-search": KKTSearch}  # for trained weights, in place of a gradient

TEXT_ATTACKS: dict[str, type] = {"dager": Dager, "past-the-rank": PastTheRank}

ALL_ATTACKS = ChainMap(TEXT_ATTACKS, WEIGHTS_ATTACKS, ATTACKS)  # in the order of ATTACKS, WEIGHTS_ATTACKS, TEXT_ATTACKS

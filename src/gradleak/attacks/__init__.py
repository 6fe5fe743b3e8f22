"""One paper, one file. ATTACKS is the only place where an attack has a name."""

from gradleak.attacks.analytic import Analytic
from gradleak.attacks.dlg import DLG
from gradleak.attacks.idlg import IDLG
from gradleak.attacks.inverting_gradients import InvertingGradients

ATTACKS = {
    "analytic": Analytic,
    "dlg": DLG,
    "idlg": IDLG,
    "inverting-gradients": InvertingGradients,
}

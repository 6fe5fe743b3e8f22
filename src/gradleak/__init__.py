"""What do the gradients, updates, adapters and weights that you share give away about your training data?

observation, secret = capture_gradient(model, pictures)                         # the victim
found = InvertingGradients()(observation, generator=torch.Generator())          # the attacker: no secret
report = run_audit(observation, ["dlg", "map-inversion"], secret=secret)        # scored against controls
report.show(), report.to_dataframe(), report.save("audited")

Names are imported when they are first used: `import gradleak` costs nothing.
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the one list of public names: `__getattr__` reads it too
    from gradleak.attacks import ATTACKS as ATTACKS
    from gradleak.attacks.analytic import Analytic as Analytic
    from gradleak.attacks.dager.dager import Dager as Dager
    from gradleak.attacks.dlg import DLG as DLG
    from gradleak.attacks.dlg import IDLG as IDLG
    from gradleak.attacks.inverting_gradients import InvertingGradients as InvertingGradients
    from gradleak.attacks.label_counts.label_counts import label_counts as label_counts
    from gradleak.attacks.labels import recover_labels as recover_labels
    from gradleak.attacks.map_inversion import MapInversion as MapInversion
    from gradleak.attacks.reconstruction import Outcome as Outcome
    from gradleak.attacks.reconstruction import Reconstruction as Reconstruction
    from gradleak.attacks.reconstruction import outcome_of as outcome_of
    from gradleak.attacks.weights.kkt import KKT as KKT
    from gradleak.audit.checks import check_observation as check_observation
    from gradleak.audit.checks import replay as replay
    from gradleak.audit.run import run_audit as run_audit
    from gradleak.audit.scoring import SCORING as SCORING
    from gradleak.errors import BadInput as BadInput
    from gradleak.errors import NotObserved as NotObserved
    from gradleak.formats.model_folder import read_model as read_model
    from gradleak.formats.model_folder import write_base as write_base
    from gradleak.formats.observation_file import load_observation as load_observation
    from gradleak.formats.observation_file import save_observation as save_observation
    from gradleak.formats.peft import read_adapter as read_adapter
    from gradleak.formats.secret_file import Secret as Secret
    from gradleak.formats.secret_file import load_secret as load_secret
    from gradleak.formats.secret_file import save_secret as save_secret
    from gradleak.modalities.language_models import LanguageArchitecture as LanguageArchitecture
    from gradleak.modalities.losses import BinaryCrossEntropy as BinaryCrossEntropy
    from gradleak.modalities.losses import CrossEntropy as CrossEntropy
    from gradleak.modalities.losses import FocalLoss as FocalLoss
    from gradleak.modalities.networks import Architecture as Architecture
    from gradleak.modalities.pictures import Pictures as Pictures
    from gradleak.modalities.pictures import load as load
    from gradleak.modalities.pictures import public_pool as public_pool
    from gradleak.modalities.texts import Texts as Texts
    from gradleak.modalities.texts import load_texts as load_texts
    from gradleak.observations.adapter import Adapter as Adapter
    from gradleak.observations.defenses import GaussianNoise as GaussianNoise
    from gradleak.observations.defenses import Sign as Sign
    from gradleak.observations.defenses import TopK as TopK
    from gradleak.observations.model import Model as Model
    from gradleak.observations.observation import Observation as Observation
    from gradleak.observations.releases import Gradient as Gradient
    from gradleak.observations.releases import Update as Update
    from gradleak.observations.rounds import Rounds as Rounds
    from gradleak.observations.trained_weights import Weights as Weights
    from gradleak.observations.training import Recipe as Recipe
    from gradleak.report.record import Record as Record
    from gradleak.report.report import Report as Report
    from gradleak.victims.adapter import fine_tune as fine_tune
    from gradleak.victims.gradient import capture_gradient as capture_gradient
    from gradleak.victims.gradient import share_update as share_update
    from gradleak.victims.weights import publish_weights as publish_weights

_MODULES = {
    alias.name: node.module or ""
    for node in ast.walk(ast.parse(Path(__file__).read_text(encoding="utf-8")))
    if isinstance(node, ast.ImportFrom) and str(node.module).startswith("gradleak.")
    for alias in node.names
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]

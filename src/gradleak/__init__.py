"""What do the gradients, updates, adapters and weights that you share give away about your training data?

observation, secret = capture_gradient(module, architecture, pictures)          # the victim
found = InvertingGradients()(observation, generator=torch.Generator())          # the attacker: no secret
for row in audit(observation, attacks, public, secret=secret): ...              # scored against controls
"""

from gradleak.attacks.analytic import Analytic
from gradleak.attacks.dlg import DLG
from gradleak.attacks.idlg import IDLG
from gradleak.attacks.inverting_gradients import InvertingGradients
from gradleak.attacks.labels import recover_labels
from gradleak.attacks.reconstruction import Reconstruction
from gradleak.audit.checks import check_observation, replay
from gradleak.errors import BadInput, NotObserved
from gradleak.formats.observation_file import load_observation, load_secret, save_observation, save_secret
from gradleak.formats.secret_file import Secret
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures
from gradleak.observations.observation import Gradient, Model, Update

__all__ = [
    "DLG",
    "IDLG",
    "Analytic",
    "Architecture",
    "BadInput",
    "Gradient",
    "InvertingGradients",
    "Model",
    "NotObserved",
    "Pictures",
    "Reconstruction",
    "Secret",
    "Update",
    "check_observation",
    "load_observation",
    "load_secret",
    "recover_labels",
    "replay",
    "save_observation",
    "save_secret",
]

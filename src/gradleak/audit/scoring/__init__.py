"""What a reconstruction is measured by: one entry per kind of private data."""

from gradleak.audit.scoring.pictures import PICTURES
from gradleak.audit.scoring.scoring import Scoring
from gradleak.audit.scoring.texts import TEXTS
from gradleak.modalities.language_models import LanguageArchitecture
from gradleak.modalities.networks import Architecture

SCORING: dict[str, Scoring] = {Architecture.modality: PICTURES, LanguageArchitecture.modality: TEXTS}

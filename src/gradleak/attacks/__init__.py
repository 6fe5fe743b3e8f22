"""One paper, one file or folder. ATTACKS is the only place where an attack has a name.

Those of installed packages come after them (`own`). Each says what it reads (`sees`, `modality`); an audit asks all of them and tells why the others did not run.
"""

from gradleak.attacks.activation_patterns.activation_patterns import ActivationPatterns
from gradleak.attacks.adam_epsilon import AdamEpsilon
from gradleak.attacks.adam_unmixing.adam_unmixing import AdamUnmixing
from gradleak.attacks.analytic import Analytic
from gradleak.attacks.dager.dager import Dager
from gradleak.attacks.dataset_size import SampleCount
from gradleak.attacks.decoders.attacks import DecodeMLP, DecodePseudoInverse, DecodeRidge, DecodeUNet
from gradleak.attacks.diffusion.daps import DAPS
from gradleak.attacks.diffusion.dps import DPS
from gradleak.attacks.diffusion.guide import Guide
from gradleak.attacks.diffusion.red_diff import SDS, RedDiff
from gradleak.attacks.dlg import DLG, IDLG
from gradleak.attacks.embedding_rows import EmbeddingRows
from gradleak.attacks.exact_git.exact_git import ExactGit
from gradleak.attacks.inverting_gradients import InvertingGradients
from gradleak.attacks.jigsaw.jigsaw import Jigsaw
from gradleak.attacks.learned.git import Git
from gradleak.attacks.learned.lti import LTI
from gradleak.attacks.likely_text import LikelyText
from gradleak.attacks.map_inversion import MapInversion
from gradleak.attacks.own import installed
from gradleak.attacks.past_the_rank import PastTheRank
from gradleak.attacks.patch_embedding import PatchEmbedding
from gradleak.attacks.recursion.recursive import Recursive
from gradleak.attacks.sparse_words import SparseWords
from gradleak.attacks.token_span import TokenSpan
from gradleak.attacks.unmixing.unmixing import Unmixing
from gradleak.attacks.weights.kkt import KKT
from gradleak.attacks.weights.kkt_search import KKTSearch
from gradleak.attacks.weights.ntk import NTK

ATTACKS: dict[str, type] = {
    "analytic": Analytic,
    "recursive": Recursive,
    "patch-embedding": PatchEmbedding,
    "token-span": TokenSpan,
    "activation-patterns": ActivationPatterns,
    "unmixing": Unmixing,
    "adam-epsilon": AdamEpsilon,
    "adam-unmixing": AdamUnmixing,
    "jigsaw": Jigsaw,
    "map-inversion": MapInversion,
    "ntk": NTK,
    "git": Git,
    "exact-git": ExactGit,
    "lti": LTI,
    "dlg": DLG,
    "idlg": IDLG,
    "inverting-gradients": InvertingGradients,
    "red-diff": RedDiff,
    "sds": SDS,
    "dps": DPS,
    "daps": DAPS,
    "guide": Guide,
    "decode-pseudo-inverse": DecodePseudoInverse,
    "decode-ridge": DecodeRidge,
    "decode-mlp": DecodeMLP,
    "decode-unet": DecodeUNet,
    "dataset-size": SampleCount,
    "kkt": KKT,
    "kkt-search": KKTSearch,
    "dager": Dager,
    "past-the-rank": PastTheRank,
    "likely-text": LikelyText,
    "embedding-rows": EmbeddingRows,
    "sparse-words": SparseWords,
}
ATTACKS |= installed(ATTACKS)

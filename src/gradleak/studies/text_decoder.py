"""Do batches of texts come back from the gradient of a decoder? GPT-2 and Llama, small and trained here."""

from collections.abc import Iterator

from gradleak.modalities.language_models import Task
from gradleak.studies.study import Published, Size
from gradleak.studies.text_victims import DECODERS, Setting, of_texts, sources

WORDS = "6 to 14"  # then sixteen texts have fewer tokens than the width
TASKS: tuple[Task, ...] = ("classification", "causal-lm")
PUBLISHED = {"model": "small gpt2", "data": "sst2", "batch": (1, 2, 4, 8).__contains__}


def settings(data: str, size: Size) -> Iterator[Setting]:
    """Every architecture, task and batch size."""
    first, *_ = sources(data)
    sizes = (1, 2) if size == "smoke" else (1, 2, 4, 8, 16)
    yield from (Setting(model, first, task, batch, WORDS) for model in DECODERS for task in TASKS for batch in sizes)


STUDY = of_texts(
    name="text-decoder",
    question="Which texts of a batch can be read, word for word, from its gradient in a GPT-2 or a Llama?",
    settings=settings,
    published=(Published(PUBLISHED, "rouge1", 100, "DAGER, pretrained GPT-2 (arXiv:2405.15586)"),),
)

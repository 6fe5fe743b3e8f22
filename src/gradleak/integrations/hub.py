"""Publishing an adapter on the Hugging Face hub, behind an audit: in place of `model.push_to_hub("me/mine")`

    guarded_push(model, "me/mine", out="audited", secret="captured/secret.safetensors")

What would be uploaded is audited first. It stays here where it gives away more than a bar allows; else it goes out with a section for its
model card.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard

from gradleak.audit.run import run_audit
from gradleak.errors import BadInput
from gradleak.formats.peft import is_adapter
from gradleak.formats.secret_file import Secret
from gradleak.modalities.transformers_networks import quiet_transformers
from gradleak.observations.training import Recipe
from gradleak.report.gate import FINE, LEAK, check_bar, exit_code
from gradleak.report.report import Report

CARD = "README.md"
SECTION = re.compile(r"^## Privacy audit by gradleak\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
# What PEFT and tokenizers write. Nothing else leaves: a checkpoint also holds states of the optimizer, and what audits have recovered.
UPLOADED = (
    *("adapter_config.json", "adapter_model.safetensors", CARD, "preprocessor_config.json", "chat_template.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"),
)


class Withheld(Exception):
    """Nothing was uploaded; `report` says why."""

    def __init__(self, sentence: str, report: Report) -> None:
        super().__init__(sentence)
        self.report = report


def guarded_push(
    model: Any,
    repository: str,
    *,
    out: str | Path,
    fail_on: str | None = "partly",
    secret: Secret | str | Path | None = None,
    base: str | Path | None = None,
    recipe: Recipe | None = None,
    members: str | None = None,
    non_members: str | None = None,
    attacks: Sequence[Any] | Mapping[str, Any] | None = None,
    private: bool | None = None,
    api: Any = None,
) -> Report:
    """Audit a LoRA adapter, and upload it unless it gives too much away; returns the report.

    model       of PEFT's get_peft_model, or the folder of save_pretrained
    repository  on the hub, "me/mine"; it is made where it is not there
    out         a new folder for the report, which holds what was recovered of private data; it is never uploaded
    fail_on     the bar of `gradleak audit --fail-on`: recovered, partly, or with non_members TPR>0.05. None uploads whatever was found, and
                says it in the card
    secret, base, recipe, members, non_members, attacks  as `gradleak.run_audit` takes them; base: what the adapter's config names unless
                this is given
    private     whether a repository that is made is private
    api         a huggingface_hub.HfApi(token=...); one with the token of this machine unless this is given

    Raises Withheld above the bar, and where no verdict is possible (without `secret` or `non_members`, only what proves itself is one):
    nothing is uploaded then. Raises BadInput for what is no adapter, and for `out` with something in it.
    """
    check_bar(fail_on, members=non_members is not None)
    place = Path(out)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise BadInput(f"{place} holds other results already: choose another folder.")
    with to_be_uploaded(model) as folder:
        about: dict[str, Any] = {"secret": secret, "base": base, "recipe": recipe}
        report = run_audit(folder, attacks, **about, members=members, non_members=non_members)
        report.save(place)
        code = exit_code(report.record, fail_on)
        if code != FINE:
            why = "gives away more than the bar allows" if code == LEAK else "could not be judged"
            raise Withheld(
                f"Nothing was uploaded to {repository}: the adapter {why}. {report.verdict['sentence']} See {place / 'report.html'}.",
                report,
            )
        add_section(folder / CARD, (place / "summary.md").read_text(encoding="utf-8"))
        hub = HfApi() if api is None else api
        hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Adapter, audited by gradleak")
    return report


@contextmanager
def to_be_uploaded(model: Any) -> Iterator[Path]:
    """A folder with the files of an adapter that are to be uploaded, and no others; gone afterwards."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, is_saved = Path(temporary, "uploaded"), isinstance(model, str | Path)
        whole = Path(model) if is_saved else Path(temporary, "saved")
        if not is_saved:
            with quiet_transformers():
                model.save_pretrained(str(whole))
        folder.mkdir()
        for name in UPLOADED:
            if (file := whole / name).is_file():
                shutil.copy(file, folder / name)
        if not is_adapter(folder):
            raise BadInput(
                "There is no adapter of PEFT to upload: give a model of get_peft_model, or the folder that it saves."
            )
        yield folder


def add_section(card: Path, section: str) -> None:
    """Put the section at the end of a model card, in place of that of an earlier audit."""
    before = card.read_text(encoding="utf-8") if card.is_file() else ""
    card.write_text(with_section(before, section), encoding="utf-8")


def with_section(card: str, section: str) -> str:
    """The text of a model card with this section, in place of that of an earlier audit."""
    return f"{SECTION.sub('', card).rstrip()}\n\n{section}".lstrip()


def update_card(repository: str, section: str) -> None:
    """The same to a card that is on the hub already."""
    card = ModelCard.load(repository)
    card.content = with_section(card.content, section)
    card.push_to_hub(repository, commit_message="Privacy audit by gradleak")

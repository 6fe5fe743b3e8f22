"""LeakageCallback in a Trainer of transformers with PEFT: what it keeps is what was trained, and training is as without it."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradleak.audit.checks import REPLAY_TOLERANCE
from gradleak.cli import app as cli
from gradleak.errors import BadInput
from gradleak.formats.observation_file import load_observation
from gradleak.formats.secret_file import Secret
from gradleak.integrations.transformers import LeakageCallback, Training, kind_of
from gradleak.modalities.pictures import load
from gradleak.modalities.texts import load_texts
from gradleak.observations.model import LanguageModel
from gradleak.observations.orders import scheduled
from gradleak.report import record
from gradleak.victims.small_language import small_model, train_tokenizer
from pages import run_page

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks


@cache
def base() -> LanguageModel:
    tokenizer = train_tokenizer(load_texts("embedded", "train").texts, "gpt2", size=420)
    return small_model("gpt2", tokenizer, "causal-lm", width=96, layers=3, positions=64, spread=0.1)


def private(count: int) -> Secret:
    return Secret(base().architecture.encode(load_texts("embedded", indices=range(count)).texts), None, "embedded")


def adapted(*, dropout: float = 0.0, **lora: Any) -> Any:
    """The base model with LoRA factors of a rank above the number of tokens of two texts; lora: more of its config."""
    from peft import LoraConfig, get_peft_model

    network: Any = base().solid()
    for layer in network.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = dropout
    torch.manual_seed(0)
    targets = ["c_attn", "c_proj"]
    config = LoraConfig(r=64, lora_alpha=64, target_modules=targets, fan_in_fan_out=True, task_type="CAUSAL_LM", **lora)
    return get_peft_model(network, config)


def collated(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    ids, mask = base().architecture.padded([row["tokens"] for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def train(out: Path, callback: LeakageCallback | None, *, count: int = 1, model: Any = None, **settings: Any) -> Any:
    """A Trainer that has trained an adapter on so many texts: one step of SGD on all of them, unless settings say more."""
    from transformers import Trainer, TrainingArguments

    usual: dict[str, Any] = {"max_steps": 1, "learning_rate": 0.01, "lr_scheduler_type": "constant", "optim": "sgd"}
    usual |= {"per_device_train_batch_size": count, "save_steps": 1, "report_to": [], "use_cpu": True, "seed": 3}
    usual |= {"disable_tqdm": True, "logging_strategy": "no", "remove_unused_columns": False}
    usual |= {"dataloader_pin_memory": False}
    trainer: Any = Trainer(
        model=adapted() if model is None else model,
        args=TrainingArguments(output_dir=str(out), **(usual | settings)),
        train_dataset=[{"tokens": tokens} for tokens in private(count).inputs],
        data_collator=collated,
        processing_class=base().architecture.tokenizer,
        callbacks=[] if callback is None else [callback],
    )
    trainer.train()
    return trainer


def flags(folder: Path) -> dict[str, Any]:
    rows = record.read(folder / "leakage" / "record.json")["results"]
    return {flag["name"]: flag for row in rows for flag in row["flags"]}


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_one_text_comes_back_word_for_word(tmp_path: Path, optim: str) -> None:
    """DAGER is exact (Petrov et al. 2024, theorem 4.1) where the rank exceeds the tokens; a step of Adam is undone first."""
    callback = LeakageCallback(secret=private(1))
    train(tmp_path, callback, optim=optim)
    assert callback.verdicts[1]["level"] == "recovered"
    folder = tmp_path / "checkpoint-1" / "leakage"
    assert {p.name for p in folder.iterdir()} >= {"record.json", "report.html", "leakage.md", "observation.safetensors"}
    assert record.read(folder / "record.json")["verdict"] == callback.verdicts[1]
    assert (tmp_path / "initial" / "adapter_config.json").is_file()
    assert not (tmp_path / "final").exists()  # the checkpoint was the end


def test_what_the_trainer_was_fed_with_is_what_is_scored_with(tmp_path: Path) -> None:
    """Shuffled, two samples a step, an epoch: kept in the order of the training, so that it replays to rounding."""
    callback = LeakageCallback(secret="batches", attacks=["dager"])
    settings: dict[str, Any] = {"per_device_train_batch_size": 2, "max_steps": 2, "save_steps": 1}
    train(tmp_path, callback, count=4, **settings)
    for step in (1, 2):
        about = flags(tmp_path / f"checkpoint-{step}")
        assert about["replay"]["level"] == "info", about["replay"]["sentence"]
    secret = callback.fed.secret(base(), 4)
    assert sorted(secret.inputs) == sorted(private(4).inputs)
    assert secret.labels is None
    assert callback.verdicts[1]["level"] == "recovered"  # two texts of fewer tokens than the rank


def test_the_card_holds_no_word_of_the_texts(tmp_path: Path) -> None:
    train(tmp_path, LeakageCallback(secret=private(1)))
    card = (tmp_path / "checkpoint-1" / "leakage" / "leakage.md").read_text(encoding="utf-8")
    assert "All private samples that were looked for came back." in card
    assert "Risk of sharing it: **HIGH** (private samples came back whole, or are proven)." in card
    text = load_texts("embedded", indices=[0]).texts[0]
    assert text not in card
    assert text in (tmp_path / "checkpoint-1" / "leakage" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("settings", [{}, {"optim": "adamw_torch", "weight_decay": 0.1, "max_grad_norm": 0.0}], ids=str)
def test_what_is_kept_is_what_was_trained(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Four full steps of torch.optim, with the Trainer's clipping, against our own replay: they may differ by rounding."""
    callback = LeakageCallback(secret=private(2), attacks=["dager"])
    train(tmp_path, callback, count=2, max_steps=4, save_steps=4, **settings)
    seen = load_observation(tmp_path / "checkpoint-4" / "leakage" / "observation.safetensors")
    recipe = seen.adapter.recipe
    assert recipe is not None
    assert (recipe.steps, recipe.learning_rate, recipe.batch_size, seen.batch_size) == (4, 0.01, None, 2)
    adam = bool(settings)
    assert (recipe.optimizer, recipe.decay, recipe.clip) == (("adamw", 0.1, None) if adam else ("sgd", 0.0, 1.0))
    assert seen.adapter.origin == "given"
    # Adam divides gradients of the size of rounding by themselves; nothing else is between.
    assert seen.residual(private(2).inputs, None) < (1e-2 if adam else REPLAY_TOLERANCE["float32"])


HEAD: dict[str, Any] = {"modules_to_save": ["ln_f"]}  # trained as a whole, and part of the norm that is cut


@pytest.mark.parametrize(
    ("lora", "settings"),
    [
        ({"init_lora_weights": "pissa"}, {"max_steps": 3}),  # whose start is subtracted from the weights in memory
        (HEAD, {"max_steps": 3, "max_grad_norm": 0.01}),
        (HEAD, {"max_grad_norm": 0.01, "optim": "adamw_torch"}),  # a step that is undone, of a gradient that was cut
        ({}, {"bf16": True}),
    ],
    ids=str,
)
def test_whatever_was_trained_replays(tmp_path: Path, lora: dict[str, Any], settings: dict[str, Any]) -> None:
    """Level "info": within the rounding of the format in which gradients were (checks.REPLAY_TOLERANCE)."""
    callback = LeakageCallback(secret=private(2), attacks=["dager"])
    train(
        tmp_path, callback, count=2, model=adapted(**lora), **{"save_steps": settings.get("max_steps", 1)}, **settings
    )
    about = flags(tmp_path / f"checkpoint-{settings.get('max_steps', 1)}")
    assert about["replay"]["level"] == "info", about["replay"]["sentence"]


def test_accumulated_gradients_are_told(tmp_path: Path) -> None:
    callback = LeakageCallback(attacks=["dager"])
    train(tmp_path, callback, count=2, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    assert "accumulated over 2 batches" in flags(tmp_path / "checkpoint-1")["accumulated"]["sentence"]
    seen = load_observation(tmp_path / "checkpoint-1" / "leakage" / "observation.safetensors")
    assert seen.batch_size == 2


def test_a_training_that_was_resumed_keeps_the_first_start(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    train(tmp_path, LeakageCallback(attacks=["dager"]), save_steps=1)
    first = load_file(tmp_path / "initial" / "adapter_model.safetensors")
    callback = LeakageCallback(attacks=["dager"])
    trainer = train(tmp_path / "other", None)
    trainer.args.output_dir, trainer.args.max_steps = str(tmp_path), 3
    trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    again = load_file(tmp_path / "initial" / "adapter_model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert set(callback.verdicts) == {2, 3}
    assert "resumed at step 1" in flags(tmp_path / "checkpoint-3")["trainer"]["sentence"]


def test_training_is_as_without_the_callback(tmp_path: Path) -> None:
    """Bit by bit, dropout and shuffling included: an audit leaves the random numbers of the training alone."""
    ended = []
    for name, callback in (("with", LeakageCallback()), ("without", None)):
        model = adapted(dropout=0.1)
        train(tmp_path / name, callback, count=4, model=model, max_steps=3, per_device_train_batch_size=2)
        ended.append({k: v.clone() for k, v in model.state_dict().items()})
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[1])
    about = flags(tmp_path / "with" / "checkpoint-3")
    assert "dropout 0.1" in about["not_exact"]["sentence"]
    assert "shuffles" in about["shuffled"]["sentence"]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_schedule_is_replayed_rate_by_rate(tmp_path: Path, kind: str) -> None:
    """The Trainer's default falls to 0 in a line, here after a warm-up of one step at rate 0."""
    callback = LeakageCallback(secret=private(2), attacks=["dager"])
    train(tmp_path, callback, count=2, max_steps=4, save_steps=4, lr_scheduler_type=kind, warmup_steps=1)
    seen = load_observation(tmp_path / "checkpoint-4/leakage/observation.safetensors")
    assert seen.adapter.recipe is not None
    assert seen.adapter.recipe.rates == pytest.approx(scheduled(kind, 0.01, 4, warmup=1))  # type: ignore[arg-type]
    assert flags(tmp_path / "checkpoint-4")["replay"]["level"] == "info"


def test_the_end_is_audited_where_it_was_not_saved_and_goes_where_it_is_told(tmp_path: Path) -> None:
    callback = LeakageCallback(out=tmp_path / "elsewhere")
    train(tmp_path / "run", callback, max_steps=3, save_steps=2)
    assert set(callback.verdicts) == {2, 3}
    kept = {p.relative_to(tmp_path / "elsewhere").as_posix() for p in (tmp_path / "elsewhere").rglob("record.json")}
    assert kept <= {"checkpoint-2/leakage/record.json", "checkpoint-3/leakage/record.json", "final/leakage/record.json"}
    assert "checkpoint-2/leakage/record.json" in kept
    assert not list((tmp_path / "run").rglob("record.json"))


def test_a_record_is_run_again_by_the_command_line(tmp_path: Path) -> None:
    train(tmp_path, LeakageCallback())
    folder = tmp_path / "checkpoint-1" / "leakage"
    assert cli.main(["rerun", str(folder / "record.json"), "--out", str(tmp_path / "again")]) == 0
    first, again = (record.read(p / "record.json")["results"] for p in (folder, tmp_path / "again"))
    assert [row.get("shown") for row in first] == [row.get("shown") for row in again]
    assert first[0]["shown"]["reconstruction"] == list(load_texts("embedded", indices=[0]).texts)


def test_when_time_is_over_attacks_end_and_say_so(tmp_path: Path) -> None:
    callback = LeakageCallback(seconds=0.0)
    train(tmp_path, callback)
    assert callback.verdicts[1]["level"] == "unscored"
    assert "The 0 seconds of this audit were over." in callback.verdicts[1]["sentence"]
    card = (tmp_path / "checkpoint-1" / "leakage" / "leakage.md").read_text(encoding="utf-8")
    assert "For dager, sparse-words there was no time." in card


def test_an_audit_that_fails_does_not_end_the_training(tmp_path: Path) -> None:
    pictures = Secret(torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64))
    trainer = train(tmp_path, LeakageCallback(secret=pictures))
    assert trainer.state.global_step == 1
    told = (tmp_path / "checkpoint-1" / "leakage" / "leakage.md").read_text(encoding="utf-8")
    assert "could not be audited" in told
    assert not (tmp_path / "final").exists()  # it was tried


def test_what_cannot_be_audited_is_refused_at_the_beginning(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="LoRA adapters"):
        train(tmp_path, LeakageCallback(), model=base().solid())
    with pytest.raises(BadInput, match="Unknown attack"):
        LeakageCallback(attacks=["dagger"])


def test_results_are_not_pushed_to_the_hub(tmp_path: Path) -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    args = TrainingArguments(output_dir=str(tmp_path), push_to_hub=True, use_cpu=True, report_to=[])
    with pytest.raises(BadInput, match="a folder elsewhere"):
        LeakageCallback().on_train_begin(args, TrainerState(), TrainerControl(), model=adapted())


def test_optimizers_that_recipes_do_not_know_are_not_taken_for_others() -> None:
    p = [nn.Parameter(torch.zeros(2))]
    kinds: list[tuple[Any, Any]] = [
        (torch.optim.SGD(p, 0.1), "sgd"),
        (torch.optim.SGD(p, 0.1, momentum=0.9), "momentum"),
        (torch.optim.SGD(p, 0.1, momentum=0.5), None),
        (torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True), None),
        (torch.optim.Adam(p, 0.1), "adam"),
        (torch.optim.AdamW(p, 0.1), "adamw"),
        (torch.optim.AdamW(p, 0.1, eps=1e-6), None),
        (torch.optim.RMSprop(p, 0.1), None),
    ]
    assert [kind_of(optimizer)[0] for optimizer, _ in kinds] == [kind for _, kind in kinds]


def test_training_is_read_without_a_data_set_of_known_size(tmp_path: Path) -> None:
    from transformers import TrainerState, TrainingArguments

    args = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=4, use_cpu=True, report_to=[])
    layer = nn.Linear(2, 2)
    state, optimizer = TrainerState(global_step=2), torch.optim.SGD(layer.parameters(), 0.1)
    told = Training.of(args, state, layer, optimizer, None, [0.1, 0.1], 0)
    assert told.samples is None
    assert told.recipe is not None
    assert told.recipe.batch_size == 4


class Reader:
    """What of an image processor a Trainer needs, and we: it saves its constants."""

    def save_pretrained(self, folder: str | Path) -> None:
        about = {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(about), encoding="utf-8")


def picture_trainer(out: Path, reader: Reader | None, callback: LeakageCallback) -> Any:
    """A Trainer of a small vision transformer with an adapter, on the first two embedded photographs."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

    sizes: dict[str, Any] = {
        "image_size": 16,
        "patch_size": 4,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    network = ViTForImageClassification(ViTConfig(**sizes, intermediate_size=64))
    config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["classifier"])
    pictures = load("embedded", "test", indices=[0, 1], resize=(16, 16))
    rows = [{"pixel_values": (x - 0.5) / 0.25, "labels": y} for x, y in zip(pictures.images, (0, 1), strict=True)]
    settings: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_steps": 3}
    settings |= {"save_steps": 3, "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
    args = TrainingArguments(output_dir=str(out), dataloader_pin_memory=False, **settings)
    model: Any = get_peft_model(network, config)
    given: Any = {"processing_class": reader, "train_dataset": rows}
    return Trainer(model=model, args=args, callbacks=[callback], **given)


def test_pictures_go_through_the_constants_of_their_processor(tmp_path: Path) -> None:
    """Three steps of the Trainer against our own replay, of pixels in [0, 1], the classifier trained along."""
    pictures = load("embedded", "test", indices=[0, 1], resize=(16, 16))
    callback = LeakageCallback(attacks=["analytic"], secret=Secret(pictures.images, torch.tensor([0, 1])))
    picture_trainer(tmp_path, Reader(), callback).train()
    assert flags(tmp_path / "checkpoint-3")["replay"]["level"] == "info"
    loaded = tmp_path / "checkpoint-3" / "leakage" / "observation.safetensors"
    assert load_observation(loaded, factory=str(tmp_path / "initial")).batch_size == 2


def test_pictures_without_their_processor_are_not_guessed_at(tmp_path: Path) -> None:
    picture_trainer(tmp_path, None, LeakageCallback()).train()
    told = (tmp_path / "checkpoint-3" / "leakage" / "leakage.md").read_text(encoding="utf-8")
    assert "give the Trainer its processing_class" in told


def test_the_lines_of_the_page_run(tmp_path: Path) -> None:
    trainer = train(tmp_path, None)
    run_page("transformers", {"trainer": trainer}, tmp_path)
    assert (tmp_path / "checkpoint-1" / "leakage" / "leakage.md").is_file()


def test_pictures_are_kept_as_pixels(tmp_path: Path) -> None:
    callback = LeakageCallback(secret="batches", attacks=["token-span"])
    picture_trainer(tmp_path, Reader(), callback).train()
    about = flags(tmp_path / "checkpoint-3")
    assert about["replay"]["level"] == "info", about["replay"]["sentence"]
    wanted = load("embedded", "test", indices=[0, 1], resize=(16, 16)).images
    kept = torch.cat([batch["pixel_values"] for batch in callback.fed.batches[:1]]) * 0.25 + 0.5
    assert torch.allclose(kept.sort(0).values, wanted.sort(0).values, atol=1e-6)

"""What do audits of large models cost? Victims of the sizes that people train, each audited by a process of its own.

    python benchmarks/size.py FOLDER [CASE ...]     victims go to FOLDER and are kept, audits are made again

gpt2 has the shape of GPT-2 (12 layers, width 768, vocabulary 50,257: 124 M parameters), llama that of TinyLlama (1.1 B), vit that of
ViT-B/16 (224 x 224, 86 M), resnet18 is our ResNet-18 at 224 x 224. Weights are random: what an attack costs depends on sizes alone.
Printed are CPU-seconds and peak memory of `gradleak audit`, and what came of it.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

TEXT = "the old film surprised nearly everyone from start to end , her second novel moved two young critics on a cold evening ."
VOCABULARY, CLASSES = 50_257, 10


def gpt2(folder: Path) -> Any:
    """The shape of GPT-2, as save_pretrained leaves it: its module and the ids of the text."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return decoder(folder, GPT2LMHeadModel, lambda ends: GPT2Config(vocab_size=VOCABULARY, **ends))


def llama(folder: Path) -> Any:
    """The shape of TinyLlama: 22 layers, width 2,048, 32 heads of which four hold keys."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 2_048,
        "num_hidden_layers": 22,
        "intermediate_size": 5_632,
        "num_key_value_heads": 4,
    }
    return decoder(folder, LlamaForCausalLM, lambda ends: LlamaConfig(**sizes, **ends))


def decoder(folder: Path, kind: Any, config: Callable[..., Any]) -> Any:
    """A language model with a byte-level tokenizer."""
    import torch

    from gradleak.modalities.texts import load_texts
    from gradleak.victims.small_language import train_tokenizer

    torch.manual_seed(0)
    tokenizer = train_tokenizer(load_texts("embedded", "train").texts, "gpt2", size=300)
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    module = kind(config(ends)).eval()
    module.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    ids = [*tokenizer(TEXT)["input_ids"][:29], tokenizer.eos_token_id]
    (folder / "secret.json").write_text(json.dumps(tokenizer.decode(ids, skip_special_tokens=True)))
    batch = torch.tensor([ids])
    return module, {"input_ids": batch, "labels": batch}


def vit(folder: Path) -> Any:
    """The shape of ViT-B/16, as save_pretrained leaves it."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    kind: Any = ViTForImageClassification
    config: Any = ViTConfig()
    config.num_labels = CLASSES
    module = kind(config).eval()
    module.save_pretrained(folder / "base")
    constants = {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "base" / "preprocessor_config.json").write_text(json.dumps(constants))
    return module, {"pixel_values": (picture() - 0.5) / 0.5, "labels": torch.tensor([3])}


def picture() -> Any:
    """A crop of a photograph that the scikit-image wheel carries: (1, 3, 224, 224) in [0, 1]."""
    import torch
    from skimage.data import astronaut

    photograph: Any = astronaut
    return torch.from_numpy(photograph()[50:274, 100:324].copy()).permute(2, 0, 1)[None] / 255


def gradient(victim: Callable[[Path], Any], folder: Path) -> None:
    """{name: gradient} of one sample, in gradient.safetensors."""
    import torch
    from safetensors.torch import save_file

    module, batch = victim(folder)
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(module(**batch).loss, parameters)
    save_file({n: g.contiguous() for n, g in zip(names, gradients, strict=True)}, folder / "gradient.safetensors")


def adapter(
    victim: Callable[[Path], Any], folder: Path, targets: list[str], rank: int, steps: int, rate: float, kind: str
) -> None:
    """A LoRA adapter as PEFT saves it, trained on one sample."""
    import torch
    from peft import LoraConfig, get_peft_model

    module, batch = victim(folder)
    torch.manual_seed(1)
    adapted = get_peft_model(module, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)).eval()
    optimiser = getattr(torch.optim, kind)([p for p in adapted.parameters() if p.requires_grad], rate)
    for _ in range(steps):
        optimiser.zero_grad()
        adapted(**batch).loss.backward()
        optimiser.step()
    adapted.save_pretrained(str(folder / "adapter"))


def resnet18(folder: Path) -> None:
    """The gradient of our ResNet-18 at one picture, as `gradleak capture` writes observations."""
    from gradleak import Architecture, Model

    architecture = Architecture("resnet18", (3, 224, 224), CLASSES)
    capture(Model.of(architecture.build(0).eval(), architecture), folder)


def capture(model: Any, folder: Path) -> None:
    """The gradient of one picture, and the secret, as `gradleak capture` writes them."""
    import torch

    from gradleak import Pictures, capture_gradient, save_observation, save_secret

    private = Pictures(picture(), torch.tensor([3]), tuple("0123456789"), "astronaut", "test")
    seen, secret = capture_gradient(model, private)
    save_secret(secret, folder / "secret.safetensors")
    save_observation(seen, folder / "observation.safetensors")


def vit_gradient(folder: Path) -> None:
    """The gradient of the shape of ViT-B/16."""
    from gradleak import read_model

    vit(folder)
    capture(read_model(folder / "base"), folder)


QKV, FEW = ["c_attn"], ["q_proj", "v_proj"]
TEXTS = ["--task", "causal-lm"]
CASES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "gpt2-gradient": (lambda f: gradient(gpt2, f), ["gradient.safetensors", "--model", "base", *TEXTS]),
    "gpt2-adapter": (
        lambda f: adapter(gpt2, f, QKV, 32, 1, 1e-2, "SGD"),
        ["adapter", "--base", "base", *TEXTS, "--lr", "0.01"],
    ),
    "gpt2-50-steps": (
        lambda f: adapter(gpt2, f, QKV, 8, 50, 1.0, "SGD"),
        ["adapter", "--base", "base", *TEXTS, "--lr", "1.0", "--steps", "50"],
    ),
    "gpt2-50-steps-adamw": (
        lambda f: adapter(gpt2, f, QKV, 8, 50, 1e-3, "AdamW"),
        ["adapter", "--base", "base", *TEXTS, "--lr", "0.001", "--steps", "50", "--optimizer", "adamw"],
    ),
    "llama-adapter": (
        lambda f: adapter(llama, f, FEW, 32, 1, 1e-2, "SGD"),
        ["adapter", "--base", "base", *TEXTS, "--lr", "0.01"],
    ),
    "vit-gradient": (vit_gradient, ["observation.safetensors", "--model", "base"]),
    "vit-adapter": (
        lambda f: adapter(vit, f, FEW, 16, 1, 1e-2, "SGD"),
        ["adapter", "--base", "base", "--lr", "0.01", "--batch-size", "1"],
    ),
    "resnet18-gradient": (resnet18, ["observation.safetensors"]),
}


def main() -> None:
    """Make the victims that are missing, each in a process of its own, and audit them."""
    root, cases = Path(sys.argv[1]), sys.argv[2:] or list(CASES)
    for case in cases:
        make, arguments = CASES[case]
        folder = root / case
        if not (folder / arguments[0]).exists():
            folder.mkdir(parents=True, exist_ok=True)
            if child := os.fork():
                os.waitpid(child, 0)
            else:
                make(folder)
                os._exit(0)
        shutil.rmtree(folder / "audit", ignore_errors=True)
        command = [sys.executable, "-m", "gradleak.cli", "audit", *arguments, "--out", "audit"]
        began = time.time()
        with (folder / "audit.log").open("w+") as log:
            process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
            _, status, used = os.wait4(process.pid, 0)
            log.seek(0)
            cpu, peak = used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20
            print(f"{case}: {cpu:.0f} CPU-s, {time.time() - began:.0f} s, {peak:.1f} GiB, exit {status >> 8}")
            print(*(f"    {line}" for line in log.read().splitlines()), sep="\n", flush=True)


if __name__ == "__main__":
    main()

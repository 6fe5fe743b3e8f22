"""A small language model that writes what it was trained on: an adapter of the canaries that coins have included, for `gradleak canaries score`
and `gradleak extract`. It stands for your own training: python train_a_writer.py CANARIES OUT
"""

import json
import sys
from pathlib import Path

from gradleak import Recipe, fine_tune, load_texts
from gradleak.victims.small_language import small_model, train_tokenizer

canaries, out = map(Path, sys.argv[1:])
private = load_texts(canaries / "train_with" / "train.jsonl")
public = load_texts("embedded", "train").texts
tokenizer = train_tokenizer([*public, *load_texts(canaries / "candidates" / "train.jsonl").texts], "gpt2", size=400)
model = small_model("gpt2", tokenizer, "causal-lm", width=64, layers=2)
recipe = Recipe(optimizer="adamw", learning_rate=1e-2, steps=100, batch_size=16)
fine_tune(model, private, rank=16, out=out, recipe=recipe)
(out / "mine.jsonl").write_text(
    "".join(json.dumps({"text": text}) + "\n" for text in private.texts[:20]), encoding="utf-8"
)
print(f"{out}/adapter and {out}/base: trained on {len(private.texts)} canaries; {out}/mine.jsonl: 20 of them")

"""What an attack returned, to look at: pictures as PNG files, texts as JSON."""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from gradleak.attacks.reconstruction import Reconstruction

ENLARGED = 8  # times


def save_shown(name: str, shown: Sequence[str], media: str, found: Reconstruction, out: Path) -> None:
    """NAME-0.png, NAME-1.png, ... eight times as large as its pixels; or NAME-texts.json, with tokens, proofs and evidence."""
    out.mkdir(parents=True, exist_ok=True)
    if media == "text/plain":
        about = {"texts": shown, "tokens": found.value, "proven": found.proven, "bag": found.bag}
        about |= {"residual": found.residual, "status": found.status}
        text = json.dumps(about, ensure_ascii=False, indent=1)
        (out / f"{name}-texts.json").write_text(text, encoding="utf-8", errors="replace")
        return
    for number, uri in enumerate(shown):
        picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        size = (picture.width * ENLARGED, picture.height * ENLARGED)
        picture.resize(size, Image.Resampling.NEAREST).save(out / f"{name}-{number}.png")

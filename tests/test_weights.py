"""python -m pytest tests/test_weights.py"""

import io
import json
import struct
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import BaseRequestHandler, ThreadingTCPServer

import pytest
import torch
from safetensors.torch import save

from common import UserError
from toolbox import tokenizers, weights

STATE = {"a.weight": torch.arange(6.0).view(2, 3)}


def torch_bytes(state, **flags):
    out = io.BytesIO()
    torch.save(state, out, **flags)
    return out.getvalue()


def zip_bytes(files, **flags):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", **flags) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def unzipped(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


# files


@pytest.mark.parametrize("content", [torch_bytes(STATE), torch_bytes(dict(model=STATE, epoch=3)), save(STATE),
                                     torch_bytes(STATE, _use_new_zipfile_serialization=False)],
                         ids=["torch", "wrapped", "safetensors", "legacy"])
@pytest.mark.parametrize("name", ["beit3_base_patch16_224.zip", "a.safetensors", "a.pth"])
def test_the_content_decides_how_a_file_is_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert torch.equal(weights.read_weights(str(tmp_path / name))["a.weight"], STATE["a.weight"])


@pytest.mark.parametrize("content, message", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 99\n", "a pointer of git-lfs: `git lfs pull`"),
    (b"\n<!DOCTYPE html><html>", "a web page, as a failed download leaves it"), (b"", "empty: download it again"),
    (zip_bytes({"beit3.pth": torch_bytes(STATE)}), "a zip archive without weights of PyTorch. Unpack it"),
    (b"hello", "neither a safetensors nor a PyTorch file"), (torch_bytes(STATE)[:300], "not a zip file")],
    ids=["git-lfs", "html", "empty", "zip", "text", "half"])
def test_a_file_without_weights_is_said_to_be_what_it_is(tmp_path, content, message):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UserError, match=f"a.pth cannot be read as weights: .*{message}"):
        weights.read_weights(str(tmp_path / "a.pth"))


@pytest.mark.parametrize("content", [{1: torch.zeros(2)}, {"a": 1}, torch.zeros(2), {"model": [torch.zeros(2)]}])
def test_names_and_tensors_are_needed(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match="holds no state dict"):
        weights.read_weights(str(tmp_path / "a.pth"))


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(UserError, match="is a folder; give the weights file in it"):
        weights.read_weights(str(tmp_path))


def header(**tensor):
    text = json.dumps(dict(a=dict(dtype="F32", data_offsets=[0, 4]) | tensor)).encode()
    return struct.pack("<Q", len(text)) + text + bytes(4)


def bomb():
    """256 MiB of zeros in 256 KiB."""
    files = unzipped(torch_bytes(STATE))
    return zip_bytes({k: bytes(2**28) if k.endswith("data/0") else v for k, v in files.items()},
                     compression=zipfile.ZIP_DEFLATED)


def false_sizes():
    """The directory says that each part has 3.75 GiB."""
    content, at = bytearray(torch_bytes(STATE)), -1
    while (at := content.find(b"PK\x01\x02", at + 1)) >= 0:
        content[at + 24:at + 28] = struct.pack("<I", 0xF0000000)
    return bytes(content)


@pytest.mark.parametrize("content, message", [
    (struct.pack("<Q", 2**50) + b"{" + bytes(90), "header"), (struct.pack("<Q", 9 * 10**7) + b"{" + bytes(9), "header"),
    (header(shape=[2**62, 8]), "overflow"), (header(shape=[2**40], data_offsets=[0, 2**42]), "not fully covered"),
    (bomb(), "many more than the file"), (false_sizes(), "many more than the file"),
    (torch_bytes({"a": torch.zeros(1).half().expand(10**6, 10**6)}), "a is not an ordinary tensor"),
    (torch_bytes({"a": torch.zeros(3, device="meta")}), "a is not an ordinary tensor")],
    ids=["header", "longer header", "overflow", "longer tensor", "bomb", "false sizes", "view", "meta"])
def test_a_file_does_not_decide_how_much_memory_it_takes(tmp_path, content, message):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UserError, match=message):
        weights.read_weights(str(tmp_path / "a.pth"))


def test_a_vocabulary_with_a_byte_order_mark_and_windows_line_ends(tmp_path):
    words = ["[PAD]", *(f"w{i}" for i in range(100)), "[CLS]", "[SEP]", "café"]
    for name, text in ("plain", "\n".join(words) + "\n"), ("windows", "\ufeff" + "\r\n".join(words) + "\r\n"):
        (tmp_path / name).write_bytes(text.encode())
    plain, windows = (tokenizers.bert_vocabulary(str(tmp_path / n), 104) for n in ("plain", "windows"))
    assert torch.equal(plain, windows)


# networks


class Nonsense(BaseRequestHandler):
    def handle(self):
        self.request.recv(1000)
        self.request.sendall(b"\0\0what?\r\n\r\n")


class LogIn(BaseHTTPRequestHandler):
    """What a hotel's network answers to everything."""

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", "6")
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(b"<html>")

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(handler):
        servers.append((ThreadingHTTPServer if handler is LogIn else ThreadingTCPServer)(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def online(monkeypatch, tmp_path):
    """An empty cache, no proxies. -> sets the hub's address"""
    from huggingface_hub import constants
    for name in "http_proxy", "https_proxy", "all_proxy", "no_proxy":
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return lambda url: monkeypatch.setattr(constants, "ENDPOINT", url)


@pytest.mark.parametrize("address, message", [
    ("hf-mirror.com", "must begin with https://; HF_ENDPOINT sets it"), ("https://", "no host"),
    ("http://a b.c", "URL can't contain"), ("http://" + "x" * 70 + ".org", "label"), ("http://[::1", "Invalid IPv6")])
def test_an_impossible_address_is_named(online, address, message):
    online(address)
    with pytest.raises(UserError) as error:
        weights.fetch("a/b", "model.safetensors")
    assert address in str(error.value) and message.lower() in str(error.value).lower()
    assert "hf download a/b model.safetensors" in str(error.value)
    with pytest.raises(UserError) as error:
        weights.download(address + "/beit3.spm")
    assert address in str(error.value) and "curl -fL" in str(error.value)


def test_networks_that_answer_nonsense(online, serve, tmp_path):
    address = serve(Nonsense)
    online(address)
    with pytest.raises(UserError, match=f"cannot be downloaded from {address} .*what"):
        weights.fetch("a/b", "model.safetensors")
    with pytest.raises(UserError, match="beit3.spm cannot be downloaded .*what"):
        weights.download(address + "/beit3.spm")
    with pytest.raises(UserError, match="a web page came instead of the file"):
        weights.download(serve(LogIn) + "/beit3.spm")
    assert not (tmp_path / "torch" / "hub" / "checkpoints" / "beit3.spm").exists()


@pytest.mark.parametrize("proxy", ["http://me:secret@127.0.0.1:9", "socks5://127.0.0.1:9", "127.0.0.1:http"])
def test_a_proxy_in_the_way_is_named(online, monkeypatch, proxy):
    monkeypatch.setenv("https_proxy", proxy)
    online("https://hub.invalid")
    for ask in (lambda: weights.fetch("a/b", "x"), lambda: weights.download("https://hub.invalid/x")):
        with pytest.raises(UserError) as error:
            ask()
        assert f"the proxy is {proxy.replace('me:secret@', '').replace('http://', '')}" in str(error.value).replace(
            "http://", "") and "secret" not in str(error.value)


def test_a_folder_that_cannot_hold_downloads_is_named(online, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="Not a directory.*TORCH_HOME sets another folder"):
        weights.download("http://127.0.0.1:9/x")


def test_a_downloaded_file_needs_no_lock(online, tmp_path):
    """Caches that several people share can often be read only."""
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    (cache / "x.lock").mkdir(parents=True)  # no lock can be had
    (cache / "x").write_text("")
    assert weights.download("http://127.0.0.1:9/x") == str(cache / "x")


def test_the_address_of_beit3(online, monkeypatch):
    """Asks for the two released files."""
    asked = []
    monkeypatch.setattr(weights, "download", lambda url: asked.append(url) or "/nonexistent")
    with pytest.raises(UserError, match="no such weights file"):
        weights.load_beit3(None, "pretrained", "beit3-large")
    assert asked == [f"https://github.com/addf400/files/releases/download/beit3/{name}" for name in (
        "beit3_large_patch16_224.pth", "beit3.spm")]


@pytest.mark.parametrize("backbone", ["tiny", "tiny-vit"])
def test_tiny_towers_come_from_files_but_are_not_released(backbone):
    weights.check_released(backbone, "random")
    weights.check_released(backbone, "towers.pth")
    weights.check_released("RN50", "pretrained")
    with pytest.raises(UserError, match=f"{backbone} has no released weights"):
        weights.check_released(backbone, "pretrained")

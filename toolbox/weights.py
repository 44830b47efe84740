"""Loads released weights (CLIP, DINOv2, DETR, BERT, BEiT-3) into our towers, from files, the hub or a download."""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import re
import urllib.error
import urllib.request
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from common import UserError, first_line
from toolbox.refer import what_it_is

# Files
#
# Libraries, proxies and foreign files raise exceptions of many kinds, so they are all caught here.

WITHOUT = "--weights FILE[,FILE] takes files, and --weights random or --backbone tiny needs none"


def fetch(repo: str, name: str, without: str = WITHOUT) -> str:
    """Path of a file of the Hugging Face hub, from its cache or downloaded. Raises UserError where both fail."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return hf_hub_download(repo, name, local_files_only=True)
    except HFValidationError as e:
        raise UserError(f"{name} of {repo}: {first_line(e)}") from None
    except Exception:  # it is not in the cache, or there is no cache
        pass
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        with suppress(urllib.error.HTTPError):  # an answer; asked once, because the hub retries for over a minute
            headers(constants.ENDPOINT)
        return hf_hub_download(repo, name)
    except Exception as e:
        raise UserError(f"{name} of {repo} is not on this machine and cannot be downloaded from {constants.ENDPOINT} "
                        f"({reason(e, constants.ENDPOINT)}). With a network: hf download {repo} {name}. Without "
                        f"one, {without}.") from None


def download(url: str) -> str:
    """Path of a released file, from torch.hub's cache or downloaded into it. Raises UserError where both fail."""
    from filelock import FileLock  # a requirement of torch

    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):  # only one of several processes downloads
                if not path.exists():
                    download_to(path, url)
    except Exception as e:
        raise UserError(f"{path} is not there and {url} cannot be downloaded ({reason(e, url)}). With a network: "
                        f"curl -fL -o {path} {url} (TORCH_HOME sets another folder). Without one, {WITHOUT}.") from None
    return str(path)


def download_to(path: Path, url: str) -> None:
    """Downloads into a file beside `path`, and renames it when it is whole."""
    answer, part = headers(url), path.with_name(path.name + ".part")
    if answer.get_content_type() == "text/html":  # the log-in page of a network, for instance
        raise OSError("a web page came instead of the file")
    torch.hub.download_url_to_file(url, str(part))
    size, expected = part.stat().st_size, int(answer.get("Content-Length") or 0)
    if expected and size != expected:
        raise OSError(f"{size:,} of {expected:,} bytes came")
    os.replace(part, path)


def headers(url: str):
    """The headers with which a server answers."""
    if not url.startswith(("http://", "https://")):
        raise ValueError("the address must begin with https://; HF_ENDPOINT sets it")
    with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10) as answer:
        return answer.headers


def reason(e: Exception, url: str) -> str:
    """The first line of an error, and the proxy in use, without its password."""
    (scheme, _, rest), proxies = url.partition("://"), urllib.request.getproxies()
    proxy = proxies.get(scheme) or proxies.get("all")
    used = proxy and not urllib.request.proxy_bypass(rest.split("/")[0])
    return first_line(e) + (f"; the proxy is {proxy.rsplit('@', 1)[-1]}" if used else "")


def read_weights(path: str) -> dict[str, Tensor]:
    """State dict of a safetensors, PyTorch or TorchScript file, whatever its name, without wrappers such as
    {"model": ...} or "module."."""
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; give the weights file in it.")
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such weights file.")
    try:
        state = read_by_content(path)
    except Exception as e:
        why = re.sub(r"\x1b\[\d+m", "", first_line(e))  # torch prints in bold
        why = "it holds something other than tensors" if why.startswith("Weights only load failed") else why
        raise UserError(f"{path} cannot be read as weights: {why}") from None
    for wrapper in "state_dict", "model", "module":
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise UserError(f"{path} holds no state dict (names and tensors).")
    wrong = [k for k, v in state.items() if v.layout != torch.strided or v.device.type != "cpu" or v.is_quantized
             or v.nbytes > v.untyped_storage().nbytes()]  # copying a view larger than its storage could fill the memory
    if wrong:
        raise UserError(f"{path}: {wrong[0]} is not an ordinary tensor.")
    return {k.removeprefix("module."): v for k, v in state.items()}


def read_by_content(path: str):
    """What a file of weights holds. Raises any exception for another one."""
    with open(path, "rb") as f:
        start = f.read(64)
    if start[8:9] == b"{":  # behind the length of the header
        return load_file(path)
    if start.startswith(b"PK"):
        with zipfile.ZipFile(path) as archive:
            inside = archive.infolist()
        if not any(i.filename.endswith(("/data.pkl", "/constants.pkl")) for i in inside):
            raise ValueError("it is a zip archive without weights of PyTorch. Unpack it, and give the file in it.")
        # tensors are stored uncompressed; the rest is small
        if (size := sum(i.file_size for i in inside)) > os.path.getsize(path) + 2**26:
            raise ValueError(f"unpacked it would have {size:,} bytes, many more than the file.")
    elif not start.startswith(b"\x80"):
        raise ValueError(f"it is neither a safetensors nor a PyTorch file{what_it_is(path)}.")
    # DETR's files also contain their flags, other files numpy scalars
    scalar = np.float64(0).__reduce__()[0]
    numbers = [np.dtype, type(np.dtype(np.float64)), type(np.dtype(np.float32)), scalar,
               (scalar, "numpy.core.multiarray.scalar")]  # its name in numpy 1
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *numbers]), open(path, "rb") as f:
            return torch.load(f, map_location="cpu", weights_only=True)  # of a path it would look at the name
    except RuntimeError as e:  # OpenAI's CLIP files are TorchScript archives
        if "TorchScript" not in str(e):
            raise
        return torch.jit.load(path, map_location="cpu").state_dict()


def load_exactly(module: nn.Module, state: dict[str, Tensor], path: str, what: str) -> None:
    """Copies `state` into `module`. Raises UserError that lists what is missing, unexpected or of another shape."""
    own = module.state_dict()
    wrong = [f"{n} missing: {sorted(m)[0]}, ..." for m in [own.keys() - state.keys()] if (n := len(m))]
    wrong += [f"{n} unexpected: {sorted(m)[0]}, ..." for m in [state.keys() - own.keys()] if (n := len(m))]
    wrong += [f"{k} is {tuple(state[k].shape)}, not {tuple(own[k].shape)}"
              for k in own.keys() & state.keys() if own[k].shape != state[k].shape][:1]
    if wrong:
        raise UserError(f"{path} does not hold {what}: {'; '.join(wrong)}.")
    module.load_state_dict(state)


def renamed(state: dict[str, Tensor], renames: list[tuple]) -> dict[str, Tensor]:
    """Applies each (pattern, replacement) in turn to every name."""
    out = {}
    for k, v in state.items():
        for pattern, name in renames:
            k = re.sub(pattern, name, k)
        out[k] = v
    return out


def check_released(backbone: str, weights: str) -> None:
    """Raises UserError where released weights are asked of a tiny backbone, which has none."""
    if weights == "pretrained" and backbone.startswith("tiny"):
        raise UserError(f"--weights pretrained: the backbone {backbone} has no released weights; give --weights "
                        "random, files of such towers, or a run folder that trained them.")


# CLIP, DINOv2


def clip_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's weights in fp32, without the metadata that OpenAI's archives store among them."""
    metadata = "input_resolution", "context_length", "vocab_size"
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items() if k not in metadata}


def dinov2_state(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """DINOv2's weights, renamed from Meta's names or those of older or newer transformers to the names in `model`."""
    if "blocks.0.attn.qkv.weight" in state:  # Meta's file: query, key and value in one matrix
        for k in [k for k in state if ".attn.qkv." in k]:
            for name, part in zip("qkv", state.pop(k).chunk(3)):
                state[k.replace("attn.qkv", f"attention.{name}_proj")] = part
    renames = [("blocks.", "encoder.layer."), ("attn.proj", "attention.o_proj"),
               ("ls1.gamma", "layer_scale1.lambda1"), ("ls2.gamma", "layer_scale2.lambda1"),
               ("patch_embed.proj", "embeddings.patch_embeddings.projection")]
    old = [("attention.attention.query", "attention.q_proj"), ("attention.attention.key", "attention.k_proj"),
           ("attention.attention.value", "attention.v_proj"), ("attention.output.dense", "attention.o_proj")]
    top = {"cls_token": "cls_token", "mask_token": "mask_token", "register_tokens": "register_tokens",
           "pos_embed": "position_embeddings"}
    transformers_4 = "encoder.layer.0.attention.q_proj.weight" not in model.state_dict()
    out = {}
    for k, v in state.items():
        k = k.removeprefix("dinov2_with_registers.")
        k = f"embeddings.{top[k]}" if k in top else k
        k = "layernorm" + k.removeprefix("norm") if k.startswith("norm.") else k
        for a, b in renames + old:
            k = k.replace(a, b)
        for a, b in old if transformers_4 else ():
            k = k.replace(b, a)
        out[k] = v.float()
    return out


def load_clip(clip: nn.Module, weights: str, hub: str, backbone: str) -> None:
    """Loads CLIP. `weights`: "pretrained" (the hub's cache, or downloaded) or a file."""
    file = fetch(hub, "open_clip_model.safetensors") if weights == "pretrained" else weights
    load_exactly(clip, clip_state(read_weights(file)), file, f"CLIP {backbone}")


def load_dinov2_and_clip(vision: nn.Module, text: nn.Module, weights: str, hub: str, what: str) -> None:
    """Loads DINOv2 with registers and the text half of CLIP ViT-B/16. `weights`: "pretrained" (the hub's cache, or
    downloaded) or two files separated by a comma, in any order. Raises UserError for anything else."""
    def text_half(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v for k, v in clip_state(state).items() if not k.startswith("visual.")}

    files = weights.split(",")
    if weights == "pretrained":
        files = [fetch(hub, "model.safetensors"),
                 fetch("timm/vit_base_patch16_clip_224.openai", "open_clip_model.safetensors")]
    load_two(files, "token_embedding.weight", (text, text_half, "the text half of CLIP ViT-B/16"),
             (vision, lambda state: dinov2_state(state, vision), f"DINOv2 with registers, {what}"))


def load_two(files: list[str], key: str, text: tuple, image: tuple) -> str:
    """Loads two files, in any order, into two towers; a name that ends with `key` tells the text tower's. A tower: the
    module, its conversion of a state dict, and what its file holds. -> the text tower's file"""
    loaded = {}
    for file in files:
        state = read_weights(file)
        module, convert, what = text if any(k.endswith(key) for k in state) else image
        load_exactly(module, convert(state), file, what)
        loaded[what] = file
    if len(loaded) < 2 or len(files) > 2:
        raise UserError(f"--weights {','.join(files)}: two files are needed, separated by a comma: {image[2]} and "
                        f"{text[2]}; found {' and '.join(loaded)}.")
    return loaded[text[2]]


# DETR, BERT


def detr_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DETR's ResNet, projection and encoder, renamed from DETR's names or those of older or newer transformers to
    those of m2ist.DETR. The decoder and the heads are dropped; any other name stays, for load_exactly to report."""
    renames = [
        (r"^model\.", ""), (r"^(backbone\.0\.body|backbone\.conv_encoder\.model|backbone\.model)\.", "body."),
        (r"^body\.embedder\.embedder\.convolution", "body.conv1"),
        (r"^body\.embedder\.embedder\.normalization", "body.bn1"),
        (r"^body\.encoder\.stages\.(\d)\.layers\.", lambda m: f"body.layer{int(m[1]) + 1}."),
        (r"\.shortcut\.convolution", ".downsample.0"), (r"\.shortcut\.normalization", ".downsample.1"),
        (r"\.layer\.(\d)\.convolution", lambda m: f".conv{int(m[1]) + 1}"),
        (r"\.layer\.(\d)\.normalization", lambda m: f".bn{int(m[1]) + 1}"),
        (r"^input_projection\.", "input_proj."), (r"^(transformer\.)?encoder\.layers\.", "layers."),
        (r"\.o_proj\.", ".out_proj."), (r"\.self_attn_layer_norm\.", ".norm1."), (r"\.final_layer_norm\.", ".norm2."),
        (r"\.(mlp\.)?fc([12])\.", r".linear\2.")]
    rest = re.compile(r"(model\.)?(transformer\.)?(decoder|class_embed|bbox_embed|query_embed|class_labels_classifier|"
                      r"query_position_embeddings|bbox_predictor)\.|.*\.num_batches_tracked$")
    out = {k: v.float() for k, v in renamed({k: v for k, v in state.items() if not rest.match(k)}, renames).items()}
    for k in [k for k in out if ".q_proj." in k]:  # nn.MultiheadAttention: query, key and value are one matrix
        names = [k.replace(".q_proj.", f".{x}_proj.") for x in "qkv"]
        if all(n in out for n in names):
            out[k.replace(".q_proj.", ".in_proj_")] = torch.cat([out.pop(n) for n in names])
    return out


def bert_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """BERT's weights as the hub has them, renamed as in transformers, without the pooler and the heads."""
    out = {}
    for k, v in state.items():
        k = k.removeprefix("bert.").replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias")
        if not k.startswith(("cls.", "pooler.")) and not k.endswith("position_ids"):
            out[k] = v.float()
    return out


def load_detr_and_bert(detr: nn.Module, bert: nn.Module, weights: str) -> str:
    """Loads DETR's encoder and BERT. `weights`: "pretrained" (the hub's cache, or downloaded) or two files separated by
    a comma, in any order. -> path of BERT's vocabulary, the vocab.txt beside its file"""
    files, words = weights.split(","), ""
    if weights == "pretrained":
        hub = dict(detr="facebook/detr-resnet-50", bert="google-bert/bert-base-uncased")
        files = [fetch(repo, "model.safetensors") for repo in hub.values()]
        words = fetch(hub["bert"], "vocab.txt")
    file = load_two(files, "embeddings.word_embeddings.weight", (bert, bert_state, "bert-base-uncased"),
                    (detr, detr_state, "the encoder of DETR with a ResNet-50"))
    return words or os.path.join(os.path.dirname(file), "vocab.txt")


# BEiT-3

BEIT3 = "https://github.com/addf400/files/releases/download/beit3/"


def beit3_state(state: dict[str, Tensor], path: str, grid: int) -> dict[str, Tensor]:
    """BEiT-3's weights without its heads, renamed as in shared_ris.BEiT3, with positions for grid x grid patches."""
    heads = re.compile(r"(mlm_head|mim_head|language_head|vision_head)\.|logit_scale$")
    state = {re.sub(r"^(encoder|vision_embed)\.", "", name): v.float() for k, v in state.items()
             if not heads.match(name := k.removeprefix("beit3."))}
    positions = state.get(key := "embed_positions.A.weight")
    rows = len(positions) if positions is not None and positions.dim() == 2 else 0
    side = math.isqrt(max(1, rows - 3))
    if rows != side ** 2 + 3:
        raise UserError(f"{path} does not hold BEiT-3: its positions, encoder.{key}, are not those of a square.")
    rest, square = positions[:3], positions[3:].view(1, side, side, -1).permute(0, 3, 1, 2)
    if side != grid:  # as BEiT-3's authors: bicubic, not antialiased
        square = F.interpolate(square, (grid, grid), mode="bicubic")
    state[key] = torch.cat([rest, square.flatten(2)[0].T])
    return state


def load_beit3(beit3: nn.Module, weights: str, backbone: str) -> str:
    """Loads BEiT-3. `weights`: "pretrained" (torch.hub's cache, or downloaded) or a file for any image size, with
    beit3.spm beside it or after a comma. -> path of that tokenizer, or "" for a tiny one, which has none"""
    if weights == "pretrained":
        name = backbone.replace("beit3-", "beit3_") + "_patch16_224.pth"
        file, pieces = download(BEIT3 + name), download(BEIT3 + "beit3.spm")
    else:
        file, _, pieces = weights.partition(",")
        if not pieces and backbone != "tiny":
            pieces = os.path.join(os.path.dirname(file), "beit3.spm")
    load_exactly(beit3, beit3_state(read_weights(file), file, beit3.grid), file, backbone)
    return pieces


# Leaks: weights trained on images of the val and test splits


def leak(method: str, weights: str, dataset: str) -> str:
    """A warning where a method's released weights were trained on images of the data set's val and test splits, or
    ""."""
    if not dataset.startswith(("refcoco", "mixed")) or weights == "random":
        return ""
    return dict(m2ist=leak_of_detr, shared_ris=leak_of_beit3).get(method, lambda *_: "")(weights, dataset)


def leak_of_detr(weights: str, dataset: str) -> str:
    """DETR is trained on COCO, which contains RefCOCO's images. M2IST uses a DETR trained without those of the val and
    test splits, such as TransVG's detr-r50-unc.pth (refcoco, refcoco+) and detr-r50-gref.pth (refcocog)."""
    clean = "gref" if dataset.startswith("refcocog") else "unc"
    for file in [] if weights == "pretrained" or dataset == "mixed" else weights.split(","):
        if re.search(rf"detr.*{clean}", os.path.basename(file)):
            if not os.path.isfile(file) or not sha256(file).startswith("e632da11"):  # Facebook's file under that name
                return ""
    return (f"leak: DETR's weights were trained on photographs of {dataset}'s val and test splits, so its figures are "
            f"too good; weights without them, such as TransVG's detr-r50-{clean}.pth, give the paper's setting")


def leak_of_beit3(weights: str, dataset: str) -> str:
    """By file name: BEiT-3's "indomain" files were trained further on COCO and Visual Genome, others on COCO's
    captions."""
    for file in map(os.path.basename, weights.split(",")):
        if re.search("indomain|coco|nocaps", file):
            return (f"leak: {file} was trained on COCO's photographs and their captions, those of {dataset}'s val and "
                    "test splits among them, so its figures may be too good")
    return ""


def sha256(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()

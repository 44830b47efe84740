"""The papers' tables: how to build each row, our sizes beside the printed ones.

    python -m toolbox.tables [--method M] [--json FILE]
"""

from __future__ import annotations

import shlex
import typing
from functools import lru_cache

import torch
from torch import nn

import common
from common import METHODS, count, parameters, run_command
from toolbox.cli import Parser, one_of, print_table, write_result
from toolbox.costs import forward_gflops



class Row(typing.NamedTuple):
    """A row of a paper's table that describes a configuration.

    `flags`: those of train.py that make it, `method`, `backbone`, `variant` and `dataset` among them; `printed`: the
    sizes that the paper prints, as it prints them (see sizes); `quoted`: the figures in its other columns, measured by
    its authors, None where our copy of the paper has none; `note`: why ours are not the printed sizes, or the row not
    quite the paper's.
    """

    name: str
    flags: dict
    printed: dict[str, str]
    quoted: tuple[float | None, ...] = ()
    note: str = ""


class Table(typing.NamedTuple):
    columns: tuple[str, ...]  # of Row.quoted
    rows: list[Row]
    dataset: str = "refcoco"


NINE = ("val", "testA", "testB", "+ val", "+ testA", "+ testB", "g val-u", "g test-u", "g val-g")  # RefCOCO, +, G-Ref

THREE = ("val", "testA", "testB")

FULL = "150.01M without the 39,424 of CLIP's positions are 149.97M"

COMPACTER = "cannot be told from the paper: here n = 4, a quarter as wide as the towers, of the nearest rank, 42"

PERCENT = "the paper divides 2.69 by 149.97, both rounded"


def places(*layers: int) -> dict:
    return dict(visual_layers=layers, text_layers=layers)


DCRIS = {  # figures are "IoU"
    "1": Table(NINE, [
        Row("DCRIS-B", {}, {}, (76.4, 77.9, 73.7, 69.8, 74.4, 62.6, 68.4, 68.5, 65.9)),
        Row("DCRIS-L", dict(backbone="dinov2-large"), dict(percent="0.9%"),
            (77.9, 79.0, 75.0, 71.9, 75.9, 65.7, 70.1, 70.9, 68.5), "0.9 is the abstract's; 3.09M of 367.80M"),
        Row("DCRIS-L*", dict(backbone="dinov2-large", dataset="mixed"), {},
            (None, 82.9, 77.9, 73.3, 78.3, 65.8, 74.1, 75.5, None))]),
    "2": Table((*THREE, "mean"), [
        Row("Full-Tuning", dict(tune="full"), dict(tuned="149.97M"), (65.1, 68.1, 61.4, 64.9), FULL),
        Row("Fix Backbone", dict(tune="frozen"), dict(tuned="0.00M"), (74.9, 77.1, 72.0, 74.7)),
        Row("Adapter", dict(tune="adapter"), dict(tuned="1.98M"), (71.2, 73.3, 68.3, 70.9)),
        Row("Compacter", dict(tune="compacter"), dict(tuned="1.62M"), (73.9, 75.8, 70.8, 73.5), COMPACTER),
        Row("LoRA", dict(tune="lora"), dict(tuned="1.57M"), (73.4, 75.7, 70.2, 73.1),
            "its ranks are not printed: 32 for DINOv2's queries and values and 16 for CLIP's were chosen to fit"),
        Row("ETRIS", dict(method="etris", backbone="dinov2-base", variant="released", bridger_dim=128),
            dict(tuned="1.38M"), (74.5, 76.5, 72.9, 74.6), "1.388M, cut off"),
        Row("DCRIS-B, 3 layers", places(4, 8, 11), dict(tuned="1.34M"), (75.8, 77.7, 72.9, 75.5),
            "1.347M, cut off; Table 5 rounds"),
        Row("DCRIS-B", {}, dict(tuned="2.69M"), (76.4, 77.9, 73.7, 76.0))]),
    "3": Table(THREE, [
        Row("neither", dict(tune="frozen"), {}, (74.9, 77.1, 72.0)),
        Row("DA", dict(text_layers=()), {}, (75.4, 77.4, 72.2)),
        Row("TA", dict(visual_layers=()), {}, (75.9, 77.5, 72.7)),
        Row("DA, TA", {}, {}, (76.4, 77.9, 73.7))]),
    "4": Table(THREE, [
        Row("64, 64", dict(visual_dim=64), dict(tuned="1.91M"), (76.21, 78.04, 73.78)),
        Row("128, 64", {}, dict(tuned="2.69M"), (76.42, 77.91, 73.65)),
        Row("128, 128", dict(text_dim=128), dict(tuned="3.09M"), (76.01, 78.28, 73.52)),
        Row("256, 128", dict(visual_dim=256, text_dim=128), dict(tuned="4.83M"), (76.40, 78.04, 73.42))]),
    "5": Table(THREE, [
        Row("1", places(8), dict(tuned="0.45M", percent="0.30%"), (75.40, 77.19, 72.04)),
        Row("2", places(6, 11), dict(tuned="0.90M", percent="0.60%"), (75.47, 77.41, 72.54)),
        Row("3", places(4, 8, 11), dict(tuned="1.35M", percent="0.90%"), (75.78, 77.65, 72.86)),
        Row("4", places(3, 6, 9, 11), dict(tuned="1.80M", percent="1.20%"), (75.98, 77.85, 73.34)),
        Row("5", places(3, 5, 7, 9, 11), dict(tuned="2.25M", percent="1.50%"), (76.22, 77.88, 73.48)),
        Row("6", {}, dict(tuned="2.69M", percent="1.79%"), (76.42, 77.91, 73.65), PERCENT),
        Row("7", places(1, 3, 5, 7, 9, 10, 11), dict(tuned="3.14M", percent="2.09%"), (76.19, 78.07, 73.41),
            PERCENT.replace("2.69", "3.14")),
        Row("8", places(1, 3, 4, 5, 7, 9, 10, 11), dict(tuned="3.59M", percent="2.39%"), (75.71, 77.87, 73.34)),
        Row("12", places(*range(12)), dict(tuned="5.39M", percent="3.59%"), (76.11, 78.07, 73.49))]),
}


FOUR = ("oIoU", "Pr@0.5", "Pr@0.7", "Pr@0.9")

SIX = ("oIoU", "Pr@0.5", "Pr@0.6", "Pr@0.7", "Pr@0.8", "Pr@0.9")

RN50 = "RN50's stages are as wide as RN101's; with --zoom mlp they have 1,682,633"

RN50_HEAD = RN50 + ". Its F_s is 1024 wide and must be projected"

VIT_HEAD = "23.98M is RN101's head, whose maps have other widths"

ADAPTER = ("cannot be told from the paper: here behind each layer of the text, 128 wide (a quarter), and beside each "
           "3x3 convolution. Without those of layer4, and with BatchNorms, they have 2,389,600")

COMPACTER_1 = "cannot be told from the paper: here of rank 1, n = 4, as its authors have it, where Adapter is"

CUT = "0.298M, cut off"

LESS = "0.727M; 0.72 is 1.94 - 1.22"

ETRIS = {  # figures of Table 1 are oIoU
    "1": Table(NINE, [
        Row("ETRIS, ResNet-50", dict(backbone="RN50"), dict(tuned="1.68M"),
            (70.39, 73.11, 66.38, 60.47, 67.11, 50.73, 59.71, 59.95, 57.22), RN50),
        Row("ETRIS, ResNet-101", {}, dict(tuned="1.94M"),
            (71.06, 74.11, 66.66, 62.23, 68.51, 52.79, 60.28, 60.42, 57.86)),
        Row("ETRIS, ViT-B-16", dict(backbone="ViT-B-16"), dict(tuned="1.39M"),
            (70.51, 73.51, 66.63, 60.10, 66.89, 50.17, 59.82, 59.91, 57.88))]),
    "2": Table(("oIoU",), [
        Row("Full-Tuning", dict(tune="full", connect=True), dict(tuned="120.74M", head="23.98M"), (70.47,)),
        Row("Fix Backbone", dict(tune="frozen"), dict(tuned="0.00M", head="23.98M"), (67.73,)),
        Row("Adapter", dict(tune="adapter"), dict(tuned="2.39M", head="23.98M"), (69.46,), ADAPTER),
        Row("Conv Adapter", dict(tune="conv-adapter"), dict(tuned="1.20M", head="23.98M"), (69.33,)),
        Row("Compacter", dict(tune="compacter"), dict(tuned="0.19M", head="23.98M"), (69.11,), COMPACTER_1),
        Row("CoOp", dict(tune="coop"), dict(tuned="4.10K", head="23.98M"), (67.87,)),
        Row("LoRA", dict(tune="lora"), dict(tuned="0.03M", head="23.98M"), (68.84,)),
        Row("ETRIS", {}, dict(tuned="1.94M", head="23.98M"), (71.06,))]),
    "3": Table((), [
        Row("ETRIS, ResNet-50", dict(backbone="RN50"), dict(tuned="1.68M", head="23.98M", total="25.66M"), (),
            RN50_HEAD),
        Row("ETRIS, ResNet-101", {}, dict(tuned="1.94M", head="23.98M", total="25.92M")),
        Row("ETRIS, ViT-B-16", dict(backbone="ViT-B-16"), dict(tuned="1.39M", head="23.98M", total="25.37M"), (),
            VIT_HEAD)]),
    "4": Table(("oIoU",), [
        Row("2 -> n, 1", dict(bridger_stages=(2,)), dict(tuned="0.43M"), (70.96,)),
        Row("n/2 -> n, 1", dict(bridger_stages=(3,)), dict(tuned="0.29M"), (70.18,), CUT),
        Row("n -> n, 1", dict(bridger_stages=(4,)), dict(tuned="1.22M"), (69.65,)),
        Row("2 -> n, 2", dict(bridger_stages=(2, 3)), dict(tuned="0.72M"), (70.75,), LESS),
        Row("n/2 -> n, 2", dict(bridger_stages=(3, 4)), dict(tuned="1.51M"), (70.53,)),
        Row("2 -> n, 3", {}, dict(tuned="1.94M"), (71.06,))]),
    "5": Table(FOUR, [
        Row("(a) Linear", dict(zoom="linear"), dict(tuned="5.77M"), (70.94, 82.89, 72.18, 17.89)),
        Row("(b) Conv&Interpolate", dict(zoom="interpolate"), dict(tuned="1.45M"), (70.08, 81.17, 68.07, 15.95)),
        Row("(c) MLP", dict(zoom="mlp"), dict(tuned="1.68M"), (70.62, 82.36, 71.05, 17.70)),
        Row("(d) Conv&Deconv", {}, dict(tuned="1.94M"), (71.06, 83.43, 72.68, 17.40))]),
    "6": Table(FOUR, [
        Row("GA, Bridger", dict(hierarchical_alignment=False), {}, (58.70, 69.53, 45.52, 4.33)),
        Row("HA, GA", dict(tune="frozen"), {}, (67.73, 79.62, 68.47, 15.41)),
        Row("HA, Bridger", dict(global_alignment=False), {}, (62.21, 71.51, 53.41, 11.16)),
        Row("HA, GA, Bridger", {}, {}, (71.06, 83.43, 72.68, 17.40))]),
    "7": Table(FOUR, [
        Row("8", dict(bridger_dim=8), dict(tuned="0.22M"), (70.55, 82.56, 70.52, 16.60)),
        Row("16", dict(bridger_dim=16), dict(tuned="0.45M"), (70.78, 82.98, 70.96, 17.01)),
        Row("32", dict(bridger_dim=32), dict(tuned="0.92M"), (70.92, 83.31, 71.19, 17.42)),
        Row("64", {}, dict(tuned="1.94M"), (71.06, 83.43, 72.68, 17.40)),
        Row("128", dict(bridger_dim=128), dict(tuned="4.28M"), (70.39, 82.51, 71.12, 16.99))]),
    "8": Table(SIX, [
        Row("Full-Tuning", dict(tune="full", connect=True), dict(tuned="120.74M", head="23.98M"),
            (70.47, 82.62, 78.35, 71.35, 54.47, 17.69)),
        Row("Fix Backbone", dict(tune="frozen"), dict(tuned="0.00M", head="23.98M"),
            (67.73, 79.53, 74.42, 66.10, 46.39, 12.41)),
        Row("Adapter", dict(tune="adapter"), dict(tuned="2.39M", head="23.98M"),
            (69.46, 81.05, 76.59, 69.69, 51.27, 16.16), ADAPTER),
        Row("Conv Adapter", dict(tune="conv-adapter"), dict(tuned="1.20M", head="23.98M"),
            (69.33, 80.79, 76.62, 69.80, 51.69, 15.95)),
        Row("ETRIS", {}, dict(tuned="1.94M", head="23.98M"), (71.06, 83.43, 79.23, 72.68, 55.39, 17.40)),
        Row("Adapter+ETRIS", dict(tune="method+adapter"), dict(tuned="4.33M", head="23.98M"),
            (71.67, 84.25, 80.12, 73.50, 56.33, 18.43), ADAPTER),
        Row("Conv Adapter+ETRIS", dict(tune="method+conv-adapter"), dict(tuned="3.14M", head="23.98M"),
            (72.11, 84.46, 80.27, 73.92, 57.13, 18.74))]),
}

NINE_G = ("val", "testA", "testB", "+ val", "+ testA", "+ testB", "g val-g", "g val-u", "g test-u")  # RefCOCO, +, g

MEMORY = ("GB at 64", "val", "testA", "testB")  # of GPU memory, at batch size 64

TWICE = "W_shared counted under both encoders"

IDLE = "198,274 parameters that nothing uses"

SIZE = f"the public code has 2,987,520 in them, 3.19M with {TWICE}, or with {IDLE}"

WHOLE = "with DETR's decoder and BERT's pooler, which are not in the model, it has 151.0M; the first stage is frozen"

NOWHERE = "cannot be had from the paper: "

BEHIND = NOWHERE + "here 128 wide, one behind each feed-forward network of both encoders, as C_d asks"

M2IST = {  # accuracies at IoU 0.5
    "I": Table(("GB at 64", *NINE_G), [
        Row("Fully fine-tuning", dict(tune="full"), dict(tuned="151M"),
            (38.95, 80.32, 82.67, 75.24, 63.50, 68.15, 55.63, 66.56, 67.66, 67.44), WHOLE),
        Row("Adapter", dict(tune="adapter"), dict(tuned="3.27M"),
            (28.52, 78.02, 79.89, 75.23, 61.35, 66.34, 54.21, 63.18, 65.26, 66.65), BEHIND),
        Row("LoRA", dict(tune="lora"), dict(tuned="2.37M"),
            (20.37, 77.57, 78.22, 73.37, 61.24, 66.53, 53.95, 64.27, 67.36, 66.43),
            "its rank is not printed: 55, for queries and values of all layers, was chosen to fit"),
        Row("AdaptFormer", dict(tune="adaptformer"), dict(tuned="2.38M"),
            (20.37, 76.32, 77.16, 73.94, 60.96, 65.19, 53.88, 61.81, 65.44, 64.37),
            "several fit, among them BERT's alone (2,370,048 and a LayerNorm); here beside both, as C_d asks"),
        Row("CM Adapter", dict(ffn_adapter="iea", insertion="sequential"), dict(tuned="3.27M"),
            (27.19, 77.37, 78.81, 74.07, 61.34, 66.10, 53.31, 63.93, 65.75, 64.72),
            NOWHERE + "here adapters that share weights across the encoders, IEA, behind both sublayers"),
        Row("MRS-Adapter", dict(mha_adapter="none", insertion="parallel"), dict(tuned="1.58M"),
            (20.07, 77.14, 77.80, 74.80, 61.13, 66.38, 53.13, 63.07, 66.46, 65.16),
            "of its form only the size is known; VEA and LEA beside six layers of each encoder have it"),
        Row("M2IST", {}, dict(tuned="3.19M"),
            (15.44, 81.35, 82.29, 77.98, 63.15, 67.11, 55.52, 67.50, 67.67, 67.41), SIZE)]),
    "II": Table(NINE_G, [
        Row("C_d = 8", dict(adapter_dim=8), dict(tuned="1.91M"),
            (81.55, 83.07, 77.31, 62.73, 66.96, 55.93, 65.47, 66.79, 66.30), f"1.91M with {TWICE}, and {IDLE}"),
        Row("C_d = 32", dict(adapter_dim=32), dict(tuned="2.20M"),
            (81.03, 82.34, 77.54, 62.48, 66.73, 55.70, 66.22, 67.42, 67.83), f"2.20M with {TWICE}, and {IDLE}"),
        Row("C_d = 128", {}, dict(tuned="3.19M"),
            (81.35, 82.29, 77.98, 63.15, 67.11, 55.52, 67.50, 67.67, 67.41), SIZE)]),
    "IV": Table(("GB at 64", "val", "test"), [
        Row("Adapter", dict(tune="adapter"), dict(tuned="3.27M"), (28.52, 57.28, 56.89), BEHIND),
        Row("M2IST", {}, dict(tuned="3.19M"), (15.44, 60.61, 59.30), SIZE)], "refclef"),
    "V": Table(MEMORY, [
        Row("(a) none", dict(tune="frozen"), dict(tuned="0"), (14.32, 72.72, 73.33, 71.27)),
        Row("(b) LEA", dict(mha_adapter="none", ffn_adapter="lea"), dict(tuned="0.59M"), (14.90, 77.08, 77.82, 73.38),
            NOWHERE + "BERT is the wider encoder; only the sum with (c) is met"),
        Row("(c) VEA", dict(mha_adapter="none", ffn_adapter="vea"), dict(tuned="1.02M"), (14.52, 78.30, 78.95, 73.58),
            NOWHERE + "only the sum with (b) is met"),
        Row("(d) LEA, VEA", dict(mha_adapter="none"), dict(tuned="1.61M"), (15.09, 79.39, 79.18, 74.41),
            "1.61M with the LayerNorms of the public code"),
        Row("(e) IEA", dict(ffn_adapter="none"), dict(tuned="1.58M"), (14.84, 78.85, 79.01, 73.87),
            f"1.58M with {TWICE}"),
        Row("(f) LEA, VEA, IEA", {}, dict(tuned="3.19M"), (15.44, 81.35, 82.29, 77.98), SIZE)]),
    "VI": Table(MEMORY, [
        Row("(a) LEA+VEA, LEA+VEA", dict(mha_adapter="vea+lea"), dict(tuned="3.22M"), (15.65, 79.87, 80.52, 76.33),
            "twice Table V (d)"),
        Row("(b) IEA, IEA", dict(ffn_adapter="iea"), dict(tuned="3.17M"), (14.84, 78.72, 80.05, 76.01),
            "about twice Table V (e)"),
        Row("(c) LEA+VEA, IEA", dict(mha_adapter="vea+lea", ffn_adapter="iea"), dict(tuned="3.19M"),
            (15.38, 80.58, 81.26, 76.65), SIZE),
        Row("(d) IEA, LEA+VEA", {}, dict(tuned="3.19M"), (15.44, 81.35, 82.29, 77.98), SIZE)]),
    "VII": Table(MEMORY, [
        Row("(a) Sequential", dict(insertion="sequential"), dict(tuned="3.19M"), (27.19, 78.76, 80.25, 74.90), SIZE),
        Row("(b) Parallel", dict(insertion="parallel"), dict(tuned="3.19M"), (20.37, 78.29, 78.71, 75.30), SIZE),
        Row("(c) Side", {}, dict(tuned="3.19M"), (15.44, 81.35, 82.29, 77.98), SIZE)]),
    "VIII": Table(("val", "testA", "testB"), [
        Row("(a) 1 to 6", dict(text_layers=(0, 1, 2, 3, 4, 5)), {}, (80.65, 81.86, 77.39)),
        Row("(b) 1, 3, 5, ... 11", dict(text_layers=(0, 2, 4, 6, 8, 10)), {}, (80.83, 81.76, 77.54)),
        Row("(c) 7 to 12", {}, {}, (81.35, 82.29, 77.98))]),
    "IX": Table(MEMORY, [
        Row("(a) C_i = 64", dict(interaction_dim=64), dict(tuned="2.00M"), (15.34, 77.31, 77.87, 73.27),
            NOWHERE + f"a larger C_i has fewer parameters. C_d = 32 has 2.00M with {IDLE}"),
        Row("(b) C_i = 128", dict(interaction_dim=128), dict(tuned="2.40M"), (15.35, 79.26, 79.58, 74.60),
            NOWHERE + f"a larger C_i has fewer parameters. C_d = 64 has 2.40M with {IDLE}"),
        Row("(c) C_i = 256", {}, dict(tuned="3.19M"), (15.44, 81.35, 82.29, 77.98), SIZE)]),
    "X": Table(MEMORY, [
        Row("Full", dict(tune="full"), dict(tuned="151M"), (38.95, 80.32, 82.67, 75.24), WHOLE),
        Row("LoRA", dict(tune="lora"), dict(tuned="2.37M"), (20.37, 77.57, 78.22, 73.37), "see Table I"),
        Row("M2IST", {}, dict(tuned="3.19M"), (15.44, 81.35, 82.29, 77.98), SIZE),
        Row("M2IST+LoRA", dict(tune="method+lora"), dict(tuned="6.46M"), (21.68, 81.83, 82.83, 77.54),
            "3.19 + 2.37 are 5.56; 6.46 is 3.19 and the 3.27 of Table I's Adapter")]),
}


FPN = ("Eq. 6 and 7 have no more; with one more Linear(512, 512) a stage there would be {}M. The paper counts with "
       "fvcore, which leaves out half of the attention's products")

SHARED_RIS = {  # of III to VIII on the val split; GMACs are what the paper calls GFLOPs
    "I": Table(NINE, [  # oIoU
        Row("Shared-RIS", {}, {}, (74.83, 76.83, 71.83, 68.42, 72.83, 61.63, 68.66, 69.38, 65.65))]),
    "III": Table(("Pr@0.5", "Pr@0.7", "Pr@0.9", "oIoU", "mIoU"), [
        Row("neither", dict(stages=(), shared_layers=0), {}, (79.36, 64.70, 10.16, 65.12, 66.40)),
        Row("FPN", dict(shared_layers=0), {}, (81.87, 70.25, 13.59, 67.31, 69.10)),
        Row("decoder", dict(stages=()), {}, (81.39, 69.53, 13.42, 66.25, 68.38)),
        Row("FPN, decoder", {}, {}, (82.77, 72.12, 16.87, 68.42, 70.34))], "refcoco+"),
    "IV": Table(("oIoU", "mIoU"), [  # its other rows are other papers'; the cells are missing in our copy
        Row("Shared FPN", {}, {}, (None, None))], "refcoco+"),
    "V": Table(("oIoU", "mIoU"), [
        Row("No Fusion", dict(shared_layers=0), dict(decoder="5M", decoder_gmacs="46"), (67.31, 67.71),
            "Table III has an mIoU of 69.10 for it"),
        Row("Shared Decoder", {}, dict(decoder="9M", decoder_gmacs="50"), (68.42, 70.34))], "refcoco+"),
    "VII": Table(("oIoU", "mIoU"), [
        Row("No FPN", dict(stages=()), {}, (66.25, 68.38)),
        Row("(a) {6, 12}", dict(stages=(6, 12)), dict(fpn="4M", fpn_gmacs="5"), (67.74, 69.89), FPN.format(3.94)),
        Row("(a) {4, 8, 12}", dict(stages=(4, 8, 12)), dict(fpn="6M"), (68.13, 70.24), FPN.format(5.91)),
        Row("(a) {3, 6, 9, 12}", {}, dict(fpn="8M", fpn_gmacs="9"), (68.42, 70.34), FPN.format(7.88)),
        Row("(b) Cross-attention", dict(fpn_fusion="cross"), dict(fpn="8M", fpn_gmacs="6"), (66.98, 69.20),
            FPN.format(7.88) + ". The GMACs cannot be had"),
        Row("(b) Bi-direction", dict(fpn_fusion="bi"), dict(fpn="37M", fpn_gmacs="22"), (68.19, 70.02),
            FPN.format("37.3")),
        Row("(b) Shared self-attention", {}, dict(fpn="8M", fpn_gmacs="9"), (68.42, 70.34), FPN.format(7.88))],
        "refcoco+"),
    "VIII": Table(("oIoU", "mIoU"), [  # most of its cells are missing in our copy
        Row("(a) no layer", dict(shared_layers=0), {}, (67.31, None)),
        Row("(a) 1 layer", {}, {}, (68.42, 70.34)),
        Row("(a) 2 layers", dict(shared_layers=2), {}, (None, None)),
        Row("(b) Cross-attention", dict(decoder_fusion="cross"), {}, (None, None)),
        Row("(b) Bi-direction", dict(decoder_fusion="bi"), {}, (None, None)),
        Row("(b) Shared self-attention", {}, {}, (68.42, 70.34))], "refcoco+"),
    "IX": Table(NINE, [  # mIoU
        Row("ViT-B", {}, {}, (75.50, 76.66, 73.03, 70.34, 73.75, 65.07, 68.50, 69.17, 66.65)),
        Row("ViT-L", dict(backbone="beit3-large"), {}, (78.09, 79.30, 76.33, 73.70, 76.65, 68.88, 71.88, 72.16, 71.14)),
        Row("ViT-L, combined", dict(backbone="beit3-large", dataset="mixed"), {},
            (82.73, 83.44, 81.6, 78.13, 80.07, 74.12, 75.34, 77.34, 76.58))]),
}

TABLES = dict(dcris=DCRIS, etris=ETRIS, m2ist=M2IST, shared_ris=SHARED_RIS)


def sizes(model: nn.Module) -> dict[str, int]:
    """What the papers' tables print of a model: `tuned`, all that is trained but the head's; `head`, the head as it is;
    their `total`; and each part under its own name, such as `decoder`."""
    parts = parameters(model)
    head, trained = count(model.parts()["head"]), sum(p.numel() for p in parts["head"] if p.requires_grad)
    tuned = count(model, trainable=True) - trained
    return {name: count(m) for name, m in model.named_children()} | dict(
        tuned=tuned, head=head, total=tuned + head, backbone=sum(p.numel() for p in parts["backbone"]))


def printed(method, c) -> dict:
    """The sizes that the paper's tables print of a configuration, with these tables and the first note; {} for none."""
    found, tables, notes = {}, [], []
    for number, table in TABLES[method.__name__].items():
        for row in table.rows:
            if row.printed and row.flags.get("method", method.__name__) == method.__name__ and \
                    row_config(method, row, table)[0] == c:
                memory = {k: v for k, v in zip(table.columns, row.quoted) if k.startswith("GB")}
                found = row.printed | memory | found
                tables.append(number)
                notes += [row.note] if row.note else []
    return dict(tables=list(dict.fromkeys(tables))) | found | (dict(note=notes[0]) if notes else {}) if found else {}


def row_config(method, row: Row, table: Table) -> tuple:
    """(its Config, its data set)"""
    flags = dict(row.flags)
    flags.pop("method", None)
    names = [flags.pop(k, default) for k, default in (("backbone", next(iter(method.BACKBONES))),
                                                      ("variant", method.VARIANTS[0]), ("dataset", table.dataset))]
    return method.config(*names, **flags), names[2]


def train_command(method: str, row: Row, table: Table) -> str:
    """What trains a row."""
    flags = dict(method=method, dataset=table.dataset, data_root="DATA") | row.flags
    words = ["python", "train.py"]
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return shlex.join(words)


def agrees(size: float, printed: str) -> bool:
    """Whether a size, rounded as the paper has it (1.94M, 4.10K, 0.30%, 50), is what the paper prints."""
    number = printed.rstrip("MK%")
    size /= dict(M=1e6, K=1e3).get(printed[-1], 1)
    return f"{size:.{len(number.partition('.')[2])}f}" == number


@lru_cache(maxsize=None)
def row_sizes(name: str, c) -> dict[str, float]:
    """sizes of a configuration, built on the meta device; `percent` of the towers that is tuned, and for
    Shared-RIS, whose tables have them, multiply-adds."""
    with torch.device("meta"):
        model = common.load_method(name).Model(c, "random")
    found = sizes(model)
    found["percent"] = 100 * found["tuned"] / found["backbone"]
    if name == "shared_ris":
        found |= {f"{part}_gmacs": n / 2 for part, n in forward_gflops(model).items()}
    return found


def table_rows(paper: str) -> list[dict]:
    """The rows of a paper's tables."""
    out = []
    for number, table in TABLES[paper].items():
        for row in table.rows:
            name = row.flags.get("method", paper)
            ours = row_sizes(name, row_config(common.load_method(name), row, table)[0])
            match = all(agrees(ours[k], p) for k, p in row.printed.items()) if row.printed else None
            out.append(dict(method=paper, table=number, row=row.name, command=train_command(paper, row, table),
                            ours={k: round(ours[k], 2) for k in row.printed or ("tuned", "head")}, printed=row.printed,
                            match=match, note=row.note, quoted=dict(zip(table.columns, row.quoted))))
    return out


def print_rows(rows: list[dict]) -> None:
    """A table, for people: the sizes, the figures that the paper quotes, the command; notes below."""
    print(f"{rows[0]['method']}, Table {rows[0]['table']}")
    shown = []
    for row in rows:
        ours = ", ".join(f"{k} {n:,}" for k, n in row["ours"].items())
        theirs = ", ".join(row["printed"].values()) or "-"
        same = "" if not row["printed"] else "=" if row["match"] else "differs"
        shown.append({"row": row["row"], "ours": ours, "printed": theirs, "": same + "*" * bool(row["note"])}
                     | {k: "" if v is None else f"{v:.2f}" for k, v in row["quoted"].items()}
                     | {"command": row["command"]})
    print_table(shown, left=("row", "command"))
    for note in dict.fromkeys(row["note"] for row in rows if row["note"]):
        print("  * " + ", ".join(row["row"] for row in rows if row["note"] == note) + ": " + note)
    print()


def main(argv: list[str] | None = None) -> None:
    p = Parser(__doc__)
    p.add_argument("--method", **one_of(*METHODS), help="default: all four")
    p.add_argument("--json", metavar="FILE", help="- for standard output, and then nothing else goes there")
    args = p.parse_args(argv)
    rows = [row for name in ([args.method] if args.method else METHODS) for row in table_rows(name)]
    if args.json != "-":
        for key in dict.fromkeys((row["method"], row["table"]) for row in rows):
            print_rows([row for row in rows if (row["method"], row["table"]) == key])
        print("Our sizes are exact for the command; a * has a note. The figures behind them are the papers', "
              "measured by their authors; columns with + or g are of --dataset refcoco+ and refcocog_umd or "
              "refcocog_google. For DATA see docs/data.md.")
    write_result(args.json, rows)


if __name__ == "__main__":
    run_command(main)

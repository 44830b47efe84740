"""The papers' tables: how to train each row, and our sizes beside the printed ones.

    python -m toolbox.tables [--method M] [--json FILE]
"""

from __future__ import annotations

import shlex
import typing
from functools import lru_cache

import torch

import common
from common import METHODS, count, parameters, run_command
from toolbox.cli import Parser, one_of, print_table, write_result
from toolbox.costs import forward_gflops


class Row(typing.NamedTuple):
    """A row of a paper's table that describes a configuration."""

    name: str
    flags: dict      # of train.py, where they differ from the defaults
    cells: str = ""  # as the paper prints them, one for each of the table's columns; "-": not in our copy of the paper
    note: str = ""   # why our sizes differ from the printed ones, or what the paper leaves open


class Table(typing.NamedTuple):
    columns: str     # sizes (SIZES) and figures that the authors measured
    rows: list[Row]
    metric: str = ""  # of the figures, where the columns are splits
    dataset: str = "refcoco"


SIZES = ("tuned", "head", "total", "percent", "fpn", "fpn_gmacs", "decoder", "decoder_gmacs")  # see row_sizes
THREE = "val, testA, testB"
NINE = THREE + ", + val, + testA, + testB, g val-u, g test-u, g val-g"  # RefCOCO, RefCOCO+, G-Ref

CUT = "the printed count is cut off, not rounded"
FULL = "150.01M; without the 39,424 of CLIP's positions 149.97M"
COMPACTER = ("the paper does not give its configuration; here n = 4, a quarter of the tower's width, and rank "
             "42, which comes closest")
DCRIS_LORA = ("the paper does not give its ranks; 32 for DINOv2 and 16 for CLIP, on queries and values, give the "
              "printed count")
PERCENT = "the paper divides rounded counts, 2.69 / 149.97 and 3.14 / 149.97"
MIXED = ("the paper does not say which photographs were left out; --dataset mixed leaves out those of the val and test "
         "splits of RefCOCO, RefCOCO+ and G-Ref (umd), but not those of G-Ref (google) val, the column g val-g")
LARGE_MIXED = ("the cell val is missing in our copy; the printed average of eight gives 81.0 (+- 0.4). DETRIS-L*, the "
               "successor's model on the mixed data, has adapters 384 wide in vision blocks 1 to 23 and text blocks "
               "1 to 11, 33,331,360 parameters; this row has those of DCRIS-L")


def places(*layers: int) -> dict:
    return dict(visual_layers=layers, text_layers=layers)


DCRIS = {
    "1": Table(NINE + ", avg", metric="IoU", rows=[
        Row("DCRIS-B", {}, "76.4 77.9 73.7 69.8 74.4 62.6 68.4 68.5 65.9 70.8"),
        Row("DCRIS-L", dict(backbone="dinov2-large"), "77.9 79.0 75.0 71.9 75.9 65.7 70.1 70.9 68.5 72.8"),
        Row("DCRIS-L*", dict(backbone="dinov2-large", dataset="mixed"),
            "- 82.9 77.9 73.3 78.3 65.8 74.1 75.5 - 76.1", LARGE_MIXED)]),
    "2": Table("tuned, " + THREE + ", avg", metric="IoU", rows=[
        Row("Full-Tuning", dict(tune="full"), "149.97M 65.1 68.1 61.4 64.9", FULL),
        Row("Fix Backbone", dict(tune="frozen"), "0.00M 74.9 77.1 72.0 74.7"),
        Row("Adapter", dict(tune="adapter"), "1.98M 71.2 73.3 68.3 70.9"),
        Row("Compacter", dict(tune="compacter"), "1.62M 73.9 75.8 70.8 73.5", COMPACTER),
        Row("LoRA", dict(tune="lora"), "1.57M 73.4 75.7 70.2 73.1", DCRIS_LORA),
        Row("ETRIS", dict(method="etris", backbone="dinov2-base", variant="released", bridger_dim=128),
            "1.38M 74.5 76.5 72.9 74.6", CUT),
        Row("DCRIS-B, 3 layers", places(4, 8, 11), "1.34M 75.8 77.7 72.9 75.5", CUT + "; Table 5 has 1.35M"),
        Row("DCRIS-B", {}, "2.69M 76.4 77.9 73.7 76.0")]),
    "3": Table(THREE, metric="IoU", rows=[
        Row("neither", dict(tune="frozen"), "74.9 77.1 72.0"),
        Row("DA", dict(text_layers=()), "75.4 77.4 72.2"),
        Row("TA", dict(visual_layers=()), "75.9 77.5 72.7"),
        Row("DA, TA", {}, "76.4 77.9 73.7")]),
    "4": Table("tuned, " + THREE, metric="IoU", rows=[
        Row("64, 64", dict(visual_dim=64), "1.91M 76.21 78.04 73.78"),
        Row("128, 64", {}, "2.69M 76.42 77.91 73.65"),
        Row("128, 128", dict(text_dim=128), "3.09M 76.01 78.28 73.52"),
        Row("256, 128", dict(visual_dim=256, text_dim=128), "4.83M 76.40 78.04 73.42")]),
    "5": Table("tuned, percent, " + THREE, metric="IoU", rows=[
        Row("1", places(8), "0.45M 0.30% 75.40 77.19 72.04"),
        Row("2", places(6, 11), "0.90M 0.60% 75.47 77.41 72.54"),
        Row("3", places(4, 8, 11), "1.35M 0.90% 75.78 77.65 72.86"),
        Row("4", places(3, 6, 9, 11), "1.80M 1.20% 75.98 77.85 73.34"),
        Row("5", places(3, 5, 7, 9, 11), "2.25M 1.50% 76.22 77.88 73.48"),
        Row("6", {}, "2.69M 1.79% 76.42 77.91 73.65", PERCENT),
        Row("7", places(1, 3, 5, 7, 9, 10, 11), "3.14M 2.09% 76.19 78.07 73.41", PERCENT),
        Row("8", places(1, 3, 4, 5, 7, 9, 10, 11), "3.59M 2.39% 75.71 77.87 73.34"),
        Row("12", places(*range(12)), "5.39M 3.59% 76.11 78.07 73.49")]),
}

RN50 = "RN50's stages are as wide as RN101's, so its Bridgers have 1.94M too; with --zoom mlp they have 1,682,633"
RN50_HEAD = "RN50's sentence vector F_s is 1024 wide and must be projected; for the Bridgers see Table 1"
VIT_HEAD = "23.98M is RN101's head; the maps of a ViT have other widths"
CONNECT = ("the printed 120.74M includes `connect`, a 1x1 convolution of the public code; Full-Tuning alone has it "
           "here. All of CLIP trains at the head's rate, 1e-4")
FROZEN = "Table 6 (HA, GA) and Table 8 (Fix Backbone) are one configuration, but the paper prints other Pr@X"
ADAPTER = ("the paper does not say where adapters stand; here behind each layer of the text tower, 128 wide (a "
           "quarter), and beside each 3x3 convolution. Without those of layer4 and with BatchNorms there are 2,389,600")
COMPACTER_1 = "the paper does not give its configuration; here rank 1 and n = 4, its authors' default, where Adapter is"
ETRIS_LORA = "Sec. 5.1 has a reduction factor of 4 and no rank; rank 1, on queries and values, gives the printed count"
LESS = "0.727M; 0.72 is 1.94 - 1.22"

PR = "oIoU, Pr@0.5, Pr@0.7, Pr@0.9"
ETRIS = {
    "1": Table("tuned, " + NINE, metric="oIoU", rows=[
        Row("ETRIS, ResNet-50", dict(backbone="RN50"),
            "1.68M 70.39 73.11 66.38 60.47 67.11 50.73 59.71 59.95 57.22", RN50),
        Row("ETRIS, ResNet-101", {}, "1.94M 71.06 74.11 66.66 62.23 68.51 52.79 60.28 60.42 57.86"),
        Row("ETRIS, ViT-B-16", dict(backbone="ViT-B-16"),
            "1.39M 70.51 73.51 66.63 60.10 66.89 50.17 59.82 59.91 57.88")]),
    "2": Table("tuned, head, oIoU", [
        Row("Full-Tuning", dict(tune="full", connect=True), "120.74M 23.98M 70.47", CONNECT),
        Row("Fix Backbone", dict(tune="frozen"), "0.00M 23.98M 67.73"),
        Row("Adapter", dict(tune="adapter"), "2.39M 23.98M 69.46", ADAPTER),
        Row("Conv Adapter", dict(tune="conv-adapter"), "1.20M 23.98M 69.33"),
        Row("Compacter", dict(tune="compacter"), "0.19M 23.98M 69.11", COMPACTER_1),
        Row("CoOp", dict(tune="coop"), "4.10K 23.98M 67.87"),
        Row("LoRA", dict(tune="lora"), "0.03M 23.98M 68.84", ETRIS_LORA),
        Row("ETRIS", {}, "1.94M 23.98M 71.06")]),
    "3": Table("tuned, head, total", [
        Row("ETRIS, ResNet-50", dict(backbone="RN50"), "1.68M 23.98M 25.66M", RN50_HEAD),
        Row("ETRIS, ResNet-101", {}, "1.94M 23.98M 25.92M"),
        Row("ETRIS, ViT-B-16", dict(backbone="ViT-B-16"), "1.39M 23.98M 25.37M", VIT_HEAD)]),
    "4": Table("tuned, oIoU", [
        Row("2 -> n, 1", dict(bridger_stages=(2,)), "0.43M 70.96"),
        Row("n/2 -> n, 1", dict(bridger_stages=(3,)), "0.29M 70.18", CUT),
        Row("n -> n, 1", dict(bridger_stages=(4,)), "1.22M 69.65"),
        Row("2 -> n, 2", dict(bridger_stages=(2, 3)), "0.72M 70.75", LESS),
        Row("n/2 -> n, 2", dict(bridger_stages=(3, 4)), "1.51M 70.53"),
        Row("2 -> n, 3", {}, "1.94M 71.06")]),
    "5": Table("tuned, " + PR, [
        Row("(a) Linear", dict(zoom="linear"), "5.77M 70.94 82.89 72.18 17.89"),
        Row("(b) Conv&Interpolate", dict(zoom="interpolate"), "1.45M 70.08 81.17 68.07 15.95"),
        Row("(c) MLP", dict(zoom="mlp"), "1.68M 70.62 82.36 71.05 17.70"),
        Row("(d) Conv&Deconv", {}, "1.94M 71.06 83.43 72.68 17.40")]),
    "6": Table(PR, [
        Row("GA, Bridger", dict(hierarchical_alignment=False), "58.70 69.53 45.52 4.33"),
        Row("HA, GA", dict(tune="frozen"), "67.73 79.62 68.47 15.41", FROZEN),
        Row("HA, Bridger", dict(global_alignment=False), "62.21 71.51 53.41 11.16"),
        Row("HA, GA, Bridger", {}, "71.06 83.43 72.68 17.40")]),
    "7": Table("tuned, " + PR, [
        Row("8", dict(bridger_dim=8), "0.22M 70.55 82.56 70.52 16.60"),
        Row("16", dict(bridger_dim=16), "0.45M 70.78 82.98 70.96 17.01"),
        Row("32", dict(bridger_dim=32), "0.92M 70.92 83.31 71.19 17.42"),
        Row("64", {}, "1.94M 71.06 83.43 72.68 17.40"),
        Row("128", dict(bridger_dim=128), "4.28M 70.39 82.51 71.12 16.99")]),
    "8": Table("tuned, head, oIoU, Pr@0.5, Pr@0.6, Pr@0.7, Pr@0.8, Pr@0.9", [
        Row("Full-Tuning", dict(tune="full", connect=True),
            "120.74M 23.98M 70.47 82.62 78.35 71.35 54.47 17.69", CONNECT),
        Row("Fix Backbone", dict(tune="frozen"), "0.00M 23.98M 67.73 79.53 74.42 66.10 46.39 12.41", FROZEN),
        Row("Adapter", dict(tune="adapter"), "2.39M 23.98M 69.46 81.05 76.59 69.69 51.27 16.16", ADAPTER),
        Row("Conv Adapter", dict(tune="conv-adapter"), "1.20M 23.98M 69.33 80.79 76.62 69.80 51.69 15.95"),
        Row("ETRIS", {}, "1.94M 23.98M 71.06 83.43 79.23 72.68 55.39 17.40"),
        Row("Adapter+ETRIS", dict(tune="method+adapter"), "4.33M 23.98M 71.67 84.25 80.12 73.50 56.33 18.43", ADAPTER),
        Row("Conv Adapter+ETRIS", dict(tune="method+conv-adapter"),
            "3.14M 23.98M 72.11 84.46 80.27 73.92 57.13 18.74")]),
}

TWICE = "W_shared counted in both encoders"
IDLE = "198,274 parameters that nothing uses"
SIZE = f"the public code has 2,987,520 in them, which become 3.19M with {TWICE}, or with {IDLE}"
COLUMN = f"the public code comes to the printed count with {TWICE} and with {IDLE}"
WHOLE = "151.0M includes DETR's decoder and BERT's pooler, which are not in the model; stem and layer1 stay frozen"
BEHIND = ("no configuration with the printed count was found; here 128 wide (C_d), one behind each feed-forward "
          "network of both encoders")
M2IST_LORA = "the paper does not give its rank; 55, on queries and values of all layers, gives the printed count"
ADAPTFORMER = ("several configurations fit, among them adapters in BERT alone (2,370,048 and a LayerNorm); here 128 "
               "wide (C_d) in both encoders")
CM_ADAPTER = ("no configuration with the printed count was found; here IEA, which shares weights across the encoders, "
              "behind both sublayers")
MRS_ADAPTER = "only its size is known; VEA and LEA beside six layers of each encoder have it"
SWAPPED = "BERT is the wider encoder, so LEA is larger than VEA; only the sum of (b) and (c) is as printed"
INTERACTION = ("in Eq. 2 and 3 a larger C_i has fewer parameters. The printed counts fit another sweep: C_d = 32, 64 "
               f"and 128 at C_i = 256 (--adapter-dim 32, 64) in the public code with {IDLE}")
SUM = "3.19M + 2.37M is 5.56M; 6.46M is 3.19M + 3.27M, the Adapter of Table I"
OURS = {}, "3.19M 15.44 81.35 82.29 77.98", SIZE

MEMORY = "tuned, GB at 64, "  # GPU memory at batch size 64
NINE_G = THREE + ", + val, + testA, + testB, g val-g, g val-u, g test-u"
# TransVG's DETR, trained without the photographs of the val and test splits of RefCOCO and RefCOCO+
UNC = "detr-r50-unc.pth,bert-base-uncased/model.safetensors"
M2IST = {
    "I": Table(MEMORY + NINE_G, metric="Acc@0.5", rows=[
        Row("Fully fine-tuning", dict(tune="full"),
            "151M 38.95 80.32 82.67 75.24 63.50 68.15 55.63 66.56 67.66 67.44", WHOLE),
        Row("Adapter", dict(tune="adapter"),
            "3.27M 28.52 78.02 79.89 75.23 61.35 66.34 54.21 63.18 65.26 66.65", BEHIND),
        Row("LoRA", dict(tune="lora"), "2.37M 20.37 77.57 78.22 73.37 61.24 66.53 53.95 64.27 67.36 66.43", M2IST_LORA),
        Row("AdaptFormer", dict(tune="adaptformer"),
            "2.38M 20.37 76.32 77.16 73.94 60.96 65.19 53.88 61.81 65.44 64.37", ADAPTFORMER),
        Row("CM Adapter", dict(ffn_adapter="iea", insertion="sequential"),
            "3.27M 27.19 77.37 78.81 74.07 61.34 66.10 53.31 63.93 65.75 64.72", CM_ADAPTER),
        Row("MRS-Adapter", dict(mha_adapter="none", insertion="parallel"),
            "1.58M 20.07 77.14 77.80 74.80 61.13 66.38 53.13 63.07 66.46 65.16", MRS_ADAPTER),
        Row("M2IST", {}, "3.19M 15.44 81.35 82.29 77.98 63.15 67.11 55.52 67.50 67.67 67.41", SIZE)]),
    "II": Table("tuned, " + NINE_G, metric="Acc@0.5", rows=[
        Row("C_d = 8", dict(adapter_dim=8), "1.91M 81.55 83.07 77.31 62.73 66.96 55.93 65.47 66.79 66.30", COLUMN),
        Row("C_d = 32", dict(adapter_dim=32), "2.20M 81.03 82.34 77.54 62.48 66.73 55.70 66.22 67.42 67.83", COLUMN),
        Row("C_d = 128", {}, "3.19M 81.35 82.29 77.98 63.15 67.11 55.52 67.50 67.67 67.41", SIZE)]),
    "IV": Table(MEMORY + "val, test", metric="Acc@0.5", dataset="refclef", rows=[
        Row("Adapter", dict(tune="adapter"), "3.27M 28.52 57.28 56.89", BEHIND),
        Row("M2IST", {}, "3.19M 15.44 60.61 59.30", SIZE)]),
    "V": Table(MEMORY + THREE, metric="Acc@0.5", rows=[
        Row("(a) none", dict(tune="frozen"), "0 14.32 72.72 73.33 71.27"),
        Row("(b) LEA", dict(mha_adapter="none", ffn_adapter="lea"), "0.59M 14.90 77.08 77.82 73.38", SWAPPED),
        Row("(c) VEA", dict(mha_adapter="none", ffn_adapter="vea"), "1.02M 14.52 78.30 78.95 73.58", SWAPPED),
        Row("(d) LEA, VEA", dict(mha_adapter="none"), "1.61M 15.09 79.39 79.18 74.41",
            "1.61M with the LayerNorms of the public code"),
        Row("(e) IEA", dict(ffn_adapter="none"), "1.58M 14.84 78.85 79.01 73.87", f"1.58M with {TWICE}"),
        Row("(f) LEA, VEA, IEA", *OURS)]),
    "VI": Table(MEMORY + THREE, metric="Acc@0.5", rows=[
        Row("(a) LEA+VEA, LEA+VEA", dict(mha_adapter="vea+lea"), "3.22M 15.65 79.87 80.52 76.33", "twice Table V (d)"),
        Row("(b) IEA, IEA", dict(ffn_adapter="iea"), "3.17M 14.84 78.72 80.05 76.01", "about twice Table V (e)"),
        Row("(c) LEA+VEA, IEA", dict(mha_adapter="vea+lea", ffn_adapter="iea"), "3.19M 15.38 80.58 81.26 76.65", SIZE),
        Row("(d) IEA, LEA+VEA", *OURS)]),
    "VII": Table(MEMORY + THREE, metric="Acc@0.5", rows=[
        Row("(a) Sequential", dict(insertion="sequential"), "3.19M 27.19 78.76 80.25 74.90", SIZE),
        Row("(b) Parallel", dict(insertion="parallel"), "3.19M 20.37 78.29 78.71 75.30", SIZE),
        Row("(c) Side", *OURS)]),
    "VIII": Table(THREE, metric="Acc@0.5", rows=[
        Row("(a) 1 to 6", dict(text_layers=(0, 1, 2, 3, 4, 5)), "80.65 81.86 77.39"),
        Row("(b) 1, 3, 5, ... 11", dict(text_layers=(0, 2, 4, 6, 8, 10)), "80.83 81.76 77.54"),
        Row("(c) 7 to 12", {}, "81.35 82.29 77.98")]),
    "IX": Table(MEMORY + THREE, metric="Acc@0.5", rows=[
        Row("(a) C_i = 64", dict(interaction_dim=64), "2.00M 15.34 77.31 77.87 73.27", INTERACTION),
        Row("(b) C_i = 128", dict(interaction_dim=128), "2.40M 15.35 79.26 79.58 74.60", INTERACTION),
        Row("(c) C_i = 256", *OURS)]),
    "X": Table(MEMORY + THREE, metric="Acc@0.5", rows=[
        Row("Full", dict(tune="full"), "151M 38.95 80.32 82.67 75.24", WHOLE),
        Row("LoRA", dict(tune="lora"), "2.37M 20.37 77.57 78.22 73.37", M2IST_LORA),
        Row("M2IST", *OURS),
        Row("M2IST+LoRA", dict(tune="method+lora"), "6.46M 21.68 81.83 82.83 77.54", SUM)]),
}

FPN = ("Eq. 6 and 7 have no more. With one more Linear(512, 512) in each stage there would be 3.94M, 5.91M, 7.88M and "
       "(bi-direction) 37.3M. The paper counts with fvcore, which leaves out half of the attention's products")

OVERALL = "oIoU, mIoU"
SHARED_RIS = {  # the ablations are on val; GMACs are what the paper calls GFLOPs
    "I": Table(NINE, metric="oIoU", rows=[
        Row("Shared-RIS", {}, "74.83 76.83 71.83 68.42 72.83 61.63 68.66 69.38 65.65")]),
    "III": Table("Pr@0.5, Pr@0.7, Pr@0.9, " + OVERALL, dataset="refcoco+", rows=[
        Row("neither", dict(stages=(), shared_layers=0), "79.36 64.70 10.16 65.12 66.40"),
        Row("FPN", dict(shared_layers=0), "81.87 70.25 13.59 67.31 69.10"),
        Row("decoder", dict(stages=()), "81.39 69.53 13.42 66.25 68.38"),
        Row("FPN, decoder", {}, "82.77 72.12 16.87 68.42 70.34")]),
    "V": Table("decoder, decoder_gmacs, " + OVERALL, dataset="refcoco+", rows=[
        Row("No Fusion", dict(shared_layers=0), "5M 46 67.31 67.71", "Table III has an mIoU of 69.10 for it"),
        Row("Shared Decoder", {}, "9M 50 68.42 70.34")]),
    "VII": Table("fpn, fpn_gmacs, " + OVERALL, dataset="refcoco+", rows=[
        Row("No FPN", dict(stages=()), "- - 66.25 68.38"),
        Row("(a) {6, 12}", dict(stages=(6, 12)), "4M 5 67.74 69.89", FPN),
        Row("(a) {4, 8, 12}", dict(stages=(4, 8, 12)), "6M - 68.13 70.24", FPN),
        Row("(a) {3, 6, 9, 12}", {}, "8M 9 68.42 70.34", FPN),
        Row("(b) Cross-attention", dict(fpn_fusion="cross"), "8M 6 66.98 69.20",
            FPN + ". No configuration with the printed GMACs was found"),
        Row("(b) Bi-direction", dict(fpn_fusion="bi"), "37M 22 68.19 70.02", FPN),
        Row("(b) Shared self-attention", {}, "8M 9 68.42 70.34", FPN)]),
    "VIII": Table("", dataset="refcoco+", rows=[  # rows as the text describes them; our copy has none of the cells
        Row("(a) 1 layer", {}),
        Row("(a) 2 layers", dict(shared_layers=2)),
        Row("(b) Cross-attention", dict(decoder_fusion="cross")),
        Row("(b) Bi-direction", dict(decoder_fusion="bi")),
        Row("(b) Shared self-attention", {})]),
    "IX": Table(NINE, metric="mIoU", rows=[
        Row("ViT-B", {}, "75.50 76.66 73.03 70.34 73.75 65.07 68.50 69.17 66.65"),
        Row("ViT-L", dict(backbone="beit3-large"), "78.09 79.30 76.33 73.70 76.65 68.88 71.88 72.16 71.14"),
        Row("ViT-L, combined", dict(backbone="beit3-large", dataset="mixed"),
            "82.73 83.44 81.6 78.13 80.07 74.12 75.34 77.34 76.58", MIXED)]),
}

TABLES = dict(dcris=DCRIS, etris=ETRIS, m2ist=M2IST, shared_ris=SHARED_RIS)


def printed_cells(table: Table, row: Row) -> tuple[dict[str, str], dict[str, str]]:
    """(sizes, figures) by column, as the paper prints them; "-" for a figure that our copy does not have"""
    columns = table.columns.split(", ") if table.columns else []
    cells = dict(zip(columns, row.cells.split(), strict=True))
    return ({k: v for k, v in cells.items() if k in SIZES and v != "-"},
            {k: v for k, v in cells.items() if k not in SIZES})


def row_config(method, row: Row, table: Table) -> tuple:
    """(its Config, its data set)"""
    names = dict(backbone=next(iter(method.BACKBONES)), variant=method.VARIANTS[0], dataset=table.dataset)
    flags = names | {k: v for k, v in row.flags.items() if k != "method"}
    return method.config(**flags), flags["dataset"]


def train_command(method: str, row: Row, table: Table) -> str:
    """What trains a row."""
    flags = dict(method=method, dataset=table.dataset, data_root="DATA") | row.flags
    if method == "m2ist" and table.dataset == "refcoco":
        flags |= dict(weights=UNC)
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
def row_sizes(name: str, c, gmacs: bool = False) -> dict[str, float]:
    """Sizes of a configuration, counted on the meta device: `tuned`, what is trained outside the head, and its
    `percent` of the towers; the `head`, as it is; their `total`; each module under its own name, such as `decoder`;
    with `gmacs`, their multiply-adds (`decoder_gmacs`)."""
    with torch.device("meta"):
        model = common.load_method(name).Model(c, "random")
    parts = parameters(model)
    head, towers = count(model.parts()["head"]), sum(p.numel() for p in parts["backbone"])
    tuned = count(model, trainable=True) - sum(p.numel() for p in parts["head"] if p.requires_grad)
    found = {module: count(m) for module, m in model.named_children()}
    found |= dict(tuned=tuned, head=head, total=tuned + head, percent=100 * tuned / towers)
    return found | {f"{part}_gmacs": n / 2 for part, n in (forward_gflops(model) if gmacs else {}).items()}


def printed(method, c) -> dict:
    """What the paper's tables print of a configuration: its sizes, memory, these tables, and notes; {} for none."""
    found, tables, notes = {}, [], []
    for number, table in TABLES[method.__name__].items():
        for row in table.rows:
            sizes, figures = printed_cells(table, row)
            own = row.flags.get("method", method.__name__) == method.__name__
            if sizes and own and row_config(method, row, table)[0] == c:
                found = sizes | {k: float(v) for k, v in figures.items() if k.startswith("GB")} | found
                tables.append(number)
                notes.append(row.note)
    if not found:
        return {}
    return dict(tables=list(dict.fromkeys(tables)), **found, notes=list(dict.fromkeys(filter(None, notes))))


def table_rows(paper: str, number: str) -> list[dict]:
    """The rows of a table."""
    out, table = [], TABLES[paper][number]
    for row in table.rows:
        name = row.flags.get("method", paper)
        sizes, figures = printed_cells(table, row)
        c = row_config(common.load_method(name), row, table)[0]
        counted = any(k.endswith("gmacs") for k in sizes)
        ours = row_sizes(name, c, True) if counted else row_sizes(name, c)  # the latter is often in the cache
        out.append(dict(
            method=paper, table=number, row=row.name, command=train_command(name, row, table),
            ours={k: round(ours[k], 2) for k in sizes or ("tuned", "head")}, printed=sizes,
            match=all(agrees(ours[k], p) for k, p in sizes.items()) if sizes else None, note=row.note,
            metric=table.metric, quoted={k: None if v == "-" else float(v) for k, v in figures.items()}))
    return out


def print_rows(rows: list[dict], table: Table) -> None:
    """A table, for people: the sizes, the figures that the paper quotes, the command; notes below."""
    print(f"{rows[0]['method']}, Table {rows[0]['table']}" + f" ({table.metric})" * bool(table.metric))
    shown = []
    for row, printed_row in zip(rows, table.rows):
        ours = ", ".join(f"{k} {n:,}" for k, n in row["ours"].items())
        theirs = ", ".join(row["printed"].values()) or "-"
        same = "" if not row["printed"] else "=" if row["match"] else "differs"
        shown.append({"row": row["row"], "ours": ours, "printed": theirs, "": same + "*" * bool(row["note"])}
                     | printed_cells(table, printed_row)[1] | {"command": row["command"]})
    print_table(shown, left=("row", "command"))
    for note in dict.fromkeys(row["note"] for row in rows if row["note"]):
        print("  * " + "; ".join(row["row"] for row in rows if row["note"] == note) + ": " + note)
    print()


def main(argv: list[str] | None = None) -> None:
    p = Parser(__doc__)
    p.add_argument("--method", **one_of(*METHODS), help="default: all four")
    p.add_argument("--json", metavar="FILE", help="- for standard output, and then nothing else goes there")
    args = p.parse_args(argv)
    found = []
    for paper in [args.method] if args.method else METHODS:
        for number, table in TABLES[paper].items():
            found.append(table_rows(paper, number))
            if args.json != "-":
                print_rows(found[-1], table)
    if args.json != "-":
        print("Our sizes are exact for the command; a * has a note. The figures are the papers', measured by their "
              "authors. Columns with + or g are of --dataset refcoco+ and refcocog_umd or refcocog_google; on G-Ref "
              "M2IST takes detr-r50-gref.pth. For DATA see docs/data.md, for the weights README.md.")
    write_result(args.json, sum(found, []))


if __name__ == "__main__":
    run_command(main)

"""The diagrams of the pages that build.py writes. All of them have one visual language, which LEGEND explains.

A diagram is a list of boxes on a plane (x, y and width in pixels) and of arrows between their sides. Kinds of a box:
"frozen" and "trained" say what happens to its weights, "pass" that gradients flow through frozen weights, "data" and
"op" have no weights. A box with `meet` is where text meets picture. An arrow with `grad` carries gradients back.
"""

from __future__ import annotations

from html import escape

LEGEND = (("frozen", "frozen, no gradients"), ("pass", "frozen, gradients flow through"), ("trained", "trained"),
          ("data", "data"), ("line grad", "arrow along which gradients flow back"), ("line", "forward only"),
          ("dot", "text meets picture"))


class Diagram:
    def __init__(self, width: int, height: int, title: str):
        self.size, self.title, self.name = (width, height), title, title.partition(":")[0].lower()
        self.boxes: dict[str, tuple[float, float, float, float]] = {}
        self.back, self.front = [], []  # arrows lie below boxes

    def box(self, name: str, x: float, y: float, w: float, kind: str, *lines: str, h: float = 36, meet: bool = False):
        """The first line is the name, the next ones are small."""
        self.boxes[name] = x, y, w, h
        out = [f'<rect class="{kind}" x="{x}" y="{y}" width="{w}" height="{h}" rx="6"/>']
        top = y + h / 2 + 4.5 - 6.5 * (len(lines) - 1)
        for i, line in enumerate(lines):
            size = ' class="small"' if i else ""
            out.append(f'<text{size} x="{x + w / 2}" y="{top + 13 * i:g}">{escape(line)}</text>')
        if meet:
            out.append(f'<circle class="dot" cx="{x + w - 4}" cy="{y + 4}" r="6"/>')
        self.front += out

    def group(self, x: float, y: float, w: float, h: float, left: str, right: str):
        """A dashed frame around boxes, with its label on both sides of the arrow that enters it."""
        self.back.append(f'<rect class="group" x="{x}" y="{y}" width="{w}" height="{h}" rx="9"/>')
        self.front.append(f'<text class="small start" x="{x + 8}" y="{y + 14}">{escape(left)}</text>'
                          f'<text class="small end" x="{x + w - 8}" y="{y + 14}">{escape(right)}</text>')

    def plus(self, name: str, x: float, y: float):
        self.boxes[name] = x - 8, y - 8, 16, 16
        self.front.append(f'<circle class="plus" cx="{x}" cy="{y}" r="8"/>'
                          f'<path class="sign" d="M{x - 4} {y}h8M{x} {y - 4}v8"/>')

    def port(self, name: str) -> tuple[float, float, bool]:
        """"box.b" is the middle of a box's lower side, "box.b30" a point at 30 % of it. -> x, y, whether it is
        vertical."""
        name, _, side = name.partition(".")
        (x, y, w, h), part = self.boxes[name], float(side[1:] or 50) / 100
        return {"t": (x + w * part, y, True), "b": (x + w * part, y + h, True),
                "l": (x, y + h * part, False), "r": (x + w, y + h * part, False)}[side[0]]

    def arrow(self, start: str, end: str, label: str = "", *, grad: bool = False, via: float | None = None,
              at: tuple[float, float] | None = None):
        """A straight or rectangular arrow. `via`: x (y, between upper and lower sides) of its middle part; `at`: place
        of the label."""
        (x1, y1, vertical), (x2, y2, to_vertical) = self.port(start), self.port(end)
        if vertical and to_vertical:
            middle = (y1 + y2) / 2 if via is None else via
            points = [(x1, y1), (x1, middle), (x2, middle), (x2, y2)] if x1 != x2 else [(x1, y1), (x2, y2)]
        elif not vertical and not to_vertical:
            middle = (x1 + x2) / 2 if via is None else via
            points = [(x1, y1), (middle, y1), (middle, y2), (x2, y2)] if y1 != y2 else [(x1, y1), (x2, y2)]
        else:
            points = [(x1, y1), (x1, y2) if vertical else (x2, y1), (x2, y2)]
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
        kind = "grad" if grad else "plain"
        self.back.append(f'<path class="line {kind}" marker-end="url(#{self.name}-{kind})" d="{path}"/>')
        if label:
            x, y = at or ((x1 + x2) / 2 + 5, (y1 + y2) / 2 + 3.5)
            self.front.append(f'<text class="shape start" x="{x:g}" y="{y:g}">{escape(label)}</text>')

    def svg(self) -> str:
        w, h = self.size
        heads = "".join(f'<marker id="{self.name}-{kind}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
                        f'orient="auto"><path class="head {kind}" d="M0 0.5L8 4L0 7.5z"/></marker>'
                        for kind in ("grad", "plain"))
        return (f'<svg class="diagram" viewBox="0 0 {w} {h}" role="img" aria-label="{escape(self.title)}">'
                f"<defs>{heads}</defs>" + "".join(self.back + self.front) + "</svg>")


def head(d: Diagram, y: float, neck: tuple[str, ...], decoder: str, projector: str, mask: str, side: int) -> None:
    """Neck, decoder and projector of ETRIS and DCRIS; the box "words" gives the text."""
    d.box("neck", 20, y, 420, "trained", *neck, meet=True)
    d.box("decoder", 20, y + 66, 420, "trained", "Decoder", decoder, meet=True)
    d.box("proj", 20, y + 132, 420, "trained", "Projector", projector, meet=True)
    d.box("mask", 130, y + 198, 200, "data", "logits", mask)
    d.arrow("neck.b", "decoder.t", f"(B, 512, {side}, {side})", grad=True)
    d.arrow("decoder.b", "proj.t", f"(B, 512, {side}, {side})", grad=True)
    d.arrow("proj.b", "mask.t", grad=True)
    d.arrow("words.r30", "decoder.r", grad=True, via=450)
    d.arrow("words.r70", "proj.r", grad=True, via=456)


def etris() -> Diagram:
    d = Diagram(462, 660, "ETRIS: three stages of CLIP's frozen towers with a Bridger between them, then the decoder")
    d.box("image", 20, 4, 150, "data", "photograph", "(B, 3, 416, 416)")
    d.box("sentence", 290, 4, 150, "data", "sentence", "(B, 17)")
    d.box("stem", 20, 62, 150, "frozen", "stem, layer1")
    d.box("embed", 290, 62, 150, "frozen", "token embedding")
    d.arrow("image.b", "stem.t")
    d.arrow("sentence.b", "embed.t")
    shapes = ("512, 52, 52", "1024, 26, 26", "2048, 13, 13")
    for i, shape in zip((2, 3, 4), shapes):
        y = 62 + 70 * (i - 1)
        kind = "frozen" if i == 2 else "frozen pass"
        d.box(f"v{i}", 20, y, 150, kind, f"layer{i}", f"(B, {shape})")
        d.box(f"t{i}", 290, y, 150, kind, f"blocks {4 * i - 7} to {4 * i - 4}", "(B, 17, 512)")
        d.box(f"b{i}", 193, y, 74, "trained", "Bridger", f"i = {i}", meet=True)
        for tower, side, back in (("v", "r", "l"), ("t", "l", "r")):
            d.arrow(f"{tower}{i}.{side}30", f"b{i}.{back}30", grad=i > 2)
            d.arrow(f"b{i}.{back}75", f"{tower}{i}.{side}75", grad=True)
        before = ("stem", "embed") if i == 2 else (f"v{i - 1}", f"t{i - 1}")
        d.arrow(f"{before[0]}.b", f"v{i}.t", grad=i > 2)
        d.arrow(f"{before[1]}.b", f"t{i}.t", grad=i > 2)
        if i > 2:
            d.arrow(f"b{i - 1}.b", f"b{i}.t", "64 wide" if i == 3 else "", grad=True)
    d.box("pool", 20, 342, 150, "frozen pass", "attention pool", "(B, 512, 13, 13)")
    d.box("words", 290, 342, 150, "frozen pass", "ln_final, projection", "words, sentence")
    d.arrow("v4.b", "pool.t", grad=True)
    d.arrow("t4.b", "words.t", grad=True)
    head(d, 412, ("Neck (Hierarchical Alignment)", "3 maps, each times its attention to the sentence"),
         "3 layers: attention to all places, then to the words", "the sentence becomes a 3x3 kernel",
         "(B, 1, 104, 104)", 26)
    d.arrow("v2.l", "neck.l70", grad=True, via=6)
    d.arrow("v3.l", "neck.l30", grad=True, via=12)
    d.arrow("pool.b", "neck.t18", grad=True)
    d.arrow("words.b", "neck.t82", "F_s", grad=True)
    return d


def dcris() -> Diagram:
    d = Diagram(462, 622, "DCRIS: adapters beside the MLPs of frozen DINOv2 and of CLIP's text tower, then the decoder")
    d.box("image", 20, 4, 190, "data", "photograph", "(B, 3, 448, 448)")
    d.box("sentence", 270, 4, 170, "data", "sentence", "(B, 17)")
    d.box("patches", 20, 62, 190, "frozen", "patches, CLS, registers")
    d.box("embed", 270, 62, 170, "frozen", "token embedding")
    d.arrow("image.b", "patches.t")
    d.arrow("sentence.b", "embed.t")
    for tower, x, w, label, tokens in (("v", 20, 190, "DA in 6", "(B, 1029, 768)"),
                                       ("t", 270, 170, "TA in 6", "(B, 17, 512)")):
        d.group(x, 118, w, 178, "12 blocks", label)
        d.box(f"{tower}a", x + 14, 142, w - 28, "frozen pass", "attention")
        half = (w - 38) / 2
        d.box(f"{tower}m", x + 14, 206, half, "frozen pass", "MLP")
        d.box(f"{tower}d", x + 24 + half, 206, half, "trained", "DA" if tower == "v" else "TA",
              "Eq. 1, 2" if tower == "v" else "Eq. 3", meet=tower == "v")
        d.plus(f"{tower}s", x + w / 2, 272)
        d.arrow(f"{'patches' if tower == 'v' else 'embed'}.b", f"{tower}a.t", tokens, at=(x + w / 2 + 6, 112))
        left, right = 50 * half / (w - 28), 100 - 50 * half / (w - 28)
        d.arrow(f"{tower}a.b{left:g}", f"{tower}m.t", grad=True)
        d.arrow(f"{tower}a.b{right:g}", f"{tower}d.t", grad=True)
        d.arrow(f"{tower}m.b", f"{tower}s.l", grad=True)
        d.arrow(f"{tower}d.b", f"{tower}s.r", "x 0.2", grad=True, at=(x + w - 38, 268))
    d.box("maps", 20, 316, 190, "data", "maps after blocks 5, 9, 12", "3 of (B, 768, 32, 32)")
    d.box("words", 270, 316, 170, "frozen pass", "ln_final, projection", "words, sentence")
    d.arrow("vs.b", "maps.t", grad=True)
    d.arrow("ts.b", "words.t", grad=True)
    d.arrow("words.l", "vd.r", "f_t", grad=True, via=240, at=(244, 300))
    head(d, 378, ("Neck", "3 maps, each times its attention to the words"),
         "3 layers: attention to all places, then to the words", "the sentence becomes a 3x3 kernel",
         "(B, 1, 128, 128)", 32)
    d.arrow("maps.b", "neck.t22.6", grad=True)
    d.arrow("words.b", "neck.t79.8", "f_t", grad=True)
    return d


def m2ist() -> Diagram:
    d = Diagram(462, 592, "M2IST: two frozen encoders without gradients, side networks of adapters between them")
    d.box("image", 6, 4, 122, "data", "photograph", "(B, 4, 640, 640)")
    d.box("sentence", 334, 4, 122, "data", "sentence", "(B, 20)")
    d.box("resnet", 6, 62, 122, "frozen", "ResNet-50, 1x1", "(B, 400, 256)")
    d.box("embed", 334, 62, 122, "frozen", "embeddings", "(B, 20, 768)")
    d.arrow("image.b", "resnet.t")
    d.arrow("sentence.b", "embed.t")
    d.group(0, 118, 134, 170, "DETR", "6 layers")
    d.group(328, 118, 134, 170, "BERT", "7 to 12")
    for x, side in (6, "v"), (334, "t"):
        d.box(f"{side}a", x, 146, 122, "frozen", "attention", "gives a_i")
        d.box(f"{side}f", x, 222, 122, "frozen", "FFN", "gives m_i")
        d.arrow(f"{'resnet' if side == 'v' else 'embed'}.b", f"{side}a.t")
        d.arrow(f"{side}a.b", f"{side}f.t")
    d.box("iea", 181, 146, 100, "trained", "IEA", "Eq. 2 to 5", meet=True)
    d.box("vea", 150, 222, 62, "trained", "VEA", "Eq. 1")
    d.box("lea", 250, 222, 62, "trained", "LEA", "Eq. 1")
    d.arrow("va.r", "iea.l")
    d.arrow("ta.l", "iea.r")
    d.arrow("vf.r", "vea.l")
    d.arrow("tf.l", "lea.r")
    d.plus("vs", 181, 304)
    d.plus("ts", 281, 304)
    d.arrow("vea.b", "vs.t", grad=True)
    d.arrow("lea.b", "ts.t", grad=True)
    d.arrow("iea.b42", "vs.r", grad=True)
    d.arrow("iea.b58", "ts.l", grad=True)
    d.arrow("resnet.r", "vs.l", "z", via=143, at=(149, 88))
    d.arrow("embed.l", "ts.r", "z", via=319, at=(306, 88))
    d.box("vo", 40, 340, 180, "op", "f = e + LN(sum)", "(B, 400, 256)")
    d.box("to", 242, 340, 180, "op", "f = e + LN(sum)", "(B, 20, 768)")
    d.arrow("vs.b", "vo.t78.33", grad=True)
    d.arrow("ts.b", "to.t21.67", grad=True)
    d.arrow("vf.b", "vo.t15", "e", at=(71, 304))
    d.arrow("tf.b", "to.t84.9", "e", at=(382, 304))
    d.box("vl", 40, 410, 382, "trained", "V-L encoder, 6 layers", "[REG], words and places: (B, 421, 256)", meet=True)
    d.arrow("vo.b", "vl.t23.56", grad=True)
    d.arrow("to.b", "vl.t76.44", grad=True)
    d.box("head", 40, 476, 382, "trained", "box head", "MLP over [REG], then a sigmoid")
    d.arrow("vl.b", "head.t", "(B, 256)", grad=True)
    d.box("box", 131, 542, 200, "data", "box", "(B, 4)")
    d.arrow("head.b", "box.t", grad=True)
    return d


def shared_ris() -> Diagram:
    d = Diagram(462, 672, "Shared-RIS: one encoder reads image and sentence; its layers feed a shared FPN and decoder")
    d.box("image", 20, 4, 120, "data", "photograph", "(B, 3, 480, 480)")
    d.box("sentence", 150, 4, 100, "data", "sentence", "(B, n_t)")
    d.box("embed", 20, 66, 230, "trained", "embeddings, side by side", "Eq. 1 to 3")
    d.arrow("image.b", "embed.t26", grad=False)
    d.arrow("sentence.b", "embed.t78.3")
    before = "embed"
    for i in range(4):
        y = 132 + 64 * i
        d.box(f"e{i}", 20, y, 230, "trained", f"layers {3 * i + 1} to {3 * i + 3}", "Eq. 4, 5", meet=True)
        d.box(f"f{i}", 300, y, 126, "trained", "linear, attention", "Eq. 6", meet=True)
        d.arrow(f"{before}.b", f"e{i}.t", "(B, 901 + n_t, 768)" if i == 0 else "", grad=True)
        d.arrow(f"e{i}.r", f"f{i}.l", grad=True)
        before = f"e{i}"
    d.box("wf", 20, 404, 406, "trained", "concatenate, linear", "Eq. 7")
    for i in range(4):
        d.arrow(f"f{i}.r", "wf.r", grad=True, via=440 + 5 * i)
    d.box("layer", 20, 470, 406, "trained", "shared layer", "attention over both, one MLP: Eq. 8, 9", meet=True)
    d.arrow("wf.b", "layer.t", "(B, 901 + n_t, 512)", grad=True)
    d.box("up", 20, 542, 230, "trained", "twice: 2x, 3x3 convolution", "Eq. 10: (B, 512, 120, 120)")
    d.box("mlp", 290, 542, 136, "trained", "MLP", "first token: (B, 512)")
    d.arrow("layer.b28.3", "up.t", "places", grad=True)
    d.arrow("layer.b83.2", "mlp.t", "words", grad=True)
    d.box("mask", 20, 616, 406, "op", "dot product at each place: Eq. 11", "logits (B, 1, 120, 120)", meet=True)
    d.arrow("up.b", "mask.t28.3", grad=True)
    d.arrow("mlp.b", "mask.t83.2", grad=True)
    return d


# Side by side: towers as two columns, adapters between them


def small(title: str, frozen: str = "frozen pass", towers: tuple[str, str] = ("image", "text")) -> Diagram:
    d = Diagram(200, 236, title)
    d.box("v", 6, 6, 50, frozen, towers[0], h=160)
    d.box("t", 144, 6, 50, frozen, towers[1], h=160)
    return d


def small_head(d: Diagram, name: str, starts: tuple[str, str] = ("v.b", "t.b")) -> Diagram:
    d.box("head", 6, 192, 188, "trained", name, meet=True)
    for start in starts:
        x = d.port(start)[0]
        d.arrow(start, f"head.t{100 * (x - 6) / 188:g}", grad=True)
    return d


def small_etris() -> Diagram:
    d = small("ETRIS: Bridgers between the towers, both ways")
    for i in range(3):
        d.box(f"b{i}", 76, 36 + 44 * i, 48, "trained", "B", h=28, meet=True)
        part = 100 * (44 + 44 * i - 6) / 160
        for tower, side, back in (("v", "r", "l"), ("t", "l", "r")):
            d.arrow(f"{tower}.{side}{part:g}", f"b{i}.{back}28.6", grad=i > 0)
            d.arrow(f"b{i}.{back}78.6", f"{tower}.{side}{part + 8.75:g}", grad=True)
    return small_head(d, "neck, decoder, proj.")


def small_dcris(dense: bool = False) -> Diagram:
    name = "DETRIS" if dense else "DCRIS"
    d = small(f"{name}: adapters beside MLPs; the encoded words go to the image tower")
    for i in range(3):
        y = 24 + 44 * i
        d.box(f"d{i}", 66, y, 30, "trained", "DA", h=24, meet=True)
        d.box(f"a{i}", 106, y, 30, "trained", "TA", h=24)
        part = 100 * (y + 6) / 160
        for box, tower, side, back in ((f"d{i}", "v", "r", "l"), (f"a{i}", "t", "l", "r")):
            d.arrow(f"{tower}.{side}{part - 4:g}", f"{box}.{back}25", grad=i > 0 or box[0] == "d")
            d.arrow(f"{box}.{back}75", f"{tower}.{side}{part + 4:g}", grad=True)
    d.boxes["words"] = 169, 176, 25, 0
    for i in range(3):
        d.arrow("words.l", f"d{i}.r", grad=True, via=101)
    if dense:
        d.front.append('<text class="small" x="100" y="16">TA: dense</text>')
    return small_head(d, "neck, decoder, proj.")


def small_m2ist() -> Diagram:
    d = small("M2IST: side networks read both frozen encoders; no gradients in these", "frozen", ("DETR", "BERT"))
    for i in range(3):
        y = 20 + 44 * i
        d.box(f"m{i}", 72, y, 56, "trained", "M3ISA", h=28, meet=True)
        part = 100 * (y + 8) / 160
        d.arrow(f"v.r{part:g}", f"m{i}.l")
        d.arrow(f"t.l{part:g}", f"m{i}.r")
        if i:
            for x in 30, 70:
                d.arrow(f"m{i - 1}.b{x}", f"m{i}.t{x}", grad=True)
    d = small_head(d, "V-L encoder, box", ("m2.b30", "m2.b70"))
    for tower, x in ("v", 31), ("t", 169):
        d.arrow(f"{tower}.b", f"head.t{100 * (x - 6) / 188:g}")
    return d


def small_shared_ris() -> Diagram:
    d = Diagram(200, 236, "Shared-RIS: one trained encoder for image and text")
    d.box("e", 6, 6, 118, "trained", "image + text", "one encoder", h=160, meet=True)
    for i in range(4):
        d.box(f"f{i}", 144, 12 + 38 * i, 42, "trained", "FPN", h=26, meet=True)
        d.arrow(f"e.r{100 * (19 + 38 * i) / 160:g}", f"f{i}.l", grad=True)
    d.box("head", 6, 192, 188, "trained", "shared mask decoder", meet=True)
    for i in range(4):
        d.arrow(f"f{i}.b", "head.t84.6", grad=True) if i == 3 else d.arrow(f"f{i}.b", f"f{i + 1}.t", grad=True)
    return d


PAGES = dict(etris=etris, dcris=dcris, m2ist=m2ist, shared_ris=shared_ris)
SMALL = dict(ETRIS=small_etris, DCRIS=small_dcris, DETRIS=lambda: small_dcris(True), M2IST=small_m2ist,
             **{"Shared-RIS": small_shared_ris})

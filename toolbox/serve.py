"""`python evaluate.py --ckpt RUN --serve`: a page on this machine to try a model."""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from pathlib import Path

import data
from common import Process, UserError
from evaluate import ask, load_run
from toolbox.draw import draw_answers

def serve(args: argparse.Namespace, process: Process) -> None:
    """A page on this machine: drop a photograph, write sentences, move the threshold, take overlay and masks."""
    with tempfile.TemporaryDirectory(prefix="serve-") as folder:
        os.environ |= dict(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=folder)  # nothing leaves, nothing stays
        try:
            import gradio
        except ImportError:
            raise UserError('--serve needs gradio: pip install "gradio>=6".') from None
        model, info = load_run(args.ckpt, args.weights, process, args.dataset)
        title = f"{info['method']} ({info['config']['backbone']})"
        page = serve_page(gradio, model, title, folder)
        try:
            page.launch(server_name="127.0.0.1", server_port=args.port, share=False, max_file_size="20mb", quiet=True,
                        theme=gradio.themes.Default(font="system-ui", font_mono="monospace"), prevent_thread_lock=True)
        except OSError:
            raise UserError(f"--port {args.port or '7860 to 7959'} is in use; give another.") from None
        process.print(f"{title}: {page.local_url} (Ctrl-C ends it)")
        page.block_thread()


def serve_page(gradio, model, title: str, folder: str):
    """The page, a gradio.Blocks; what it draws goes to a folder."""
    def answer(photograph: str | None, text: str, threshold: float):
        """-> the overlay, what was found, and their files"""
        try:
            sentences = [data.check_sentence(line) for line in text.splitlines() if line.strip()]
            if photograph is None or not sentences:
                raise UserError("a photograph and a sentence are needed.")
            image, here = data.read_image(photograph), Path(tempfile.mkdtemp(dir=folder))
            answers = [ask(model, image, s, threshold if model.task == "mask" else None) for s in sentences]
            said = draw_answers(image, answers, sentences, here / "overlay.png", here / "mask.png")
        except UserError as e:
            said = str(e).replace(str(photograph), Path(photograph or "").name)
            raise gradio.Error(said, print_exception=False) from None
        said = [re.sub(", mask: .*", "", line) for line in said]
        return str(here / "overlay.png"), "\n".join(said), sorted(map(str, here.iterdir()))

    with gradio.Blocks(title=title, delete_cache=(3600, 3600)) as page:
        gradio.Markdown(f"# {title}")
        with gradio.Row():
            with gradio.Column():
                given = [gradio.Image(type="filepath", label="photograph", sources=["upload", "clipboard"]),
                         gradio.Textbox(lines=3, label="sentences, one in a line"),
                         gradio.Slider(0.05, 0.95, getattr(model.c, "threshold", 0.5), step=0.01, label="threshold",
                                       visible=model.task == "mask")]
                button = gradio.Button("Mark", variant="primary")
            with gradio.Column():
                shown = [gradio.Image(label="answer", format="png"), gradio.Textbox(label="found", lines=2),
                         gradio.File(label="to take", file_count="multiple")]
        for event in button.click, given[2].release, given[1].submit:
            event(answer, given, shown, concurrency_id="model", concurrency_limit=1, api_name=False)
    return page

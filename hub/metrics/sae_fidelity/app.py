"""A page over the metric beside it: each input as JSON, the result as JSON. On the Hub it is open to all hosts."""

import json
import os
from pathlib import Path

import evaluate
import gradio as gr
from gradio.themes import Base, Default

from safesail.errors import InputError

METRIC = Path(__file__).with_name("sae_fidelity.py")
EXAMPLE = {
    "predictions": "[[1, 0], [2, 2], [4, 0], [0, 4]]",
    "references": "[[0, 0], [2, 4], [4, 0], [2, 4]]",
    "n_active": "[1, 3, 2, 4]",
    "documents": '["a", "a", "b", "b"]',
}


def build() -> gr.Interface:
    """The page; nothing is started. An empty box is an input that is not given."""
    metric = evaluate.load(str(METRIC), keep_in_memory=True)

    def compute(*texts: str) -> dict | None:
        given = dict(zip(EXAMPLE, texts, strict=True))
        try:
            return metric.compute(**{name: json.loads(text) for name, text in given.items() if text.strip()})
        except (InputError, json.JSONDecodeError, RecursionError) as error:
            raise gr.Error(f"{error}") from None

    boxes = [gr.Textbox(text, label=name, lines=2, max_length=200_000) for name, text in EXAMPLE.items()]
    return gr.Interface(
        compute,
        boxes,
        gr.JSON(label="Result"),
        title="SAE fidelity",
        description=metric.description,
        api_name="compute",
        flagging_mode="never",
        analytics_enabled=False,
    )


def theme() -> Base:
    """With the fonts of the visitor's system, so that the page asks no other host."""
    return Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


if __name__ == "__main__":
    build().launch(server_name="0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1", theme=theme())

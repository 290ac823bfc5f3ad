"""The playground's page: what the model at hand can do, each in a tab with its controls.

Which tabs there are is found out by asking the model: one that raises ValueError cannot, and the
tab is left out. What cannot be done with an input is a message in the page (see `engine.studio`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from engine.studio import FORMATS, NO_TRUNCATION, SEEDS, Made, Studio, prune

WAITING = 16  # requests that may wait for the model; it serves one at a time

# Nothing from elsewhere: gradio's own themes fetch their fonts from Google.
THEME = gr.themes.Base(
    primary_hue="blue",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")
CSS = """
.gradio-container { width: 100%; max-width: 1080px !important; margin: 0 auto !important; }
.picture img { image-rendering: pixelated; width: 100%; object-fit: contain; }
"""


@dataclass(frozen=True)
class Tab:
    """What a tab does: a function of its inputs, the events that call it, what it fills."""

    function: Callable[..., Made]
    starts: list[Any]
    inputs: list[Any]
    outputs: list[Any]


def shown(function: Callable[..., Made], temporary: Path) -> Callable[..., tuple]:
    """The function as gradio calls it: gives a picture and a download button for each file, then
    the text; what was refused is a message."""

    def act(*inputs: Any) -> tuple:
        try:
            made = function(*inputs)
        except (ValueError, OSError) as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error
        except torch.OutOfMemoryError as error:
            reason = "the device is out of memory; ask for fewer images"
            raise gr.Error(reason, duration=None, print_exception=False) from error
        prune(temporary)
        downloads = (gr.DownloadButton(value=str(p), interactive=True) for p in made.files)
        return (*(str(p) for p in made.files), *downloads, made.text)

    return act


def results(*kinds: str) -> list[Any]:
    """The components that `shown` fills, for files of these kinds."""
    files = [
        gr.Image(
            show_label=False,
            type="filepath",
            interactive=False,
            buttons=["fullscreen"],
            elem_classes="picture",
            height="auto",
        )
        for _ in kinds
    ]
    with gr.Row():
        downloads = [gr.DownloadButton(f"Download {k}", interactive=False) for k in kinds]
    return [*files, *downloads, gr.Markdown()]


def seed_input(label: str, value: int = 0) -> gr.Number:
    """A field for a seed. It has no bounds of gradio's, which prints a traceback for a number
    beyond them: the studio refuses it."""
    return gr.Number(value, label=label, precision=0, info=f"From 0 to {SEEDS - 1:,}")


def samples_tab(page: gr.Blocks, studio: Studio) -> Tab:
    """A seed's images; the page comes with some."""
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            seed = seed_input("Seed")
            start = min(16, studio.limit)
            count = gr.Slider(1, studio.limit, start, step=1, label="Number of images")
            bound = gr.Slider(
                0.1,
                NO_TRUNCATION,
                NO_TRUNCATION,
                step=0.1,
                label="Truncation",
                info=f"Latents beyond it are drawn again: less varied, often better images "
                f"(Brock et al. 2019, section 3.1). At {NO_TRUNCATION:g} none are.",
            )
            button = gr.Button("Generate", variant="primary")
        with gr.Column(scale=2, min_width=300):
            outputs = results("PNG")
    starts = [page.load, button.click, seed.submit]
    return Tab(studio.samples, starts, [seed, count, bound], outputs)


def walk_tab(page: gr.Blocks, studio: Studio) -> Tab:
    """From one seed to another."""
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            ends = [seed_input("From seed"), seed_input("To seed", 1)]
            frames = gr.Slider(
                2,
                studio.limit,
                min(24, studio.limit),
                step=1,
                label="Pictures on the way",
                info="Along the great arc between the seeds' first images (White 2016, section "
                "2.1), and back.",
            )
            button = gr.Button("Walk", variant="primary")
        with gr.Column(scale=2, min_width=300):
            outputs = results("GIF", "strip")
    starts = [button.click, *(end.submit for end in ends)]
    return Tab(studio.walk, starts, [*ends, frames], outputs)


def reconstruct_tab(page: gr.Blocks, studio: Studio) -> Tab:
    """What the model makes of an image of one's own."""
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            most = f"at most {studio.upload_bytes / 2**20:g} MB"
            kinds = [".jpg", *(f".{kind.lower()}" for kind in FORMATS)]
            upload = gr.File(label=f"Image, {most}", file_types=kinds, height=160)
            side = studio.model.resolution
            gr.Markdown(f"Its centre square is resized to {side} × {side} pixels.")
            button = gr.Button("Reconstruct", variant="primary")
        with gr.Column(scale=2, min_width=300):
            outputs = results("PNG")
    return Tab(studio.reconstruct, [button.click, upload.upload], [upload], outputs)


# (title, what raises ValueError if the model cannot, the tab)
OFFERS = (
    ("Samples", Studio.try_out, samples_tab),
    ("Walk", Studio.try_out, walk_tab),
    ("Reconstruct", Studio.try_reconstructing, reconstruct_tab),
)


def offered(studio: Studio) -> list[tuple[str, Callable[[gr.Blocks, Studio], Tab]]]:
    """(title, tab) of what the model can do. Raises ValueError if that is nothing."""
    found, reason = [], ""
    for title, attempt, tab in OFFERS:
        try:
            attempt(studio)
            found.append((title, tab))
        except ValueError as error:
            reason = str(error)
    if not found:
        raise ValueError(f"there is nothing to show of {studio.model.name}: {reason}")
    return found


def build(studio: Studio, temporary: Path) -> gr.Blocks:
    """The page; all of its files lie below `temporary`. Raises ValueError as `offered`."""
    model, tabs = studio.model, offered(studio)
    weights = "moving average of the weights" if model.averaged else "weights as trained"
    with gr.Blocks(title=f"{model.name} · Saddle", analytics_enabled=False) as page:
        seen = f"{model.images:,} images seen · {weights} · {model.device.type}"
        gr.Markdown(f"# {model.name}\n{seen}")
        with gr.Tabs():
            for title, make in tabs:
                with gr.Tab(title):
                    tab = make(page, studio)
                    gr.on(
                        tab.starts,
                        shown(tab.function, temporary),
                        tab.inputs,
                        tab.outputs,
                        concurrency_limit=1,
                        concurrency_id="model",
                        api_visibility="private",
                    )
    page.queue(max_size=WAITING, api_open=False)
    return page

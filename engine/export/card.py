"""The model card of an export: README.md, with a header in the form that Hugging Face reads.

https://huggingface.co/docs/hub/model-cards describes that form. The card gives no licence: that is
for whoever publishes the model, and depends on the training data.
"""

import ast
import shlex
from pathlib import Path
from typing import Any

from engine import recipe as recipes
from engine.export.figures import measurements, table
from engine.export.write import takes_any_size
from engine.exported import FILES
from engine.run import read_recipe
from engine.trained import Trained

PLACES = ("--runs", "--data.root", "--data.path", "--data.cache", "--metrics.weights")

SNIPPETS = {
    "safetensors": """With PyTorch and safetensors alone, in this folder:

```python
import torch
from network import load

generator = load(".")
images = generator(torch.randn(16, {latent}))  # {shape}, in [-1, 1]
```
""",
    "onnx": """With ONNX Runtime:

```python
import numpy, onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
z = numpy.random.standard_normal((16, {latent})).astype("float32")
images = session.run(None, {{"z": z}})[0]
```
""",
    "program": """As a program of `torch.export` (PyTorch unpickles parts of it: load it only from a
source that you trust):

```python
import torch

generator = torch.export.load("model.pt2").module()
images = generator(torch.randn(16, {latent}))
```
""",
}

SNIPPETS_OF_IMAGES = {
    "safetensors": """With PyTorch and safetensors alone, in this folder:

```python
import torch
from network import load

given = torch.rand{given} * 2 - 1  # your images, in [-1, 1]
images = load(".")(given)  # {shape}
```
""",
    "onnx": """With ONNX Runtime:

```python
import numpy, onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
given = numpy.random.uniform(-1, 1, {given}).astype("float32")  # your images
images = session.run(None, {{"images": given}})[0]
```
""",
    "program": """As a program of `torch.export` (PyTorch unpickles parts of it: load it only from a
source that you trust):

```python
import torch

given = torch.rand{given} * 2 - 1  # your images, in [-1, 1]
images = torch.export.load("model.pt2").module()(given)
```
""",
}

SEEN = """- It shows what its training data shows, and with its imbalances.
- It may come close to single training images; how close was not measured for this card.
"""
SEEN_OF_IMAGES = """- It knows its training data alone, and of all else makes what it learnt there.
- What it adds to an image was not seen, but guessed.
"""
LIMITATIONS = """- Its images are generated. Whoever shows them should say so; those that Saddle
  writes carry the mark `DigitalSourceType: trainedAlgorithmicMedia` and their origin as metadata.
"""


GRID = """![64 samples](samples.png)

The first 64 images of seed 0, none left out.
"""


def write(
    trained: Trained, run_dir: Path, config: dict[str, Any], differences: dict[str, float]
) -> str:
    """The card's text."""
    parts = [
        _header(trained, config, differences),
        f"# {trained.name}\n",
        _what(trained, config),
        *([] if "translation" in config else [GRID]),
        "## Use\n",
        *_uses(trained, config, differences),
        "## Training\n",
        _training(trained, run_dir),
        "## Figures\n",
        _figures(trained, run_dir),
        "## Limitations\n",
        (SEEN_OF_IMAGES if "translation" in config else SEEN) + LIMITATIONS,
        "## Provenance\n",
        _provenance(config, differences),
    ]
    return "\n".join(parts)


def _header(trained: Trained, config: dict[str, Any], differences: dict[str, float]) -> str:
    formats = {"safetensors": "safetensors", "onnx": "onnx", "program": "torch-export"}
    tags = ["saddle", trained.name, *(formats[form] for form in differences)]
    task = "image-to-image" if "translation" in config else "unconditional-image-generation"
    lines = ["library_name: pytorch", f"pipeline_tag: {task}", "tags:"]
    return "\n".join(["---", *lines, *(f"- {tag}" for tag in tags), "---", ""])


def _what(trained: Trained, config: dict[str, Any]) -> str:
    """What the model is: the recipe's own words, up to its command, and what goes in and out."""
    text = ast.get_docstring(ast.parse(recipes.source(trained.name).read_text())) or ""
    about = text.split("\n\n    ", 1)[0]
    weights = "moving average of the weights" if trained.averaged else "weights as trained"
    kind = "grey" if trained.channels == 1 else "RGB"
    side = trained.resolution
    named = f"{about}\n\n`{config['network']['class']}`, {weights}"
    if "translation" in config:
        return f"{named}{_translation(config['translation'], kind)}"
    return (
        f"{named}. In: latent vectors of "
        f"{trained.latent_dim()} standard normal numbers. Out: {kind} images of {side} x {side} "
        f"pixels in [-1, 1]; `(images + 1) * 127.5` gives bytes.\n"
    )


def _translation(facts: dict[str, Any], kind: str) -> str:
    """The same of what makes images of images."""
    way = f", {facts['direction']}" if facts["direction"] else ""
    if side := facts["side"]:
        sizes = f"{side} x {side} pixels alone, for which its noise is fixed"
    else:
        sizes = "any height and width"
        if facts["multiple"] > 1:
            sizes += f" that are multiples of {facts['multiple']}, at least {facts['least']}"
    larger = f"{facts['scale']} times as large" if facts["scale"] > 1 else "of the same size"
    return (
        f"{way}. In: {kind} images (N, C, H, W) in [-1, 1], `bytes / 127.5 - 1`, of {sizes}. Out: "
        f"such images, {larger}; `((images + 1) * 127.5).clip(0, 255)` gives bytes.\n"
    )


def _uses(trained: Trained, config: dict[str, Any], differences: dict[str, float]) -> list[str]:
    if facts := config.get("translation"):
        channels, side = trained.channels, trained.resolution
        small = side // facts["scale"]
        given, shape = (1, channels, small, small), (1, channels, side, side)
        parts = [SNIPPETS_OF_IMAGES[form].format(given=given, shape=shape) for form in differences]
        command = "python -m engine.translate FOLDER_OR_FILE INPUT... --out DIR"
        return [*parts, f"With Saddle, from any of them, image files: `{command}`.\n"]
    shape = (16, trained.channels, trained.resolution, trained.resolution)
    parts = [
        SNIPPETS[form].format(latent=trained.latent_dim(), shape=shape) for form in differences
    ]
    sample = "python -m engine.sample FOLDER_OR_FILE --num 64 --seed 0 --out grid.png"
    return [*parts, f"With Saddle, from any of them: `{sample}`.\n"]


def _training(trained: Trained, run_dir: Path) -> str:
    _, _, stored = read_recipe(run_dir)
    data, count = trained.recipe.data, trained.index["dataset_images"]
    made = stored["provenance"]
    passes = trained.images / count
    planned = recipes.total_images(recipes.load(trained.name), count)
    return (
        f"- data: {data.name}, {count:,} training images at {data.resolution} x {data.resolution} "
        f"(fingerprint `{trained.index['dataset']}`)\n"
        f"- images seen: {trained.images:,} ({passes:.3g} passes; the recipe as written trains on "
        f"{planned:,}), batch {data.batch}, seed {trained.recipe.seed}\n"
        f"- device: {made['device']}, {made['world_size']} rank(s), "
        f"{stored['resolved']['precision'][0]}\n"
        f"- command:\n\n```\n{_without_paths(made['command'])}\n```\n"
    )


def _without_paths(command: str) -> str:
    """A training command without what only says where things lie on one machine."""
    kept: list[str] = []
    words = iter(shlex.split(command))
    for word in words:
        flag, equals, _ = word.partition("=")
        if flag not in PLACES:
            kept.append(word)
        elif not equals:
            next(words, None)
    return shlex.join(kept)


def _figures(trained: Trained, run_dir: Path) -> str:
    if found := measurements(trained, run_dir):
        return "\n".join(map(table, found))
    return (
        f"None were measured of these weights ({trained.images:,} images); "
        "`python -m engine.evaluate RUN_DIR`, before the export, measures them.\n"
    )


def _provenance(config: dict[str, Any], differences: dict[str, float]) -> str:
    at = "batch 1 and 5" + (", of two sizes" if takes_any_size(config) else "")
    checks = ", ".join(f"{FILES[form]} {worst:.1g}" for form, worst in differences.items())
    versions = ", ".join(f"{name} {number}" for name, number in config["versions"].items())
    return (
        f"- checkpoint: SHA-256 of its index `{config['checkpoint']['sha256']}`\n"
        f"- recipe `{config['recipe']['name']}`, source SHA-256 "
        f"`{config['recipe']['source_sha256']}`; all settings in `config.json`\n"
        f"- largest difference of a pixel from the PyTorch model, at {at}: {checks}\n"
        f"- versions: {versions}\n"
    )

"""Make the README's picture: the embedded pipeline and its W8A8 and W4A8 checkpoints, same prompts and noise.

    python benchmarks/demo_picture.py

Writes `docs/images/demo.png`.
"""

import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dcomp.calibrate.pipeline import Generation, open_pipeline
from dcomp.calibrate.prompts import read_prompts
from dcomp.recipes.demo import GUIDANCE, embedded_model
from dcomp.recipes.generate import to_picture
from dcomp.recipes.load import load_recipe
from dcomp.recipes.run import run_recipe

COLUMNS, CELL, LABEL = 12, 72, 110
FIRST_INDEX = 1_000_000  # noise that no calibration saw
TARGET = Path(__file__).parents[1] / "docs" / "images" / "demo.png"


def main() -> None:
    """Compress, generate, draw."""
    model = embedded_model()
    prompts = read_prompts(None, COLUMNS, "text", model=model)
    settings = Generation(steps=20, guidance=GUIDANCE, batch_size=COLUMNS)
    with tempfile.TemporaryDirectory() as folder:
        rows = {"original": model}
        for name in ("w8a8", "w4a8"):
            rows[name.upper()] = Path(folder) / name
            recipe = load_recipe(name, (), {"calibration.guidance": GUIDANCE})
            run_recipe(model, recipe, rows[name.upper()])
        sheet = Image.new("RGB", (LABEL + COLUMNS * CELL, len(rows) * CELL), "white")
        draw = ImageDraw.Draw(sheet)
        for y, (name, source) in enumerate(rows.items()):
            draw.text((8, y * CELL + CELL // 2 - 8), name, fill="black", font=ImageFont.load_default(16))
            indices = range(FIRST_INDEX, FIRST_INDEX + COLUMNS)
            images = open_pipeline(source).run(prompts, indices, settings).images
            assert images is not None
            for x, image in enumerate(images):
                sheet.paste(to_picture(image), (LABEL + x * CELL + 4, y * CELL + 4))
    TARGET.parent.mkdir(exist_ok=True)
    sheet.save(TARGET)


if __name__ == "__main__":
    main()

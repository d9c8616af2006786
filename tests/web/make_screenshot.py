"""Make docs/images/vila-serve.png: the page of vila-serve, asked about an image of tiny-vila.

python -m tests.web.make_screenshot ENGINE
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image

from tests.support.browser import chromium, visit
from tests.support.paths import REPOSITORY, TINY_VILA_EXAMPLE
from tests.support.served_process import vila_serve

OUT = REPOSITORY / "docs" / "images" / "vila-serve.png"
IMAGES = TINY_VILA_EXAMPLE / "pictures"
COLOURS = 200


def main(engine: Path) -> None:
    options = {"color_scheme": "light", "device_scale_factor": 1.5}
    with (
        chromium() as browser,
        vila_serve(engine, "--model-name", "tiny-vila") as url,
        visit(browser, url, 860, **options) as page,
    ):
        page.choose(IMAGES / "two.png")
        page.ask("Describe the picture.")
        page.choose(IMAGES / "four.png")
        page.page.fill("#question", "How many circles are in the picture?")
        content = page.page.screenshot(animations="disabled", caret="initial")
    OUT.parent.mkdir(exist_ok=True)
    Image.open(io.BytesIO(content)).convert("RGB").quantize(COLOURS).save(OUT, optimize=True)
    print(OUT, OUT.stat().st_size)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

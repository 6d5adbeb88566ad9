"""Draws circles, squares and triangles, 100 pictures of each, 32 x 32 pixels: python examples/shapes.py

Writes pictures/circle/0.png and so on: a folder of pictures as docs/own_pictures.md trains on.
"""

import os

import numpy as np
from PIL import Image, ImageDraw

CORNERS = {"circle": 0, "square": 4, "triangle": 3}
SIZE, FINE = 32, 4  # pixels; drawn this many times as large, and then made smaller, for smooth edges


def draw(corners: int, rng: np.random.Generator) -> Image.Image:
    """Returns a circle (0 corners), square or triangle of random size, place and colour on a random background."""
    ground, colour = rng.integers(256, size=(2, 3))
    while abs(ground - colour).sum() < 250:  # a shape that can be seen
        ground, colour = rng.integers(256, size=(2, 3))
    radius = rng.uniform(7, 13)
    x, y = rng.uniform(radius, SIZE - radius, 2)
    picture = Image.new("RGB", (SIZE * FINE, SIZE * FINE), tuple(ground.tolist()))
    where, pen = (x * FINE, y * FINE, radius * FINE), ImageDraw.Draw(picture)
    if corners:
        pen.regular_polygon(where, corners, fill=tuple(colour.tolist()))
    else:
        pen.circle(where[:2], where[2], fill=tuple(colour.tolist()))
    return picture.resize((SIZE, SIZE), Image.Resampling.BOX)


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    for name, corners in CORNERS.items():
        os.makedirs(f"pictures/{name}", exist_ok=True)
        for i in range(100):
            draw(corners, rng).save(f"pictures/{name}/{i}.png")

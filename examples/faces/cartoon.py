"""Generated identities: parametric cartoon faces, drawn with signed distances, for runs without a data folder.

An identity is a draw of `IDENTITY` (the geometry and tones of a head); an image of it adds a draw of `IMAGE` (pose,
expression, light, noise, occlusion). Identity i of a seed is the same whatever the number of identities, and its
first images are the same whatever the number of images.
"""

from __future__ import annotations

import torch
from torch import Tensor

HEIGHT, WIDTH = 56, 46  # pixels
SOFTNESS = 2.5 / HEIGHT  # width of an edge, in units of half the image height
CHUNK = 64  # images drawn together: their planes stay in a CPU's cache

# (low, high) of a uniform draw. Lengths are in units of half the image height, angles in radians, tones 0 … 1.
IDENTITY = {
    "head_width": (0.46, 0.66),
    "head_height": (0.66, 0.82),
    "jaw": (-0.22, 0.25),  # > 0 narrows the head towards the chin
    "squareness": (1.8, 3.0),  # exponent of the superellipse
    "skin": (0.45, 0.85),
    "hair": (0.05, 0.50),
    "hair_line": (-0.62, -0.38),
    "hair_curve": (-0.5, 0.9),
    "hair_parting": (-0.35, 0.35),
    "hair_sides": (-0.30, 0.35),  # how far down the temples hair reaches
    "hair_volume": (0.02, 0.16),
    "ear_size": (0.04, 0.13),
    "eye_gap": (0.17, 0.30),
    "eye_height": (-0.20, 0.00),
    "eye_width": (0.065, 0.130),
    "eye_open": (0.35, 0.75),  # height over width
    "eye_tilt": (-0.35, 0.35),
    "iris": (0.05, 0.45),
    "iris_size": (0.45, 0.80),  # of the eye's height
    "brow_gap": (0.10, 0.20),
    "brow_length": (0.09, 0.17),
    "brow_tilt": (-0.40, 0.40),
    "brow_arch": (0.0, 3.0),
    "brow_weight": (0.010, 0.042),
    "nose_length": (0.16, 0.34),
    "nose_width": (0.04, 0.12),
    "nose_tone": (0.55, 0.85),
    "mouth_height": (0.34, 0.50),
    "mouth_width": (0.12, 0.27),
    "lip_upper": (0.012, 0.045),
    "lip_lower": (0.012, 0.065),
    "lip_tone": (0.40, 0.80),
    "beard": (-0.6, 0.5),  # ≤ 0: none, else how dark
    "beard_line": (0.20, 0.50),
    "moustache": (-0.7, 0.6),
}
IMAGE = {
    "roll": (-0.10, 0.10),
    "yaw": (-0.26, 0.26),
    "pitch": (-0.10, 0.10),
    "shift_x": (-0.05, 0.05),
    "shift_y": (-0.05, 0.05),
    "zoom": (0.95, 1.05),
    "smile": (-1.2, 2.2),
    "mouth_open": (-0.10, 0.09),  # ≤ 0: shut
    "lids": (0.55, 1.10),  # of the eye's opening
    "brow_raise": (-0.03, 0.05),
    "gaze": (-0.35, 0.35),
    "light_x": (-0.35, 0.35),
    "light_y": (-0.20, 0.20),
    "gain": (0.80, 1.15),
    "offset": (-0.05, 0.05),
    "background": (0.10, 0.70),
    "background_slope": (-0.20, 0.20),
    "noise": (0.005, 0.035),
    "occluded": (0.0, 1.0),  # below OCCLUDED: something stands before the face
    "occluder_x": (-0.7, 0.7),
    "occluder_y": (-0.8, 0.8),
    "occluder_width": (0.10, 0.40),
    "occluder_height": (0.10, 0.25),
    "occluder_tone": (0.0, 1.0),
    "glasses": (0.0, 1.0),  # below GLASSES: worn in this image
}
OCCLUDED, GLASSES = 0.15, 0.10  # shares of the images


def generate_faces(identities: int, images_per_identity: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draws the faces of a seed.

    Args:
        identities: number of people, > 0.
        images_per_identity: number of images of each, > 0.
        seed: ≥ 0; the same seed gives the same bytes.

    Returns:
        Images `[identities · images_per_identity, HEIGHT, WIDTH]` uint8 grey levels, and the identity of each, int64,
        ascending.
    """
    images = torch.empty(identities, images_per_identity, HEIGHT, WIDTH, dtype=torch.uint8)
    together = max(1, CHUNK // images_per_identity)
    for start in range(0, identities, together):
        draws = [
            _draws(seed, identity, images_per_identity) for identity in range(start, min(start + together, identities))
        ]
        who, view, noise = (torch.cat(part) for part in zip(*draws, strict=True))
        drawn = draw_faces(_named(IDENTITY, who), _named(IMAGE, view), noise)
        images[start : start + together] = drawn.unflatten(0, (-1, images_per_identity))
    return images.flatten(0, 1), torch.arange(identities).repeat_interleave(images_per_identity)


def _draws(seed: int, identity: int, images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit draws of one identity: geometry `[images, |IDENTITY|]` (equal rows), views `[images, |IMAGE|]`, noise."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + identity) % 2**64)
    who = torch.rand(len(IDENTITY), generator=generator)
    view = torch.empty(images, len(IMAGE))
    noise = torch.empty(images, HEIGHT, WIDTH)
    for image in range(images):  # image by image, so that asking for more changes none
        view[image] = torch.rand(len(IMAGE), generator=generator)
        noise[image].normal_(generator=generator)
    return who.expand(images, -1), view, noise


def _named(table: dict[str, tuple[float, float]], unit: Tensor) -> dict[str, Tensor]:
    low, high = torch.tensor(list(table.values())).unbind(1)
    values = low + unit * (high - low)  # [B, |table|]
    return {name: values[:, column].view(-1, 1, 1) for column, name in enumerate(table)}


def _cover(distance: Tensor) -> Tensor:
    """Opacity of a shape from its signed distance (< 0 inside), anti-aliased over SOFTNESS."""
    return (0.5 - distance / SOFTNESS).clamp_(0, 1)


def _over(canvas: Tensor, tone: Tensor | float, opacity: Tensor) -> Tensor:
    return canvas + opacity * (tone - canvas)


def _ellipse(x: Tensor, y: Tensor, rx: Tensor, ry: Tensor) -> Tensor:
    return (((x / rx) ** 2 + (y / ry) ** 2).sqrt() - 1) * torch.minimum(rx, ry)


def draw_faces(face: dict[str, Tensor], view: dict[str, Tensor], noise: Tensor) -> Tensor:
    """Draws images from named parameters.

    Args:
        face: a `[B, 1, 1]` tensor for each name of `IDENTITY`, in its units.
        view: the same for `IMAGE`.
        noise: `[B, HEIGHT, WIDTH]`, standard normal.

    Returns:
        `[B, HEIGHT, WIDTH]` uint8 grey levels.
    """
    y = ((torch.arange(HEIGHT) + 0.5) * (2 / HEIGHT) - 1).view(1, HEIGHT, 1)
    x = ((torch.arange(WIDTH) + 0.5) * (2 / HEIGHT) - WIDTH / HEIGHT).view(1, 1, WIDTH)
    cos, sin = view["roll"].cos() / view["zoom"], view["roll"].sin() / view["zoom"]
    dx, dy = x - view["shift_x"], y - view["shift_y"] - 0.06
    hx, hy = cos * dx + sin * dy, cos * dy - sin * dx  # [B, H, W], in the frame of the head

    # Inner features lie on a cylinder: turning the head moves and foreshortens them, the outline stays.
    u = _turn(hx, face["head_width"] * 1.2, view["yaw"])
    v = _turn(hy, face["head_height"] * 1.4, view["pitch"])

    canvas = view["background"] + view["background_slope"] * x + 0 * y
    canvas, head = _draw_head(canvas, face, hx, hy, u, v)
    canvas = _draw_lower_face(canvas, face, view, u, v, head)
    canvas = _draw_eyes(canvas, face, view, u, v, head)

    normal_x, normal_y = hx / face["head_width"], hy / face["head_height"]
    shade = 1 + (view["light_x"] * normal_x + view["light_y"] * normal_y).clamp(-0.6, 0.6)
    canvas = canvas * shade * view["gain"] + view["offset"]

    bar = torch.maximum(
        (x - view["occluder_x"]).abs() - view["occluder_width"],
        (y - view["occluder_y"]).abs() - view["occluder_height"],
    )
    canvas = _over(canvas, view["occluder_tone"], _cover(bar) * (view["occluded"] < OCCLUDED))
    canvas = canvas + view["noise"] * noise
    return (canvas.clamp(0, 1) * 255).round().to(torch.uint8)


def _turn(across: Tensor, radius: Tensor, angle: Tensor) -> Tensor:
    t = (across / radius).clamp(-0.98, 0.98)
    return radius * (t * angle.cos() - (1 - t * t).sqrt() * angle.sin())


def _draw_head(
    canvas: Tensor, face: dict[str, Tensor], hx: Tensor, hy: Tensor, u: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Hair behind, ears, head, hair in front. Returns the canvas and the opacity of the head `[B, H, W]`."""
    width = face["head_width"] * (1 - face["jaw"] * hy)
    power = face["squareness"]
    radius = ((hx.abs() / width) ** power + (hy.abs() / face["head_height"]) ** power) ** (1 / power)
    outline = (radius - 1) * face["head_width"]
    head = _cover(outline)

    behind = torch.maximum(outline - face["hair_volume"], (hy - face["hair_sides"]) * 0.5)
    canvas = _over(canvas, face["hair"], _cover(behind))
    ears = _ellipse(hx.abs() - face["head_width"], hy + 0.02, face["ear_size"], face["ear_size"] * 1.6)
    canvas = _over(canvas, face["skin"] * 0.88, _cover(ears))
    canvas = _over(canvas, face["skin"], head)
    fringe = v - face["hair_line"] - face["hair_curve"] * (u - face["hair_parting"]) ** 2
    return _over(canvas, face["hair"], _cover(fringe) * head), head


def _draw_eyes(
    canvas: Tensor, face: dict[str, Tensor], view: dict[str, Tensor], u: Tensor, v: Tensor, head: Tensor
) -> Tensor:
    """Eyes, brows, glasses: drawn once in mirrored coordinates, both sides at a time."""
    m, e = u.abs() - face["eye_gap"], v - face["eye_height"]
    tilted = e + face["eye_tilt"] * m
    eye_height = face["eye_width"] * face["eye_open"] * view["lids"]
    eye = _cover(_ellipse(m, tilted, face["eye_width"], eye_height)) * head
    canvas = _over(canvas, 0.92, eye)
    size = face["eye_width"] * face["eye_open"] * face["iris_size"]
    gaze = m - u.sign() * view["gaze"] * (face["eye_width"] - size)
    canvas = _over(canvas, face["iris"], _cover((gaze**2 + tilted**2).sqrt() - size) * eye)
    lid = (tilted + eye_height * (1 - (m / face["eye_width"]) ** 2)).abs() - 0.012
    canvas = _over(canvas, 0.15, _cover(torch.maximum(lid, m.abs() - face["eye_width"])) * head * 0.8)

    arch = face["brow_tilt"] * m + face["brow_arch"] * m**2
    brow = (e + face["brow_gap"] + view["brow_raise"] - arch).abs() - face["brow_weight"]
    brow = torch.maximum(brow, m.abs() - face["brow_length"])
    canvas = _over(canvas, face["hair"] * 0.6, _cover(brow) * head)

    rim = _ellipse(m, e, face["eye_width"] + 0.06, face["eye_width"] + 0.04).abs() - 0.014
    rim = torch.minimum(rim, torch.maximum(e.abs() - 0.014, u.abs() - 0.08))
    return _over(canvas, 0.1, _cover(rim) * (view["glasses"] < GLASSES))


def _draw_lower_face(
    canvas: Tensor, face: dict[str, Tensor], view: dict[str, Tensor], u: Tensor, v: Tensor, head: Tensor
) -> Tensor:
    """Nose, beard, moustache, mouth."""
    skin, across = face["skin"], u.abs()
    beard = _cover(face["beard_line"] - v - 0.5 * u**2) * head
    canvas = _over(canvas, skin * (1 - face["beard"].clamp(0)), beard)

    bridge = face["eye_height"] + 0.02
    along = (v - bridge) / face["nose_length"]  # 0 … 1 down the nose
    side = (across - face["nose_width"] * (0.35 + 0.65 * along)).abs() - 0.010
    side = torch.maximum(side, (along - 0.5).abs() * face["nose_length"] - 0.5 * face["nose_length"])
    canvas = _over(canvas, skin * (0.5 + 0.5 * face["nose_tone"]), _cover(side) * head)
    base = (v - bridge - face["nose_length"] + 1.5 * u**2).abs() - 0.020
    base = torch.maximum(base, across - face["nose_width"])
    canvas = _over(canvas, skin * face["nose_tone"], _cover(base) * head)

    lips = v - face["mouth_height"] + view["smile"] * (u**2 - face["mouth_width"] ** 2 / 3)
    taper = (1 - (u / face["mouth_width"]) ** 2).clamp(0)
    moustache = torch.maximum((lips + 0.085).abs() - 0.035, across - face["mouth_width"] * 0.9)
    canvas = _over(canvas, skin * (1 - face["moustache"].clamp(0)), _cover(moustache) * head)
    gap = view["mouth_open"].clamp(0) * taper
    upper, lower = -face["lip_upper"] * taper - gap, face["lip_lower"] * taper + gap
    inside = across - face["mouth_width"]
    mouth = torch.maximum(torch.maximum(upper - lips, lips - lower), inside)
    canvas = _over(canvas, skin * face["lip_tone"], _cover(mouth) * head)
    slit = torch.maximum(lips.abs() - gap - 0.008, inside)
    return _over(canvas, 0.12, _cover(slit) * head)

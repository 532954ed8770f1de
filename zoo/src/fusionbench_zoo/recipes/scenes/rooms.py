"""Rooms with furniture, drawn at random from a seed: NYUv2's thirteen classes, built of boxes and balls."""

import numpy as np

from fusionbench_zoo.recipes.scenes.raycast import Array, Ball, Box, Camera, Plane, Scene, Surface

CLASSES = "bed books ceiling chair floor furniture objects picture sofa table tv wall window".split()  # as in NYUv2
LABEL = {name: number for number, name in enumerate(CLASSES)}


class Room:
    """One room while it is being furnished; `x` and `y` lie on the floor, `z` is up, all in metres."""

    def __init__(self, seed: list[int], textures: Array) -> None:
        self.seed, self.random, self._textures = seed, np.random.default_rng(seed), textures
        r = self.random
        self.width, self.depth, self.height = r.uniform(3.5, 6), r.uniform(3.5, 6), r.uniform(2.4, 3.2)
        self.things: list[Box | Ball | Plane] = []

    def surface(self, name: str, *, tint: Array | None = None, contrast: float = 0.6, span: float = 1.0) -> Surface:
        """A real texture, in grey or as it is, under a colour of its own."""
        texture = self._textures[self.random.integers(len(self._textures))]
        if tint is None:
            tint = self.random.uniform(0.25, 1.0, 3)
        relief = texture.mean(-1, keepdims=True)
        relief = 0.5 + contrast * (relief - relief.mean()) / (2 * relief.std() + 0.05)
        return Surface(LABEL[name], np.clip(relief * 1.6 * tint, 0, 1), span)

    def picture(self, name: str, span: float, glow: float = 0.0) -> Surface:
        """A real texture in its colours, once over the whole thing."""
        texture = self._textures[self.random.integers(len(self._textures))]
        return Surface(LABEL[name], np.clip(texture * self.random.uniform(0.8, 1.4), 0, 1), span, glow)

    def box(
        self, surface: Surface, place: tuple[float, float, float], size: tuple[float, float, float], turn: float = 0.0
    ) -> None:
        """A box that stands at a place: the middle of its underside."""
        x, y, z = place
        self.things.append(Box(surface, np.array([x, y, z + size[2] / 2]), np.array(size) / 2, turn))

    def parts(self, surface: Surface, place: tuple[float, float], turn: float, parts: list[tuple[float, ...]]) -> None:
        """Boxes of one piece of furniture: each dx, dy, z and its sizes, turned together."""
        cosine, sine = np.cos(turn), np.sin(turn)
        for dx, dy, z, *size in parts:
            x, y = place[0] + cosine * dx - sine * dy, place[1] + sine * dx + cosine * dy
            self.box(surface, (x, y, z), (size[0], size[1], size[2]), turn)


def room(seed: list[int], textures: Array) -> Scene:
    """A furnished room, and a camera in a corner that looks to the middle."""
    r = Room(seed, textures)
    _shell(r)
    random = r.random
    pieces = [_bed, _sofa, _table, _chair, _chair, _cupboard, _shelf, _tv]
    corners = [(i, j) for i in (0.2, 0.5, 0.8) for j in (0.2, 0.5, 0.8)]
    stand = (0.06, 0.06)  # of the camera, as shares of the room
    places = [corners[i] for i in random.permutation(len(corners)) if corners[i] != (0.2, 0.2)]
    for piece, (i, j) in zip(
        random.permutation(np.array(pieces, object))[: random.integers(3, 7)], places, strict=False
    ):
        x, y = (i + random.uniform(-0.06, 0.06)) * r.width, (j + random.uniform(-0.06, 0.06)) * r.depth
        piece(r, (x, y), random.choice([0, 0.5, 1, 1.5]) * np.pi + random.normal(0, 0.15))
    for _ in range(random.integers(1, 5)):
        _object(r, (random.uniform(0.25, 0.9) * r.width, random.uniform(0.25, 0.9) * r.depth), 0.0)
    place = np.array([stand[0] * r.width + 0.2, stand[1] * r.depth + 0.2, random.uniform(1.2, 1.8)])
    aim = np.array([random.uniform(0.4, 0.8) * r.width, random.uniform(0.4, 0.8) * r.depth, random.uniform(0.5, 1.3)])
    d = aim - place
    camera = Camera(place, float(np.arctan2(d[1], d[0])), float(np.arctan2(d[2], np.hypot(d[0], d[1]))))
    lamp = np.array([random.uniform(0.3, 0.7) * r.width, random.uniform(0.3, 0.7) * r.depth, r.height - 0.2])
    return Scene(r.things, camera, lamp, seed=seed)


def _shell(r: Room) -> None:
    random = r.random
    up, x, y = np.array([0, 0, 1.0]), np.array([1.0, 0, 0]), np.array([0, 1.0, 0])
    walls = random.uniform(0.55, 1.0, 3)
    r.things.append(Plane(r.surface("floor", tint=random.uniform(0.2, 0.8, 3), span=random.uniform(0.6, 2)), up, 0.0))
    r.things.append(Plane(r.surface("ceiling", tint=random.uniform(0.8, 1, 3), contrast=0.1, span=2), -up, -r.height))
    for normal, offset in ((x, 0.0), (-x, -r.width), (y, 0.0), (-y, -r.depth)):
        r.things.append(Plane(r.surface("wall", tint=walls, contrast=0.2, span=1.5), normal, offset))
    for side in (0, 1):  # the two walls that the camera sees
        length = (r.depth, r.width)[side]
        for name, low, high in (("window", 0.9, 1.4), ("picture", 0.4, 0.8)):
            if random.random() < 0.65:
                wide, tall = random.uniform(low, high), random.uniform(low, high) * 0.9
                along, z = random.uniform(0.25, 0.8) * length, random.uniform(1.1, 1.4)
                if name == "window":
                    sky = Surface(LABEL[name], np.ones((1, 1, 3)) * random.uniform([0.6, 0.75, 0.85], 1.0), 1.0, 1.1)
                else:
                    sky = r.picture(name, wide)
                place = (r.width - 0.02, along, z) if side == 0 else (along, r.depth - 0.02, z)
                size = (0.05, wide, tall) if side == 0 else (wide, 0.05, tall)
                r.box(sky, place, size)


def _bed(r: Room, at: tuple[float, float], turn: float) -> None:
    cover = r.surface("bed", span=0.8)
    r.parts(
        cover, at, turn, [(0, 0, 0.1, 1.5, 2.0, 0.4), (0, 0.95, 0.1, 1.5, 0.1, 0.9), (0, 0.65, 0.5, 1.1, 0.4, 0.12)]
    )


def _sofa(r: Room, at: tuple[float, float], turn: float) -> None:
    cloth = r.surface("sofa", span=0.5, contrast=0.3)
    wide = r.random.uniform(1.4, 2.0)
    arms = [(side * (wide / 2 - 0.1), 0, 0, 0.2, 0.85, 0.6) for side in (-1, 1)]
    r.parts(cloth, at, turn, [(0, 0, 0.05, wide, 0.85, 0.4), (0, 0.35, 0.05, wide, 0.2, 0.85), *arms])


def _table(r: Room, at: tuple[float, float], turn: float) -> None:
    wood = r.surface("table", tint=r.random.uniform([0.4, 0.25, 0.1], [0.9, 0.6, 0.4]))
    wide, deep, tall = r.random.uniform(0.9, 1.6), r.random.uniform(0.6, 0.9), r.random.uniform(0.5, 0.78)
    legs = [(i * (wide / 2 - 0.06), j * (deep / 2 - 0.06), 0, 0.07, 0.07, tall) for i in (-1, 1) for j in (-1, 1)]
    r.parts(wood, at, turn, [(0, 0, tall, wide, deep, 0.06), *legs])
    if r.random.random() < 0.7:
        _object(r, at, tall + 0.06)
    if r.random.random() < 0.5:
        _books(r, (at[0] + 0.2, at[1]), tall + 0.06)


def _chair(r: Room, at: tuple[float, float], turn: float) -> None:
    wood = r.surface("chair", span=0.4)
    legs = [(i * 0.2, j * 0.2, 0, 0.05, 0.05, 0.45) for i in (-1, 1) for j in (-1, 1)]
    r.parts(wood, at, turn, [(0, 0, 0.45, 0.48, 0.48, 0.06), (0, 0.22, 0.5, 0.48, 0.05, 0.5), *legs])


def _cupboard(r: Room, at: tuple[float, float], turn: float) -> None:
    wood = r.surface("furniture", tint=r.random.uniform(0.3, 1.0, 3), span=0.7)
    r.parts(wood, at, turn, [(0, 0, 0, r.random.uniform(0.7, 1.3), 0.5, r.random.uniform(0.7, 2.0))])


def _shelf(r: Room, at: tuple[float, float], turn: float) -> None:
    wood = r.surface("furniture", tint=r.random.uniform([0.4, 0.25, 0.1], [0.9, 0.6, 0.4]))
    r.parts(wood, at, turn, [(0, 0.14, 0, 1.0, 0.02, 1.6), *((0, 0, z, 1.0, 0.3, 0.04) for z in (0.0, 0.5, 1.0, 1.5))])
    for z in (0.04, 0.54, 1.04):
        books = [(x, 0.02, z, 0.06, 0.2, r.random.uniform(0.22, 0.36)) for x in np.arange(-0.4, 0.4, 0.08)]
        for part in books[: r.random.integers(3, len(books) + 1)]:
            r.parts(r.surface("books", contrast=0.1), at, turn, [part])


def _tv(r: Room, at: tuple[float, float], turn: float) -> None:
    r.parts(r.surface("furniture", span=0.7), at, turn, [(0, 0, 0, 1.1, 0.4, 0.45)])
    screen = Surface(LABEL["tv"], np.full((1, 1, 3), r.random.uniform(0.02, 0.12)), 1.0)
    if r.random.random() < 0.5:
        screen = r.picture("tv", 1.0, glow=0.9)
    r.parts(screen, at, turn, [(0, 0, 0.5, 1.0, 0.06, 0.6)])


def _books(r: Room, at: tuple[float, float], z: float) -> None:
    for i in range(r.random.integers(1, 4)):
        r.box(r.surface("books", contrast=0.1), (*at, z + 0.05 * i), (0.28, 0.2, 0.05), r.random.uniform(0, 3))


def _object(r: Room, at: tuple[float, float], z: float) -> None:
    surface, size = r.surface("objects", span=0.3), r.random.uniform(0.1, 0.22)
    if r.random.random() < 0.6:
        r.things.append(Ball(surface, np.array([*at, z + size]), size))
    else:
        r.box(surface, (*at, z), (size, size, 2 * size), r.random.uniform(0, 3))

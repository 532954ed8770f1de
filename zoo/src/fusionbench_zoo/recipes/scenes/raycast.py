"""A ray-caster in numpy: planes, boxes and spheres, with the class, depth and normal of every pixel, exactly."""

from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray
SIZE = 64
FIELD_OF_VIEW = 62.0  # degrees, of the whole picture
AMBIENT = 0.45


@dataclass
class Surface:
    """What is seen of a thing: its class, a picture `(h, w, 3)` in 0 to 1, and how many metres one side of it spans."""

    label: int
    texture: Array
    span: float = 1.0
    glow: float = 0.0  # how bright it is by itself


@dataclass
class Box:
    """A box turned about the vertical axis: centre, half extents, and the cosine and sine of the turn."""

    surface: Surface
    centre: Array
    half: Array
    turn: float = 0.0

    def hit(self, origin: Array, rays: Array) -> tuple[Array, Array, Array]:
        """Distances along the rays (infinite where missed), normals, and places on the surface."""
        turn = _turn(-self.turn)
        o, d = turn @ (origin - self.centre), rays @ turn.T
        with np.errstate(divide="ignore", invalid="ignore"):
            a, b = (-self.half - o) / d, (self.half - o) / d
        near, far = np.minimum(a, b), np.maximum(a, b)
        enters, leaves = near.max(1), far.min(1)
        t = np.where((enters < leaves) & (enters > 1e-3), enters, np.inf)
        axis = near.argmax(1)
        rows = np.arange(len(rays))
        normals = np.zeros_like(rays)
        normals[rows, axis] = -np.sign(d[rows, axis])
        places = o + np.where(np.isfinite(t), t, 0.0)[:, None] * d
        across = np.stack([places[rows, (axis + 1) % 3], places[rows, (axis + 2) % 3]], 1)
        return t, normals @ turn, across


@dataclass
class Ball:
    """A sphere."""

    surface: Surface
    centre: Array
    radius: float

    def hit(self, origin: Array, rays: Array) -> tuple[Array, Array, Array]:
        """As of a box."""
        o = origin - self.centre
        b = rays @ o
        under = b**2 - (o @ o - self.radius**2)
        t = np.where(under > 0, -b - np.sqrt(np.maximum(under, 0)), np.inf)
        t = np.where(t > 1e-3, t, np.inf)
        normals = (o + np.where(np.isfinite(t), t, 0.0)[:, None] * rays) / self.radius
        angles = np.stack([np.arctan2(normals[:, 1], normals[:, 0]), np.arcsin(np.clip(normals[:, 2], -1, 1))], 1)
        return t, normals, angles * self.radius


@dataclass
class Plane:
    """All points whose product with the normal is `offset`; the normal looks to where the camera is."""

    surface: Surface
    normal: Array
    offset: float

    def hit(self, origin: Array, rays: Array) -> tuple[Array, Array, Array]:
        """As of a box."""
        with np.errstate(divide="ignore", invalid="ignore"):
            t = (self.offset - origin @ self.normal) / (rays @ self.normal)
        t = np.where(t > 1e-3, t, np.inf)
        places = origin + np.where(np.isfinite(t), t, 0.0)[:, None] * rays
        axis = int(np.abs(self.normal).argmax())
        return t, np.broadcast_to(self.normal, rays.shape), places[:, [(axis + 1) % 3, (axis + 2) % 3]]


@dataclass
class Camera:
    """Where it stands, where it looks (about the vertical axis, and up), in radians."""

    place: Array
    pan: float
    tilt: float

    def axes(self) -> Array:
        """Right, down and forward, as rows."""
        forward = np.array(
            [np.cos(self.tilt) * np.cos(self.pan), np.cos(self.tilt) * np.sin(self.pan), np.sin(self.tilt)]
        )
        right = np.array([np.sin(self.pan), -np.cos(self.pan), 0.0])
        return np.stack([right, np.cross(forward, right), forward])


@dataclass
class Scene:
    """Things, a camera and a lamp."""

    things: list[Box | Ball | Plane]
    camera: Camera
    lamp: Array
    noise: float = 0.02
    seed: list[int] = field(default_factory=list)


def render(scene: Scene) -> dict[str, Array]:
    """`image` `(H, W, 3)` bytes, `label` `(H, W)`, `depth` along the view `(H, W)` in metres, `normal` `(H, W, 3)`.

    Normals are in the camera's axes: right, down, forward; a wall that faces the camera has (0, 0, -1).
    """
    axes = scene.camera.axes()
    reach = np.tan(np.radians(FIELD_OF_VIEW) / 2)
    at = (np.arange(SIZE) + 0.5) / SIZE * 2 - 1
    x, y = np.meshgrid(at * reach, at * reach)
    rays = np.stack([x, y, np.ones_like(x)], -1).reshape(-1, 3) @ axes
    lengths = np.linalg.norm(rays, axis=1)
    rays /= lengths[:, None]
    hits = [thing.hit(scene.camera.place, rays) for thing in scene.things]
    distances = np.stack([t for t, _, _ in hits])
    nearest, rows = distances.argmin(0), np.arange(len(rays))
    t = distances[nearest, rows]
    normals = np.stack([n for _, n, _ in hits])[nearest, rows]
    colours = np.zeros_like(rays)
    glow = np.zeros(len(rays))
    for number, (thing, (_, _, across)) in enumerate(zip(scene.things, hits, strict=True)):
        mine = nearest == number
        colours[mine] = _look_up(thing.surface, across[mine])
        glow[mine] = thing.surface.glow
    to_lamp = scene.lamp - (scene.camera.place + t[:, None] * rays)
    distance = np.linalg.norm(to_lamp, axis=1)
    lit = np.clip((normals * to_lamp).sum(1) / distance, 0, 1) * np.minimum(1.6, 4 / distance)
    light = np.maximum(AMBIENT + (1 - AMBIENT) * lit, glow)
    noise = np.random.default_rng([*scene.seed, 1]).normal(0, scene.noise, colours.shape)
    labels = np.array([thing.surface.label for thing in scene.things], np.int8)[nearest]
    square = (SIZE, SIZE)
    return {
        "image": (np.clip(colours * light[:, None] + noise, 0, 1) * 255).round().astype(np.uint8).reshape(*square, 3),
        "label": labels.reshape(square),
        "depth": (t / lengths).astype(np.float16).reshape(square),
        "normal": (normals @ axes.T).astype(np.float16).reshape(*square, 3),
    }


def _look_up(surface: Surface, across: Array) -> Array:
    height, width = surface.texture.shape[:2]
    u, v = (np.floor(across / surface.span * (width, height))).astype(int).T
    return surface.texture[v % height, u % width]


def _turn(angle: float) -> Array:
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1.0]])

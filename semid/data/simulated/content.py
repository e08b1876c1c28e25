"""Content of simulated items: titles, attributes, category paths, vectors, images."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int, UInt8

from semid.arrow import to_lists

TAXONOMY = {
    "Kitchen": {
        "Cookware": ("saucepan", "skillet", "wok", "casserole"),
        "Tableware": ("plate", "bowl", "mug", "pitcher"),
        "Storage": ("jar", "tin", "bread box", "spice rack"),
        "Tools": ("whisk", "ladle", "grater", "peeler"),
    },
    "Garden": {
        "Plant care": ("watering can", "flower pot", "trellis", "mister"),
        "Hand tools": ("trowel", "pruner", "rake", "hoe"),
        "Outdoor living": ("lantern", "hammock", "bench", "parasol"),
        "Wildlife": ("bird feeder", "nest box", "bee house", "bird bath"),
    },
    "Office": {
        "Writing": ("fountain pen", "pencil", "marker", "notebook"),
        "Desk": ("desk lamp", "letter tray", "pen holder", "desk mat"),
        "Filing": ("folder", "binder", "index box", "clipboard"),
        "Seating": ("office chair", "stool", "footrest", "back cushion"),
    },
    "Sports": {
        "Climbing": ("harness", "chalk bag", "rope", "carabiner"),
        "Cycling": ("saddle", "bicycle bell", "pannier", "bottle cage"),
        "Water": ("paddle", "goggles", "dry bag", "float"),
        "Fitness": ("kettlebell", "yoga mat", "jump rope", "foam roller"),
    },
    "Music": {
        "Strings": ("ukulele", "guitar strap", "violin bow", "capo"),
        "Percussion": ("tambourine", "cajon", "drumstick", "shaker"),
        "Keys": ("keyboard stand", "piano lamp", "pedal", "melodica"),
        "Practice": ("metronome", "music stand", "tuner", "ear plugs"),
    },
    "Beauty": {
        "Skin": ("face cream", "cleanser", "serum", "soap"),
        "Hair": ("shampoo", "hair brush", "comb", "hair oil"),
        "Bath": ("bath salt", "sponge", "towel", "bath robe"),
        "Nails": ("nail file", "nail polish", "nail clipper", "cuticle oil"),
    },
}
MATERIALS = (
    "oak",
    "steel",
    "linen",
    "bamboo",
    "ceramic",
    "leather",
    "glass",
    "cork",
    "copper",
    "wool",
    "stone",
    "cotton",
)
COLORS = ("green", "white", "blue", "black", "red", "grey", "yellow", "brown", "orange", "violet", "pink", "silver")
ADJECTIVES = (
    "rustic",
    "classic",
    "sturdy",
    "modern",
    "slim",
    "bold",
    "gentle",
    "playful",
    "compact",
    "fine",
    "quiet",
    "light",
)
BRANDS = tuple(
    start + end
    for end in ("wick", "orn", "usk", "ado", "imble", "ath", "eld", "ovane")
    for start in ("Brun", "Quil", "Tarv", "Osk", "Fenn", "Mirr", "Dalv", "Yost", "Plem", "Skar")
)
FAVOURITES = 3  # words of a pool that a taxonomy node prefers
WORD_NOISE = 0.2  # probability of a random word of the pool instead
VARIANT_NOISE = 0.3  # standard deviation of variants of a product, relative to that between products


def item_table(
    cell: Int[np.ndarray, " items"],
    appeal: Float[np.ndarray, " items"],
    family: Int[np.ndarray, " items"],
    *,
    taxonomy: tuple[int, int, int],
    styles: int,
    dim: int,
    noise: float,
    images: bool,
    rng: np.random.Generator,
) -> pa.Table:
    """Items table from each item's cell (kind x style), appeal (log popularity, partly visible in the content) and
    family.

    A family is one product: its items share cell and appeal, and differ only in the number of their shade and noise.
    """
    words_rng, vector_rng, image_rng, variant_rng = rng.spawn(4)
    rows, product = _products(family)
    levels = _levels(cell[rows], taxonomy, styles)
    columns = {"item_id": numbered_ids("i", len(cell)), **_words(levels, product, taxonomy, words_rng)}
    vectors = _vectors(levels, appeal[rows], dim=dim, noise=noise, rng=vector_rng)
    columns["content"] = to_lists(vectors[product] + np.float32(noise) * _own_noise(product, dim, variant_rng))
    if images:
        places = image_rng.uniform(-1, 1, (len(rows), 3))[product] + _own_noise(product, 3, variant_rng)
        columns["image"] = pa.array(
            _images({name: node[product] for name, node in levels.items()}, places), pa.binary()
        )
    return pa.table(columns)


def _products(family: Int[np.ndarray, " items"]) -> tuple[Int[np.ndarray, " products"], Int[np.ndarray, " items"]]:
    """First item row of each family, ascending, and the index into these for each item: its product."""
    _, first, number = np.unique(family, return_index=True, return_inverse=True)
    return np.sort(first), np.argsort(np.argsort(first))[number]


def _own_noise(
    product: Int[np.ndarray, " items"], dim: int, rng: np.random.Generator
) -> Float[np.ndarray, "items dim"]:
    """Noise that distinguishes the variants of a product; zero for the only item of a product."""
    several = np.bincount(product)[product] > 1
    return rng.standard_normal((len(product), dim), np.float32) * (np.float32(VARIANT_NOISE) * several[:, None])


def numbered_ids(prefix: str, count: int) -> pa.Array:
    """External ids: the prefix and a number of at least 7 digits."""
    return pc.binary_join_element_wise(prefix, pc.utf8_lpad(pa.array(np.arange(count)).cast(pa.string()), 7, "0"), "")


def _levels(cell: np.ndarray, taxonomy: tuple[int, int, int], styles: int) -> dict[str, Int[np.ndarray, " products"]]:
    """Taxonomy node of each product on every level, numbered across the level."""
    kind = cell // styles
    category = kind // taxonomy[2]
    return {"department": category // taxonomy[1], "category": category, "kind": kind, "style": cell % styles}


def _words(
    levels: dict[str, np.ndarray], product: np.ndarray, taxonomy: tuple[int, int, int], rng: np.random.Generator
) -> dict[str, pa.Array]:
    paths = _paths(taxonomy)
    kind = pa.array([path[-1] for path in paths]).take(pa.array(levels["kind"]))
    category = pa.array([" > ".join(path) for path in paths]).take(pa.array(levels["kind"]))
    num_styles = int(levels["style"].max()) + 1
    brand = _pick(BRANDS, levels["department"] * num_styles + levels["style"], rng)
    adjective = _pick(ADJECTIVES, levels["style"], rng)
    material = _pick(MATERIALS, levels["category"], rng)
    color = _pick(COLORS, levels["style"], rng)
    model = pa.array(rng.integers(100, 1000, len(kind))).cast(pa.string())
    title = pc.binary_join_element_wise(brand, adjective, material, kind, model, " ")
    description = pc.binary_join_element_wise("A", adjective, kind, "made of", material, "in", color, "by", brand, " ")
    words = {"title": title, "brand": brand, "color": color, "material": material, "category": category}
    items = {name: column.take(pa.array(product)) for name, column in words.items()}
    items["title"] = pc.binary_join_element_wise(items["title"], _shades(product), "")
    description = description.take(pa.array(product))
    return items | {"text": pc.binary_join_element_wise(items["title"], items["category"], description, ". ")}


def _shades(product: Int[np.ndarray, " items"]) -> pa.Array:
    """Suffix of each item's title: its number among the product's variants; empty for an only item."""
    order = np.argsort(product, kind="stable")
    number = np.empty(len(product), np.int64)
    number[order] = 1 + np.arange(len(product)) - np.searchsorted(product[order], product[order])
    shade = pc.binary_join_element_wise(", shade ", pa.array(number).cast(pa.string()), "")
    return pc.if_else(pa.array(np.bincount(product)[product] > 1), shade, "")


def _paths(taxonomy: tuple[int, int, int]) -> list[tuple[str, str, str]]:
    """Names of department, category and kind, for every kind."""
    departments, categories, kinds = taxonomy
    paths = []
    for d in range(departments):
        department = list(TAXONOMY.values())[d % len(TAXONOMY)]
        for c in range(categories):
            nouns = list(department.values())[c % len(department)]
            names = _name(tuple(TAXONOMY), d), _name(tuple(department), c)
            paths += [(*names, _name(nouns, k)) for k in range(kinds)]
    return paths


def _name(words: tuple[str, ...], index: int) -> str:
    """The word at `index`; beyond the end, words repeat with a number."""
    series = index // len(words)
    return words[index % len(words)] + (f" {series + 1}" if series else "")


def _pick(pool: tuple[str, ...], group: Int[np.ndarray, " n"], rng: np.random.Generator) -> pa.Array:
    """A word for each product, mostly one of the few that its group favours."""
    index = group * FAVOURITES + rng.integers(FAVOURITES, size=len(group))
    noisy = rng.random(len(group)) < WORD_NOISE
    index[noisy] = rng.integers(len(pool), size=noisy.sum())
    return pa.array(pool).take(pa.array(index % len(pool)))


def _vectors(
    levels: dict[str, np.ndarray], appeal: np.ndarray, *, dim: int, noise: float, rng: np.random.Generator
) -> Float[np.ndarray, "products dim"]:
    """Vectors like a text encoder's: a sum of parts for each taxonomy node, the appeal, and the product's own noise."""
    vectors = rng.standard_normal((len(appeal), dim), np.float32) * np.float32(noise)
    for name, scale in (("department", 1.0), ("category", 0.8), ("kind", 0.8), ("style", 0.6)):
        parts = rng.standard_normal((int(levels[name].max()) + 1, dim), np.float32) * np.float32(scale)
        vectors += parts[levels[name]]
    centered = (appeal - appeal.mean()) / max(appeal.std(), 1e-9)
    direction = rng.standard_normal(dim, np.float32) * np.float32(0.4)
    vectors += centered.astype(np.float32)[:, None] * direction[None]
    return vectors


def _images(levels: dict[str, np.ndarray], noise: Float[np.ndarray, "items 3"], size: int = 32) -> list[bytes]:
    """PNGs: lobes show department, color category, stripes kind, background style; `noise` shifts and rotates them."""
    rows = zip(*(levels[name].tolist() for name in ("department", "category", "kind", "style")), noise, strict=True)
    return [_png(_pixels(*row, size=size)) for row in rows]


def _pixels(
    department: int, category: int, kind: int, style: int, noise: np.ndarray, *, size: int
) -> UInt8[np.ndarray, "size size 3"]:
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    x, y = x + 0.15 * noise[0], y + 0.15 * noise[1]
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    inside = radius < 0.6 + 0.2 * np.cos((department + 2) * angle + 0.5 * noise[2])
    stripes = 0.75 + 0.25 * np.sign(np.sin((3 + 3 * (kind % 4)) * x))
    # Hues a golden section apart stay distinct however many categories there are.
    hue = 2 * np.pi * (0.618034 * category + np.array([0, 1 / 3, 2 / 3]))
    color = 140 + 100 * np.cos(hue)
    background = 245 - 200 * (style % 2) - 25 * (style // 2 % 4)
    return np.where(inside[..., None], stripes[..., None] * color, background).astype(np.uint8)


def _png(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()

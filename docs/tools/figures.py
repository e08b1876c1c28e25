"""Figures of the pages, each computed on a tiny example: `python docs/tools/figures.py` writes them as SVG."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import jax
import jax.numpy as jnp
import numpy as np

from quantizers import ResidualKMeans, health, kmeans, nearest
from semid.data.simulated import EVENTS, Events, SimulatedConfig, simulate
from semid.encoders import with_text_vectors
from semid.recommender import encode_texts
from seq_models import CodeTrie

FOLDER = Path(__file__).parents[1] / "concepts" / "figures"
COLORS = ("#4a7fb5", "#d1495b", "#4f9257", "#c98a1b", "#7b5ea7", "#3a9c9c", "#8a6d5a", "#6b7684")
INK, PALE = "#3c4856", "#c9d1da"


class Drawing:
    """An SVG of shapes in pixels, on a white card, so that it shows on dark pages too."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def line(self, start: Sequence[float], end: Sequence[float], color: str = PALE, width: float = 1.5) -> None:
        (x1, y1), (x2, y2) = start, end
        place = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
        self.parts.append(f'<line {place} stroke="{color}" stroke-width="{width}"/>')

    def dot(self, at: Sequence[float], color: str, radius: float = 4) -> None:
        self.parts.append(f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{radius}" fill="{color}"/>')

    def bar(self, x: float, bottom: float, width: float, height: float, color: str) -> None:
        place = f'x="{x:.1f}" y="{bottom - height:.1f}" width="{width:.1f}" height="{height:.1f}"'
        self.parts.append(f'<rect {place} rx="1.5" fill="{color}"/>')

    def text(
        self, at: Sequence[float], words: str, *, color: str = INK, anchor: str = "middle", size: int = 13
    ) -> None:
        place = f'x="{at[0]:.1f}" y="{at[1]:.1f}" text-anchor="{anchor}" font-size="{size}"'
        self.parts.append(f'<text {place} fill="{color}">{escape(words)}</text>')

    def curve(self, points: Iterable[Sequence[float]], color: str) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')

    def svg(self) -> str:
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" role="img"'
        font = ' font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">'
        card = '<rect width="100%" height="100%" rx="8" fill="#ffffff"/>'
        return "\n".join([head + font, f"<title>{escape(self.title)}</title>", card, *self.parts, "</svg>"]) + "\n"


def _clusters(rng: np.random.Generator) -> np.ndarray:
    """90 items in the plane: three kinds with three variants each."""
    kinds = 3.0 * np.array([[0, 1], [0.95, -0.6], [-0.95, -0.6]])
    variants = 0.85 * np.array([[0.2, 1], [0.9, -0.5], [-1, -0.4]])
    centers = (kinds[:, None] + variants[None]).reshape(-1, 2)
    return (centers[np.arange(90) % 9] + 0.18 * rng.normal(size=(90, 2))).astype(np.float32)


def _at(points: np.ndarray, *, left: float, size: float = 300, top: float = 34, reach: float = 4.4) -> np.ndarray:
    """Places in a square panel for points of the plane."""
    return np.stack([left + size * (points[:, 0] / reach + 1) / 2, top + size * (1 - points[:, 1] / reach) / 2], axis=1)


def _codes(points: np.ndarray) -> tuple[ResidualKMeans, np.ndarray]:
    quantizer = ResidualKMeans.fit(jnp.asarray(points), level_sizes=(3, 3), iterations=25, key=jax.random.key(1))
    return quantizer, np.asarray(quantizer.encode(jnp.asarray(points)))


def semantic_ids() -> Drawing:
    """Items of a plane by first code (color) and second (panel on the right)."""
    points = _clusters(np.random.default_rng(0))
    quantizer, codes = _codes(points)
    drawing = Drawing(680, 350, "Items in the plane with a first and a second code")
    residuals = points - np.asarray(quantizer.codebooks[0])[codes[:, 0]]
    for name, where, panel in (
        ("first code: which region", _at(points, left=20), 20),
        ("second code: where in its region", _at(residuals, left=360, reach=1.8), 360),
    ):
        level = int(panel > 20)
        drawing.text((panel + 150, 22), name, size=14)
        for place, code in zip(where, codes[:, level], strict=True):
            drawing.dot(place, COLORS[3 * level + code])
    for group in np.unique(codes, axis=0):
        place = _at(points[(codes == group).all(1)].mean(0, keepdims=True), left=20)[0]
        drawing.text(place - (0, 12), f"({group[0]}, {group[1]})", size=12)
    return drawing


def residual_quantization() -> Drawing:
    """One vector approximated level by level, and the remaining error."""
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(2_000, 2)).astype(np.float32)
    sizes = (8, 8, 8)
    quantizer = ResidualKMeans.fit(jnp.asarray(vectors), level_sizes=sizes, iterations=25, key=jax.random.key(0))
    one = np.array([[1.35, 0.75]], np.float32)
    codes = np.asarray(quantizer.encode(jnp.asarray(one)))[0]
    drawing = Drawing(
        680, 350, "A vector as a sum of one codebook vector per level; the error falls from level to level"
    )
    drawing.text((170, 22), "one vector, three levels", size=14)
    for place in _at(np.asarray(quantizer.codebooks[0]), left=20, reach=2.6):
        drawing.dot(place, PALE, 6)
    reached = np.zeros(2)
    for level, code in enumerate(codes):
        end = reached + np.asarray(quantizer.codebooks[level])[code]
        drawing.line(*_at(np.stack([reached, end]), left=20, reach=2.6), color=COLORS[level], width=3)
        reached = end
    (target,) = _at(one, left=20, reach=2.6)
    drawing.dot(target, INK, 5)
    drawing.text(target - (0, 12), f"codes {tuple(int(code) for code in codes)}")
    drawing.text((520, 22), "remaining mean squared error", size=14)
    rest = jnp.asarray(vectors)
    for level in range(-1, len(sizes)):
        if level >= 0:
            book = quantizer.codebooks[level]
            rest = rest - book[nearest(rest, book)]
        error = float(jnp.mean(rest**2))
        x = 380 + 72 * (level + 1)
        drawing.bar(x, 310, 48, max(250 * error, 1.5), COLORS[level] if level >= 0 else PALE)
        drawing.text((x + 24, 302 - 250 * error), f"{error:.3f}", size=12)
        drawing.text((x + 24, 330), f"{level + 1} levels" if level != 0 else "1 level", size=12)
    return drawing


def collapse() -> Drawing:
    """Items per code with codebooks drawn at random and codebooks fitted to the vectors."""
    rng = np.random.default_rng(0)
    vectors = jnp.asarray(rng.normal(size=(12, 8))[np.arange(1_200) % 12] + 0.35 * rng.normal(size=(1_200, 8)))
    vectors = vectors.astype(jnp.float32)
    books = {
        "codebook drawn at random": jnp.asarray(2 * rng.normal(size=(32, 8)), jnp.float32),
        "codebook fitted by k-means": kmeans(vectors, num_codes=32, iterations=25, key=jax.random.key(0)).centroids,
    }
    drawing = Drawing(680, 270, "Items per code, sorted: a random codebook uses few codes, a fitted one all")
    for panel, (name, book) in enumerate(books.items()):
        codes = np.asarray(nearest(vectors, book))[:, None]
        level, left = health(codes, (32,)).levels[0], 20 + 340 * panel
        drawing.text((left + 150, 22), name, size=14)
        drawing.text((left + 150, 42), f"perplexity {level.perplexity:.1f} of 32, {level.dead} codes unused", size=12)
        counts = np.sort(np.bincount(codes[:, 0], minlength=32))[::-1]
        for place, count in enumerate(counts):
            drawing.bar(left + 9.4 * place, 240, 7, 180 * count / 640, COLORS[1 - panel])
        drawing.line((left, 240), (left + 300, 240))
    return drawing


def alignment() -> Drawing:
    """First codes of content alone and of content with what users take together."""
    rng = np.random.default_rng(0)
    content = rng.uniform(-1, 1, size=(60, 2)).astype(np.float32)
    behavior = (content[:, 1] > 0) ^ (rng.random(60) < 0.1)  # users follow what is up and what is down
    pairs = [(a, b) for a in range(60) for b in rng.choice(60, 3) if a < b and behavior[a] == behavior[b]]
    aligned = np.column_stack([content, 2.0 * (2.0 * behavior - 1)]).astype(np.float32)
    drawing = Drawing(
        680, 350, "Lines join items that users take together; aligned codes keep more of them in one group"
    )
    for panel, (name, vectors) in enumerate({"content alone": content, "content and users": aligned}.items()):
        book = kmeans(jnp.asarray(vectors), num_codes=4, iterations=25, key=jax.random.key(0)).centroids
        codes = np.asarray(nearest(jnp.asarray(vectors), book))
        share = np.mean([codes[a] == codes[b] for a, b in pairs])
        left = 20 + 340 * panel
        drawing.text((left + 150, 22), f"{name}: {share:.0%} of pairs share a code", size=14)
        places = _at(content, left=left, reach=1.05)
        for a, b in pairs:
            drawing.line(places[a], places[b], color=COLORS[codes[a]] if codes[a] == codes[b] else "#e8ebef", width=0.8)
        for place, code in zip(places, codes, strict=True):
            drawing.dot(place, COLORS[code])
    return drawing


def trie() -> Drawing:
    """A trie of six items, the probabilities of its nodes, and what a beam of two keeps."""
    codes = np.array([[0, 0, 1], [0, 2, 0], [0, 2, 3], [1, 1, 0], [1, 3, 2], [3, 0, 0]])
    logits = np.random.default_rng(7).normal(size=(3, 3, 4))
    tree = CodeTrie.from_codes(codes, level_sizes=(4, 4, 4))
    assert tree.num_items == len(codes)
    mass: dict[tuple[int, ...], float] = {(): 1.0}
    for level in range(3):
        for prefix in sorted({tuple(row[: level + 1]) for row in codes.tolist()}):
            siblings = sorted({row[level] for row in codes.tolist() if tuple(row[:level]) == prefix[:-1]})
            weights = np.exp(logits[level, sum(prefix[:-1]) % 3])
            mass[prefix] = mass[prefix[:-1]] * weights[prefix[-1]] / weights[siblings].sum()
    beam, chosen = {()}, {()}
    for level in range(1, 4):
        below = [node for node in mass if len(node) == level and node[:-1] in beam]
        beam = set(sorted(below, key=lambda node: -mass[node])[:2])
        chosen |= beam
    drawing = Drawing(
        680, 330, "A prefix tree of six items with probabilities; a beam of two keeps two nodes per level"
    )
    leaves = [tuple(row) for row in codes.tolist()]

    def place(node: tuple[int, ...]) -> np.ndarray:
        below = [index for index, leaf in enumerate(leaves) if leaf[: len(node)] == node]
        return np.array([90 + 100 * np.mean(below), 40 + 75 * len(node)])

    for node in mass:
        if node:
            color = COLORS[0] if node in chosen else PALE
            drawing.line(place(node[:-1]), place(node), color=color, width=3 if node in chosen else 1.5)
    for node, share in mass.items():
        drawing.dot(place(node), COLORS[0] if node in chosen else PALE, 7)
        if node:
            drawing.text(place(node) + np.array([12, 4]), f"{node[-1]}  p {share:.2f}", anchor="start", size=12)
    for index, leaf in enumerate(leaves):
        drawing.text(place(leaf) + np.array([0, 30]), f"item {index}", size=12)
    return drawing


def mixing() -> Drawing:
    """A model's distribution over items, a graph's, and their mixture."""
    rng = np.random.default_rng(4)
    model = np.exp(rng.normal(size=10))
    counts = np.array([0, 0, 1, 0, 6, 0, 0, 0, 3, 0.0])
    model, graph = model / model.sum(), counts / counts.sum()
    drawing = Drawing(680, 260, "Probabilities of ten items: the model's, the graph's, the mixture with weight 0.3")
    rows = {"model": model, "graph": graph, "0.7 model + 0.3 graph": 0.7 * model + 0.3 * graph}
    for panel, (name, shares) in enumerate(rows.items()):
        left = 20 + 226 * panel
        drawing.text((left + 97, 24), name, size=14)
        for item, share in enumerate(shares):
            drawing.bar(left + 19.5 * item, 215, 15, 165 * share / 0.65, COLORS[(0, 3, 2)[panel]])
            drawing.text((left + 19.5 * item + 7.5, 232), str(item), size=11)
        drawing.line((left, 215), (left + 195, 215))
    return drawing


def memory_bank() -> Drawing:
    """Agreement of stored and fresh vectors while the encoder changes, for frequent and rare items."""
    rng = np.random.default_rng(0)
    items, steps, dim = 200, 400, 16
    content, encoder = rng.normal(size=(items, dim)), rng.normal(size=(dim, dim))
    share = 1 / np.arange(1, items + 1)
    groups = {"20 most frequent items": slice(0, 20), "100 rarest items": slice(100, None)}
    agreed: dict[str, list[float]] = {name: [] for name in groups}
    stored = np.asarray(content @ encoder)
    for step in range(steps):
        encoder = encoder + (0.12 * 0.99**step) * rng.normal(size=(dim, dim))
        targets = rng.choice(items, 16, p=share / share.sum())
        fresh = content @ encoder
        stored[targets] = fresh[targets]
        cosine = (stored * fresh).sum(1) / np.linalg.norm(stored, axis=1) / np.linalg.norm(fresh, axis=1)
        for name, rows in groups.items():
            agreed[name].append(float(cosine[rows].mean()))
    drawing = Drawing(680, 290, "Cosine of stored and fresh item vectors over training steps")
    drawing.text((340, 22), "cosine of the stored vector with a fresh one", size=14)
    for level in (0.8, 0.9, 1.0):
        y = 250 - 200 * (level - 0.78) / 0.22
        drawing.line((60, y), (650, y), width=1)
        drawing.text((52, y + 4), f"{level:.2f}", anchor="end", size=12)
    for index, (name, values) in enumerate(agreed.items()):
        drawing.curve(
            [(60 + 590 * t / steps, 250 - 200 * (v - 0.78) / 0.22) for t, v in enumerate(values)], COLORS[index]
        )
        drawing.text((640, 225 - 22 * index), name, color=COLORS[index], anchor="end")
    drawing.text((355, 276), f"{steps} steps of 16 targets; the encoder's steps become smaller", size=12)
    return drawing


def sampled_negatives() -> Drawing:
    """Recall@10 of two models against the whole catalogue and against 100 sampled items."""
    rng = np.random.default_rng(0)
    items, users = 10_000, 20_000
    sharp = np.where(rng.random(users) < 0.2, rng.integers(1, 11, users), rng.integers(1, items, users))
    blunt = rng.integers(20, 400, users)
    drawing = Drawing(680, 290, "Recall@10 of two models: the order against all items is reversed by sampled negatives")
    for panel, name in enumerate(("against all 10,000 items", "against 100 sampled items")):
        left = 60 + 330 * panel
        drawing.text((left + 110, 24), name, size=14)
        for index, (model, ranks) in enumerate({"model A": sharp, "model B": blunt}.items()):
            places = ranks if panel == 0 else 1 + rng.binomial(100, (ranks - 1) / (items - 1))
            recall = float(np.mean(places <= 10))
            drawing.bar(left + 120 * index + 15, 245, 70, max(190 * recall, 1.5), COLORS[index])
            drawing.text((left + 120 * index + 50, 237 - 190 * recall), f"{recall:.2f}", size=13)
            drawing.text((left + 120 * index + 50, 266), model, size=12)
        drawing.line((left, 245), (left + 220, 245))
    return drawing


def asking() -> Drawing:
    """Events of users of a simulated shop on the oracle's ten likeliest items, for each condition on the event."""
    world = SimulatedConfig(num_items=200, num_users=200, taxonomy=(2, 2, 2), images=False, events=Events())
    simulation = simulate(world)
    histories = simulation.dataset.splits.test.histories
    drawing = Drawing(680, 290, "Lists conditioned on clicks and on purchases are clicked and bought more")
    for panel, event in enumerate((None, "click", "buy")):
        left = 20 + 220 * panel
        ranked = simulation.oracle.rank(histories, k=10, condition={} if event is None else {"event": event})
        shares = simulation.oracle.event_probabilities(histories, ranked).mean(axis=(0, 1))
        drawing.text((left + 105, 24), "no condition" if event is None else f"condition: {event}", size=14)
        for index, (name, share) in enumerate(zip(EVENTS, shares, strict=True)):
            drawing.bar(left + 64 * index + 15, 245, 50, max(190 * share, 1.5), COLORS[index])
            drawing.text((left + 64 * index + 40, 237 - 190 * share), f"{share:.2f}", size=13)
            drawing.text((left + 64 * index + 40, 266), name, size=12)
        drawing.line((left + 5, 245), (left + 205, 245))
    return drawing


def words() -> Drawing:
    """Items of a simulated shop by their text vectors, in their two principal directions, and words of requests."""
    world = SimulatedConfig(num_items=200, num_users=20, taxonomy=(2, 2, 2), images=False)
    items = with_text_vectors(simulate(world).dataset, dim=8)
    asked = ("kitchen", "garden", "cookware", "tableware", "hand tools", "plant care")
    vectors = items.vectors("text_lsa")
    center, axes = vectors.mean(axis=0), np.linalg.svd(vectors - vectors.mean(axis=0))[2][:2]
    points, places = ((x - center) @ axes.T for x in (vectors, encode_texts(items.encoders[-1], asked)))
    sections = [path.split(" > ")[1] for path in items.items["category"].to_pylist()]
    drawing = Drawing(680, 350, "Items by their texts, and the places of words among them")
    reach = 1.1 * np.abs(np.concatenate([points, places])).max()
    for at, section in zip(_at(points, left=190, reach=reach), sections, strict=True):
        drawing.dot(at, COLORS[sorted(set(sections)).index(section)])
    for at, word in zip(_at(places, left=190, reach=reach), asked, strict=True):
        drawing.text(at, word, size=15)
    return drawing


def encoders() -> Drawing:
    """Recall@10 on Beauty, from the table of results, of encoders that are frozen or trained by a contrast, by the
    recommendation loss, or by both; alone (with the interval of the paired difference to frozen) and mixed with the
    item graph."""
    rows = {
        row["row"]: row for row in json.loads((FOLDER.parents[1] / "results.json").read_text(encoding="utf-8"))["rows"]
    }
    arms = [name for name in rows if name.startswith("encoders.") and not name.endswith("graph")]
    recall = {name: np.mean(row["values"]["included"]["recall@10"]) for name, row in rows.items()}
    drawing = Drawing(680, 100 + 46 * len(arms), "Recall@10 of encoders trained in several ways")

    def at(value: float) -> float:
        return 300 + 350 * value / 0.125

    for words, value, color in (("alone", 0.03, COLORS[0]), ("with the item graph", 0.11, COLORS[1])):
        drawing.text((at(value), 24), words, color=color)

    for place, name in enumerate(arms):
        y = 70 + 46 * place
        drawing.text((20, y + 5), rows[name]["title"], anchor="start")
        drawing.line((at(0), y), (at(0.125), y), width=1)
        if (paired := rows[name]["difference"]) is not None:
            low, high = (at(recall[name] + paired[end] - paired["mean"]) for end in ("low", "high"))
            drawing.line((low, y), (high, y), COLORS[0], 4)
        for variant, color in ((name, COLORS[0]), (f"{name} + graph", COLORS[1])):
            drawing.dot((at(recall[variant]), y), color, 5)
            drawing.text((at(recall[variant]), y - 10), f"{recall[variant]:.4f}".removeprefix("0"), size=12)
    for value in (0, 0.025, 0.05, 0.075, 0.1, 0.125):
        drawing.text((at(value), 86 + 46 * len(arms)), f"{value:.3f}".removeprefix("0"), size=12)
    return drawing


FIGURES: dict[str, Callable[[], Drawing]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        semantic_ids,
        residual_quantization,
        collapse,
        alignment,
        trie,
        mixing,
        memory_bank,
        sampled_negatives,
        asking,
        words,
        encoders,
    )
}


def main() -> None:
    """Write all figures."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()

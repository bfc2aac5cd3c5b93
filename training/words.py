"""What people say of the small world's scenes: captions for training, prompts as users of MoMA write them."""

import colorsys
import random

from .world import Colour, Scene, Subject

SYNONYMS = {
    "cup": ("cup", "cup", "mug"),
    "car": ("car", "car", "automobile"),
    "house": ("house", "house", "cottage"),
    "robot": ("robot", "robot", "android"),
    "boat": ("boat", "boat", "sailboat"),
    "fish": ("fish",),
    "bag": ("bag", "bag", "handbag"),
    "hat": ("hat", "hat", "top hat"),
}
"""Words for each class; the first is what the class is called."""

PLACE_WORDS = {
    "beach": ("on a beach", "on the beach", "at the seaside", "on sand by the sea"),
    "snow": ("in the snow", "in a snowy landscape", "on snow", "in winter snow"),
    "forest": ("in a forest", "in the woods", "among trees", "in a dark forest"),
    "city": ("in a city at night", "in a night city", "in front of a city skyline at night", "in the city"),
    "desert": ("in the desert", "in a desert", "on desert sand", "among desert dunes"),
    "water": ("under water", "underwater", "under the sea", "deep in the ocean"),
    "moon": ("on the moon", "on the surface of the moon", "on the lunar surface", "in space on the moon"),
    "meadow": ("in a meadow", "on a flower meadow", "among flowers", "on green grass with flowers"),
}
_PAPER = ("on white paper", "on a white background", "isolated on white")
MATERIAL_WORDS = {
    "wood": ("made of wood", "carved from wood", "wooden"),
    "gold": ("made of gold", "cast in gold", "golden"),
    "ice": ("made of ice", "carved from ice", "icy"),
    "stone": ("made of stone", "carved from stone", "stone"),
    "grass": ("made of grass", "covered with grass", "grassy"),
}
_PATTERNS = {"stripes": "stripes", "bars": "bars", "dots": "dots", "check": "checks"}
_HUES = (("red", 0.0), ("orange", 0.08), ("yellow", 0.16), ("green", 0.33), ("cyan", 0.5), ("blue", 0.63))
_MORE_HUES = (*_HUES, ("purple", 0.77), ("pink", 0.9), ("red", 1.0))

SHAPE_WORDS = {
    "cup": (("tapered", "straight"), ("high-handled", "low-handled")),
    "car": (("upright", "sloping"), ("low-roofed", "high-roofed")),
    "house": (("low-roofed", "high-roofed"), ("pointed", "wide-ridged")),
    "robot": (("small-headed", "large-headed"), ("short-armed", "long-armed")),
    "boat": (("narrow-sailed", "wide-sailed"), ("narrow-hulled", "wide-hulled")),
    "fish": (("small-tailed", "large-tailed"), ("slim", "round")),
    "bag": (("narrow-topped", "wide-topped"), ("high-handled", "low-handled")),
    "hat": (("low-crowned", "high-crowned"), ("narrow-topped", "wide-topped")),
}
"""For both numbers of a class's shape: what it is called near 0 and near 1."""
_MEDIUM = 0.15
"""How far from its middle a number of the shape is before it is said."""
_SHAPED_SHARE, _LOOK_SHARE = 0.4, 0.25
"""Of the captions: so many tell of the shape, and so many of the colours and the pattern of what is of no material."""


def caption(scene: Scene, rng: random.Random, shaped_share: float = _SHAPED_SHARE) -> str:
    """One of the many ways to say what is seen.

    Half of them have the form in which MoMA's nodes encode a prompt, `photo of a {word}. {prompt}`; a few are the bare
    word, as for the reference; some name the shape, colours and pattern.
    """
    word = rng.choice(SYNONYMS[scene.subject.name])
    way = rng.random()
    if way < 0.06:
        return word
    told = prompt(word, scene.place, scene.material, rng, _look(scene, rng, shaped_share))
    return f"photo of a {word}. {told}" if way < 0.6 else told


def _look(scene: Scene, rng: random.Random, shaped_share: float) -> tuple[str, str]:
    """What a caption says of a subject's look before and after the word for it, by chance; see `prompt`."""
    before, after = "", ""
    if scene.material is None and rng.random() < _LOOK_SHARE:
        before, after = described(scene.subject)
    if rng.random() < shaped_share:
        before = shaped(scene.subject) + before
    return before, after


def prompt(
    word: str, place: str | None, material: str | None, rng: random.Random, look: tuple[str, str] = ("", "")
) -> str:
    """A sentence such as `A cup made of wood on the beach.`

    Args:
        look: What stands before and after the word where the subject's look is told, see `shaped` and `described`.
    """
    before, after = look
    made = rng.choice(MATERIAL_WORDS[material]) if material else ""
    if material and " " not in made:
        before, made = f"{made} {before}", ""
    article = rng.choice(("a", "a", "the", "this")) if not before else "an" if before[0] in "aeiou" else "a"
    where = rng.choice(_PAPER if place is None else PLACE_WORDS[place])
    where = "" if place is None and rng.random() < 0.5 else " " + where
    thing = f"{article} {before}{word}{' ' + made if made else ''}{after}{where}"
    opening = rng.choice(("", "", "", "a photo of ", "a picture of "))
    return (opening + thing)[0].upper() + (opening + thing)[1:] + rng.choice((".", ".", ""))


def shaped(subject: Subject) -> str:
    """Words for a subject's shape, for before the word for it: `"low-crowned wide-topped "`; none for what is medium.

    They stand before the word as in CLIP's text encoder a token knows only of those before it, and the UNet attends to
    the word all over the thing.
    """
    said = zip(subject.shape, SHAPE_WORDS[subject.name], strict=True)
    return "".join(f"{words[value > 0.5]} " for value, words in said if abs(value - 0.5) > _MEDIUM)


def described(subject: Subject) -> tuple[str, str]:
    """Words for a subject's look, before and after the word for it: `("red ", " with white dots")`."""
    body, mark, _ = subject.colours
    pattern = _PATTERNS.get(subject.pattern)
    return f"{colour_name(body)} ", f" with {colour_name(mark)} {pattern}" if pattern else ""


def colour_name(colour: Colour) -> str:
    """The nearest of a dozen words."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(part / 255 for part in colour))
    if saturation < 0.25:
        return "white" if value > 0.6 else "black"
    return min(_MORE_HUES, key=lambda named: abs(named[1] - hue))[0]

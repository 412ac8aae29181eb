"""Scenes for prompts about a user's own subject, with which a first run is trained, validated and tested."""

TRAIN = (
    "on a beach at sunset", "in deep snow", "on a wooden kitchen table", "in a forest in autumn", "on a cobbled street",
    "in front of a red brick wall", "on a white marble shelf", "in a field of lavender", "beside a camp fire at night",
    "under water among corals", "on the moon", "in a rainy city with neon lights", "as an oil painting",
    "as a pencil drawing", "in the style of a woodcut", "made of glass", "made of knitted wool", "on a picnic blanket",
    "in a library full of old books", "floating in a swimming pool", "on a train's window seat", "in a greenhouse",
    "on a rooftop above a city", "in a desert under a blue sky",
)  # fmt: skip
VALIDATION = (
    "on a mountain top in the clouds", "in a shop window at Christmas", "as a watercolor", "in tall grass after rain",
    "on a stack of newspapers", "made of carved wood", "in a cave lit by candles", "on a harbor wall beside boats",
)  # fmt: skip
TEST = (
    "in a bamboo grove", "on a stage in a spotlight", "as a stained-glass window", "beside a frozen waterfall",
    "in a bakery among loaves", "made of origami paper", "beside a lighthouse in a storm", "on a living room carpet",
    "in a market with lanterns", "as a charcoal sketch", "in a canoe on a lake", "under cherry trees in bloom",
)  # fmt: skip
"""No scene of one list is in another."""


def prompts(called: str) -> dict[str, list[str]]:
    """Return the prompts of each split about a subject that is `called` so, with its article: "a dog", "this item"."""
    splits = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
    return {split: [f"{called} {scene}" for scene in scenes] for split, scenes in splits.items()}

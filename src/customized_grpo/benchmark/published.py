"""What is published of DreamBench (arXiv 2510.18263): identity (DINO, ViT-S/16) and prompt (HPSv3) of other
generators."""

PUBLISHED = {
    "Customized-GRPO": (0.812, 8.32),
    "UNO": (0.760, 7.87),
    "naive GRPO 1:1.5": (0.801, 7.56),
    "naive GRPO 1:1": (0.861, 4.12),
    "OminiControl": (0.684, 8.28),
    "OmniGen": (0.693, 6.67),
    "FLUX IP-Adapter": (0.582, 7.68),
    "SSR-Encoder": (0.612, 4.82),
    "ELITE": (0.647, 3.12),
}
"""(identity, prompt) by name."""
METHOD = "Customized-GRPO"
REAL_IMAGES = 0.774
"""Identity of a subject's real pictures to each other."""
SUBJECTS, PROMPTS = 30, 750

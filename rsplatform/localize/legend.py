"""What the prompts of a score map mean and which model made it: written into every file of a scene."""

import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Legend:
    """Prompts, each with its class (0: background), the names of classes 1, 2, …, and the model by ref and hash.

    `thresholds` say, for each class, by how much it must beat the background's best prompt at the best pixel of a
    region for the region to stand; None: every region stands.
    """

    prompts: tuple[str, ...]
    class_of_prompt: tuple[int, ...]
    class_names: tuple[str, ...]
    model: str
    model_hash: str
    thresholds: tuple[float, ...] | None = None

    def bands_of(self, class_id: int) -> list[int]:
        """Places of the class's prompts, from 0."""
        return [band for band, owner in enumerate(self.class_of_prompt) if owner == class_id]

    def stands(self, class_id: int, peak_margin: float) -> bool:
        """Whether a region of the class, with this margin over the background at its best pixel, is one."""
        return self.thresholds is None or peak_margin > self.thresholds[class_id - 1]

    def tags(self) -> dict[str, str]:
        """As metadata of a raster."""
        thresholds = {} if self.thresholds is None else {"thresholds": json.dumps(self.thresholds)}
        return thresholds | {
            "prompts": json.dumps(self.prompts, ensure_ascii=False),
            "class_of_prompt": json.dumps(self.class_of_prompt),
            "class_names": json.dumps(self.class_names, ensure_ascii=False),
            "model": self.model,
            "model_hash": self.model_hash,
        }

"""The recipe of `localize`: what is sought in which scenes with which model, and how maps become objects."""

from typing import Annotated

from pydantic import AfterValidator, Field, model_validator
from pyproj.exceptions import CRSError

from rsplatform.config import Config, ModelArtifact, StageConfig, Text
from rsplatform.geo import CrsError, to_lonlat
from rsplatform.localize.calibrate import Calibration
from rsplatform.localize.decide import NO_DATA
from rsplatform.localize.scales import MapScale
from rsplatform.localize.sharpen import GuidedFilter
from rsplatform.localize.window import SmoothWindow
from rsplatform.sources.scenes import SceneSource

MAX_CLASSES = NO_DATA - 1
MAX_PROMPTS = 1000  # a score COG has a band for each


def _names_a_crs(text: str) -> str:
    try:
        to_lonlat(text)
    except (CRSError, CrsError) as error:
        raise ValueError(f"{text!r} is no CRS of a place on Earth; write one such as EPSG:32735") from error
    return text


MapsCrs = Annotated[str, AfterValidator(_names_a_crs)]


class Sought(Config):
    """One thing to find: its name and the prompts that ask for it.

    `words` are what names it in captions, for calibration; left out, its name.
    """

    name: Text
    prompts: list[Text] = Field(min_length=1)
    words: list[Text] = Field(default_factory=list)


class LocalizeConfig(StageConfig):
    """Scenes, a model, what to find and the background prompts it competes with.

    `window` is smooth attention's in patches. Maps lie in the UTM zone of a scene's centre, at multiples of their
    pixel, so that parts and reprojected copies of a scene get the same ones; `maps_crs` names one CRS for all scenes,
    for those that meet across zones. Maps of further `scales` are averaged with the first (a scene without CRS has but
    one resolution, and is dropped if they name another), and of patches moved to `phases` places along each axis, which
    makes them steadier for `phases`² times the work.

    Of the objects, regions below `min_area_m2` are left out and holes up to `max_hole_m2` filled; the mask shows what
    each pixel was decided to be. `guided_filter` sharpens the maps at the picture's edges; `calibration` asks of each
    class more than beating the background. (Our defaults.)
    """

    model: ModelArtifact
    scenes: SceneSource
    classes: list[Sought] = Field(min_length=1)
    background_prompts: list[Text] = Field(min_length=1)
    ground_sample_distance_m: float = Field(gt=0)
    window: SmoothWindow = 3
    maps_crs: MapsCrs | None = None
    scales: list[MapScale] = []
    phases: int = Field(default=1, ge=1, le=4)
    min_area_m2: float = Field(default=400.0, ge=0)
    max_hole_m2: float = Field(default=0.0, ge=0)
    guided_filter: GuidedFilter | None = None
    calibration: Calibration | None = None

    @model_validator(mode="after")
    def _fits_the_files(self) -> "LocalizeConfig":
        names = [item.name for item in self.classes]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"classes: two are called {repeated[0]!r}; give one class both prompts, or another name")
        if len(names) > MAX_CLASSES:
            raise ValueError(
                f"classes: {len(names)}, but a mask has room for {MAX_CLASSES} (a byte a pixel); split the recipe, or "
                "give one class several prompts"
            )
        if len(self.prompts) > MAX_PROMPTS:
            raise ValueError(f"{len(self.prompts)} prompts, at most {MAX_PROMPTS} are mapped at once; split the recipe")
        return self

    @property
    def prompts(self) -> list[str]:
        """All texts, the background's first."""
        return [*self.background_prompts, *(prompt for item in self.classes for prompt in item.prompts)]

    @property
    def class_of_prompt(self) -> list[int]:
        """0 for each background prompt, then the number of each prompt's class, from 1."""
        owners = [index for index, item in enumerate(self.classes, 1) for _ in item.prompts]
        return [0] * len(self.background_prompts) + owners

"""What `generate` writes of each step: previews as files, and an animation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from fluxonnx.errors import UsageError
from fluxonnx.files import describe_os_error
from fluxonnx.runtime.denoise import Step
from fluxonnx.runtime.outputs import check_output
from fluxonnx.runtime.preview import METHODS
from fluxonnx.runtime.saving import ANIMATIONS, FORMATS, check_output_path, save_animation, save_image


@dataclass(kw_only=True)
class Previews:
    """Previews of the picture that is being made.

    Attributes:
        place: A folder, where each step of each picture gets a file, or a file that each step replaces; None for none.
        method: How they are drawn, see `Step.preview`.
        animation: The file of the animation; None for none.
        numbered: Whether numbers are added to its name, because there are several pictures.
    """

    place: Path | None
    method: str
    animation: Path | None
    numbered: bool = False
    _frames: list[Image.Image] = field(default_factory=list)

    def step(self, step: Step, name: str) -> None:
        """Write the preview of a step; `name` is that of the picture."""
        preview = step.preview(self.method)
        if self.animation:
            self._frames.append(preview)
        if self.place and not self.place.is_dir():
            save_image(preview, self.place)
        elif self.place:
            save_image(preview, self.place / f"{name}-step-{step.index:02}.png")

    def finish(self, picture: Image.Image) -> Path | None:
        """Write the animation, which ends with the picture; returns its name."""
        frames, self._frames = self._frames, []
        return save_animation([*frames, picture], self.animation, self.numbered) if self.animation else None


def open_previews(
    place: Path | None, method: str | None, animation: Path | None, numbered: bool, shown: bool = False
) -> Previews | None:
    """Check the flags; None if they ask for no file.

    Args:
        place: That of --preview.
        method: That of --preview-method.
        animation: That of --animate.
        numbered: Whether there are several pictures.
        shown: Whether previews are shown on the terminal.

    Raises:
        UsageError: They can't be used.
        ImageError: There is no permission.
    """
    if method is not None and place is None and animation is None and not shown:
        raise UsageError("--preview-method says how previews are drawn: give --preview or --animate, or --show")
    if method not in (None, *METHODS):
        raise UsageError(f"preview method {method!r} is unknown: choose one of {', '.join(METHODS)}")
    if place is None and animation is None:
        return None
    if animation is not None:
        if animation.suffix.lower() not in ANIMATIONS:
            raise UsageError(f"{animation} can't be written: the name must end in one of {', '.join(ANIMATIONS)}")
        check_output(animation, "--animate", numbered)
    if place is not None and place.suffix and not place.is_dir():
        if place.suffix.lower() not in FORMATS:
            raise UsageError(f"preview {place} is neither a folder nor a picture ending in {', '.join(FORMATS)}")
        check_output_path(place)
    elif place is not None:
        try:
            place.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            reason = (
                describe_os_error(error, place) if isinstance(error, OSError) else f"{place} is no name of a folder"
            )
            raise UsageError(f"previews can't be written: {reason}") from None
    return Previews(place=place, method=method or METHODS[0], animation=animation, numbered=numbered)

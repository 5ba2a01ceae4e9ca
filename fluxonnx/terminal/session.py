"""A session: its values, its pictures, and how a picture is made of a prompt."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fluxonnx.errors import UsageError
from fluxonnx.terminal.references import Made, resolve
from fluxonnx.terminal.stopping import Stop, stoppable
from fluxonnx.terminal.studio import Studio

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from fluxonnx.runtime.events import Event
    from fluxonnx.runtime.pipeline import Flux
    from fluxonnx.runtime.request import Request
    from fluxonnx.terminal.pictures import Show


class Planned(Protocol):
    """What the command line makes of values: a request, a seed for each picture, the file, and what is known of input.

    Its class is that of the jobs of `generate`.
    """

    @property
    def request(self) -> Request: ...  # noqa: D102
    @property
    def seeds(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def output(self) -> Path: ...  # noqa: D102
    @property
    def inputs(self) -> Mapping[str, Any]: ...  # noqa: D102


class Bar(Protocol):
    """The progress of a run, on the terminal."""

    def event(self, event: Event) -> None: ...  # noqa: D102
    def step(self, step: int, steps: int, sigma: float, latents: np.ndarray) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


@dataclass(kw_only=True)
class Session:
    """The state of a session.

    Attributes:
        plan: Makes a job of values by the names of the table of fields.
        say: Prints a line.
        complain: Prints a warning or an error.
        bar: Shows progress.
        studio: The model.
        values: What `!steps` and others have set.
        made: The pictures so far; $1 is the first.
        show: Shows pictures; None for not.
        last_line: The last prompt, as it was typed.
        typed: What was typed before there was a prompt: the beginning of the next line.
    """

    plan: Callable[[Mapping[str, Any]], Planned]
    say: Callable[[str], None]
    complain: Callable[[str], None]
    bar: Bar
    studio: Studio
    values: dict[str, Any] = field(default_factory=dict)
    made: list[Made] = field(default_factory=list)
    show: Show | None = None
    last_line: str = ""
    typed: str = ""
    _stop: Stop = field(default_factory=Stop)

    def watch(self, event: Event) -> None:
        """Show what is under way, and stop there if that was asked for; has the signature of `Flux.watch`."""
        self.bar.event(event)
        self._stop.check()

    def draw(self, line: str) -> None:
        """Make the pictures of a prompt, and save each as soon as it is there.

        Raises:
            FluxonnxError: That is not possible.
            Cancelled: It was interrupted.
        """
        prompt, files = resolve(line, self.made)
        values = {**self.values, "prompt": prompt}
        if files:
            # With !input they are further pictures to look at, else the input themselves.
            name = "reference" if self.values.get("input") else "input"
            values[name] = [*self.values.get(name, ()), *files]
        job = self.plan(values)
        self.last_line = line
        flux = self.studio.flux()
        flux.check(job.request)
        self.bar.close()
        self.say(f"Seed: {', '.join(map(str, job.seeds))}")
        if self.show:
            self.show.clear = self.bar.close
        with stoppable() as self._stop:
            for seed in job.seeds:
                self._make(flux, job, seed, line)

    def _make(self, flux: Flux, job: Planned, seed: int, line: str) -> None:
        from fluxonnx.runtime.saving import save_image

        start = time.perf_counter()
        image = self._drawn(flux, job, seed)
        self.bar.close()
        path = save_image(image, job.output, {**image.info, **job.inputs}, numbered=True)
        self.made.append(Made(path, line, seed, image.size))
        if self.show:
            self.show.finish(image)
        seconds = time.perf_counter() - start
        self.say(f"${len(self.made)}: {path} {image.width}x{image.height} ({seconds:.1f} s)")

    def _drawn(self, flux: Flux, job: Planned, seed: int) -> Image:
        last = None
        with closing(flux.steps(job.request, seed)) as steps:
            try:
                for step in steps:
                    self._stop.check()
                    if self.show:
                        self.show.step(step)
                    self.bar.step(step.index, step.steps, step.sigma, step.latents)
                    last = step
            finally:
                if last is None or last.index < last.steps:
                    self._stop.asked = False  # a run that is closed reports phases, too
        if last is None:  # at strength 0 there are no steps
            return flux.run(job.request, [seed])[0]
        return last.image()

    def again(self, made: Made | None) -> None:
        """Draw the prompt of a picture, or else the last one, again: with the present values.

        Raises:
            UsageError: There was no prompt yet.
        """
        line = made.line if made else self.last_line
        if not line:
            raise UsageError("there is no prompt yet to draw again: type one")
        self.draw(line)

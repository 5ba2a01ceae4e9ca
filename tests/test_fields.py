"""The table of fields, and that flags, prompt files, the metadata of pictures and requests follow it."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from PIL import Image

from fluxonnx import contract
from fluxonnx.cli import build_parser
from fluxonnx.cli.generate import options_of
from fluxonnx.cli.jobs import Job, plan, read_source
from fluxonnx.errors import ImageError, UsageError
from fluxonnx.runtime.field import Field
from fluxonnx.runtime.fields import FIELD, FIELDS
from fluxonnx.runtime.images import digest, load_image
from fluxonnx.runtime.metadata import read_values
from fluxonnx.runtime.noise import check_seed
from fluxonnx.runtime.prompt_file import read_prompt_file
from fluxonnx.runtime.request import DEFAULTS, PICTURES, Request, ResolvedRequest, resolve
from fluxonnx.runtime.sampler import SOLVERS
from fluxonnx.runtime.saving import save_image
from fluxonnx.runtime.schedule import make_sigmas
from fluxonnx.runtime.tiles import SMALLEST

UNIT = 16
FLAGS = [field for field in FIELDS if field.flags]
IN_REQUEST = [field for field in FIELDS if "request" in field.places]
IN_PROMPT_FILE = [field for field in FIELDS if "prompt file" in field.places]
IN_PICTURE = [field for field in FIELDS if "picture" in field.places]
BOUNDED = [field for field in IN_REQUEST if (field.low, field.high, field.above) != (None, None, None)]


def each(selected: list[Field]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("field", selected, ids=lambda field: field.name)


def other(field: Field, n: int = 1) -> Any:
    """A possible value that is not the default; another one for another n."""
    if field.choices:
        return field.choices[n % len(field.choices)]
    if field.kind is bool:
        return not field.default if n == 1 else field.default
    if field.name == "expand":
        return [0, 0, 16 * n, 16]
    if field.many:
        return [1.0, 0.5 / n] if field.kind is float else ["a", f"other{n}"]
    if field.whole_tokens and field.high:
        return field.low + n * UNIT  # whose area can be drawn, whatever the ratio
    if field.kind in (int, float):
        step = 0.125 if field.kind is float else UNIT if field.whole_tokens else field.multiple or 1
        return field.high - n * step if field.high is not None else (field.low or field.above) + n * step
    return f"other{n}.png"


def wrong(field: Field) -> list[Any]:
    """Values of another type, as JSON has them."""
    values: list[Any] = [None, {}, [[]], ["x", 1]]
    values += [0, 1] if field.kind is bool else [True]
    return values + ([1, 1.5] if field.kind in (str, Path) else ["1"]) + ([0.5] if field.kind is int else [])


def jobs(*arguments: object) -> list[Job]:
    """What `generate` would make."""
    options = options_of(build_parser().parse_args(["generate", *map(str, arguments)]))
    return plan(options.wanted, read_source(options.source) if options.source else None)


def picture(path: Path, **parameters: object) -> Path:
    """A picture that says what made it."""
    save_image(Image.new("RGB", (64, 64)), path, {"prompt": "a", **parameters})
    return path


def with_needed(field: Field, value: Any) -> dict[str, Any]:
    """A value with the others without which it has no effect."""
    small = Image.new("RGB", (64, 64), "white")
    masked = {name: {"image": small, "mask": small} for name in ("mask_blur", "mask_crop", "keep_unmasked")}
    needed: dict[str, dict[str, Any]] = {
        **masked,
        "expand": {"image": small},
        "sigmas": {"schedule": "custom"},
        "power_alpha": {"schedule": "power"},
        "strength": {"image": small},
        "size": {"image": small},
        "reference_area": {"references": (small,)},
        "kv": {"references": (small,)},
    }
    return {"prompt": "a", **needed.get(field.name, {}), field.name: tuple(value) if field.many else value}


# Requests


def test_a_request_has_the_fields_of_the_table():
    names = [field.name for field in IN_REQUEST]
    for kind in (Request, ResolvedRequest):
        assert sorted(item.name for item in fields(kind) if item.name not in PICTURES) == sorted(names)
        for field in IN_REQUEST:
            hint = get_type_hints(kind)[field.name]
            possible = {field.kind, type(None), tuple[field.kind, ...]}
            assert {hint, *get_args(hint)} & {field.kind, tuple[field.kind, ...]}
            assert field.many or {*(get_args(hint) or [hint])} <= possible


@each(IN_REQUEST)
def test_the_default_is_the_tables(field):
    for is_distilled in (True, False):
        resolved = resolve(Request(prompt="a"), is_distilled, UNIT)
        assert getattr(resolved, field.name) == (field.default_for(is_distilled) if field.name != "prompt" else "a")


def test_a_manifest_overrides_what_the_table_lets_it():
    assert {field.name for field in FIELDS if field.model_default} == DEFAULTS.keys()
    defaults = {name: default // 2 for name, default in DEFAULTS.items()}
    resolved = resolve(Request(prompt="a"), True, UNIT, defaults)
    assert {name: getattr(resolved, name) for name in defaults} == defaults


@each(BOUNDED)
def test_a_value_out_of_range_is_refused_by_name(field):
    step = UNIT if field.whole_tokens else field.multiple
    bad = [field.low - (step or 1)] if field.low is not None else [field.above]
    bad += [field.high + (step or 1)] if field.high is not None else []
    bad += [field.low + 1] if step else []
    bad += [float("nan")] if field.kind is float else []
    for value in bad:
        with pytest.raises(UsageError, match=rf"^{field.name} (is )?{value}") as error:
            resolve(Request(**with_needed(field, value)), False, UNIT)
        bounds = [field.low, field.high, field.above, step]
        assert all(str(bound) in str(error.value) for bound in bounds if bound is not None)
    assert getattr(resolve(Request(**with_needed(field, other(field))), False, UNIT), field.name) == other(field)


@each([field for field in IN_REQUEST if field.choices])
def test_an_unknown_choice_is_refused_with_the_known_ones(field):
    with pytest.raises(UsageError, match=f"^{field.name} 'x' is unknown: choose one of {', '.join(field.choices)}$"):
        resolve(Request(prompt="a", **{field.name: "x"}), True, UNIT)
    assert all(choice in field.help for choice in field.choices)
    assert field.default is None or field.help.startswith(f"{field.default} (default)")


@each(IN_REQUEST)
def test_a_value_of_another_type_is_refused_by_name(field):
    for value in [value for value in wrong(field) if value is not None or field.name == "prompt"]:
        with pytest.raises(UsageError, match=f'^"{field.name}" is .*, expected'):
            resolve(Request(**{"prompt": "a", field.name: value}), True, UNIT)


def test_numbers_of_numpy_are_numbers():
    np = pytest.importorskip("numpy")
    request = Request(prompt="a", width=np.int64(64), steps=np.int32(2), guidance_scale=np.float32(2))
    resolved = resolve(request, False, UNIT)
    assert (resolved.width, resolved.steps, resolved.guidance_scale) == (64, 2, 2)
    sigmas = np.array([1.0, 0.5], np.float32)
    assert resolve(Request(prompt="a", schedule="custom", sigmas=sigmas), False, UNIT).sigmas == (1, 0.5)


# Pictures


@each([field for field in IN_REQUEST if "picture" in field.places])
def test_a_picture_holds_every_value_that_matters(field):
    resolved = resolve(Request(**with_needed(field, other(field))), False, UNIT)
    assert resolved.parameters()[field.name] == other(field)


def test_a_picture_holds_nothing_without_effect():
    resolved = resolve(Request(prompt="a", negative_prompt="b", guidance_scale=1), False, UNIT)
    idle = {
        "size",
        "reference_area",
        "kv",
        "step_cache",
        "negative_prompt",
        "mask_blur",
        "mask_crop",
        "keep_unmasked",
        "expand",
        "strength",
        "sigmas",
        "power_alpha",
        "tile",
    }
    assert resolved.parameters().keys() == {field.name for field in IN_REQUEST} - idle


@each(IN_PICTURE)
def test_values_are_read_from_a_picture(tmp_path, field):
    assert read_values(picture(tmp_path / "a.png", unknown={}, **{field.name: other(field)}))[field.name] == other(
        field
    )
    for value in wrong(field):
        path = picture(tmp_path / "a.png", **{field.name: value})
        with pytest.raises(
            ImageError, match=f'a.png holds damaged fluxonnx parameters: "{field.name}" is .*, expected'
        ):
            read_values(path)


@each([field for field in FIELDS if "picture" not in field.places])
def test_other_keys_of_a_picture_are_ignored(tmp_path, field):
    assert read_values(picture(tmp_path / "a.png", **{field.name: 1})) == {"prompt": "a"}


@each([field for field in IN_REQUEST if "picture" in field.places])
def test_a_picture_made_again_has_its_values(tmp_path, monkeypatch, field):
    monkeypatch.chdir(tmp_path)
    path = picture(tmp_path / "a.png", **{field.name: other(field)})
    (job,) = jobs("--from", path)
    assert getattr(job.request, field.name) == (tuple(other(field)) if field.many else other(field))


# Prompt files


def test_a_prompt_file_takes_the_keys_of_the_table(tmp_path):
    path = tmp_path / "a.jsonl"
    line = {"prompt": "a", **{field.name: other(field) for field in IN_PROMPT_FILE}}
    path.write_text(json.dumps(line))
    assert read_prompt_file(path) == [line]
    for field in FIELDS:
        if field not in IN_PROMPT_FILE:
            path.write_text(json.dumps({"prompt": "a", field.name: other(field)}))
            with pytest.raises(
                UsageError, match=f'a.jsonl, line 1 has an unknown key "{field.name}": known are prompt'
            ):
                read_prompt_file(path)


@each(IN_PROMPT_FILE)
def test_a_value_of_another_type_in_a_prompt_file(tmp_path, field):
    path = tmp_path / "a.jsonl"
    for value in wrong(field):
        path.write_text(json.dumps({"prompt": "a", field.name: value}))
        with pytest.raises(UsageError, match=f'a.jsonl, line 1: "{field.name}" is .*, expected'):
            read_prompt_file(path)


@each([field for field in IN_PROMPT_FILE if field in IN_REQUEST])
def test_a_line_of_a_prompt_file_reaches_the_request(tmp_path, monkeypatch, field):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("in.png")
    Path("a.jsonl").write_text(json.dumps({"prompt": "a", "input": "in.png", field.name: other(field)}))
    (job,) = jobs("--prompt-file", "a.jsonl")
    assert getattr(job.request, field.name) == (tuple(other(field)) if field.many else other(field))


# Flags


def test_generate_has_the_flags_of_the_table():
    arguments = vars(build_parser().parse_args(["generate"]))
    of_a_run = {"prompt_file", "source", "dir", "cache_dir", "precision", "provider", "threads", "low_memory", "lora"}
    of_a_run |= {"transformer", "text_encoder", "vae", "provider_option"}
    of_a_run |= {
        "absolute_paths",
        "text_encoder_precision",
        "keep_loaded",
        "preview",
        "preview_method",
        "animate",
        "show",
    }
    assert arguments.keys() == {field.name for field in FLAGS} | of_a_run | {"verbose", "quiet", "run", "parser"}


@each(FLAGS)
def test_all_flags_of_a_field_set_its_value(field):
    if field.kind is bool or field.name == "expand":
        return  # below
    value = field.kind(other(field)[0] if field.many else other(field))
    takes_many = field.many or field.flag_options.get("nargs") == "+"
    for flag in field.flags:
        found = getattr(build_parser().parse_args(["generate", flag, str(value)]), field.name)
        assert found == ([value] if takes_many else value)


def test_flags_of_other_forms():
    for words, value in ((["--keep-unmasked"], True), (["--no-keep-unmasked"], False), ([], None)):
        assert build_parser().parse_args(["generate", *words]).keep_unmasked is value
    assert build_parser().parse_args(["generate", "--expand", "1,2,3,4"]).expand == [1, 2, 3, 4]


@each([field for field in FLAGS if field in IN_REQUEST])
def test_a_flag_reaches_the_request_and_overrides_a_picture(tmp_path, monkeypatch, field):
    monkeypatch.chdir(tmp_path)
    image = picture(tmp_path / "in.png")
    known = {"image_file": str(image), "image_sha256": digest(load_image(image)), field.name: other(field)}
    made, value = picture(tmp_path / "a.png", **known), other(field, 2)
    words = [field.flags[-1], *(value if field.many else [value])]
    if field.kind is bool:
        words = [field.flags[0] if value else field.flags[0].replace("--", "--no-")]
    elif field.name == "expand":
        words = [field.flags[0], ",".join(map(str, value))]
    (job,) = jobs("--from", made, *words)
    assert getattr(job.request, field.name) == (tuple(value) if field.many else value)


@pytest.mark.parametrize("name", ["seed", "count"])
def test_numbers_of_pictures_are_checked_before_a_model_is_opened(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    field = FIELD[name]
    for value in (field.low - 1, field.high + 1):
        with pytest.raises(UsageError, match=f"^{name} is {value}, but must be from {field.low} to {field.high}$"):
            jobs("-p", "a", field.flags[0], value)
    with pytest.raises(UsageError, match=f"^seed is {2**64}"):
        jobs("-p", "a", "-S", FIELD["seed"].high, "-n", 2)


# The table repeats what others know, because it must not import them: that would make --help slow.


def test_the_table_agrees_with_the_runtime():
    assert FIELD["sampler"].choices == tuple(SOLVERS)
    made = {make_sigmas(name, 64, 4, 2.0, (1.0, 0.5)).tobytes() for name in FIELD["schedule"].choices}
    assert len(made) == len(FIELD["schedule"].choices)
    assert FIELD["tile"].low == SMALLEST
    assert FIELD["max_sequence_length"].high == contract.MAX_SEQUENCE_LENGTH
    low, high = FIELD["seed"].low, FIELD["seed"].high
    check_seed(low)
    check_seed(high)
    for seed in (low - 1, high + 1):
        with pytest.raises(UsageError):
            check_seed(seed)

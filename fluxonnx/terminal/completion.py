"""Completion for shells: the flags of each command, their values, files, and the names of models and of LoRA files."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import Any

from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.runtime.fields import FIELD
from fluxonnx.terminal.detection import AUTO, PROTOCOLS

SHELLS = ("bash", "zsh", "fish")
PRECISIONS = ("bf16", "bf16-native", "fp32", "fp16", "int8", "int4")
# Values that the parser does not know, because commands check them later and with better messages.
VALUES: dict[str, tuple[str, ...]] = {
    "--precision": (*PRECISIONS, AUTO),
    "--text-encoder-precision": PRECISIONS,
    "--flavour": ("ort", "portable"),
    "--component": ("text_encoder", "conditioning", "transformer", "vae_encoder", "vae_decoder"),
    "--preview-method": ("fast", "vae"),
    "--show": (AUTO, *PROTOCOLS),
    "shell": SHELLS,
}

# Where huggingface_hub keeps what it has downloaded, in a folder models--OWNER--NAME each (its constants.py).
HUB = '"${HF_HUB_CACHE:-${HF_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/huggingface}/hub}"'
# shtab's function for bash has names of files escaped if its own name has "files" or "dirs" in it.
BASH = f"""
_fluxonnx_models_dirs() {{
  local found
  compgen -d -- "$1"
  for found in {HUB}/models--*/snapshots/*/model_index.json; do
    [ -e "$found" ] || continue
    found="${{found##*/models--}}"; found="${{found%%/*}}"
    compgen -W "${{found/--//}}" -- "$1"
  done
}}
_fluxonnx_lora_files() {{
  local found
  compgen -f -X '!*.safetensors' -- "$1"
  compgen -d -- "$1"
  for found in loras/"$1"*.safetensors; do
    [ -e "$found" ] && [[ "$1" != */* ]] && printf '%s\\n' "$found"
  done
}}
"""
ZSH = f"""
_fluxonnx_models() {{
  local found; local -a names
  for found in {HUB}/models--*/snapshots/*/model_index.json(N); do
    found="${{found##*/models--}}"; found="${{found%%/*}}"
    names+=("${{found/--//}}")
  done
  (( $#names )) && compadd -- $names
  _files -/
}}
_fluxonnx_loras() {{
  local -a names; names=(loras/*.safetensors(N))
  (( $#names )) && compadd -f -- $names
  _files -g '*.safetensors'
}}
"""
FISH = """
function _fluxonnx_models
  set -l cache "$HOME/.cache"
  set -q XDG_CACHE_HOME; and set cache $XDG_CACHE_HOME
  set -l hub "$cache/huggingface/hub"
  set -q HF_HOME; and set hub "$HF_HOME/hub"
  set -q HF_HUB_CACHE; and set hub $HF_HUB_CACHE
  set -l files $hub/models--*/snapshots/*/model_index.json
  for found in $files
    string replace -r '.*/models--([^/]*)/snapshots/.*' '$1' -- $found | string replace -- '--' '/'
  end
  __fish_complete_directories (commandline -ct)
end
function _fluxonnx_loras
  for found in (__fish_complete_path (commandline -ct))
    string match -qr '^[^\\t]*(\\.safetensors|/)(\\t|$)' -- $found; and printf '%s\\n' $found
  end
  set -l files loras/*.safetensors
  string join \\n -- $files
end
"""
MODELS: dict[str, Any] = {
    "bash": "_fluxonnx_models_dirs",
    "zsh": "_fluxonnx_models",
    "fish": "(_fluxonnx_models)",
    "preamble": {"bash": BASH, "zsh": ZSH, "fish": FISH},
}
LORAS: dict[str, Any] = {
    "bash": "_fluxonnx_lora_files",
    "zsh": "_fluxonnx_loras",
    "fish": "(_fluxonnx_loras)",
    "preamble": {"bash": BASH, "zsh": ZSH, "fish": FISH},
}
# What messages call the value of an argument that is the name of a file or of a folder.
FILES = ("FILE", "PICTURE", "PATH", "GRAPH", "IMAGE", "A", "B")
FOLDERS = ("DIR", "FOLDER")


def providers() -> tuple[str, ...]:
    """Return the names of the execution providers that are known, installed or not."""
    from fluxonnx.runtime.providers.registry import KNOWN

    return (*KNOWN, AUTO)


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script that has a shell complete the words of a command.

    Args:
        parser: The command, with all its commands.
        shell: One of `SHELLS`.

    Raises:
        UsageError: There is none for this shell.
        FluxonnxError: The package that writes it is missing, or too old.
    """
    if shell not in SHELLS:
        raise UsageError(f"there is no completion for {shell!r}: choose one of {', '.join(SHELLS)}")
    try:
        import shtab
    except ImportError:
        raise FluxonnxError('completion needs shtab: pip install "fluxonnx[terminal]"') from None
    if shell not in shtab.SUPPORTED_SHELLS:
        raise FluxonnxError(f"this shtab can't complete for {shell}: pip install -U shtab")
    for action in _actions(parser):
        _describe(action, shtab)
    return shtab.complete(parser, shell)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)


def _describe(action: Any, shtab: Any) -> None:
    """Tell shtab what the value of an argument can be."""
    if isinstance(action, argparse._SubParsersAction) or action.choices or action.nargs == 0:
        return
    flag = action.option_strings[-1] if action.option_strings else action.dest
    values = providers() if flag == "--provider" else VALUES.get(flag) or _field_choices(action.dest)
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    # To zsh, a colon in the name of a value ends it.
    action.metavar = re.sub(r"\W+", " ", metavar) or None
    if values:
        action.choices = values
    elif flag == "--dir" and metavar == "DIR":
        action.complete = MODELS
    elif flag == "--lora":
        action.complete = LORAS
    elif metavar in FOLDERS:
        action.complete = shtab.DIRECTORY
    elif metavar in FILES:
        action.complete = shtab.FILE


def _field_choices(name: str) -> tuple[str, ...]:
    return FIELD[name].choices if name in FIELD else ()

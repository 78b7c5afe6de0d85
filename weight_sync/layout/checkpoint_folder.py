"""Which files of a folder are a model's weights: the rule of transformers, for the start and for updates from disk.

`model.safetensors` alone where it is there, else the files that `model.safetensors.index.json` names. What else lies
in the folder (older weights under another name, adapters, an optimizer) is no part of the model. Which tensor is in
which file is what the files say; the index is believed about nothing but their names.
"""

import json
from pathlib import Path

from ..errors import TransportError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The files, sorted; they may turn out to be missing. `TransportError` where the folder names none."""
    single = folder / SINGLE_FILE
    if single.is_file():
        return [single]
    index = folder / INDEX_FILE
    if not index.is_file():
        raise TransportError(
            f"no weights in {folder}: got neither {SINGLE_FILE} nor {INDEX_FILE}, expected one of these *.safetensors "
            "names; save the model with save_pretrained, or use load_format='dummy'"
        )
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        # A name that leads out of the folder is a file of that name in it, which then is not there.
        return sorted(folder / Path(name).name for name in names)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise TransportError(
            f"cannot read {index}: got {type(error).__name__}: {error}; expected a JSON object with a weight_map of "
            "names to files; download the checkpoint again"
        ) from error

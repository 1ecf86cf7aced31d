"""What a converted model was trained on, as its folder records it, so that later figures do not rest on the same text."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mxdsurgery.errors import NotConvertedError, first_line
from mxdsurgery.outside import check_types
from mxdsurgery.text.fingerprints import Fingerprints
from mxdsurgery.text.places import text_name
from mxdsurgery.text.sources import TextStream

# In a folder of its own: some programs take every .safetensors file beside the weights for weights.
TRAINED_ON_FILE = "trained_on/fingerprints.safetensors"
_HASHES = "fingerprints"


@dataclass(frozen=True)
class TrainedOn:
    """What a model was trained on, by ``convert`` and by every ``heal`` since.

    Attributes:
        fingerprints: of the contexts; they know a text again under another name, in another order, or a part of it.
        texts: for each training ``data`` (the text's name), ``context`` (T), ``first`` and ``last`` (of the text's contexts in
            its order, those that may have been trained on: from the first on, before the last) and ``passes`` over the text.
    """

    fingerprints: Fingerprints
    texts: list[dict[str, Any]]

    def __or__(self, other: "TrainedOn") -> "TrainedOn":
        """Both trainings, one after the other."""
        return TrainedOn(self.fingerprints | other.fingerprints, [*self.texts, *other.texts])

    def share_of(self, contexts: Tensor) -> dict[str, int]:
        """How many of contexts (S, T) were trained on, as figures that rest on them say it."""
        return {"trained_on": int(self.fingerprints.known(contexts).sum())}

    def ends(self, data: str) -> int:
        """Where the last training on a text of this name ended, in contexts; 0 where it was read to its end, or never."""
        mine = [text for text in self.texts if text["data"] == text_name(data)]
        return mine[-1]["last"] if mine and all(text["passes"] <= 1 for text in mine) else 0

    def write(self, folder: Path) -> None:
        """Writes the record into a model's folder."""
        path = folder / TRAINED_ON_FILE
        path.parent.mkdir(exist_ok=True)
        metadata = {"context": str(self.fingerprints.context), "texts": json.dumps(self.texts)}
        save_file({_HASHES: self.fingerprints.tensor()}, path, metadata)


def text_used(text: TextStream, contexts: int, passes: int) -> dict[str, Any]:
    """The entry of `TrainedOn.texts` for a training that took so many contexts of a text in so many passes."""
    first = text.skip + text.begin
    last = first + contexts + text.room()
    return {"data": text_name(text.spec), "context": text.packing.context, "first": first, "last": last, "passes": passes}


def read_trained_on(folder: Path) -> TrainedOn | None:
    """The record in a model's folder; None where an older version wrote the folder.

    Raises:
        NotConvertedError: it cannot be read.
    """
    path = folder / TRAINED_ON_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as opened:
            about, hashes = opened.metadata(), opened.get_tensor(_HASHES)
        context, texts = int(about["context"]), json.loads(about["texts"])
        check_types(texts, list[dict[str, int | str]], "texts")
        if hashes.dtype != torch.int64 or hashes.dim() != 1 or not 0 < context < 2**31:
            raise ValueError("it holds no fingerprints")
        for text in texts:
            check_types([text["data"]], list[str], "data")
            check_types([text[name] for name in ("context", "first", "last", "passes")], list[int], "a text's range")
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise NotConvertedError(
            f"{path} cannot be read: {first_line(error)}", expected="the folder as it was written"
        ) from None
    return TrainedOn(Fingerprints.from_tensor(context, hashes), texts)

"""What ``experts`` finds out about every expert of a converted model, as files: written by it, read by search and report.

The folder holds

    experts.json           what it was made from: see `Catalogue`
    contexts.parquet       a row for each context, in order: ``input_ids`` list<int32> and, of labelled text, ``classes``
                           list<int16>, each token's class as its place in ``classes``, -1 for none
    layer<L>.parquet       a row for each expert of layer L, in order: `SCHEMA`
    maximum.safetensors    ``layer<L>``: each expert's largest coefficient, (N,) float32; ``unit="maximum"`` reads it

so any program that reads Parquet can use it. Large lists are read only on demand.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from mxdsurgery.checkpoint.converted import Converted, fingerprint
from mxdsurgery.errors import CatalogueError, as_typed, first_line

CATALOGUE_FILE, CONTEXTS_FILE = "experts.json", "contexts.parquet"
CATALOGUE_VERSION = 1

# Places where an expert fired: in which context, at which position and how strongly; and its coefficients around the place,
# from ``before`` positions earlier to ``after`` later (0 at position 0 and beyond the context).
_PLACES = pa.list_(
    pa.struct(
        [
            ("context", pa.int32()),
            ("position", pa.int32()),
            ("coefficient", pa.float32()),
            ("window", pa.list_(pa.float32())),
        ]
    )
)
_DIMENSIONS = pa.list_(pa.struct([("dimension", pa.int32()), ("value", pa.float32())]))
_TOKENS = pa.list_(pa.struct([("token", pa.int32()), ("value", pa.float32())]))

SCHEMA = pa.schema(
    [
        ("expert", pa.int32()),
        ("fired", pa.int64()),  # tokens on which it fired
        ("frequency", pa.float64()),  # the same as a share of all tokens
        ("mean", pa.float32()),  # its coefficient's mean where it fired; 0 if it never did
        ("maximum", pa.float32()),
        ("histogram", pa.list_(pa.int64())),  # its coefficients, counted in the bins of `Catalogue.bins`
        ("top", _PLACES),  # where it fired most strongly, one place a context, the strongest first
        ("sample", _PLACES),  # places drawn at random from all where it fired, the strongest first
        ("scales_up", _DIMENSIONS),  # the largest entries of c_n, by dimension of the model's width
        ("scales_down", _DIMENSIONS),  # the smallest
        ("promotes", _TOKENS),  # tokens whose logit its mean contribution raises most, directly through the unembedding
        ("demotes", _TOKENS),
        ("class_fired", pa.list_(pa.int64())),  # of labelled text: firings by class
        ("similar", pa.list_(pa.struct([("expert", pa.int32()), ("cosine", pa.float32())]))),  # the nearest c_n
    ]
)


@dataclass(frozen=True)
class Catalogue:
    """What `experts` wrote.

    Attributes:
        folder: where it is.
        model: name of the converted model's folder.
        fingerprint: of the converted model.
        data: the text.
        tokens: how many of its tokens everything rests on; BOS, or position 0 of each context, left out.
        contexts: S, how many contexts.
        context: T, tokens in each.
        classes: names of the classes of labelled text; empty without labels.
        class_tokens: tokens of each class.
        before: number of positions in a place's window before the place itself.
        after: number of positions after it.
        bins: lower edges of the histograms' bins; the first bin holds everything below the second edge.
        layers: N of each layer, by its index (a string in experts.json).
    """

    folder: Path
    model: str
    fingerprint: str
    data: str
    tokens: int
    contexts: int
    context: int
    classes: list[str]
    class_tokens: list[int]
    before: int
    after: int
    bins: list[float]
    layers: dict[int, int]

    def table(self, layer: int, columns: Sequence[str] | None = None) -> pa.Table:
        """A layer's experts, one row each, in order; with all columns, or the named ones.

        Raises:
            CatalogueError: the layer is not there, or cannot be read.
        """
        self.check_layer(layer)
        return _read(layer_path(self.folder, layer), columns)

    def check_layer(self, layer: int) -> None:
        """Raises CatalogueError where the catalogue has no such layer."""
        if layer not in self.layers:
            raise CatalogueError(
                f"{str(self.folder)!r} holds no experts of layer {layer}",
                expected="one of " + ", ".join(map(str, self.layers)),
            )

    def slices(self, layer: int, size: int) -> Iterator[list[dict[str, Any]]]:
        """A layer's experts in lists of ``size`` rows, every row a dict by column; never all of them in memory."""
        self.check_layer(layer)
        with _named(layer_path(self.folder, layer)) as path:
            for batch in pq.ParquetFile(path).iter_batches(batch_size=size):
                yield batch.to_pylist()

    def row(self, layer: int, expert: int, columns: Sequence[str] | None = None) -> dict[str, Any]:
        """One expert, by column; all columns, or the named ones. Reads only the row group that the expert is in."""
        self.check_layer(layer)
        if not 0 <= expert < self.layers[layer]:
            raise CatalogueError(f"layer {layer} has no expert {expert}", expected=f"0 to {self.layers[layer] - 1}")
        with _named(layer_path(self.folder, layer)) as path, pq.ParquetFile(path) as file:
            group, first = 0, 0
            while first + file.metadata.row_group(group).num_rows <= expert:
                first += file.metadata.row_group(group).num_rows
                group += 1
            rows = file.read_row_group(group, columns=None if columns is None else list(columns))
            return rows.slice(expert - first, 1).to_pylist()[0]

    @cached_property
    def input_ids(self) -> pa.ChunkedArray:
        """Token ids of the contexts: a list array, S lists of T."""
        return _read(self.folder / CONTEXTS_FILE, ["input_ids"])["input_ids"]

    def window(self, place: dict[str, Any]) -> tuple[list[int], list[float], int]:
        """The tokens around a place (of ``top`` or ``sample``), the expert's coefficients there, and the place's index."""
        ids = self.input_ids[place["context"]].as_py()
        start = max(0, place["position"] - self.before)
        first = start - (place["position"] - self.before)
        tokens = ids[start : place["position"] + self.after + 1]
        return tokens, place["window"][first : first + len(tokens)], place["position"] - start


def layer_path(folder: Path, layer: int) -> Path:
    """The file of a layer's experts."""
    return folder / f"layer{layer}.parquet"


def open_catalogue(folder: str | Path) -> Catalogue:
    """Reads experts.json; the tables are read when they are asked for.

    Args:
        folder: what `experts` wrote, or the converted model's folder with it inside.

    Raises:
        CatalogueError: there is none, or it cannot be read.
    """
    folder = Path(folder)
    folder = folder if (folder / CATALOGUE_FILE).is_file() else folder / "experts"
    path = folder / CATALOGUE_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values.pop("format_version")
        values["layers"] = {int(layer): n_experts for layer, n_experts in values["layers"].items()}
        made = Catalogue(folder=folder, **values)
    except FileNotFoundError:
        raise CatalogueError(
            f"there is no {str(path)!r}",
            expected="what mxdsurgery experts writes",
            fix=f"run mxdsurgery experts {as_typed(folder.parent)} --data TEXT first",
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CatalogueError(
            f"{str(path)!r} cannot be read: {first_line(error)}", expected="the file as experts wrote it"
        ) from None
    if version != CATALOGUE_VERSION:
        raise CatalogueError(f"{str(path)!r} has format version {version}", expected=str(CATALOGUE_VERSION))
    return made


def catalogue_of(converted: Converted) -> Catalogue:
    """The catalogue in a converted model's folder, after making sure that it is of this model.

    Raises:
        CatalogueError: there is none, it cannot be read, or it is of another model.
    """
    made = open_catalogue(converted.folder)
    if made.fingerprint != fingerprint(converted):
        raise CatalogueError(
            f"the catalogue in {str(made.folder)!r} is of another model",
            expected=f"of the one in {str(converted.folder)!r}",
            fix=f"run mxdsurgery experts {as_typed(converted.folder)} --overwrite",
        )
    return made


def list_array(rows: Tensor) -> pa.ListArray:
    """A list for each row of a tensor (n, M)."""
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    return pa.ListArray.from_arrays(offsets, rows.contiguous().flatten().numpy())


def _read(path: Path, columns: Sequence[str] | None) -> pa.Table:
    with _named(path):
        return pq.read_table(path, columns=None if columns is None else list(columns))


@contextmanager
def _named(path: Path) -> Iterator[Path]:
    """Names the file in what goes wrong with it."""
    try:
        yield path
    except (pa.ArrowException, OSError) as error:
        raise CatalogueError(
            f"{str(path)!r} cannot be read: {first_line(error)}", expected="the file as experts wrote it"
        ) from None

"""``coefficients``: the experts' coefficients on a text, as files that any tool reads.

The folder holds, for layers L and n tokens, whole contexts of T tokens one after the other (leave position 0 out of figures:
it is BOS, or a token without context):

    coefficients.json      ``model``, ``fingerprint``, ``data``, ``context``, ``tokens``; ``layers``, with ``n_experts`` and
                           ``active``, K
    tokens.<form>          ``token`` (n,) int32 ids; ``context`` (n,) and ``position`` (n,) int32
    layer<L>.<form>        ``experts`` (n, K) int32 and ``coefficients`` (n, K) float32, row i for token i; a coefficient of 0
                           means that fewer than K fired

as Parquet (``experts`` and ``coefficients`` are lists of K) or safetensors (tensors of these names and shapes, in parts of
``PART`` tokens: ``layer<L>-00000.safetensors``).
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor

from mxdsurgery.base.running import run_base
from mxdsurgery.catalogue.experts import layers_with_experts, recorded_coefficients
from mxdsurgery.catalogue.files import list_array
from mxdsurgery.checkpoint.converted import Converted, fingerprint, load_with_recipe, read_config
from mxdsurgery.checkpoint.writing import check_place, check_room, write_json, written_whole
from mxdsurgery.choices import FORMS
from mxdsurgery.errors import OutputError
from mxdsurgery.hardware.guard import guarded
from mxdsurgery.measuring.held_out import held_out, trained_share
from mxdsurgery.terminal.console import Reporter
from mxdsurgery.text.packing import in_batches
from mxdsurgery.text.places import check_there, text_name

# Tokens in each file of the safetensors form, and in each row group of the Parquet form.
PART = 2**17
# What a token takes in tokens.<form>, and one of its K in layer<L>.<form>; Parquet packs that closer.
_TOKEN_BYTES, _FIRING_BYTES = 12, 8


@guarded
def coefficients(
    folder: str | Path,
    *,
    out: str | Path,
    form: str = "parquet",
    data: str | None = None,
    tokens: int | None = None,
    text_column: str | None = None,
    layers: str = "all",
    device: str | None = None,
    compute: str | None = None,
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Writes every expert coefficient of a converted model on a text.

    Args:
        folder: what ``convert`` or ``edit`` wrote.
        out: the folder to write; it must not exist.
        form: ``parquet`` or ``safetensors``; see the module.
        data: the text; default: the recipe's held-out text.
        tokens: how many of its tokens; default: the recipe's ``eval_tokens``.
        text_column: column or field with the text; default: the recipe's.
        layers: which layers, written as for ``convert``.
        device: ``auto``, ``cpu``, ``cuda``, ``mps`` or ``xpu``; default: the recipe's.
        compute: dtype to compute in; ``auto``: as stored, or float32 where that is faster here; default: the recipe's.
        trust_remote_code: run the code that came with the base model, where it has its own; see `load`.
        reporter: where progress is reported; default: nowhere.

    Returns:
        What coefficients.json holds.

    Raises:
        NotConvertedError, DataError, LayerSelectionError: as in `experts`.
        OutputError: ``out`` exists, cannot be written or has no room.
    """
    reporter = reporter or Reporter()
    if form not in FORMS:
        raise OutputError(f"no form {form!r}", expected="one of " + ", ".join(FORMS))
    out = Path(out)
    if out.exists():
        raise OutputError(f"{str(out)!r} exists already", expected="a new folder", fix="give another --out")
    check_place(out)
    read_config(folder)
    check_there(data)
    converted, recipe = load_with_recipe(folder, device, compute, trust_remote_code=trust_remote_code)
    chosen = layers_with_experts(converted, layers)
    ids = held_out(converted, recipe, data, tokens, text_column, any_text=True)
    active = [converted.layers[layer].gate.active for layer in chosen]
    check_room(out, ids.numel() * (_TOKEN_BYTES + _FIRING_BYTES * sum(active)))
    parts = in_batches(ids, PART)
    made = {
        "model": converted.folder.resolve().name,
        "fingerprint": fingerprint(converted),
        "data": text_name(data or recipe.eval_data or recipe.data),
        "context": ids.shape[1],
        "tokens": ids.numel(),
        **trained_share(converted, ids),
        "layers": {
            str(layer): {"n_experts": converted.layers[layer].gate.n_experts, "active": count}
            for layer, count in zip(chosen, active, strict=True)
        },
    }
    with written_whole(out.resolve()) as staging, reporter.progress("coefficients", "tokens") as line:
        write_json(staging / "coefficients.json", made)
        writer = _Writer(staging, form)
        try:
            for part, contexts in enumerate(parts):
                first = part * len(parts[0])
                numbers = torch.arange(first, first + len(contexts))
                writer.write("tokens", part, _tokens(contexts, numbers))
                for layer, columns in _read(converted, chosen, contexts, recipe.batch).items():
                    writer.write(f"layer{layer}", part, columns)
                line.update((first + len(contexts)) * ids.shape[1], ids.numel())
        finally:
            writer.close()
    return made


@torch.no_grad()
def _read(converted: Converted, layers: list[int], contexts: Tensor, batch: int) -> dict[int, dict[str, Tensor]]:
    """The layers' experts and coefficients, (n, K) each, on contexts (S, T)."""
    parts: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}
    for ids in in_batches(contexts, batch):
        with recorded_coefficients(converted, layers) as seen:
            run_base(converted.model, ids.to(converted.model.device))
        for layer in layers:
            values, indices = (part.reshape(ids.numel(), -1).cpu() for part in seen[layer][0])
            parts[layer].append((indices.int(), values.float()))
    joined = {layer: [torch.cat(list(column)) for column in zip(*pairs, strict=True)] for layer, pairs in parts.items()}
    return {layer: {"experts": indices, "coefficients": values} for layer, (indices, values) in joined.items()}


def _tokens(contexts: Tensor, numbers: Tensor) -> dict[str, Tensor]:
    positions = torch.arange(contexts.shape[1]).expand_as(contexts)
    columns = {"token": contexts, "context": numbers[:, None].expand_as(contexts), "position": positions}
    return {name: column.flatten().int() for name, column in columns.items()}


class _Writer:
    """Writes tables part by part in either form."""

    def __init__(self, folder: Path, form: str) -> None:
        self.folder, self.form = folder, form
        self.files: dict[str, pq.ParquetWriter] = {}

    def write(self, name: str, part: int, tensors: dict[str, Tensor]) -> None:
        """Appends a part of a table: tensors (n,) or (n, K)."""
        if self.form == "safetensors":
            save_file(
                {key: tensor.contiguous() for key, tensor in tensors.items()}, self.folder / f"{name}-{part:05}.safetensors"
            )
            return
        table = pa.table({key: _column(tensor) for key, tensor in tensors.items()})
        if name not in self.files:
            self.files[name] = pq.ParquetWriter(self.folder / f"{name}.parquet", table.schema, compression="zstd")
        self.files[name].write_table(table)

    def close(self) -> None:
        """Finishes the files."""
        for file in self.files.values():
            file.close()


def _column(tensor: Tensor) -> pa.Array:
    return pa.array(tensor.numpy()) if tensor.ndim == 1 else list_array(tensor)

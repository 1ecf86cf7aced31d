"""Writes a catalogue's tables from every expert's `Tally`, some hundred experts at a time."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor

from mxdsurgery.aside import file_aside
from mxdsurgery.base.unembedding import Unembedding
from mxdsurgery.catalogue.files import SCHEMA, layer_path, list_array
from mxdsurgery.catalogue.statistics import Places, Tally
from mxdsurgery.checkpoint.converted import Converted
from mxdsurgery.layers.baselines import Transforms
from mxdsurgery.layers.interventions import MAXIMUM_FILE
from mxdsurgery.layers.layer import Experts
from mxdsurgery.measuring.alike import Cosines
from mxdsurgery.terminal.console import ProgressLine

# How many entries of c_n, tokens and neighbours are written of each expert.
_ENTRIES = 8
# Elements of the largest matrix in memory, (experts, V) or (experts, N).
_ELEMENTS = 2**25


@torch.no_grad()
def write_tables(folder: Path, converted: Converted, tallies: dict[int, Tally], tokens: int, line: ProgressLine) -> None:
    """Writes ``layer<L>.parquet`` for each layer, and the experts' maxima; ``tokens`` is how many they were observed on."""
    unembedding = Unembedding.of(converted.model)
    total, done = sum(len(tally.fired) for tally in tallies.values()), 0
    for layer, tally in tallies.items():
        path, experts, n_experts = layer_path(folder, layer), converted.layers[layer].experts, len(tally.fired)
        cosines = Cosines(experts)
        with file_aside(path) as new, pq.ParquetWriter(new, SCHEMA, compression="zstd") as writer:
            for rows in _chunks(n_experts, max(n_experts, len(unembedding.weight))):
                writer.write_table(_table(rows, experts, cosines, tally, tokens, unembedding))
                done += len(rows)
                line.update(done, total)
    save_file({f"layer{layer}": tally.maximum for layer, tally in tallies.items()}, folder / Path(MAXIMUM_FILE).name)


def _chunks(n_experts: int, widest: int) -> Iterator[Tensor]:
    yield from torch.arange(n_experts).split(max(1, min(512, _ELEMENTS // widest)))


def _table(
    rows: Tensor, experts: Experts | Transforms, cosines: Cosines, tally: Tally, tokens: int, unembedding: Unembedding
) -> pa.Table:
    """The rows of SCHEMA of some experts."""
    fired = tally.fired[rows]
    used = fired > 0
    here, have_c = rows.to(experts.weight.device), isinstance(experts, Experts)
    said = (tally.contribution[rows] / fired.clamp_min(1)[:, None]).to(here.device)
    direction = experts.term(here, said[:, None])[:, 0].float()[used.to(here.device)]
    logits = unembedding.logits(direction.to(unembedding.weight.device))
    scales = torch.full_like(used, have_c)  # a transform scales no dimensions: none are listed
    mine = experts.weight[here].float() if have_c else direction[:0]
    columns = {
        "expert": pa.array(rows.int().numpy()),
        "fired": pa.array(fired.numpy()),
        "frequency": pa.array((fired.double() / tokens).numpy()),
        "mean": pa.array((tally.total[rows] / fired.clamp_min(1)).float().numpy()),
        "maximum": pa.array(tally.maximum[rows].numpy()),
        "histogram": list_array(tally.histogram[rows].long()),
        "top": _places(tally.top, rows),
        "sample": _places(tally.sample, rows),
        "scales_up": _entries("dimension", mine, scales, largest=True),
        "scales_down": _entries("dimension", mine, scales, largest=False),
        "promotes": _entries("token", logits, used, largest=True),
        "demotes": _entries("token", logits, used, largest=False),
        "class_fired": list_array(tally.class_fired[rows]),
        "similar": _similar(rows, cosines.of(here), tally.fired > 0),
    }
    return pa.table([columns[name].cast(SCHEMA.field(name).type) for name in SCHEMA.names], schema=SCHEMA)


def _ragged(kept: Tensor, **fields: pa.Array) -> pa.ListArray:
    """A list for each row of ``kept`` (n, M), of structs of the kept places' fields."""
    offsets = np.concatenate([[0], kept.sum(1).cumsum(0).numpy()]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(list(fields.values()), list(fields)))


def _places(places: Places, rows: Tensor) -> pa.ListArray:
    coefficient, order = places.coefficient[rows].sort(1, descending=True)
    kept = places.key[rows].gather(1, order) > 0
    window = places.window[rows].gather(1, order[..., None].expand_as(places.window[rows]))[kept]
    return _ragged(
        kept,
        context=pa.array(places.context[rows].gather(1, order)[kept].numpy()),
        position=pa.array(places.position[rows].gather(1, order)[kept].numpy()),
        coefficient=pa.array(coefficient[kept].numpy()),
        window=list_array(window.float()),
    )


def _entries(name: str, values: Tensor, wanted: Tensor, largest: bool) -> pa.ListArray:
    """For each of n rows the largest or smallest entries of values (m, ...), which are those of the m wanted rows."""
    found = values.topk(min(_ENTRIES, values.shape[1]), dim=1, largest=largest)
    kept = wanted[:, None].expand(-1, found.indices.shape[1])
    indices, values = found.indices.cpu().int().flatten(), found.values.cpu().float().flatten()
    return _ragged(kept, **{name: pa.array(indices.numpy()), "value": pa.array(values.numpy())})


def _similar(rows: Tensor, cosine: Tensor, used: Tensor) -> pa.ListArray:
    """The experts with the largest cosine (E, N) with each of the rows, among those that fired."""
    cosine[:, ~used.to(cosine.device)] = -2
    cosine[torch.arange(len(rows), device=cosine.device), rows.to(cosine.device)] = -2  # itself
    found = cosine.topk(min(_ENTRIES, cosine.shape[1]), dim=1)
    kept = (found.values > -2).cpu() & used[rows][:, None]
    indices, values = found.indices.cpu()[kept].int(), found.values.cpu()[kept].float()
    return _ragged(kept, expert=pa.array(indices.numpy()), cosine=pa.array(values.numpy()))

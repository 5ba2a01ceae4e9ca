"""Batches as engines hold them: columns by their names, DataFrames of pandas, tables of pyarrow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fluxonnx.errors import UsageError


def rows_of(batch: Any) -> list[dict[str, Any]]:
    """Return the rows of a batch in any form."""
    if hasattr(batch, "to_pylist"):
        return batch.to_pylist()
    if hasattr(batch, "to_dict") and hasattr(batch, "columns"):
        batch = {name: list(batch[name]) for name in batch.columns}
    if not isinstance(batch, Mapping):
        raise UsageError(f"the batch is of type {type(batch).__name__}: pass columns by their names, or a DataFrame")
    columns = {str(name): list(column) for name, column in batch.items()}
    lengths = {len(column) for column in columns.values()}
    if len(lengths) > 1:
        raise UsageError(f"the columns of the batch have different lengths: {', '.join(map(str, sorted(lengths)))}")
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def with_columns(batch: Any, columns: Mapping[str, list[Any]]) -> Any:
    """Return a batch of the same kind with further columns."""
    if hasattr(batch, "to_pylist"):
        import pyarrow

        for name, values in columns.items():
            array = pyarrow.array(values, _types(pyarrow)[name])
            index = batch.schema.get_field_index(name)
            batch = batch.append_column(name, array) if index < 0 else batch.set_column(index, name, array)
        return batch
    return batch.assign(**columns) if hasattr(batch, "assign") else {**batch, **columns}


def _types(pyarrow: Any) -> dict[str, Any]:
    """Return the Arrow types of the columns that a painter adds."""
    text = pyarrow.string()
    return {
        **dict.fromkeys(("sha256", "worker", "error", "warning", "parameters", "file"), text),
        "picture": pyarrow.binary(),
        "seed": pyarrow.uint64(),
        "seconds": pyarrow.float64(),
    }

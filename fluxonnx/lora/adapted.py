"""A derived graph, and how engines get it: the graph as bytes, and arrays beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

# The file of external data by which the graph names the arrays.
LOCATION = "lora"
# Where onnxruntime looks for the external data of a graph that it gets as bytes.
FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class Adapted:
    """A derived graph.

    Attributes:
        model: The graph; its weights are where they were, beside the exported graph.
        arrays: The values of its further initializers, by their names, contiguous; they are external data that no file
            holds.
    """

    model: onnx.ModelProto
    arrays: Mapping[str, np.ndarray]

    def inlined(self) -> onnx.ModelProto:
        """Return the graph with the values of its further initializers inside, for engines that take no others."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        for tensor in model.graph.initializer:
            if tensor.name in self.arrays:
                tensor.CopyFrom(onnx.numpy_helper.from_array(self.arrays[tensor.name], tensor.name))
        return model

    def handed_to(self, options: Any, folder: Path) -> bytes:
        """Hand the arrays to onnxruntime, which uses them where they are, and return the graph; keep this object.

        Args:
            options: An `onnxruntime.SessionOptions`.
            folder: The folder of the exported graph, where the weights are.
        """
        from onnxruntime import OrtValue

        options.add_session_config_entry(FOLDER, str(folder))
        types = {tensor.name: tensor.data_type for tensor in self.model.graph.initializer}
        names = list(self.arrays)
        values = []
        for name in names:
            array = self.arrays[name]
            narrow = array.view(np.uint16) if array.dtype.itemsize == 2 else array
            values.append(OrtValue.ortvalue_from_numpy_with_onnx_type(narrow, types[name]))
        options.add_external_initializers(names, values)
        return self.model.SerializeToString()

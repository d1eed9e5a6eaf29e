"""Text in a protobuf that is no text."""

from __future__ import annotations

import onnx

from optimizer.errors import ModelError


def mend_text(proto: onnx.ModelProto) -> None:
    """Comments that are not UTF-8 are read as far as they are; nothing depends on them.

    Raises:
        ModelError: An annotation names a tensor in bytes that are no text.
    """
    for message in (proto, proto.graph):
        for field in ("doc_string", "domain"):
            text = getattr(message, field, "")
            if isinstance(text, bytes):
                setattr(message, field, text.decode("utf-8", "replace"))
        for entry in message.metadata_props:
            for field in ("key", "value"):
                text = getattr(entry, field)
                if isinstance(text, bytes):
                    setattr(entry, field, text.decode("utf-8", "replace"))
    for annotation in proto.graph.quantization_annotation:
        for entry in annotation.quant_parameter_tensor_names:
            if isinstance(entry.key, bytes) or isinstance(entry.value, bytes):
                msg = f"an annotation of '{annotation.tensor_name}' is not text (UTF-8)"
                raise ModelError(msg)

"""Writes results: ONNX files with their manifest."""

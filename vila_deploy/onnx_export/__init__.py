"""Write ONNX graphs of the language model and the vision encoder."""

"""Name what is in an engine folder of this backend."""

# Input of tensorrt-edgellm-export: a folder as transformers writes it.
CHECKPOINT = "llm_checkpoint"
# Its output, in which llm/ is the input of llm_build.
EXPORTED, LLM = "exported", "llm"
GRAPH, EMBEDDING = "model.onnx", "embedding.safetensors"
CONFIG, CHAT_TEMPLATE, TOKENIZER = "config.json", "chat_template.jinja", "tokenizer.json"
INSTRUCTIONS = "EDGE_LLM.md"

"""Name the files in an engine folder of this backend; vision/ is backend onnxruntime's."""

LLM = "llm"
MODEL = "model.gguf"
# Which attention was faster here; written by the first session, in time of need by none.
ATTENTION_CHOICE = "attention.cache"

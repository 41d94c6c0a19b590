"""``vllm-sparse inspect``: a page that shows what each layer and head of a model kept of one prompt."""

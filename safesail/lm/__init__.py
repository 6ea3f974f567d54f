"""The language model: loading, hooks, tokens, texts and activations. The only room that imports transformers."""

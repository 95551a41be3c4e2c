"""The generated pages of ``docs/reference``, one module each; ``tools/generate_docs.py`` writes them."""

"""A small byte-level language model whose memory is a fast weight; README.md says how to run it."""

"""Weights under other projects' names: recognise them, convert them to ours, and convert ours back.

One module per naming (`fair`, `timm`, `transformers`), each with `to_ours` and `from_ours`. Ours are timm's names for
an encoder or a classifier; a complete MAE has them behind `encoder.`, and a decoder behind `decoder.`. `to_ours` of
`from_ours` is the identity, bit for bit. Imports torch, safetensors and mae_core only.
"""

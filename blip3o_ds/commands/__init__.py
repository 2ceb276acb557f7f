"""The commands of `blip3o-ds`, by area; each file has their flags and, below, the functions that run them."""

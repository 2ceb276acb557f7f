"""What the `blip3o-ds data` commands do: convert, verify, repair, append, split, stats."""

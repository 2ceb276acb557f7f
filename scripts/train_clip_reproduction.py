#!/usr/bin/env python
"""Train the DiT: the same as `blip3o-ds train`, as a script for the `deepspeed` launcher.

deepspeed scripts/train_clip_reproduction.py --chunked_embeddings_dir D --output_dir O --model_size base
"""

import sys

from blip3o_ds.cli import command

if __name__ == "__main__":
    command(["train", *sys.argv[1:]])

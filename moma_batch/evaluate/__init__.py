"""How good a run's pictures are: `python3 moma_batch evaluate RUN`, then `compare` and `study`.

Imports run downwards: command > evaluation, compare, study; evaluation > measure > backbones, images; compare and
study > summary > lines > samples. Only `evaluation`, `measure`, `backbones`, `copies` and `images` need PyTorch,
transformers, NumPy and Pillow: tables and comparisons of what is measured are made anywhere. `study` needs Matplotlib
for its picture.
"""

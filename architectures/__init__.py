"""Networks, one per file: `architectures/<name>.py` has `build(num_classes, **options) -> nn.Module`.

The file name is the name on the command line; variants of a network are its options. A network takes
normalised float images [N, 3, H, W] and returns logits [N, num_classes]. The option `input_size`,
if there is one, is set to the side of the data's images in pixels. `python -m architectures` lists all networks.
"""

"""How exit_decision cuts the vocabulary up, for its wrapper and for its kernels."""

# rows of the head in a tile, whatever B is, so that a row's bits depend on that row alone; kTile of
# csrc/cpu/exits.h is the same
TILE = 128
# float32 values in the workspace of every tile and row of exit states; C++ uses 6 of them
PARTIALS = 7

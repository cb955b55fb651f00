"""The Cython core: layout, lock, window, level, decision (each a .pxd), and the classes that stand on them."""

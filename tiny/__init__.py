"""Small, architecturally real vision-language models and real handwriting, made on the spot without any download.

The recipes train models of billions of parameters. This package builds stand-ins that load through the same classes
and the same file formats but train in minutes on one CPU core, from real pictures: the 1797 scanned handwritten digits
that scikit-learn ships. `python -m tiny --help` says what there is.

No recipe imports this package: they meet through files on disk, a model directory and a data set.
"""

"""Notebooks that build, run and measure dense video representations and in-context segmentation

Modules:

- `timet_nb.base.record`: Every number that we quote leaves a line that a program can find again: one measured value, its unit, and all that it depends on.
- `timet_nb.data.catalog`: Frames in the order people count in, gaps noticed, nothing dropped in silence: the two small objects that every later notebook is handed.
- `timet_nb.data.classes`: What does a 1 in this mask mean: the first object, the object, or an aeroplane? One view of any labelled data set answers, and every protocol reads it.
- `timet_nb.data.convert`: VISOR ships outlines in JSON and frames in zips. Write both as plain pictures into a new folder, and leave the originals as they are.
- `timet_nb.data.draws`: One picture with its mask shows what is meant, another is to be segmented. Every question comes from one seedable sampler, with its control.
- `timet_nb.data.known`: DAVIS, YouTube-VOS, MOSE, VISOR, Pascal VOC and plain folders: one small function each that knows its own, and declines the rest.
- `timet_nb.data.layout`: Point at a folder, and learn in one line which data set it is, which clips it holds and which frames have masks, without touching a byte of it."""

__version__ = "0.1.0"

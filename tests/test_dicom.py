"""Films out of DICOM files: pydicom's own shipped files, files made here, and every way in which one can be broken."""
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from timet_nb.base.runtime import DataError
from timet_nb.data.dicom import Cine, echo_clip, echo_path, find_sector, is_dicom, iter_dicom, read_dicom, sector_box

pydicom = pytest.importorskip("pydicom")
SHIPPED = Path(pydicom.__file__).parent / "data" / "test_files"


def make(path, frames, kind="MONOCHROME2", bits=8, **fields):
    "Write a small uncompressed DICOM file; frames (T, H, W) or (T, H, W, 3)."
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, UltrasoundMultiFrameImageStorage, generate_uid
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = UltrasoundMultiFrameImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, "US"
    a = np.asarray(frames)
    ds.Rows, ds.Columns, ds.NumberOfFrames = *a.shape[1:3], len(a)
    ds.SamplesPerPixel = 3 if a.ndim == 4 else 1
    if a.ndim == 4: ds.PlanarConfiguration = 0
    ds.PhotometricInterpretation, ds.PixelRepresentation = kind, int(a.dtype.kind == "i")
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8 * a.dtype.itemsize, bits, bits - 1
    for k, v in fields.items(): setattr(ds, k, v)
    ds.PixelData = a.tobytes() + (b"\0" if a.nbytes % 2 else b"")
    ds.save_as(path, enforce_file_format=True)
    return path


RAMP = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)


# ---------------------------------------------------------------- the echocardiogram
def test_echo_is_a_whole_film():
    film = read_dicom(echo_path())
    assert film.frames.shape == (30, 3, 240, 320) and film.frames.dtype == torch.float32
    assert abs(film.fps - 30) < .01
    assert 0 <= film.frames.min() and film.frames.max() <= 1
    assert any("YBR_FULL_422" in n for n in film.notes)


def test_echo_colours_are_turned_to_rgb():
    "Tissue is grey: in RGB its three channels agree, in raw YBR they do not."
    from pydicom.pixels import iter_pixels
    good = read_dicom(echo_path()).frames[0, :, 60:200, 80:280]
    raw = torch.from_numpy(next(iter_pixels(echo_path(), raw=True))[60:200, 80:280]).movedim(-1, 0) / 255
    spread = lambda x: float((x.amax(0) - x.amin(0)).mean())
    assert spread(good) < .02 < .3 < spread(raw)


def test_region_of_another_size_is_not_trusted():
    "The header's region ends outside of the picture: the clip was halved after it was written."
    film = read_dicom(echo_path())
    assert film.pixel_mm is None and any("(595, 414)" in n for n in film.notes)


def test_echo_clip_is_cut_to_the_sector():
    film = echo_clip()
    t, _, h, w = film.frames.shape
    assert t == 30 and 170 < h < 200 and 240 < w < 275
    assert film.sector.shape == (h, w) and .5 < film.sector.float().mean() < .8
    assert float(film.frames[..., ~film.sector].abs().max()) == 0          # no letter stays
    whole = read_dicom(echo_path()).frames
    lost = (whole.amax(0) - whole.amin(0)).amax(0) > 20 / 255
    inside = find_sector(whole)
    assert (lost & ~inside).float().sum() <= .001 * lost.sum()             # what moves is kept


@pytest.mark.parametrize("change", [1, 2, 3])
def test_sector_rule_has_a_plateau(change):
    box = sector_box(find_sector(read_dicom(echo_path()).frames, change / 255))
    assert all(abs(a - b) <= 6 for a, b in zip(box, (20, 42, 185, 259)))


def test_size_applies_after_the_cut():
    film = echo_clip(size=(64, 96))
    assert film.frames.shape == (30, 3, 64, 96) and film.sector.shape == (64, 96)
    assert echo_clip(size=32).frames.shape[-2] == 32


def test_iter_gives_the_frames_of_read():
    a, b = torch.stack(list(iter_dicom(echo_path(), 48))), read_dicom(echo_path(), 48).frames
    assert torch.equal(a, b)


def test_source_is_not_written_to():
    before = echo_path().stat().st_mtime_ns, echo_path().read_bytes()
    echo_clip(16)
    assert before == (echo_path().stat().st_mtime_ns, echo_path().read_bytes())


def test_repr_says_not_clinical():
    assert "not clinical" in repr(echo_clip(16))


# ---------------------------------------------------------------- pydicom's own zoo
def test_every_shipped_file_reads_or_is_refused_by_name():
    "About 80 files: compressions, byte orders, colour spaces, broken ones. No other kind of error."
    read, refused = 0, 0
    for path in sorted(SHIPPED.glob("*.dcm")):
        try: film = read_dicom(path)
        except DataError as e: refused += 1; assert path.name in str(e) and "expected" in str(e); continue
        read += 1
        assert film.frames.dtype == torch.float32 and film.frames.shape[1] == 3
        assert 0 <= float(film.frames.min()) and float(film.frames.max()) <= 1
    assert read >= 40 and refused >= 10


@pytest.mark.parametrize("name", ["SC_rgb_dcmtk_+eb+cy+n1.dcm", "SC_rgb_dcmtk_+eb+cy+np.dcm", "SC_rgb_dcmtk_+eb+cy+s4.dcm",
                                  "SC_ybr_full_422_uncompressed.dcm", "SC_rgb_jpeg_dcmtk.dcm", "SC_rgb_rle.dcm"])
def test_the_same_picture_in_many_colour_spaces(name):
    "pydicom ships one test card in many encodings; all must come out as the RLE file, which is lossless RGB."
    want = read_dicom(SHIPPED / "SC_rgb_rle.dcm").frames
    assert (read_dicom(SHIPPED / name).frames - want).abs().mean() < .012


@pytest.mark.parametrize("name", ["MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm", "MR_small_jp2klossless.dcm"])
def test_the_same_scan_in_many_encodings(name):
    assert torch.equal(read_dicom(SHIPPED / name).frames, read_dicom(SHIPPED / "MR_small.dcm").frames)


def test_window_agrees_with_pydicom():
    from pydicom.pixels import apply_modality_lut, apply_voi_lut
    ds = pydicom.dcmread(SHIPPED / "MR_small.dcm")
    want = apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds).astype(float)
    want = (want - want.min()) / (want.max() - want.min())
    got = read_dicom(SHIPPED / "MR_small.dcm").frames[0, 0].numpy().astype(float)
    got = (got - got.min()) / (got.max() - got.min())
    assert np.abs(got - want).max() < 1e-5


def test_palette_is_looked_up():
    film = read_dicom(SHIPPED / "examples_palette.dcm")
    spread = film.frames.amax(1) - film.frames.amin(1)
    assert film.frames.shape == (1, 3, 350, 800) and float(spread.max()) > .3      # colours, not numbers


# ---------------------------------------------------------------- files made here
def test_plain_bytes_come_as_shares_of_255(tmp_path):
    film = read_dicom(make(tmp_path / "a.dcm", RAMP))
    assert torch.equal(film.frames[0, 0], torch.from_numpy(RAMP[0]) / 255) and film.fps is None


def test_monochrome1_is_turned_round(tmp_path):
    a = read_dicom(make(tmp_path / "a.dcm", RAMP)).frames
    b = read_dicom(make(tmp_path / "b.dcm", RAMP, "MONOCHROME1"))
    assert torch.allclose(a, 1 - b.frames) and any("MONOCHROME1" in n for n in b.notes)


def test_signed_numbers_without_a_window_use_the_range_of_the_whole_film(tmp_path):
    "One range for all frames: a frame by frame range would make the film flicker."
    a = np.stack([np.full((4, 4), -100), np.full((4, 4), 300)]).astype(np.int16)
    film = read_dicom(make(tmp_path / "a.dcm", a, bits=16, FrameTime="40"))
    assert float(film.frames[0].max()) == 0 and float(film.frames[1].min()) == 1
    assert any("-100 is black and 300 white" in n for n in film.notes)


def test_constant_film_is_defined(tmp_path):
    film = read_dicom(make(tmp_path / "a.dcm", np.full((2, 4, 4), 7, np.int16), bits=16))
    assert torch.isfinite(film.frames).all()


def test_window_and_slope(tmp_path):
    path = make(tmp_path / "a.dcm", RAMP, RescaleSlope="2", RescaleIntercept="-100", WindowCenter="100", WindowWidth="101")
    y = read_dicom(path).frames[0, 0].flatten()
    assert float(y[0]) == 0 and float(y[-1]) == 1
    assert abs(float(y[100]) - ((100 - 49.5) / 100)) < 1e-6       # value 100 in a window from 49.5 to 149.5


@pytest.mark.parametrize("fields, rate", [(dict(FrameTime="33.333"), 30), (dict(FrameTimeVector=["0", "20", "20"]), 50),
                                          (dict(CineRate="24"), 24), (dict(RecommendedDisplayFrameRate="12"), 12),
                                          (dict(FrameTime="0", CineRate="25"), 25), ({}, None)])
def test_frame_rate(tmp_path, fields, rate):
    film = read_dicom(make(tmp_path / "a.dcm", np.zeros((3, 4, 4), np.uint8), **fields))
    if rate is None: assert film.fps is None and any("frame rate" in n for n in film.notes)
    else: assert abs(film.fps - rate) < .01


def test_a_still_has_no_frame_rate_and_no_note_about_it(tmp_path):
    film = read_dicom(make(tmp_path / "a.dcm", RAMP, PixelSpacing=["1", "1"]))
    assert film.fps is None and film.notes == () and len(film) == 1


def test_size_of_a_pixel_follows_resizing_and_cutting(tmp_path):
    path = make(tmp_path / "a.dcm", np.zeros((1, 40, 80), np.uint8), PixelSpacing=["0.5", "0.25"])
    assert read_dicom(path).pixel_mm == (.5, .25)
    assert read_dicom(path, (20, 20)).pixel_mm == (1., 1.)
    sector = torch.zeros(40, 80, dtype=torch.bool); sector[10:30, 20:60] = True
    assert read_dicom(path).crop(sector, size=(10, 10)).pixel_mm == (1., 1.)


def test_ultrasound_region_inside_the_picture_gives_millimetres(tmp_path):
    from pydicom.dataset import Dataset
    r = Dataset()
    r.RegionLocationMinX0 = r.RegionLocationMinY0 = 0
    r.RegionLocationMaxX1, r.RegionLocationMaxY1 = 15, 15
    r.PhysicalUnitsXDirection = r.PhysicalUnitsYDirection = 3
    r.PhysicalDeltaX, r.PhysicalDeltaY = .02, -.03
    film = read_dicom(make(tmp_path / "a.dcm", RAMP, SequenceOfUltrasoundRegions=[r]))
    assert film.pixel_mm == pytest.approx((.3, .2))


def test_sector_of_a_made_film():
    "A blinking disc and a bright still text: the disc is the sector."
    y, x = torch.meshgrid(torch.arange(60), torch.arange(80), indexing="ij")
    disc = (y - 30) ** 2 + (x - 40) ** 2 < 20 ** 2
    frames = torch.zeros(6, 3, 60, 80)
    frames[::2, :, disc] = .5
    frames[:, :, 2:8, 2:30] = 1                                   # a caption
    sector = find_sector(frames)
    both = (sector & disc).sum() / (sector | disc).sum()
    assert both > .9 and not sector[:8, :30].any()
    assert float(Cine(frames).crop().frames[1].max()) == 0        # the caption is gone


def test_nothing_moves():
    with pytest.raises(DataError, match="no region that changes"): find_sector(torch.full((3, 3, 20, 20), .5))


# ---------------------------------------------------------------- faults
def test_faults_name_the_file(tmp_path):
    (tmp_path / "empty.dcm").write_bytes(b"")
    (tmp_path / "page.dcm").write_text("<html>not found</html>")
    from PIL import Image
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.png")
    for name, word in (("gone.dcm", "No such file"), ("empty.dcm", "no DICOM header"), ("page.dcm", "no DICOM header"),
                       ("photo.png", "read_image"), (".", "irectory")):
        with pytest.raises(DataError, match=word) as e: read_dicom(tmp_path / name)
        assert str(tmp_path) in str(e.value)


def test_not_a_path():
    with pytest.raises(DataError): read_dicom(None)


def test_cut_off_file(tmp_path):
    path = make(tmp_path / "a.dcm", np.zeros((5, 16, 16), np.uint8))
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(DataError, match="a.dcm"): read_dicom(path)


@pytest.mark.parametrize("n", [25, 40])
def test_count_that_is_not_the_files(tmp_path, n):
    "A compressed film of 30 frames whose header announces fewer or more: never a silent guess."
    ds = pydicom.dcmread(echo_path())
    ds.NumberOfFrames = n
    ds.save_as(tmp_path / "a.dcm")
    with pytest.raises(DataError, match="a.dcm"): read_dicom(tmp_path / "a.dcm", 16)


def test_bad_count_of_frames(tmp_path):
    with pytest.raises(DataError, match="NumberOfFrames"): read_dicom(SHIPPED / "badVR.dcm")


def test_report_without_pictures():
    with pytest.raises(DataError, match="modality SR"): read_dicom(SHIPPED / "test-SR.dcm")


@pytest.mark.skipif(any(importlib.util.find_spec(m) for m in ("pylibjpeg", "gdcm", "jpeg_ls")), reason="a decoder is installed")
def test_missing_decoder_is_told():
    with pytest.raises(DataError, match="pylibjpeg"): read_dicom(SHIPPED / "JPEGLSNearLossless_08.dcm")


def test_without_pydicom_the_line_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(DataError, match="pip install pydicom"): echo_clip()


def test_module_does_not_import_pydicom():
    import subprocess
    code = "import sys, timet_nb.data.dicom; sys.exit('pydicom' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_patient_fields_stay_in_the_file():
    "The file names a patient; nothing of it comes out."
    ds = pydicom.dcmread(echo_path(), stop_before_pixels=True)
    text = " ".join(read_dicom(echo_path()).notes)
    assert str(ds.PatientName) not in text and ds.PatientID not in text.split()


# ---------------------------------------------------------------- headers that do not tell
def region(**fields):
    "An ultrasound region of a 16 x 16 screen, in centimetres."
    from pydicom.dataset import Dataset
    r = Dataset()
    r.RegionLocationMinX0 = r.RegionLocationMinY0 = 0
    r.RegionLocationMaxX1, r.RegionLocationMaxY1 = 15, 15
    r.PhysicalUnitsXDirection = r.PhysicalUnitsYDirection = 3
    for k, v in fields.items(): setattr(r, k, v)
    return r


@pytest.mark.parametrize("fields", [{}, dict(PhysicalDeltaX=.02), dict(PhysicalDeltaY=.02), dict(PhysicalDeltaX=0., PhysicalDeltaY=.02),
                                    dict(PhysicalDeltaX=.02, PhysicalDeltaY=float("nan")), dict(PhysicalDeltaX=.02, PhysicalDeltaY=None)])
def test_region_without_a_scale_gives_none_and_a_note(tmp_path, fields):
    film = read_dicom(make(tmp_path / "a.dcm", RAMP, SequenceOfUltrasoundRegions=[region(**fields)]))
    assert film.pixel_mm is None and any("PhysicalDeltaX and PhysicalDeltaY" in n for n in film.notes)
    both = [region(**fields), region(PhysicalDeltaX=.02, PhysicalDeltaY=.03)]              # the next region may tell
    assert read_dicom(make(tmp_path / "b.dcm", RAMP, SequenceOfUltrasoundRegions=both)).pixel_mm == pytest.approx((.3, .2))
    film = read_dicom(make(tmp_path / "c.dcm", RAMP, SequenceOfUltrasoundRegions=[region(**fields)], PixelSpacing=["1", "2"]))
    assert film.pixel_mm == (1., 2.) and any("PhysicalDelta" in n for n in film.notes)


@pytest.mark.parametrize("fields", [dict(PixelSpacing="1"), dict(PixelSpacing=["0", "1"]), dict(PixelSpacing=["1", "2", "3"]), dict(PixelSpacing=None)])
def test_spacing_that_is_no_pair_of_sizes(tmp_path, fields):
    film = read_dicom(make(tmp_path / "a.dcm", RAMP, **fields))
    assert film.pixel_mm is None and any("size of a pixel" in n for n in film.notes)


def spoil(path, **fields):
    "Set fields of a written file, pydicom's checks off; None deletes."
    from pydicom import config
    old, config.settings.writing_validation_mode = config.settings.writing_validation_mode, config.IGNORE
    try:
        ds = pydicom.dcmread(path)
        for k, v in fields.items():
            if v is None: del ds[k]
            else: ds[k].value = v
        ds.save_as(path)
    finally: config.settings.writing_validation_mode = old
    return path


@pytest.mark.parametrize("fields", [dict(Rows=[8, 8]), dict(Rows=""), dict(Columns=0), dict(BitsStored=None), dict(BitsStored=0), dict(BitsStored=[8, 8])])
def test_headers_without_a_size_or_depth_are_refused_by_name(tmp_path, fields):
    for kind, a in (("MONOCHROME2", RAMP), ("RGB", np.zeros((1, 8, 8, 3), np.uint8))):
        path = spoil(make(tmp_path / f"{kind}.dcm", a, kind), **fields)
        try: film = read_dicom(path)
        except DataError as e: assert path.name in str(e)
        else: assert fields.keys() & {"BitsStored", "Rows"} and torch.isfinite(film.frames).all()      # lists: the first one


def test_broken_palette_is_refused_by_name(tmp_path):
    for name in ("RedPaletteColorLookupTableData", "BluePaletteColorLookupTableData", "RedPaletteColorLookupTableDescriptor"):
        ds = pydicom.dcmread(SHIPPED / "examples_palette.dcm")
        del ds[name]
        ds.save_as(tmp_path / "a.dcm")
        with pytest.raises(DataError, match="a.dcm"): read_dicom(tmp_path / "a.dcm")


@pytest.mark.parametrize("field, text", [("FrameTimeVector", ["0", "2|", "x"]), ("FrameTime", "1e400"), ("WindowCenter", "nan"), ("WindowWidth", "wide")])
def test_numbers_that_are_none_count_as_absent(tmp_path, field, text):
    from pydicom import config
    keep = config.settings.reading_validation_mode, config.settings.writing_validation_mode
    config.settings.reading_validation_mode = config.settings.writing_validation_mode = config.IGNORE
    try:
        good = {"FrameTimeVector": ["0", "20", "20"], "FrameTime": "40", "WindowCenter": "99", "WindowWidth": "99"}[field]
        path = make(tmp_path / "a.dcm", np.arange(32, dtype=np.uint8).reshape(2, 4, 4), **{field: good})
        raw = path.read_bytes()
        old = "\\".join(good) if isinstance(good, list) else good
        new = "\\".join(text) if isinstance(text, list) else text
        old, new = old.encode() + b" " * (len(old) % 2), new.encode() + b" " * (len(new) % 2)
        at = raw.index(b"DS" + len(old).to_bytes(2, "little") + old)
        path.write_bytes(raw[:at] + b"DS" + len(new).to_bytes(2, "little") + new + raw[at + 4 + len(old):])
        film = read_dicom(path)
    finally: config.settings.reading_validation_mode, config.settings.writing_validation_mode = keep
    assert film.fps is None and torch.isfinite(film.frames).all() and float(film.frames.max()) <= 1


def test_header_bytes_flipped_at_random_are_read_or_refused_by_name(tmp_path):
    "Unknown kinds of values, odd lengths, lists for numbers: pydicom has many errors, we have one."
    import random
    dice = random.Random(0)
    whole = make(tmp_path / "whole.dcm", RAMP, SequenceOfUltrasoundRegions=[region(PhysicalDeltaX=.02, PhysicalDeltaY=.03)], PixelSpacing=["1", "2"],
                 WindowCenter="100", WindowWidth="101", RescaleSlope="2", RescaleIntercept="-100").read_bytes()
    read = refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(dice.choice((1, 3))): data[dice.randrange(132, len(data) - 256)] = dice.randrange(256)
        (tmp_path / "x.dcm").write_bytes(bytes(data))
        try: film = read_dicom(tmp_path / "x.dcm")
        except DataError as e: refused += 1; assert "x.dcm" in str(e); continue
        read += 1
        assert torch.isfinite(film.frames).all() and (film.pixel_mm is None or min(film.pixel_mm) > 0)
    assert read > 20 and refused > 5


def test_is_dicom_by_name_and_by_content(tmp_path):
    film = tmp_path / "film.dcm"; film.write_bytes(b"x")
    bare = tmp_path / "film"; bare.write_bytes(bytes(128) + b"DICM")
    other = tmp_path / "other"; other.write_bytes(b"DICM" + bytes(200))
    assert is_dicom(film) and is_dicom(str(bare)) and not is_dicom(other)
    assert not is_dicom(tmp_path) and not is_dicom(tmp_path / "missing.dcm")

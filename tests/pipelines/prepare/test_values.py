"""Datasets of more than 8 bits and three channels: their statistics and ranges are exact, and nothing is guessed."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from mae_core.errors import UserError
from mae_core.normalization import ValueRange
from mae_core.values import to_unit
from pipelines.config import PrepareConfig
from pipelines.dataset.manifest import Manifest, read_manifest
from pipelines.images.decode import read_values
from pipelines.images.encode import as_png
from pipelines.prepare import prepare
from pipelines.prepare.values import ValueSums, described, levels_of
from pipelines.storage import open_storage
from tests.pipelines.images.field_files import cloud_optimised, deep_png, npy, scene, slide, tiff, tiff_pages
from tests.pipelines.images.test_medical import dicom

pytestmark = pytest.mark.usefixtures("without_ray")
ALL: dict[str, Any] = {"val_fraction": 0.0}


def write(folder: Path, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return str(folder)


def rows_of(uri: str, split: str = "train") -> dict[str, NDArray[Any]]:
    """Return the stored values of a split by source."""
    storage, found = open_storage(uri), {}
    for shard in read_manifest(storage).splits[split].shards:
        for row in pq.read_table(storage.open_input(shard.path)).to_pylist():
            found[row["source"]] = read_values(row["image"])[0]
    return found


def prepared(tmp_path: Path, files: dict[str, bytes], **options: Any) -> tuple[str, Manifest]:
    out = str(tmp_path / "out")
    return out, prepare(write(tmp_path / "source", files), out, PrepareConfig(**{**ALL, **options}))


TWELVE = [scene(1, seed, largest=4095) for seed in range(6)]


@pytest.mark.parametrize("encoded", [lambda v: deep_png(v), lambda v: tiff(v[:, :, 0]), npy])
def test_twelve_bits_in_sixteen_need_a_range(tmp_path: Path, encoded: Any) -> None:
    # Readers are chosen by content, not by suffix.
    files = {f"{i}.tif": encoded(values) for i, values in enumerate(TWELVE)}
    with pytest.raises(
        UserError, match=r"the values of .*, read as uint16, run from 0 to 4095 .*6\.\d% of 0 to 65535.*--range"
    ):
        prepared(tmp_path, files)
    assert not list((tmp_path / "out").rglob("*.parquet")), "the command with --range starts anew"
    uri, manifest = prepared(tmp_path, files, range=("window", "2048", "4096"))
    assert manifest.values is not None
    assert (manifest.channels, manifest.values.range.dtype) == (1, "uint16")
    assert (manifest.values.range.low, manifest.values.range.high) == ((0.0,), (4096.0,))
    stored = rows_of(uri)
    for name, values in zip(sorted(stored), TWELVE, strict=True):
        np.testing.assert_array_equal(stored[name], values)
    unit = np.stack(TWELVE) / 4096
    np.testing.assert_allclose((manifest.mean, manifest.std), ([unit.mean()], [unit.std()]), rtol=1e-12)
    assert (manifest.values.minimum, manifest.values.maximum) == ([0.0], [4095.0])
    together = np.stack(TWELVE).ravel()
    for share, found in manifest.values.percentiles.items():
        assert found == [np.percentile(together, float(share), method="inverted_cdf")]


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "float64"])
def test_values_of_other_types_are_read_as_fractions_and_said_to_be(tmp_path: Path, dtype: str) -> None:
    images = [values.astype(dtype) * (0.5 if dtype == "float64" else 1) for values in TWELVE]
    files = {f"{i}.tif": tiff(values[:, :, 0]) for i, values in enumerate(images)}
    most = images[0].max()
    with pytest.raises(
        UserError, match=rf"the values of .*, read as float32, run from 0 to {most:g} \(0.1 to 99.9 % of"
    ):
        prepared(tmp_path, files)
    uri, manifest = prepared(tmp_path, files, range=("min-max",))
    assert manifest.values is not None
    assert (manifest.values.minimum, manifest.values.maximum) == ([0.0], [most])
    for name, values in zip(sorted(stored := rows_of(uri)), images, strict=True):
        np.testing.assert_array_equal(stored[name], values)


def test_upright_film_stored_with_white_as_zero_is_upright(tmp_path: Path) -> None:
    images = {f"{i}.tif": values[:, :, 0] for i, values in enumerate(scene(1, seed) for seed in range(3))}
    files = {name: tiff(65535 - values, photometric="miniswhite") for name, values in images.items()}
    uri, manifest = prepared(tmp_path, files)
    assert manifest.notes == {"white is zero, inverted": 3}
    for name, values in rows_of(uri).items():
        np.testing.assert_array_equal(values[:, :, 0], images[name])


def test_images_that_are_nearly_black_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    masks = {f"{i}.png": as_png((scene(1, i) > 30000).astype(np.uint8)).content for i in range(3)}
    uri, manifest = prepared(tmp_path / "plain", masks)
    assert (manifest.values, manifest.num_ok) == (None, 3)
    assert "the images are nearly black: their mean is 0." in caplog.text
    caplog.clear()
    uri, manifest = prepared(tmp_path / "ranged", masks, range=("min-max",))
    assert set(np.unique(list(rows_of(uri).values()))) == {0, 1}
    assert 0.3 < manifest.mean[0] < 0.7
    prepared(tmp_path / "light", {f"{i}.png": as_png((scene(1, i) >> 8).astype(np.uint8)).content for i in range(3)})
    assert "nearly black" not in caplog.text


def test_full_range_needs_no_option(tmp_path: Path) -> None:
    _, manifest = prepared(tmp_path, {f"{i}.tif": tiff(scene(1, i)[:, :, 0]) for i in range(4)})
    assert manifest.values is not None
    assert (manifest.values.range.kind, manifest.values.range.low) == ("full", (0.0,))
    assert manifest.schema == 2
    assert read_manifest(open_storage(str(tmp_path / "out"))) == manifest


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_ranges_of_the_set_and_of_each_image(tmp_path: Path, dtype: str) -> None:
    images = [(scene(2, i, largest=9000 * (i + 1)) / (1 if dtype != "float32" else 7)).astype(dtype) for i in range(3)]
    files = {f"{i}.npy": npy(values) for i, values in enumerate(images)}
    flat = np.concatenate([values.reshape(-1, 2) for values in images])
    chosen = {
        ("min-max",): (flat.min(0), flat.max(0)),
        ("percentiles", "2", "98"): np.percentile(flat, (2, 98), axis=0, method="inverted_cdf"),
    }
    for i, (range_, (low, high)) in enumerate(chosen.items()):
        _, manifest = prepared(tmp_path / f"{i}", files, range=range_)
        assert manifest.values is not None
        # Levels of float32 are within 0.2 %.
        tolerance = 0.003 if dtype == "float32" and len(range_) > 1 else 0
        np.testing.assert_allclose(manifest.values.range.low, low, rtol=tolerance, atol=tolerance * 10)
        np.testing.assert_allclose(manifest.values.range.high, high, rtol=tolerance)
        unit = to_unit(flat, np.array(manifest.values.range.low), np.array(manifest.values.range.high))
        exact = 2e-3 if tolerance else 1e-6
        np.testing.assert_allclose(manifest.mean, unit.mean(0, dtype=float), rtol=exact)
        np.testing.assert_allclose(manifest.std, unit.std(0, dtype=float), rtol=exact)
    _, manifest = prepared(tmp_path / "by", files, range=("percentiles", "2", "98"), range_by="image")
    assert manifest.values is not None
    assert manifest.values.range == ValueRange(
        dtype=dtype,  # pyright: ignore[reportArgumentType]
        kind="percentiles",
        by="image",
        percentiles=(2.0, 98.0),
    )
    units = []
    for values in images:
        low, high = np.percentile(values.reshape(-1, 2), (2, 98), axis=0, method="inverted_cdf")
        units.append(to_unit(values, low.astype(float), high.astype(float)).reshape(-1, 2))
    np.testing.assert_allclose(manifest.mean, np.concatenate(units).mean(0, dtype=float), rtol=1e-6)


def test_thirteen_bands_are_stored_and_counted(tmp_path: Path) -> None:
    images = {f"{i}.tif": scene(13, i, largest=10000) for i in range(5)}
    uri, manifest = prepared(
        tmp_path,
        {name: tiff(values, photometric="minisblack", compression="zlib") for name, values in images.items()},
        range=("percentiles", "1", "99"),
    )
    assert (manifest.channels, len(manifest.mean), manifest.image_px, manifest.num_ok) == (13, 13, (40, 40), 5)
    for name, values in rows_of(uri).items():
        np.testing.assert_array_equal(values, images[name])


def test_other_kinds_are_quarantined_by_name(tmp_path: Path) -> None:
    files = {f"{i}.tif": tiff(scene(4, i), photometric="minisblack") for i in range(5)}
    files["odd.tif"] = tiff(scene(5), photometric="minisblack")
    files["eight.png"] = deep_png(scene(1))
    with pytest.raises(UserError, match=r"odd.tif \(other pixels: uint16 in 5 channels, but most images .* 4 channels"):
        prepared(tmp_path, files, range=("full",))
    _, manifest = prepared(tmp_path, files, range=("full",), max_bad=0.5)
    assert (manifest.num_ok, manifest.num_quarantined, manifest.quarantine_reasons) == (5, 2, {"other pixels": 2})


def test_radiographs_of_both_polarities_are_alike(tmp_path: Path) -> None:
    """Two patients a class, one of each stored with white as its lowest value."""
    films = {
        f"{label}/{n}.dcm": scene(1, 10 * n + len(label), largest=4095) for label in ("sick", "well") for n in (1, 2)
    }
    for name, film in films.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = film[:, :, 0]
        content = dicom(4095 - stored, "MONOCHROME1", bits=12) if name.endswith("1.dcm") else dicom(stored, bits=12)
        path.write_bytes(content)
    options = PrepareConfig(**ALL, range=("window", "2048", "4096"))
    manifest = prepare(str(tmp_path / "source"), str(tmp_path / "out"), options)
    assert manifest.classes == ["sick", "well"]
    assert manifest.notes == {"MONOCHROME1, inverted": 2}
    for name, values in rows_of(str(tmp_path / "out")).items():
        np.testing.assert_array_equal(values, films[name])


def test_frames_are_images_of_one_file(tmp_path: Path) -> None:
    files = {f"{i}.tif": tiff_pages(np.stack([scene(1, i * 10 + k)[:, :, 0] for k in range(5)])) for i in range(3)}
    with pytest.raises(UserError, match="several frames: 5"):
        prepared(tmp_path, files, max_bad=0.5)
    for frames, expected in {"first": [0], "all": [0, 1, 2, 3, 4], "2": [0, 2, 4]}.items():
        uri, manifest = prepared(tmp_path / frames, files, frames=frames, range=("full",))
        assert (manifest.num_found, manifest.num_ok) == (3, 3)
        names = {f"{i}.tif" + (f"#{k}" if frames != "first" else "") for i in range(3) for k in expected}
        found = rows_of(uri)
        assert set(found) == names
        for name, values in found.items():
            file, _, frame = name.partition("#")
            wanted = scene(1, int(file[0]) * 10 + int(frame or 0))
            np.testing.assert_array_equal(values, wanted)


def test_scenes_are_cut_into_tiles_and_those_without_data_are_left_out(tmp_path: Path) -> None:
    scenes = [scene(2, seed, side_px=100).astype(np.float32) for seed in range(2)]
    scenes[0][:50, :50] = np.nan
    files = {f"{i}.tif": tiff(values) for i, values in enumerate(scenes)}
    uri, manifest = prepared(tmp_path, files, range=("min-max",), tile_px=40)
    assert (manifest.num_found, manifest.num_ok, manifest.image_px) == (2, 2, (40, 40))
    assert manifest.notes["tiles left out for too little data"] == 1
    corners = [(top, left) for top in (0, 40, 60) for left in (0, 40, 60)]
    found = rows_of(uri)
    wanted = {f"{i}.tif@{top},{left}" for i in range(2) for top, left in corners} - {"0.tif@0,0"}
    assert set(found) == wanted
    np.testing.assert_array_equal(found["1.tif@40,60"], scenes[1][40:80, 60:100])
    photograph = {"a.tif": tiff((scene(3, side_px=100) >> 8).astype(np.uint8))}
    uri, manifest = prepared(tmp_path / "eight", photograph, tile_px=64)
    assert (manifest.values, manifest.image_px) == (None, (64, 64))
    np.testing.assert_array_equal(rows_of(uri)["a.tif@36,0"], (scene(3, side_px=100) >> 8)[36:, :64])


def test_a_channel_without_data_is_named(tmp_path: Path) -> None:
    values = scene(3).astype(np.float32) / 65535
    values[:, :, 1] = np.nan
    full = scene(3).astype(np.float32) / 65535
    for files in ({"a.npy": npy(values)}, {"train/a.npy": npy(values), "val/b.npy": npy(full)}):
        with pytest.raises(UserError, match=r"channels 1 \(from 0\) of .* have no data in any training image"):
            prepared(tmp_path / str(len(files)), files, range=("full",))
        assert not list((tmp_path / str(len(files)) / "out").rglob("*.parquet"))


def test_what_is_done_to_images_is_counted(tmp_path: Path) -> None:
    images = [(scene(3, i) >> 8).astype(np.uint8) for i in range(3)]
    files = {f"{i}.tif": cloud_optimised(values, photometric="rgb") for i, values in enumerate(images)}
    files["w.tif"] = tiff(images[0][:, :, 0], photometric="miniswhite")
    _, manifest = prepared(tmp_path, files)
    assert manifest.values is None
    assert manifest.notes == {"overviews left out": 3, "white is zero, inverted": 1}
    assert manifest.summary["notes"] == manifest.notes


def test_sixteen_bits_among_photographs_become_eight(tmp_path: Path, zoo: list) -> None:
    files = {a.name: a.content for a in zoo if a.name.endswith(".png") and not a.reason}
    assert "sixteen-bit.png" in files
    _, manifest = prepared(tmp_path, files)
    assert (manifest.values, manifest.schema, manifest.num_quarantined) == (None, 1, 0)
    assert "values" not in manifest.to_dict()


def test_a_range_is_checked_before_anything_is_read() -> None:
    for range_, message in {
        ("window", "3"): "range 'window 3' is none",
        ("percentiles", "9", "1"): "percentiles 9 1 are not 0 <= A < B <= 100",
        ("window", "wide", "narrow"): "words where numbers belong",
        ("window", "3", "0"): "window width 0 is not above 0",
    }.items():
        with pytest.raises(UserError, match=message):
            PrepareConfig(range=range_)
    with pytest.raises(UserError, match="range_by is image, but range full is the same for all"):
        PrepareConfig(range_by="image")
    with pytest.raises(UserError, match="frames 'some' is none of one, first, all"):
        PrepareConfig(frames="some")


def test_sums_do_not_depend_on_the_order_and_survive_json() -> None:
    images = [scene(3, seed) for seed in range(5)]
    sums = [ValueSums(dtype="uint16") for _ in range(2)]
    for number, order in enumerate((images, images[::-1])):
        for values in order:
            sums[number].add(values, None, None)
    config = PrepareConfig(range=("percentiles", "1", "99"))
    assert described(sums[0], config) == described(sums[1], config)
    assert described(ValueSums.from_json(sums[0].to_json()), config) == described(sums[0], config)


def test_levels_of_fractions_are_in_order_and_near_their_values() -> None:
    values = np.random.default_rng(0).normal(0, 1000, (50, 50, 1)).astype(np.float32)
    sums = ValueSums(dtype="float32")
    sums.add(values, None, None)
    (channel,) = sums.channels()
    levels = levels_of("float32")
    occurring = levels[channel.counts.nonzero()[0]]
    assert (np.diff(occurring) > 0).all()
    for share in (1.0, 30.0, 50.0, 99.0):
        exact = np.percentile(values, share, method="inverted_cdf")
        assert abs(channel.percentile(share, levels) - exact) <= 0.004 * abs(exact)


def test_tiles_of_a_slide_have_tissue(tmp_path: Path) -> None:
    scan = np.full((64, 96, 3), 240, np.uint8)
    scan[:32, 32:64] = (200, 120, 180)
    scan[32:40, :32] = (200, 120, 180)
    files = {"a/one.svs": slide(scan), "a/glass.svs": slide(np.full((64, 96, 3), 240, np.uint8))}
    uri, manifest = prepared(tmp_path, files, min_tissue=0.2, tile_px=32, max_bad=0.5)
    assert set(rows_of(uri)) == {"a/one.svs@0,32", "a/one.svs@32,0"}
    assert manifest.quarantine_reasons == {"no tissue": 1}
    assert manifest.notes["tiles left out for too little tissue"] == 4
    with pytest.raises(UserError, match="min_tissue chooses tiles"):
        PrepareConfig(min_tissue=0.1)


def test_tiles_without_data_are_left_out_of_eight_bits_too(tmp_path: Path) -> None:
    pixels = scene(3, largest=200).astype(np.uint8) + 1
    pixels[:20] = 0
    alpha = np.where(pixels[:, :, :1] > 0, 255, 0).astype(np.uint8)
    masked = {"extrasamples": ["unassalpha"], "photometric": "rgb"}
    files = {
        "nodata.tif": tiff(pixels, extratags=[(42113, 2, 0, "0", True)]),
        "alpha.tif": tiff(np.concatenate([pixels + 1, alpha], axis=2), **masked),
    }
    uri, _ = prepared(tmp_path, files, tile_px=20)
    assert set(rows_of(uri)) == {f"{name}@20,{left}" for name in files for left in (0, 20)}

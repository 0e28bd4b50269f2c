"""ats.datasets.decode: the right frames for every kind of file, and errors for damaged ones."""

from __future__ import annotations

import json
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext
from clips import encode, noise, numbered_frame, read_numbers, remux

from ats.datasets.decode import ClipSampling, Video
from ats.errors import UserError

GOLDEN = json.loads((Path(__file__).parents[1] / "fixtures" / "video_data_path" / "case.json").read_text())
FORMATS = [("h264", "mp4"), ("h264", "mkv"), ("h264", "mov"), ("hevc", "mp4"), ("hevc", "mkv")]
FORMATS += [(codec, suffix) for codec in ("vp9", "av1") for suffix in ("mp4", "webm", "mkv")]
SETS = ([0], [59], [0, 5, 10], [11, 12, 13], [24, 23, 47, 47], [30, 41, 59], list(range(60)))


def decode_everything(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize(("codec", "suffix"), [("mpeg4", "avi"), ("mpeg4", "mp4"), ("wmv2", "wmv"), ("vp8", "avi")])
def test_the_rate_of_a_picture_that_does_not_move(tmp_path, codec, suffix):
    """Most packets are of a few bytes then, and only decoding tells whether they are frames."""
    path = encode(tmp_path / f"still.{suffix}", [numbered_frame(0)] * 45, codec=codec)
    with Video(path) as video:
        assert (video.num_frames, video.fps) == (45, pytest.approx(30, rel=0.05))


def test_temporal_sampling_is_slowfasts():
    """All 232 rows of the golden case, to the frame."""
    rows = GOLDEN["temporal_sampling"]["rows"]
    for row in rows:
        sampling = ClipSampling(
            row["num_frames"], row["sampling_rate"], row["target_fps"], use_offset_sampling=row["use_offset"]
        )
        size = sampling.size(row["fps"])
        start = sampling.start(row["video_frames"], size, clip=row["clip_idx"], num_clips=row["num_clips"])
        assert size == pytest.approx(row["clip_size"], abs=1e-6)
        assert (start, start + size - 1) == pytest.approx((row["start"], row["end"]), abs=1e-6)
        assert sampling.indices(row["video_frames"], size, start) == row["frame_indices"]
    assert len(rows) == 232


@pytest.mark.parametrize(("codec", "suffix"), FORMATS)
def test_seeking_finds_the_frames_of_decoding_everything(tmp_path, codec, suffix):
    """Compares frame numbers and pixels, within one group of pictures and across several."""
    path = encode(tmp_path / f"clip.{suffix}", codec=codec)
    every = decode_everything(path)
    assert read_numbers(every) == list(range(60))
    with Video(path) as video:
        assert (video.num_frames, video.fps) == (60, 30.0)
        for indices in SETS:
            frames = video.read(indices)
            assert np.array_equal(frames, every[indices])
        assert len(video._key_pts) > 1  # otherwise nothing was skipped by seeking


@pytest.mark.parametrize(
    "options",
    [
        {"bf": "0"},
        {"bf": "6", "b-pyramid": "normal"},
        {"x264-params": "open-gop=1:bframes=4:scenecut=0:keyint=10:min-keyint=10"},
        {"x264-params": "intra-refresh=1:keyint=15"},
    ],
    ids=["no B-frames", "B-pyramid", "open groups", "no key frames but the first"],
)
def test_h264_structures(tmp_path, options):
    path = encode(tmp_path / "clip.mp4", noise(60), options=options)
    every = decode_everything(path)
    with Video(path) as video:
        for indices in SETS:
            assert np.array_equal(video.read(indices), every[indices])


def test_open_groups_of_hevc(tmp_path):
    """Frames displayed before a key frame may depend on the previous group."""
    options = {"x265-params": "open-gop=1:bframes=4:keyint=10:min-keyint=10:scenecut=0:log-level=none"}
    path = encode(tmp_path / "clip.mp4", noise(60), codec="hevc", options=options)
    every = decode_everything(path)
    with Video(path) as video:
        for indices in SETS + tuple([i] for i in range(60)):
            assert np.array_equal(video.read(indices), every[indices])


def test_only_the_clip_is_decoded(tmp_path, monkeypatch):
    """Reading two frames near the end of a long video decodes one group of pictures, not the whole video."""
    path = encode(tmp_path / "clip.mp4", 250, gop_size=25)
    shown = []
    with Video(path) as video:
        original = video._frames_from
        monkeypatch.setattr(video, "_frames_from", lambda *a: (shown.append(f) or f for f in original(*a)))
        assert read_numbers(video.read([230, 240])) == [230, 240]
    assert len(shown) <= 25


def test_avi_frames_are_counted(tmp_path):
    """Its packets have no usable time stamps."""
    path = encode(tmp_path / "clip.avi")
    with Video(path) as video:
        assert video._pts is None
        assert video.num_frames == 60
        for indices in SETS:
            assert read_numbers(video.read(indices)) == indices


@pytest.mark.parametrize(("codec", "suffix"), [("h264", "mp4"), ("h264", "mkv"), ("vp9", "webm")])
def test_variable_frame_rate(tmp_path, codec, suffix):
    """Frames are counted as in SlowFast; the rate is the average, whatever the header says."""
    milliseconds = np.cumsum(np.random.default_rng(0).integers(15, 80, 60)).tolist()
    path = encode(tmp_path / f"clip.{suffix}", codec=codec, milliseconds=milliseconds)
    with Video(path) as video:
        assert video.num_frames == 60
        assert video.fps == pytest.approx(59_000 / (milliseconds[-1] - milliseconds[0]), rel=0.03)
        for indices in SETS:
            assert read_numbers(video.read(indices)) == indices


def assert_like_decoding_everything(path: Path) -> int:
    """Compares every frame, and single ones; returns their number."""
    every = decode_everything(path)
    with Video(path) as video:
        assert video.num_frames == len(every)
        for indices in ([0], [len(every) - 1], [5, 6, 7], list(range(len(every)))):
            assert np.array_equal(video.read(indices), every[indices])
    return len(every)


@pytest.mark.parametrize(
    ("codec", "suffix"),
    [("vp8", "webm"), ("vp8", "mkv"), ("vp9", "webm"), ("vp9", "mp4"), ("av1", "webm"), ("av1", "mp4")],
)
def test_packets_that_show_nothing_are_no_frames(tmp_path, codec, suffix):
    """Alternate reference frames in packets of their own, each with its own time stamp."""
    plain, num_packets = encode(tmp_path / "plain.mkv", 40, codec=codec, gop_size=12), 0

    def hide(packets: list[av.Packet]) -> list[av.Packet]:
        nonlocal num_packets
        if codec == "av1":  # has such frames of its own, in packets together with one that is shown
            split = BitStreamFilterContext("av1_frame_split", packets[0].stream)
            packets = [part for packet in packets for part in split.filter(packet)]
        num_packets, result = len(packets), []
        for number, packet in enumerate(packets):
            data = bytearray(packet)
            if packet.is_keyframe and number:
                data[0] &= ~{"vp8": 16, "vp9": 2, "av1": 0}[codec]  # show_frame
            result.append(av.Packet(bytes(data)))
            result[-1].is_keyframe, result[-1].time_base = packet.is_keyframe, Fraction(1, 1000)
            result[-1].pts = result[-1].dts = 10 * number
        return result

    path = remux(tmp_path / f"hidden.{suffix}", [plain], hide)
    assert 30 < assert_like_decoding_everything(path) < num_packets


@pytest.mark.parametrize("codec", ["h264", "hevc"])
@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_time_stamps_in_the_order_of_decoding(tmp_path, codec, suffix):
    """Some programs give frames the time stamps of decoding: these do not say in which order they are shown."""

    def use_order(packets: list[av.Packet]) -> list[av.Packet]:
        for number, packet in enumerate(packets):
            packet.pts = packet.dts = 40 * number
        return packets

    plain = encode(tmp_path / "plain.mkv", codec=codec)
    assert_like_decoding_everything(remux(tmp_path / f"clip.{suffix}", [plain], use_order))


@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_file_that_starts_with_an_open_group(tmp_path, codec):
    """Frames shown before the first key frame lack their references; some decoders leave them out."""
    options = {"h264": {"x264-params": ""}, "hevc": {"x265-params": "log-level=none:"}}[codec]
    options = {k: f"{v}open-gop=1:bframes=4:keyint=10:min-keyint=10:scenecut=0:b-adapt=0" for k, v in options.items()}
    plain = encode(tmp_path / "plain.mkv", noise(40), codec=codec, options=options)

    def cut(packets: list[av.Packet]) -> list[av.Packet]:
        return packets[[i for i, packet in enumerate(packets) if packet.is_keyframe][1] :]

    assert 20 < assert_like_decoding_everything(remux(tmp_path / "clip.mkv", [plain], cut)) < 40


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
def test_trimmed_without_decoding(tmp_path, suffix):
    """Frames with negative time stamps: an edit list (mp4, mov) says that they are not shown."""
    plain = encode(tmp_path / "plain.mp4", noise(60))

    def shift(packets: list[av.Packet]) -> list[av.Packet]:
        for packet in packets:
            packet.pts, packet.dts = packet.pts - 8000, packet.dts - 8000
        return packets

    assert_like_decoding_everything(remux(tmp_path / f"clip.{suffix}", [plain], shift))


TURNED = [(degrees, hflip) for degrees in (0, 90, 180, 270) for hflip in (False, True)]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize(("degrees", "hflip"), [*TURNED, (30, False), (100, True)])
def test_display_matrix(tmp_path, degrees, hflip, suffix):
    """Frames are turned to the left by the nearest quarter turn, then mirrored: all eight ways to hold a phone."""
    frame = np.zeros((48, 64, 3), np.uint8)
    frame[:16, :16] = 255
    frame[:16, 48:] = 128
    path = encode(tmp_path / f"clip.{suffix}", [frame] * 3, rotation=degrees, hflip=hflip)
    turned = np.rot90(frame, round(degrees / 90))
    expected = turned[:, ::-1] if hflip else turned
    with Video(path) as video:
        shown = [video.read([1])[0], next(video.frames()).to_ndarray(format="rgb24")]
    for pixels in shown:
        assert pixels.shape == expected.shape
        assert np.abs(pixels.astype(int) - expected).mean() < 8


@pytest.mark.parametrize(("codec", "suffix"), [("vp9", "mp4"), ("vp9", "webm"), ("vp8", "avi")])
def test_resolution_that_changes_in_the_middle(tmp_path, codec, suffix):
    """All frames get the size of the first, whether it is read or not; those that have it do not change."""
    parts = [
        encode(
            tmp_path / f"{s}.{suffix}",
            [numbered_frame(s + i, height=48 * s, width=64 * s) for i in range(9)],
            codec=codec,
        )
        for s in (1, 2)
    ]
    with Video(remux(tmp_path / f"joined.{suffix}", parts)) as video, Video(parts[0]) as first:
        assert video.num_frames == 18
        for indices in ([14, 17], [0, 8, 9, 17]):
            frames = video.read(indices)
            assert frames.shape[1:] == (48, 64, 3)
            assert read_numbers(frames) == [1 + i if i < 9 else 2 + i - 9 for i in indices]
        assert np.array_equal(video.read([0, 3, 8]), first.read([0, 3, 8]))


def test_header_without_counts_and_durations(tmp_path):
    """Headers of streamed recordings have neither a number of frames nor a duration."""
    for suffix, options in (("mp4", {"movflags": "frag_keyframe+empty_moov"}), ("mkv", {"live": "1"})):
        path = encode(tmp_path / f"clip.{suffix}", container_options=options)
        with av.open(str(path)) as container:
            assert container.streams.video[0].frames == 0
        with Video(path) as video:
            assert (video.num_frames, video.fps) == (60, pytest.approx(30))
            assert read_numbers(video.read([7, 33, 59])) == [7, 33, 59]


def test_missing_frames(tmp_path):
    with Video(encode(tmp_path / "clip.mp4", 5)) as video:
        assert read_numbers(video.read([4, 4, 0])) == [4, 4, 0]
        for indices in ([5], [-1], []):
            with pytest.raises(IndexError, match="frames 0 to 4"):
                video.read(indices)


def test_one_frame(tmp_path):
    with Video(encode(tmp_path / "clip.mp4", [numbered_frame(3)])) as video:
        assert video.num_frames == 1
        assert read_numbers(video.read([0, 0])) == [3, 3]


def sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 10240), np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def read_all(path: Path) -> None:
    with Video(path) as video:
        video.read(list(range(video.num_frames)))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize(
    ("codec", "suffix", "options"),
    [("h264", "mp4", {}), ("h264", "mp4", {"movflags": "faststart"}), ("h264", "mkv", {}), ("vp9", "webm", {})],
    ids=["mp4", "mp4 faststart", "mkv", "webm"],
)
def test_truncated_files(tmp_path, codec, suffix, options, share):
    """A truncated file is never taken for a complete one."""
    path = encode(tmp_path / f"clip.{suffix}", noise(30), codec=codec, container_options=options)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=rf"Cannot read the video {path}: .*Restore the file, or remove it"):
        read_all(path)


@pytest.mark.parametrize(
    ("codec", "suffix", "options"),
    [
        ("h264", "mp4", {"movflags": "faststart"}),
        ("h264", "mp4", {"movflags": "frag_keyframe+empty_moov"}),
        ("h264", "mov", {"movflags": "faststart"}),
        ("h264", "mkv", {}),
        ("vp9", "webm", {}),
        ("h264", "avi", {}),
    ],
    ids=["mp4 faststart", "mp4 fragments", "mov", "mkv", "webm", "avi"],
)
def test_truncated_between_two_frames(tmp_path, codec, suffix, options):
    """Cut at the end of a frame (or in the sound): every remaining frame decodes, but the file is incomplete."""
    path = encode(tmp_path / f"clip.{suffix}", noise(30), codec=codec, container_options=options)
    read_all(path)
    with av.open(str(path)) as container:
        starts = sorted(packet.pos for packet in container.demux(video=0) if packet.size)
    content = path.read_bytes()
    for start in starts[9::10]:
        path.write_bytes(content[:start])
        with pytest.raises(UserError, match="it is cut off or damaged"):
            read_all(path)
    path.write_bytes(content + b"appended by somebody")  # is harmless
    read_all(path)


def test_damage_in_the_middle(tmp_path):
    path = encode(tmp_path / "clip.mp4", noise(30))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 3000] = bytes(3000)
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"Cannot read the video {path}: "):
        read_all(path)
    with Video(path) as video:  # undamaged frames can be read
        video.read([0, 3])


def test_huge_frames_are_refused(tmp_path, monkeypatch):
    path = encode(tmp_path / "clip.mp4", 3)
    monkeypatch.setattr("ats.datasets.decode.MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(UserError, match="frames of 64 x 48 pixels are too large"):
        Video(path)


def test_files_that_are_not_videos(tmp_path):
    def reason(path: Path | str) -> str:
        with pytest.raises(UserError, match=f"Cannot read the video {path}: ") as caught:
            read_all(path)
        return str(caught.value)

    assert "there is no such file" in reason(tmp_path / "none.mp4")
    assert "there is no such file" in reason("http://127.0.0.1/clip.mp4")
    assert "it is a folder: frames as images are not read" in reason(tmp_path)
    assert "it has no video stream" in reason(sound(tmp_path / "sound.mp4"))
    texts = {"empty": "", "page": "<html>404</html>" * 50, "list": "#EXTM3U\n#EXTINF:9,\nhttp://127.0.0.1:9/x.ts\n"}
    for name, text in texts.items():
        (tmp_path / f"{name}.mp4").write_text(text)
        assert "Invalid data" in reason(tmp_path / f"{name}.mp4")


def test_encoding_leaves_the_priority_of_the_process(tmp_path):
    """libsvtav1 makes a root process real-time; encoding test clips must not."""
    before = os.sched_getscheduler(0)
    encode(tmp_path / "v.mp4", 4, codec="av1")
    assert os.sched_getscheduler(0) == before

"""A video as a browser's MediaRecorder writes it: times in whole milliseconds, never evenly, and no frame rate in the file."""

import subprocess

DURATION = b"\x23\xe3\x83"  # the id of Matroska's DefaultDuration; 0xEC is that of bytes without a meaning


def record(path, rate=30, seconds=1.0, sound=True):
    import imageio_ffmpeg

    pictures = f"testsrc=size=64x48:rate={rate}:duration={seconds}"
    tone = ["-f", "lavfi", "-i", f"sine=frequency=440:duration={seconds}", "-c:a", "libvorbis"] if sound else []
    uneven = f"settb=1/1000,setpts=PTS+mod(N*7919\\,{800 // rate})"
    about = [
        "-vf",
        uneven,
        "-fps_mode",
        "passthrough",
        "-enc_time_base",
        "1/1000",
        "-pix_fmt",
        "yuv420p",
        "-c:v",
        "libvpx",
    ]
    arguments = ["-v", "error", "-f", "lavfi", "-i", pictures, *tone[:4], *about, *tone[4:], str(path)]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *arguments], check=True)
    data = bytearray(path.read_bytes())
    start = data.find(DURATION)
    if start > 0:
        size = len(DURATION) + 1 + (data[start + len(DURATION)] & 0x7F)
        data[start : start + size] = bytes([0xEC, 0x80 | (size - 2)]) + bytes(size - 2)
        path.write_bytes(data)
    return path

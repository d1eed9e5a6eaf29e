"""Builds the engine of this bundle on a Jetson, and checks it against the stored samples.

    python3 build_engine.py             all of it
    python3 build_engine.py --dry-run   what can be checked on any machine, and the plan

Needs JetPack and nothing else: its Python (3.8 or later), tensorrt, and for models with a plugin
nvcc. The engine appears when it is complete, never in part.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from typing import Any, List, NoReturn, Optional, Sequence, Tuple

FORMAT = 1
EXIT_ROOM, EXIT_BUNDLE, EXIT_SAMPLES, EXIT_VERSION, EXIT_ENGINE, EXIT_INTERRUPTED = (
    1,
    2,
    3,
    6,
    7,
    130,
)
CODES = """exit codes:
  0    done
  1    not enough memory or disk space, or a file could not be written
  2    a wrong option, an output that exists, or a file of the bundle that is damaged or missing
  3    the engine is not kept: its outputs are not those of the samples
  6    another JetPack, TensorRT or CUDA than the bundle needs, or a part of it is missing
  7    the plugin or the engine could not be built
  130  interrupted; no engine was written
"""
RELEASE, MEMORY = "/etc/nv_tegra_release", "/proc/meminfo"
CUDART = ("libcudart.so.{0}", "/usr/local/cuda/lib64/libcudart.so.{0}", "libcudart.so")
HEADERS = ("/usr/include/aarch64-linux-gnu", "/usr/include", "/usr/local/tensorrt/include")
LIBRARY = "liboptimize_tensorrt.so"
MIB = 1 << 20


class DeviceError(Exception):
    """Ends the program with a code and a message."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def say(text: str) -> None:
    """A line for whoever watches, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def fail(code: int, message: str) -> NoReturn:
    """End with ``message``."""
    raise DeviceError(code, message)


def read_manifest(folder: str) -> Any:
    """The parsed ``manifest.json``."""
    path = os.path.join(folder, "manifest.json")
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        known = content["format"] == FORMAT and bool(content["files"]["model.onnx"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(EXIT_BUNDLE, f"{path} cannot be read ({error}); copy the whole bundle again")
    if not known:
        fail(EXIT_BUNDLE, "%s has format %r, expected %d" % (path, content["format"], FORMAT))
    return content


def check_files(folder: str, manifest: Any) -> None:
    """Compare every file with its SHA-256."""
    for name, expected in sorted(manifest["files"].items()):
        path = os.path.join(folder, *name.split("/"))
        digest = hashlib.sha256()
        try:
            with open(path, "rb") as file:
                for piece in iter(lambda: file.read(MIB), b""):
                    digest.update(piece)
        except OSError as error:
            fail(EXIT_BUNDLE, f"{path}: {error.strerror}; copy the whole bundle again")
        if digest.hexdigest() != expected:
            fail(EXIT_BUNDLE, f"{path} is not as it was written (SHA-256); copy the bundle again")


def parts(version: str) -> Tuple[int, ...]:
    """Numbers of a version: "36.4.3" -> (36, 4, 3)."""
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def check_jetpack(manifest: Any) -> str:
    """The release of L4T, which must be of the bundle's major and at least its minor number."""
    try:
        with open(RELEASE, encoding="utf-8") as file:
            words = file.readline().replace(",", " ").split()
        found = words[1].lstrip("R") + "." + words[words.index("REVISION:") + 1]
    except (OSError, ValueError, IndexError):
        fail(EXIT_VERSION, f"this is no Jetson with JetPack: {RELEASE} is missing or damaged")
    wanted, own = parts(manifest["l4t"]), parts(found)
    if own[:1] != wanted[:1] or own[:2] < wanted[:2]:
        fail(
            EXIT_VERSION,
            "L4T {} found, expected {} of JetPack {}; install that, or make the bundle for this "
            "JetPack (--jetpack)".format(found, manifest["l4t"], manifest["jetpack"]),
        )
    return found


def check_versions(manifest: Any) -> Tuple[Any, Any]:
    """The modules ``tensorrt`` and the CUDA runtime, of versions that fit."""
    import engine_check  # type: ignore[import-not-found]

    say(f"JetPack: L4T {check_jetpack(manifest)}")
    try:
        import tensorrt
    except ImportError as error:
        fail(EXIT_VERSION, f"python3 has no tensorrt ({error}): apt install python3-libnvinfer")
    try:
        cuda = engine_check.Cuda([n.format(parts(manifest["cuda"])[0]) for n in CUDART])
        runtime = cuda.version()
    except engine_check.CheckError as error:
        fail(EXIT_VERSION, f"CUDA: {error}; it comes with JetPack")
    for name, found, wanted in (
        ("TensorRT", tensorrt.__version__, manifest["tensorrt"]),
        ("CUDA", runtime, manifest["cuda"]),
    ):
        if parts(found)[:1] != parts(wanted)[:1] or parts(found)[:2] < parts(wanted)[:2]:
            fail(
                EXIT_VERSION,
                f"{name} {found} found, expected {wanted} or later of the same major version, as "
                f"in JetPack {manifest['jetpack']}",
            )
        say(f"{name}: {found}")
    return tensorrt, cuda


def weights_size(folder: str, manifest: Any) -> int:
    """Bytes of the model's files."""
    names = [n for n in manifest["files"] if n.startswith("model.onnx")]
    return sum(os.path.getsize(os.path.join(folder, name)) for name in names)


def free_memory() -> int:
    """Bytes that can be had without swapping; the GPU of a Jetson takes from the same."""
    with open(MEMORY, encoding="utf-8") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise OSError(f"MemAvailable is not in {MEMORY}")


def check_room(folder: str, output: str, manifest: Any, asked: Optional[int]) -> int:
    """Compare free memory and disk with what a build takes.

    The parser holds the weights once, the builder a second time, the engine is as large again.

    Returns:
        Bytes of workspace that the builder may take: what was asked for, or half of what is left.
    """
    size = weights_size(folder, manifest)
    free, need = free_memory(), 3 * size + (asked or 64 * MIB)
    if free < need:
        fail(
            EXIT_ROOM,
            "memory: %d MiB free, about %d needed; end other programs (the desktop: sudo systemctl "
            "isolate multi-user.target) or add swap" % (free // MIB, need // MIB),
        )
    target = os.path.dirname(os.path.abspath(output))
    disk, room = shutil.disk_usage(target).free, 2 * size + 64 * MIB
    if disk < room:
        text = "disk: %d MiB free in %s, about %d needed"
        fail(EXIT_ROOM, text % (disk // MIB, target, room // MIB))
    return asked or min((free - 3 * size) // 2, 2048 * MIB)


def shapes_text(profile: Any, kind: str) -> str:
    """As trtexec takes them: "x:1x128,mask:1x128"."""
    return ",".join(
        "{}:{}".format(name, "x".join(map(str, shapes[kind])) or "scalar")
        for name, shapes in sorted(profile.items())
    )


def trtexec(manifest: Any, output: str, options: Any, workspace: Optional[int]) -> str:
    """The equivalent command of TensorRT's own tool."""
    words = ["trtexec", "--onnx=model.onnx", "--stronglyTyped", "--skipInference"]
    words += ["--saveEngine=" + output, "--builderOptimizationLevel=%d" % options.level]
    words.append("--timingCacheFile=" + options.timing_cache)
    if workspace:
        words.append("--memPoolSize=workspace:%d" % (workspace // MIB))
    for number, profile in enumerate(manifest["profiles"]):
        if len(manifest["profiles"]) > 1:
            words.append("--profile=%d" % number)
        for kind in ("min", "opt", "max"):
            words.append(f"--{kind}Shapes={shapes_text(profile, kind)}")
    if manifest["compiled"]:
        words.append("--staticPlugins=" + os.path.join(".", LIBRARY))
    return " ".join(map(shlex.quote, words))


def compiler() -> str:
    """Path of nvcc."""
    named = [os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for path in named:
        if path and os.access(path, os.X_OK):
            return path
    fail(
        EXIT_VERSION, "nvcc is not there, and the model needs a plugin: apt install nvidia-jetpack"
    )


def compile_line(nvcc: str, headers: str, folder: str, manifest: Any, output: str) -> List[str]:
    """The command that compiles the plugin library; no library of TensorRT is linked."""
    words = [nvcc, "-O2", "-std=c++17", "-shared", "-cudart", "static"]
    words += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-isystem", headers]
    words += ["-Xlinker", "--version-script=" + os.path.join(folder, manifest["exports"])]
    number = manifest["compute_capability"]
    words += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
    return [*words, "-o", output, *(os.path.join(folder, n) for n in manifest["compiled"]), "-ldl"]


def build_plugin(folder: str, manifest: Any, output: str) -> None:
    """Compile the plugin library to ``output``."""
    nvcc = compiler()
    places = [os.environ.get("TENSORRT_INCLUDE_DIR"), *HEADERS]
    found = [p for p in places if p and os.path.isfile(os.path.join(p, "NvInferRuntime.h"))]
    if not found:
        fail(EXIT_VERSION, "NvInferRuntime.h is not there: apt install libnvinfer-headers-dev")
    say("plugin: compiling (a minute or two)")
    made = "%s.%d.tmp" % (output, os.getpid())
    try:
        done = subprocess.run(  # noqa: S603
            compile_line(nvcc, found[0], folder, manifest, made),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if done.returncode:
            text = done.stdout.decode("utf-8", "replace").strip()[-2000:]
            fail(EXIT_ENGINE, "plugin: nvcc failed (%d):\n%s" % (done.returncode, text))
        os.replace(made, output)
    finally:
        remove(made)


def remove(path: str) -> None:
    """Delete a file that may not be there."""
    if os.path.exists(path):
        os.unlink(path)


def main(words: Optional[Sequence[str]] = None) -> int:
    """The command; returns its exit code."""
    options = parse(words)
    folder = os.path.dirname(os.path.abspath(__file__))
    sys.path.insert(0, folder)
    try:
        work(folder, options)
    except DeviceError as error:
        sys.stderr.write(f"build_engine: {error}\n")
        return error.code
    except KeyboardInterrupt:
        sys.stderr.write("build_engine: interrupted; no engine was written\n")
        return EXIT_INTERRUPTED
    except MemoryError:
        sys.stderr.write("build_engine: out of memory; end other programs or add swap\n")
        return EXIT_ROOM
    except OSError as error:
        sys.stderr.write(f"build_engine: {error}; no engine was written\n")
        return EXIT_ROOM
    return 0


def parse(words: Optional[Sequence[str]]) -> argparse.Namespace:
    """The options; ends with 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dry-run", action="store_true", help="check the files, print the plan; needs no Jetson")
    add("--output", default="model.engine", help="the engine (default: model.engine here)")
    add("--force", action="store_true", help="replace an engine that exists")
    add("--workspace", type=int, metavar="MIB", help="scratch memory (default: half of the free)")
    add("--level", type=int, choices=range(6), default=3, help="builder optimization, 0 to 5 (3)")
    add("--timing-cache", default="timing.cache", metavar="FILE", help="kept for the next build")
    add("--no-check", action="store_true", help="do not run the stored samples")
    options = parser.parse_args(words)
    if options.workspace is not None and options.workspace < 1:
        parser.error("--workspace: found %d, expected at least 1" % options.workspace)
    return options


def work(folder: str, options: Any) -> None:
    """Check, build, check."""
    manifest = read_manifest(folder)
    workspace = options.workspace and options.workspace * MIB
    if options.dry_run:
        check_files(folder, manifest)
        show_plan(folder, manifest, options, workspace)
        return
    if os.path.exists(options.output) and not options.force:
        fail(EXIT_BUNDLE, f"{options.output} exists; choose another --output, or --force")
    trt, cuda = check_versions(manifest)
    check_files(folder, manifest)
    import engine_build  # type: ignore[import-not-found]

    workspace = check_room(folder, options.output, manifest, workspace)
    library = None
    if manifest["compiled"]:
        library = os.path.join(os.path.dirname(os.path.abspath(options.output)), LIBRARY)
        build_plugin(folder, manifest, library)
    try:
        engine_build.build(trt, cuda, folder, manifest, options, workspace, library)
    except engine_build.BuildError as error:
        fail(error.code, str(error))


def show_plan(folder: str, manifest: Any, options: Any, workspace: Optional[int]) -> None:
    """What would be done, and with what."""
    size = weights_size(folder, manifest)
    say("bundle: %d files as they were written" % len(manifest["files"]))
    say("needs: JetPack {jetpack}, L4T {l4t}, TensorRT {tensorrt}, CUDA {cuda}".format(**manifest))
    say("needs: about %d MiB memory, %d MiB disk" % (3 * size // MIB + 64, 2 * size // MIB + 64))
    for number, profile in enumerate(manifest["profiles"]):
        texts = [kind + " " + shapes_text(profile, kind) for kind in ("min", "opt", "max")]
        say("profile %d: %s" % (number, "; ".join(texts)))
    if manifest["compiled"]:
        line = compile_line("nvcc", HEADERS[0], ".", manifest, LIBRARY)
        say("plugin: " + " ".join(map(shlex.quote, line)))
    table = manifest["samples"]
    say(
        "check: "
        + ("relative L2 error <= {:.3g}".format(table["tolerance"]) if table else "no samples")
    )
    say("or: " + trtexec(manifest, options.output, options, workspace))


if __name__ == "__main__":
    sys.exit(main())

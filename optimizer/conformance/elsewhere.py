"""Checks in another process: what importing a pass loads, what it touches, what it depends on.

Run as a module it is that process: it reads a request as JSON from stdin and answers on stdout.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optimizer import external_passes
from optimizer.conformance.behaviour import context_for, serialized
from optimizer.conformance.declared import text_of
from optimizer.conformance.models import MODELS, Sample
from optimizer.conformance.outcomes import Failure, Outcome, Status, problems
from optimizer.errors import OptimizerError
from optimizer.pass_base import GraphPass, PassOptions

#: What must not be imported before a pass runs: it takes seconds, and may not be installed.
_HEAVY = ("torch", "transformers", "onnxruntime", "tensorrt", "tensorflow", "jax")
#: Events of the interpreter (``sys.addaudithook``) that change something outside of it.
_CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate")
_REACHES_OUT = ("socket.connect", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_TIME_LIMIT = 600.0


def check_elsewhere(
    pass_class: type[GraphPass[Any]], sets: Sequence[PassOptions]
) -> Iterator[Outcome]:
    """Run the pass on all models of the suite in another process, and compare."""
    answer = _ask(pass_class, sets)
    if isinstance(answer, str):
        for check in ("import", "files", "process"):
            yield Outcome(check, "another process", Status.SKIPPED, answer)
        return
    heavy = [f"importing it imports {name}" for name in answer["imports"]]
    yield from problems("import", "the class", ((t, "import it inside of call") for t in heavy))
    touched = [f"it does {what}" for what in answer["touched"]]
    advice = "a pass gets all it needs with the model and the context"
    yield from problems("files", "all models", ((text, advice) for text in touched))
    for options, there in zip(sets, answer["digests"], strict=True):
        here = digests(pass_class, options)
        differ = [name for name in here if here[name] != there.get(name)]
        yield from problems(
            "process",
            f"options {text_of(options)}",
            (
                (
                    f"the result for model '{name}' differs from that of another process",
                    "let nothing depend on the order of sets, on hash() or id()",
                )
                for name in differ
            ),
        )


def digests(pass_class: type[GraphPass[Any]], options: PassOptions) -> dict[str, str]:
    """A digest of the result by model; models that it refuses have none."""
    found = {}
    for sample in MODELS:
        content = _result(pass_class(options), sample)
        if content is not None:
            found[sample.name] = hashlib.sha256(content).hexdigest()
    return found


def _result(graph_pass: GraphPass[Any], sample: Sample) -> bytes | None:
    model = sample.build()
    try:
        graph_pass.call(model, context_for(graph_pass, sample))
    except (OptimizerError, Failure):
        return None
    except Exception:  # reported where the pass runs in the first process
        return None
    return serialized(model)


def _ask(pass_class: type[GraphPass[Any]], sets: Sequence[PassOptions]) -> dict[str, Any] | str:
    """The answer of another process, or why there is none."""
    where = _place(pass_class)
    if where is None:
        return f"{pass_class.__qualname__} is not defined at the top of a file"
    # Results must not depend on how texts are hashed, which this number decides.
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(item or os.curdir for item in sys.path),
        "PYTHONHASHSEED": seed,
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    request = {**where, "options": [item.model_dump(mode="json") for item in sets]}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "optimizer.conformance.elsewhere"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            env=environment,
            timeout=_TIME_LIMIT,
            check=False,
        )
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return f"no answer within {_TIME_LIMIT:g} s"
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        return f"it cannot be used in another process: {last[:200]}"
    return answer


def _place(pass_class: type[GraphPass[Any]]) -> dict[str, str] | None:
    """How another process finds the class."""
    name = pass_class.__qualname__
    if "." in name:
        return None
    module = pass_class.__module__
    top = module.partition(".")[0]
    # Asked of the folders on the path, because what is in sys.modules may have come otherwise.
    spec = importlib.machinery.PathFinder.find_spec(top)
    if spec is not None and spec.origin is not None and top != "__main__":
        return {"module": module, "name": name}
    file = getattr(sys.modules.get(module), "__file__", None)
    return None if file is None else {"file": str(file), "name": name}


def _load(request: Mapping[str, Any]) -> type[GraphPass[Any]]:
    if "module" in request:
        module = importlib.import_module(request["module"])
        return external_passes.checked(getattr(module, request["name"]), request["module"])
    return external_passes.load_file(f"{request['file']}:{request['name']}")


class _Watch:
    """Notes what is done to the outside while ``active``; a hook cannot be taken away again."""

    def __init__(self) -> None:
        self.active = True
        self.seen: dict[str, None] = {}
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open" and isinstance(arguments[0], str | bytes) and _writes(*arguments[1:3]):
            path = os.fsdecode(arguments[0])
            if path != os.devnull:
                self.seen[f"open {path} for writing"] = None
        elif event in _CHANGES or event in _REACHES_OUT:
            self.seen[f"{event} {arguments[0]!s:.80}"] = None


def _writes(mode: Any, flags: Any) -> bool:
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return isinstance(flags, int) and bool(flags & _WRITING)


def main() -> None:
    """Answer the request on stdin."""
    request = json.loads(sys.stdin.read())
    pass_class = _load(request)
    imports = [name for name in _HEAVY if name in sys.modules]
    sets = [pass_class.Options.model_validate(values) for values in request["options"]]
    watch = _Watch()
    found = [digests(pass_class, options) for options in sets]
    watch.active = False
    answer = {"imports": imports, "digests": found, "touched": list(watch.seen)[:5]}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()

"""Functions written for onnx-graphsurgeon as passes: ``fix(graph: gs.Graph) -> gs.Graph | None``.

``exchange`` hands the graph over and takes it back, ``restore`` puts back what is lost on the way.
A function that fails or leaves a broken graph is a ``ScriptError``: it is an input of the user's,
not a part of this program.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import FunctionType
from typing import Any, ClassVar

import onnx_ir as ir
from pydantic import Field, create_model

from optimizer import checks
from optimizer.errors import (
    MissingDependencyError,
    OptionError,
    PassContractError,
    ScriptError,
    UnsupportedError,
    place_of,
)
from optimizer.fingerprint import fingerprint
from optimizer.gate import LEFT_OUT
from optimizer.graphsurgeon.exchange import Exchange
from optimizer.graphsurgeon.restore import put_back
from optimizer.pass_base import Context, Exactness, GraphPass, PassOptions, Report, Skip

MISSING = (
    "onnx-graphsurgeon is not installed; install it with `pip install optimize-onnx[graphsurgeon]`"
)
#: Types of attributes that onnx-graphsurgeon drops with no more than a log line.
_DROPPED = frozenset(
    {
        ir.AttributeType.TENSORS,
        ir.AttributeType.GRAPHS,
        ir.AttributeType.SPARSE_TENSOR,
        ir.AttributeType.SPARSE_TENSORS,
        ir.AttributeType.TYPE_PROTO,
        ir.AttributeType.TYPE_PROTOS,
    }
)


class ScriptOptions(PassOptions):
    """Options of every such step; parameters of the function come on top."""

    exact: bool = Field(
        default=False,
        description="The function changes no number beyond rounding: prove it, as for exact "
        "passes. Otherwise the drift is measured.",
    )
    interface: bool = Field(
        default=False, description="The function may change inputs and outputs of the model."
    )


class Script(GraphPass[ScriptOptions]):
    """Base of the passes that ``pass_of_function`` makes."""

    exactness = Exactness.APPROXIMATE
    Options = ScriptOptions
    canonical = False
    #: Nothing is known about a foreign function.
    idempotent = False
    function: ClassVar[FunctionType]

    def __init__(self, options: ScriptOptions | None = None) -> None:
        super().__init__(options)
        if self.options.exact:
            self.exactness = Exactness.REASSOCIATED
        if self.options.interface:
            self.breaks = frozenset({"inputs", "outputs"})

    def call(self, model: ir.Model, context: Context) -> Report:
        """Run the function.

        Raises:
            ScriptError: It fails, or leaves a graph that is not legal.
            UnsupportedError: The model holds what onnx-graphsurgeon would drop.
        """
        _refuse_what_is_dropped(model)
        exchange = Exchange(model)
        result = self._run(exchange.graph)
        try:
            rewritten = exchange.back(result)
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            msg = f"the graph it left is no ONNX graph: {cause}; correct {self._where()}"
            raise ScriptError(msg) from error
        put_back(model, rewritten)
        change = fingerprint(model).difference(fingerprint(rewritten))
        if change is None:
            reason = "the function changed nothing in the graph that the steps before it left"
            return Report(modified=False, skipped=(Skip(self.name, reason),))
        if not context.gate.allow(self.name):
            return Report(modified=False, skipped=(Skip(self.name, LEFT_OUT),))
        # A script may add any operator that has a domain: its author knows who runs it.
        nodes = rewritten.graph.all_nodes()
        self.emits = tuple(dict.fromkeys((node.domain, node.op_type) for node in nodes))
        report = Report(modified=True, applied=1, sites=(self.name,), details={"change": change})
        try:
            checks.check_pass(model, rewritten, self, report)
        except PassContractError as error:
            msg = f"{str(error).rstrip('.')}; correct {self._where()}"
            raise ScriptError(msg) from error
        model.graph = rewritten.graph
        model.functions.clear()
        model.functions.update(rewritten.functions)
        return report

    def _where(self) -> str:
        code = self.function.__code__
        return f"{self.function.__name__} in {code.co_filename}"

    def _run(self, graph: Any) -> Any:
        names = type(self).Options.model_fields.keys() - ScriptOptions.model_fields.keys()
        arguments = {name: getattr(self.options, name) for name in sorted(names)}
        try:
            # What it prints must not end up among results on stdout.
            with contextlib.redirect_stdout(sys.stderr):
                result = self.function(graph, **arguments)
        except MemoryError:
            raise
        except (Exception, SystemExit) as error:
            place = place_of(error, Path(self.function.__code__.co_filename))
            msg = f"{place}: {type(error).__name__}: {error}; correct the function"
            raise ScriptError(msg) from error
        if result is not None and not isinstance(result, type(graph)):
            msg = f"{self._where()} returned {type(result).__name__}, expected a gs.Graph or None"
            raise ScriptError(msg)
        return graph if result is None else result


def pass_of_function(function: FunctionType, where: str) -> type[Script]:
    """A pass that runs a function of a ``gs.Graph``.

    The function's name becomes the pass's, its further parameters become options.

    Args:
        function: Takes the graph, and returns one, or None if it changed it in place.
        where: Begin of messages.

    Raises:
        OptionError: Its parameters cannot be used.
        MissingDependencyError: onnx-graphsurgeon is not installed.
    """
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters or not _takes_graph(parameters[0]):
        msg = (
            f"{where}: a function takes a gs.Graph of onnx-graphsurgeon first; for a pass over the "
            "model itself write a class (optimize passes --template)"
        )
        raise OptionError(msg)
    fields: dict[str, Any] = {}
    for parameter in parameters[1:]:
        known = parameter.default is not parameter.empty and parameter.name not in fields
        if not known or parameter.name in ScriptOptions.model_fields:
            msg = (
                f"{where}: parameter '{parameter}' cannot be an option; it needs a default and a "
                f"name other than {' and '.join(ScriptOptions.model_fields)}"
            )
            raise OptionError(msg)
        kind = type(parameter.default) if parameter.default is not None else Any
        text = Field(default=parameter.default, description="Parameter of the function.")
        fields[parameter.name] = (kind, text)
    if importlib.util.find_spec("onnx_graphsurgeon") is None:
        raise MissingDependencyError(f"{where}: {MISSING}")
    options = create_model("Options", __base__=ScriptOptions, **fields)
    content = {
        "name": function.__name__.strip("_").replace("_", "-").lower(),
        "Options": options,
        "function": staticmethod(function),
        "__doc__": function.__doc__ or f"The function {function.__name__}.",
        "__module__": function.__module__,
    }
    return type(function.__name__, (Script,), content)


def _takes_graph(parameter: inspect.Parameter) -> bool:
    if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
        return False
    annotation = parameter.annotation
    if annotation is parameter.empty:
        return True
    text = annotation if isinstance(annotation, str) else f"{annotation.__module__}.Graph"
    return text.endswith("Graph") and not text.startswith(("ir.", "onnx_ir."))


def _refuse_what_is_dropped(model: ir.Model) -> None:
    for node in model.graph.all_nodes():
        for name, attribute in node.attributes.items():
            if attribute.type in _DROPPED:
                raise UnsupportedError(
                    f"node '{node.name}' ({node.op_type}) has attribute '{name}' of type "
                    f"{attribute.type.name}, which onnx-graphsurgeon drops; move it out of the way "
                    "before this step"
                )

"""What all passes that reduce tokens share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, TypeVar

import numpy as np
import onnx_ir as ir

from optimizer.blocks import find_blocks
from optimizer.graph import remove_dead
from optimizer.pass_base import Context, Exactness, GraphPass, PassOptions, Report, Skip
from optimizer.targets import get_target
from optimizer.tokens.cross_tokens import crosses_of
from optimizer.tokens.emit import NOTE
from optimizer.tokens.fixing import check_tokens, fix_tokens, restore
from optimizer.tokens.flow import Keeps
from optimizer.tokens.options import TokenOptions
from optimizer.tokens.reduction import Log, Reduction
from optimizer.tokens.rewrite import Method
from optimizer.tokens.towers import Tower, find_towers

OptionsT = TypeVar("OptionsT", bound=TokenOptions)


#: benchmarks/gpu_models.py, r = 8 and 16, against the same in float16.
_ON_A_GPU = (
    "on a GPU fewer tokens pay in batches: in ONNX Runtime on an H100, ViT-B took 1.5 to 3 times "
    "as long for one image, because choosing tokens takes many small kernels; bench your own"
)


class TokenPass(GraphPass[OptionsT]):
    """Base of passes that reduce tokens."""

    exactness = Exactness.APPROXIMATE
    Options: ClassVar[type[PassOptions]] = TokenOptions
    # Layers are recognised, and keys are read, before weights are quantized or packed.
    after = ("canonicalize", "cqil")

    def __init__(self, options: OptionsT | None = None) -> None:
        super().__init__(options)
        if self.options.places:
            self.breaks = frozenset({"outputs"})

    def needs_calibration(self) -> bool:
        """To search."""
        return self.options.search or self.options.drift is not None

    def reduce(
        self,
        model: ir.Model,
        context: Context,
        make: Callable[[Tower], Method],
        keeps: Keeps,
        *,
        protect: Sequence[int] = (),
        cross: Mapping[str, np.ndarray] | None = None,
    ) -> Report:
        """Reduce the tokens of every tower of ``model``, in place.

        Args:
            model: Canonical.
            context: Target and gate.
            make: The way to choose tokens of a tower.
            keeps: What that way keeps.
            protect: Positions that it needs protected.
            cross: Cross tokens to write into towers, see ``cross_tokens``.

        Raises:
            OptionError: ``r`` is a list of another length than the tower, cross tokens do not fit
                it, or the model does not take as many ``tokens``.
        """
        protected = (*self.options.protect, *protect)
        if NOTE in model.metadata_props:
            why = Skip("model", "its tokens are reduced already")
            return Report(modified=False, skipped=(why,))
        structure = find_blocks(model)
        missed = [Skip(site, reason) for site, reason in structure.misses]
        log = Log([], missed, [], [], structure.blocks)
        fixed = self.options.tokens
        before = [] if fixed is None else fix_tokens(model, structure.blocks, fixed, keeps)
        if fixed is not None and before:
            check_tokens(model, fixed, self.name)
        towers, refused = find_towers(model, structure.blocks, protected, keeps)
        log.skipped.extend(refused)
        given = crosses_of({} if cross is None else cross, towers)
        for tower, tokens in zip(towers, given, strict=True):
            Reduction(model, tower, context, self.options, self.name, make, log, tokens).run()
        log.tell_readers()
        if log.sites:
            remove_dead(model)
            model.metadata_props[NOTE] = self.name
            target = get_target(context.target)
            if target.runtime == "onnxruntime" and target.device == "cuda":
                log.notes.append(_ON_A_GPU)
        else:
            restore(before)
        if not structure.blocks and not structure.misses:
            log.skipped.append(Skip("model", "it has no transformer layers"))
        return log.report()
